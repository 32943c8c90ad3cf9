"""Flax parameter trees <-> the PyTorch-layout state dicts of diffusers and transformers.

The names of our modules are theirs, so that joining a parameter's path with dots gives the tensor's
name; the leaf says its layout. Both directions are numpy only and inverse to each other.

| Flax leaf         | tensor            | layout                  |
|-------------------|-------------------|-------------------------|
| kernel, 4-D       | `weight`          | HWIO <-> OIHW           |
| kernel, 2-D       | `weight`          | [in, out] <-> [out, in] |
| scale, embedding  | `weight`          | as it is                |
| bias              | `bias`            | as it is                |
| class_embedding   | `class_embedding` | as it is                |
| logit_scale       | `logit_scale`     | as it is                |
"""

import difflib
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dmpo_jax import safetensors_io

# CLIP's vision model has a parameter of its own that is called class_embedding, CLIP logit_scale.
_TENSOR_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "bias": "bias",
  "class_embedding": "class_embedding",
  "logit_scale": "logit_scale",
}

CUTOFF = 0.85  # difflib's ratio from which a name is taken for another's misspelling

# Buffers that transformers < 4.31 saved among the weights.
_BUFFER = re.compile(r"(.*\.)?embeddings\.position_ids")
# transformers 5 names the tensors of CLIPTextModel and CLIPVisionModel without these prefixes, yet
# reads them with them; transformers 4 reads them only with them. So we accept both and write them.
_CLIP_PREFIXES = ("text_model.", "vision_model.")
# AutoencoderKL's attention as older diffusers named it, and as the VAE file of SD 1.5 still does.
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_PROJECTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_diffusers(params: Mapping[str, Any]) -> safetensors_io.Tensors:
  """Names and lays out `params` as diffusers (transformers, for CLIP) does; keeps each dtype.

  Args:
    params: nested mappings with numpy or jax arrays as leaves, as under flax's "params".

  Returns:
    Tensor name -> C-contiguous array, laid out anew at each look-up, so that no second copy of the
    parameters stands in memory.

  Raises:
    ValueError: a leaf is of no kind that the table above has.

  >>> to_diffusers({"proj": {"kernel": np.zeros((2, 3))}})["proj.weight"].shape
  (3, 2)
  """
  return safetensors_io.Tensors(
    {_tensor_name(path): _torch_tensor(path, leaf) for path, leaf in _leaves(params)}
  )


def from_diffusers(
  state_dict: Mapping[str, Any],
  shapes: Mapping[str, Any],
  *,
  where: str = "state dict",
  lazy: bool = False,
) -> dict[str, Any]:
  """Builds the parameter tree of shape `shapes` from `state_dict`, float32; inverts `to_diffusers`.

  Read under their present names: CLIP tensors without "text_model." or "vision_model.", and the VAE
  attention's old query, key, value and proj_attn, also where their weights are 1x1 convolutions.
  CLIP's `position_ids` buffer is dropped. Everything else must match exactly.

  Args:
    state_dict: tensor name -> array in PyTorch's layout; looked up once per tensor.
    shapes: the tree to fill, `models.init.param_shapes(...)`; its leaves need only a `.shape`.
    where: what `state_dict` is, for the error messages.
    lazy: whether the leaves are `safetensors_io.Tensor`, float32 too, each read when it is asked
      for: for a tree that the host cannot hold whole.

  Returns:
    Nested dicts of C-contiguous float32 arrays, copies.

  Raises:
    ValueError: tensors are missing, unexpected, present twice, of another shape or not of a
      floating-point type; all of them are named, before any is read.

  >>> shapes = {"proj": {"kernel": np.zeros((2, 3))}}
  >>> from_diffusers({"proj.weight": np.ones((3, 2))}, shapes)["proj"]["kernel"].shape
  (2, 3)
  """
  tensors = safetensors_io.as_tensors(state_dict)
  paths = {_tensor_name(path): (path, tuple(leaf.shape)) for path, leaf in _leaves(shapes)}
  expected = {name: _torch_shape(path, shape) for name, (path, shape) in paths.items()}
  keys = _keys_by_tensor_name(tensors, expected)
  _check(tensors, keys, expected, where)
  params: dict[str, Any] = {}
  for name, (path, shape) in paths.items():
    axes = tuple(np.argsort(_axes_to_torch(path, len(shape))).tolist())
    read = functools.partial(_read_leaf, tensors, keys[name][0], expected[name], axes)
    _insert(
      params, path, safetensors_io.Tensor(shape, np.dtype(np.float32), read) if lazy else read()
    )
  return params


