"""Flax parameter trees <-> the PyTorch-layout state dicts of diffusers and transformers.

The names of our modules are theirs, so that joining a parameter's path with dots gives the tensor's
name; the leaf says its layout. Both directions are numpy only and inverse to each other.

| Flax leaf         | tensor   | layout           |
|-------------------|----------|------------------|
| kernel, 4-D       | `weight` | HWIO <-> OIHW    |
| kernel, 2-D       | `weight` | [in, out] <-> [out, in] |
| scale, embedding  | `weight` | as it is         |
| bias              | `bias`   | as it is         |
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' file names
SUFFIXES = (
  ".safetensors",
  ".safetensors.index.json",
  ".fp16.safetensors",
  ".safetensors.index.fp16.json",
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

_TENSOR_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_READABLE = ("float64", "float32", "float16", "bfloat16")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")

# Buffers that transformers < 4.31 saved among the weights.
_BUFFERS = ("text_model.embeddings.position_ids", "embeddings.position_ids")
# transformers 5 names CLIPTextModel's tensors without this prefix, yet reads them with it;
# transformers 4 reads them only with it. So we accept both and write it.
_CLIP_PREFIX = "text_model."
# AutoencoderKL's attention as older diffusers named it, and as the VAE file of SD 1.5 still does.
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW_PROJECTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Names and lays out `params` as diffusers (transformers, for CLIP) does; keeps each dtype.

  Args:
    params: nested mappings with array leaves, as under flax's "params".

  Returns:
    Tensor name -> C-contiguous array.

  Raises:
    ValueError: a leaf is not called kernel, bias, scale or embedding.

  >>> to_diffusers({"proj": {"kernel": np.zeros((2, 3))}})["proj.weight"].shape
  (3, 2)
  """
  tensors = {}
  for path, leaf in _leaves(params):
    value = np.asarray(leaf)
    axes = _axes_to_torch(path, value.ndim)
    tensors[_tensor_name(path)] = np.asarray(value.transpose(axes), order="C")
  return tensors


def from_diffusers(
  state_dict: Mapping[str, np.ndarray], shapes: Mapping[str, Any], *, where: str = "state dict"
) -> dict[str, Any]:
  """Builds the parameter tree of shape `shapes` from `state_dict`, float32; inverts `to_diffusers`.

  Read under their present names: CLIP tensors without "text_model.", and the VAE attention's old
  query, key, value and proj_attn, also where their weights are 1x1 convolutions. CLIP's
  `position_ids` buffer is dropped. Everything else must match exactly.

  Args:
    state_dict: tensor name -> array in PyTorch's layout; looked up once per tensor.
    shapes: the tree to fill, `models.init.param_shapes(...)`; its leaves need only a `.shape`.
    where: what `state_dict` is, for the error messages.

  Returns:
    Nested dicts of C-contiguous float32 arrays, copies.

  Raises:
    ValueError: a tensor is missing, unexpected, present twice, of another shape or not of a
      floating-point type.

  >>> shapes = {"proj": {"kernel": np.zeros((2, 3))}}
  >>> from_diffusers({"proj.weight": np.ones((3, 2))}, shapes)["proj"]["kernel"].shape
  (2, 3)
  """
  expected = {_tensor_name(path): (path, tuple(leaf.shape)) for path, leaf in _leaves(shapes)}
  keys = _keys_by_tensor_name(state_dict, expected, where)
  _check_names(keys.keys(), expected.keys(), where)
  params: dict[str, Any] = {}
  mismatches = []
  for name, (path, shape) in expected.items():
    value, axes = state_dict[keys[name]], _axes_to_torch(path, len(shape))
    if value.dtype.name not in _READABLE:
      raise ValueError(
        f"{where}: tensor {keys[name]!r} is {value.dtype.name}; expected {' or '.join(_READABLE)}: "
        "use the weights that are not quantised"
      )
    torch_shape = tuple(shape[axis] for axis in axes)
    if _OLD_ATTENTION.fullmatch(keys[name]) and value.shape == (*torch_shape, 1, 1):
      value = value.reshape(torch_shape)
    if value.shape == torch_shape:
      _insert(params, path, np.array(value.transpose(np.argsort(axes)), np.float32, order="C"))
    else:
      mismatches.append(f"{keys[name]!r} has shape {value.shape}, expected {torch_shape}")
  if mismatches:
    raise ValueError(f"{where}: tensor {_some(mismatches)}; do these weights fit config.json?")
  return params


