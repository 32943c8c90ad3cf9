"""Pairs of pictures -> a data set of VAE moments and tokens, written once and read at random."""

import dataclasses
import glob
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int
from PIL import Image
from tensorflow_datasets.core import sequential_writer

from dmpo_jax.data import images

NAME, VERSION = "encoded_pairs", "1.0.0"
_CACHED_IMAGES = 2048  # moments kept for repeated pictures; 64x64x8 float16 is 64 KiB each
_WAITING_BATCHES = 16  # pairs held back at most, in batches, while an image batch fills
_SHARD_PAIRS = 65536
_WRITTEN_TOGETHER = 256  # the writer saves its JSON after every call
_FIELDS = ("caption", "image_w", "image_l", "p_choice", "couple")
_SOURCE = "image_source"  # the image that an edit starts from; optional
_COMPARED = ("fingerprint", "source", "source_id", "resolution")

EncodeImages = Callable[[Float[np.ndarray, "n H W 3"]], Float[np.ndarray, "n h w c2"]]
Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "n *E L"]]


class Pairs:
  """One split: position -> {moments_w, moments_l, input_ids, p_choice, couple, caption} and, for
  pairs of edits, source_moments."""

  def __init__(self, records: Sequence[dict[str, Any]], name: str):
    self._records, self.name = records, name

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, position: SupportsIndex) -> dict[str, Any]:
    """Moments float16, ids int32, text str.

    Raises:
      ValueError: the record is damaged on disk.
    """
    if not 0 <= position.__index__() < len(self):
      raise IndexError(f"{self.name}: pair {position} of {len(self)}")
    try:
      record = self._records[position]
    except Exception as error:  # the readers raise many kinds
      raise ValueError(
        f"{self.name}, pair {position}: damaged ({error}); delete the folder and run"
        " `dmpo prepare` again"
      ) from error
    text = {field: record[field].decode() for field in ("couple", "caption")}
    return record | text

  def __repr__(self) -> str:  # grain names sources by their repr
    return f"Pairs({self.name!r}, {len(self)})"


@dataclasses.dataclass(frozen=True)
class Encoded:
  """An encoded data set.

  Attributes:
    splits: name -> pairs, read at random.
    metadata: fingerprint, source, source_id, resolution, counts, images, empty_ids, files.
  """

  splits: dict[str, Pairs]
  metadata: dict[str, Any]

  @property
  def empty_ids(self) -> Int[np.ndarray, "*E L"]:
    """Ids of the empty caption, for caption dropout."""
    return np.array(self.metadata["empty_ids"], np.int32)


def encode_pairs(
  builder: tfds.core.DatasetBuilder,
  folder: str | pathlib.Path,
  *,
  encode_images: EncodeImages,
  tokenize: Tokenize,
  resolution: int,
  fingerprint: str,
  batch_size: int,
  progress: Callable[[int, int], None] | None = None,
) -> Encoded:
  """Encodes every pair of a prepared data set, or reuses what `folder` holds already.

  Splits and their order are those of the source. Equal pictures are encoded once. The data set is
  written beside `folder` and renamed at the end: an interrupted run leaves no `folder`. Two
  processes must not prepare the same folder.

  Args:
    builder: prepared, with features caption, image_w, image_l, p_choice, couple and, for pairs of
      edits, image_source.
    folder: where the encoded data set is to be.
    encode_images: [-1, 1] pictures -> VAE mean and log-variance; always called with `batch_size`
      pictures, so that it compiles once.
    tokenize: captions -> ids.
    resolution: side of the square pictures in pixels.
    fingerprint: of the VAE and tokenizer behind the two callables.
    batch_size: pictures per call, at least 1.
    progress: called as progress(pairs done, pairs in all).

  Returns:
    The data set, as `open_encoded(folder)` gives it.

  Raises:
    ValueError: the folder holds a data set made otherwise, or something else; a picture is broken
      or its moments are not finite; the source is not prepared or has no pairs; a setting is out
      of range.
  """
  folder = pathlib.Path(folder)
  if batch_size < 1 or resolution < 1:
    raise ValueError(
      "encode_pairs: expected batch_size and resolution of at least 1, got batch_size"
      f" {batch_size}, resolution {resolution}"
    )
  sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
  if not sum(sizes.values()):
    raise ValueError(f"{builder.info.full_name}: holds no pairs; run its download_and_prepare()")
  missing = [field for field in _FIELDS if field not in builder.info.features]
  if missing:
    raise ValueError(
      f"{builder.info.full_name}: lacks the features {missing}; expected {list(_FIELDS)}"
    )
  wanted = {
    "fingerprint": fingerprint,
    "source": builder.info.full_name,
    "source_id": _source_id(builder),
    "resolution": resolution,
  }
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    return _reuse(folder, wanted)
  folder.parent.mkdir(parents=True, exist_ok=True)
  for left_over in folder.parent.glob(f".{glob.escape(folder.name)}.*.draft"):
    shutil.rmtree(left_over)  # of a killed run
  draft = pathlib.Path(
    tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".draft", dir=folder.parent)
  )
  try:
    encoder = _Encoder(encode_images, tokenize, resolution, batch_size)
    metadata = wanted | {"counts": sizes, "empty_ids": encoder.token_ids([""])[0].tolist()}
    _write(builder, draft, encoder, metadata, progress)
    draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
    if folder.exists():
      folder.rmdir()
    draft.rename(folder)
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return open_encoded(folder, fingerprint=fingerprint)


