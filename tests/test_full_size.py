"""The published configurations at full size: our parameters are diffusers' and transformers'.

Nothing is allocated: shapes are traced, and PyTorch's models stand on its "meta" device.
"""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models

from dmpo_jax import types
from dmpo_jax.models import clip, clip_vision, init, unet, vae

AXES_TO_TORCH = {("kernel", 4): (3, 2, 0, 1), ("kernel", 2): (1, 0)}
TENSOR = {"class_embedding": "class_embedding", "bias": "bias"}  # all others are "weight"

pytestmark = pytest.mark.slow  # every test traces a model of full size


def tensors_of(shapes):
  """Name and shape of every tensor; `weights` would need the arrays, gigabytes of them."""
  tensors = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    *modules, kind = (entry.key for entry in path)
    axes = AXES_TO_TORCH.get((kind, leaf.ndim), range(leaf.ndim))
    name = ".".join((*modules, TENSOR.get(kind, "weight")))
    tensors[name] = tuple(leaf.shape[axis] for axis in axes)
  return tensors


def check(shapes, judge, parameters, prefix=""):
  """`judge` is a function, so that all it makes stays on the meta device."""
  with torch.device("meta"):
    expected = judge().state_dict()
  assert tensors_of(shapes) == {prefix + name: tuple(each.shape) for name, each in expected.items()}
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def unet_shapes(raw):
  config = unet.read_config(raw)
  inputs = [
    floats(1, 8, 8, config.in_channels),
    jax.ShapeDtypeStruct((1,), jnp.int32),
    floats(1, 77, config.cross_attention_dim),
  ]
  if config.addition_embed_type is not None:
    inputs.append(types.AddedConditions(floats(1, config.text_embeds_dim), floats(1, 6)))
  return init.param_shapes(unet.UNet2DConditionModel(config), *inputs)


@pytest.mark.parametrize(
  ("raw", "parameters"),
  [
    pytest.param(torch_models.UNET_SD15_FULL, 859_520_964, id="sd15"),
    pytest.param(torch_models.UNET_SD21_FULL, 865_910_724, id="sd21"),
    pytest.param(torch_models.UNET_IP2P_FULL, 859_532_484, id="ip2p"),
    pytest.param(torch_models.UNET_SDXL_FULL, 2_567_463_684, id="sdxl"),
  ],
)
def test_unet_has_diffusers_tensors(raw, parameters):
  settings = torch_models.public(raw)
  check(unet_shapes(raw), lambda: diffusers.UNet2DConditionModel(**settings), parameters)


@pytest.mark.parametrize(
  ("raw", "scaling_factor", "sample_size"),
  [
    pytest.param(torch_models.VAE_SD15_FULL, 0.18215, 512, id="sd15"),
    pytest.param(torch_models.VAE_SD21_FULL, 0.18215, 768, id="sd21"),
    pytest.param(torch_models.VAE_SDXL_FULL, 0.13025, 1024, id="sdxl"),
    pytest.param(torch_models.VAE_SDXL_RESAVED_FULL, 0.13025, 1024, id="sdxl-resaved"),
  ],
)
def test_vae_has_diffusers_tensors(raw, scaling_factor, sample_size):
  config = vae.read_config(raw)
  assert (config.scaling_factor, config.sample_size) == (scaling_factor, sample_size)
  assert config.downscale == 8
  shapes = init.param_shapes(vae.AutoencoderKL(config), floats(1, 64, 64, 3))
  settings = torch_models.public(raw)
  check(shapes, lambda: diffusers.AutoencoderKL(**settings), 83_653_863)


@pytest.mark.parametrize(
  ("raw", "parameters"),
  [
    pytest.param(torch_models.TEXT_L_FULL, 123_060_480, id="clip-l"),
    pytest.param(torch_models.TEXT_H_FULL, 340_387_840, id="openclip-h"),
    pytest.param(torch_models.TEXT_BIGG_FULL, 694_659_840, id="bigg"),
  ],
)
def test_text_encoder_has_transformers_tensors(raw, parameters):
  model = clip.CLIPTextModel(clip.read_config(raw))
  shapes = init.param_shapes(model, np.zeros((1, 77), np.int32))
  # transformers 5 leaves this prefix out where there is no projection; see `weights`.
  prefix = "" if "WithProjection" in raw["architectures"][0] else "text_model."
  check(shapes, lambda: torch_models.bare_clip(raw), parameters, prefix)


def test_image_encoder_has_transformers_tensors():
  raw = torch_models.VISION_H_FULL
  model = clip_vision.CLIPVisionModelWithProjection(clip_vision.read_config(raw))
  shapes = init.param_shapes(model, floats(1, 224, 224, 3))
  check(shapes, lambda: torch_models.bare_clip(raw), 632_076_800)