def load_params(source: str | os.PathLike, shapes: Mapping[str, Any]) -> dict[str, Any]:
  """Reads a component's weights into the tree `shapes`; see `load_safetensors`, `from_diffusers`.

  Args:
    source: the component's folder, for instance `.../unet`, or one .safetensors file.
    shapes: the tree to fill, as for `from_diffusers`.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    ValueError: the file is missing or damaged, or its tensors do not match `shapes`.
  """
  return from_diffusers(load_safetensors(source), shapes, where=str(source))


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of open safetensors files by name; each look-up reads that tensor alone."""

  def __init__(self, files: Iterable[pathlib.Path]):
    self._handles = {}
    for handle in map(_open, files):
      self._handles.update(dict.fromkeys(handle.keys(), handle))

  def __getitem__(self, name: str) -> np.ndarray:
    return self._handles[name].get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)


def load_safetensors(source: str | os.PathLike) -> Tensors:
  """Opens the weights of one component, whole or sharded, full precision before fp16.

  Args:
    source: a folder that holds `diffusion_pytorch_model` or `model` as .safetensors,
      .safetensors.index.json with its shards, or their fp16 variant; or one .safetensors file.

  Returns:
    Tensor name -> array in the file's dtype, read when looked up.

  Raises:
    ValueError: there is no such file, it is not (a whole) safetensors file, or a shard is missing.
  """
  source = pathlib.Path(source)
  file = _find(source) if source.is_dir() else source
  if file.suffix in _PICKLES:
    raise ValueError(f"{file}: expected a .safetensors file; {_about_pickles(file)}")
  if not file.is_file():
    raise ValueError(f"{source}: no such folder or file; expected a local one: download it first")
  if file.suffix != ".json":
    return Tensors([file])
  return _open_shards(file)


def save_safetensors(
  path: str | os.PathLike, tensors: Mapping[str, np.ndarray], dtype: str = "float32"
) -> None:
  """Writes `tensors` as `dtype`, atomically: at `path` is the old file or the whole new one.

  The metadata is {"format": "pt"}, without which diffusers and transformers refuse the file.

  Args:
    path: the file; its folder is made if need be.
    tensors: tensor name -> array, as `to_diffusers` returns.
    dtype: "float32", "float16" or "bfloat16".

  Raises:
    ValueError: `dtype` is another, or a value is not finite in it (float16 ends at 65,504).
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(map(repr, DTYPES))}")
  path = pathlib.Path(path)
  cast = {name: _cast(value, dtype, f"{path}: tensor {name!r}") for name, value in tensors.items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.touch()
    mode = temporary.stat().st_mode  # the user's umask; safetensors would leave 0600
    safetensors.numpy.save_file(cast, temporary, metadata={"format": "pt"})
    temporary.chmod(mode)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _leaves(
  tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, name))
    else:
      yield (*path, name), value


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
  for name in path[:-1]:
    tree = tree.setdefault(name, {})
  tree[path[-1]] = value


def _tensor_name(path: tuple[str, ...]) -> str:
  *modules, kind = path
  if kind not in _TENSOR_LEAVES:
    raise ValueError(f"parameter {'.'.join(path)!r}: expected a leaf {', '.join(_TENSOR_LEAVES)}")
  return ".".join((*modules, _TENSOR_LEAVES[kind]))


def _axes_to_torch(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
  if path[-1] != "kernel":
    return tuple(range(ndim))
  return (ndim - 1, ndim - 2, *range(ndim - 2))  # (*space, in, out) -> (out, in, *space)


def _keys_by_tensor_name(
  state_dict: Iterable[str], expected: Mapping[str, Any], where: str
) -> dict[str, str]:
  """The present name of each tensor -> its name in `state_dict`; the buffers are left out."""
  keys: dict[str, str] = {}
  for key in state_dict:
    if key in _BUFFERS:
      continue
    name = key
    if old := _OLD_ATTENTION.fullmatch(key):
      name = f"{old[1]}.{_NEW_PROJECTION[old[2]]}.{old[3]}"
    if name not in expected and _CLIP_PREFIX + name in expected:
      name = _CLIP_PREFIX + name
    if name in keys:
      raise ValueError(
        f"{where}: tensors {keys[name]!r} and {key!r} are the same parameter; expected one of them"
      )
    keys[name] = key
  return keys


def _check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
  found, expected = set(found), set(expected)
  problems = [
    f"{len(names)} {kind} ({_some(sorted(names))})"
    for kind, names in (("missing", expected - found), ("unexpected", found - expected))
    if names
  ]
  if problems:
    raise ValueError(
      f"{where}: expected the {len(expected)} tensors of the model, got {len(found)}: "
      f"{', '.join(problems)}; is this the component and the config.json you mean?"
    )


def _some(texts: list[str], shown: int = 5) -> str:
  more = [f"and {len(texts) - shown} more"] if len(texts) > shown else []
  return ", ".join(texts[:shown] + more)


def _find(folder: pathlib.Path) -> pathlib.Path:
  names = [stem + suffix for suffix in SUFFIXES for stem in STEMS]
  for name in names:
    if (folder / name).is_file():
      return folder / name
  remedy = "download them, or name the folder that holds them"
  if (folder / "model_index.json").is_file():
    remedy = "this is a whole pipeline: name a component's folder in it, for instance unet"
  elif pickles := [each for each in sorted(folder.iterdir()) if each.suffix in _PICKLES]:
    remedy = _about_pickles(pickles[0])
  raise ValueError(f"{folder}: no weights; looked for {', '.join(names)}; {remedy}")


def _about_pickles(file: pathlib.Path) -> str:
  return (
    f"{file.name} is a pickle, which is not read because opening one can run foreign code; save "
    "the model again with save_pretrained(..., safe_serialization=True)"
  )


def _open(file: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(file, framework="numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{file}: expected a whole safetensors file, got {file.stat().st_size} bytes that are not "
      f"({error}); download it again, with git-lfs if you use git"
    ) from error


def _open_shards(index: pathlib.Path) -> Tensors:
  try:
    shard_of = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(shard_of.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index}: expected JSON with a 'weight_map' of tensor names to files ({error!r}); download "
      "it again"
    ) from error
  absent = [shard for shard in shards if not (index.parent / shard).is_file()]
  if absent:
    raise ValueError(
      f"{index}: {len(absent)} of its {len(shards)} shards are not in the folder: {_some(absent)}; "
      "download them"
    )
  return Tensors(index.parent / shard for shard in shards)


def _cast(value: np.ndarray, dtype: str, where: str) -> np.ndarray:
  value = np.asarray(value)
  with np.errstate(over="ignore"):  # reported below, by name
    cast = np.asarray(value, DTYPES[dtype], order="C")
  if not np.isfinite(cast).all():
    raise ValueError(
      f"{where} is not finite in {dtype} (largest magnitude {np.abs(value).max():.3g}); expected "
      "finite values: a value past 65,504 needs bfloat16 or float32, a nan another checkpoint"
    )
  return cast
