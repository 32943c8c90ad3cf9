"""One shard of raw pairs -> one array_record file of VAE moments and token ids, and a sidecar.

Where the text encoders run here too, the file also holds prompt embeddings. Images that were judged
one by one are encoded likewise; what is said of pairs holds for them.

The sidecar is a JSON file that says what became of the rows. It is written last: a shard without
one is not finished, whatever lies there.
"""

import collections
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from jaxtyping import Float, Int, UInt8
from tensorflow_datasets.core import example_serializer

from dmpo_jax.data import geometry as geometry_lib
from dmpo_jax.data import images, rows

SIDECARS = "shards"  # their folder; beside the files TFDS would take them for its own
UNREADABLE = "unreadable image"
_EXAMPLES = 20  # broken rows named, of each reason
_ENOUGH_ROWS = 100  # for the share of broken rows of one shard to mean something
CAPTION_BATCH = 64  # captions embedded at once: less work than one picture of 1024 pixels
_CACHED_IMAGES = 2048  # moments kept for repeated pictures; 64x64x8 float16 is 64 KiB each
_CACHED_CAPTIONS = 1024  # kept for repeated captions; SDXL's 77x2048 float16 is 308 KiB each
_WAITING_BATCHES = 16  # pairs held back at most, in batches, while an image batch fills
_THREADS = min(32, os.cpu_count() or 1)  # that decode; Pillow lets them run side by side
_AHEAD = 2 * _THREADS  # rows decoded before they are asked for; up to 9 MB each at 1024 pixels
_SIDES = {"image_w": "w", "image_l": "l", "image": "w", "image_source": "source"}
_MOMENTS = {
  "image_w": "moments_w",
  "image_l": "moments_l",
  "image": "moments",
  "image_source": "source_moments",
}

EncodeImages = Callable[[Float[np.ndarray, "n H W 3"]], Float[np.ndarray, "n h w c2"]]
Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "n *E L"]]
Embed = Callable[[Int[np.ndarray, "n *E L"]], dict[str, np.ndarray]]


