"""Pairs of pictures, or judged ones -> a data set of VAE moments and tokens, read at random.

With a function that embeds captions, records hold prompt embeddings too, and a file beside them
holds those of the empty caption.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int
from tensorflow_datasets.core import file_adapters, naming

from dmpo_jax import safetensors_io
from dmpo_jax.data import encode_shard, pipeline, rows
from dmpo_jax.data import geometry as geometry_lib

NAME, VERSION = "encoded_pairs", "1.0.0"
_METADATA = "metadata.json"  # written last: a folder without it is not finished
_STARTED = "started.json"  # the settings of the shards that lie there
_EMPTY_CAPTION = "empty_caption.safetensors"
# Settings that are written only where they are not these, as there are folders from before them.
_UNNAMED = {"prompt_embeds": False}
_COMPARED = (
  *("fingerprint", "source", "source_id", "resolution", "geometry", "time_ids", "shards"),
  *_UNNAMED,
)
_NEEDED = ("fingerprint", "source", "source_id", "resolution", "counts", "empty_ids", "files")


class Pairs:
  """One split: position -> {moments_w, moments_l, input_ids, p_choice, couple, caption} and, for
  pairs of edits, source_moments; for SDXL, time_ids; where the text encoders ran too,
  prompt_embeds and, for SDXL, text_embeds. Of images judged one by one, moments and desirable in
  the place of moments_w, moments_l and p_choice."""

  def __init__(self, records: Sequence[dict[str, Any]], name: str):
    self._records, self.name = records, name

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, position: SupportsIndex) -> dict[str, Any]:
    """Moments and embeddings float16, ids int32, text str.

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
    splits: name -> pairs, read at random, of one data set or of a mixture.
    metadata: fingerprint, source, source_id, resolution, geometry, time_ids, prompt_embeds (whether
      records hold them), counts (pairs by split), rows, dropped (rows by reason), broken, examples
      (broken rows by reason), images, empty_ids, files, licence, homepage; of judged images,
      desirable (how many are, by split).
    empty_embeds: prompt_embeds [L, D] and, for SDXL, text_embeds [P] of the empty caption, float16;
      empty if records hold none.
  """

  splits: dict[str, pipeline.PairSource | pipeline.Mixture]
  metadata: dict[str, Any]
  empty_embeds: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def empty_ids(self) -> Int[np.ndarray, "*E L"]:
    """Ids of the empty caption, for caption dropout."""
    return np.array(self.metadata["empty_ids"], np.int32)

  @property
  def empty_caption(self) -> dict[str, np.ndarray]:
    """What a record holds of its caption, for the empty one: input_ids and `empty_embeds`."""
    return {"input_ids": self.empty_ids, **self.empty_embeds}


def encode_source(
  source: rows.Source,
  folder: str | pathlib.Path,
  *,
  encode_images: encode_shard.EncodeImages,
  tokenize: encode_shard.Tokenize,
  geometry: geometry_lib.Geometry,
  fingerprint: str,
  batch_size: int,
  time_ids: bool = False,
  embed: encode_shard.Embed | None = None,
  broken_limit: float = 0.01,
  progress: Callable[[int, int, int], None] | None = None,
) -> Encoded:
  """Encodes every pair of a source, goes on where an earlier call ended, or reuses a finished set.

  Every shard of the source becomes a file of its own, in the same order; equal pictures of a shard
  are encoded once. A file appears when it is whole, `metadata.json` when all files are there. Two
  processes must not prepare the same folder.

  Args:
    source: where the pairs come from.
    folder: where the encoded data set is to be.
    encode_images: [-1, 1] pictures -> VAE mean and log-variance; always called with `batch_size`
      pictures, so that it compiles once.
    tokenize: captions -> ids.
    geometry: how a picture of any size becomes a square.
    fingerprint: of the VAE, tokenizer and text encoder behind the callables.
    batch_size: pictures per call, at least 1.
    time_ids: whether to store SDXL's micro-conditioning: original size and crop of the winner, the
      image whose likelihood is to rise; the UNet takes one condition for both images of a pair.
    embed: ids -> prompt embeddings, see `encode_shard.Recipe`; None stores none.
    broken_limit: share of broken rows, [0, 1], that is let pass, of each shard of at least 100 rows
      and of all rows.
    progress: called as progress(pairs done, shards done, shards in all), kept shards included.

  Returns:
    The data set, as `open_encoded(folder, fingerprint=fingerprint)` gives it.

  Raises:
    ValueError: the folder holds a data set made or begun otherwise, or something else; a shard
      cannot be read; too many rows are broken; moments or embeddings are not finite; there are no
      pairs; a setting is out of range.
    OSError: a file cannot be written; finished shards are kept.
  """
  folder = pathlib.Path(folder)
  recipe = encode_shard.Recipe(encode_images, tokenize, geometry, time_ids, batch_size, embed)
  empty_ids = _check(source, recipe, broken_limit)
  settings = _settings(source, fingerprint, recipe)
  if not _start(folder, settings):
    return open_encoded(folder, fingerprint=fingerprint)
  encode = functools.partial(
    encode_shard.encode_shard, recipe=recipe, settings=_digest(settings), broken_limit=broken_limit
  )
  sidecars = _encode_shards(source, folder, encode, _digest(settings), progress)
  metadata = settings | {"empty_ids": empty_ids.tolist()}
  _finish(folder, source, metadata, sidecars, broken_limit, recipe)
  return open_encoded(folder, fingerprint=fingerprint)


class Job(NamedTuple):
  """What `encode_shard.encode_shard` is to do: from where, to where, digest of the settings."""

  shard: rows.Shard
  path: pathlib.Path
  settings: str


def missing_shards(
  source: rows.Source,
  folder: str | pathlib.Path,
  recipe: encode_shard.Recipe,
  *,
  fingerprint: str,
) -> list[Job]:
  """Claims the folder for these settings and says what `encode_source` would have to encode there.

  Other processes may take the jobs in any order; `encode_source` then writes the metadata.

  Raises:
    ValueError: the folder holds a data set made or begun otherwise, or something else.
  """
  folder = pathlib.Path(folder)
  _check(source, recipe, 0.0)
  settings = _settings(source, fingerprint, recipe)
  if not _start(folder, settings):
    return []
  digest = _digest(settings)
  jobs = [Job(shard, path, digest) for _, shard, path in _files(source, folder)]
  return [job for job in jobs if encode_shard.read_sidecar(job.path, job.shard, digest) is None]


def open_encoded(folder: str | pathlib.Path, *, fingerprint: str) -> Encoded:
  """Opens what `encode_source` wrote.

  Raises:
    ValueError: the folder is missing, incomplete or damaged, or made with another VAE or
      tokenizer than `fingerprint` says.
  """
  folder = pathlib.Path(folder)
  metadata = _read_metadata(folder)
  if metadata["fingerprint"] != fingerprint:
    raise ValueError(
      f"{folder}: made with another VAE or tokenizer (fingerprint {metadata['fingerprint']},"
      f" expected {fingerprint}), or with another data.prompt_embeds (there"
      f" {metadata['prompt_embeds']}); run `dmpo prepare` into another folder"
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
    empty = {}
    if metadata["prompt_embeds"]:
      empty = dict(safetensors_io.load_safetensors(folder / _EMPTY_CAPTION))
  except Exception as error:  # the readers raise many kinds
    raise ValueError(
      f"{folder}: damaged ({error}); delete the folder and run `dmpo prepare` again"
    ) from error
  splits = {split: Pairs(source, f"{folder}, split {split}") for split, source in records.items()}
  for source in splits.values():
    if len(source):
      source[0], source[len(source) - 1]
  empty.pop("input_ids", None)  # also in the metadata
  return Encoded(splits, metadata, empty)


def _check(
  source: rows.Source, recipe: encode_shard.Recipe, broken_limit: float
) -> Int[np.ndarray, "*E L"]:
  """Refuses what would fail later; returns the ids of the empty caption."""
  if recipe.batch_size < 1:
    raise ValueError(f"encode_source: batch_size: expected at least 1, got {recipe.batch_size}")
  if not 0 <= broken_limit <= 1:
    raise ValueError(f"encode_source: broken_limit: expected [0, 1], got {broken_limit}")
  if not any(source.splits.values()):
    raise ValueError(f"{source.name}: has no shards; expected at least one")
  for split, shards in source.splits.items():
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
      raise ValueError(f"{source.name}, split {split}: two shards have the same name: {names}")
  return recipe.token_ids([""])[0]


def _settings(source: rows.Source, fingerprint: str, recipe: encode_shard.Recipe) -> dict[str, Any]:
  """All that the content of the files depends on, as JSON."""
  geometry = dataclasses.asdict(recipe.geometry)
  settings = {
    "fingerprint": fingerprint,
    "source": source.name,
    "source_id": source.fingerprint,
    "resolution": geometry.pop("resolution"),
    "geometry": geometry,
    "time_ids": recipe.time_ids,
    "shards": {split: len(shards) for split, shards in source.splits.items()},
  }
  chosen = {"prompt_embeds": recipe.embed is not None}
  return settings | {name: value for name, value in chosen.items() if value != _UNNAMED[name]}


def _digest(settings: dict[str, Any]) -> str:
  text = json.dumps(settings, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _start(folder: pathlib.Path, settings: dict[str, Any]) -> bool:
  """Whether shards are to be encoded; False if `folder` holds the finished data set."""
  if folder.exists() and (not folder.is_dir() or _is_foreign(folder)):
    raise ValueError(f"{folder}: not an encoded data set; give another folder, nothing was changed")
  if (folder / _METADATA).exists():
    _compare(folder, _read_metadata(folder), settings, "holds an encoded data set made")
    return False
  sidecars = folder / encode_shard.SIDECARS
  if sidecars.is_dir() and any(sidecars.glob("*.json")):
    started = _read_json(folder / _STARTED, _COMPARED)
    _compare(folder, started, settings, "holds shards of an encoded data set begun")
  folder.mkdir(parents=True, exist_ok=True)
  encode_shard.remove_drafts(folder)
  encode_shard.write_json(folder / _STARTED, settings)
  return True


def _is_foreign(folder: pathlib.Path) -> bool:
  """Whether a folder without a data set, finished or begun, holds something else."""
  names = {path.name for path in folder.iterdir() if not path.match(f".{_STARTED}.*.tmp")}
  return bool(names) and not names & {_METADATA, _STARTED}


def _compare(
  folder: pathlib.Path, there: dict[str, Any], wanted: dict[str, Any], what: str
) -> None:
  wanted = _UNNAMED | wanted
  differing = [
    f"{field} (there {there.get(field)}, wanted {wanted[field]})"
    for field in _COMPARED
    if there.get(field) != wanted[field]
  ]
  if differing:
    raise ValueError(
      f"{folder}: {what} with another {', '.join(differing)}; give another folder, nothing was"
      " overwritten"
    )


def _files(source: rows.Source, folder: pathlib.Path) -> Iterator[tuple[str, rows.Shard, Any]]:
  """Split, shard, and the path of its file as TFDS wants it."""
  for split, shards in source.splits.items():
    template = _template(folder, split)
    for index, shard in enumerate(shards):
      path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
      yield split, shard, folder / path.name


def _template(folder: pathlib.Path, split: str) -> naming.ShardedFileTemplate:
  return naming.ShardedFileTemplate(
    dataset_name=NAME, data_dir=folder, split=split, filetype_suffix="array_record"
  )


def _encode_shards(
  source: rows.Source,
  folder: pathlib.Path,
  encode: Callable[..., dict[str, Any]],
  settings: str,
  progress: Callable[[int, int, int], None] | None,
) -> dict[str, list[dict[str, Any]]]:
  """The sidecars by split, of shards that were finished before and of those encoded now."""
  sidecars: dict[str, list[dict[str, Any]]] = {split: [] for split in source.splits}
  total, done, pairs = sum(map(len, source.splits.values())), 0, 0

  def report(of_shard: int) -> None:
    if progress is not None:
      progress(pairs + of_shard, done, total)

  for split, shard, path in _files(source, folder):
    sidecar = encode_shard.read_sidecar(path, shard, settings)
    if sidecar is None:
      sidecar = encode(shard, path, progress=report)
    sidecars[split].append(sidecar)
    pairs, done = pairs + sidecar["pairs"], done + 1
    report(0)
  return sidecars


def _finish(
  folder: pathlib.Path,
  source: rows.Source,
  metadata: dict[str, Any],
  sidecars: dict[str, list[dict[str, Any]]],
  broken_limit: float,
  recipe: encode_shard.Recipe,
) -> None:
  """Writes the metadata of TFDS, then ours: only now is there a data set."""
  every = [sidecar for each in sidecars.values() for sidecar in each]
  tally = encode_shard.Tally()
  for sidecar in every:
    tally.add(encode_shard.Tally(sidecar))
  tally.check(source.name, broken_limit)
  _dataset_info(folder, source, _common_features(source, every), sidecars).write_to_directory(
    folder
  )
  paths = [path for _, _, path in _files(source, folder)]
  files = {path.name: sidecar["bytes"] for path, sidecar in zip(paths, every, strict=True)}
  if recipe.embed is not None:
    (fields,) = recipe.text_fields([""])
    safetensors_io.save_safetensors(folder / _EMPTY_CAPTION, fields, dtype=None)
    files[_EMPTY_CAPTION] = (folder / _EMPTY_CAPTION).stat().st_size
  if any("desirable" in sidecar for sidecar in every):
    metadata["desirable"] = {
      split: sum(each.get("desirable", 0) for each in of) for split, of in sidecars.items()
    }
  metadata |= {
    "counts": {split: sum(each["pairs"] for each in of) for split, of in sidecars.items()},
    **tally.content(),
    "images": sum(sidecar["images"] for sidecar in every),
    "files": files,
    "licence": source.licence,
    "homepage": source.homepage,
  }
  encode_shard.write_json(folder / _METADATA, metadata)


def _common_features(source: rows.Source, sidecars: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Arrays of the records of all shards."""
  found = [sidecar for sidecar in sidecars if sidecar["pairs"]]
  if not found:
    dropped = sum(sidecar["rows"] for sidecar in sidecars)
    raise ValueError(f"{source.name}: holds no pairs; all of its {dropped} rows were dropped")
  first = found[0]
  for each in found:
    if each["features"] != first["features"]:
      raise ValueError(
        f"{source.name}: {each['source_shard']} has the arrays {each['features']},"
        f" {first['source_shard']} has {first['features']}; all pairs of a source have a source"
        " image or none has"
      )
  return first["features"]


