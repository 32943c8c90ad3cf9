"""Encoded pairs, or judged images -> endless, reproducible batches; any step is reached at once."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import grain
import numpy as np
from absl import flags

from dmpo_jax import types

_THREADS, _PREFETCHED = 2, 4  # batches read ahead; records are small, decoding is a copy
_WORKER_BATCHES = 2  # batches that each worker process holds ready


@runtime_checkable
class PairSource(Protocol):
  """Position -> {moments_w, moments_l, input_ids, couple, caption, ...}; a field of the batch that
  may be None (`source_moments`) may be absent. Of images judged one by one the fields are those of
  `types.JudgedBatch`; all that is said here of pairs then holds for images."""

  def __len__(self) -> int: ...

  def __getitem__(self, position: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several sources; pairs are taken from them in a fixed pattern, in proportion to the weights.

  Each source has epochs and an order of its own, so that a small one with a large weight is
  repeated.

  Raises:
    ValueError: no sources, or a weight that is not positive.
  """

  sources: tuple[PairSource, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    if not self.sources or len(self.sources) != len(self.weights):
      raise ValueError(
        f"mixture: expected a weight for each source, got {len(self.weights)} for"
        f" {len(self.sources)}"
      )
    for weight in self.weights:
      if not 0 < weight < float("inf"):
        raise ValueError(f"mixture: expected weights > 0 and finite, got {weight}")

  def __len__(self) -> int:
    return sum(len(source) for source in self.sources)


def preference_batches(
  source: PairSource | Mixture,
  *,
  seed: int,
  batch_size: int,
  caption_dropout: float,
  empty_caption: Mapping[str, np.ndarray],
  process_index: int = 0,
  process_count: int = 1,
  start: int = 0,
  workers: int = 0,
) -> Iterator[types.Batch]:
  """This process's share of the batches of steps `start`, `start` + 1, ...

  Every epoch has an order of its own, a function of (seed, epoch). Batches run on across the end
  of an epoch, so that no pair is left out. At a step all processes together hold the same batch,
  row by row and with the same captions dropped, whatever their number. So the step is the whole
  position: a run goes on with more or fewer processes than it began with.

  Args:
    source: the pairs.
    seed: of order and caption dropout, [0, 2**32).
    batch_size: pairs per step, of all processes together.
    caption_dropout: probability in [0, 1) that a pair gets the fields of `empty_caption`.
    empty_caption: what the empty caption is in a record: input_ids and, where they are stored, its
      embeddings.
    process_index: of this process, [0, process_count).
    process_count: processes that share the data.
    start: step of the first batch.
    workers: processes that read ahead; 0: two threads of this process. The batches are the same.

  Returns:
    Endless iterator of NumPy batches of batch_size / process_count pairs; moments as stored.

  Raises:
    ValueError: a setting is out of range or the source is empty.
  """
  _check(source, seed, batch_size, start)
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index: expected 0 <= process_index < process_count, got {process_index} of"
      f" {process_count}"
    )
  if batch_size % process_count:
    raise ValueError(
      f"batch_size: expected a multiple of the {process_count} processes, got {batch_size}"
    )
  if not 0 <= caption_dropout < 1:
    raise ValueError(f"caption_dropout: expected a probability in [0, 1), got {caption_dropout}")
  if workers < 0:
    raise ValueError(f"workers: expected at least 0, got {workers}")
  _check_caption(source, empty_caption)

  pairs = _shuffled(source, seed).random_map(_DropCaption(caption_dropout, dict(empty_caption)))
  share = batch_size // process_count
  if process_count > 1:
    pairs = grain.MapDataset.source(_Rows(pairs, batch_size, process_index * share, share))
  batches = pairs.batch(share, batch_fn=stack)[start:]
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED)
  ahead = batches.to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # grain reads its own, which a program without absl never sets
      flags.FLAGS.mark_as_parsed()
    ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(workers, _WORKER_BATCHES))
  return iter(ahead)


def record_ids(source: PairSource | Mixture, *, seed: int, batch_size: int, step: int) -> list[str]:
  """Caption and couple of every pair of the whole batch at `step`, for messages.

  Raises:
    ValueError: a setting is out of range or the source is empty.
  """
  _check(source, seed, batch_size, step)
  pairs = _shuffled(source, seed)
  positions = range(step * batch_size, (step + 1) * batch_size)
  records = (pairs[position] for position in positions)
  return [f"{record['caption']} ({record['couple']})" for record in records]


def batch_places(
  source: PairSource | Mixture, *, seed: int, batch_size: int, step: int
) -> list[tuple[int, int]]:
  """Where the pairs of the whole batch at `step` lie: number of the source, position in it.

  Raises:
    ValueError: a setting is out of range or the source is empty.
  """
  _check(source, seed, batch_size, step)
  places = _Places(0, len(source))
  if isinstance(source, Mixture):
    parts = tuple(_Places(number, len(each)) for number, each in enumerate(source.sources))
    places = Mixture(parts, source.weights)
  pairs = _shuffled(places, seed)  # the order depends on lengths and weights alone
  return [pairs[position] for position in range(step * batch_size, (step + 1) * batch_size)]


