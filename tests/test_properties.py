"""Properties that hold for any mix of rows: nothing is lost, swapped or taken for a choice."""

import collections
import functools
import io
import json
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import numpy as np
import pair_files
from hypothesis import strategies
from PIL import Image

from dmpo_jax.data import encode, geometry, rows
from dmpo_jax.data.sources import registry

COLOURS = 40  # few, so that pictures are repeated
FEW = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}

# Any character but halves of one, which no UTF-8 file holds.
captions = strategies.text(
  strategies.characters(exclude_categories=["Cs"]), min_size=1, max_size=30
).filter(str.strip)


# Choices, as Pick-a-Pic and as a user's own list write them.

ANSWERS = {  # (has_label, label_0, label_1) -> who won, or why nobody did
  (True, 1.0, 0.0): 0,
  (True, 0.0, 1.0): 1,
  (True, 0.5, 0.5): "tie",
  (False, None, None): "not labelled",
  (False, 1.0, 0.0): "not labelled",
  (True, None, None): "label is missing",
}


class Choice(NamedTuple):
  """A row: which two pictures were shown for a caption, and the answer."""

  caption: str
  shown: tuple[int, int]
  answer: tuple[bool, float | None, float | None]

  def ranked(self) -> tuple[int, int] | None:
    """Winner and loser; None if nobody won."""
    won = ANSWERS[self.answer]
    return None if isinstance(won, str) else (self.shown[won], self.shown[1 - won])


choices = strategies.builds(
  Choice,
  captions,
  strategies.lists(strategies.integers(0, 19), min_size=2, max_size=2, unique=True).map(tuple),
  strategies.sampled_from(list(ANSWERS)),
)


def write_as_pickapic(folder, shards):
  for number, shard in enumerate(shards):
    table = []
    for caption, (first, second), (has_label, label_0, label_1) in shard:
      row = dict.fromkeys(pair_files.PICKAPIC.names) | {
        "caption": caption,
        "has_label": has_label,
        "image_0_uid": f"{first:02d}",
        "image_1_uid": f"{second:02d}",
        "jpg_0": pair_files.picture(first),
        "jpg_1": pair_files.picture(second),
        "label_0": label_0,
        "label_1": label_1,
      }
      table.append(row)
    name = f"data/train-{number:05d}-of-{len(shards):05d}.parquet"
    pair_files.write_pickapic(folder / name, table, row_group_size=3)


def write_as_own_pairs(folder, shards):
  folder.mkdir()
  for index in range(20):
    (folder / f"{index}.jpg").write_bytes(pair_files.picture(index))
  for number, shard in enumerate(shards):
    lines = [
      {"caption": choice.caption, "winner": f"{ranked[0]}.jpg", "loser": f"{ranked[1]}.jpg"}
      for choice in shard
      if (ranked := choice.ranked())
    ]
    # As Python writes it and as a person does, with every character as it is.
    text = [json.dumps(line, ensure_ascii=bool(number % 2)) for line in lines]
    pair_files.write_jsonl(folder / f"{number:05d}.jsonl", text)


def read(source, split="train"):
  return [row for shard in source.splits[split] for row in shard.read()]


def pictures_of(found):
  return [(row.caption, row.image_w, row.image_l) for row in found if isinstance(row, rows.Pair)]


@hypothesis.settings(max_examples=80, **FEW)
@hypothesis.given(
  shards=strategies.lists(strategies.lists(choices, max_size=8), min_size=1, max_size=4),
  share=strategies.floats(0, 0.9),
)
def test_winners_match_the_labels_of_any_mix_of_rows(tmp_path_factory, shards, share):
  folder = tmp_path_factory.mktemp("choices")
  write_as_pickapic(folder / "v2", shards)
  every = [choice for shard in shards for choice in shard]
  expected = [
    (choice.caption, *map(pair_files.picture, ranked))
    for choice in every
    if (ranked := choice.ranked())
  ]
  found = read(registry.open_source("pickapic_v2", folder / "v2"))
  assert len(found) == len(every)
  assert pictures_of(found) == expected
  couples = [row.couple for row in found if isinstance(row, rows.Pair)]
  assert couples == [
    "{:02d}-{:02d}".format(*sorted(choice.shown)) for choice in every if choice.ranked()
  ]
  sides = [row.side for row in found if isinstance(row, rows.Pair)]
  assert sides == [f"jpg_{ANSWERS[choice.answer]}" for choice in every if choice.ranked()]
  dropped = collections.Counter(row.reason for row in found if isinstance(row, rows.Dropped))
  nobody = (ANSWERS[choice.answer] for choice in every)
  assert dropped == collections.Counter(why for why in nobody if isinstance(why, str))

  write_as_own_pairs(folder / "own", shards)
  own = registry.open_source("pairs", folder / "own", validation_share=0.0)
  assert pictures_of(read(own)) == expected
  parts = registry.open_source("pairs", folder / "own", validation_share=share)
  split = {name: pictures_of(read(parts, name)) for name in parts.splits}
  assert collections.Counter(sum(split.values(), [])) == collections.Counter(expected)
  asked = [{caption for caption, _, _ in each} for each in split.values()]
  assert len(set().union(*asked)) == sum(map(len, asked))