def _dataset_info(
  folder: pathlib.Path,
  source: rows.Source,
  features: dict[str, Any],
  sidecars: dict[str, list[dict[str, Any]]],
) -> tfds.core.DatasetInfo:
  info = tfds.core.DatasetInfo(
    builder=tfds.core.DatasetIdentity(
      name=NAME, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=__name__
    ),
    description=f"{source.name} as VAE moments (mean, log-variance) and token ids.",
    features=encode_shard.features_dict(features),
    homepage=source.homepage,
    disable_shuffling=True,
  )
  info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD, override=False)
  splits = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[sidecar["pairs"] for sidecar in each],
      num_bytes=sum(sidecar["record_bytes"] for sidecar in each),
      filename_template=_template(folder, split),
    )
    for split, each in sidecars.items()
  ]
  info.set_splits(tfds.core.splits.SplitDict(splits))
  return info


def _read_metadata(folder: pathlib.Path) -> dict[str, Any]:
  if not folder.is_dir():
    raise ValueError(f"{folder}: no encoded data set there; run `dmpo prepare`")
  if (folder / _STARTED).exists() and not (folder / _METADATA).exists():
    done = len(list((folder / encode_shard.SIDECARS).glob("*.json")))
    total = sum(_read_json(folder / _STARTED, _COMPARED)["shards"].values())
    raise ValueError(
      f"{folder}: not finished, {done} of {total} shards are encoded; run `dmpo prepare` again"
    )
  return _read_json(folder / _METADATA, _NEEDED)


def _read_json(path: pathlib.Path, needed: Sequence[str]) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path.parent}: not an encoded data set ({path.name}: {error}); give another folder or run"
      " `dmpo prepare` into an empty one"
    ) from error
  if isinstance(content, dict):
    content = _UNNAMED | content
  if not isinstance(content, dict) or any(field not in content for field in needed):
    raise ValueError(f"{path}: not of an encoded data set: expected the fields {list(needed)}")
  return content