def open_encoded(folder: str | pathlib.Path, *, fingerprint: str) -> Encoded:
  """Opens what `encode_pairs` wrote.

  Raises:
    ValueError: the folder is missing, incomplete or damaged, or made with another VAE or
      tokenizer than `fingerprint` says.
  """
  folder = pathlib.Path(folder)
  metadata = _read_metadata(folder)
  if metadata["fingerprint"] != fingerprint:
    raise ValueError(
      f"{folder}: made with another VAE or tokenizer (fingerprint {metadata['fingerprint']},"
      f" expected {fingerprint}); run `dmpo prepare` into another folder"
    )
  for name, expected in metadata["files"].items():
    size = (folder / name).stat().st_size if (folder / name).exists() else None
    if size != expected:
      found = "missing" if size is None else f"{size} bytes"
      raise ValueError(
        f"{folder / name}: truncated or damaged: expected {expected} bytes, got {found};"
        " delete the folder and run `dmpo prepare` again"
      )
  try:
    builder = tfds.builder_from_directory(folder)
    records = {
      split: builder.as_data_source(split) if count else []
      for split, count in metadata["counts"].items()
    }
    for split, source in records.items():
      if len(source) != metadata["counts"][split]:
        raise ValueError(f"split {split}: {len(source)} of {metadata['counts'][split]} pairs")
  except Exception as error:  # the readers raise many kinds
    raise ValueError(
      f"{folder}: damaged ({error}); delete the folder and run `dmpo prepare` again"
    ) from error
  splits = {split: Pairs(source, f"{folder}, split {split}") for split, source in records.items()}
  for source in splits.values():
    if len(source):
      source[0], source[len(source) - 1]
  return Encoded(splits, metadata)


class _Encoder:
  """Turns a stream of raw pairs into encoded ones, with full image batches."""

  def __init__(
    self, encode_images: EncodeImages, tokenize: Tokenize, resolution: int, batch_size: int
  ):
    self._encode_images, self._tokenize = encode_images, tokenize
    self._resolution, self._batch_size = resolution, batch_size
    self._moments: dict[bytes, np.ndarray] = {}
    self.image_count = 0

  def token_ids(self, captions: Sequence[str]) -> Int[np.ndarray, "n *E L"]:
    ids = np.asarray(self._tokenize(captions))
    if ids.ndim not in (2, 3) or len(ids) != len(captions) or ids.dtype != np.int32:
      raise ValueError(
        f"tokenize: expected int32 [{len(captions)}, L], got {ids.dtype} {list(ids.shape)}"
      )
    return ids

  def encode(self, records: Iterator[tuple[str, dict]]) -> Iterator[dict[str, Any]]:
    """Pairs in the order given; `records` are (a name for messages, raw record)."""
    waiting: list[dict] = []
    pending: dict[bytes, np.ndarray] = {}
    for name, record in records:
      for field in _images_of(record):
        key = hashlib.sha256(record[field]).digest()
        if key not in self._moments and key not in pending:
          pending[key] = _decode(record[field], self._resolution, f"{name}, {field}")
        record[field] = key
      waiting.append(record)
      while len(pending) >= self._batch_size:
        self._encode_some(pending)
      if not pending or len(waiting) >= _WAITING_BATCHES * self._batch_size:
        self._encode_some(pending)
        yield from self._finish(waiting)
        waiting = []
        if len(self._moments) > _CACHED_IMAGES:
          self._moments = {}
    while pending:
      self._encode_some(pending)
    yield from self._finish(waiting)

  def _encode_some(self, pending: dict[bytes, np.ndarray]) -> None:
    keys = list(pending)[: self._batch_size]
    if not keys:
      return
    batch = np.stack([pending.pop(key) for key in keys])
    padding = [(0, self._batch_size - len(keys))] + [(0, 0)] * 3
    moments = np.asarray(self._encode_images(np.pad(batch, padding)))[: len(keys)]
    if moments.ndim != 4 or moments.shape[-1] % 2:
      raise ValueError(
        f"encode_images: expected [{self._batch_size}, h, w, 2c], got {list(moments.shape)}"
      )
    with np.errstate(over="ignore"):
      half = moments.astype(np.float16)
    if not np.isfinite(half).all():
      raise ValueError(
        "encode_images: moments are not finite in float16: the VAE gave values up to"
        f" {np.abs(moments).max()}; check its weights"
      )
    self.image_count += len(keys)
    self._moments |= dict(zip(keys, half, strict=True))

  def _finish(self, records: list[dict]) -> Iterator[dict[str, Any]]:
    if not records:
      return
    captions = [record["caption"].decode() for record in records]
    distinct = list(dict.fromkeys(captions))
    ids = dict(zip(distinct, self.token_ids(distinct), strict=True))
    for record, caption in zip(records, captions, strict=True):
      yield {
        **{moments: self._moments[record[image]] for image, moments in _images_of(record).items()},
        "input_ids": ids[caption],
        "p_choice": record["p_choice"],
        "couple": record["couple"].decode(),
        "caption": caption,
      }


