"""CLIP's text encoder in Flax linen (Radford et al., arXiv 2103.00020); names are transformers'."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dmpo_jax.models import fields, layers


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """The fields of transformers' CLIPTextConfig that change the network."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  max_position_embeddings: int
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5

  def __post_init__(self):
    if self.hidden_act not in ACTIVATIONS:
      raise ValueError(
        f"hidden_act {self.hidden_act!r} is not implemented; expected one of {sorted(ACTIVATIONS)}"
      )


def quick_gelu(x):
  """x sigmoid(1.702 x), the GELU approximation of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "quick_gelu": quick_gelu,
  "gelu": lambda x: nn.gelu(x, approximate=False),
}

# Fields of transformers' config.json without effect on inference with the last hidden state.
WITHOUT_EFFECT = (
  "architectures attention_dropout bos_token_id dtype eos_token_id initializer_factor "
  "initializer_range model_type pad_token_id projection_dim torch_dtype transformers_version"
).split()


def read_config(raw: dict, where: str = "text_encoder/config.json") -> CLIPTextConfig:
  """Reads transformers' JSON fields; refuses by name those that are set and not implemented."""
  relevant = {name: value for name, value in raw.items() if name not in WITHOUT_EFFECT}
  return fields.read_fields(
    CLIPTextConfig, relevant, {"dropout": (0.0,), "use_cache": (True, False)}, where=where
  )


class EncoderLayer(nn.Module):
  config: CLIPTextConfig
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x, mask):
    c = self.config

    def dense(features, name):
      return nn.Dense(features, dtype=self.dtype, name=name)

    def norm(name):
      return nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name=name)

    hidden = norm("layer_norm1")(x)
    query, key, value = (
      dense(c.hidden_size, f"self_attn.{each}_proj")(hidden) for each in ("q", "k", "v")
    )
    hidden = layers.attention(query, key, value, c.num_attention_heads, mask)
    x = x + dense(c.hidden_size, "self_attn.out_proj")(hidden)
    hidden = dense(c.intermediate_size, "mlp.fc1")(norm("layer_norm2")(x))
    return x + dense(c.hidden_size, "mlp.fc2")(ACTIVATIONS[c.hidden_act](hidden))


class CLIPTextModel(nn.Module):
  """Token ids -> last hidden state after the final layer norm, float32. Causal, not padded-masked:
  Stable Diffusion attends to its padding tokens too."""

  config: CLIPTextConfig
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, input_ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    c, length = self.config, input_ids.shape[1]
    if length > c.max_position_embeddings:
      raise ValueError(
        f"input_ids: {length} tokens; expected at most {c.max_position_embeddings}, the model's "
        "max_position_embeddings: truncate them"
      )
    tokens = nn.Embed(
      c.vocab_size, c.hidden_size, dtype=self.dtype, name="text_model.embeddings.token_embedding"
    )
    positions = nn.Embed(
      c.max_position_embeddings,
      c.hidden_size,
      dtype=self.dtype,
      name="text_model.embeddings.position_embedding",
    )
    x = tokens(input_ids) + positions(jnp.arange(length))[None]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for i in range(c.num_hidden_layers):
      x = EncoderLayer(c, self.dtype, name=f"text_model.encoder.layers.{i}")(x, mask)
    norm = nn.LayerNorm(
      epsilon=c.layer_norm_eps, dtype=self.dtype, name="text_model.final_layer_norm"
    )
    return norm(x).astype(jnp.float32)
