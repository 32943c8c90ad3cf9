"""A Stable Diffusion folder in diffusers' layout: models, parameters, tokenizer, schedule."""

import dataclasses
import hashlib
import importlib.resources
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import diffusion, objectives, weights
from dmpo_jax.data import tokenizer as tokenizer_lib
from dmpo_jax.models import clip, init, unet, vae

SHIPPED = {"emoji": "emoji_base"}  # name -> folder under assets/
WEIGHTED = ("unet", "vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Base:
  """What a base folder holds. `params` has one tree for each of unet, vae, text_encoder."""

  folder: pathlib.Path
  unet: unet.UNet2DConditionModel
  vae: vae.AutoencoderKL
  text_encoder: clip.CLIPTextModel
  tokenizer: tokenizer_lib.ClipTokenizer
  schedule: diffusion.ScheduleConfig
  params: dict[str, Any]

  @property
  def resolution(self) -> int:
    """Pixels on a side of the images that the UNet was made for."""
    return self.unet.config.sample_size * self.vae.config.downscale

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    size = self.unet.config.sample_size
    return (size, size, self.vae.config.latent_channels)

  def denoiser(self) -> objectives.Denoiser:
    """The functions that the objectives and samplers need."""

    def apply_unet(params, latents, timesteps, prompt_embeds):
      return self.unet.apply({"params": params}, latents, timesteps, prompt_embeds)

    def apply_text(params, input_ids):
      return self.text_encoder.apply({"params": params}, input_ids)

    return objectives.Denoiser(
      apply_unet,
      apply_text,
      jnp.asarray(diffusion.alphas_cumprod(self.schedule)),
      self.schedule.prediction_type,
      self.vae.config.scaling_factor,
      self.unet.dtype,
    )

  def encode(self, params, images):
    """Images [B, H, W, 3] in [-1, 1] -> moments [B, h, w, 2c]."""
    return self.vae.apply({"params": params}, images, method="encode")

  def decode(self, params, latents):
    """Scaled latents [B, h, w, c] -> images [B, H, W, 3], clipped to [-1, 1]."""
    unscaled = latents / self.vae.config.scaling_factor
    return jnp.clip(self.vae.apply({"params": params}, unscaled, method="decode"), -1.0, 1.0)

  def data_fingerprint(self) -> str:
    """Identifies what encoded data depends on: the VAE, the tokenizer and the resolution."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(str(self.resolution).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(self.params["vae"]):
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.ascontiguousarray(leaf).tobytes())
    for name in ("vocab.json", "merges.txt"):
      digest.update((self.folder / "tokenizer" / name).read_bytes())
    return digest.hexdigest()


def resolve(name: str) -> pathlib.Path:
  """`emoji` -> the shipped base; anything else is a folder on disk.

  Raises:
    ValueError: there is no such folder, or it is not a diffusers folder.
  """
  if name in SHIPPED:
    folder = pathlib.Path(str(importlib.resources.files("dmpo_jax") / "assets" / SHIPPED[name]))
  else:
    folder = pathlib.Path(name)
  if not (folder / "model_index.json").is_file():
    raise ValueError(
      f"base {name!r}: {folder / 'model_index.json'} does not exist; expected a folder in "
      f"diffusers' layout, or one of: {', '.join(SHIPPED)}"
    )
  return folder


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    ValueError: the file is missing or is not a JSON object.
  """
  if not path.is_file():
    raise ValueError(f"{path}: file not found; a base folder in diffusers' layout needs it")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}: not valid JSON ({error})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
  return content


def load_base(name: str, *, compute: str = "float32", initial_seed: int | None = None) -> Base:
  """Reads a base folder.

  Args:
    name: see `resolve`.
    compute: type of activations in UNet and text encoder; the VAE computes in float32.
    initial_seed: if given, parameters are drawn afresh instead of read: training from scratch.

  Raises:
    ValueError: a file is missing, a field is not implemented, a tensor is missing or misshapen.
  """
  folder = resolve(name)
  dtype = jnp.dtype(compute)
  configs = {part: read_json(folder / part / "config.json") for part in WEIGHTED}
  unet_model = unet.UNet2DConditionModel(
    unet.read_config(configs["unet"], str(folder / "unet" / "config.json")), dtype
  )
  vae_model = vae.AutoencoderKL(
    vae.read_config(configs["vae"], str(folder / "vae" / "config.json"))
  )
  text_model = clip.CLIPTextModel(
    clip.read_config(configs["text_encoder"], str(folder / "text_encoder" / "config.json")), dtype
  )
  _check_widths(folder, unet_model.config, vae_model.config, text_model.config)
  tokenizer = tokenizer_lib.load_tokenizer(folder / "tokenizer")
  size, channels = unet_model.config.sample_size, unet_model.config.in_channels
  ids = jax.ShapeDtypeStruct((1, tokenizer.length), jnp.int32)
  inputs = {
    "unet": (
      jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((1, 8, unet_model.config.cross_attention_dim), jnp.float32),
    ),
    "vae": (jax.ShapeDtypeStruct((1, 8 * 8, 8 * 8, vae_model.config.in_channels), jnp.float32),),
    "text_encoder": (ids,),
  }
  models = {"unet": unet_model, "vae": vae_model, "text_encoder": text_model}
  if initial_seed is None:
    params = {
      part: weights.load_params(folder / part, init.param_shapes(model, *inputs[part]))
      for part, model in models.items()
    }
  else:
    params = {
      part: init.initial_params(model, initial_seed, *inputs[part], zero=_ZERO[part])
      for part, model in models.items()
    }
  schedule = diffusion.read_config(read_json(folder / "scheduler" / "scheduler_config.json"))
  return Base(folder, unet_model, vae_model, text_model, tokenizer, schedule, params)


# From scratch, the UNet starts as the identity on its residual streams and predicts zero.
_ZERO = {"unet": ("conv2", "proj_out", "conv_out"), "vae": (), "text_encoder": ()}


def _check_widths(folder, unet_config, vae_config, text_config):
  if unet_config.in_channels != vae_config.latent_channels:
    raise ValueError(
      f"{folder}: unet in_channels {unet_config.in_channels} differs from vae latent_channels "
      f"{vae_config.latent_channels}"
    )
  if unet_config.cross_attention_dim != text_config.hidden_size:
    raise ValueError(
      f"{folder}: unet cross_attention_dim {unet_config.cross_attention_dim} differs from "
      f"text_encoder hidden_size {text_config.hidden_size}"
    )