class Recipe(NamedTuple):
  """How pairs are encoded.

  Attributes:
    encode_images: [-1, 1] pictures -> VAE mean and log-variance; always called with `batch_size`
      pictures, so that it compiles once.
    tokenize: captions -> ids.
    geometry: how a picture of any size becomes a square.
    time_ids: whether SDXL's micro-conditioning is stored.
    batch_size: pictures per call.
    embed: ids of at most `CAPTION_BATCH` captions -> prompt_embeds [n, L, D] and, for SDXL,
      text_embeds [n, P]; None if they are not stored.
  """

  encode_images: EncodeImages
  tokenize: Tokenize
  geometry: geometry_lib.Geometry
  time_ids: bool
  batch_size: int
  embed: Embed | None = None

  def token_ids(self, captions: Sequence[str]) -> Int[np.ndarray, "n *E L"]:
    """Ids of the captions.

    Raises:
      ValueError: `tokenize` gave something else.
    """
    ids = np.asarray(self.tokenize(captions))
    if ids.ndim not in (2, 3) or len(ids) != len(captions) or ids.dtype != np.int32:
      raise ValueError(
        f"tokenize: expected int32 [{len(captions)}, L], got {ids.dtype} {list(ids.shape)}"
      )
    return ids

  def text_fields(self, captions: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """What a record holds of each caption: input_ids and, with `embed`, embeddings in float16.

    Raises:
      ValueError: `tokenize` or `embed` gave what cannot be stored.
    """
    ids, found = self.token_ids(captions), []
    for start in range(0, len(captions), CAPTION_BATCH):
      part = slice(start, start + CAPTION_BATCH)
      columns = {"input_ids": ids[part]}
      if self.embed is not None:
        columns |= _embed(self.embed, ids[part], captions[part])
      found += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return found


def _embed(
  embed: Embed, ids: Int[np.ndarray, "n *E L"], captions: Sequence[str]
) -> dict[str, np.ndarray]:
  fields = {name: np.asarray(value) for name, value in embed(ids).items()}
  ranks = {name: value.ndim for name, value in fields.items()}
  lengths = {len(value) for value in fields.values()}
  expected = {"prompt_embeds": 3, "text_embeds": 2}
  same = ranks.items() <= expected.items() and "prompt_embeds" in ranks
  if not same or lengths != {len(ids)} or fields["prompt_embeds"].shape[1] != ids.shape[-1]:
    shapes = {name: list(value.shape) for name, value in fields.items()}
    raise ValueError(
      f"embed: expected prompt_embeds [{len(ids)}, {ids.shape[-1]}, D] and, for SDXL, text_embeds"
      f" [{len(ids)}, P], got {shapes}"
    )
  return {
    name: _to_half(value, f"embed: {name}", "the text encoder", [f"{each!r}" for each in captions])
    for name, value in fields.items()
  }


class Tally:
  """What became of the rows: counts, and the broken ones by name."""

  def __init__(self, content: dict[str, Any] | None = None):
    content = (
      {"rows": 0, "broken": 0, "dropped": {}, "examples": {}} if content is None else content
    )
    self.rows, self.broken = content["rows"], content["broken"]
    self.dropped = collections.Counter(content["dropped"])
    self.examples = {reason: list(named) for reason, named in content["examples"].items()}

  def drop(self, row: rows.Dropped) -> None:
    """Counts a row that is no pair."""
    self.rows += 1
    self.dropped[row.reason] += 1
    if row.broken:
      self.broken += 1
      self._name(row.reason, [row.where])

  def add(self, other: "Tally") -> None:
    """Adds what became of further rows."""
    self.rows += other.rows
    self.broken += other.broken
    self.dropped += other.dropped
    for reason, named in other.examples.items():
      self._name(reason, named)

  def check(self, name: str, limit: float) -> None:
    """Raises ValueError, with examples, if the share of broken rows is above `limit`."""
    if self.broken <= limit * self.rows:
      return
    shown = "; ".join(f"{reason}: {', '.join(each[:3])}" for reason, each in self.examples.items())
    raise ValueError(
      f"{name}: {self.broken} of {self.rows} rows are broken, more than the limit of {limit:.2%}"
      f" ({shown}); repair the files or raise broken_limit; finished shards are kept"
    )

  def content(self) -> dict[str, Any]:
    """As JSON."""
    return {
      "rows": self.rows,
      "broken": self.broken,
      "dropped": dict(sorted(self.dropped.items())),
      "examples": dict(sorted(self.examples.items())),
    }

  def _name(self, reason: str, named: Sequence[str]) -> None:
    known = self.examples.setdefault(reason, [])
    known.extend(named[: _EXAMPLES - len(known)])


def encode_shard(
  shard: rows.Shard,
  path: pathlib.Path,
  recipe: Recipe,
  *,
  settings: str,
  broken_limit: float,
  progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
  """Encodes a shard into the file `path`, which appears when it is whole, and its sidecar.

  What is written is a function of the shard and the recipe alone, not of what was encoded before.

  Args:
    settings: digest of all that the content depends on, noted in the sidecar.
    broken_limit: share of broken rows that is let pass, if there are at least 100 rows.
    progress: called with the number of pairs done of this shard.

  Returns:
    The sidecar.

  Raises:
    ValueError: the shard cannot be read, too many rows are broken, or the recipe's functions give
      what cannot be stored.
    OSError: the file cannot be written; nothing is left of it.
  """
  draft = _draft_of(path)
  tally, stream = Tally(), _Stream(recipe)
  try:
    with _Writer(draft) as writer:
      for pair in stream.encode(_valid(_decoded(shard, recipe), tally)):
        writer.write(pair)
        if progress is not None:
          progress(writer.pairs)
    tally.rows += writer.pairs
    if tally.rows >= _ENOUGH_ROWS:
      tally.check(shard.name, broken_limit)
    content = {"source_shard": shard.name, "settings": settings, "images": stream.image_count}
    content |= {"bytes": draft.stat().st_size, **writer.content(), **tally.content()}
    draft.replace(path)
  finally:
    draft.unlink(missing_ok=True)
  write_json(sidecar_path(path), content)
  return content


def sidecar_path(path: pathlib.Path) -> pathlib.Path:
  """Where the sidecar of a file lies."""
  return path.parent / SIDECARS / f"{path.name}.json"


def read_sidecar(path: pathlib.Path, shard: rows.Shard, settings: str) -> dict[str, Any] | None:
  """The sidecar of a finished file; None if the file has to be written (anew)."""
  try:
    content = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
    whole = path.stat().st_size == content["bytes"]
  except (OSError, ValueError, KeyError):
    return None
  same = content.get("source_shard") == shard.name and content.get("settings") == settings
  return content if whole and same else None


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes a JSON file that appears when it is whole, on disk.

  Raises:
    OSError: it cannot be written; names the file.
  """
  draft = _draft_of(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("w", encoding="utf-8") as file:
      file.write(json.dumps(content, indent=1))
      file.flush()
      os.fsync(file.fileno())
    draft.replace(path)
  except OSError as error:  # a full disk comes without the name
    draft.unlink(missing_ok=True)
    raise OSError(error.errno, error.strerror, str(path)) from error


def remove_drafts(folder: pathlib.Path) -> None:
  """Removes what killed runs left half-written."""
  for each in (folder, folder / SIDECARS):
    for draft in each.glob(".*.tmp"):
      draft.unlink(missing_ok=True)


def features_dict(features: dict[str, Any]) -> tfds.features.FeaturesDict:
  """TFDS features of records whose arrays have these [type, shape], as a sidecar notes them."""
  tensors = {
    name: tfds.features.Tensor(
      shape=tuple(shape), dtype=np.dtype(dtype), encoding=tfds.features.Encoding.BYTES
    )
    for name, (dtype, shape) in features.items()
  }
  text = tfds.features.Text()
  of_pairs = {"p_choice": np.float32} if "moments_w" in features else {}
  return tfds.features.FeaturesDict({**tensors, **of_pairs, "couple": text, "caption": text})


def _draft_of(path: pathlib.Path) -> pathlib.Path:
  """A name for one attempt alone: a scheduler may start a second one before the first ends."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


class _Decoded(NamedTuple):
  """A pair with its pictures as squares; `keys` tell equal ones."""

  fields: dict[str, Any]
  where: str
  pixels: dict[str, UInt8[np.ndarray, "H W 3"]]
  keys: dict[str, bytes]


def _decoded(shard: rows.Shard, recipe: Recipe) -> Iterator[_Decoded | rows.Dropped]:
  """Rows in order, decoded ahead by threads."""
  ahead: collections.deque[futures.Future] = collections.deque()
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    for row in shard.read():
      ahead.append(pool.submit(_decode, row, recipe))
      if len(ahead) > _AHEAD:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()


def _decode(row: rows.Row, recipe: Recipe) -> _Decoded | rows.Dropped:
  if isinstance(row, rows.Dropped):
    return row
  placed = {}
  for image, side in _SIDES.items():
    data = getattr(row, image, None)
    if data is None:
      continue
    drawn = geometry_lib.draw(recipe.geometry, row.caption, row.couple, side)
    try:
      placed[_MOMENTS[image]] = geometry_lib.place(images.decode(data), recipe.geometry, drawn)
    except ValueError as error:
      return rows.Dropped(UNREADABLE, f"{row.where}, {image}: {error}", broken=True)
  fields = {"couple": row.couple, "caption": row.caption}
  if isinstance(row, rows.Judged):
    fields["desirable"] = np.array(row.desirable)
  else:
    fields["p_choice"] = row.p_choice
  if recipe.time_ids:
    # The winner's, for both: the UNet gets one condition per pair, and it is the winner whose
    # likelihood is to rise.
    fields["time_ids"] = next(iter(placed.values())).time_ids
  pixels = {name: each.pixels for name, each in placed.items()}
  keys = {name: hashlib.sha256(each.tobytes()).digest() for name, each in pixels.items()}
  return _Decoded(fields, row.where, pixels, keys)


def _valid(decoded: Iterator[_Decoded | rows.Dropped], tally: Tally) -> Iterator[_Decoded]:
  for row in decoded:
    if isinstance(row, rows.Dropped):
      tally.drop(row)
    else:
      yield row


class _Stream:
  """Turns a stream of decoded pairs into encoded ones, with full image batches."""

  def __init__(self, recipe: Recipe):
    self._recipe = recipe
    self._moments: dict[bytes, np.ndarray] = {}
    self._pending: dict[bytes, tuple[np.ndarray, str]] = {}  # pixels, and where they come from
    self._texts: dict[str, dict[str, np.ndarray]] = {}  # caption -> ids and embeddings
    self._captions: dict[str, None] = {}  # those that wait for theirs
    self.image_count = 0

  def encode(self, pairs: Iterator[_Decoded]) -> Iterator[dict[str, Any]]:
    """Pairs in the order given."""
    waiting: list[_Decoded] = []
    for pair in pairs:
      for name, key in pair.keys.items():
        if key not in self._moments:
          self._pending.setdefault(key, (pair.pixels[name], f"{pair.where}, {name}"))
      if pair.fields["caption"] not in self._texts:
        self._captions.setdefault(pair.fields["caption"])
      waiting.append(pair._replace(pixels={}))
      while len(self._pending) >= self._recipe.batch_size:
        self._encode_some()
      if self._is_complete() or len(waiting) >= _WAITING_BATCHES * self._recipe.batch_size:
        yield from self._finish(waiting)
        waiting = []
        if len(self._moments) > _CACHED_IMAGES:
          self._moments = {}
        if len(self._texts) > _CACHED_CAPTIONS:
          self._texts = {}
    yield from self._finish(waiting)

  def _is_complete(self) -> bool:
    """Whether the pairs that wait can be written without a batch that is mostly padding."""
    if self._recipe.embed is not None and 0 < len(self._captions) < CAPTION_BATCH:
      return False
    return not self._pending

  def _encode_some(self) -> None:
    keys = list(self._pending)[: self._recipe.batch_size]
    pixels, names = zip(*(self._pending.pop(key) for key in keys), strict=True)
    batch = images.to_float(np.stack(pixels))
    padding = [(0, self._recipe.batch_size - len(keys))] + [(0, 0)] * 3
    moments = np.asarray(self._recipe.encode_images(np.pad(batch, padding)))[: len(keys)]
    if moments.ndim != 4 or moments.shape[-1] % 2:
      raise ValueError(
        f"encode_images: expected [{self._recipe.batch_size}, h, w, 2c], got {list(moments.shape)}"
      )
    half = _to_half(moments, "encode_images: moments", "the VAE", names)
    self.image_count += len(keys)
    self._moments |= dict(zip(keys, half, strict=True))

  def _finish(self, pairs: list[_Decoded]) -> Iterator[dict[str, Any]]:
    while self._pending:
      self._encode_some()
    if self._captions:
      captions, self._captions = list(self._captions), {}
      self._texts |= zip(captions, self._recipe.text_fields(captions), strict=True)
    for pair in pairs:
      moments = {name: self._moments[key] for name, key in pair.keys.items()}
      yield {**moments, **self._texts[pair.fields["caption"]], **pair.fields}


def _to_half(
  values: Float[np.ndarray, "n *rest"], what: str, model: str, names: Sequence[str]
) -> Float[np.ndarray, "n *rest"]:
  """Float16; `names` say what the rows are of, for the message."""
  with np.errstate(over="ignore"):
    half = values.astype(np.float16)
  finite = np.isfinite(half).all(axis=tuple(range(1, half.ndim)))
  if not finite.all():
    first = int(np.argmin(finite))
    raise ValueError(
      f"{what} are not finite in float16: {model} gave values up to"
      f" {np.abs(values[first]).max()} for {names[first]}; check its weights"
    )
  return half


class _Writer:
  """An array_record file of pairs, all with the features of the first."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._features: dict[str, Any] | None = None
    self._serializer: example_serializer.ExampleSerializer | None = None
    self.pairs, self._record_bytes, self._desirable = 0, 0, 0

  def __enter__(self) -> "_Writer":
    # The group size that TFDS writes: one record is read without its neighbours.
    self._file = self._try(array_record_module.ArrayRecordWriter, str(self._path), "group_size:1")
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is not None:
      try:
        self._file.close()
      except RuntimeError:  # what broke the writing is on its way already
        pass
      return
    self._try(self._file.close)
    with self._path.open("rb") as file:
      os.fsync(file.fileno())

  def write(self, pair: dict[str, Any]) -> None:
    """Appends a pair."""
    features = {
      name: [str(value.dtype), list(value.shape)]
      for name, value in pair.items()
      if isinstance(value, np.ndarray)
    }
    if self._features is None:
      self._features, self._spec = features, features_dict(features)
      self._serializer = example_serializer.ExampleSerializer(self._spec.get_serialized_info())
    if features != self._features:
      raise ValueError(
        f"pair {pair['caption']!r} ({pair['couple']}): expected the arrays {self._features} of the"
        f" pairs before it, got {features}; all pairs of a source have a source image or none has"
      )
    example = self._serializer.get_tf_example(self._spec.encode_example(pair))
    # Not `serialize_example`: the order of its fields differs from process to process.
    data = example.SerializeToString(deterministic=True)
    self._try(self._file.write, data)
    self.pairs += 1
    self._record_bytes += len(data)
    self._desirable += bool(pair.get("desirable", False))

  def content(self) -> dict[str, Any]:
    """What the sidecar says of the file."""
    content = {"pairs": self.pairs, "record_bytes": self._record_bytes, "features": self._features}
    judged = self._features is not None and "desirable" in self._features
    return content | ({"desirable": self._desirable} if judged else {})

  def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
      return call(*arguments)
    except RuntimeError as error:  # array_record's only exception, also for a full disk
      raise OSError(
        f"{self._path}: cannot be written ({error}); finished shards are kept"
      ) from error
