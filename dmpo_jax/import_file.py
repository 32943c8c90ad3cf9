"""`dmpo import`: an original single-file checkpoint -> a folder in diffusers' layout."""

import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

from dmpo_jax import base as base_lib
from dmpo_jax import export, safetensors_io, single_file, single_file_configs, weights
from dmpo_jax.data import tokenizer as tokenizer_lib

TOKENIZER_FILES = ("vocab.json", "merges.txt")
# What Stable Diffusion's tokenizers pad with; their vocabulary is one and the same.
END, EXCLAMATION = tokenizer_lib.END, "!"
PADDING = {
  ("sd1", "text_encoder"): END,
  ("pix2pix", "text_encoder"): END,
  ("sd2", "text_encoder"): EXCLAMATION,
  ("sdxl", "text_encoder"): END,
  ("sdxl", "text_encoder_2"): EXCLAMATION,
}


def import_checkpoint(
  file: pathlib.Path,
  folder: pathlib.Path,
  *,
  tokenizer: pathlib.Path,
  prediction_type: str | None = None,
  resolution: int | None = None,
) -> pathlib.Path:
  """Writes a diffusers folder from a single .safetensors file, tensor by tensor, bit for bit.

  The folder is made beside its place, read back and renamed, so it is whole or absent.

  Args:
    file: in the key layout of the original repositories (CompVis, Stability AI).
    tokenizer: a folder with CLIP's vocab.json and merges.txt, which such a file does not hold.
    prediction_type: epsilon or v_prediction; Stable Diffusion 2.x needs it.
    resolution: pixels on a side; the published one if None.

  Raises:
    ValueError: `folder` exists, a file is missing or damaged, or the model is not implemented.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise ValueError(f"{folder} exists; give another folder, nothing was overwritten")
  for name in TOKENIZER_FILES:
    if not (tokenizer / name).is_file():
      raise ValueError(
        f"--tokenizer: {tokenizer / name} is missing; expected CLIP's, for instance the folder "
        "tokenizer/ of any Stable Diffusion in diffusers' layout"
      )
  tensors = safetensors_io.load_safetensors(file)
  kind = single_file.detect_kind(tensors)
  configs = single_file_configs.configs_of(
    kind, tensors, prediction_type=prediction_type, resolution=resolution
  )
  parts = single_file.split_checkpoint(tensors)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    _write(temporary, configs, parts, tokenizer, kind)
    _read_back(temporary)
    temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _write(
  folder: pathlib.Path,
  configs: Mapping[str, Mapping[str, Any]],
  parts: Mapping[str, Mapping],
  tokenizer: pathlib.Path,
  kind: str,
) -> None:
  for name, content in configs.items():
    export.write_json(folder / name, content)
  for part, tensors in parts.items():
    safetensors_io.save_safetensors(
      folder / part / export.WEIGHT_FILES.get(part, export.MODEL_FILE),
      tensors,
      None,
      max_shard_bytes=safetensors_io.DIFFUSERS_SHARD_BYTES,
    )
    if (kind, part) in PADDING:
      target = folder / base_lib.tokenizer_folder(part)
      _write_tokenizer(tokenizer, target, PADDING[kind, part])


def _write_tokenizer(source: pathlib.Path, target: pathlib.Path, pad: str) -> None:
  target.mkdir()
  for name in TOKENIZER_FILES:
    shutil.copyfile(source / name, target / name)
  tokenizer_lib.write_settings(target, pad)


def _read_back(folder: pathlib.Path) -> None:
  """Refuses what a training would refuse, part by part, so that one alone is in memory."""
  base = base_lib.load_base(str(folder), parts=())
  for part, shapes in base.shapes.items():
    weights.load_params(folder / part, shapes)
  largest = tokenizer_lib.load_tokenizer(folder / "tokenizer").vocab_size
  for name in base.encoders:
    size = base.models[name].config.vocab_size
    if largest > size:
      raise ValueError(
        f"--tokenizer: its vocabulary has {largest} ids; expected at most {size}, as {name} has"
      )
