"""safeguards.py: the loser's scale and the winner's own term, on arrays and on small models."""

import functools
import math

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dmpo_jax import losses, safeguards

DPO = functools.partial(losses.dpo_loss, beta=2.0, label_smoothing=0.0)


def residuals(seed, pairs=12, size=24):
  """Residuals of winner and loser, the loser's from opposed to the winner's to several times it."""
  generator = np.random.default_rng(seed)
  left_w, other = generator.standard_normal((2, pairs, size)).astype(np.float32)
  share = np.linspace(-2, 4, pairs, dtype=np.float32)[:, None]
  return left_w, share * left_w + other


def scale_of(left_w, left_l, mu):
  err_w, cross = (left_w * left_w).mean(axis=-1), (left_w * left_l).mean(axis=-1)
  return safeguards.loser_scale(jnp.asarray(err_w), jnp.asarray(cross), mu=mu)


@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9, 1.0])
def test_scale_matches_the_float64_oracle(mu):
  left_w, left_l = residuals(0)
  expected = [oracles.loser_scale(*pair, mu) for pair in zip(left_w, left_l, strict=True)]
  # float32 sums of 24 terms; cross may cancel to a tenth of them.
  np.testing.assert_allclose(scale_of(left_w, left_l, mu), expected, rtol=2e-5, atol=1e-7)
  assert expected.count(1.0) > 2 and min(expected) < 1.0


def test_scale_is_finite_and_within_its_bounds_at_extremes():
  numbers = jnp.array([0.0, 1e-38, 1e-6, 1.0, 1e30])
  err_w, cross = (x.ravel() for x in jnp.meshgrid(numbers, jnp.concatenate([numbers, -numbers])))
  scale = safeguards.loser_scale(err_w, cross, mu=0.5)
  assert np.all((scale >= 0) & (scale <= 1))  # NaN is neither
  # The loser that does not oppose the winner is left alone.
  np.testing.assert_array_equal(scale[cross <= 0], 1.0)


def test_scale_gets_no_gradient_and_its_errors_value_is_kept_to_the_bit():
  left_w, left_l = map(jnp.asarray, residuals(1))

  def total(left_w):
    return safeguards.loser_scale((left_w**2).mean(1), (left_w * left_l).mean(1), mu=0.3).sum()

  assert not np.any(jax.grad(total)(left_w))
  err_l, scale = jnp.asarray(np.random.default_rng(2).random(999, np.float32)), 0.3
  np.testing.assert_array_equal(safeguards.scaled_loser(err_l, jnp.full(999, scale)), err_l)
  slope = jax.grad(lambda e: safeguards.scaled_loser(e, jnp.full(999, scale)).sum())(err_l)
  np.testing.assert_array_equal(slope, np.full(999, scale, np.float32))


@functools.partial(jax.jit, static_argnames=("predict", "mu"))
def winners_change(predict, params, inputs, target, *, mu):
  """d err_w / d (learning rate) at 0 of gradient descent on a pair, and kappa |dL/du| |g_w|^2."""

  def errors(params):
    left = predict(params, inputs) - target
    return (left**2).mean(axis=1), left

  def loss(params):
    err, left = errors(params)
    err_w, err_l = err[:1], err[1:]
    if mu is not None:
      scale = safeguards.loser_scale(err_w, (left[0] * left[1]).mean()[None], mu=mu)
      err_l = safeguards.scaled_loser(err_l, scale)
    value, parts = DPO(err_w, err_l, jnp.full(1, 0.1), jnp.full(1, 0.1))
    return value[0], parts.gradient_weight[0]

  step, weight = jax.grad(loss, has_aux=True)(params)
  gradient = jax.grad(lambda p: errors(p)[0][0])(params)
  flat, towards = (jax.flatten_util.ravel_pytree(tree)[0] for tree in (step, gradient))
  return -flat @ towards, weight * (towards @ towards)  # kappa is 1


def shift(bias, inputs):
  """A network that moves its outputs on winner and loser alike."""
  return inputs + bias[None]


def shift_problem(seed):
  """Residuals that agree in part, the loser's the larger."""
  generator = np.random.default_rng(seed)
  bias, *inputs = generator.standard_normal((3, 12)).astype(np.float32)
  inputs = np.stack([inputs[0], 1.5 * inputs[0] + inputs[1]])
  return bias, inputs, np.float32([[0.5], [-1.0]]) + np.zeros((2, 12), np.float32)


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_winners_error_does_not_rise_to_first_order(mu):
  """Where outputs stand for parameters: it falls by at least mu of what it would without a loser;
  and without the scale some winner's error rises."""
  unsafe = 0
  for seed in range(12):
    change, alone = winners_change(shift, *shift_problem(seed), mu=mu)
    assert change <= (1e-5 - mu) * alone  # float32
    unsafe += winners_change(shift, *shift_problem(seed), mu=None)[0] > 0
  assert unsafe > 2