def _read_leaf(tensors, key: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> np.ndarray:
  return np.array(tensors[key].reshape(shape).transpose(axes), np.float32, order="C")


def load_params(
  source: str | os.PathLike,
  shapes: Mapping[str, Any],
  variant: str | None = None,
  *,
  lazy: bool = False,
) -> dict[str, Any]:
  """Reads a component's weights into the tree `shapes`: opens its files, then `from_diffusers`.

  Args:
    source: the component's folder, for instance `.../unet`, or one .safetensors file.
    shapes: the tree to fill, as for `from_diffusers`.
    variant: as for `safetensors_io.load_safetensors`.
    lazy: as for `from_diffusers`.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    ValueError: the file is missing or damaged, or its tensors do not match `shapes`.
  """
  tensors = safetensors_io.load_safetensors(source, variant)
  return from_diffusers(tensors, shapes, where=str(source), lazy=lazy)


def _leaves(
  tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), value


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def _tensor_name(path: tuple[str, ...]) -> str:
  *modules, kind = path
  if kind not in _TENSOR_LEAVES:
    raise ValueError(f"parameter {'.'.join(path)!r}: expected a leaf {', '.join(_TENSOR_LEAVES)}")
  return ".".join((*modules, _TENSOR_LEAVES[kind]))


def kernel_axes(ndim: int) -> tuple[int, ...]:
  """The order of axes that makes PyTorch's weight [out, in, *space] of a kernel [*space, in, out].

  >>> kernel_axes(4)
  (3, 2, 0, 1)
  """
  return (ndim - 1, ndim - 2, *range(ndim - 2))


def _axes_to_torch(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
  return kernel_axes(ndim) if path[-1] == "kernel" else tuple(range(ndim))


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(shape[axis] for axis in _axes_to_torch(path, len(shape)))


def _torch_tensor(path: tuple[str, ...], leaf: Any) -> safetensors_io.Tensor:
  ours = safetensors_io.array_tensor(leaf)
  axes = _axes_to_torch(path, len(ours.shape))

  def read():
    return np.asarray(ours.read().transpose(axes), order="C")

  return safetensors_io.Tensor(_torch_shape(path, ours.shape), ours.dtype, read)


def _keys_by_tensor_name(keys: Iterable[str], expected: Mapping[str, Any]) -> dict[str, list[str]]:
  """The present name of each tensor -> its names in the file; the buffers are left out."""
  found: dict[str, list[str]] = {}
  for key in keys:
    if _BUFFER.fullmatch(key):
      continue
    name = key
    if old := _OLD_ATTENTION.fullmatch(key):
      name = f"{old[1]}.{_NEW_PROJECTION[old[2]]}.{old[3]}"
    if name not in expected:
      name = next((each + name for each in _CLIP_PREFIXES if each + name in expected), name)
    found.setdefault(name, []).append(key)
  return found


def _check(
  tensors: safetensors_io.Tensors,
  keys: Mapping[str, list[str]],
  expected: Mapping[str, tuple[int, ...]],
  where: str,
) -> None:
  missing = sorted(expected.keys() - keys.keys())
  unexpected = sorted(keys.keys() - expected.keys())
  problems = {
    "missing": _with_closest(missing, unexpected, "the file has"),
    "unexpected": _with_closest(unexpected, missing or expected, "expected is"),
    "present twice": [" and ".join(map(repr, each)) for each in keys.values() if len(each) > 1],
    **_unfit(tensors, keys, expected),
  }
  texts = [f"{len(each)} {kind} ({safetensors_io.some(each)})" for kind, each in problems.items()]
  if any(problems.values()):
    found = "; ".join(text for text, each in zip(texts, problems.values(), strict=True) if each)
    raise ValueError(
      f"{where}: expected the {len(expected)} tensors of the model, got {len(keys)}: {found}; is "
      "this the component and the config.json you mean?"
    )


def _with_closest(names: list[str], candidates: Iterable[str], label: str) -> list[str]:
  """Adds to the first names, which are shown, the candidate that is spelled most like them."""
  candidates, texts = list(candidates), list(names)
  for i, name in enumerate(names[: safetensors_io.SHOWN]):
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=CUTOFF)
    texts[i] += "".join(f" [{label} {each}]" for each in close)
  return texts


def _unfit(
  tensors: safetensors_io.Tensors,
  keys: Mapping[str, list[str]],
  expected: Mapping[str, tuple[int, ...]],
) -> dict[str, list[str]]:
  shapes, dtypes = [], []
  for name, shape in expected.items():
    for key in keys.get(name, ()):
      entry = tensors.entries[key]
      as_convolution = (*shape, 1, 1) if _OLD_ATTENTION.fullmatch(key) else shape
      if entry.shape not in (shape, as_convolution):
        shapes.append(f"{key!r} has shape {entry.shape}, expected {shape}")
      if entry.dtype.name not in safetensors_io.FLOATS:
        dtypes.append(f"{key!r} is {entry.dtype.name}: use the weights that are not quantised")
  return {"of another shape": shapes, "of no floating-point type": dtypes}
