"""Batches that cross floors, and the dimension table.

Dimensions: B examples (pairs) of a batch; H, W image pixels; h, w latent positions; c latent
channels, c2 = 2 c for mean and log-variance; L tokens; D width of the prompt embedding; T
timesteps.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class PreferenceBatch(NamedTuple):
  """Pairs: one caption, the preferred image (w) and the dispreferred one (l)."""

  moments_w: Float[Array, "B h w c2"]
  moments_l: Float[Array, "B h w c2"]
  input_ids: Int[Array, "B L"]


class CaptionedBatch(NamedTuple):
  """Single images with captions, for the plain denoising loss."""

  moments: Float[Array, "B h w c2"]
  input_ids: Int[Array, "B L"]


class ImageBatch(NamedTuple):
  """Images in [-1, 1], for the autoencoder."""

  images: Float[Array, "B H W 3"]
