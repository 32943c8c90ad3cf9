"""CLIP's image encoder in Flax linen (Radford et al., arXiv 2103.00020); names are transformers'.

A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) whose class token becomes the embedding
of the image. NHWC inside.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dmpo_jax.models import clip, fields


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
  """The fields of transformers' CLIPVisionConfig that change the network.

  Attributes:
    image_size: pixels on a side of the images it takes.
    patch_size: pixels on a side of what becomes one token.
    projection_dim: width of the embedding of an image.
  """

  hidden_size: int
  intermediate_size: int
  projection_dim: int
  num_hidden_layers: int
  num_attention_heads: int
  image_size: int
  patch_size: int
  num_channels: int = 3
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    clip.check_encoder(self)
    fields.check_counts(self, "image_size patch_size num_channels")
    if self.image_size < self.patch_size:
      raise ValueError(f"image_size {self.image_size} is below patch_size {self.patch_size}")


class VisionOutputs(NamedTuple):
  """What the image encoder returns, float32.

  Attributes:
    last_hidden_state: of the class token and every patch, without a norm.
    image_embeds: the class token's state, normed and projected; of no particular length.
  """

  last_hidden_state: Float[Array, "B N D"]
  image_embeds: Float[Array, "B P"]


NEUTRAL = {
  # None: a `vision_config` inside the configuration of a whole CLIPModel names no class.
  "architectures": (None, ("CLIPVisionModelWithProjection",)),
  "attention_dropout": (0.0,),
  "dropout": (0.0,),
}


def read_config(raw: dict[str, Any], where: str = "image_encoder/config.json") -> CLIPVisionConfig:
  """Reads transformers' JSON fields; refuses by name those that are set and not implemented."""
  relevant = {name: value for name, value in raw.items() if name not in clip.WITHOUT_EFFECT}
  return fields.read_fields(CLIPVisionConfig, relevant, NEUTRAL, where=where)


class CLIPVisionModelWithProjection(nn.Module):
  """Normalised images -> their embeddings, in the space of `clip.TextOutputs.text_embeds`."""

  config: CLIPVisionConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B H W C"]) -> VisionOutputs:
    c, dtype = self.config, self.dtype
    fields.check_width("pixel_values", pixel_values.shape[-1], "num_channels", c.num_channels)
    if pixel_values.shape[1:3] != (c.image_size, c.image_size):
      raise ValueError(
        f"pixel_values: {' x '.join(map(str, pixel_values.shape[1:3]))} pixels; expected "
        f"{c.image_size} x {c.image_size}, the model's image_size: resize them"
      )

    def norm(name):
      return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=dtype, name=f"vision_model.{name}")

    x = norm("pre_layrnorm")(Embeddings(c, dtype, name="vision_model.embeddings")(pixel_values))
    for i in range(c.num_hidden_layers):
      x = clip.EncoderLayer(c, dtype, name=f"vision_model.encoder.layers.{i}")(x)
    pooled = norm("post_layernorm")(x[:, 0])
    embeds = clip.project(pooled, c.projection_dim, dtype, name="visual_projection")
    return VisionOutputs(x.astype(jnp.float32), embeds.astype(jnp.float32))


class Embeddings(nn.Module):
  """Class token and patches, each with its position; BLIP's patches have a bias, CLIP's none."""

  config: CLIPVisionConfig
  dtype: DTypeLike
  patch_bias: bool = False

  @nn.compact
  def __call__(self, pixel_values):
    c, batch = self.config, pixel_values.shape[0]
    # Rows and columns beyond the last whole patch are left out, as in PyTorch.
    patches = nn.Conv(
      c.hidden_size,
      (c.patch_size, c.patch_size),
      c.patch_size,
      padding="VALID",
      use_bias=self.patch_bias,
      dtype=self.dtype,
      name="patch_embedding",
    )(pixel_values.astype(self.dtype)).reshape(batch, -1, c.hidden_size)
    # A bare tensor in transformers, hence a leaf with the tensor's own name.
    first = self.param("class_embedding", nn.initializers.normal(0.02), (c.hidden_size,))
    first = jnp.broadcast_to(first.astype(self.dtype), (batch, 1, c.hidden_size))
    positions = nn.Embed(
      patches.shape[1] + 1, c.hidden_size, dtype=self.dtype, name="position_embedding"
    )
    x = jnp.concatenate([first, patches], axis=1)
    return x + positions(jnp.arange(x.shape[1]))[None]
