"""Initial parameters without compiling anything: trace the shapes, then fill them with numpy."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

EMBEDDING_STD = 0.02  # transformers' initializer_range for CLIP


def param_shapes(model: nn.Module, *inputs: Any, method: Callable | None = None) -> dict[str, Any]:
  """The parameter tree of `model` with shapes in place of values; allocates and compiles nothing.

  Args:
    model: a linen module.
    *inputs: what the module is called with; arrays or `jax.ShapeDtypeStruct`.
    method: the method to trace, `__call__` if None.

  Returns:
    The tree under "params": nested dicts with `jax.ShapeDtypeStruct` leaves.

  >>> param_shapes(nn.Dense(3), np.zeros((1, 2), np.float32))["kernel"].shape
  (2, 3)
  """

  def init(*arguments):
    return model.init(jax.random.key(0), *arguments, method=method)

  return jax.eval_shape(init, *inputs)["params"]


def initial_params(
  model: nn.Module,
  seed: int,
  *inputs: Any,
  method: Callable | None = None,
  zero: Sequence[str] = (),
) -> dict[str, Any]:
  """Random parameters for `model`, a pure function of (seed, parameter path, shape).

  Kernels are normal with variance 1 / fan_in (LeCun et al., "Efficient BackProp", 1998, section
  4.6), embeddings normal with standard deviation 0.02, biases 0, scales 1. As each leaf draws from
  a generator of its own, adding a layer leaves the values of the others alone.

  Args:
    model: a linen module.
    seed: a non-negative integer.
    *inputs: what the module is called with; arrays or `jax.ShapeDtypeStruct`.
    method: the method to trace, `__call__` if None.
    zero: dotted module names, matched from the end of the path: "conv_out" is every module of that
      name, "attn1.to_out.0" only those. Their kernels are 0.

  Returns:
    The tree under "params": nested dicts of float32 numpy arrays.

  Raises:
    ValueError: a leaf is of no kind named above, or a name in `zero` fits no kernel.

  >>> params = initial_params(nn.Dense(2), 0, np.zeros((1, 2), np.float32))
  >>> params["bias"].tolist()
  [0.0, 0.0]
  """
  unused = set(zero)

  def fill(path, leaf):
    *modules, kind = (str(entry.key) for entry in path)
    module = "." + ".".join(modules)
    fitting = {name for name in zero if kind == "kernel" and module.endswith("." + name)}
    unused.difference_update(fitting)
    if fitting:
      return np.zeros(leaf.shape, np.float32)
    return _fill(seed, f"{module}.{kind}"[1:], kind, leaf.shape)

  params = jax.tree_util.tree_map_with_path(fill, param_shapes(model, *inputs, method=method))
  if unused:
    raise ValueError(
      f"zero: no kernel of {type(model).__name__} is named {', '.join(sorted(unused))}; "
      "expected the last name(s) of a module's path"
    )
  return params


def _fill(seed: int, path: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
  if kind == "scale":
    return np.ones(shape, np.float32)
  if kind == "bias":
    return np.zeros(shape, np.float32)
  if kind == "kernel":
    std = np.prod(shape[:-1]) ** -0.5  # the last axis of a linen kernel is the output
  elif kind in ("embedding", "class_embedding"):
    std = EMBEDDING_STD
  else:
    raise ValueError(
      f"{path}: no initialiser for {kind!r}; expected kernel, bias, scale, embedding or "
      "class_embedding"
    )
  generator = np.random.default_rng((seed, zlib.crc32(path.encode())))
  return np.float32(std) * generator.standard_normal(shape, np.float32)
