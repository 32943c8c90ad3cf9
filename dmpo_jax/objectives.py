"""The objectives of the three trainings: preference pairs, captioned images, the autoencoder.

Methods on pairs that are no loss of the margin are in `other_objectives`.

Each binds models and hyper-parameters and returns a `train_step.Objective`. Models enter as
`apply(params, ...)` functions, so that nothing here depends on flax.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dmpo_jax import diffusion, lora, losses, safeguards, train_step, types
from dmpo_jax.models import remat, shards, vae

DEAD_ZONE = 0.05  # a pair is in the dead zone when |dL/du| is below this share of its peak

PreferenceLoss = Callable[..., tuple[Float[Array, " B"], losses.LossParts]]
# (params, latents, timesteps, conditions, key data) -> the noise in each latent; see `inversion`.
Invert = Callable[..., Float[Array, "B h w c"]]


class Frozen(NamedTuple):
  """What the objectives read and never train: one jit argument, neither donated nor saved.

  Attributes:
    reference: UNet parameters of the reference.
    text_encoders: name -> parameters; None where the batches hold the prompts' embeddings.
    adapter: where a low-rank delta is trained: it at its start, zero, on top of the reference.
  """

  reference: train_step.Params | None
  text_encoders: train_step.Params | None
  adapter: lora.Adapter | None = None


class Denoiser(NamedTuple):
  """The model functions and constants that turn latents and tokens into denoising errors.

  Attributes:
    unet: (params or `lora.Adapted`, noisy latents [B, h, w, c], timesteps [B], `types.Conditions`)
      -> output [B, h, w, c].
    embed: (parameters of the text encoders, input_ids [B, *E, L], time_ids [B, 6] or None) ->
      `types.Conditions`.
    alphas_cumprod: abar_t [T].
    prediction_type: what `unet` predicts: epsilon, v_prediction or sample.
    scaling_factor: of the latents.
    dtype: in which `unet` computes.
    remat: what the backward pass finds kept, a policy of `models.remat`.
  """

  unet: Callable
  embed: Callable
  alphas_cumprod: Float[Array, " T"]
  prediction_type: str
  scaling_factor: float
  dtype: DTypeLike
  remat: str = "full"


def cast_kernels(params: train_step.Params, dtype: DTypeLike) -> train_step.Params:
  """Kernels and embeddings in the compute type, as separate values; biases and scales as they are.

  The barrier keeps XLA from undoing the rounding where it fuses the cast with a float32 operation,
  which it does on CPU: a float32 policy and its bfloat16 reference then compute the same.
  """

  def cast(leaf):
    # One by one: a barrier around all of them would hold all of them until the last is used.
    return jax.lax.optimization_barrier(leaf.astype(dtype)) if leaf.ndim > 1 else leaf

  return jax.tree.map(cast, params)


def residuals(
  denoiser: Denoiser,
  params: train_step.Params,
  latents: Float[Array, "B h w c"],
  noise: Float[Array, "B h w c"],
  timesteps: Int[Array, " B"],
  conditions: types.Conditions,
) -> Float[Array, "B h w c"]:
  """The prediction less its target, float32."""
  abar = denoiser.alphas_cumprod
  noisy = diffusion.add_noise(latents, noise, timesteps, abar)
  target = diffusion.prediction_target(denoiser.prediction_type, latents, noise, timesteps, abar)
  params = shards.gathered(params, later=remat.RUN_BLOCKS)
  prediction = denoiser.unet(params, noisy, timesteps, conditions)
  return prediction.astype(jnp.float32) - target


def squared_errors(denoiser: Denoiser, *arguments) -> Float[Array, " B"]:
  """Squared error of the prediction, *mean* over h, w, c, float32: the e of the paper's margin.

  Args:
    arguments: as of `residuals`.
  """
  return jnp.square(residuals(denoiser, *arguments)).mean(axis=(1, 2, 3))


class PairExamples(NamedTuple):
  latents: Float[Array, "B k h w c"]  # winner, loser; the winner alone; or the judged image
  noising: diffusion.Noising  # one a pair, [B, ...]; or one an image, [B, k, ...]
  input_ids: Int[Array, "B *E L"]
  p_choice: Float[Array, " B"] | None
  time_ids: Float[Array, "B 6"] | None
  image_latents: Float[Array, "B h w c"] | None
  stored: types.Conditions | None  # the prompt's embeddings, where they were made beforehand
  reference_errors: Float[Array, "B k"] | None  # likewise
  inversion_keys: UInt32[Array, "B 2 words"] | None = None  # key data for each latent
  desirable: Bool[Array, "B k"] | None = None  # of images that were judged one by one


def conditions_of(denoiser: Denoiser, frozen: Frozen, examples: PairExamples) -> types.Conditions:
  """What the UNet is told: stored embeddings, or those of the text encoders."""
  conditions = examples.stored
  if conditions is None:
    encoders = shards.gathered(cast_kernels(frozen.text_encoders, denoiser.dtype))
    conditions = denoiser.embed(encoders, examples.input_ids, examples.time_ids)
  return conditions._replace(image_latents=examples.image_latents)


def pair_errors(
  denoiser: Denoiser,
  unet_params: train_step.Params,
  examples: PairExamples,
  conditions: types.Conditions,
) -> Float[Array, "B k"]:
  """Errors of winner and loser, at the timestep and noise that the examples hold for them."""
  err = _by_image(squared_errors, denoiser, unet_params, examples, conditions)
  return err.reshape(examples.latents.shape[:2])


def pair_residuals(
  denoiser: Denoiser,
  unet_params: train_step.Params,
  examples: PairExamples,
  conditions: types.Conditions,
) -> Float[Array, "B k h w c"]:
  """What `pair_errors` squares and averages, for who needs it besides.

  Behind a barrier, so that what else is made of it leaves the errors' rounding alone: they are
  then the same for policy and reference, and margins of equal parameters are exactly zero.
  """
  left = _by_image(residuals, denoiser, unet_params, examples, conditions)
  return jax.lax.optimization_barrier(left).reshape(examples.latents.shape)


def _by_image(function, denoiser, unet_params, examples, conditions):
  """`function` of single images, one pair's beside each other."""
  # Nothing is kept for the backward pass but what stands behind barriers: it would change the
  # fusions, and so the rounding, of the policy's forward pass. As it is, policy and reference
  # compute the same, and equal parameters give a margin of exactly zero.
  forward = remat.checkpoint(functools.partial(function, denoiser), denoiser.remat)
  kernels = cast_kernels(unet_params, denoiser.dtype)
  return forward(kernels, *_images_of(examples, conditions))


