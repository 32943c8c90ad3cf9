"""The reference's errors, computed once: a step then costs 6 forward passes a pair in place of 8.

Each pair gets `data.reference_draws` settled draws of timestep, noise and caption dropout, see
`data.drawn`. `dmpo cache` writes the reference's errors for all of them beside the encoded pairs;
training reads them and holds no reference. The price is that a pair meets no other noise.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import checkpoint, logs, objectives, safetensors_io, sharding, tasks
from dmpo_jax import config as config_lib
from dmpo_jax.data import drawn, encode, encode_shard, pipeline

FOLDER = "reference_errors"
SETTINGS = "settings.json"
ROWS = 16_384  # draws of a file: what is done again at most after a kill


def settings_of(
  config: config_lib.Config, base: base_lib.Base, encoded: encode.Encoded
) -> dict[str, Any]:
  """All that the errors depend on."""
  reference = tasks.reference_params(base.params["unet"], config.precision.reference)
  trees = {"unet": reference}
  if not config.data.prompt_embeds:
    trees |= base.text_params
  prints = json.dumps({name: checkpoint.fingerprint(tree) for name, tree in trees.items()})
  # Methods that share a draw share the errors too.
  images = {"noise": "one an image"} if config.objective.method == "kto" else {}
  return images | {
    "reference": hashlib.blake2b(prints.encode(), digest_size=16).hexdigest(),
    "data": encoded.metadata["fingerprint"],
    "pairs": encoded.metadata["counts"],
    "seed": config.seed,
    "data.reference_draws": config.data.reference_draws,
    "data.caption_dropout": config.data.caption_dropout,
    "data.timestep_power": config.data.timestep_power,
    "precision.compute": config.precision.compute,
    "prediction_type": base.schedule.prediction_type,
  }


def split_draws(config: config_lib.Config, encoded: encode.Encoded) -> dict[str, drawn.Drawn]:
  """The settled draws of each split, without errors; of the validation split one a pair."""
  splits = {}
  for name in ("train", "validation"):
    source = encoded.splits.get(name)
    if not source:
      continue
    train = name == "train"
    splits[name] = drawn.Drawn(
      pipeline.First(source, tasks.MAX_VALIDATION_PAIRS) if not train else source,
      config.data.reference_draws if train else 1,
      config.seed,
      config.data.caption_dropout if train else 0.0,
      encoded.empty_caption,
    )
  return splits


def build(
  config: config_lib.Config,
  base: base_lib.Base,
  encoded: encode.Encoded,
  folder: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
) -> pathlib.Path:
  """Computes the errors that `folder` lacks; killed and run again it goes on.

  Args:
    folder: that of the encoded pairs.
    devices: all of them if None. With as many as train, the errors are theirs to the bit; with
      others their sums may round differently.

  Raises:
    ValueError: no draws are asked for, other errors lie there, several processes.
  """
  if config.data.reference_draws < 1:
    raise ValueError("data.reference_draws: expected at least 1 for the cache, got 0")
  if jax.process_count() > 1:
    raise ValueError(f"cache: expected one process, got {jax.process_count()}")
  out = folder / FOLDER
  settings = settings_of(config, base, encoded)
  splits = split_draws(config, encoded)
  if (out / SETTINGS).is_file():
    _check(out, settings)
  encode_shard.write_json(out / SETTINGS, settings)
  errors_of = _error_function(config, base, devices)
  total = sum(len(split) for split in splits.values())
  with logs.progress(total, 0, "errors of the reference") as bar:
    for name, split in splits.items():
      for first in range(0, len(split), ROWS):
        path, count = _file(out, name, first), min(ROWS, len(split) - first)
        if not path.is_file():
          rows = np.concatenate(list(errors_of(split, first, count)))
          safetensors_io.save_safetensors(path, {"errors": rows})
        bar.update(count)
  return out


def load(
  config: config_lib.Config, base: base_lib.Base, encoded: encode.Encoded, folder: pathlib.Path
) -> dict[str, drawn.Drawn]:
  """The draws of each split with the reference's errors.

  Raises:
    ValueError: there are none, they are not whole, or of another reference, data or configuration.
  """
  out = folder / FOLDER
  if not (out / SETTINGS).is_file():
    raise ValueError(
      f"data.reference_draws: {out} does not exist; run dmpo cache with the same configuration and "
      "--data first, or set it to 0"
    )
  _check(out, settings_of(config, base, encoded))
  splits = {}
  for name, split in split_draws(config, encoded).items():
    parts = []
    for first in range(0, len(split), ROWS):
      path = _file(out, name, first)
      if not path.is_file():
        raise ValueError(f"{path} is missing: the cache is not whole; run dmpo cache again")
      parts.append(safetensors_io.load_safetensors(path)["errors"])
    splits[name] = dataclasses.replace(split, errors=np.concatenate(parts))
  return splits


def _check(out: pathlib.Path, settings: dict[str, Any]) -> None:
  theirs = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
  ours = json.loads(json.dumps(settings))
  different = list(config_lib.differences(theirs, ours))
  if different:
    raise ValueError(
      f"{out} holds errors of another reference, data or configuration: {'; '.join(different)}. "
      "Delete that folder to make them anew"
    )


def _file(out: pathlib.Path, split: str, first: int) -> pathlib.Path:
  return out / f"{split}-{first // ROWS:06d}.safetensors"


def _error_function(
  config: config_lib.Config, base: base_lib.Base, devices: Sequence[jax.Device] | None
):
  """(draws, first, count) -> errors [n, k], batch by batch, computed on `devices`.

  Batches are those of a training step's parts, so that rounding is the same.
  """
  mesh = sharding.make_mesh(fsdp=config.fsdp, devices=devices)
  size = config.batch_size // config.accumulation
  reference = tasks.reference_params(base.params["unet"], config.precision.reference)
  frozen = objectives.Frozen(
    reference, None if config.data.prompt_embeds else base.text_params, None
  )
  places = sharding.fsdp_shardings(frozen, mesh)
  there = sharding.put_tree(frozen, places)
  objective = tasks.make_objective(config, base)
  denoiser = base.denoiser()
  rows = sharding.batch_sharding(mesh)

  def compute(frozen, batch):
    examples = objective.draw(batch, jax.random.key(0))  # settled draws ask for no key
    return sharding.map_rows(errors_of, None, frozen, examples)

  def errors_of(_, frozen, examples):
    conditions = objectives.conditions_of(denoiser, frozen, examples)
    return objectives.pair_errors(denoiser, frozen.reference, examples, conditions)

  step = jax.jit(compute, in_shardings=(places, rows), out_shardings=sharding.replicated(mesh))

  def errors(split: drawn.Drawn, first: int, count: int):
    for start in range(first, first + count, size):
      positions = np.arange(start, start + size) % len(split)  # the last batch begins anew
      batch = pipeline.stack([split[int(position)] for position in positions])
      with jax.set_mesh(mesh):
        got = step(there, sharding.put_batch(batch, mesh))
      yield np.asarray(got)[: first + count - start]

  return errors
