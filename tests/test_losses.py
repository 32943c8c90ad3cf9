"""losses.py against float64 oracles, published shapes and invariants."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy import optimize

from dmpo_jax import divergences, losses

ALPHA = 0.01
TARGET = math.log((1 - ALPHA) / ALPHA)
# kappa = 1, so that an error gap is a margin.
BETA = 2.0


def bind_fpo(divergence, alpha=ALPHA, **order):
  return functools.partial(losses.fpo_loss, beta=BETA, alpha=alpha, divergence=divergence, **order)


def bind_dmpo(alpha=ALPHA):
  return functools.partial(losses.dmpo_loss, beta=BETA, alpha=alpha)


def bind_dpo(label_smoothing=0.0):
  return functools.partial(losses.dpo_loss, beta=BETA, label_smoothing=label_smoothing)


# Name -> (the loss with its settings, its float64 oracle of the margin).
LOSSES = {
  "dmpo": (bind_dmpo(), lambda u: oracles.dmpo(u, ALPHA)),
  "dpo": (bind_dpo(), lambda u: oracles.dpo(u, 0.0)),
  "dpo_smoothed": (bind_dpo(0.1), lambda u: oracles.dpo(u, 0.1)),
  # With tau = 1 the margin is the difference of log-ratios itself.
  "ipo": (functools.partial(losses.ipo_loss, beta=BETA), lambda u: oracles.ipo(u, 1.0)),
  **{
    name: (bind_fpo(name), functools.partial(oracles.fpo, alpha=ALPHA, generator=generator))
    for name, generator in oracles.GENERATORS.items()
  },
  **{
    f"alpha({a})": (
      bind_fpo("alpha", a=a),
      functools.partial(oracles.fpo, alpha=ALPHA, generator=oracles.alpha_generator(a)),
    )
    for a in (-1.0, 0.1, 0.3, 0.5, 0.9, 1.5, 2.0)
  },
}
NO_DIVERGENCE = ("dmpo", "dpo", "dpo_smoothed", "ipo")
EXPONENTIAL = ("neyman_chi2", "alpha(1.5)", "alpha(2.0)")
every_loss = pytest.mark.parametrize("name", LOSSES)


# Every probe has this size, so that XLA compiles each operation once and not once per shape.
PROBES = 8192


def pad(u):
  u = np.atleast_1d(u)
  return jnp.asarray(np.pad(u, (0, PROBES - len(u))), jnp.float32), len(u)


def evaluate(loss, u):
  """The loss at given margins, through errors: with kappa = 1, margin = err_l."""
  zeros = jnp.zeros_like(u)
  return loss(zeros, u, zeros, zeros)


def at(loss, u):
  padded, count = pad(u)
  return jax.tree.map(lambda x: np.asarray(x)[:count], evaluate(loss, padded))


def slope_at(loss, u):
  padded, count = pad(u)
  return np.asarray(jax.grad(lambda u: evaluate(loss, u)[0].sum())(padded))[:count]


def curvature_at(loss, u):
  padded, count = pad(u)
  slope = jax.grad(lambda u: evaluate(loss, u)[0].sum())
  return np.asarray(jax.grad(lambda u: slope(u).sum())(padded))[:count]


def leaves(parts):
  """The parts that a loss has: the flipper is SePPO's alone."""
  return [part for part in parts if part is not None]


def random_errors(seed, pairs=16, unit=2.0**-12):
  """Four arrays of errors near 0.1, multiples of `unit` so that sums and shifts are exact."""
  draws = np.random.default_rng(seed).integers(0.05 / unit, 0.15 / unit, (4, pairs))
  return tuple(jnp.asarray(draws * unit, jnp.float32))


# Values