def _images_of(examples: PairExamples, conditions: types.Conditions) -> tuple:
  """(latents, noise, timesteps, conditions) of single images, one pair's beside each other."""
  count, rank = examples.latents.shape[1], examples.latents.ndim

  def spread(x, rank):
    """[B, ...], which a pair's images share, or [B, k, ...] of this rank -> [B k, ...]."""
    return x.repeat(count, axis=0) if x.ndim < rank else x.reshape(-1, *x.shape[2:])

  timesteps, noise = spread(examples.noising.timesteps, 2), spread(examples.noising.noise, rank)
  # Not the prompt's embeddings: the UNet projects them once for all of a pair.
  each = jax.tree.map(lambda x: x.repeat(count, axis=0), conditions._replace(prompt_embeds=None))
  conditions = each._replace(prompt_embeds=conditions.prompt_embeds)
  return spread(examples.latents, rank), noise, timesteps, conditions


def inverted(
  denoiser: Denoiser,
  invert: Invert,
  unet_params: train_step.Params,
  examples: PairExamples,
  conditions: types.Conditions,
) -> PairExamples:
  """The pairs with the noise that the policy's inversion finds in each latent (InPO)."""
  latents, _, timesteps, both = _images_of(examples, conditions)
  kernels = cast_kernels(jax.lax.stop_gradient(unet_params), denoiser.dtype)
  keys = examples.inversion_keys.reshape(len(latents), -1)
  noise = invert(kernels, latents, timesteps, both, keys)
  # Behind a barrier: policy and reference must find the same bits in it.
  noise = jax.lax.optimization_barrier(noise.reshape(examples.latents.shape))
  return examples._replace(noising=examples.noising._replace(noise=noise))


class Draw(NamedTuple):
  """How examples are made of a batch of pairs.

  Attributes:
    timestep_power: see `diffusion.sample_noising`.
    seed: of batches whose draws are settled (`types.PreferenceBatch.draw`).
    images: fields of the batch: of winner and loser, of the winner alone, or of a judged image.
    noisings: draws of timestep and noise for a pair: 1, which its images share (Diffusion-DPO's
      code), or one for each of them.
  """

  timestep_power: float = 1.0
  seed: int = 0
  images: tuple[str, ...] = ("moments_w", "moments_l")
  noisings: int = 1


PAIR = Draw()
"""Winner and loser, which share timestep and noise."""


