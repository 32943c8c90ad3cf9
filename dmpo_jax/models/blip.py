"""BLIP's image encoder and its text encoder that looks at the image (Li et al., arXiv 2201.12086),
with the head of ImageReward (Xu et al., arXiv 2304.05977).

The image encoder's layers are CLIP's (`clip.EncoderLayer`) and are named as CLIP's are; the text
encoder is BERT (Devlin et al., arXiv 1810.04805) with cross attention in every layer, named as in
github.com/salesforce/BLIP, models/med.py. NHWC inside.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.models import attention, clip, clip_vision, linear_head


@dataclasses.dataclass(frozen=True)
class BlipTextConfig:
  """The fields of BLIP's med_config.json that change the network; no token types, no pooler."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12  # med_config.json


@dataclasses.dataclass(frozen=True)
class BlipConfig:
  """Both encoders; the image encoder has no projection, its `projection_dim` is not read."""

  vision: clip_vision.CLIPVisionConfig
  text: BlipTextConfig


# ViT-L/16 of 224 pixels (models/blip.py, create_vit "large"), and ImageReward's med_config.json.
IMAGE_REWARD = BlipConfig(
  clip_vision.CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,  # models/vit.py
  ),
  BlipTextConfig(
    vocab_size=30524,  # bert-base-uncased and BLIP's [DEC], [ENC]
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
  ),
)
# Of the rewards of the training set (ImageReward/ImageReward.py).
REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072


class ImageReward(nn.Module):
  """Normalised images and token ids -> rewards, of mean 0 and deviation 1 over the training set."""

  config: BlipConfig

  @nn.compact
  def __call__(
    self,
    pixel_values: Float[Array, "B H W C"],
    input_ids: Int[Array, "B L"],
    attention_mask: Bool[Array, "B L"],
  ) -> Float[Array, " B"]:
    states = VisionModel(self.config.vision, name="vision_model")(pixel_values)
    texts = TextEncoder(self.config.text, name="text_encoder")(input_ids, attention_mask, states)
    # The first token, [CLS]: ImageReward does not put BLIP's [ENC] in its place.
    reward = linear_head.LinearHead(name="mlp")(texts[:, 0])
    return (reward - REWARD_MEAN) / REWARD_STD


class VisionModel(nn.Module):
  """Normalised images -> states of the class token and every patch, after the last norm."""

  config: clip_vision.CLIPVisionConfig

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
    c = self.config
    x = clip_vision.Embeddings(c, jnp.float32, patch_bias=True, name="embeddings")(pixel_values)
    for i in range(c.num_hidden_layers):
      x = clip.EncoderLayer(c, jnp.float32, name=f"encoder.layers.{i}")(x)
    return nn.LayerNorm(epsilon=c.layer_norm_eps, name="post_layernorm")(x)


class TextEncoder(nn.Module):
  """Token ids and states of an image -> states of the tokens."""

  config: BlipTextConfig

  @nn.compact
  def __call__(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Bool[Array, "B L"],
    image_states: Float[Array, "B N E"],
  ) -> Float[Array, "B L D"]:
    c = self.config
    words = nn.Embed(c.vocab_size, c.hidden_size, name="embeddings.word_embeddings")
    positions = nn.Embed(
      c.max_position_embeddings, c.hidden_size, name="embeddings.position_embeddings"
    )
    x = words(input_ids) + positions(jnp.arange(input_ids.shape[1]))[None]
    x = _norm(c, "embeddings.LayerNorm")(x)
    for i in range(c.num_hidden_layers):
      x = TextLayer(c, name=f"encoder.layer.{i}")(x, attention_mask[:, None, None], image_states)
    return x


class TextLayer(nn.Module):
  """Attention to the text, attention to the image, two dense layers, each normed after it."""

  config: BlipTextConfig

  @nn.compact
  def __call__(self, x, mask, image_states):
    c = self.config

    def attend(x, states, mask, name):
      query = nn.Dense(c.hidden_size, name=f"{name}.self.query")(x)
      key, value = (
        nn.Dense(c.hidden_size, name=f"{name}.self.{each}")(states) for each in ("key", "value")
      )
      hidden = attention.attention(query, key, value, c.num_attention_heads, mask)
      hidden = nn.Dense(c.hidden_size, name=f"{name}.output.dense")(hidden)
      return _norm(c, f"{name}.output.LayerNorm")(x + hidden)

    x = attend(x, x, mask, "attention")
    x = attend(x, image_states, None, "crossattention")
    hidden = nn.Dense(c.intermediate_size, name="intermediate.dense")(x)
    hidden = nn.Dense(c.hidden_size, name="output.dense")(clip.ACTIVATIONS[c.hidden_act](hidden))
    return _norm(c, "output.LayerNorm")(x + hidden)


def _norm(config, name):
  # In two passes: BERT's epsilon is far below the rounding of the mean of squares.
  return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name=name)


def inputs(config: BlipConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
  """What `ImageReward` is traced with for `init.param_shapes`."""
  size = config.vision.image_size
  return (
    jax.ShapeDtypeStruct((1, size, size, config.vision.num_channels), jnp.float32),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
    jax.ShapeDtypeStruct((1, 1), jnp.bool_),
  )
