"""Scores of a comparison's images, one a line: a run goes on from them, a table can be redone.

    scores/NAME.jsonl       a line that says what of, then one for each image, or for each prompt

Images are scored in batches that do not depend on interruptions: lines of an unfinished batch are
dropped and computed again.
"""

import hashlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dmpo_jax import base as base_lib
from dmpo_jax import compare_images, comparison, evaluate, json_files, logs, sharding, stages
from dmpo_jax.data import images as images_lib
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import measure
from dmpo_jax.scorers import batches, diversity

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}")
SCORED_AT_ONCE = 32
PROMPTS_AT_ONCE = 16  # of emoji, which are compared with all real drawings
EMOJI_COLUMNS = {"use rank": True, "uses": True, "prompt match": True, "RMSE": False}
DIVERSITY = "diversity"


class Source(NamedTuple):
  """A scorer as it was asked for: what it is called, and where its weights lie."""

  name: str
  path: pathlib.Path


class _Unit(NamedTuple):
  """What gets one line; `number` is None where a prompt's images are scored together."""

  model: int
  prompt: int
  number: int | None


def read_scorers(texts: Sequence[str]) -> list[Source]:
  """`NAME=PATH` each.

  Raises:
    ValueError: it is of another form, a name is taken, or nothing is there.

  >>> read_scorers(["hpsv2.1=."])
  [Source(name='hpsv2.1', path=PosixPath('.'))]
  """
  sources = []
  for text in texts:
    name, equals, path = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
      raise ValueError(f"--scorer {text}: expected NAME=PATH")
    if name in (DIVERSITY, "emoji", *(source.name for source in sources)):
      raise ValueError(f"--scorer {text}: the name {name} is taken; expected another")
    if not pathlib.Path(path).exists():
      raise ValueError(f"--scorer {text}: {path} does not exist; expected its weights there")
    sources.append(Source(name, pathlib.Path(path)))
  return sources


def score_by(
  store: compare_images.Store, source: Source, load: Callable[[str, pathlib.Path], batches.Scorer]
) -> comparison.Measure:
  """Scores every image; the scorer is loaded only if something is left to score.

  Raises:
    ValueError: earlier scores of this name are of other weights, or a score is not finite.
  """
  prompts = tuple(range(len(store.prompts)))
  units = _image_units(store, prompts)
  score = None

  def compute(part: Sequence[_Unit]):
    nonlocal score
    score = score or load(source.name, source.path)
    pictures = np.stack([store.read(*unit) for unit in part])
    values = np.asarray(score(pictures, [store.prompts[unit.prompt] for unit in part]))
    if values.shape != (len(part),):
      raise ValueError(f"scorer {source.name}: expected {len(part)} scores, got {values.shape}")
    return [{source.name: float(value)} for value in values]

  header = {"measure": source.name, "weights": digest_files(source.path)}
  rows = _collect(store, source.name, header, units, compute, SCORED_AT_ONCE)
  return _measure(store, rows, source.name, True, prompts)


def score_emoji(
  store: compare_images.Store,
  prompts: Sequence[int],
  emoji: Sequence[emoji_lib.Emoji],
  resolution: int,
) -> list[comparison.Measure]:
  """The measures of `emoji_choice.measure` on the prompts of its set, of the images' 8 bits."""
  units = _image_units(store, prompts)
  real = evaluate.real_images(emoji, resolution)

  def compute(part: Sequence[_Unit]):
    pictures = np.stack([store.read(*unit) for unit in part])
    shape = (-1, store.per_prompt, *pictures.shape[1:])
    words = [store.prompts[unit.prompt] for unit in part[:: store.per_prompt]]
    found = measure.score(images_lib.to_float(pictures).reshape(shape), words, emoji, real)
    columns = (found.use_rank, found.uses, found.match, found.rmse)
    named = zip(EMOJI_COLUMNS, (column.ravel() for column in columns), strict=True)
    table = {name: column.astype(float).tolist() for name, column in named}
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]

  header = {"measure": "emoji", "emoji": len(emoji)}
  size = PROMPTS_AT_ONCE * store.per_prompt
  rows = _collect(store, "emoji", header, units, compute, size)
  return [_measure(store, rows, name, higher, prompts) for name, higher in EMOJI_COLUMNS.items()]


