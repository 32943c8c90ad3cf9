"""Safeguards of the winner, for any loss on a margin: what keeps err_w from rising.

A margin also grows where both errors rise, the loser's faster (likelihood displacement): no loss of
`losses` sees the difference. Two remedies, each alone or both together: `scaled_loser` takes from
the loser's gradient what would raise the winner's error, `add_sft` lets the winner pull by itself.
Neither moves the margin by a bit, so that one of exactly 0 stays so.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax import losses


def loser_scale(
  err_w: Float[Array, " B"], cross: Float[Array, " B"], *, mu: float
) -> Float[Array, " B"]:
  """Factor of the loser's gradient with which the winner's error does not rise, to first order.

  A pair loss moves the outputs by a multiple of -g_w + s g_l, g_w and g_l being the gradients of
  err_w and err_l with respect to the network's outputs on winner and loser. The largest s <= 1 with

      (-g_w + s g_l) . g_w <= -mu |g_w|^2       is       s = min(1, (1 - mu) |g_w|^2 / (g_l . g_w))

  where g_l . g_w > 0, and 1 elsewhere: there the loser's step lowers the winner's error too. As g
  is 2 / N times the residual d (output - target), N the elements of a latent,

      s = min(1, (1 - mu) err_w / cross),        err_w = mean(d_w^2),  cross = mean(d_w d_l)

  Diffusion-SDPO (arXiv 2511.03317; AIDC-AI/Diffusion-SDPO, train.py, `get_adaptive_lose_l_scale`,
  `--winner_preserving_mu`). There one factor is computed for the pairs of a device, of which there
  is one in its launchers; here each pair has its own. Outputs stand for parameters: the bound is
  exact where a step of the parameters moves the outputs on winner and loser alike, and close to it
  as far as they share the network's Jacobian, which timestep, noise and caption of a pair favour.
  It speaks of steps that raise the margin. Beyond the minimum of a loss with one (DMPO, IPO) the
  step goes backwards, towards the reference, and the winner's error rises with it as it should.

  Args:
    err_w: the policy's error on the winner.
    cross: the mean over h, w, c of the product of the policy's two residuals.
    mu: how much of the winner's own progress is kept, in [0, 1]: 0, its error does not rise; 1,
      the loser pushes only where that helps. Public launchers have 0.9 (DPO, DMPO, SD 1.5), 0.6.

  Returns:
    s in [0, 1]; no gradient flows through it.

  Raises:
    ValueError: mu is outside [0, 1].

  A loser that points the winner's way keeps (1 - mu) err_w / cross of its gradient:

  >>> import jax.numpy as jnp
  >>> print(loser_scale(jnp.array([0.5, 0.5]), jnp.array([1.0, -1.0]), mu=0.5))
  [0.25 1.  ]
  """
  if not 0 <= mu <= 1:
    raise ValueError(
      f"mu: expected a number in [0, 1], got {mu}. It is the share of the winner's progress that "
      "the loser must leave (objective.loser_scaling); public runs use 0.6 to 0.9, None is off."
    )
  opposed = cross > 0
  scale = jnp.where(opposed, (1.0 - mu) * err_w / jnp.where(opposed, cross, 1.0), 1.0)
  return jax.lax.stop_gradient(jnp.minimum(scale, 1.0))


def scaled_loser(err_l: Float[Array, " B"], scale: Float[Array, " B"]) -> Float[Array, " B"]:
  """`err_l` to the bit, with `scale` times its gradient.

  >>> import jax, jax.numpy as jnp
  >>> half = jnp.array([0.5])
  >>> print(scaled_loser(half, 0.2 * half), jax.grad(lambda e: scaled_loser(e, half).sum())(half))
  [0.5] [0.5]
  """
  constant = jax.lax.stop_gradient(err_l)
  return constant + jax.lax.stop_gradient(scale) * (err_l - constant)


def add_sft(
  loss_fn: Callable[..., tuple[Array, losses.LossParts]], *, beta: float, weight: float
) -> Callable[..., tuple[Array, losses.LossParts]]:
  """The pair loss plus the winner's denoising error, in units of the margin.

      L' = L + weight * kappa * (err_w - ref_err_w),        kappa = beta / 2

  The margin holds the winner as -kappa (err_w - ref_err_w), so that d L' / d err_w is kappa times
  (-dL/du + weight): `weight` is measured against |dL/du|, 1 at most for DPO, and means the same at
  any beta, latent size and learning rate. With kappa err_w for -beta log p(winner), as the margin
  has it, this is DPO with a term of negative log-likelihood (for language models: RPO,
  arXiv 2404.19733). The reference's error is a constant, without gradient: it keeps the loss at
  step 0 at its closed value and takes out the noise that policy and reference share. [derived]

  Args:
    loss_fn: (err_w, err_l, ref_err_w, ref_err_l, **labels) -> (loss, parts), of `losses`.
    beta: that of `loss_fn`.
    weight: >= 0 and finite; 0 gives `loss_fn` itself.

  Returns:
    A function like `loss_fn`, with its parts: margin and gradient weight are those of L.

  Raises:
    ValueError: weight is negative or not finite.

  With kappa = 1 and weight 2, a winner's error that is 1/4 higher costs 1/2 beside DPO's loss:

  >>> import functools, jax.numpy as jnp
  >>> dpo = functools.partial(losses.dpo_loss, beta=2.0, label_smoothing=0.0)
  >>> errors = [jnp.array([e]) for e in (0.5, 0.5, 0.25, 0.5)]
  >>> print(add_sft(dpo, beta=2.0, weight=2.0)(*errors)[0] - dpo(*errors)[0])
  [0.5]
  """
  if not (weight >= 0 and math.isfinite(weight)):
    raise ValueError(
      f"sft_weight: expected a finite number >= 0, got {weight}. It is the pull of the winner's "
      "own error beside |dL/du|, which is 1 at most for DPO; 0 is off."
    )
  if weight == 0:
    return loss_fn

  @functools.wraps(loss_fn)
  def loss(err_w, err_l, ref_err_w, ref_err_l, **labels):
    value, parts = loss_fn(err_w, err_l, ref_err_w, ref_err_l, **labels)
    rise = err_w - jax.lax.stop_gradient(ref_err_w)
    return value + weight * 0.5 * beta * rise, parts

  return loss
