"""Scorers made of CLIP: PickScore, HPS v2 and v2.1, CLIP score, and LAION's aesthetic predictor."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from dmpo_jax import json_files, safetensors_io, weights
from dmpo_jax.data import tokenizer as tokenizer_lib
from dmpo_jax.models import clip, clip_model, clip_vision, init, linear_head
from dmpo_jax.scorers import batches, captions, layouts, preprocess

HPS_FILES = {
  "hpsv2": "HPS_v2_compressed.safetensors",
  "hpsv2.1": "HPS_v2.1_compressed.safetensors",
}
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.safetensors"
# OpenCLIP's ViT-H-14 (src/open_clip/model_configs/ViT-H-14.json); a head is 80 wide in the image
# encoder and 64 in the text encoder.
VIT_H = clip_model.CLIPConfig(
  clip.CLIPTextConfig(
    vocab_size=49408,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    max_position_embeddings=77,
    hidden_act="gelu",
    projection_dim=1024,
  ),
  clip_vision.CLIPVisionConfig(
    hidden_size=1280,
    intermediate_size=5120,
    projection_dim=1024,
    num_hidden_layers=32,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
  ),
)
# Cosines times 100, as tables of these scorers give them.
SCALE = 100.0


class Clip(NamedTuple):
  """A CLIP with its parameters."""

  config: clip_model.CLIPConfig
  params: dict[str, Any]


def load_clip(folder: pathlib.Path) -> Clip:
  """A folder in transformers' layout of CLIPModel: config.json and model.safetensors.

  Raises:
    ValueError: it is of another model, or its preprocessor_config.json asks for other images.
  """
  config = clip_model.read_config(
    json_files.read_object(folder / "config.json"), str(folder / "config.json")
  )
  check_preprocessor(folder / "preprocessor_config.json", config.vision.image_size)
  return Clip(config, weights.load_params(folder, clip_model.param_shapes(config)))


def check_preprocessor(path: pathlib.Path, size: int) -> None:
  """Refuses images that are made otherwise than `preprocess.transformers_crop` makes them.

  Raises:
    ValueError: the file, where there is one, sets a field to something else; names it.
  """
  if not path.is_file():
    return
  raw = json_files.read_object(path)
  expected = {
    "size": (size, {"shortest_edge": size}),
    "crop_size": (size, {"height": size, "width": size}),
    "resample": (3,),  # Pillow's number of the bicubic filter
    "image_mean": (list(preprocess.MEAN),),
    "image_std": (list(preprocess.STD),),
    "rescale_factor": (1 / 255,),
    **dict.fromkeys(
      ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), (True,)
    ),
  }
  for name, allowed in expected.items():
    if raw.get(name) is not None and raw[name] not in allowed:
      raise ValueError(
        f"{path}: field {name!r} is {raw[name]!r}, which is not implemented; expected "
        f"{' or '.join(map(repr, allowed))}"
      )


def load_pickscore(folder: pathlib.Path) -> batches.Scorer:
  """exp(logit_scale) cos(image, text), as the authors' README scores (arXiv 2305.01569)."""
  config, params = load_clip(folder)

  def score(params, pixel_values, input_ids):
    return jnp.exp(params["logit_scale"]) * _cosines(config, params, pixel_values, input_ids)

  return _text_scorer(config, params, score, folder, preprocess.transformers_crop)


def load_clip_score(folder: pathlib.Path) -> batches.Scorer:
  """100 cos(image, text) of any CLIP; negative cosines stay (Hessel et al. cut them off)."""
  config, params = load_clip(folder)

  def score(params, pixel_values, input_ids):
    return SCALE * _cosines(config, params, pixel_values, input_ids)

  return _text_scorer(config, params, score, folder, preprocess.transformers_crop)


def load_hps(file: pathlib.Path, config: clip_model.CLIPConfig = VIT_H) -> batches.Scorer:
  """100 cos(image, text) of HPS v2 or v2.1 (arXiv 2306.09341), whichever `file` holds.

  Args:
    file: OpenCLIP's state dict as safetensors; CLIP's tokenizer lies beside it.
  """
  tensors = layouts.translate(safetensors_io.load_safetensors(file), layouts.OPEN_CLIP)
  params = weights.from_diffusers(tensors, clip_model.param_shapes(config), where=str(file))

  def score(params, pixel_values, input_ids):
    return SCALE * _cosines(config, params, pixel_values, input_ids)

  return _text_scorer(
    config, params, score, file.parent, preprocess.pad_to_square, clean=captions.clean
  )


def load_aesthetic(folder: pathlib.Path) -> batches.Scorer:
  """LAION's aesthetic predictor: its head on CLIP ViT-L/14's embedding. Captions are not read."""
  config, clip_params = load_clip(folder)
  head = linear_head.LinearHead()
  width = np.zeros((1, config.vision.projection_dim), np.float32)
  head_params = weights.load_params(folder / AESTHETIC_FILE, init.param_shapes(head, width))

  def score(params, pixel_values, _):
    embeds = clip_model.image_features(config, params["clip"], pixel_values)
    return head.apply({"params": params["head"]}, embeds)

  return batches.make_scorer(
    score,
    {"clip": clip_params, "head": head_params},
    lambda texts: (),
    preprocess.torchvision_crop,
    config.vision.image_size,
  )


def _cosines(config, params, pixel_values, input_ids):
  images = clip_model.image_features(config, params, pixel_values)
  return (images * clip_model.text_features(config, params, input_ids)).sum(axis=-1)


def _text_scorer(config, params, score, folder, rule, *, clean=str):
  tokenizer = tokenizer_lib.load_tokenizer(folder)
  _check_tokenizer(tokenizer, config.text, folder)

  def encode(texts: Sequence[str]) -> Int[np.ndarray, "n L"]:
    return tokenizer([clean(text) for text in texts])

  return batches.make_scorer(score, params, encode, rule, config.vision.image_size)


def _check_tokenizer(tokenizer, config, folder):
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"{folder}: the tokenizer has {tokenizer.vocab_size} ids; expected at most the "
      f"{config.vocab_size} of the model: take the tokenizer that was published with it"
    )
  if tokenizer.length > config.max_position_embeddings:
    raise ValueError(
      f"{folder}: the tokenizer gives {tokenizer.length} tokens; expected at most the model's "
      f"{config.max_position_embeddings}: set model_max_length in tokenizer_config.json"
    )


def load_embedder(folder: pathlib.Path) -> batches.Embedder:
  """CLIP's embeddings of images, of length 1, for the measures of `diversity`."""
  config, params = load_clip(folder)
  size, width = config.vision.image_size, config.vision.projection_dim
  run = batches.make_runner(
    lambda params, pixels: clip_model.image_features(config, params, preprocess.normalise(pixels)),
    params,
  )

  def embed(images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n d"]:
    batches.check_images(images)
    if not len(images):
      return np.zeros((0, width), np.float32)

    def rows_of(rows):
      return np.stack([preprocess.transformers_crop(image, size) for image in images[rows]])

    return run(len(images), rows_of)

  return embed