def score_diversity(store: compare_images.Store, base: base_lib.Base) -> comparison.Measure | None:
  """`mean_distance` of each prompt's images, as the base's VAE encodes them (mean, scaled).

  Returns:
    None if a prompt has one image alone.
  """
  if store.per_prompt < 2:
    return None
  prompts = tuple(range(len(store.prompts)))
  models = range(len(store.models))
  units = [_Unit(model, prompt, None) for model, prompt in itertools.product(models, prompts)]
  size, encode = stages.encode_batch(base.resolution, sharding.make_mesh().size), None

  def compute(part: Sequence[_Unit]):
    nonlocal encode
    encode = encode or stages.encoder(base)
    pictures = np.concatenate([store.read_prompt(unit.model, unit.prompt) for unit in part])
    latents = _encode_all(encode, images_lib.to_float(pictures), size)
    latents = latents * base.vae.config.scaling_factor
    by_prompt = latents.reshape(len(part), store.per_prompt, -1)
    return [{DIVERSITY: mean_distance(each)} for each in by_prompt]

  header = {"measure": DIVERSITY, "vae": base.data_fingerprint()}
  at_once = max(1, size // store.per_prompt)
  rows = _collect(store, DIVERSITY, header, units, compute, at_once)
  return _measure(store, rows, DIVERSITY, None, prompts)


def _encode_all(encode, pictures: np.ndarray, size: int) -> np.ndarray:
  """Means of the latents; every call of `encode` gets `size` pictures."""
  means = []
  for start in range(0, len(pictures), size):
    part = pictures[start : start + size]
    moments = encode(np.resize(part, (size, *part.shape[1:])))  # repeats to fill
    means.append(moments[: len(part), ..., : moments.shape[-1] // 2])  # then the log-variances
  return np.concatenate(means)


def mean_distance(latents: Float[np.ndarray, "s d"]) -> float:
  """Mean over pairs i < j of sqrt(mean_k (z_ik - z_jk)^2): 0 if all are one image.

  Of two independent draws of N(0, sigma^2) it is sqrt(2) sigma, whatever the resolution. [derived]

  >>> mean_distance(np.array([[0.0], [3.0], [0.0]]))
  2.0
  """
  return diversity.mean_pairwise_distance(latents) / math.sqrt(latents.shape[1])


def digest_files(path: pathlib.Path) -> str:
  """Of the bytes of a file, or of all files below a folder with their names."""
  digest = hashlib.blake2b(digest_size=16)
  files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
  for file in files:
    digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
    with file.open("rb") as stream:
      while data := stream.read(1 << 24):
        digest.update(data)
  return digest.hexdigest()


def _image_units(store: compare_images.Store, prompts: Sequence[int]) -> list[_Unit]:
  numbers = range(store.per_prompt)
  return [_Unit(*each) for each in itertools.product(range(len(store.models)), prompts, numbers)]


def _collect(
  store: compare_images.Store,
  name: str,
  header: Mapping[str, Any],
  units: Sequence[_Unit],
  compute: Callable[[Sequence[_Unit]], list[dict[str, float]]],
  size: int,
) -> list[dict[str, Any]]:
  """The lines of all units, of which those that are missing are computed, `size` at a time."""
  path = store.folder / "scores" / f"{name}.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  keys = [_key(store, unit) for unit in units]
  rows = _read(path, header, keys)
  if len(rows) < len(keys):
    rows = rows[: len(rows) // size * size]
    lines = [json.dumps(each) + "\n" for each in (header, *rows)]
    compare_images.write_bytes(path, "".join(lines).encode())
  if len(rows) == len(keys):
    return rows
  bar = logs.progress(len(keys), len(rows), f"scoring, {name}")
  with path.open("a", encoding="utf-8") as stream, bar:
    for start in range(len(rows), len(keys), size):
      part = units[start : start + size]
      for unit, key, scores in zip(part, keys[start : start + size], compute(part), strict=True):
        _check_finite(store, unit, scores)
        rows.append({**key, **scores})
      stream.write("".join(json.dumps(row) + "\n" for row in rows[start:]))
      stream.flush()
      bar.update(len(part))
  return rows


def _key(store: compare_images.Store, unit: _Unit) -> dict[str, Any]:
  key: dict[str, Any] = {"model": store.models[unit.model].name, "prompt": unit.prompt}
  return key if unit.number is None else key | {"number": unit.number}


def _read(path: pathlib.Path, header: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]):
  """The lines that an earlier call left, up to the first that was not written in full."""
  if not path.is_file():
    return []
  found = list(_objects(path))
  if found and found[0] != header:
    raise ValueError(
      f"{path}: scores of {found[0]}, expected {dict(header)}; give the scorer another name, or "
      "delete the file"
    )
  rows = []
  for row, key in zip(found[1:], keys, strict=False):
    if {name: row.get(name) for name in key} != key:
      raise ValueError(f"{path}: a line of {row}, expected {key}; delete the file and run again")
    rows.append(row)
  return rows


def _objects(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  for line in path.read_bytes().splitlines(keepends=True):
    if not line.endswith(b"\n"):
      return
    try:
      yield json_files.parse_object(line.decode())
    except ValueError as error:
      raise ValueError(f"{path}: damaged ({error}); delete it and run again") from error


def _check_finite(store: compare_images.Store, unit: _Unit, scores: Mapping[str, float]) -> None:
  for name, value in scores.items():
    if not math.isfinite(value):
      raise ValueError(
        f"{name}: got {value} for image {unit.number} of prompt {store.prompts[unit.prompt]!r} by "
        f"{store.models[unit.model].name}; expected a finite score"
      )


def _measure(
  store: compare_images.Store,
  rows: Sequence[Mapping[str, Any]],
  name: str,
  higher: bool | None,
  prompts: Sequence[int],
) -> comparison.Measure:
  values = np.array([row[name] for row in rows], np.float64)
  values = values.reshape(len(store.models), len(prompts), -1)
  scores = {model.name: each for model, each in zip(store.models, values, strict=True)}
  return comparison.Measure(name, higher, scores, tuple(prompts))
