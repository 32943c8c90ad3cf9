"""Embeddings of images by the autoencoder of a base, for the measures of `diversity`."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from dmpo_jax.models import vae
from dmpo_jax.scorers import batches


def make_embedder(
  encode: Callable[[PyTree, Float[Array, "B H W 3"]], Float[Array, "B h w c2"]], params: PyTree
) -> batches.Embedder:
  """Means of the latents as one vector an image, without the scaling factor.

  Args:
    encode: (params, images in [-1, 1]) -> moments, as `base.Base.encode`.
  """

  def mean(params, pixels):
    moments = encode(params, pixels.astype(jnp.float32) / 127.5 - 1)
    return vae.split_moments(moments)[0].reshape(len(pixels), -1)

  run = batches.make_runner(mean, params)

  def embed(images: UInt8[np.ndarray, "n H W 3"]):
    batches.check_images(images)
    if not len(images):
      raise ValueError("images: none; expected at least one")
    return run(len(images), lambda rows: images[rows])

  return embed
