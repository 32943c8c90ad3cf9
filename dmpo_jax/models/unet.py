"""UNet2DConditionModel of Stable Diffusion in Flax linen (Rombach et al., arXiv 2112.10752).

SDXL's (Podell et al., 2307.01952) and InstructPix2Pix's (Brooks et al., 2211.09800) are the same.
Configured by the fields of diffusers' `unet/config.json`; joining the names of a parameter's path
with dots gives diffusers' key. NHWC inside.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from dmpo_jax import types
from dmpo_jax.models import attention, fields, layers, remat

TIME_IDS = 6  # numbers in SDXL's size and crop conditioning, see `types.AddedConditions`


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The fields of diffusers' UNet2DConditionModel that Stable Diffusion 1, 2 and XL use.

  `attention_head_dim` holds the *number of heads* (per block), as in diffusers' SD configs.

  Attributes:
    addition_embed_type: "text_time": SDXL's conditioning on `types.AddedConditions`; None: none.
    addition_time_embed_dim: width of the embedding of each of the six time_ids.
    projection_class_embeddings_input_dim: of all six and the pooled prompt embedding together.
  """

  in_channels: int
  out_channels: int
  block_out_channels: tuple[int, ...]
  down_block_types: tuple[str, ...]
  up_block_types: tuple[str, ...]
  layers_per_block: int
  cross_attention_dim: int
  attention_head_dim: int | tuple[int, ...]
  sample_size: int
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  use_linear_projection: bool = False
  transformer_layers_per_block: int | tuple[int, ...] = 1
  flip_sin_to_cos: bool = True
  freq_shift: int = 0
  addition_embed_type: str | None = None
  addition_time_embed_dim: int | None = None
  projection_class_embeddings_input_dim: int | None = None

  def __post_init__(self):
    fields.check_counts(
      self,
      "in_channels out_channels block_out_channels cross_attention_dim attention_head_dim"
      " sample_size norm_num_groups addition_time_embed_dim projection_class_embeddings_input_dim",
      layers="layers_per_block transformer_layers_per_block",
    )
    blocks = len(self.block_out_channels)
    for name, allowed in (
      ("down_block_types", ("DownBlock2D", "CrossAttnDownBlock2D")),
      ("up_block_types", ("UpBlock2D", "CrossAttnUpBlock2D")),
    ):
      types = fields.per_block(getattr(self, name), blocks, name)
      for each in types:
        if each not in allowed:
          raise ValueError(f"{name}: {each!r} is not implemented; expected one of {allowed}")
    for channels in self.block_out_channels:
      if channels % self.norm_num_groups:
        raise ValueError(
          f"block_out_channels: {channels} is not divisible by norm_num_groups "
          f"{self.norm_num_groups}"
        )
    for channels, heads, _ in zip(self.block_out_channels, self.heads, self.depths, strict=True):
      if channels % heads:
        raise ValueError(f"attention_head_dim: {heads} heads do not divide {channels} channels")
    self._check_addition()

  def _check_addition(self):
    names = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    if self.addition_embed_type not in (None, "text_time"):
      raise ValueError(
        f"addition_embed_type: {self.addition_embed_type!r} is not implemented; expected None or "
        "'text_time'"
      )
    for name in names:
      if (getattr(self, name) is None) != (self.addition_embed_type is None):
        expected = "None" if self.addition_embed_type is None else "a width"
        raise ValueError(
          f"{name} is {getattr(self, name)}; expected {expected}, as addition_embed_type is "
          f"{self.addition_embed_type!r}"
        )
    if self.addition_embed_type is None:
      return
    if self.addition_time_embed_dim % 2:
      raise ValueError(
        f"addition_time_embed_dim is {self.addition_time_embed_dim}; expected an even number: "
        "as many sines as cosines"
      )
    if self.text_embeds_dim < 1:
      raise ValueError(
        f"projection_class_embeddings_input_dim is {self.projection_class_embeddings_input_dim}; "
        f"expected more than {TIME_IDS} times the addition_time_embed_dim "
        f"{self.addition_time_embed_dim}"
      )

  @property
  def text_embeds_dim(self) -> int | None:
    """Width of the pooled prompt embedding in `types.AddedConditions`; None: it takes none."""
    if self.addition_embed_type is None:
      return None
    return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

  @property
  def heads(self) -> tuple[int, ...]:
    """Attention heads of each block."""
    return fields.per_block(
      self.attention_head_dim, len(self.block_out_channels), "attention_head_dim"
    )

  @property
  def depths(self) -> tuple[int, ...]:
    """Transformer layers of each block's attentions."""
    return fields.per_block(
      self.transformer_layers_per_block,
      len(self.block_out_channels),
      "transformer_layers_per_block",
    )


