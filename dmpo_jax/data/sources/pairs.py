"""A user's own pairs or judged images: a folder with lists (*.jsonl, *.csv) or, of pairs, *.tar."""

import functools
import os
import pathlib
import re
from collections.abc import Callable

from dmpo_jax.data import rows
from dmpo_jax.data.sources import files, held_out, pairs_lists, pairs_tar

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.05
_LISTS = (".jsonl", ".csv")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})(?![a-z])")


def open_pairs(
  dataset: str, path: str | os.PathLike, *, validation_share: float = VALIDATION_SHARE
) -> rows.Source:
  """The lists and tars that stand in the folder itself, each one shard.

  A list has one pair a line, {"caption": ..., "winner": "a.jpg", "loser": "b.jpg"} or a CSV line
  with these columns, optionally "source" (the image that both are edits of) and "p_choice" ([0.5,
  1]); images are named by their path from the folder. Tars: see `pairs_tar.TarShard`.

  Where the files' names begin with train, validation or test, those are the splits; else all are
  train. Without a validation file, the captions with the lowest sha256 are held out of train.

  Args:
    dataset: the name of the source.
    path: the folder.
    validation_share: share of the captions to hold out, [0, 1); 0 for no validation split.

  Raises:
    ValueError: the folder is missing or has no such files, only some files are named by split, or
      the share is out of range.
  """
  lists = functools.partial(pairs_lists.ListShard, columns=pairs_lists.PAIRS)
  kinds = dict.fromkeys(_LISTS, lists) | {".tar": pairs_tar.TarShard}
  expected = "*.jsonl, *.csv (caption, winner, loser) or *.tar"
  return _open(dataset, path, validation_share, kinds, expected)


def open_judged(
  dataset: str, path: str | os.PathLike, *, validation_share: float = VALIDATION_SHARE
) -> rows.Source:
  """Lists of single images, each called desirable or not by itself, as for Diffusion-KTO.

  A line is {"caption": ..., "image": "a.jpg", "desirable": true}, or a CSV line with these columns
  (true or false, 1 or 0), optionally "source". Everything else is as in `open_pairs`.

  Raises:
    ValueError: as `open_pairs`.
  """
  lists = functools.partial(pairs_lists.ListShard, columns=pairs_lists.JUDGED)
  kinds = dict.fromkeys(_LISTS, lists)
  return _open(
    dataset, path, validation_share, kinds, "*.jsonl or *.csv (caption, image, desirable)"
  )


MakeShard = Callable[[str, str, held_out.Part | None], rows.Shard]


def _open(
  dataset: str,
  path: str | os.PathLike,
  validation_share: float,
  kinds: dict[str, MakeShard],
  expected: str,
) -> rows.Source:
  if not 0 <= validation_share < 1:
    raise ValueError(f"{dataset}: validation_share: expected [0, 1), got {validation_share}")
  folder = files.local_folder(dataset, path)
  names = _files_by_split(dataset, folder, tuple(kinds), expected)

  def shards(split: str, part: held_out.Part | None) -> list[rows.Shard]:
    suffixes = [pathlib.Path(name).suffix.lower() for name in names[split]]
    each = zip(names[split], suffixes, strict=True)
    return [kinds[suffix](name, str(folder), part) for name, suffix in each]

  splits = {split: shards(split, None) for split in names}
  if "validation" not in names and "train" in names and validation_share:
    for split in ("train", "validation"):
      part = held_out.Part(validation_share, validation=split == "validation")
      splits[split] = shards("train", part)
  return rows.Source(
    name=dataset,
    splits={split: splits[split] for split in SPLITS if split in splits},
    licence=None,
    homepage=folder.as_uri(),
    fingerprint=files.fingerprint(
      dataset, _all_sizes(folder, names), validation_share=validation_share
    ),
  )


def _files_by_split(
  dataset: str, folder: pathlib.Path, suffixes: tuple[str, ...], expected: str
) -> dict[str, list[str]]:
  found = sorted(
    each.name for each in folder.iterdir() if each.suffix.lower() in suffixes and each.is_file()
  )
  if not found:
    raise ValueError(f"{dataset}: {folder}: expected {expected}, found none")
  matches = {name: _SPLIT_NAME.match(name.lower()) for name in found}
  unnamed = [name for name, match in matches.items() if match is None]
  if len(unnamed) == len(found):
    return {"train": found}
  if unnamed:
    raise ValueError(
      f"{dataset}: {folder}: of which split is {unnamed[0]}? Expected all names or none to begin"
      f" with one of {SPLITS}, as {next(name for name in found if name not in unnamed)} does"
    )
  splits: dict[str, list[str]] = {}
  for name, match in matches.items():
    splits.setdefault(match[1], []).append(name)
  return splits


def _all_sizes(folder: pathlib.Path, names: dict[str, list[str]]) -> list[tuple[str, int]]:
  """Of the lists, the tars and, as users do change them, the images."""
  lists = [name for members in names.values() for name in members]
  found = files.sizes(folder, lists)
  for place, _, members in os.walk(folder):
    images = [name for name in members if name.lower().endswith(_IMAGES)]
    paths = [pathlib.Path(place, name) for name in images]
    found += [(path.relative_to(folder).as_posix(), path.lstat().st_size) for path in paths]
  return found
