"""f-divergences between a policy's law and its target, safe where masses underflow.

The generators f, and where each is from, stand in the table of `losses.fpo_loss`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# Closer than this to 0 or 1, the order of the alpha-divergence cannot be told from its limit in
# float32 (unit roundoff 6e-8) at any margin that trains.
_ORDER_TOLERANCE = 1e-6


class Masses(NamedTuple):
  """An outcome, as one of a pair's two: its mass p under the policy and q under the target."""

  p: Array
  log_p: Array
  q: Array | float
  log_q: Array


class Divergence(NamedTuple):
  """An f-divergence as two functions of an outcome's masses, safe where p underflows.

  Attributes:
    term: q f(p / q), up to multiples of p - q, which cancel in the sum over the outcomes.
    weighted_derivative: p f'(p / q), in one piece because f' alone may be infinite at p = 0.
  """

  term: Callable[[Masses], Array]
  weighted_derivative: Callable[[Masses], Array]


def _mix_log(x: Masses) -> Array:
  """log((p + q) / 2)."""
  return jnp.logaddexp(x.log_p, x.log_q) - math.log(2.0)


_TABLE = {
  "fkl": Divergence(
    lambda x: x.q * (x.log_q - x.log_p),
    lambda x: x.p - x.q,
  ),
  "rkl": Divergence(
    lambda x: x.p * (x.log_p - x.log_q),
    lambda x: x.p * (x.log_p - x.log_q),
  ),
  "js": Divergence(
    lambda x: 0.5 * (x.p * (x.log_p - _mix_log(x)) + x.q * (x.log_q - _mix_log(x))),
    lambda x: 0.5 * x.p * (x.log_p - _mix_log(x)),
  ),
  "jeffreys": Divergence(
    lambda x: (x.p - x.q) * (x.log_p - x.log_q),
    lambda x: x.p * (x.log_p - x.log_q) + x.p - x.q,
  ),
  "sq_hellinger": Divergence(
    lambda x: (jnp.exp(0.5 * x.log_p) - jnp.exp(0.5 * x.log_q)) ** 2,
    lambda x: x.p - jnp.exp(0.5 * (x.log_p + x.log_q)),
  ),
  "pearson_chi2": Divergence(
    lambda x: (x.p - x.q) ** 2 / x.q,
    lambda x: 2.0 * x.p * (x.p - x.q) / x.q,
  ),
  # q^2 / p - q: with (p - q)^2 / p, autodiff would meet 0 * inf before the loss itself overflows.
  "neyman_chi2": Divergence(
    lambda x: x.q * jnp.expm1(x.log_q - x.log_p),
    lambda x: x.p - x.q * jnp.exp(x.log_q - x.log_p),
  ),
  "tv": Divergence(
    lambda x: 0.5 * jnp.abs(x.p - x.q),
    lambda x: 0.5 * x.p * jnp.sign(x.p - x.q),
  ),
  "le_cam": Divergence(
    lambda x: 0.5 * (x.p - x.q) ** 2 / (x.p + x.q),
    lambda x: 0.5 * x.p * (x.p - x.q) * (x.p + 3.0 * x.q) / (x.p + x.q) ** 2,
  ),
}

NAMES = (*_TABLE, "alpha")
"""Names of them all; "alpha" has an order besides."""


def _alpha_divergence(a: float) -> Divergence:
  """The alpha-divergence of order a, in the form that does not cancel near its nearer limit."""
  # A Python branch: under jnp.where the branch not taken would divide by zero in the gradient.
  if abs(a) < _ORDER_TOLERANCE:
    return _TABLE["rkl"]
  if abs(a - 1.0) < _ORDER_TOLERANCE:
    return _TABLE["fkl"]
  scale = a * (a - 1.0)
  if a < 0.5:

    def excess(x):
      """q^a p^(1-a) - p."""
      # Where the bound acts p is exactly 0 in float32; without it expm1 would be infinite there.
      return x.p * jnp.expm1(-a * jnp.maximum(x.log_p - x.log_q, -160.0))

    return Divergence(lambda x: excess(x) / scale, lambda x: -excess(x) / a)
  return Divergence(
    lambda x: x.q * jnp.expm1((1.0 - a) * (x.log_p - x.log_q)) / scale,
    lambda x: (x.p - x.q * jnp.exp((1.0 - a) * (x.log_p - x.log_q))) / a,
  )


def choose(divergence: str, a: float | None) -> Divergence:
  """The divergence of a name, with the order a where it is "alpha".

  Raises:
    ValueError: divergence is unknown, or a is missing, superfluous or not finite.

  >>> choose("alpha", 1.0) is choose("fkl", None)
  True
  """
  if divergence not in NAMES:
    names = ", ".join(NAMES)
    raise ValueError(f"divergence: expected one of {names}; got {divergence!r}.")
  if divergence != "alpha":
    if a is not None:
      raise ValueError(
        f"a: expected None, because divergence {divergence!r} has no order; got {a}. Leave it out, "
        "or choose divergence='alpha'."
      )
    return _TABLE[divergence]
  if a is None or not math.isfinite(a):
    raise ValueError(
      f"a: divergence 'alpha' needs its order, a finite number; got {a}. Near 0 it is rkl, near 1 "
      "fkl, at 0.5 twice sq_hellinger."
    )
  return _alpha_divergence(a)


def f_divergence(
  log_p: Float[Array, "*batch K"],
  log_q: Float[Array, "*batch K"],
  *,
  divergence: str,
  a: float | None = None,
) -> Float[Array, "*batch"]:
  """f-divergence between two laws over the same K outcomes.

      D = sum_k q_k f(p_k / q_k)

  f-PO (arXiv 2410.21662): with p_k = softmax_k(log-ratio of policy and reference) and q_k =
  softmax_k(reward) over K samples of the reference it tends to the divergence between the laws
  themselves; with K = 2 and a label it is `losses.fpo_loss`, whose table has the f. Nothing trains
  on more than two: this is what the two stand for.

  Args:
    log_p: the policy's log-masses; a row's masses add up to 1, as log_softmax makes them.
    log_q: the target's.
    divergence: one of `NAMES`.
    a: as in `losses.fpo_loss`.

  Returns:
    D >= 0, 0 where p = q; nats where logarithms enter.

  Raises:
    ValueError: if divergence is unknown, or if a is missing, superfluous or not finite.

  From (1/4, 3/4) to (1/2, 1/2) the total variation is 1/4:

  >>> import jax.numpy as jnp
  >>> log_p, log_q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
  >>> print(f_divergence(log_p, log_q, divergence="tv"))
  0.25
  """
  chosen = choose(divergence, a)
  return chosen.term(Masses(jnp.exp(log_p), log_p, jnp.exp(log_q), log_q)).sum(axis=-1)
