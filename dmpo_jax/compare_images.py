"""Images of several models for the same prompts and noise, in a folder that can be gone on with.

    manifest.json           what the images depend on
    prompts.json            the sets and all prompts; a prompt's number is its place there
    images/M/PPPPP_NN.png   of model M, prompt P, number N, each counted from 0

An image depends on the batch that it was drawn in, by rounding. So the images are cut into batches
once, in one order, and a batch of which an image is missing is drawn as a whole: what is written
does not depend on interruptions, on the same devices.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import checkpoint, evaluate, logs, prompt_sets, stages, train
from dmpo_jax import config as config_lib
from dmpo_jax.data import images as images_lib

FORMAT = 1  # of the folder
MANIFEST, PROMPTS = "manifest.json", "prompts.json"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,40})=(.+)")


class Model(NamedTuple):
  """One of the models, as it was asked for.

  Attributes:
    name: in tables.
    source: a run folder, or what `base.resolve` takes.
  """

  name: str
  source: str

  @property
  def run(self) -> pathlib.Path | None:
    """The run folder; None if it is none."""
    folder = pathlib.Path(self.source)
    return folder if (folder / train.RUN_FILE).is_file() else None

  @property
  def base(self) -> str:
    """What its VAE, text encoders and tokenizers are read from."""
    return self.source if self.run is None else train.read_run(self.run).base

  def unet_params(self, base: base_lib.Base) -> Any:
    """The UNet's parameters, of the model's base or of what a run trained on it."""
    return base.params["unet"] if self.run is None else stages.load_policy(base, self.run)


def load_bases(models: Sequence[Model], compute: str) -> dict[str, base_lib.Base]:
  """Every base that the models stand on, once, by `Model.base`; weights are read when asked for."""
  names = dict.fromkeys(model.base for model in models)
  return {name: base_lib.load_base(name, compute=compute, lazy=True) for name in names}


def read_models(texts: Sequence[str]) -> list[Model]:
  """`MODEL` or `NAME=MODEL`; a model without a name is called what it is.

  >>> read_models(["emoji", "dmpo=runs/a"])
  [Model(name='emoji', source='emoji'), Model(name='dmpo', source='runs/a')]

  Raises:
    ValueError: fewer than two, or two of one name.
  """
  models = []
  for text in texts:
    named = _NAMED.fullmatch(text)
    models.append(Model(*named.groups()) if named else Model(text, text))
  names = [model.name for model in models]
  if len(models) < 2 or len(set(names)) < len(names):
    raise ValueError(
      f"models: expected two or more, each with a name of its own, got {', '.join(names)}; the "
      "first is the baseline, and NAME=MODEL gives a name"
    )
  return models


class Store(NamedTuple):
  """The folder of a comparison.

  Attributes:
    prompts: all, each once.
    sets: name of a set -> numbers of its prompts.
    per_prompt: images of each prompt.
  """

  folder: pathlib.Path
  models: tuple[Model, ...]
  prompts: tuple[str, ...]
  sets: dict[str, tuple[int, ...]]
  per_prompt: int

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """(prompt, number) of all images of a model, in the order in which they are drawn."""
    return [(p, n) for p in range(len(self.prompts)) for n in range(self.per_prompt)]

  def path(self, model: int, prompt: int, number: int) -> pathlib.Path:
    return self.folder / "images" / str(model) / f"{prompt:05d}_{number:02d}.png"

  def read(self, model: int, prompt: int, number: int) -> UInt8[np.ndarray, "H W 3"]:
    """One image.

    Raises:
      ValueError: it is missing or damaged.
    """
    path = self.path(model, prompt, number)
    try:
      return np.asarray(images_lib.decode(path.read_bytes()))
    except (OSError, ValueError) as error:
      raise ValueError(
        f"{path}: not a readable picture ({error}); delete it and run the command again"
      ) from error

  def read_prompt(self, model: int, prompt: int) -> UInt8[np.ndarray, "s H W 3"]:
    """All images of a prompt."""
    return np.stack([self.read(model, prompt, n) for n in range(self.per_prompt)])


def open_store(
  folder: pathlib.Path, models: Sequence[Model], sets: Sequence[prompt_sets.PromptSet], count: int
) -> Store:
  """The store as it is asked for; nothing is read or written."""
  prompts = tuple(dict.fromkeys(prompt for each in sets for prompt in each.prompts))
  number = {prompt: i for i, prompt in enumerate(prompts)}
  members = {each.name: tuple(number[prompt] for prompt in each.prompts) for each in sets}
  return Store(folder, tuple(models), prompts, members, count)


def draw_images(
  store: Store,
  bases: Mapping[str, base_lib.Base],
  config: config_lib.Config,
  sets: Sequence[prompt_sets.PromptSet],
  *,
  seed: int,
) -> dict[str, Any]:
  """Draws what is missing in the store, model after model.

  Args:
    bases: see `load_bases`.

  Returns:
    The manifest.

  Raises:
    ValueError: the models do not fit each other, one edits images, this is one of several
      processes, or the folder holds a comparison with another setting, which is named.
  """
  if jax.process_count() > 1:
    raise ValueError(f"evaluate: expected one process, got {jax.process_count()}")
  described, sampling = _describe(store.models, bases, config.sampling)
  manifest = _manifest(described, sampling, config.precision.compute, sets, seed)
  claim(store.folder, manifest)
  write_json(store.folder / PROMPTS, {"prompts": store.prompts, "sets": store.sets})
  last = None
  for index, model in enumerate(store.models):
    (store.folder / "images" / str(index)).mkdir(parents=True, exist_ok=True)
    if all(store.path(index, *each).exists() for each in store.pairs):
      continue
    base = bases[model.base]
    # A policy and its reference share all but the UNet's parameters, and so the compiled program.
    if last is None or last[0] is not base:
      last = base, evaluate.make_batch_sampler(base, sampling)
    _draw_model(store, index, base, last[1], seed)
  return manifest


def _draw_model(store: Store, index: int, base, sampler, seed: int) -> None:
  pairs = store.pairs
  size = sampler.size(len(pairs))
  batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
  missing = [
    batch for batch in batches if not all(store.path(index, *each).exists() for each in batch)
  ]
  model = store.models[index]
  placed = sampler.place(model.unet_params(base), base.text_params)
  input_ids = base.tokenizer(list(store.prompts))
  done = len(pairs) - sum(map(len, missing))
  with logs.progress(len(pairs), done, f"sampling {model.name}") as bar:
    for batch in missing:
      filled = [batch[i % len(batch)] for i in range(size)]
      shape = base.latent_shape
      noise = np.stack([evaluate.noise_of(store.prompts[p], n, shape, seed) for p, n in filled])
      drawn = sampler.draw(placed, input_ids[[p for p, _ in filled]], noise)
      for each, picture in zip(batch, images_lib.to_uint8(drawn), strict=False):
        write_bytes(store.path(index, *each), images_lib.encode_png(Image.fromarray(picture)))
      bar.update(len(batch))


def _describe(
  models: Sequence[Model],
  bases: Mapping[str, base_lib.Base],
  sampling: config_lib.SamplingConfig,
) -> tuple[list[dict[str, Any]], config_lib.SamplingConfig]:
  """Each model and its weights, and how all are sampled: as the baseline, where nothing is set."""
  described, first = [], None
  for model in models:
    base = bases[model.base]
    if base.edits:
      raise ValueError(f"model {model.name}: edits images; expected one that draws from a prompt")
    first = first or (base.latent_shape, base.resolution)
    if (base.latent_shape, base.resolution) != first:
      raise ValueError(
        f"model {model.name}: latents {base.latent_shape} of images of {base.resolution} pixels; "
        f"expected {first[0]} and {first[1]} as of the baseline {models[0].name}: the same noise "
        "must start all of them"
      )
    if sampling.sampler is None:
      sampling = dataclasses.replace(sampling, sampler=base.schedule.sampler)
    described.append({**model._asdict(), "weights": weights_digest(base, model.unet_params(base))})
  return described, sampling


def weights_digest(base: base_lib.Base, unet_params: Any) -> str:
  """Of all that an image depends on beside noise and sampling: weights, tokenizers, schedule."""
  parts = (
    base.data_fingerprint(text_encoders=True),
    checkpoint.fingerprint(unet_params),
    dataclasses.asdict(base.schedule),
    base.zero_negative,
  )
  text = json.dumps(parts, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _manifest(described, sampling, compute: str, sets, seed: int) -> dict[str, Any]:
  devices = jax.devices()
  return {
    "format": FORMAT,
    "models": {each["name"]: each for each in described},
    "baseline": described[0]["name"],
    "sampling": dataclasses.asdict(sampling),
    "seed": seed,
    "compute": compute,
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "prompt_sets": {
      each.name: {"prompts": len(each.prompts), "repeats": each.repeats, "digest": each.digest}
      for each in sets
    },
  }


def claim(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Takes a folder for a comparison, or takes up the one that is in it.

  Raises:
    ValueError: it holds something else, or a comparison with another setting.
  """
  path = folder / MANIFEST
  if path.is_file():
    there = base_lib.read_json(path)
    moved = [f"models.{name}.source" for name in manifest["models"]]  # the weights are what counts
    found = list(config_lib.differences(there, manifest, free=moved))
    if not found and list(there["models"]) != list(manifest["models"]):
      found = [f"the order of models is {', '.join(there['models'])} there"]
    if found:
      raise ValueError(
        f"{folder} holds a comparison with another setting: {'; '.join(found)}; expected the same, "
        "or another --out"
      )
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder}: holds something else; expected a new folder, or a comparison's")
  folder.mkdir(parents=True, exist_ok=True)
  write_json(path, manifest)


def write_json(path: pathlib.Path, content: Any) -> None:
  """A JSON file, in one go."""
  write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
  """A file that is there as a whole or not at all, whenever the process ends."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  os.replace(temporary, path)
