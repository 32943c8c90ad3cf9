"""Objectives that are no loss of the margin: SFT, MaPO and Diffusion-KTO, on pairs or images.

What they share with `objectives.preference_objective` is there: draws, errors, networks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dmpo_jax import objectives, other_losses, sharding, train_step, types

WINNERS = objectives.Draw(images=("moments_w",))
"""The winners alone."""
SINGLE = objectives.Draw(noisings=2)
"""Winner and loser, each with a timestep and noise of its own."""
JUDGED = ("moments",)
"""Images of a `types.JudgedBatch`."""


def sft_objective(
  denoiser: objectives.Denoiser, *, draw: objectives.Draw = WINNERS
) -> train_step.Objective:
  """Plain denoising of the winners (Ho et al., arXiv 2006.11239, eq. 14): no reference, no loser.

      L = err_w

  The baseline of every paper here. Trained is what the preference losses train, the UNet or a
  low-rank delta, not the text encoders as in `objectives.denoising_objective`.

  Args:
    draw: its images are the winners.
  """

  def loss(params, frozen: objectives.Frozen, examples: objectives.PairExamples):
    conditions = objectives.conditions_of(denoiser, frozen, examples)
    policy, _ = objectives.networks(params, frozen)
    err_w = objectives.pair_errors(denoiser, policy, examples, conditions)[:, 0]
    return err_w, {"denoising_loss": err_w}

  return train_step.Objective(_drawer(denoiser, draw), loss)


def mapo_objective(
  denoiser: objectives.Denoiser,
  loss_fn: Callable[[Array, Array], tuple[Float[Array, " B"], other_losses.MapoParts]],
  *,
  peak_weight: float,
  draw: objectives.Draw = objectives.PAIR,
) -> train_step.Objective:
  """A loss of the two errors alone: `Frozen.reference` is not read but by a low-rank delta.

  Logged are the errors themselves where `objectives.preference_objective` logs advantages over the
  reference.

  Args:
    loss_fn: (err_w, err_l) -> (loss [B], parts): `other_losses.mapo_loss`, bound.
    peak_weight: the largest |dL/du| of `loss_fn`, for the dead-zone share.
    draw: winner and loser sharing timestep and noise.
  """

  def loss(params, frozen: objectives.Frozen, examples: objectives.PairExamples):
    conditions = objectives.conditions_of(denoiser, frozen, examples)
    policy, _ = objectives.networks(params, frozen)
    err = objectives.pair_errors(denoiser, policy, examples, conditions)
    values, parts = loss_fn(err[:, 0], err[:, 1])
    return values, {
      "margin": parts.margin,
      "accuracy": parts.accuracy,
      "winner_error": err[:, 0],
      "loser_error": err[:, 1],
      "dead_zone": objectives.dead_zone(parts.gradient_weight, peak_weight),
      "denoising_loss": err.mean(axis=1),
    }

  return train_step.Objective(_drawer(denoiser, draw), loss)


def kto_objective(
  denoiser: objectives.Denoiser,
  loss_fn: Callable[..., tuple[Float[Array, " N"], other_losses.KtoParts]],
  *,
  peak_weight: float,
  beta: float,
  draw: objectives.Draw = SINGLE,
) -> train_step.Objective:
  """Diffusion-KTO on images judged one by one, or on pairs taken apart.

  Of pairs, winners are desirable images, losers undesirable ones. Each has a timestep and noise of
  its own, so that nothing of the loss says which two were a pair; a pair's row is the mean of its
  two images. The loss of a batch of pairs is that of the batch of their images.

  The baseline is the mean over the images that all devices have before them: with `accumulation`,
  over those of one part, as in the public code. So are the two advantages that are logged: of all
  desirable and of all undesirable ones, 0 where there is none.

  Args:
    loss_fn: (err, ref_err, desirable, baseline) -> (loss [N], parts): `other_losses.kto_loss`.
    peak_weight: the largest |dL/dv| of `loss_fn`, for the dead-zone share.
    beta: that of `loss_fn`, for the margin that is logged: kappa times the difference of the two
      advantages, as elsewhere, but at two timesteps.
    draw: winner and loser with two draws of noise; of judged images, `JUDGED` with one.
  """

  def draw_images(batch: types.Batch, key) -> objectives.PairExamples:
    if isinstance(batch, types.PreferenceBatch):
      return objectives.draw_examples(denoiser, draw, batch, key)
    single = draw._replace(images=JUDGED, noisings=1)
    examples = objectives.draw_examples(denoiser, single, batch, key)
    return examples._replace(desirable=batch.desirable[:, None])

  def loss(params, frozen: objectives.Frozen, examples: objectives.PairExamples):
    conditions = objectives.conditions_of(denoiser, frozen, examples)
    policy, reference = objectives.networks(params, frozen)
    err = objectives.pair_errors(denoiser, policy, examples, conditions)
    ref_err = examples.reference_errors
    if ref_err is None:
      ref_err = objectives.pair_errors(denoiser, reference, examples, conditions)
    ref_err = jax.lax.stop_gradient(ref_err)
    advantage = jax.lax.stop_gradient(ref_err - err)
    baseline = other_losses.kto_baseline(sharding.mean_over_devices(advantage.mean()))
    desirable = examples.desirable
    if desirable is None:
      desirable = jnp.broadcast_to(jnp.array([True, False]), err.shape)
    values, parts = loss_fn(err.ravel(), ref_err.ravel(), desirable.ravel(), baseline)
    values, parts = jax.tree.map(lambda x: x.reshape(err.shape), (values, parts))
    kappa = 0.5 * beta
    winner, loser = (_advantage_of(label, advantage) for label in (desirable, ~desirable))
    return values.mean(axis=1), {
      "margin": kappa * (winner - loser),
      "accuracy": parts.accuracy.mean(axis=1),
      "winner_advantage": winner,
      "loser_advantage": loser,
      "baseline": jnp.broadcast_to(kappa * baseline, err.shape[:1]),
      "dead_zone": objectives.dead_zone(parts.gradient_weight, peak_weight).mean(axis=1),
      "denoising_loss": err.mean(axis=1),
    }

  return train_step.Objective(draw_images, loss)


def _advantage_of(chosen: Bool[Array, "B k"], advantage: Float[Array, "B k"]) -> Float[Array, " B"]:
  """A column whose mean over all rows is the mean over the chosen images; 0 if there is none."""
  share = sharding.mean_over_devices(chosen.mean())
  column = jnp.where(chosen, advantage, 0.0).mean(axis=1)
  return column / jnp.where(share > 0, share, 1.0)


def _drawer(denoiser: objectives.Denoiser, draw: objectives.Draw) -> Callable:
  return lambda batch, key: objectives.draw_examples(denoiser, draw, batch, key)
