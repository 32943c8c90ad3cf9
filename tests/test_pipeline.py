import collections
import itertools

import jax
import numpy as np
import pytest

from dmpo_jax import types
from dmpo_jax.data import pipeline

EMPTY = np.full(5, -1, np.int32)
SETTINGS = {
  "seed": 3,
  "batch_size": 4,
  "caption_dropout": 0.0,
  "empty_caption": {"input_ids": EMPTY},
}


def make_source(count):
  return [
    {
      "moments_w": np.full((2, 2, 4), position, np.float16),
      "moments_l": np.full((2, 2, 4), -position, np.float16),
      "input_ids": np.full(5, position, np.int32),
      "couple": f"couple{position}",
      "caption": f"caption{position}",
      "p_choice": 0.7,
    }
    for position in range(count)
  ]


def take(count, source, **settings):
  return list(itertools.islice(pipeline.preference_batches(source, **SETTINGS | settings), count))


def positions(batch):
  return batch.moments_w[:, 0, 0, 0].astype(int).tolist()


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    for array, other_array in zip(batch, other, strict=True):
      np.testing.assert_array_equal(array, other_array)


def test_a_batch_holds_whole_pairs():
  (batch,) = take(1, make_source(10))
  assert batch.moments_w.shape == (4, 2, 2, 4) and batch.moments_w.dtype == np.float16
  assert batch.moments_l.dtype == np.float16
  assert batch.input_ids.shape == (4, 5) and batch.input_ids.dtype == np.int32
  np.testing.assert_array_equal(batch.moments_l, -batch.moments_w)
  assert batch.input_ids[:, 0].tolist() == positions(batch)


