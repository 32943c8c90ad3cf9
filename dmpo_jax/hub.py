"""Models of the Hugging Face hub: what `owner/name` means, and the files we need of it."""

import pathlib
import re
from collections.abc import Sequence

import huggingface_hub
from huggingface_hub import errors

# Of every component its JSON and safetensors at full precision; what diffusers itself would load.
WANTED = ("model_index.json", "*/*.json", "*/merges.txt", "*/*.safetensors")
UNWANTED = ("*.fp16.*", "*.bf16.*", "*non_ema*", "safety_checker/*", "*flax*", "*openvino*")


def is_repository(name: str) -> bool:
  """Whether `name` has the form of a hub id.

  >>> is_repository("stabilityai/stable-diffusion-xl-base-1.0"), is_repository("runs/a/b")
  (True, False)
  """
  return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(
  name: str,
  wanted: Sequence[str] = WANTED,
  unwanted: Sequence[str] = UNWANTED,
  *,
  what: str = "base",
) -> pathlib.Path:
  """The folder of a model of the hub in the hub's cache, downloaded if it is not there.

  Args:
    wanted: patterns of the files to download; those of a diffusers model if not given.
    unwanted: patterns of files among them that are not.
    what: what the model is called in the error message.

  Raises:
    ValueError: there is no such model, or no way to it: says what to download where.
  """
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=list(wanted), ignore_patterns=list(unwanted)
      )
    )
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
    raise ValueError(
      f"{what} {name!r}: no such folder here, and the Hugging Face hub did not give it "
      f"({type(error).__name__}); on a machine with a network run `hf download {name} --local-dir "
      f"FOLDER`, copy FOLDER here, and name it in place of the id. For a gated model log in first: "
      "`hf auth login`"
    ) from error