@every_loss
def test_value_and_slope_match_the_float64_oracle(name):
  loss, oracle = LOSSES[name]
  # No point of this grid is tv's kink at the target margin, 4.595.
  u = np.linspace(-8, 8, 33)
  value, parts = at(loss, u)
  expected, slope = oracle(u), oracles.slope(oracle, u)
  # float32: 6e-8 per operation, a dozen operations, relative to the largest intermediate. Near its
  # minimum a loss is a small difference of terms of order 1, hence the absolute part.
  np.testing.assert_allclose(value, expected, rtol=2e-6, atol=5e-7)
  np.testing.assert_allclose(slope_at(loss, u), slope, rtol=5e-6, atol=1e-6)
  np.testing.assert_allclose(parts.gradient_weight, np.abs(slope), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize(
  "alpha, m, at_reference, slope, peak, peak_at, convex_from, convex_to, far_left",
  [
    (1e-6, 13.8155, 6.2146, -3.4539, 3.4718, -0.143, -0.143, 14.816, 13.8155),
    (4.54e-5, 10.0000, 4.3069, -2.5000, 2.5247, -0.197, -0.197, 11.000, 10.0000),
    (1e-3, 6.9068, 2.7612, -1.7267, 1.7619, -0.280, -0.280, 7.907, 6.9078),
    (0.01, 4.5951, 1.6145, -1.1488, 1.2001, -0.405, -0.405, 5.603, 4.6052),
    (0.05, 2.9444, 0.8304, -0.7361, 0.8110, -0.583, -0.583, 3.983, 2.9957),
    (0.1, 2.1972, 0.5108, -0.5493, 0.6424, -0.716, -0.716, 3.276, 2.3026),
    (0.3, 0.8473, 0.0872, -0.2118, 0.3649, -1.120, -1.120, 2.120, 1.2040),
  ],
)
def test_dmpo_shape_table(
  alpha, m, at_reference, slope, peak, peak_at, convex_from, convex_to, far_left
):
  """Values from a float64 evaluation of the closed forms, to the digits printed."""
  loss = bind_dmpo(alpha)
  digits = 6e-5
  (value,), _ = at(loss, 0.0)
  assert value == pytest.approx(at_reference, abs=digits)
  assert value == pytest.approx(0.5 * math.log(1 / (4 * alpha * (1 - alpha))), rel=1e-6)
  assert slope_at(loss, 0.0)[0] == pytest.approx(slope, abs=digits)
  assert at(loss, -1e4)[0][0] == pytest.approx(far_left, abs=digits)
  assert at(loss, 1e4)[0][0] == pytest.approx(-math.log1p(-alpha), rel=1e-6)
  np.testing.assert_array_equal(slope_at(loss, [m - 0.01, m + 0.01]) < 0, [True, False])
  u = np.linspace(-3, 3, 6001)
  weight = at(loss, u)[1].gradient_weight
  assert weight.max() == pytest.approx(peak, abs=digits)
  # The peak is flat: float32 moves its place by sqrt(6e-8), far less than the digits printed.
  assert u[weight.argmax()] == pytest.approx(peak_at, abs=2e-3)
  assert losses.peak_gradient_weight(loss) == pytest.approx(peak, abs=1e-4)
  edges = [convex_from - 0.02, convex_from + 0.02, convex_to - 0.02, convex_to + 0.02]
  curvature = curvature_at(loss, edges)
  np.testing.assert_array_equal(curvature > 0, [False, True, True, False])


@pytest.mark.parametrize(
  "name, at_reference, slope",
  [
    ("fkl", 0.6371, -0.4900),
    ("rkl", 1.6145, -1.1488),
    ("alpha(0.1)", 1.4059, -0.9861),
    ("alpha(0.5)", 0.9029, -0.6329),
    ("alpha(0.9)", 0.6731, -0.5055),
    ("js", 0.1932, -0.1340),
    ("jeffreys", 2.2516, -1.6388),
    ("sq_hellinger", 0.4515, -0.3164),
    ("pearson_chi2", 24.2525, -24.7475),
    ("neyman_chi2", 0.9604, -0.9800),
    ("tv", 0.4900, -0.2500),
    ("le_cam", 0.3160, -0.2205),
  ],
)
def test_divergences_at_the_reference(name, at_reference, slope):
  loss, _ = LOSSES[name]
  assert at(loss, 0.0)[0][0] == pytest.approx(at_reference, abs=6e-5)
  assert slope_at(loss, 0.0)[0] == pytest.approx(slope, abs=6e-5)


def test_margin_by_hand():
  # kappa = 1000. Winner 0.002 better, loser 0.001 worse than the reference: u = 2 + 1.
  args = [jnp.array([err]) for err in (0.098, 0.121, 0.100, 0.120)]
  np.testing.assert_allclose(losses.margin(*args, beta=2000.0), [3.0], rtol=1e-4)


def test_margin_matches_the_public_code():
  errors = random_errors(seed=1)
  expected = oracles.margin(*errors, beta=2000.0)
  # The errors are exact; what is left is one rounding of the product.
  np.testing.assert_allclose(losses.margin(*errors, beta=2000.0), expected, rtol=1e-6)


def test_mean_form_equals_sum_form():
  """kappa = beta / 2 on means is beta / (2 N) on sums: 0.0610 per unit at N = 16384, beta 2000."""
  elements, beta = 4 * 64 * 64, 2000.0
  assert beta / (2 * elements) == pytest.approx(0.0610, abs=5e-5)
  summed = [err * elements for err in random_errors(seed=2)]
  np.testing.assert_allclose(
    losses.margin(*random_errors(seed=2), beta=beta),
    losses.margin(*summed, beta=beta / elements),
    rtol=1e-6,
  )


def test_parts_by_hand():
  half = jnp.array([0.5, 0.5, 0.5])
  err_w, err_l = jnp.array([0.25, 0.5, 0.75]), jnp.array([0.5, 0.5, 0.375])
  loss, parts = losses.dpo_loss(err_w, err_l, half, half, beta=8.0, label_smoothing=0.0)
  np.testing.assert_array_equal(parts.winner_advantage, [0.25, 0.0, -0.25])
  np.testing.assert_array_equal(parts.loser_advantage, [0.0, 0.0, 0.125])
  np.testing.assert_array_equal(parts.margin, [1.0, 0.0, -1.5])
  np.testing.assert_array_equal(parts.accuracy, [1.0, 0.5, 0.0])
  np.testing.assert_allclose(parts.gradient_weight, 1 / (1 + np.exp(parts.margin)), rtol=1e-6)
  assert all(part.dtype == jnp.float32 and part.shape == loss.shape for part in leaves(parts))


# Relations between the losses


MARGINS = np.linspace(-12, 12, 49)


def assert_same_loss(first, second, factor=1.0, constant=0.0):
  # Two float32 evaluations of one number; the absolute part covers the cancellation at the minimum.
  np.testing.assert_allclose(
    at(first, MARGINS)[0], factor * at(second, MARGINS)[0] + constant, rtol=2e-6, atol=1e-6
  )
  np.testing.assert_allclose(
    slope_at(first, MARGINS), factor * slope_at(second, MARGINS), rtol=2e-6, atol=1e-6
  )


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.01, 0.3])
def test_fpo_rkl_is_dmpo(alpha):
  assert_same_loss(bind_fpo("rkl", alpha), bind_dmpo(alpha))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.01, 0.3])
