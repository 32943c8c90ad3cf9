"""Pick-a-Pic v1 and v2: parquet shards in a folder or a bucket, read a few rows at a time.

The schema, 19 columns with the images as encoded bytes, and the splits are those of the data cards
of `yuvalkirstain/pickapic_v1` and `pickapic_v2` on the Hugging Face hub. The row rule is that of
the code of Diffusion-DPO (SalesforceAIResearch/DiffusionDPO @5233e759): ties (label 0.5) are left
out, jpg_0 won if label_0 is 1. That code does not look at `has_label`; here a row without a label
is left out.

Not verified: that v2 and its mirrors have the card's column types (v2's own repository has been
unavailable since 2025-04). A shard that lacks a column, or holds the images as anything but bytes,
is refused.
"""

import dataclasses
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import fs

from dmpo_jax.data import rows
from dmpo_jax.data.sources import faults, files, parquet

HOMEPAGE = "https://huggingface.co/datasets/yuvalkirstain/"
SPLITS = ("train", "validation", "test", "validation_unique", "test_unique")
_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label")
COLUMNS = (*_COLUMNS, "image_0_uid", "image_1_uid")
_ROWS = 8  # held at once; two images of about 300 kB each a row
# Else pyarrow reads ahead, in the end the whole file. Held are then the pages of a row group.
_BUFFER = 1 << 20
_LIST_SECONDS = 60  # pyarrow would try a bucket that does not answer for 15 minutes
_SPLIT_NAME = re.compile(r"(?:partial-)?(train|validation|test)([-_]unique)?(?=[-_.]|$)")


def open_pickapic(dataset: str, path: str | os.PathLike) -> rows.Source:
  """The shards under a folder or bucket prefix, by split.

  A shard's split is what its name begins with (`train-00000-of-00645.parquet`,
  `test_unique-...`), else its folder's name (`train/0000.parquet`, as the hub converts).

  Args:
    dataset: `pickapic_v1` or `pickapic_v2`.
    path: a folder, or `gs://bucket/prefix`; the options of Arrow's file systems may follow in the
      URI (`gs://anonymous@bucket/prefix`).

  Raises:
    ValueError: nothing can be read there, there are no shards, or a shard's split is not clear.
  """
  root = os.fspath(path)
  if "://" not in root:
    root = str(files.local_folder(dataset, root))
  found = _list_shards(dataset, root)
  splits: dict[str, list[PickapicShard]] = {split: [] for split in SPLITS}
  for name, _ in found:
    splits[_split_of(dataset, name)].append(PickapicShard(root, name))
  return rows.Source(
    name=dataset,
    splits={split: shards for split, shards in splits.items() if shards},
    licence=None,  # not known for certain: v2's card is gone, others quote it as MIT
    homepage=HOMEPAGE + dataset,
    fingerprint=files.fingerprint(dataset, found),
  )


def _list_shards(dataset: str, root: str) -> list[tuple[str, int]]:
  """(name under root, bytes) of all parquet files, sorted by name."""
  uri = root
  if uri.startswith("gs://") and "retry_limit_seconds" not in uri:
    uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_LIST_SECONDS}"
  try:
    system, base = fs.FileSystem.from_uri(uri)
    infos = system.get_file_info(fs.FileSelector(base, recursive=True))
  except (OSError, pa.ArrowException) as error:
    raise ValueError(
      f"{dataset}: {root} cannot be read ({error}); expected a folder or gs://bucket/prefix that"
      " exists and that this machine may read (`gcloud auth application-default login`)"
    ) from error
  found = sorted(
    (posixpath.relpath(info.path, base), info.size)
    for info in infos
    if info.type == fs.FileType.File and info.path.endswith(".parquet")
  )
  if not found:
    raise ValueError(f"{dataset}: {root} holds no *.parquet; expected data/train-00000-of-....")
  return found


def _split_of(dataset: str, name: str) -> str:
  for part in reversed(name.split("/")):
    match = _SPLIT_NAME.match(part)
    if match:
      return match[1] + ("_unique" if match[2] else "")
  raise ValueError(
    f"{dataset}: {name}: of which split? Expected a file name that begins with one of {SPLITS}"
  )


@dataclasses.dataclass(frozen=True)
class PickapicShard:
  """One parquet file: `root` is a folder or URI, `name` the file's path under it."""

  root: str
  name: str

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    """Rows in the order of the file, counted from 0.

    Raises:
      ValueError: the file is missing, damaged, lacks columns or has them of another type.
    """
    for number, row in enumerate(self._rows()):
      where = f"{self.name}, row {number}"
      yield faults.row_or_dropped(where, lambda row=row, where=where: _form_pair(row, where))

  def _rows(self) -> Iterator[dict[str, Any]]:
    try:
      system, base = fs.FileSystem.from_uri(self.root)
      with system.open_input_file(posixpath.join(base, self.name)) as stream:
        where = f"{self.root}, {self.name}"
        options = {"pre_buffer": False, "buffer_size": _BUFFER}
        shard = parquet.open_parquet(stream, stream.size(), where, **options)
        self._check_schema(shard.schema_arrow)
        for batch in shard.iter_batches(_ROWS, columns=list(COLUMNS), use_threads=False):
          yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
      raise ValueError(
        f"{self.root}, {self.name}: missing or damaged ({error}); copy the file again"
      ) from error

  def _check_schema(self, schema: pa.Schema) -> None:
    missing = [column for column in COLUMNS if column not in schema.names]
    if missing:
      raise ValueError(
        f"{self.root}, {self.name}: lacks the columns {missing}; found {schema.names}; expected a"
        " shard of Pick-a-Pic as published"
      )
    for column in ("jpg_0", "jpg_1"):
      found = schema.field(column).type
      if not (pa.types.is_binary(found) or pa.types.is_large_binary(found)):
        raise ValueError(
          f"{self.root}, {self.name}: column {column}: expected the image as bytes (binary), got"
          f" {found}"
        )


def _form_pair(row: dict[str, Any], where: str) -> rows.Pair:
  if row["has_label"] is False:
    raise faults.Fault("not labelled", broken=False)
  first_won = _first_won(row["label_0"], row["label_1"])
  caption = faults.check_caption(row["caption"])
  first, second = faults.check_image(row["jpg_0"]), faults.check_image(row["jpg_1"])
  uids = row["image_0_uid"], row["image_1_uid"]
  if not all(uids):
    raise faults.Fault("image id is missing")
  winner, loser = (first, second) if first_won else (second, first)
  couple, side = "-".join(sorted(map(str, uids))), "jpg_0" if first_won else "jpg_1"
  return rows.Pair(caption, winner, loser, 1.0, couple, where, side=side)


def _first_won(label: float | None, other: float | None) -> bool:
  if label is None or other is None:
    raise faults.Fault("label is missing")
  if not {label, other} <= {0.0, 0.5, 1.0}:
    raise faults.Fault("label is not 0, 0.5 or 1")
  if label + other != 1.0:
    raise faults.Fault("labels do not sum to 1")
  if label == 0.5:
    raise faults.Fault("tie", broken=False)
  return label == 1.0