# Fields of diffusers' config.json that we do not implement, at the values that switch them off.
NEUTRAL = {
  "act_fn": ("silu",),
  "addition_embed_type_num_heads": (64,),
  "attention_type": ("default",),
  "center_input_sample": (False,),
  "class_embed_type": (None,),
  "class_embeddings_concat": (False,),
  "conv_in_kernel": (3,),
  "conv_out_kernel": (3,),
  "cross_attention_norm": (None,),
  "downsample_padding": (1,),
  "dropout": (0, 0.0),
  "dual_cross_attention": (False,),
  "encoder_hid_dim": (None,),
  "encoder_hid_dim_type": (None,),
  "mid_block_only_cross_attention": (None,),
  "mid_block_scale_factor": (1,),
  "mid_block_type": ("UNetMidBlock2DCrossAttn",),
  "num_attention_heads": (None,),
  "num_class_embeds": (None,),
  "only_cross_attention": (False,),
  "resnet_out_scale_factor": (1.0,),
  "resnet_skip_time_act": (False,),
  "resnet_time_scale_shift": ("default",),
  "reverse_transformer_layers_per_block": (None,),
  "time_cond_proj_dim": (None,),
  "time_embedding_act_fn": (None,),
  "time_embedding_dim": (None,),
  "time_embedding_type": ("positional",),
  "timestep_post_act": (None,),
  "upcast_attention": (None, False, True),  # our softmax is always float32
}


def read_config(raw: dict, where: str = "unet/config.json") -> UNetConfig:
  """Reads diffusers' JSON fields; refuses by name those that are set and not implemented."""
  return fields.read_fields(UNetConfig, raw, NEUTRAL, where=where)


def timestep_embedding(
  timesteps: Real[Array, " B"], dim: int, *, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "B dim"]:
  """Sinusoidal embedding of timesteps in [0, T), float32 (diffusers `get_timestep_embedding`).

  Frequencies are 10000^(-i / (dim/2 - freq_shift)); cosines come first if `flip_sin_to_cos`. SDXL
  embeds its sizes, in pixels, in the same way.
  """
  half = dim // 2
  exponents = -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  angles = timesteps.astype(jnp.float32)[:, None] * jnp.exp(exponents)[None, :]
  parts = (jnp.cos(angles), jnp.sin(angles))
  return jnp.concatenate(parts if flip_sin_to_cos else parts[::-1], axis=-1)


class TimestepEmbedding(nn.Module):
  features: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x):
    x = nn.silu(nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x))
    return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(x)


class How(NamedTuple):
  """How a UNet computes; changes no parameter and, up to rounding, no value.

  Attributes:
    dtype: type of activations.
    kernel: see `attention.attention`.
    remat: policy of `remat.run_block`.
  """

  dtype: DTypeLike
  kernel: str
  remat: str


class Attention(nn.Module):
  """Self-attention, or cross-attention when `context` is given.

  A row of `context` may be that of several rows of `x` that lie side by side: their tokens then ask
  its keys together.
  """

  heads: int
  how: How

  @nn.compact
  def __call__(self, x, context=None):
    channels = x.shape[-1]
    queries = x if context is None else x.reshape(context.shape[0], -1, channels)
    context = x if context is None else context

    def project(name, inputs):
      return nn.Dense(channels, use_bias=False, dtype=self.how.dtype, name=name)(inputs)

    out = attention.attention(
      project("to_q", queries),
      project("to_k", context),
      project("to_v", context),
      self.heads,
      kernel=self.how.kernel,
    )
    return nn.Dense(channels, dtype=self.how.dtype, name="to_out.0")(out).reshape(x.shape)


class FeedForward(nn.Module):
  """GEGLU with exact GELU, expansion 4."""

  dtype: DTypeLike

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    hidden = nn.Dense(8 * channels, dtype=self.dtype, name="net.0.proj")(x)
    value, gate = jnp.split(hidden, 2, axis=-1)
    return nn.Dense(channels, dtype=self.dtype, name="net.2")(
      value * nn.gelu(gate, approximate=False)
    )


