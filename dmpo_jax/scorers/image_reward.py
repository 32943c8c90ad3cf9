"""ImageReward (Xu et al., arXiv 2304.05977): BLIP reads the caption and looks at the image."""

import pathlib

from dmpo_jax import safetensors_io, weights
from dmpo_jax.models import blip, init
from dmpo_jax.scorers import batches, bert_tokenizer, layouts, preprocess

FILE = "ImageReward.safetensors"


def load_image_reward(
  folder: pathlib.Path, config: blip.BlipConfig = blip.IMAGE_REWARD
) -> batches.Scorer:
  """ImageReward-v1.0's reward, normed over its training set; negative for the worse half.

  Args:
    folder: holds the state dict of ImageReward.pt as safetensors, and bert-base-uncased's
      vocab.txt.

  Raises:
    ValueError: a file is missing or is of another model.
  """
  tensors = layouts.translate(safetensors_io.load_safetensors(folder / FILE), layouts.IMAGE_REWARD)
  model = blip.ImageReward(config)
  shapes = init.param_shapes(model, *blip.inputs(config))
  params = weights.from_diffusers(tensors, shapes, where=str(folder / FILE))
  tokenizer = bert_tokenizer.load_tokenizer(folder / "vocab.txt")
  if tokenizer.vocab_size != config.text.vocab_size:
    raise ValueError(
      f"{folder / 'vocab.txt'}: {tokenizer.vocab_size} tokens with [DEC] and [ENC]; expected "
      f"{config.text.vocab_size}: take bert-base-uncased's vocab.txt"
    )

  def score(params, pixel_values, tokens):
    return model.apply({"params": params}, pixel_values, *tokens)

  return batches.make_scorer(
    score, params, tokenizer, preprocess.torchvision_crop, config.vision.image_size
  )