def pair_at(source: PairSource | Mixture, place: tuple[int, int]) -> dict[str, Any]:
  """The pair at one of `batch_places`."""
  number, position = place
  return (source.sources[number] if isinstance(source, Mixture) else source)[position]


def load_split(source: PairSource | Mixture, limit: int | None = None) -> types.Batch:
  """The first `limit` pairs (None: all) in the order on disk, without caption dropout.

  Of a mixture, in its proportions, until one of its sources ends.

  Raises:
    ValueError: the source is empty or `limit` is below 1.
  """
  if not len(source):
    raise ValueError(f"{source!r}: holds no pairs")
  if limit is not None and limit < 1:
    raise ValueError(f"limit: expected at least 1, got {limit}")
  pairs = _mixed(source, lambda each, _: grain.MapDataset.source(each))
  count = len(pairs) if limit is None else min(limit, len(pairs))
  return stack([pairs[position] for position in range(count)])


def first_pair(source: PairSource | Mixture) -> dict[str, Any]:
  """The first pair of a source, of a mixture that of its first source: shows the fields."""
  return source.sources[0][0] if isinstance(source, Mixture) else source[0]


@dataclasses.dataclass(frozen=True)
class _DropCaption(grain.transforms.RandomMap):
  """Gives some pairs the fields of the empty caption; of the module, so that workers get it."""

  probability: float
  empty_caption: Mapping[str, np.ndarray]

  def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**element, **self.empty_caption} if rng.random() < self.probability else element


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Rows `first` to `first` + `count` of every batch: a batch is then the same, and its pairs meet
  the same noise, whatever the number of processes."""

  pairs: grain.MapDataset
  batch_size: int
  first: int
  count: int

  def __len__(self) -> int:
    return len(self.pairs) // self.batch_size * self.count

  def __getitem__(self, position: SupportsIndex) -> dict[str, Any]:
    batch, row = divmod(position.__index__(), self.count)
    return self.pairs[batch * self.batch_size + self.first + row]

  def __repr__(self) -> str:  # grain names sources by their repr
    return f"_Rows({self.pairs!r}, {self.batch_size}, {self.first}, {self.count})"


def _shuffled(source: PairSource | Mixture, seed: int) -> grain.MapDataset:
  def epochs(each, index):
    # Sources of one length would else be in one order.
    return grain.MapDataset.source(each).seed((seed + index) % 2**32).shuffle().repeat()

  pairs = _mixed(source, epochs)
  return pairs.seed(seed) if isinstance(source, Mixture) else pairs


def _mixed(source: PairSource | Mixture, read) -> grain.MapDataset:
  """`read` (source, its number -> its pairs) of one source, or the mixture of several."""
  if not isinstance(source, Mixture):
    return read(source, 0)
  parts = [read(each, index) for index, each in enumerate(source.sources)]
  return grain.MapDataset.mix(parts, source.weights)


@dataclasses.dataclass(frozen=True)
class _Places:
  """A source whose pairs are their places."""

  number: int
  length: int

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, position: SupportsIndex) -> tuple[int, int]:
    return self.number, position.__index__()


@dataclasses.dataclass(frozen=True)
class First:
  """The first `limit` pairs of a source."""

  source: PairSource
  limit: int

  def __len__(self) -> int:
    return min(self.limit, len(self.source))

  def __getitem__(self, position: int) -> dict[str, Any]:
    return self.source[position]


def are_judged(source: PairSource | Mixture) -> bool:
  """Whether a source holds images that were judged one by one, and no pairs."""
  return "desirable" in first_pair(source)


def stack(pairs: list[dict[str, Any]]) -> types.Batch:
  """Records -> a batch of the fields that they hold."""
  kind = types.JudgedBatch if "desirable" in pairs[0] else types.PreferenceBatch
  present = (field for field in kind._fields if field in pairs[0])
  return kind(**{f: np.stack([pair[f] for pair in pairs]) for f in present})


def _check_caption(source: PairSource | Mixture, empty_caption: Mapping[str, np.ndarray]) -> None:
  pair = first_pair(source)
  for field in ("input_ids", "prompt_embeds", "text_embeds"):
    expected, got = (
      np.shape(each[field]) if field in each else None for each in (pair, empty_caption)
    )
    if expected != got:
      raise ValueError(
        f"empty_caption: {field}: expected shape {expected}, got {got}; it must come from the"
        " tokenizer and text encoders that encoded the pairs"
      )


def _check(source: PairSource | Mixture, seed: int, batch_size: int, step: int) -> None:
  sources = source.sources if isinstance(source, Mixture) else (source,)
  for each in sources:
    if not len(each):
      raise ValueError(f"{each!r}: holds no pairs")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed: expected 0 <= seed < 2**32, got {seed}")
  if batch_size < 1:
    raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
  if step < 0:
    raise ValueError(f"step: expected at least 0, got {step}")
