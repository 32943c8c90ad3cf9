"""The objectives of the three trainings: preference pairs, captioned images, the autoencoder.

Each binds models and hyper-parameters and returns a `train_step.Objective`. Models enter as
`apply(params, ...)` functions, so that nothing here depends on flax.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from dmpo_jax import diffusion, lora, losses, train_step, types
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


def squared_errors(
  denoiser: Denoiser,
  params: train_step.Params,
  latents: Float[Array, "B h w c"],
  noise: Float[Array, "B h w c"],
  timesteps: Int[Array, " B"],
  conditions: types.Conditions,
) -> Float[Array, " B"]:
  """Squared error of the prediction, *mean* over h, w, c, float32: the e of the paper's margin."""
  abar = denoiser.alphas_cumprod
  noisy = diffusion.add_noise(latents, noise, timesteps, abar)
  target = diffusion.prediction_target(denoiser.prediction_type, latents, noise, timesteps, abar)
  params = shards.gathered(params, later=remat.RUN_BLOCKS)
  prediction = denoiser.unet(params, noisy, timesteps, conditions)
  return jnp.square(prediction.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


class PairExamples(NamedTuple):
  latents: Float[Array, "B 2 h w c"]  # winner, loser
  noising: diffusion.Noising  # noise [B, h, w, c], shared, or [B, 2, h, w, c]
  input_ids: Int[Array, "B *E L"]
  p_choice: Float[Array, " B"] | None
  time_ids: Float[Array, "B 6"] | None
  image_latents: Float[Array, "B h w c"] | None
  stored: types.Conditions | None  # the prompt's embeddings, where they were made beforehand
  reference_errors: Float[Array, "B 2"] | None  # likewise
  inversion_keys: UInt32[Array, "B 2 k"] | None = None  # key data for each latent


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
) -> Float[Array, "B 2"]:
  """Errors of winner and loser, which share timestep and noise (Diffusion-DPO's code); the noise
  unless it is given for each."""
  # Nothing is kept for the backward pass but what stands behind barriers: it would change the
  # fusions, and so the rounding, of the policy's forward pass. As it is, policy and reference
  # compute the same, and equal parameters give a margin of exactly zero.
  forward = remat.checkpoint(functools.partial(squared_errors, denoiser), denoiser.remat)
  latents, timesteps, both = _images_of(examples, conditions)
  noise = examples.noising.noise
  shared = noise.ndim < examples.latents.ndim
  noise = noise.repeat(2, axis=0) if shared else noise.reshape(latents.shape)
  kernels = cast_kernels(unet_params, denoiser.dtype)
  return forward(kernels, latents, noise, timesteps, both).reshape(-1, 2)


def _images_of(examples: PairExamples, conditions: types.Conditions) -> tuple:
  """(latents, timesteps, conditions) of winners and losers by turns: a pair stays together."""
  latents = examples.latents.reshape(-1, *examples.latents.shape[2:])
  # Not the prompt's embeddings: the UNet projects them once for both.
  timesteps, both = jax.tree.map(
    lambda x: x.repeat(2, axis=0),
    (examples.noising.timesteps, conditions._replace(prompt_embeds=None)),
  )
  return latents, timesteps, both._replace(prompt_embeds=conditions.prompt_embeds)


def inverted(
  denoiser: Denoiser,
  invert: Invert,
  unet_params: train_step.Params,
  examples: PairExamples,
  conditions: types.Conditions,
) -> PairExamples:
  """The pairs with the noise that the policy's inversion finds in each latent (InPO)."""
  latents, timesteps, both = _images_of(examples, conditions)
  kernels = cast_kernels(jax.lax.stop_gradient(unet_params), denoiser.dtype)
  keys = examples.inversion_keys.reshape(len(latents), -1)
  noise = invert(kernels, latents, timesteps, both, keys)
  # Behind a barrier: policy and reference must find the same bits in it.
  noise = jax.lax.optimization_barrier(noise.reshape(examples.latents.shape))
  return examples._replace(noising=examples.noising._replace(noise=noise))


def preference_objective(
  denoiser: Denoiser,
  loss_fn: PreferenceLoss,
  *,
  peak_weight: float,
  timestep_power: float = 1.0,
  soft_labels: bool = False,
  draw_seed: int = 0,
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
    timestep_power: see `diffusion.sample_noising`.
    soft_labels: whether `loss_fn` is given each pair's `p_choice` besides.
    draw_seed: of batches whose draws are settled (`types.PreferenceBatch.draw`).
    invert: finds the noise in the latents with the policy, in place of the drawn noise (InPO). As
      it needs parameters it runs in the loss, without gradient, once for policy and reference.
  """

  def draw(batch: types.PreferenceBatch, key) -> PairExamples:
    # Winner beside loser on axis 1: a pair stays on its device (concatenation would move it).
    moments = jnp.stack([batch.moments_w, batch.moments_l], axis=1)

    keys = None
    if invert is not None:
      key, key_inversion = jax.random.split(key)
      keys = jax.random.key_data(jax.random.split(key_inversion, moments.shape[:2]))

    def draw_rows(key, moments):
      key_noising, key_latents = jax.random.split(key)
      latents = vae.sample_latents(key_latents, moments, denoiser.scaling_factor)
      steps, shape = len(denoiser.alphas_cumprod), latents[:, 0].shape
      return latents, diffusion.sample_noising(key_noising, shape, steps, timestep_power)

    if batch.draw is None:
      latents, noising = draw_rows(key, moments)
    else:  # the same wherever and whenever the pair comes up
      settled = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(draw_seed), batch.draw)
      drawn = jax.vmap(draw_rows)(settled, moments[:, None])
      latents, noising = jax.tree.map(lambda x: x[:, 0], drawn)
    if batch.latents_l is not None:
      latents = jnp.stack([latents[:, 0], batch.latents_l.astype(jnp.float32)], axis=1)
    image_latents = None
    if batch.source_moments is not None:
      image_latents, _ = vae.split_moments(batch.source_moments)
    return PairExamples(
      latents,
      noising,
      batch.input_ids,
      batch.p_choice if soft_labels else None,
      batch.time_ids,
      image_latents,
      _stored_conditions(batch),
      batch.reference_errors,
      keys,
    )

  def loss(params, frozen: Frozen, examples: PairExamples):
    conditions = conditions_of(denoiser, frozen, examples)
    policy, reference = params, frozen.reference
    if frozen.adapter is not None:
      policy = lora.Adapted(frozen.reference, frozen.adapter._replace(delta=params))
      reference = lora.Adapted(frozen.reference, frozen.adapter)

    if invert is not None:
      examples = inverted(denoiser, invert, policy, examples, conditions)
    err = pair_errors(denoiser, policy, examples, conditions)
    ref_err = examples.reference_errors
    if ref_err is None:
      ref_err = pair_errors(denoiser, reference, examples, conditions)
    ref_err = jax.lax.stop_gradient(ref_err)
    labels = {"p_choice": examples.p_choice} if soft_labels else {}
    values, parts = loss_fn(err[:, 0], err[:, 1], ref_err[:, 0], ref_err[:, 1], **labels)
    metrics = {name: value for name, value in parts._asdict().items() if value is not None}
    del metrics["gradient_weight"]
    metrics["dead_zone"] = (parts.gradient_weight < DEAD_ZONE * peak_weight).astype(jnp.float32)
    metrics["denoising_loss"] = err.mean(axis=1)
    return values, metrics

  return train_step.Objective(draw, loss)


def _stored_conditions(batch: types.PreferenceBatch) -> types.Conditions | None:
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
