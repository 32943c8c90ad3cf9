"""Models of the Hugging Face hub: what `owner/name` means, and the files we need of it."""

import pathlib
import re

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


def download(name: str) -> pathlib.Path:
  """The folder of a diffusers model of the hub in the hub's cache, downloaded if it is not there.

  Raises:
    ValueError: there is no such model, or no way to it: says what to download where.
  """
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)
      )
    )
  except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
    raise ValueError(
      f"base {name!r}: no such folder here, and the Hugging Face hub did not give it "
      f"({type(error).__name__}); on a machine with a network run `hf download {name} --local-dir "
      f"FOLDER`, copy FOLDER here, and name it as the base. For a gated model log in first: "
      "`hf auth login`"
    ) from error
