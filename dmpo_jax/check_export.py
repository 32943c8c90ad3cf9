"""`dmpo export --check`: what we wrote, opened by diffusers on PyTorch, against our own models.

The one module that imports diffusers, and only when it is asked to (extra: diffusers).
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import config as config_lib
from dmpo_jax import evaluate, stages, train, types

PROMPT = "a photo of a cat"
STEPS = 4
# Float32 on both sides differs in the order of additions: 1e-5 was seen on whole trajectories of
# small models. Half-precision files are read into float32 by both sides, so the same holds there.
TOLERANCE = 1e-3


class Check(NamedTuple):
  """Largest differences between diffusers and us.

  Attributes:
    prediction: of one UNet call, relative to the output's root mean square.
    image: of one image of `STEPS` DDIM steps, pixels in [0, 1].
  """

  prediction: float
  image: float


def check_installed() -> None:
  """Raises ValueError, before any work, if diffusers or torch is not installed."""
  missing = [name for name in ("torch", "diffusers", "transformers") if not _has(name)]
  if missing:
    raise ValueError(
      f"--check needs {', '.join(missing)}, not installed; run: pip install 'dmpo_jax[diffusers]'"
    )


def _has(name: str) -> bool:
  return importlib.util.find_spec(name) is not None


def check_run(run: pathlib.Path, path: pathlib.Path, layout: str) -> str:
  """Compares the export `path` of a run with the run itself; returns a line to print.

  Raises:
    ValueError: they differ by more than `TOLERANCE`.
  """
  config = train.read_run(run)
  base = base_lib.load_base(config.base)
  trained = stages.load_policy(base, run)
  if layout == "folder":  # what the folder holds, which may be rounded to half precision
    base = base_lib.load_base(str(path))
    trained = base.params["unet"]
  check = compare(base, trained, open_pipeline(base, path, layout))
  text = (
    f"diffusers opens it: UNet output differs by {check.prediction:.1e} of its size, an image by "
    f"{check.image:.1e} of [0, 1]"
  )
  if max(check) > TOLERANCE:
    raise ValueError(f"{path}: {text}; expected at most {TOLERANCE:.0e}")
  return text


def open_pipeline(base: base_lib.Base, path: pathlib.Path, layout: str) -> Any:
  """The diffusers pipeline of an export, float32 on the CPU."""
  import diffusers
  import torch

  kind = getattr(diffusers, base.pipeline)
  if layout == "folder":
    pipeline = kind.from_pretrained(str(path), dtype=torch.float32, local_files_only=True)
  elif layout == "single-file":
    pipeline = kind.from_single_file(
      str(path), config=str(base.folder), torch_dtype=torch.float32, local_files_only=True
    )
  else:
    pipeline = kind.from_pretrained(str(base.folder), dtype=torch.float32, local_files_only=True)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


def compare(base: base_lib.Base, unet_params: Any, pipeline: Any) -> Check:
  """One UNet call and one image of both, from the same noise."""
  prediction = _compare_prediction(base, unet_params, pipeline)
  return Check(prediction, _compare_image(base, unet_params, pipeline))


def _compare_prediction(base, unet_params, pipeline) -> float:
  import torch

  generator = np.random.default_rng(0)
  config = base.unet.config

  def normal(*shape):
    return generator.standard_normal(shape, np.float32)

  latents = normal(1, *base.latent_shape)
  embeds = normal(1, base.tokenizer.length, config.cross_attention_dim)
  conditions, more = types.Conditions(jnp.asarray(embeds)), {}
  if base.edits:
    conditions = conditions._replace(image_latents=jnp.asarray(normal(1, *base.latent_shape)))
  if config.addition_embed_type is not None:
    added = types.AddedConditions(
      normal(1, config.text_embeds_dim), np.full((1, 6), 64.0, np.float32)
    )
    conditions = conditions._replace(added=jax.tree.map(jnp.asarray, added))
    more["added_cond_kwargs"] = {n: torch.from_numpy(x) for n, x in added._asdict().items()}
  timesteps = jnp.full((1,), 500)
  ours = jax.jit(base.apply_unet)(unet_params, jnp.asarray(latents), timesteps, conditions)
  inputs = latents
  if base.edits:
    inputs = np.concatenate([latents, np.asarray(conditions.image_latents)], axis=-1)
  with torch.no_grad():
    theirs = pipeline.unet(
      torch.from_numpy(np.moveaxis(inputs, -1, 1).copy()), 500, torch.from_numpy(embeds), **more
    ).sample
  expected = np.moveaxis(theirs.numpy(), 1, -1)
  return float(np.abs(ours - expected).max() / np.sqrt(np.square(expected).mean()))


def _compare_image(base, unet_params, pipeline) -> float:
  import diffusers
  import torch

  sampling = config_lib.SamplingConfig(
    sampler="ddim",
    steps=STEPS,
    guidance_scale=5.0,
    guidance_rescale=0.0,
    image_guidance_scale=1.5 if base.edits else None,
    images_per_prompt=1,
  )
  noise = evaluate.initial_noise([PROMPT], 1, base.latent_shape, 0)[:, 0]
  size, more, sources = base.resolution, {}, None
  if base.edits:
    sources = np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    more = {"image": torch.from_numpy(np.moveaxis(sources / 2 + 0.5, -1, 1).copy())}
    more["image_guidance_scale"] = sampling.image_guidance_scale
  else:
    more = {"height": size, "width": size}
  sampler = evaluate.make_sampler(base, sampling)
  ours = sampler(unet_params, base.text_params, [PROMPT], noise, "checking", sources)
  pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
  with torch.no_grad():
    theirs = pipeline(
      PROMPT,
      latents=torch.from_numpy(np.moveaxis(noise, -1, 1).copy()),
      num_inference_steps=STEPS,
      guidance_scale=sampling.guidance_scale,
      output_type="np",
      **more,
    ).images
  return float(np.abs(ours / 2 + 0.5 - theirs).max())
