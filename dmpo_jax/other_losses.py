"""Losses of errors that are no functions of the margin: MaPO without reference, Diffusion-KTO.

Errors are those of `losses`: means over H, W, C, float32, one number per latent.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmpo_jax import losses

# num_train_timesteps of every Stable Diffusion; MaPO's factor of the log-odds.
_TIMESTEPS = 1000.0
# Below this a series takes the place of x / (e^x - 1) - 1; its next term, x^6 / 30240, is 3e-11 of
# 1 there, far below float32.
_SERIES = 0.1


class MapoParts(NamedTuple):
  """What MaPO tells the log about each pair. No gradient flows through any of it.

  Attributes:
    margin: u, in nats. Without a reference it is not 0 at step 0.
    accuracy: 1 if u > 0, 0 if u < 0: whether the winner is denoised better than the loser, which
      depends on the images as much as on training; only its change means something.
    gradient_weight: |dL/du|, of the term of the margin.
  """

  margin: Float[Array, " B"]
  accuracy: Float[Array, " B"]
  gradient_weight: Float[Array, " B"]


def mapo_loss(
  err_w: Float[Array, " B"], err_l: Float[Array, " B"], *, beta_mapo: float, snr_value: float
) -> tuple[Float[Array, " B"], MapoParts]:
  """MaPO: the winner's error, and a margin between the errors themselves; no reference.

      L = err_w - beta_mapo log sigmoid(u),     u = T [o(err_w) - o(err_l)],   T = 1000
      o(e) = x / (exp(x) - 1),  x = snr_value e

  arXiv 2406.06424. Formula, constants and names are those of the public code (mapo-t2i/mapo,
  train.py; the authors'), which takes err for -log p; the paper's own text was not at hand. o is 1
  at e = 0 and falls with slope -snr_value / 2, so that for errors below 1 u is close to
  -T snr_value / 2 (err_w - err_l): DPO's margin without its reference at beta = T snr_value, 500 at
  the public snr_value.

  Args:
    err_w: the policy's error on the winner.
    err_l: on the loser.
    beta_mapo: weight of the margin's term, finite and > 0; 0.1 in the public code.
    snr_value: > 0 and finite; 0.5 in the public code.

  Returns:
    The loss, >= 0, and its parts.

  Raises:
    ValueError: a setting is out of range, or an error is in half precision.

  Equal errors leave the coin flip's log 2, 0.1 times, beside the winner's error:

  >>> import jax.numpy as jnp
  >>> err = jnp.array([0.2])
  >>> loss, parts = mapo_loss(err, err, beta_mapo=0.1, snr_value=0.5)
  >>> print(f"{loss[0]:.4f} {parts.gradient_weight[0]:.4f}")
  0.2693 0.0500
  """
  _check_positive(beta_mapo=beta_mapo, snr_value=snr_value)
  losses.check_errors(err_w=err_w, err_l=err_l)
  u = _TIMESTEPS * (_odds(snr_value * err_w) - _odds(snr_value * err_l))
  loss = err_w - beta_mapo * jax.nn.log_sigmoid(u)
  parts = MapoParts(u, 0.5 * (1.0 + jnp.sign(u)), beta_mapo * jax.nn.sigmoid(-u))
  return loss, jax.lax.stop_gradient(parts)


def _odds(x: Array) -> Array:
  """x / (e^x - 1) - 1 for x >= 0; less 1, so that the difference of two small ones is exact."""
  small = x < _SERIES
  # Both branches see an argument at which value and gradient are finite.
  low, high = jnp.where(small, x, 0.0), jnp.where(small, 1.0, x)
  # In e^-x, as e^x overflows and its gradient with it.
  whole = high * jnp.exp(-high) / -jnp.expm1(-high) - 1.0
  square = low * low
  return jnp.where(small, -0.5 * low + square / 12.0 - square * square / 720.0, whole)


class KtoParts(NamedTuple):
  """What Diffusion-KTO tells the log about each image. No gradient flows through any of it.

  Attributes:
    gain: v, in nats; positive where the image's label is heeded more than the baseline asks.
    accuracy: 1 if v > 0, 0 if v < 0 and 0.5 if v == 0.
    gradient_weight: |dL/dv|.
  """

  gain: Float[Array, " N"]
  accuracy: Float[Array, " N"]
  gradient_weight: Float[Array, " N"]


class _Utility(NamedTuple):
  """U(v), its derivative and the largest value of that."""

  value: Callable[[Array], Array]
  slope: Callable[[Array], Array]
  peak: float


_UTILITIES = {
  "sigmoid": _Utility(jax.nn.sigmoid, lambda v: jax.nn.sigmoid(v) * jax.nn.sigmoid(-v), 0.25),
  "loss_averse": _Utility(jax.nn.log_sigmoid, lambda v: jax.nn.sigmoid(-v), 1.0),
  "risk_seeking": _Utility(lambda v: -jax.nn.log_sigmoid(-v), jax.nn.sigmoid, 1.0),
}

UTILITIES = tuple(_UTILITIES)
"""Names that `kto_loss` accepts."""


def kto_loss(
  err: Float[Array, " N"],
  ref_err: Float[Array, " N"],
  desirable: Bool[Array, " N"],
  baseline: Float[Array, ""],
  *,
  beta: float,
  lambda_d: float,
  lambda_u: float,
  utility: str,
) -> tuple[Float[Array, " N"], KtoParts]:
  """Diffusion-KTO: the utility of single images that are called desirable or undesirable.

      L = lambda_y [1 - U(v)],     v = +-kappa [(ref_err - err) - z],     kappa = beta / 2

  with + and lambda_d for desirable images, - and lambda_u for the others; z is the baseline.

      utility        U(v)               dU/dv
      sigmoid        sigmoid(v)         sigmoid(v) sigmoid(-v)    Kahneman and Tversky's shape
      loss_averse    log sigmoid(v)     sigmoid(-v)               most for what is wrong still
      risk_seeking   -log sigmoid(-v)   sigmoid(v)                most for what is right already

  arXiv 2404.04465; formula and constants from its public code (jacklishufan/diffusion-kto,
  train_kto_sd_v1.5.py, `--halo`; risk_seeking is its risk_seeking_3), where kappa is written beta:
  its beta_dpo of 1000 is beta = 2000 here, so that beta means the same for every method with a
  reference.

  Args:
    err: the policy's error on the image, at the image's own timestep and noise.
    ref_err: the reference's error. Receives no gradient.
    desirable: the image's label.
    baseline: z, see `kto_baseline`, in units of the error. Receives no gradient.
    beta: as in `losses.margin`.
    lambda_d: weight of desirable images, finite and > 0; 1 in the public code.
    lambda_u: weight of undesirable ones; 1 in the public code.
    utility: one of `UTILITIES`; the public runs have sigmoid.

  Returns:
    The loss; with sigmoid in [0, lambda_y] and lambda_y / 2 at the reference; and its parts.

  Raises:
    ValueError: utility is unknown, a setting is out of range, or an error is in half precision.

  At the reference v = 0, and sigmoid's slope is 1/4:

  >>> import jax.numpy as jnp
  >>> err, labels = jnp.array([0.2, 0.2]), jnp.array([True, False])
  >>> loss, parts = kto_loss(err, err, labels, jnp.zeros(()), beta=2000.0, lambda_d=1.0,
  ...                        lambda_u=2.0, utility="sigmoid")
  >>> print(loss, parts.gradient_weight)
  [0.5 1. ] [0.25 0.5 ]
  """
  if utility not in _UTILITIES:
    raise ValueError(f"utility: expected one of {', '.join(UTILITIES)}; got {utility!r}.")
  _check_positive(beta=beta, lambda_d=lambda_d, lambda_u=lambda_u)
  losses.check_errors(err=err, ref_err=ref_err)
  ref_err, baseline = jax.lax.stop_gradient((ref_err, baseline))
  chosen = _UTILITIES[utility]
  gain = 0.5 * beta * ((ref_err - err) - baseline)
  v = jnp.where(desirable, gain, -gain)
  weight = jnp.where(desirable, lambda_d, lambda_u)
  loss = weight * (1.0 - chosen.value(v))
  parts = KtoParts(v, 0.5 * (1.0 + jnp.sign(v)), weight * chosen.slope(v))
  return loss, jax.lax.stop_gradient(parts)


def kto_baseline(mean_advantage: Float[Array, ""]) -> Float[Array, ""]:
  """What counts as nothing gained: max(0, mean over the batch of ref_err - err); no gradient.

  The public code's estimate of the KL divergence, over all images of the batch, of either label.

  >>> import jax.numpy as jnp
  >>> print(kto_baseline(jnp.array(-0.1)), kto_baseline(jnp.array(0.1)))
  0.0 0.1
  """
  return jax.lax.stop_gradient(jnp.maximum(mean_advantage, 0.0))


def kto_peak(*, lambda_d: float, lambda_u: float, utility: str) -> float:
  """The largest |dL/dv| that `kto_loss` gives to any image.

  >>> kto_peak(lambda_d=1.0, lambda_u=2.0, utility="sigmoid")
  0.5
  """
  return max(lambda_d, lambda_u) * _UTILITIES[utility].peak


def _check_positive(**settings: float) -> None:
  for name, value in settings.items():
    if not (value > 0 and math.isfinite(value)):
      raise ValueError(f"{name}: expected a finite number > 0, got {value}.")