def test_fpo_fkl_is_smoothed_dpo_less_the_labels_entropy(alpha):
  entropy = oracles.entropy(oracles.smoothed_label(alpha))
  assert_same_loss(bind_fpo("fkl", alpha), bind_dpo(alpha), constant=-entropy)


def test_jeffreys_is_the_sum_of_the_two_kl():
  both = at(bind_fpo("fkl"), MARGINS)[0] + at(bind_fpo("rkl"), MARGINS)[0]
  np.testing.assert_allclose(at(bind_fpo("jeffreys"), MARGINS)[0], both, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
  "order, name, factor",
  [
    (0.0, "rkl", 1.0),
    (1.0, "fkl", 1.0),
    (0.5, "sq_hellinger", 2.0),
    (-1.0, "pearson_chi2", 0.5),
    (2.0, "neyman_chi2", 0.5),
  ],
)
def test_alpha_divergence_at_its_named_orders(order, name, factor):
  assert_same_loss(bind_fpo("alpha", a=order), bind_fpo(name), factor=factor)


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("step", [-1e-2, -1e-4, -2e-6, -5e-7, 5e-7, 2e-6, 1e-4, 1e-2])
def test_alpha_divergence_is_exact_close_to_its_limits(limit, step):
  """On both sides of the tolerance within which the limit itself is returned.

  The formula divides a difference by the step: in float32 it would be lost, and in the oracle it
  costs 1e-16 / 2e-6. Returning the limit at 5e-7 costs log(p/q) * 5e-7 < 1e-5 relative.
  """
  loss, generator = bind_fpo("alpha", a=limit + step), oracles.alpha_generator(limit + step)
  expected = oracles.fpo(MARGINS, ALPHA, generator)
  np.testing.assert_allclose(at(loss, MARGINS)[0], expected, rtol=1e-5, atol=1e-6)
  slope = oracles.slope(lambda u: oracles.fpo(u, ALPHA, generator), MARGINS)
  np.testing.assert_allclose(slope_at(loss, MARGINS), slope, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("alpha", [1e-3, 0.01, 0.3])
def test_dmpo_is_symmetric_under_swap_of_pair_and_label(alpha):
  """L(u; alpha) = L(-u; 1 - alpha). The oracle takes the side that dmpo_loss refuses."""
  value, _ = at(bind_dmpo(alpha), MARGINS)
  np.testing.assert_allclose(value, oracles.dmpo(-MARGINS, 1 - alpha), rtol=2e-6, atol=1e-6)


def test_label_noise_is_a_larger_alpha():
  """Labels flipped with probability 0.2 act as alpha = sigmoid(-(1 - 2 * 0.2) m) = 0.0597."""
  noise = 0.2
  effective = 1 / (1 + math.exp((1 - 2 * noise) * TARGET))
  assert effective == pytest.approx(0.0597, abs=5e-5)
  loss = bind_dmpo()
  mixed = (1 - noise) * slope_at(loss, MARGINS) - noise * slope_at(loss, -MARGINS)
  np.testing.assert_allclose(mixed, slope_at(bind_dmpo(effective), MARGINS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.7, 0.95])
def test_population_optimum(chance):
  """With hard labels DMPO's best margin is (2 s - 1) m, bounded and ordered; DPO's is logit(s)."""
  u = np.linspace(-6, 6, 6001)

  def best(loss):
    return u[np.argmin(chance * at(loss, u)[0] + (1 - chance) * at(loss, -u)[0])]

  # float32 blurs a minimum of curvature c by sqrt(1e-7 / c); c > 0.01 here.
  assert best(bind_dmpo()) == pytest.approx((2 * chance - 1) * TARGET, abs=1e-2)
  assert best(bind_dpo()) == pytest.approx(math.log(chance / (1 - chance)), abs=1e-2)


def test_influence_is_bounded_where_dpos_is_not():
  def ratio(u):
    return at(bind_dmpo(), u)[1].gradient_weight / at(bind_dpo(), u)[1].gradient_weight

  # Given up far on the left; heavier than DPO in the middle, and from the pull-back on.
  np.testing.assert_allclose(ratio([-30.0, -10.0, -6.0]), [0.0, 6.6e-4, 0.026], atol=5e-4)
  np.testing.assert_array_equal(
    ratio([-1.67, -1.65, 3.56, 3.58, 5.59, 5.61]) > 1, [False, True, True, False, False, True]
  )
  assert at(bind_dpo(), -30.0)[1].gradient_weight[0] == 1.0


def test_alpha_towards_one_half_leaves_nothing_to_learn_at_the_reference():
  # -m / 4 with m = log1p(4e-6): float32 carries 0.5 - 1e-6 to 3 %.
  assert slope_at(bind_dmpo(0.5 - 1e-6), 0.0)[0] == pytest.approx(-1e-6, rel=0.05)


def test_ipo_is_azars_loss_times_tau_squared():
  tau = 0.25
  gap = np.linspace(-8, 8, 17)
  loss = functools.partial(losses.ipo_loss, beta=tau)
  np.testing.assert_allclose(at(loss, gap)[0], tau**2 * oracles.ipo(gap / 2, tau), rtol=1e-6)


def test_ipos_minimum_is_a_gap_of_one_over_beta():
  gap = jnp.array([1 / 2000])
  zero = jnp.zeros(1)
  loss, parts = losses.ipo_loss(zero, gap, zero, zero, beta=2000.0)
  assert loss[0] < 1e-12 and parts.gradient_weight[0] < 1e-6


# Several samples, and continuous laws: what the two-point losses stand for


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NO_DIVERGENCE])
def test_f_divergence_is_its_definition_and_on_two_outcomes_the_pairs_loss(name):
  divergence, _, order = name.partition("(")
  settings = {"divergence": divergence}
  settings |= {"a": float(order[:-1])} if order else {}
  rng = np.random.default_rng(0)
  p, q = (oracles.softmax(1.5 * rng.normal(size=(3, 6))) for _ in range(2))
  generator = oracles.GENERATORS.get(divergence)
  generator = generator or oracles.alpha_generator(settings["a"])
  found = divergences.f_divergence(
    *(jnp.asarray(np.log(law), jnp.float32) for law in (p, q)), **settings
  )
  np.testing.assert_allclose(found, oracles.f_divergence(p, q, generator), rtol=1e-4)
  u = np.array([-3.0, 0.0, 2.0])
  laws = oracles.preference(u), np.broadcast_to(oracles.smoothed_label(ALPHA), (3, 2))
  logs = (jnp.asarray(np.log(law), jnp.float32) for law in laws)
  found = divergences.f_divergence(*logs, **settings)
  np.testing.assert_allclose(found, at(LOSSES[name][0], u)[0], rtol=1e-4, atol=1e-6)


