"""other_losses.py against float64 oracles, with the invariants of MaPO and Diffusion-KTO."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dmpo_jax import losses, other_losses

MAPO = {"beta_mapo": 0.1, "snr_value": 0.5}
KTO = {"beta": 400.0, "lambda_d": 1.0, "lambda_u": 1.5}
every_utility = pytest.mark.parametrize("utility", other_losses.UTILITIES)


def draw(seed, rows=2, count=32, low=0.05, high=0.15):
  drawn = np.random.default_rng(seed).uniform(low, high, (rows, count))
  return tuple(jnp.asarray(drawn, jnp.float32))


def labels(count=32):
  return jnp.arange(count) % 3 > 0


def kto(err, ref_err, desirable, utility, **more):
  baseline = other_losses.kto_baseline((ref_err - err).mean())
  settings = {**KTO, "utility": utility, **more}
  return other_losses.kto_loss(err, ref_err, desirable, baseline, **settings)


# MaPO


@pytest.mark.parametrize("snr_value", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("low, high", [(0.01, 0.03), (0.05, 0.25), (0.5, 2.0)])
def test_mapo_matches_the_float64_oracle(snr_value, low, high):
  errors = draw(0, low=low, high=high)
  settings = {"beta_mapo": 0.1, "snr_value": snr_value}
  loss, parts = other_losses.mapo_loss(*errors, **settings)
  expected, u = oracles.mapo(*errors, **settings)
  # 1000 times float32's rounding of numbers up to 1, of which two are subtracted.
  np.testing.assert_allclose(parts.margin, u, rtol=1e-5, atol=2e-4)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=2e-5)
  np.testing.assert_array_equal(parts.accuracy, u > 0)


def test_mapo_gradients_match_the_oracles_slopes():
  errors = draw(1)
  got = jax.grad(lambda e: other_losses.mapo_loss(*e, **MAPO)[0].sum())(errors)
  exact = [np.float64(e) for e in errors]
  for which in (0, 1):

    def value(err, which=which):
      return oracles.mapo(*(err if i == which else exact[i] for i in (0, 1)), **MAPO)[0]

    slope = oracles.slope(value, exact[which], step=1e-6)
    np.testing.assert_allclose(got[which], slope, rtol=2e-4, atol=1e-6)
  assert np.all(got[0] >= 1) and np.all(got[1] <= 0)  # the winner's own error has slope 1


def test_mapo_of_equal_errors_is_the_error_and_a_coin_flip():
  (err,) = draw(2, rows=1)
  loss, parts = other_losses.mapo_loss(err, err, **MAPO)
  np.testing.assert_array_equal(parts.margin, np.zeros(32))
  np.testing.assert_array_equal(parts.accuracy, np.full(32, 0.5))
  np.testing.assert_allclose(loss, err + 0.1 * math.log(2), rtol=1e-6)
  np.testing.assert_allclose(parts.gradient_weight, np.full(32, 0.05), rtol=1e-6)


def test_mapo_swapped_flips_the_margin():
  err_w, err_l = draw(3)
  one, other = (other_losses.mapo_loss(*e, **MAPO)[1] for e in ((err_w, err_l), (err_l, err_w)))
  np.testing.assert_array_equal(one.margin, -other.margin)
  np.testing.assert_array_equal(one.accuracy, 1 - other.accuracy)


def test_mapo_knows_the_errors_themselves():
  """Without a reference an equal shift of both errors changes the loss: by the winner's error,
  and, as x / (e^x - 1) bends, hardly in the margin."""
  err_w, err_l = draw(4)
  loss, parts = other_losses.mapo_loss(err_w, err_l, **MAPO)
  moved, moved_parts = other_losses.mapo_loss(err_w + 0.01, err_l + 0.01, **MAPO)
  assert np.all(moved - loss > 0.005)
  np.testing.assert_allclose(moved_parts.margin, parts.margin, rtol=5e-3)


def test_mapo_is_dpos_margin_without_a_reference_for_small_errors():
  errors = draw(5, low=1e-4, high=2e-3)
  zero = jnp.zeros(32)
  margin = losses.margin(*errors, zero, zero, beta=1000 * MAPO["snr_value"])
  got = other_losses.mapo_loss(*errors, **MAPO)[1].margin
  np.testing.assert_allclose(got, margin, rtol=1e-3, atol=1e-6)


def test_mapo_is_finite_at_any_error():
  errors = jnp.array([0.0, 1e-38, 1e-8, 0.19999, 0.2, 1.0, 100.0, 1e4, 1e30])
  err_w, err_l = (x.ravel() for x in jnp.meshgrid(errors, errors))
  loss, parts = other_losses.mapo_loss(err_w, err_l, **MAPO)
  gradients = jax.grad(lambda e: other_losses.mapo_loss(*e, **MAPO)[0].sum())((err_w, err_l))
  for values in (loss, *parts, *gradients):
    assert np.all(np.isfinite(values))
  # Margin's branches meet: the two sides of the series' end differ by their distance alone.
  left, right = (
    other_losses.mapo_loss(e, jnp.zeros(1), **MAPO)[1].margin
    for e in (jnp.array([0.1999999]), jnp.array([0.2000001]))
  )
  np.testing.assert_allclose(left - right, 250 * 2e-7, atol=1e-4)


# Diffusion-KTO


@every_utility
def test_kto_matches_the_float64_oracle(utility):
  err, ref_err = draw(6)
  for shift in (0.0, 0.03, -0.03):  # the baseline is in use in one of them at least
    loss, parts = kto(err - shift, ref_err, labels(), utility)
    expected, v = oracles.kto(
      np.float64(err) - np.float32(shift),
      ref_err,
      np.asarray(labels()),
      kappa=KTO["beta"] / 2,
      weights=(KTO["lambda_d"], KTO["lambda_u"]),
      utility=utility,
    )
    np.testing.assert_allclose(parts.gain, v, rtol=1e-5, atol=2e-5)  # 200 x float32 of 0.1
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=2e-5)


@every_utility
def test_kto_gradients_are_its_weights(utility):
  err, ref_err = draw(7)
  desirable, kappa = labels(), KTO["beta"] / 2
  slope = jax.grad(lambda e: kto(e, ref_err, desirable, utility)[0].sum())(err)
  weight = kto(err, ref_err, desirable, utility)[1].gradient_weight
  # Desirable images are drawn better, undesirable ones worse. 1e-4 of up to 200: jax's sigmoid
  # loses its slope to rounding where that vanishes.
  np.testing.assert_allclose(
    slope, np.where(desirable, 1, -1) * kappa * weight, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  "utility, at_reference",
  [("sigmoid", 0.5), ("loss_averse", 1 + math.log(2)), ("risk_seeking", 1 - math.log(2))],
)
def test_kto_of_identical_networks_has_its_closed_value_and_no_gain(utility, at_reference):
  (err,) = draw(8, rows=1)
  loss, parts = kto(err, err, labels(), utility)
  np.testing.assert_array_equal(parts.gain, np.zeros(32))
  np.testing.assert_array_equal(parts.accuracy, np.full(32, 0.5))
  weights = np.where(labels(), KTO["lambda_d"], KTO["lambda_u"])
  np.testing.assert_allclose(loss, weights * at_reference, rtol=1e-6)


@every_utility
def test_kto_with_the_other_label_has_the_opposite_gain(utility):
  err, ref_err = draw(9)
  one, other = (kto(err, ref_err, d, utility)[1] for d in (labels(), ~labels()))
  np.testing.assert_array_equal(one.gain, -other.gain)


def test_kto_knows_no_absolute_error():
  units = [np.round(e * 2**12) / 2**12 for e in draw(10)]
  err, ref_err = (jnp.asarray(u, jnp.float32) for u in units)
  moved = kto(err + 0.25, ref_err + 0.25, labels(), "sigmoid")[0]
  np.testing.assert_array_equal(moved, kto(err, ref_err, labels(), "sigmoid")[0])


def test_kto_takes_an_equal_gain_of_all_images_for_nothing():
  """What the baseline is for; an equal loss of all it does not take off, as it is never below 0."""
  (err,) = draw(11, rows=1)
  better = kto(err, err + 0.125, labels(), "sigmoid")[1]
  np.testing.assert_allclose(better.gain, np.zeros(32), atol=1e-4)
  worse = kto(err + 0.125, err, labels(), "sigmoid")[1]
  np.testing.assert_allclose(worse.gain, np.where(labels(), -25, 25), rtol=1e-3)


def test_kto_gives_no_gradient_to_reference_and_baseline():
  err, ref_err = draw(12)
  settings = {**KTO, "utility": "sigmoid"}

  def total(ref_err, baseline):
    return other_losses.kto_loss(err, ref_err, labels(), baseline, **settings)[0].sum()

  for gradient in jax.grad(total, (0, 1))(ref_err, jnp.array(0.01)):
    assert not np.any(gradient)
  assert not np.any(jax.grad(lambda a: other_losses.kto_baseline(a))(jnp.array(0.3)))


@every_utility
def test_kto_is_finite_at_any_gain(utility):
  ref_err = jnp.array([0.0, 1e-4, 1.0, 1e4, 1e30, 0.0, 0.0, 0.0])
  err = ref_err[::-1]
  desirable = jnp.arange(8) % 2 == 0
  settings = {**KTO, "utility": utility}

  def loss(err):
    return other_losses.kto_loss(err, ref_err, desirable, jnp.zeros(()), **settings)

  gradient = jax.grad(lambda e: loss(e)[0].sum())(err)
  for values in (*loss(err)[1], loss(err)[0], gradient):
    assert np.all(np.isfinite(values))


@every_utility
def test_kto_peak_is_the_largest_weight(utility):
  v = jnp.linspace(-30, 30, 4001)
  settings = {"lambda_d": 1.0, "lambda_u": 1.5, "utility": utility}
  loss = functools.partial(other_losses.kto_loss, beta=2.0, **settings)
  weights = [loss(-v, jnp.zeros(4001), v > s, jnp.zeros(()))[1][2].max() for s in (-99, 99)]
  assert max(map(float, weights)) == pytest.approx(other_losses.kto_peak(**settings), rel=1e-4)


# Errors


@pytest.mark.parametrize("field", ["beta_mapo", "snr_value"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_mapos_settings_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}: expected a finite number > 0, got {value}"):
    other_losses.mapo_loss(*draw(13), **{**MAPO, field: value})


@pytest.mark.parametrize("field", ["beta", "lambda_d", "lambda_u"])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_ktos_settings_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field}: expected a finite number > 0, got {value}"):
    kto(*draw(14), labels(), "sigmoid", **{field: value})


def test_unknown_utilities_are_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="one of sigmoid, loss_averse, risk_seeking; got 'fair'"):
    kto(*draw(15), labels(), "fair")


def test_half_precision_errors_are_refused():
  half = [e.astype(jnp.bfloat16) for e in draw(16)]
  with pytest.raises(ValueError, match="err_w: expected float32, got bfloat16"):
    other_losses.mapo_loss(*half, **MAPO)
  with pytest.raises(ValueError, match="err: expected float32, got bfloat16"):
    kto(*half, labels(), "sigmoid")