def _images_of(fields: Container[str]) -> dict[str, str]:
  """The images of a record and what their moments are called."""
  names = {"image_w": "moments_w", "image_l": "moments_l", _SOURCE: "source_moments"}
  return {image: moments for image, moments in names.items() if image in fields}


def _write(
  builder: tfds.core.DatasetBuilder,
  draft: pathlib.Path,
  encoder: _Encoder,
  metadata: dict[str, Any],
  progress: Callable[[int, int], None] | None,
) -> None:
  writer, done, total = None, 0, sum(metadata["counts"].values())
  for split in metadata["counts"]:
    buffered: list[dict[str, Any]] = []
    for pair in encoder.encode(_raw_pairs(builder, split)):
      if writer is None:
        writer = sequential_writer.SequentialWriter(
          _dataset_info(draft, pair, metadata),
          _SHARD_PAIRS,
          file_format="array_record",
        )
        writer.initialize_splits(list(metadata["counts"]))
      buffered.append(pair)
      if len(buffered) == _WRITTEN_TOGETHER:
        writer.add_examples({split: buffered})
        buffered = []
      done += 1
      if progress is not None:
        progress(done, total)
    if buffered:
      writer.add_examples({split: buffered})
  writer.close_all()
  metadata["images"] = encoder.image_count
  metadata["files"] = {
    path.name: path.stat().st_size for path in sorted(draft.glob("*array_record*"))
  }
  (draft / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")


def _dataset_info(
  draft: pathlib.Path, pair: dict[str, Any], metadata: dict[str, Any]
) -> tfds.core.DatasetInfo:
  def tensor(array: np.ndarray) -> tfds.features.Tensor:
    return tfds.features.Tensor(
      shape=array.shape, dtype=array.dtype, encoding=tfds.features.Encoding.BYTES
    )

  return tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=NAME, version=tfds.core.Version(VERSION), data_dir=str(draft), module_name=__name__
    ),
    description=f"{metadata['source']} as VAE moments (mean, log-variance) and token ids.",
    features=tfds.features.FeaturesDict(
      {
        **{name: tensor(value) for name, value in pair.items() if isinstance(value, np.ndarray)},
        "p_choice": np.float32,
        "couple": tfds.features.Text(),
        "caption": tfds.features.Text(),
      }
    ),
    disable_shuffling=True,
  )


def _raw_pairs(builder: tfds.core.DatasetBuilder, split: str) -> Iterator[tuple[str, dict]]:
  decoders = dict.fromkeys(_images_of(builder.info.features), tfds.decode.SkipDecoding())
  source = builder.as_data_source(split, decoders=decoders)
  for position in range(len(source)):
    record = source[position]
    caption = record["caption"].decode(errors="replace")
    yield f"{builder.info.full_name}, split {split}, pair {position} ({caption!r})", record


def _decode(data: bytes, resolution: int, name: str) -> Float[np.ndarray, "H W 3"]:
  try:
    with Image.open(io.BytesIO(data)) as image:
      return images.to_array(image, resolution)
  except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
    raise ValueError(f"{name}: not a readable picture: {error}") from error


def _source_id(builder: tfds.core.DatasetBuilder) -> str:
  """Changes when the source was built anew with other pairs under the same name."""
  sizes = {
    split: (info.num_examples, info.num_bytes) for split, info in builder.info.splits.items()
  }
  return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


def _reuse(folder: pathlib.Path, wanted: dict[str, Any]) -> Encoded:
  metadata = _read_metadata(folder)
  differing = [
    f"{field} (there {metadata[field]}, wanted {wanted[field]})"
    for field in _COMPARED
    if metadata[field] != wanted[field]
  ]
  if differing:
    raise ValueError(
      f"{folder}: holds an encoded data set made with another {', '.join(differing)};"
      " give another folder, nothing was overwritten"
    )
  return open_encoded(folder, fingerprint=wanted["fingerprint"])


def _read_metadata(folder: pathlib.Path) -> dict[str, Any]:
  if not folder.is_dir():
    raise ValueError(f"{folder}: no encoded data set there; run `dmpo prepare`")
  path = folder / "metadata.json"
  try:
    metadata = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{folder}: not an encoded data set ({path.name}: {error}); give another folder or run"
      " `dmpo prepare` into an empty one"
    ) from error
  needed = (*_COMPARED, "counts", "empty_ids", "files")
  if not isinstance(metadata, dict) or any(field not in metadata for field in needed):
    raise ValueError(f"{path}: not of an encoded data set: expected the fields {list(needed)}")
  return metadata


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
