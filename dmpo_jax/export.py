"""A trained model -> a folder in diffusers' layout that today's diffusers opens."""

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

from dmpo_jax import base as base_lib
from dmpo_jax import weights

WEIGHT_FILES = {
  "unet": "diffusion_pytorch_model.safetensors",
  "vae": "diffusion_pytorch_model.safetensors",
  "text_encoder": "model.safetensors",
}
COPIED = ("tokenizer", "scheduler")


def export_folder(
  base: base_lib.Base,
  folder: pathlib.Path,
  *,
  trained: Mapping[str, Any],
  dtype: str = "float32",
  card: str,
  replace: bool = False,
) -> pathlib.Path:
  """Writes `base` with the parts in `trained` replaced.

  Configurations, tokenizer, scheduler and untrained weights are copied as they are. The folder is
  made beside its place and renamed, so it is whole or absent.

  Args:
    trained: part (unet, vae, text_encoder) -> parameters.
    dtype: of the trained parts' tensors: float32, float16 or bfloat16.
    card: text of README.md, a Hugging Face model card.
    replace: whether an earlier export at `folder` may be replaced.

  Raises:
    ValueError: `folder` exists and `replace` is not given, or what is there is no export.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    if not replace:
      raise ValueError(f"{folder} exists; give another folder, or --replace to write it anew")
    if not (folder / "model_index.json").is_file():
      raise ValueError(f"{folder} is not an exported model; refusing to replace it")
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
  temporary.mkdir()
  try:
    _write(base, temporary, trained, dtype, card)
    if folder.exists():
      old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
      os.replace(folder, old)
      os.replace(temporary, folder)
      shutil.rmtree(old)
    else:
      os.replace(temporary, folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _write(base, folder, trained, dtype, card):
  shutil.copyfile(base.folder / "model_index.json", folder / "model_index.json")
  for name in COPIED:
    shutil.copytree(base.folder / name, folder / name)
  for part, file in WEIGHT_FILES.items():
    (folder / part).mkdir()
    shutil.copyfile(base.folder / part / "config.json", folder / part / "config.json")
    if part in trained:
      tensors = weights.to_diffusers(trained[part])
      weights.save_safetensors(folder / part / file, tensors, dtype)
    else:
      for source in (base.folder / part).glob("*.safetensors*"):
        shutil.copyfile(source, folder / part / source.name)
  (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
  *,
  base: str,
  config: Mapping[str, Any],
  data: str,
  metrics: Mapping[str, Any],
  versions: Mapping[str, str],
  licence: str,
  attribution: str,
) -> str:
  """The README.md of an export: what it is, how it was made, what was measured.

  Args:
    base: the folder or name of the model that was aligned.
    config: of the run, as nested dicts.
    data: what the pairs are, in words.
    metrics: name -> value, or {mean, low, high}.
    licence: an SPDX identifier.
  """
  method = config["objective"]["method"]
  settings = {
    name: value
    for name, value in config["objective"].items()
    if value is not None and name != "method"
  }
  rows = "\n".join(f"| {name} | {_show(value)} |" for name, value in metrics.items())
  return f"""---
license: {licence}
library_name: diffusers
pipeline_tag: text-to-image
tags: [{method}, preference-optimization, stable-diffusion, dmpo_jax]
---

# {pathlib.PurePath(base).name}, aligned with {method.upper()}

Text-to-image model in diffusers' layout, fine-tuned by dmpo_jax from `{base}` with
{method.upper()} {settings}.

```python
import diffusers
pipeline = diffusers.StableDiffusionPipeline.from_pretrained("path/to/this/folder")
image = pipeline("{{prompt}}", num_inference_steps={config["sampling"]["steps"]},
                 guidance_scale={config["sampling"]["guidance_scale"]},
                 height=SIZE, width=SIZE).images[0]
```

## Data

{data}

## Measured

| quantity | value |
|---|---|
{rows}

## Configuration

```json
{json.dumps(config, indent=2)}
```

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.

## Attribution

{attribution}
"""


def _show(value: Any) -> str:
  if isinstance(value, Mapping) and value["mean"] is None:
    return "not measured"
  if isinstance(value, Mapping):
    return f"{value['mean']:.4f} (95 % interval {value['low']:.4f} to {value['high']:.4f})"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