class BasicTransformerBlock(nn.Module):
  heads: int
  how: How

  @nn.compact
  def __call__(self, x, context):
    def norm(name):
      return nn.LayerNorm(epsilon=1e-5, dtype=self.how.dtype, name=name)

    x = x + Attention(self.heads, self.how, name="attn1")(norm("norm1")(x))
    x = x + Attention(self.heads, self.how, name="attn2")(norm("norm2")(x), context)
    return x + FeedForward(self.how.dtype, name="ff")(norm("norm3")(x))


class Transformer2DModel(nn.Module):
  heads: int
  depth: int
  config: UNetConfig
  how: How

  @nn.compact
  def __call__(self, x, context):
    batch, height, width, channels = x.shape

    def projection(name):
      if self.config.use_linear_projection:
        return nn.Dense(channels, dtype=self.how.dtype, name=name)
      return nn.Conv(channels, (1, 1), dtype=self.how.dtype, name=name)

    groups = self.config.norm_num_groups
    hidden = layers.GroupNorm(groups, 1e-6, self.how.dtype, name="norm")(x)
    hidden = projection("proj_in")(hidden).reshape(batch, height * width, channels)
    for i in range(self.depth):
      block = BasicTransformerBlock(self.heads, self.how, name=f"transformer_blocks.{i}")
      hidden = remat.run_block(block, self.how.remat, hidden, context)
    return x + projection("proj_out")(hidden.reshape(x.shape))


class DownBlock2D(nn.Module):
  """Resnets, each followed by a transformer in the CrossAttn kind, then a stride-2 convolution."""

  channels: int
  heads: int | None  # None: no attention
  depth: int
  downsample: bool
  config: UNetConfig
  how: How

  @nn.compact
  def __call__(self, x, temb, context):
    c, skips = self.config, []
    for i in range(c.layers_per_block):
      resnet = layers.ResnetBlock2D(
        self.channels, c.norm_num_groups, c.norm_eps, self.how.dtype, name=f"resnets.{i}"
      )
      x = remat.run_block(resnet, self.how.remat, x, temb)
      if self.heads is not None:
        x = Transformer2DModel(self.heads, self.depth, c, self.how, name=f"attentions.{i}")(
          x, context
        )
      skips.append(x)
    if self.downsample:
      x = layers.conv3x3(self.channels, self.how.dtype, strides=2, name="downsamplers.0.conv")(x)
      skips.append(x)
    return x, skips


class MidBlock2D(nn.Module):
  heads: int
  depth: int
  config: UNetConfig
  how: How

  @nn.compact
  def __call__(self, x, temb, context):
    c = self.config

    def resnet(name):
      return layers.ResnetBlock2D(
        x.shape[-1], c.norm_num_groups, c.norm_eps, self.how.dtype, name=name
      )

    x = remat.run_block(resnet("resnets.0"), self.how.remat, x, temb)
    x = Transformer2DModel(self.heads, self.depth, c, self.how, name="attentions.0")(x, context)
    return remat.run_block(resnet("resnets.1"), self.how.remat, x, temb)


class UpBlock2D(nn.Module):
  """The mirror of DownBlock2D: every resnet also takes one skip, then nearest upsampling."""

  channels: int
  heads: int | None  # None: no attention
  depth: int
  upsample: bool
  config: UNetConfig
  how: How

  @nn.compact
  def __call__(self, x, skips, temb, context):
    """Consumes its skips from the end of the list `skips`."""
    c = self.config
    for i in range(c.layers_per_block + 1):
      x = jnp.concatenate([x, skips.pop()], axis=-1)
      resnet = layers.ResnetBlock2D(
        self.channels, c.norm_num_groups, c.norm_eps, self.how.dtype, name=f"resnets.{i}"
      )
      x = remat.run_block(resnet, self.how.remat, x, temb)
      if self.heads is not None:
        x = Transformer2DModel(self.heads, self.depth, c, self.how, name=f"attentions.{i}")(
          x, context
        )
    if self.upsample:
      x = layers.upsample_nearest(x, skips[-1].shape[1:3])
      x = layers.conv3x3(self.channels, self.how.dtype, name="upsamplers.0.conv")(x)
    return x


