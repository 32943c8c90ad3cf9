"""Encoded pairs -> endless, reproducible batches; any step is reached at once."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from dmpo_jax import types

_THREADS, _PREFETCHED = 2, 4  # batches read ahead; records are small, decoding is a copy
_FIELDS = types.PreferenceBatch._fields


@runtime_checkable
class PairSource(Protocol):
  """Position -> {moments_w, moments_l, input_ids, couple, caption, ...}; a field of the batch that
  may be None (`source_moments`) may be absent."""

  def __len__(self) -> int: ...

  def __getitem__(self, position: int) -> dict[str, Any]: ...


def preference_batches(
  source: PairSource,
  *,
  seed: int,
  batch_size: int,
  caption_dropout: float,
  empty_ids: Int[np.ndarray, "*E L"],
  process_index: int = 0,
  process_count: int = 1,
  start: int = 0,
) -> Iterator[types.PreferenceBatch]:
  """This process's share of the batches of steps `start`, `start` + 1, ...

  Every epoch has an order of its own, a function of (seed, epoch). Batches run on across the end
  of an epoch, so that no pair is left out. At a step all processes together hold the same pairs,
  with the same captions dropped, whatever their number.

  Args:
    source: the pairs.
    seed: of order and caption dropout, [0, 2**32).
    batch_size: pairs per step, of all processes together.
    caption_dropout: probability in [0, 1) that a pair's ids are replaced by `empty_ids`.
    empty_ids: ids of the empty caption.
    process_index: of this process, [0, process_count).
    process_count: processes that share the data.
    start: step of the first batch.

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
  empty_ids = np.asarray(empty_ids, np.int32)
  if empty_ids.shape != np.shape(source[0]["input_ids"]):
    raise ValueError(
      f"empty_ids: expected shape {np.shape(source[0]['input_ids'])}, got {empty_ids.shape}; they"
      " must come from the tokenizer that encoded the pairs"
    )

  def drop_caption(pair: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    dropped = generator.random() < caption_dropout
    return pair | {"input_ids": empty_ids} if dropped else pair

  batches = (
    _shuffled(source, seed)
    .random_map(drop_caption)[process_index::process_count]
    .batch(batch_size // process_count, batch_fn=_stack)[start:]
  )
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCHED)
  return iter(batches.to_iter_dataset(options))


def record_ids(source: PairSource, *, seed: int, batch_size: int, step: int) -> list[str]:
  """Caption and couple of every pair of the whole batch at `step`, for messages.

  Raises:
    ValueError: a setting is out of range or the source is empty.
  """
  _check(source, seed, batch_size, step)
  pairs = _shuffled(source, seed)
  positions = range(step * batch_size, (step + 1) * batch_size)
  records = (pairs[position] for position in positions)
  return [f"{record['caption']} ({record['couple']})" for record in records]


def load_split(source: PairSource, limit: int | None = None) -> types.PreferenceBatch:
  """The first `limit` pairs (None: all) in the order on disk, without caption dropout.

  Raises:
    ValueError: the source is empty or `limit` is below 1.
  """
  if not len(source):
    raise ValueError(f"{source!r}: holds no pairs")
  if limit is not None and limit < 1:
    raise ValueError(f"limit: expected at least 1, got {limit}")
  count = len(source) if limit is None else min(limit, len(source))
  return _stack([source[position] for position in range(count)])


def _shuffled(source: PairSource, seed: int) -> grain.MapDataset:
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def _stack(pairs: list[dict[str, Any]]) -> types.PreferenceBatch:
  present = (field for field in _FIELDS if field in pairs[0])
  return types.PreferenceBatch(**{f: np.stack([pair[f] for pair in pairs]) for f in present})


def _check(source: PairSource, seed: int, batch_size: int, step: int) -> None:
  if not len(source):
    raise ValueError(f"{source!r}: holds no pairs")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed: expected 0 <= seed < 2**32, got {seed}")
  if batch_size < 1:
    raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
  if step < 0:
    raise ValueError(f"step: expected at least 0, got {step}")
