"""Layers that the UNet and the VAE share. NHWC; submodule names are diffusers'."""

import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def upsample_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Array:
  """Nearest-neighbour upsampling with PyTorch's rule: source index = floor(i * in / out)."""
  height, width = x.shape[1:3]
  if size == (2 * height, 2 * width):
    return x.repeat(2, axis=1).repeat(2, axis=2)
  rows = jnp.arange(size[0]) * height // size[0]
  columns = jnp.arange(size[1]) * width // size[1]
  return x[:, rows][:, :, columns]


class GroupNorm(nn.Module):
  """Group normalisation in float32, returned in `dtype`.

  Means are taken over columns, rows and the group's channels in turn: a single sum of 10^5 or more
  terms loses three digits where a compiler adds them one by one, and channels keep their place in
  the last dimension, which every device wants.
  """

  groups: int
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))

    def group_mean(values):
      of_channels = values.mean(axis=2).mean(axis=1)
      of_groups = of_channels.reshape(-1, self.groups, channels // self.groups).mean(axis=-1)
      return of_groups.repeat(channels // self.groups, axis=-1)[:, None, None, :]

    x = x.astype(jnp.float32)
    centred = x - group_mean(x)
    variance = group_mean(jnp.square(centred))
    factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None, None, None]
    out = centred * factor + bias[None, None, None]
    return out.astype(self.dtype)


class ResnetBlock2D(nn.Module):
  """norm-silu-conv twice with the time embedding added between; 1x1 shortcut if widths differ."""

  out_channels: int
  groups: int
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x, temb=None):
    hidden = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x)
    hidden = conv3x3(self.out_channels, self.dtype, name="conv1")(nn.silu(hidden))
    if temb is not None:
      projection = nn.Dense(self.out_channels, dtype=self.dtype, name="time_emb_proj")
      hidden = hidden + projection(nn.silu(temb))[:, None, None, :]
    hidden = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")(hidden)
    hidden = conv3x3(self.out_channels, self.dtype, name="conv2")(nn.silu(hidden))
    if x.shape[-1] != self.out_channels:
      x = nn.Conv(self.out_channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
    return x + hidden


def conv3x3(features: int, dtype, *, name: str, strides: int = 1, padding: int = 1) -> nn.Conv:
  """A 3x3 convolution with PyTorch's symmetric padding."""
  pads = ((padding, padding),) * 2
  return nn.Conv(
    features, (3, 3), strides, pads, dtype=dtype, name=name, conv_general_dilated=convolve
  )


def convolve(
  x: Float[Array, "b h w c"], kernel: Float[Array, "i j c f"], strides, padding, **settings
) -> Float[Array, "b y x f"]:
  """`jax.lax.conv_general_dilated`; as one matrix product where the image is below the kernel.

  XLA's fast convolution on CPU does not take such images: 64 of 2 x 2 x 128 cost 7 ms where the
  product costs 0.4 (2 cores), and their gradients 10.
  """
  if min(x.shape[1:3]) >= min(kernel.shape[:2]):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

  def starts(axis, size):
    end = padded.shape[axis] - size + 1
    return [slice(start, start + end, strides[axis - 1]) for start in range(size)]

  places = itertools.product(starts(1, kernel.shape[0]), starts(2, kernel.shape[1]))
  windows = jnp.concatenate([padded[:, rows, columns] for rows, columns in places], axis=-1)
  return windows @ kernel.reshape(-1, kernel.shape[-1])