def test_a_small_step_does_what_first_order_says():
  """The same by a step taken: the error of the winner falls with the scale, rises without."""
  for seed in range(12):
    bias, inputs, target = shift_problem(seed)
    if winners_change(shift, bias, inputs, target, mu=None)[0] < 1e-3:
      continue
    left = np.float64(inputs + bias - target)
    (g_w, g_l), (err_w, _) = 2 * left / 12, (left**2).mean(axis=1)
    scale = oracles.loser_scale(*left, 0.5)
    assert float(scale_of(*np.float32(left[:, None]), 0.5)[0]) == pytest.approx(scale, rel=1e-5)
    for factor, rises in ((scale, False), (1.0, True)):
      moved = inputs[0] + bias - 1e-3 * (g_w - factor * g_l) - target[0]
      assert ((moved**2).mean() > err_w) == rises
    return
  raise AssertionError("no pair whose winner gets worse")


def hidden(params, inputs):
  return jnp.tanh(inputs @ params[0]) @ params[1]


def test_a_network_with_hidden_units_keeps_its_winners_more_often():
  """There the bound is an approximation: two outputs share weights, not Jacobians."""
  risen = {None: 0, 0.0: 0, 0.9: 0}
  for seed in range(40):
    generator = np.random.default_rng(seed)
    params = [generator.standard_normal(s).astype(np.float32) / 3 for s in ((8, 16), (16, 8))]
    inputs, target = generator.standard_normal((2, 2, 8)).astype(np.float32)
    for both in (inputs, target):  # alike, as winner and loser are at one timestep and noise
      both[1] = both[0] + 0.3 * both[1]
    for mu in risen:
      risen[mu] += int(winners_change(hidden, params, inputs, target, mu=mu)[0] > 0)
  assert risen[0.9] == 0 and risen[0.0] < risen[None]  # of 40: 0, 10 and 18


# The winner's own term


def errors(seed):
  return tuple(jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (4, 16)), jnp.float32))


def test_sft_adds_kappa_times_the_winners_rise():
  beta, weight = 7.0, 0.3
  plain = functools.partial(losses.dmpo_loss, beta=beta, alpha=0.01)
  loss, parts = safeguards.add_sft(plain, beta=beta, weight=weight)(*errors(3))
  err_w, _, ref_err_w, _ = (np.float64(e) for e in errors(3))
  u = oracles.margin(*errors(3), beta=beta)
  expected = oracles.dmpo(u, 0.01) + weight * beta / 2 * (err_w - ref_err_w)
  np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-6)
  for part, same in zip(parts, plain(*errors(3))[1], strict=True):
    np.testing.assert_array_equal(part, same)


def test_sft_pulls_on_the_winner_alone_and_is_measured_in_slopes_of_the_margin():
  def gradients(weight):
    loss = safeguards.add_sft(DPO, beta=2.0, weight=weight)
    return jax.grad(lambda e: loss(*e)[0].sum())(errors(4))

  plain, mixed = gradients(0.0), gradients(0.25)
  np.testing.assert_allclose(mixed[0] - plain[0], np.full(16, 0.25), rtol=1e-5)  # kappa = 1
  for other in (1, 2, 3):
    np.testing.assert_array_equal(mixed[other], plain[other])
  np.testing.assert_array_equal(mixed[2:], np.zeros((2, 16)))


def test_sft_keeps_the_closed_value_at_the_reference_and_the_yardstick():
  err_w, err_l, *_ = errors(5)
  mixed = safeguards.add_sft(DPO, beta=2.0, weight=3.0)
  np.testing.assert_allclose(mixed(err_w, err_l, err_w, err_l)[0], math.log(2), rtol=1e-6)
  assert losses.peak_gradient_weight(mixed) == losses.peak_gradient_weight(DPO)


def test_weight_zero_is_the_loss_itself():
  assert safeguards.add_sft(DPO, beta=2.0, weight=0.0) is DPO


def test_sft_takes_soft_labels_along():
  plain = functools.partial(losses.dmpo_loss, beta=2.0, alpha=0.01)
  mixed = safeguards.add_sft(plain, beta=2.0, weight=1.0)
  chosen = jnp.full(16, 0.7)
  rise = errors(6)[0] - errors(6)[2]
  expected = plain(*errors(6), p_choice=chosen)[0] + rise
  np.testing.assert_allclose(mixed(*errors(6), p_choice=chosen)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("mu", [-0.1, 1.1, math.nan])
def test_mu_is_refused(mu):
  with pytest.raises(ValueError, match=rf"mu: expected a number in \[0, 1\], got {mu}"):
    safeguards.loser_scale(jnp.ones(1), jnp.ones(1), mu=mu)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weight_is_refused(weight):
  with pytest.raises(ValueError, match=f"sft_weight: expected a finite number >= 0, got {weight}"):
    safeguards.add_sft(DPO, beta=2.0, weight=weight)