def central_gradient(objective, x, step=1e-5):
  """Central differences, in float64 good to about 1e-9."""
  basis = step * np.eye(len(x))
  return np.array([(objective(x + e) - objective(x - e)) / (2 * step) for e in basis])


def expected_gradient(generator, log_ratio, reward, samples, weights):
  """Gradient by log_ratio of the mean f-divergence between self-normalised samples."""

  def objective(log_ratio):
    p, q = oracles.softmax(log_ratio[samples]), oracles.softmax(reward[samples])
    return weights @ oracles.f_divergence(p, q, generator)

  return central_gradient(objective, log_ratio)


def nine_states():
  """(reference law, policy's log-ratio to it, reward)."""
  rng = np.random.default_rng(3)
  law = oracles.softmax(0.5 * rng.normal(size=9))
  log_policy = np.log(oracles.softmax(np.log(law) + rng.normal(size=9)))
  return law, log_policy - np.log(law), 1.5 * rng.normal(size=9)


def test_sampled_reverse_kl_tends_to_the_rl_gradient_and_forward_kl_does_not():
  """As K grows, for K samples of the reference; J = E[reward] - KL(policy || reference)."""
  law, log_ratio, reward = nine_states()
  rng = np.random.default_rng(4)

  def minus_j(log_ratio):
    policy = oracles.softmax(np.log(law) + log_ratio)
    return oracles.kl(policy, law) - policy @ reward

  rl = central_gradient(minus_j, log_ratio)

  def gradient(name, count):
    samples = rng.choice(9, p=law, size=(2**18 // count, count))
    weights = np.full(len(samples), 1 / len(samples))
    return expected_gradient(oracles.GENERATORS[name], log_ratio, reward, samples, weights)

  def cosine(name, count):
    other = gradient(name, count)
    return other @ rl / np.linalg.norm(other) / np.linalg.norm(rl)

  off = [np.linalg.norm(gradient("rkl", count) - rl) for count in (2, 8, 64, 1024)]
  relative = off / np.linalg.norm(rl)
  assert np.all(np.diff(relative) < 0)
  # Two samples are far from the limit. The sampling noise of 2^18 draws is below 1 %.
  assert relative[0] > 0.3 and relative[-1] < 0.02
  assert cosine("rkl", 1024) > 0.9999 and cosine("fkl", 1024) < 0.96


def test_two_sample_gradients_are_those_of_the_pair_losses():
  """Over all pairs of states: softmax over two samples is the sigmoid of the margin."""
  law, log_ratio, reward = nine_states()
  pairs = np.array([(w, x) for w in range(9) for x in range(9) if reward[w] > reward[x]])
  weights = law[pairs[:, 0]] * law[pairs[:, 1]]
  for divergence in ("rkl", "fkl"):
    gradient = np.zeros(9)
    for (winner, loser), weight in zip(pairs, weights, strict=True):
      loser_mass = 1 / (1 + math.exp(reward[winner] - reward[loser]))
      loss = {"rkl": bind_dmpo, "fkl": bind_dpo}[divergence](loser_mass)
      slope = slope_at(loss, log_ratio[winner] - log_ratio[loser])[0]
      gradient += weight * slope * (np.eye(9)[winner] - np.eye(9)[loser])
    expected = expected_gradient(oracles.GENERATORS[divergence], log_ratio, reward, pairs, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["rkl", "fkl"])
def test_reverse_kl_seeks_a_mode_and_forward_kl_the_mean(name):
  """A Gaussian fitted to 0.65 N(3, 0.6) + 0.35 N(-3, 0.6): the oracle's generators, named rightly.

  The fit has many outcomes and the losses two, so it reaches them through the oracle that they
  are held to above. Forward KL matches moments: mean 0.9, sd sqrt(0.36 + 9 - 0.81) = 2.92.
  """
  x = np.linspace(-14, 14, 1401)

  def log_normal(mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd)

  weights = math.log(0.65) + log_normal(3, 0.6), math.log(0.35) + log_normal(-3, 0.6)
  target = oracles.softmax(np.logaddexp(*weights))

  def divergence(params):
    # The floor keeps a narrow fit's tails off 0 log 0; e^-600 of mass changes nothing.
    policy = oracles.softmax(np.maximum(log_normal(params[0], math.exp(params[1])), -600))
    return oracles.f_divergence(policy, target, oracles.GENERATORS[name])

  mean, log_sd = optimize.minimize(divergence, [1.5, 0.5], method="Nelder-Mead").x
  expected = {"rkl": (3.0, 0.6), "fkl": (0.9, 2.92)}[name]
  np.testing.assert_allclose((mean, math.exp(log_sd)), expected, atol=0.02)


# Invariants of every loss


@every_loss
def test_loss_is_never_negative_and_least_at_its_target(name):
  loss, oracle = LOSSES[name]
  u = np.linspace(-8, 8, 1601)
  value, _ = at(loss, u)
  floor = {"dpo": 0.0, "dpo_smoothed": oracles.entropy(oracles.smoothed_label(0.1))}
  best = {"dpo": 8.0, "dpo_smoothed": math.log(9), "ipo": 0.5}
  # 1e-7 is float32's rounding of terms of order 1.
  assert value.min() >= floor.get(name, 0.0) - 2e-7
  assert u[value.argmin()] == pytest.approx(best.get(name, TARGET), abs=0.02)
  assert oracle(best.get(name, TARGET)) == pytest.approx(floor.get(name, 0.0), abs=1e-3)


@every_loss
def test_reference_gets_no_gradient_and_policy_gets_opposite_ones(name):
  loss, _ = LOSSES[name]
  errors = tuple(10 * err for err in random_errors(seed=5))
  gradients = jax.grad(lambda errors: loss(*errors)[0].sum())(errors)
  np.testing.assert_array_equal(gradients[0], -gradients[1])
  assert np.all(gradients[0] != 0)
  np.testing.assert_array_equal(gradients[2:], np.zeros((2, 16)))


@every_loss
def test_parts_carry_no_gradient(name):
  loss, _ = LOSSES[name]
  gradients = jax.grad(lambda errors: sum(part.sum() for part in leaves(loss(*errors)[1])))(
    random_errors(seed=6)
  )
  np.testing.assert_array_equal(gradients, np.zeros((4, 16)))


@every_loss
def test_descent_lowers_the_winners_error_below_the_target_margin(name):
  loss, _ = LOSSES[name]
  errors = [jnp.full(16, 0.1)] * 4
  gradients = jax.grad(lambda err_w, err_l: loss(err_w, err_l, *errors[2:])[0].sum(), (0, 1))(
    *errors[:2]
  )
  assert np.all(gradients[0] > 0) and np.all(gradients[1] < 0)


@every_loss
def test_identical_networks_have_margin_zero_exactly(name):
  loss, oracle = LOSSES[name]
  err_w, err_l, _, _ = random_errors(seed=7, unit=1e-7)
  value, parts = loss(err_w, err_l, err_w, err_l)
  np.testing.assert_array_equal(parts.margin, np.zeros(16))
  np.testing.assert_array_equal(parts.accuracy, np.full(16, 0.5))
  np.testing.assert_allclose(value, np.full(16, oracle(0.0)), rtol=1e-6)


def test_swapping_winner_and_loser_flips_the_margin():
  err_w, err_l, ref_err_w, ref_err_l = random_errors(seed=8)
  u = losses.margin(err_w, err_l, ref_err_w, ref_err_l, beta=2000.0)
  swapped = losses.margin(err_l, err_w, ref_err_l, ref_err_w, beta=2000.0)
  np.testing.assert_array_equal(swapped, -u)
  assert np.all(u != 0)


@pytest.mark.parametrize("shifted", [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_common_shifts_change_nothing(shifted):
  """The loss knows no absolute error: e_w and e_l may rise together unseen."""
  errors = random_errors(seed=9)
  moved = [err + 0.25 * (i in shifted) for i, err in enumerate(errors)]
  loss = functools.partial(losses.dmpo_loss, beta=20.0, alpha=ALPHA)
  np.testing.assert_array_equal(loss(*moved)[0], loss(*errors)[0])
  alone = [err + 0.25 * (i == shifted[0]) for i, err in enumerate(errors)]
  assert np.all(loss(*alone)[0] != loss(*errors)[0])


@every_loss
def test_pairs_do_not_see_each_other(name):
  """Permutation moves losses along, and a batch is its microbatches side by side."""
  loss, _ = LOSSES[name]
  errors = random_errors(seed=10)
  value, parts = loss(*errors)
  order = np.random.default_rng(11).permutation(16)
  permuted, permuted_parts = loss(*(err[order] for err in errors))
  np.testing.assert_array_equal(permuted, value[order])
  np.testing.assert_array_equal(leaves(permuted_parts), np.array(leaves(parts))[:, order])
  first, second = (loss(*(err[half] for err in errors))[0] for half in (slice(8), slice(8, 16)))
  # Eight lanes and sixteen may be vectorised differently: the last bit is free.
  np.testing.assert_allclose(np.concatenate([first, second]), value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["dmpo", "js", "alpha(0.3)"])
def test_jit_changes_nothing(name):
  loss, _ = LOSSES[name]
  errors = random_errors(seed=12)
  (value, parts), (jitted, jitted_parts) = loss(*errors), jax.jit(loss)(*errors)
  np.testing.assert_allclose(jitted, value, rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(leaves(jitted_parts), leaves(parts), rtol=2e-6, atol=1e-6)


# Extremes


EXTREMES = [-1e30, -1e4, -200.0, -100.0, -88.0, -17.0, 17.0, 88.0, 100.0, 200.0, 1e4, 1e30]


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in EXPONENTIAL])
def test_loss_and_gradient_are_finite_at_extreme_margins(name):
  loss, _ = LOSSES[name]
  u = EXTREMES[1:-1] if name == "ipo" else EXTREMES
  value, parts = at(loss, u)
  slope = slope_at(loss, u)
  assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))
  # Autodiff of expm1 is expm1 + 1, rounded at 6e-8; a weight that small beside one of order 1.
  atol = 1e-7 if name.startswith("alpha") else 1e-30
  np.testing.assert_allclose(parts.gradient_weight, np.abs(slope), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_exponential_losses_overflow_to_infinity_and_not_to_nan(name):
  loss, oracle = LOSSES[name]
  value, parts = at(loss, [-1e4, 1e4])
  np.testing.assert_array_equal(value, [np.inf, np.inf])
  np.testing.assert_array_equal(slope_at(loss, [-1e4, 1e4]), [-np.inf, np.inf])
  np.testing.assert_array_equal(parts.gradient_weight, [np.inf, np.inf])
  # 80 * 2^-24 is the rounding of an exponent of 80.
  np.testing.assert_allclose(at(loss, [-80.0])[0], oracle([-80.0]), rtol=2e-5)
  np.testing.assert_allclose(slope_at(loss, [-80.0]), oracles.slope(oracle, [-80.0]), rtol=2e-5)


def test_js_is_bounded_by_log_two():
  assert at(bind_fpo("js", 1e-6), -1e4)[0][0] == pytest.approx(math.log(2), rel=2e-5)


# The yardstick


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*EXPONENTIAL, "ipo")])
def test_peak_gradient_weight_is_the_largest_slope(name):
  loss, oracle = LOSSES[name]
  # dpo and fkl have a supremum on the far left instead, e^-20 away at the end of this grid.
  peak = np.abs(oracles.slope(oracle, np.linspace(-20, 20, 20001))).max()
  assert losses.peak_gradient_weight(loss) == pytest.approx(peak, rel=1e-4)