# Encoding: a picture of one colour is found again in the moments.


class Painted(NamedTuple):
  """A shard of pairs of one colour each; None stands for a dropped row."""

  name: str
  members: tuple[rows.Pair | None, ...]

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    for number, pair in enumerate(self.members):
      where = f"{self.name}, row {number}"
      yield rows.Dropped("tie", where, False) if pair is None else pair._replace(where=where)


@functools.cache
def paint(colour: int) -> bytes:
  """A PNG of one colour, other sizes for others."""
  rgb = (colour * 53 % 256, colour, 255 - colour)
  buffer = io.BytesIO()
  Image.new("RGB", (4 + colour % 5, 4 + colour % 3), rgb).save(buffer, "PNG")
  return buffer.getvalue()


def colours_of(moments):
  """Colours [n, 1, 1, 4] of `encode_mean`; the fourth number is their sum."""
  rgb = np.rint((np.float64(moments[..., :3]) + 1) * 127.5).astype(int).reshape(-1, 3)
  colour = rgb[:, 1]
  assert np.array_equal(rgb, np.stack([colour * 53 % 256, colour, 255 - colour], axis=1))
  return colour


def encode_mean(batch):
  mean = batch.mean((1, 2), keepdims=True)
  return np.concatenate([mean, mean.sum(-1, keepdims=True)], axis=-1)


def tokenize(texts):
  return np.array([[zlib.crc32(text.encode()) % 2**31, len(text), 7] for text in texts], np.int32)


@strategies.composite
def painted_shards(draw):
  """Shards of any sizes, one pair at least; all pairs with a source picture or none."""
  colour = strategies.integers(0, COLOURS - 1)
  source = colour if draw(strategies.booleans()) else strategies.none()
  p_choice = strategies.floats(0.5, 1.0, width=32)
  pair = strategies.tuples(captions, colour, colour, source, p_choice)
  shards = draw(
    strategies.lists(
      strategies.lists(strategies.none() | pair | pair, max_size=12), min_size=1, max_size=4
    ).filter(lambda every: any(row for shard in every for row in shard))
  )
  return shards


def to_pair(number, row):
  caption, winner, loser, source, p_choice = row
  image_source = None if source is None else paint(source)
  return rows.Pair(
    caption, paint(winner), paint(loser), p_choice, f"couple {number}", "", image_source
  )


@hypothesis.settings(max_examples=50, **FEW)
@hypothesis.given(
  shards=painted_shards(), batch_size=strategies.integers(1, 9), flip=strategies.booleans()
)
def test_what_is_decoded_is_what_was_encoded(tmp_path_factory, shards, batch_size, flip):
  folder = tmp_path_factory.mktemp("encoded") / "out"
  numbered = iter(range(10**6))
  painted = [
    Painted(f"shard {index}", tuple(row and to_pair(next(numbered), row) for row in shard))
    for index, shard in enumerate(shards)
  ]
  encode.encode_source(
    rows.Source("painted", {"train": painted}, None, "", "1"),
    folder,
    encode_images=encode_mean,
    tokenize=tokenize,
    geometry=geometry.Geometry(4, crop="random", flip=float(flip)),
    fingerprint="abc",
    batch_size=batch_size,
    time_ids=True,
  )
  encoded = encode.open_encoded(folder, fingerprint="abc")
  every = [row for shard in shards for row in shard]
  expected = [row for row in every if row is not None]
  pairs = encoded.splits["train"]
  assert len(pairs) == len(expected)
  for number, (caption, winner, loser, source, p_choice) in enumerate(expected):
    pair = pairs[number]
    assert (pair["caption"], pair["couple"]) == (caption, f"couple {number}")
    assert pair["p_choice"] == p_choice
    np.testing.assert_array_equal(pair["input_ids"], tokenize([caption])[0])
    assert colours_of(pair["moments_w"]) == winner and colours_of(pair["moments_l"]) == loser
    assert ("source_moments" in pair) == (source is not None)
    if source is not None:
      assert colours_of(pair["source_moments"]) == source
    # Height and width of the winner.
    assert pair["time_ids"][:2].tolist() == [4 + winner % 3, 4 + winner % 5]
  metadata = encoded.metadata
  assert metadata["counts"] == {"train": len(expected)} and metadata["rows"] == len(every)
  ties = len(every) - len(expected)
  assert metadata["dropped"] == ({"tie": ties} if ties else {})