def draw_examples(
  denoiser: Denoiser,
  settings: Draw,
  batch: types.Batch,
  key: Key[Array, ""],
) -> PairExamples:
  """Latents, timesteps and noise of a batch's images."""
  # Winner beside loser on axis 1: a pair stays on its device (concatenation would move it).
  moments = jnp.stack([getattr(batch, name) for name in settings.images], axis=1)
  steps = len(denoiser.alphas_cumprod)

  def draw_rows(key, moments):
    key_noising, key_latents = jax.random.split(key)
    latents = vae.sample_latents(key_latents, moments, denoiser.scaling_factor)
    rows, _, *shape = latents.shape
    noising = diffusion.sample_noising(
      key_noising, (rows * settings.noisings, *shape), steps, settings.timestep_power
    )
    if settings.noisings > 1:
      noising = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), noising)
    return latents, noising

  if batch.draw is None:
    latents, noising = draw_rows(key, moments)
  else:  # the same wherever and whenever the pair comes up
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(settings.seed), batch.draw)
    drawn = jax.vmap(draw_rows)(keys, moments[:, None])
    latents, noising = jax.tree.map(lambda x: x[:, 0], drawn)
  image_latents = None
  if batch.source_moments is not None:
    image_latents, _ = vae.split_moments(batch.source_moments)
  return PairExamples(
    latents,
    noising,
    batch.input_ids,
    None,
    batch.time_ids,
    image_latents,
    _stored_conditions(batch),
    batch.reference_errors,
  )


def networks(params: train_step.Params, frozen: Frozen) -> tuple[Any, Any]:
  """Policy and reference: parameters of the UNet, or with a low-rank delta on them."""
  if frozen.adapter is None:
    return params, frozen.reference
  policy = lora.Adapted(frozen.reference, frozen.adapter._replace(delta=params))
  return policy, lora.Adapted(frozen.reference, frozen.adapter)


def dead_zone(gradient_weight: Array, peak: float) -> Array:
  """1 where a loss has hardly any gradient left, 0 elsewhere."""
  return (gradient_weight < DEAD_ZONE * peak).astype(jnp.float32)


def preference_objective(
  denoiser: Denoiser,
  loss_fn: PreferenceLoss,
  *,
  peak_weight: float,
  draw: Draw = PAIR,
  soft_labels: bool = False,
  loser_scaling: float | None = None,
  invert: Invert | None = None,
) -> train_step.Objective:
  """A loss on pairs against a frozen reference: policy parameters are trained, nothing else.

  They are those of the UNet, or a low-rank delta on the reference where `Frozen.adapter` is given.
  The source image of an edit enters as the unscaled posterior mean (Brooks et al.,
  arXiv 2211.09800, section 3.2, and diffusers' training script).

  The reference takes the very same code path, so that policy == reference gives margins of exactly
  zero. Where the batch holds its errors, it is not computed, and `Frozen.reference` not read.

  Args:
    loss_fn: (err_w, err_l, ref_err_w, ref_err_l) -> (loss [B], parts), from `losses`.
    peak_weight: the largest |dL/du| of `loss_fn`, for the dead-zone share.
    draw: winner and loser sharing timestep and noise.
    soft_labels: whether `loss_fn` is given each pair's `p_choice` besides.
    loser_scaling: mu of `safeguards.loser_scale`; None: the loser's gradient as it is.
    invert: finds the noise in the latents with the policy, in place of the drawn noise (InPO). As
      it needs parameters it runs in the loss, without gradient, once for policy and reference.
  """

  def draw_pairs(batch: types.PreferenceBatch, key) -> PairExamples:
    keys = None
    if invert is not None:
      key, key_inversion = jax.random.split(key)
      keys = jax.random.key_data(jax.random.split(key_inversion, (len(batch.moments_w), 2)))
    examples = draw_examples(denoiser, draw, batch, key)._replace(inversion_keys=keys)
    if batch.latents_l is not None:
      both = [examples.latents[:, 0], batch.latents_l.astype(jnp.float32)]
      examples = examples._replace(latents=jnp.stack(both, axis=1))
    return examples._replace(p_choice=batch.p_choice) if soft_labels else examples

  def loss(params, frozen: Frozen, examples: PairExamples):
    conditions = conditions_of(denoiser, frozen, examples)
    policy, reference = networks(params, frozen)
    if invert is not None:
      examples = inverted(denoiser, invert, policy, examples, conditions)
    metrics = {}
    if loser_scaling is None:
      errors_of = functools.partial(pair_errors, denoiser)
      err = errors_of(policy, examples, conditions)
      err_w, err_l = err[:, 0], err[:, 1]
    else:
      left = pair_residuals(denoiser, policy, examples, conditions)
      err = _mean_square(left)
      err_w, cross = err[:, 0], (left[:, 0] * left[:, 1]).mean(axis=(1, 2, 3))
      metrics["loser_scale"] = safeguards.loser_scale(err_w, cross, mu=loser_scaling)
      err_l = safeguards.scaled_loser(err[:, 1], metrics["loser_scale"])

      def errors_of(*arguments):
        return _mean_square(pair_residuals(denoiser, *arguments))

    ref_err = examples.reference_errors
    if ref_err is None:
      ref_err = errors_of(reference, examples, conditions)
    ref_err = jax.lax.stop_gradient(ref_err)
    labels = {"p_choice": examples.p_choice} if soft_labels else {}
    values, parts = loss_fn(err_w, err_l, ref_err[:, 0], ref_err[:, 1], **labels)
    metrics |= {name: value for name, value in parts._asdict().items() if value is not None}
    del metrics["gradient_weight"]
    metrics["dead_zone"] = dead_zone(parts.gradient_weight, peak_weight)
    metrics["denoising_loss"] = err.mean(axis=1)
    return values, metrics

  return train_step.Objective(draw_pairs, loss)