# Orders that grow slightly, that overflow float32 at u = 64, and that do so at 32 already.
@pytest.mark.parametrize(
  "loss",
  [LOSSES["ipo"][0], bind_fpo("neyman_chi2"), *(bind_fpo("alpha", a=a) for a in (1.01, 3.0, 6.0))],
)
def test_yardstick_without_a_peak_is_the_weight_at_the_reference(loss):
  weight = at(loss, 0.0)[1].gradient_weight[0]
  assert losses.peak_gradient_weight(loss) == pytest.approx(float(weight), rel=1e-5)


def test_peak_gradient_weight_does_not_depend_on_beta_and_may_be_traced():
  loss = functools.partial(losses.dmpo_loss, beta=2000.0, alpha=ALPHA)

  @jax.jit
  def dead_share(*errors):
    weight = loss(*errors)[1].gradient_weight
    return jnp.mean(weight < 0.05 * losses.peak_gradient_weight(loss))

  assert losses.peak_gradient_weight(loss) == pytest.approx(1.2001, abs=1e-4)
  # Margins -9 (given up), 0 (alive), m (finished), 30 (far past): three of four are dead.
  err_l = jnp.array([-9.0, 0.0, TARGET, 30.0]) / 1000
  zeros = jnp.zeros(4)
  assert dead_share(zeros, err_l, zeros, zeros) == 0.75


