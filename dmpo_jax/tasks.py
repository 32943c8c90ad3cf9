"""What a run trains, on what, against what: one builder per kind of objective.

A `Task` is all that the loop in `train` needs to know; the loop is the same for all of them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import config as config_lib
from dmpo_jax import (
  inversion,
  lora,
  losses,
  objectives,
  other_losses,
  other_objectives,
  safeguards,
  train_step,
)
from dmpo_jax import rounds as rounds_lib
from dmpo_jax.data import encode, pipeline
from dmpo_jax.data.emoji_choice import captions

MAX_VALIDATION_PAIRS = 256


class Task(NamedTuple):
  """Attributes:
  params: what is trained, at its start; numpy.
  frozen: what the objective reads and does not train.
  objective: see `train_step.Objective`.
  batches: start step -> endless iterator of this process's numpy batches.
  describe: step -> ids of the records in that step's batch, for error messages.
  validation: one numpy batch that is evaluated again and again, or None.
  flops: counts the FLOPs that one example cannot do without (seconds), or None.
  rounds: gives `frozen` and `batches` anew every so many steps, or None: they hold to the end.
  validation_objective: of the validation batch and `frozen`; None: `objective`.
  """

  params: train_step.Params
  frozen: Any
  objective: train_step.Objective
  batches: Callable[[int], Iterator[Any]]
  describe: Callable[[int], Sequence[str]]
  validation: Any | None
  flops: Callable[[], float] | None = None
  rounds: rounds_lib.Rounds | None = None
  validation_objective: train_step.Objective | None = None


def bind_loss(config: config_lib.ObjectiveConfig) -> objectives.PreferenceLoss:
  """A loss of the margin, of `losses`, with its hyper-parameters bound.

  Raises:
    ValueError: the method is no such loss, or a hyper-parameter is out of range (the loss is tried
      on one pair).
  """
  makers = {
    "dmpo": lambda: functools.partial(losses.dmpo_loss, beta=config.beta, alpha=config.alpha),
    "dpo": lambda: functools.partial(
      losses.dpo_loss, beta=config.beta, label_smoothing=config.label_smoothing
    ),
    "fpo": lambda: functools.partial(
      losses.fpo_loss,
      beta=config.beta,
      alpha=config.alpha,
      divergence=config.divergence,
      a=config.order,
    ),
    "ipo": lambda: functools.partial(losses.ipo_loss, beta=config.beta),
    "seppo": lambda: functools.partial(losses.seppo_loss, beta=config.beta),
    # The noise is its own, the loss is Diffusion-DPO's (its published code).
    "inpo": lambda: functools.partial(losses.dpo_loss, beta=config.beta, label_smoothing=0.0),
  }
  if config.method not in makers:
    raise ValueError(
      f"objective.method: expected one of {', '.join(makers)} for a loss of the margin, got "
      f"{config.method!r}"
    )
  bound = makers[config.method]()
  if config.sft_weight is not None:
    bound = safeguards.add_sft(bound, beta=config.beta, weight=config.sft_weight)
  one = jax.ShapeDtypeStruct((1,), jnp.float32)
  jax.eval_shape(bound, one, one, one, one)
  return bound


def reference_params(params: train_step.Params, dtype: str) -> train_step.Params:
  """The frozen reference: a copy, kernels in `dtype`, everything else float32.

  Biases and norm scales enter the computation in float32 (or are rounded there as the policy's
  are), so only with them unrounded is the policy at step 0 exactly the reference.
  """
  return jax.tree.map(lambda leaf: leaf.astype(reference_dtype(leaf, dtype)), params)


def reference_dtype(leaf: Any, dtype: str) -> np.dtype:
  """That of a leaf of `reference_params`, or of its shape."""
  return jnp.dtype(dtype if len(leaf.shape) > 1 else "float32")


def initial_adapter(config: config_lib.LoraConfig, shapes: Any, seed: int) -> lora.Adapter | None:
  """The low-rank delta at its start, zero, on a UNet of these shapes; None at rank 0.

  Raises:
    ValueError: a target fits nothing, or the rank is too large.
  """
  if config.rank == 0:
    return None
  delta = lora.init_delta(shapes, rank=config.rank, targets=config.targets.split(), seed=seed)
  return lora.Adapter(delta, np.float32(config.alpha / config.rank))


def check_objective(config: config_lib.ObjectiveConfig) -> None:
  """Refuses a method that does not train on pairs, and hyper-parameters out of their range.

  Raises:
    ValueError: names the field.
  """
  if config.method in config_lib.ON_IMAGES:
    pairs = [name for name in config_lib.METHODS if name not in config_lib.ON_IMAGES]
    raise ValueError(
      f"objective.method: expected one of {', '.join(pairs)} for pairs, got {config.method!r}"
    )
  if config.method not in OBJECTIVES:
    bind_loss(config)


def sft_objective(
  config: config_lib.ObjectiveConfig, denoiser: objectives.Denoiser, draw: objectives.Draw
) -> train_step.Objective:
  """`other_objectives.sft_objective` as the configuration says."""
  del config
  draw = draw._replace(images=other_objectives.WINNERS.images)
  return other_objectives.sft_objective(denoiser, draw=draw)


def mapo_objective(
  config: config_lib.ObjectiveConfig, denoiser: objectives.Denoiser, draw: objectives.Draw
) -> train_step.Objective:
  """`other_objectives.mapo_objective` as the configuration says."""
  loss_fn = functools.partial(
    other_losses.mapo_loss, beta_mapo=config.beta_mapo, snr_value=config.snr_value
  )
  # |dL/du| = beta_mapo sigmoid(-u)
  return other_objectives.mapo_objective(denoiser, loss_fn, peak_weight=config.beta_mapo, draw=draw)


def kto_objective(
  config: config_lib.ObjectiveConfig, denoiser: objectives.Denoiser, draw: objectives.Draw
) -> train_step.Objective:
  """`other_objectives.kto_objective` as the configuration says."""
  weights = {
    "lambda_d": config.lambda_d,
    "lambda_u": config.lambda_u,
    "utility": config.utility,
  }
  return other_objectives.kto_objective(
    denoiser,
    functools.partial(other_losses.kto_loss, beta=config.beta, **weights),
    peak_weight=other_losses.kto_peak(**weights),
    beta=config.beta,
    draw=draw._replace(noisings=other_objectives.SINGLE.noisings),
  )


def margin_objective(
  config: config_lib.ObjectiveConfig,
  denoiser: objectives.Denoiser,
  draw: objectives.Draw,
  invert: objectives.Invert | None = None,
) -> train_step.Objective:
  """`objectives.preference_objective` as the configuration says."""
  loss_fn = bind_loss(config)
  return objectives.preference_objective(
    denoiser,
    loss_fn,
    peak_weight=losses.peak_gradient_weight(loss_fn),
    draw=draw,
    soft_labels=config.labels == "soft",
    loser_scaling=config.loser_scaling,
    invert=invert,
  )


OBJECTIVES = {"sft": sft_objective, "mapo": mapo_objective, "kto": kto_objective}
"""Method -> what makes its objective; the others are losses of the margin, of `bind_loss`."""


def make_objective(config: config_lib.Config, base: base_lib.Base) -> train_step.Objective:
  """Preference optimisation as the configuration says; the base's weights are not asked for.

  Raises:
    ValueError: as `bind_loss`, or as `inversion.make_inversion`.
  """
  draw = objectives.Draw(timestep_power=config.data.timestep_power, seed=config.seed)
  make, denoiser = OBJECTIVES.get(config.objective.method, margin_objective), base.denoiser()
  if config.objective.inversion is not None:
    kind, steps = config.objective.inversion, config.objective.inversion_steps
    invert = inversion.make_inversion(denoiser, base.schedule, kind=kind, steps=steps)
    make = functools.partial(make, invert=invert)
  return make(config.objective, denoiser, draw)


def holds_reference(config: config_lib.Config) -> bool:
  """Whether a step reads the reference's parameters.

  Not where the method has none, or the batches hold its errors; but a low-rank delta is one on it.
  """
  computed = config.objective.needs_reference and config.data.reference_draws == 0
  return computed or config.lora.rank > 0


def preference_task(
  config: config_lib.Config, base: base_lib.Base, encoded: encode.Encoded
) -> Task:
  """Preference optimisation of the base's UNet, or of a low-rank delta on it, on encoded pairs.

  Raises:
    ValueError: the data are judged images and the method needs pairs; they have no source images
      and the base edits, or the other way round; they have stored embeddings and the configuration
      wants none, or the other way round; fewer pairs than a batch; bad low-rank settings; rounds
      with several processes.
  """
  objective = make_objective(config, base)
  source, seed = encoded.splits["train"], config.seed
  if len(source) < config.batch_size:
    raise ValueError(
      f"batch_size: {config.batch_size} is larger than the {len(source)} pairs of the train split"
    )
  pair = pipeline.first_pair(source)
  if ("source_moments" in pair) != base.edits:
    has, expected = ("no", "some") if base.edits else ("", "none")
    raise ValueError(
      f"{config.data.dataset}: its pairs have {has} source images; expected {expected}, as the "
      f"base {config.base} {'edits images' if base.edits else 'does not edit images'}"
    )
  if ("prompt_embeds" in pair) != config.data.prompt_embeds:
    raise ValueError(
      f"data.prompt_embeds: {config.data.prompt_embeds}, but the pairs were prepared with"
      f" {not config.data.prompt_embeds}; set it so, or prepare into another folder"
    )
  _check_judged(config, pipeline.are_judged(source))
  known = "reference_errors" in pair  # then draws are settled, caption dropout among them
  held_out = encoded.splits.get("validation")  # few pairs may leave none
  unet_params = base.params["unet"]
  adapter = initial_adapter(config.lora, base.shapes["unet"], seed)
  # A copy: what is trained is donated, and must not share memory with what is frozen.
  params = unet_params if adapter is None else jax.tree.map(np.array, adapter.delta)

  def batches(start):
    return pipeline.preference_batches(
      source,
      seed=seed,
      batch_size=config.batch_size,
      caption_dropout=0.0 if known else config.data.caption_dropout,
      empty_caption=encoded.empty_caption,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      start=start,
      workers=config.data.workers,
    )

  task = Task(
    params=params,
    frozen=objectives.Frozen(
      reference_params(unet_params, config.precision.reference)
      if holds_reference(config)
      else None,
      None if config.data.prompt_embeds else base.text_params,
      adapter,
    ),
    objective=objective,
    batches=batches,
    describe=lambda step: pipeline.record_ids(
      source, seed=seed, batch_size=config.batch_size, step=step
    ),
    validation=pipeline.load_split(held_out, MAX_VALIDATION_PAIRS) if held_out else None,
  )
  if config.objective.reference_every is not None:
    task = _in_rounds(config, base, encoded, task)
  return task


def _check_judged(config: config_lib.Config, judged: bool) -> None:
  if judged != config.data.judged:
    kind = "images that were judged one by one" if judged else "pairs"
    expected = repr(config_lib.JUDGED) if judged else f"another one than {config_lib.JUDGED!r}"
    raise ValueError(
      f"data.dataset: {config.data.dataset!r}, but {config.data.mixture} are {kind}; expected"
      f" {expected}"
    )
  if judged and config.objective.method not in config_lib.ON_JUDGED:
    raise ValueError(
      f"objective.method: {config.objective.method!r} needs pairs, and {config.data.dataset!r} are"
      f" images that were judged one by one; expected {', '.join(config_lib.ON_JUDGED)}"
    )


def _in_rounds(
  config: config_lib.Config, base: base_lib.Base, encoded: encode.Encoded, task: Task
) -> Task:
  """The task of SePPO: the reference, and with it the second images, change from round to round.

  Held-out pairs are judged as by Diffusion-DPO against the initial model: their losers are real.
  """
  if jax.process_count() > 1:
    raise ValueError(
      f"objective.method: {config.objective.method!r} expected one process, which stores "
      f"checkpoints and what they draw in files that it reads back; got {jax.process_count()}"
    )
  hard = functools.partial(losses.dpo_loss, beta=config.objective.beta, label_smoothing=0.0)
  judge = objectives.preference_objective(
    base.denoiser(),
    hard,
    peak_weight=1.0,
    draw=objectives.Draw(timestep_power=config.data.timestep_power),
  )
  return task._replace(
    rounds=rounds_lib.Rounds(
      config,
      base,
      encoded.splits["train"],
      encoded,
      task.objective,
      lambda params: reference_params(params, config.precision.reference),
      task.batches,
    ),
    validation_objective=judge,
  )


def denoising_task(
  config: config_lib.Config, base: base_lib.Base, source: captions.CaptionedEmoji
) -> Task:
  """Plain denoising of captioned emoji: trains the base's UNet and text encoders."""

  def batches(start):
    return captions.captioned_batches(
      source,
      seed=config.seed,
      batch_size=config.batch_size,
      caption_dropout=config.data.caption_dropout,
      empty_ids=base.tokenizer([""])[0],
      start=start,
    )

  return Task(
    params={"unet": base.params["unet"], **base.text_params},
    frozen=objectives.Frozen(None, None),
    objective=objectives.denoising_objective(
      base.denoiser(), timestep_power=config.data.timestep_power
    ),
    batches=batches,
    describe=lambda step: [f"batch {step} of {len(source)} captions, seed {config.seed}"],
    validation=None,
  )


def autoencoder_task(config: config_lib.Config, base: base_lib.Base, images: np.ndarray) -> Task:
  """Reconstruction of images [n, H, W, 3]: trains the base's VAE."""

  def encode_images(params, batch):
    return base.vae.apply({"params": params}, batch, method="encode")

  def decode_latents(params, latents):
    return base.vae.apply({"params": params}, latents, method="decode")

  return Task(
    params=base.params["vae"],
    frozen=objectives.Frozen(None, None),
    objective=objectives.reconstruction_objective(
      encode_images,
      decode_latents,
      latent_shape=base.latent_shape,
      kl_weight=config.objective.kl_weight,
    ),
    batches=lambda start: captions.image_batches(
      images, seed=config.seed, batch_size=config.batch_size, start=start
    ),
    describe=lambda step: [f"batch {step} of {len(images)} images, seed {config.seed}"],
    validation=None,
  )