def _mean_square(left: Float[Array, "B k h w c"]) -> Float[Array, "B k"]:
  return jnp.square(left).mean(axis=(2, 3, 4))


def _stored_conditions(batch: types.Batch) -> types.Conditions | None:
  if batch.prompt_embeds is None:
    return None
  embeds, added = batch.prompt_embeds.astype(jnp.float32), None
  if batch.text_embeds is not None:
    added = types.AddedConditions(batch.text_embeds.astype(jnp.float32), batch.time_ids)
  return types.Conditions(embeds, added)


class CaptionedExamples(NamedTuple):
  latents: Float[Array, "B h w c"]
  noising: diffusion.Noising
  input_ids: Int[Array, "B L"]


def denoising_objective(denoiser: Denoiser, *, timestep_power: float = 1.0) -> train_step.Objective:
  """Plain denoising of captioned images (Ho et al., eq. 14): trains UNet and text encoders."""

  def draw(batch: types.CaptionedBatch, key) -> CaptionedExamples:
    key_noising, key_latents = jax.random.split(key)
    latents = vae.sample_latents(key_latents, batch.moments, denoiser.scaling_factor)
    steps = len(denoiser.alphas_cumprod)
    noising = diffusion.sample_noising(key_noising, latents.shape, steps, timestep_power)
    return CaptionedExamples(latents, noising, batch.input_ids)

  def loss(params, frozen, examples: CaptionedExamples):
    del frozen
    encoders = {name: tree for name, tree in params.items() if name != "unet"}
    encoders = shards.gathered(encoders)
    conditions = denoiser.embed(encoders, examples.input_ids, None)
    timesteps, noise = examples.noising
    err = squared_errors(denoiser, params["unet"], examples.latents, noise, timesteps, conditions)
    return err, {}

  return train_step.Objective(draw, loss)


class ImageExamples(NamedTuple):
  images: Float[Array, "B H W 3"]
  noise: Float[Array, "B h w c"]


def reconstruction_objective(
  encode: Callable, decode: Callable, *, latent_shape: tuple[int, int, int], kl_weight: float
) -> train_step.Objective:
  """Mean squared reconstruction error + kl_weight * mean KL(posterior || N(0, I)) per latent.

  The KL term, in nats, is (mean^2 + exp(logvar) - 1 - logvar) / 2 (Kingma and Welling,
  arXiv 1312.6114, appendix B). Where every latent is in use, the posterior's noise adds
  kl_weight / 2 to the squared error at the optimum. [derived: d/d logvar of both terms is equal]
  """

  def draw(batch: types.ImageBatch, key) -> ImageExamples:
    noise = jax.random.normal(key, (batch.images.shape[0], *latent_shape), jnp.float32)
    return ImageExamples(batch.images, noise)

  def loss(params, frozen, examples: ImageExamples):
    del frozen
    params = shards.gathered(params)
    mean, logvar = vae.split_moments(encode(params, examples.images))
    latents = mean + jnp.exp(0.5 * logvar) * examples.noise
    error = jnp.square(decode(params, latents) - examples.images).mean(axis=(1, 2, 3))
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean(axis=(1, 2, 3))
    return error + kl_weight * kl, {"squared_error": error, "kl": kl}

  return train_step.Objective(draw, loss)