class UNet2DConditionModel(nn.Module):
  """Predicts the noise (or v, or x0: what the scheduler's `prediction_type` says).

  `prompt_embeds` may have fewer rows than `latents`: each is then the prompt of B / prompts of them
  side by side. `added` is for models with `addition_embed_type` "text_time", and those need it.
  `dtype` is the compute type; the output is float32 so that errors are formed in float32. For
  `kernel` see `How`. `remat` is the policy of `remat.checkpoint` under which it may be called.
  """

  config: UNetConfig
  dtype: DTypeLike = jnp.float32
  kernel: str = "cpu"
  remat: str = "full"

  def __call__(
    self,
    latents: Float[Array, "B h w c"],
    timesteps: Int[Array, " B"] | Float[Array, " B"],
    prompt_embeds: Float[Array, "prompts L D"],
    added: types.AddedConditions | None = None,
  ) -> Float[Array, "B h w out"]:
    with remat.marked(self.remat, (BasicTransformerBlock, Transformer2DModel)):
      return self.predict(latents, timesteps, prompt_embeds, added)

  @nn.compact
  def predict(self, latents, timesteps, prompt_embeds, added):
    c, dtype, how = self.config, self.dtype, How(self.dtype, self.kernel, self.remat)
    fields.check_width("latents", latents.shape[-1], "in_channels", c.in_channels)
    fields.check_width(
      "prompt_embeds", prompt_embeds.shape[-1], "cross_attention_dim", c.cross_attention_dim
    )
    widths = c.block_out_channels
    last = len(widths) - 1
    sinusoids = functools.partial(
      timestep_embedding, flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
    )
    temb = sinusoids(timesteps, widths[0]).astype(dtype)
    temb = TimestepEmbedding(4 * widths[0], dtype, name="time_embedding")(temb)
    check_added(c, added)
    if added is not None:
      sizes = sinusoids(added.time_ids.reshape(-1), c.addition_time_embed_dim)
      sizes = sizes.reshape(added.time_ids.shape[0], -1)
      more = jnp.concatenate([added.text_embeds.astype(jnp.float32), sizes], axis=-1).astype(dtype)
      temb = temb + TimestepEmbedding(4 * widths[0], dtype, name="add_embedding")(more)
    context = prompt_embeds.astype(dtype)

    x = layers.conv3x3(widths[0], dtype, name="conv_in")(latents.astype(dtype))
    skips = [x]
    for i, kind in enumerate(c.down_block_types):
      heads = c.heads[i] if kind == "CrossAttnDownBlock2D" else None
      block = DownBlock2D(widths[i], heads, c.depths[i], i < last, c, how, name=f"down_blocks.{i}")
      x, more = block(x, temb, context)
      skips += more
    x = MidBlock2D(c.heads[-1], c.depths[-1], c, how, name="mid_block")(x, temb, context)
    for i, kind in enumerate(c.up_block_types):
      j = last - i
      heads = c.heads[j] if kind == "CrossAttnUpBlock2D" else None
      block = UpBlock2D(widths[j], heads, c.depths[j], i < last, c, how, name=f"up_blocks.{i}")
      x = block(x, skips, temb, context)
    x = nn.silu(layers.GroupNorm(c.norm_num_groups, c.norm_eps, dtype, name="conv_norm_out")(x))
    return layers.conv3x3(c.out_channels, dtype, name="conv_out")(x).astype(jnp.float32)


def check_added(config: UNetConfig, added: types.AddedConditions | None) -> None:
  """Refuses conditions that a model of `config` does not take, or takes and does not get.

  Raises:
    ValueError: `added` is missing, superfluous or of another width.
  """
  if (added is None) != (config.addition_embed_type is None):
    state, expected = ("missing", "them") if added is None else ("given", "none")
    raise ValueError(
      f"added conditions (text_embeds, time_ids) are {state}; expected {expected}, as the model's "
      f"addition_embed_type is {config.addition_embed_type!r}"
    )
  if added is not None:
    fields.check_width(
      "added text_embeds",
      added.text_embeds.shape[-1],
      "projection_class_embeddings_input_dim without time_ids",
      config.text_embeds_dim,
    )
    fields.check_width("added time_ids", added.time_ids.shape[-1], "number of time_ids", TIME_IDS)