def test_epochs_are_complete_and_ordered_anew():
  flat = [position for batch in take(10, make_source(10)) for position in positions(batch)]
  epochs = [flat[first : first + 10] for first in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert tuple(range(10)) not in {tuple(epoch) for epoch in epochs}


def test_the_seed_alone_decides():
  source = make_source(10)
  dropout = {"caption_dropout": 0.5}
  assert_same(take(6, source, **dropout), take(6, source, **dropout))
  other = take(6, source, seed=4)
  assert [positions(batch) for batch in other] != [positions(b) for b in take(6, source)]


@pytest.mark.parametrize("start", [1, 2, 5, 9])
def test_start_gives_the_rest_of_the_run(start):
  source = make_source(10)
  whole = take(12, source, caption_dropout=0.3)
  assert_same(whole[start:], take(12 - start, source, caption_dropout=0.3, start=start))


def test_seeking_reads_nothing_on_the_way():
  class Counted(list):
    reads = 0

    def __getitem__(self, position):
      Counted.reads += 1
      return super().__getitem__(position)

  batches = pipeline.preference_batches(Counted(make_source(10)), start=10**9, **SETTINGS)
  next(batches)
  assert Counted.reads < 100


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_global_batches(process_count):
  source = make_source(32)
  settings = {"batch_size": 8, "caption_dropout": 0.3}
  alone = take(8, source, **settings)
  shares = [
    take(8, source, process_index=index, process_count=process_count, **settings)
    for index in range(process_count)
  ]
  for step in range(8):
    parts = [share[step] for share in shares]
    assert all(len(part.input_ids) == 8 // process_count for part in parts)
    joined = jax.tree.map(lambda *fields: np.concatenate(fields), *parts)
    assert_same([joined], [alone[step]])  # row by row
  first_epoch = [[p for batch in share[:4] for p in positions(batch)] for share in shares]
  assert sorted(sum(first_epoch, [])) == list(range(32))


def test_caption_dropout_has_its_rate_and_differs_between_epochs():
  batches = take(100, make_source(10), caption_dropout=0.2)
  dropped = collections.Counter()
  for batch in batches:
    rows = (batch.input_ids == EMPTY).all(axis=1)
    kept = batch.input_ids[~rows, 0].tolist()
    assert kept == [p for p, row in zip(positions(batch), rows, strict=True) if not row]
    dropped.update(p for p, row in zip(positions(batch), rows, strict=True) if row)
  assert 48 < sum(dropped.values()) < 112  # 80 expected of 400, standard deviation 8
  assert set(dropped) == set(range(10)) and max(dropped.values()) < 25
  assert not any((batch.input_ids == -1).any() for batch in take(20, make_source(10)))


def test_record_ids_name_the_batch():
  source = make_source(10)
  for step, batch in enumerate(take(6, source, caption_dropout=0.5)):
    names = pipeline.record_ids(source, seed=3, batch_size=4, step=step)
    assert names == [f"caption{p} (couple{p})" for p in positions(batch)]


def test_load_split_keeps_the_order():
  source = make_source(10)
  assert positions(pipeline.load_split(source)) == list(range(10))
  assert positions(pipeline.load_split(source, limit=3)) == [0, 1, 2]
  assert positions(pipeline.load_split(source, limit=99)) == list(range(10))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 6, "process_count": 4}, "multiple of the 4 processes, got 6"),
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"process_index": 2, "process_count": 2}, "got 2 of 2"),
    ({"caption_dropout": 1.0}, r"caption_dropout: expected a probability in \[0, 1\), got 1.0"),
    ({"caption_dropout": -0.1}, "caption_dropout: expected a probability"),
    ({"seed": -1}, r"seed: expected 0 <= seed < 2\*\*32, got -1"),
    ({"start": -1}, "step: expected at least 0, got -1"),
    ({"workers": -1}, "workers: expected at least 0, got -1"),
    ({"empty_caption": {"input_ids": EMPTY[:4]}}, r"input_ids: expected shape \(5,\), got \(4,\)"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    pipeline.preference_batches(make_source(10), **SETTINGS | settings)


def test_empty_sources_are_refused():
  with pytest.raises(ValueError, match="holds no pairs"):
    pipeline.preference_batches([], **SETTINGS)
  with pytest.raises(ValueError, match="holds no pairs"):
    pipeline.load_split([])
  with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
    pipeline.load_split(make_source(2), limit=0)


def test_an_error_of_the_source_reaches_the_reader():
  class Broken(list):
    def __getitem__(self, position):
      if position == 7:
        raise ValueError("pair 7: damaged")
      return super().__getitem__(position)

  with pytest.raises(ValueError, match="pair 7: damaged"):
    list(itertools.islice(pipeline.preference_batches(Broken(make_source(10)), **SETTINGS), 3))


@pytest.mark.parametrize("count, process_count, batch_size", [(37, 2, 4), (37, 4, 8), (5, 4, 4)])
def test_shares_are_disjoint_and_complete_where_the_count_does_not_divide(
  count, process_count, batch_size
):
  """An epoch is `count` positions of the run, whatever process reads them."""
  shares = [
    take(
      -(-3 * count // batch_size),  # three epochs and a part of a batch
      make_source(count),
      batch_size=batch_size,
      process_index=index,
      process_count=process_count,
    )
    for index in range(process_count)
  ]
  of_run = {}  # position in the run -> id
  for index, share in enumerate(shares):
    for step, batch in enumerate(share):
      for row, number in enumerate(positions(batch)):
        place = step * batch_size + index * len(positions(batch)) + row
        assert place not in of_run
        of_run[place] = number
  for epoch in range(3):
    seen = [of_run[epoch * count + offset] for offset in range(count)]
    assert sorted(seen) == list(range(count))


def test_a_run_saved_by_four_processes_goes_on_with_two():
  """No pair of the epoch is seen twice or left out; 43 pairs, so that nothing divides."""
  count, batch_size, saved_at = 43, 8, 3
  settings = {"batch_size": batch_size, "caption_dropout": 0.0}
  seen = [
    number
    for index in range(4)
    for batch in take(
      saved_at, make_source(count), process_index=index, process_count=4, **settings
    )
    for number in positions(batch)
  ]
  rest = [
    take(3, make_source(count), process_index=index, process_count=2, start=saved_at, **settings)
    for index in range(2)
  ]
  by_place = {
    (saved_at + step) * batch_size + index * batch_size // 2 + row: number
    for index, share in enumerate(rest)
    for step, batch in enumerate(share)
    for row, number in enumerate(positions(batch))
  }
  remaining = [by_place[place] for place in range(saved_at * batch_size, count)]
  assert len(seen) == saved_at * batch_size == len(set(seen))
  assert sorted(seen + remaining) == list(range(count))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches():
  source = make_source(37)
  settings = {"caption_dropout": 0.3, "start": 5, "process_index": 1, "process_count": 2}
  plain = take(12, source, **settings)
  for workers in (1, 3):
    batches = take(12, source, workers=workers, **settings)
    assert isinstance(batches[0], types.PreferenceBatch)
    # Copies: the originals lie in memory that ends with the workers.
    assert_same([jax.tree.map(np.array, batch) for batch in batches], plain)
    del batches


def test_an_emptied_caption_takes_its_embeddings_along():
  def embeddings(position):
    return {
      "prompt_embeds": np.full((5, 3), position, np.float16),
      "text_embeds": np.full(2, position, np.float16),
    }

  source = [{**pair, **embeddings(i)} for i, pair in enumerate(make_source(10))]
  empty = {"input_ids": EMPTY, **embeddings(-1)}
  (batch,) = take(1, source, batch_size=64, caption_dropout=0.5, empty_caption=empty)
  ids = batch.input_ids[:, 0]
  assert 10 < (ids == -1).sum() < 54  # 32 expected, standard deviation 4
  np.testing.assert_array_equal(batch.prompt_embeds[:, 0, 0], ids)
  np.testing.assert_array_equal(batch.text_embeds[:, 1], ids)
  with pytest.raises(ValueError, match=r"prompt_embeds: expected shape \(5, 3\), got None"):
    pipeline.preference_batches(source, **SETTINGS)
  with pytest.raises(ValueError, match=r"text_embeds: expected shape None, got \(2,\)"):
    take(1, make_source(3), empty_caption={"input_ids": EMPTY, "text_embeds": np.zeros(2)})
