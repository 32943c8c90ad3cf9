"""Batches and conditions that cross floors, and the dimension table.

Dimensions: B examples (pairs, or judged images) of a batch; H, W image pixels; h, w latent
positions; c latent channels, c2 = 2 c for mean and log-variance; E text encoders (an axis only
where there are two); L tokens; D width of the prompt embedding; P width of the pooled prompt
embedding; T timesteps.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int


class AddedConditions(NamedTuple):
  """What SDXL's UNet is told beside the prompt (arXiv 2307.01952, section 2.2).

  Attributes:
    text_embeds: pooled and projected prompt embedding of the second text encoder.
    time_ids: pixels: original height and width, top and left of the crop, target height and width.
  """

  text_embeds: Float[Array, "B P"]
  time_ids: Float[Array, "B 6"]


class Conditions(NamedTuple):
  """All that a UNet is conditioned on, but the timestep.

  Attributes:
    prompt_embeds: hidden states of the text encoder, of both on the last axis for SDXL.
    added: SDXL only.
    image_latents: InstructPix2Pix only: latents of the image to edit, not scaled.
  """

  prompt_embeds: Float[Array, "B L D"]
  added: AddedConditions | None = None
  image_latents: Float[Array, "B h w c"] | None = None


class PreferenceBatch(NamedTuple):
  """Pairs: one caption, the preferred image (w) and the dispreferred one (l).

  Attributes:
    p_choice: probability, [0.5, 1], that people choose the preferred image; for soft labels.
    time_ids: SDXL only, see `AddedConditions`.
    source_moments: InstructPix2Pix only: of the image to edit.
    prompt_embeds: where the text encoders were run beforehand, see `Conditions`.
    text_embeds: likewise, SDXL only, see `AddedConditions`.
    draw: number of a settled draw of timestep and noise, see `data.drawn`; None: drawn anew.
    reference_errors: those of the frozen reference in that draw, of winner and loser.
    latents_l: what a past checkpoint drew for the caption, scaled, in place of the loser (SePPO).
  """

  moments_w: Float[Array, "B h w c2"]
  moments_l: Float[Array, "B h w c2"]
  input_ids: Int[Array, "B *E L"]
  p_choice: Float[Array, " B"] | None = None
  time_ids: Float[Array, "B 6"] | None = None
  source_moments: Float[Array, "B h w c2"] | None = None
  prompt_embeds: Float[Array, "B L D"] | None = None
  text_embeds: Float[Array, "B P"] | None = None
  draw: Int[Array, " B"] | None = None
  reference_errors: Float[Array, "B 2"] | None = None
  latents_l: Float[Array, "B h w c"] | None = None


class JudgedBatch(NamedTuple):
  """Single images that people called desirable or not, each by itself (Diffusion-KTO).

  Attributes:
    desirable: the verdict.
    reference_errors: as in `PreferenceBatch`, of the one image.

  The others are as in `PreferenceBatch`.
  """

  moments: Float[Array, "B h w c2"]
  input_ids: Int[Array, "B *E L"]
  desirable: Bool[Array, " B"]
  time_ids: Float[Array, "B 6"] | None = None
  source_moments: Float[Array, "B h w c2"] | None = None
  prompt_embeds: Float[Array, "B L D"] | None = None
  text_embeds: Float[Array, "B P"] | None = None
  draw: Int[Array, " B"] | None = None
  reference_errors: Float[Array, "B 1"] | None = None


Batch = PreferenceBatch | JudgedBatch
"""What preference optimisation trains on."""


class CaptionedBatch(NamedTuple):
  """Single images with captions, for the plain denoising loss."""

  moments: Float[Array, "B h w c2"]
  input_ids: Int[Array, "B L"]


class ImageBatch(NamedTuple):
  """Images in [-1, 1], for the autoencoder."""

  images: Float[Array, "B H W 3"]
