"""A prepared TFDS data set of pairs as a source of rows."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from dmpo_jax.data import rows

_FIELDS = ("caption", "image_w", "image_l", "p_choice", "couple")
_SOURCE = "image_source"  # the image that an edit starts from; optional


def source_of_builder(builder: tfds.core.DatasetBuilder) -> rows.Source:
  """A shard for every file of the data set; splits and order are those of the builder.

  Args:
    builder: prepared as array_record, with features caption, image_w, image_l, p_choice, couple
      and, for pairs of edits, image_source.

  Raises:
    ValueError: not prepared, no pairs, or a feature is missing.
  """
  info = builder.info
  if not sum(split.num_examples for split in info.splits.values()):
    raise ValueError(f"{info.full_name}: holds no pairs; run its download_and_prepare()")
  missing = [field for field in _FIELDS if field not in info.features]
  if missing:
    raise ValueError(f"{info.full_name}: lacks the features {missing}; expected {list(_FIELDS)}")
  splits = {
    split: _shards(str(builder.data_dir), info.full_name, split, each.shard_lengths)
    for split, each in info.splits.items()
  }
  return rows.Source(info.full_name, splits, None, info.homepage, _fingerprint(builder))


@dataclasses.dataclass(frozen=True)
class BuilderShard:
  """Pairs `start` to `stop` of a split, read where the data set lies."""

  data_dir: str
  dataset: str
  split: str
  start: int
  stop: int

  @property
  def name(self) -> str:
    return f"{self.dataset}, split {self.split}, pairs {self.start} to {self.stop - 1}"

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    """The pairs; nothing is dropped.

    Raises:
      ValueError: the data set is gone or damaged.
    """
    try:
      source, edits = _open(self.data_dir, self.split)
      for position in range(self.start, self.stop):
        record = source[position]
        yield _pair(record, f"{self.dataset}, split {self.split}, pair {position}", edits)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
      raise ValueError(
        f"{self.name} in {self.data_dir}: damaged ({error}); delete that folder and build it again"
      ) from error


def _shards(
  data_dir: str, dataset: str, split: str, lengths: Sequence[int]
) -> tuple[BuilderShard, ...]:
  ends = itertools.accumulate(lengths)
  return tuple(
    BuilderShard(data_dir, dataset, split, end - length, end)
    for length, end in zip(lengths, ends, strict=True)
  )


@functools.lru_cache(maxsize=8)
def _open(data_dir: str, split: str) -> tuple[Any, bool]:
  """The records with images as stored, and whether they are edits."""
  builder = tfds.builder_from_directory(data_dir)
  edits = _SOURCE in builder.info.features
  skipped = ["image_w", "image_l", *([_SOURCE] if edits else [])]
  decoders = dict.fromkeys(skipped, tfds.decode.SkipDecoding())
  return builder.as_data_source(split, decoders=decoders), edits


def _pair(record: dict[str, Any], where: str, edits: bool) -> rows.Pair:
  return rows.Pair(
    caption=record["caption"].decode(),
    image_w=record["image_w"],
    image_l=record["image_l"],
    p_choice=float(record["p_choice"]),
    couple=record["couple"].decode(),
    where=where,
    image_source=record[_SOURCE] if edits else None,
  )


def _fingerprint(builder: tfds.core.DatasetBuilder) -> str:
  """Changes when the data set was built anew with other pairs under the same name."""
  sizes = {
    split: (info.num_examples, info.num_bytes) for split, info in builder.info.splits.items()
  }
  return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]