# Errors


def call(function, dtype=jnp.float32, **settings):
  return function(*(jnp.full(2, 0.1, dtype) for _ in range(4)), **settings)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
  "function, settings",
  [
    (losses.margin, {}),
    (losses.dmpo_loss, {"alpha": ALPHA}),
    (losses.dpo_loss, {"label_smoothing": 0.0}),
    (losses.ipo_loss, {}),
    (losses.fpo_loss, {"alpha": ALPHA, "divergence": "js"}),
  ],
)
def test_beta_is_refused(function, settings, beta):
  with pytest.raises(ValueError, match=f"beta: expected a finite number > 0, got {beta}"):
    call(function, beta=beta, **settings)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 0.99, math.nan])
@pytest.mark.parametrize(
  "function, settings", [(losses.dmpo_loss, {}), (losses.fpo_loss, {"divergence": "js"})]
)
def test_alpha_is_refused_and_explained(function, settings, alpha):
  with pytest.raises(ValueError, match=rf"alpha: .* in \(0, 0.5\), got {alpha}. .*loser's mass"):
    call(function, beta=BETA, alpha=alpha, **settings)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_is_refused(label_smoothing):
  with pytest.raises(ValueError, match=rf"label_smoothing: .* \[0, 0.5\), got {label_smoothing}"):
    call(losses.dpo_loss, beta=BETA, label_smoothing=label_smoothing)


