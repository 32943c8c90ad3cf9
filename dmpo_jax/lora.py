"""Low-rank adaptation: y = x W + scale (x A) B, with W frozen (Hu et al., arXiv 2106.09685, eq. 3).

A delta is a pytree {module: {"down": A, "up": B}} whose module names are diffusers'
("mid_block.attentions.0.transformer_blocks.0.attn1.to_q"). It is added where a Dense layer is
called, so that no second copy of W exists while training; `merge` makes one for sampling, export.
"""

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

Delta = Mapping[str, Mapping[str, Any]]


class Adapter(NamedTuple):
  """Attributes:
  delta: module -> {"down": [in, rank], "up": [rank, out]}.
  scale: alpha / rank.
  """

  delta: Delta
  scale: Any


class Adapted(NamedTuple):
  """Parameters with an adapter on top: what a model is applied to in place of its parameters."""

  params: PyTree
  adapter: Adapter


def find_kernels(params: PyTree) -> dict[str, Any]:
  """Kernels by diffusers' module name.

  >>> find_kernels({"conv_in": {"kernel": 0, "bias": 1}})
  {'conv_in': 0}
  """
  found = {}

  def visit(tree, path):
    for name, value in tree.items():
      if isinstance(value, Mapping):
        visit(value, (*path, name))
      elif name == "kernel":
        found[".".join(path)] = value

  visit(params, ())
  return found


def init_delta(shapes: PyTree, *, rank: int, targets: Sequence[str], seed: int) -> dict[str, dict]:
  """A delta of zero: A normal with standard deviation 1 / rank (as diffusers' trainers), B zero.

  Args:
    shapes: the model's parameters, or their shapes.
    rank: at least 1.
    targets: dotted module names, matched from the end: "to_q" is every attention's query,
      "attn2.to_q" those of cross-attention alone.
    seed: of A; each module draws from a generator of its own.

  Returns:
    Nested dicts of float32 numpy arrays.

  Raises:
    ValueError: a target fits no module or one that is no Dense layer, or `rank` exceeds its width.
  """
  if rank < 1:
    raise ValueError(f"lora.rank: expected at least 1, got {rank}")
  kernels, delta = find_kernels(shapes), {}
  for target in targets:
    fitting = [name for name in kernels if f".{name}".endswith(f".{target}")]
    if not fitting:
      raise ValueError(
        f"lora.targets: no module ends in {target!r}; expected for example to_q to_k to_v to_out.0"
      )
    for name in fitting:
      shape = tuple(kernels[name].shape)
      if len(shape) != 2:
        raise ValueError(
          f"lora.targets: {target!r} fits {name}, a convolution; expected Dense layers, e.g. "
          "to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2"
        )
      if rank > min(shape):
        raise ValueError(
          f"lora.rank: {rank} is more than {name} has, {shape[0]} x {shape[1]}; expected less"
        )
      generator = np.random.default_rng((seed, zlib.crc32(name.encode())))
      down = generator.standard_normal((shape[0], rank), np.float32) / np.float32(rank)
      delta[name] = {"down": down, "up": np.zeros((rank, shape[1]), np.float32)}
  return delta


def split_adapted(params: PyTree) -> tuple[PyTree, contextlib.AbstractContextManager]:
  """What to pass to a model's `apply`, and the context to do it in.

  Args:
    params: of the model, or an `Adapted`.
  """
  if isinstance(params, Adapted):
    return params.params, nn.intercept_methods(_add_delta(*params.adapter))
  return params, contextlib.nullcontext()


def _add_delta(delta: Delta, scale):
  def call(next_function, args, kwargs, context):
    output = next_function(*args, **kwargs)
    pair = delta.get(".".join(context.module.path))
    if pair is None or not isinstance(context.module, nn.Dense):
      return output
    down, up = (pair[name].astype(output.dtype) for name in ("down", "up"))
    return output + jnp.asarray(scale, output.dtype) * ((args[0].astype(output.dtype) @ down) @ up)

  return call


def merge(params: PyTree, adapter: Adapter) -> PyTree:
  """Parameters with W + scale A B in place of W; numpy float32, the other leaves as they are.

  A pair for a convolution is [kh, kw, in, rank] and [1, 1, rank, out].

  Raises:
    ValueError: a module of `delta` is not in `params`, or its shape does not fit.

  >>> kernel = np.ones((1, 2), np.float32)
  >>> pair = {"down": np.ones((1, 1)), "up": np.array([[1.0, 3.0]])}
  >>> adapter = Adapter({"proj": pair}, 0.5)
  >>> merge({"proj": {"kernel": kernel}}, adapter)["proj"]["kernel"].tolist()
  [[1.5, 2.5]]
  """
  (delta, scale), kernels = adapter, find_kernels(params)
  unknown = sorted(set(delta) - set(kernels))
  if unknown:
    raise ValueError(
      f"lora: {len(unknown)} module(s) are not in the model, first {unknown[0]!r}; is it one of "
      "this architecture?"
    )

  def visit(tree, path):
    changed = dict(tree)
    for name, value in tree.items():
      if isinstance(value, Mapping):
        changed[name] = visit(value, (*path, name))
    module = ".".join(path)
    if module in delta and "kernel" in tree:
      changed["kernel"] = _merge_kernel(tree["kernel"], delta[module], scale, module)
    return changed

  return visit(params, ())


def _merge_kernel(kernel, pair: Mapping[str, Any], scale, module: str) -> np.ndarray:
  kernel = np.asarray(kernel, np.float32)
  down, up = np.asarray(pair["down"], np.float32), np.asarray(pair["up"], np.float32)
  update = np.tensordot(down, up.reshape(up.shape[-2:]), axes=1)
  if update.size != kernel.size or update.shape[-2:] != kernel.shape[-2:]:
    raise ValueError(
      f"lora: module {module!r} has a delta of shape {list(update.shape)}; expected "
      f"{list(kernel.shape)}"
    )
  return kernel + np.float32(scale) * update.reshape(kernel.shape)