def test_unknown_divergence_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="expected one of fkl, rkl, .*, alpha; got 'kl'"):
    call(bind_fpo("kl"))


@pytest.mark.parametrize("a", [None, math.inf, math.nan])
def test_alpha_divergence_needs_its_order(a):
  with pytest.raises(ValueError, match=f"a: .*'alpha' needs its order, .*got {a}"):
    call(bind_fpo("alpha", a=a))


@pytest.mark.parametrize("divergence", [name for name in divergences.NAMES if name != "alpha"])
def test_other_divergences_take_no_order(divergence):
  with pytest.raises(ValueError, match=f"a: expected None, because divergence '{divergence}'"):
    call(bind_fpo(divergence, a=0.5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_errors_are_refused(dtype):
  with pytest.raises(ValueError, match=f"err_w: expected float32, got {dtype.dtype}"):
    call(losses.margin, dtype, beta=BETA)


def test_every_divergence_is_tested():
  assert {*divergences.NAMES} == {*oracles.GENERATORS, "alpha"}


# soft labels

SOFT = {
  "dmpo": (bind_dmpo, oracles.dmpo),
  "dpo": (bind_dpo, oracles.dpo),
  **{
    name: (
      functools.partial(bind_fpo, name),
      functools.partial(oracles.fpo, generator=generator),
    )
    for name, generator in oracles.GENERATORS.items()
  },
}


def soft_loss(loss, u, p_choice):
  """Of margins u, made of the winner's error alone."""
  zero = jnp.zeros_like(u)
  return loss(-2 * u / BETA, zero, zero, zero, p_choice=p_choice)


@pytest.mark.parametrize("name", SOFT)
def test_soft_labels_are_a_label_mass_for_each_pair(name):
  bind, oracle = SOFT[name]
  u = np.linspace(-3, 3, 7)
  p_choice = np.array([0.5, 0.6, 0.75, 0.9, 0.99, 0.995, 1.0])
  mass = np.maximum(1 - p_choice, 0.01)
  loss, _ = soft_loss(bind(0.01), jnp.float32(u), jnp.float32(p_choice))
  # 2e-5: float32 masses of 0.01, magnified by the divergences that divide by them.
  expected = [oracle(x, m) for x, m in zip(u, mass, strict=True)]
  np.testing.assert_allclose(loss, np.ravel(expected), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOFT)
def test_certain_labels_are_the_hard_ones(name):
  loss = SOFT[name][0](0.01)
  u, zero = jnp.linspace(-5, 5, 11), jnp.zeros(11)
  hard, _ = loss(-2 * u / BETA, zero, zero, zero)
  soft, _ = soft_loss(loss, u, jnp.ones(11))
  # 1e-6: the label's mass is rounded to float32 before or after it is taken from 1.
  np.testing.assert_allclose(soft, hard, rtol=1e-6)


def test_the_target_margin_is_the_log_odds_of_the_choice():
  """And alpha bounds it: beyond it every label asks for log((1 - alpha) / alpha)."""
  p_choice = np.array([0.6, 0.8, 0.95, 1.0])
  target = np.minimum(np.log(p_choice / np.maximum(1 - p_choice, 1e-9)), np.log(0.9 / 0.1))
  loss, parts = soft_loss(bind_dmpo(0.1), jnp.float32(target), jnp.float32(p_choice))
  np.testing.assert_allclose(loss, 0, atol=1e-6)
  np.testing.assert_allclose(parts.gradient_weight, 0, atol=1e-6)


def test_an_even_choice_pulls_to_the_reference():
  loss, parts = soft_loss(bind_dmpo(), jnp.zeros(1), jnp.full(1, 0.5))
  assert float(loss[0]) == 0.0 and float(parts.gradient_weight[0]) == 0.0


# --- SePPO ---


def test_seppo_equals_its_formula():
  errors = np.random.default_rng(0).uniform(0.1, 0.3, (4, 200)).astype(np.float32)
  errors[0, :5] = errors[2, :5]  # ties on the winner
  u, flipper, expected = oracles.seppo(*errors, beta=200.0)
  loss, parts = losses.seppo_loss(*map(jnp.asarray, errors), beta=200.0)
  np.testing.assert_array_equal(parts.flipper, flipper)
  assert set(flipper[:5]) == {1.0} and {-1.0, 1.0} == set(flipper[5:])
  # kappa = 100 magnifies the rounding of errors near 0.3: 100 * 4 * 2^-26.
  np.testing.assert_allclose(parts.margin, u, atol=1e-5)
  np.testing.assert_allclose(loss, expected, atol=1e-5)


def test_seppo_at_the_reference_is_log_2_and_its_flipper_a_constant():
  err = jnp.array([0.2, 0.3])
  loss, parts = losses.seppo_loss(err, err, err, err, beta=2000.0)
  np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
  assert parts.flipper.tolist() == [1.0, 1.0] and parts.margin.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("err_w, flipper", [(0.19, 1.0), (0.21, -1.0)])
def test_seppo_pulls_the_second_image_in_where_the_winner_is_not_yet_passed(err_w, flipper):
  """dL/de_a = kappa sigmoid(-u), dL/de_s = -kappa s sigmoid(-u); nothing for the reference."""

  def loss(*errors):
    return losses.seppo_loss(*errors, beta=20.0)[0].sum()

  errors = [jnp.array([value]) for value in (err_w, 0.25, 0.2, 0.24)]
  got = jax.grad(loss, argnums=(0, 1, 2, 3))(*errors)
  u, _, _ = oracles.seppo(*map(np.asarray, errors), beta=20.0)
  weight = 10.0 / (1 + np.exp(u))
  np.testing.assert_allclose(np.stack(got[:2]), [weight, -flipper * weight], rtol=1e-5)
  assert got[2][0] == got[3][0] == 0.0
