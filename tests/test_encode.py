import io
import itertools
import json
import pathlib
import random
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds
from PIL import Image

from dmpo_jax.data import (
  beam_encode,
  encode,
  encode_shard,
  geometry,
  images,
  pipeline,
  rows,
  tfds_source,
)
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import emoji_choice_dataset_builder as builders

RESOLUTION = 32


def encode_images(batch):
  """A linear 'VAE': 4x4 block means, and a fourth channel."""
  means = batch.reshape(len(batch), 8, 4, 8, 4, 3).mean((2, 4))
  return np.concatenate([means, means[..., :1] - 5], axis=-1)


def tokenize(captions):
  rows = [
    [1, *(ord(letter) % 90 + 3 for letter in caption.ljust(8)[:8]), 2] for caption in captions
  ]
  return np.array(rows, np.int32)


class Counting:
  def __init__(self):
    self.shapes = []

  def __call__(self, batch):
    self.shapes.append(batch.shape)
    return encode_images(batch)


def build(data_dir, count):
  config = builders.EmojiChoiceConfig(name=f"top{count}x", count=count)
  builder = builders.Builder(data_dir=data_dir, config=config)
  builder.download_and_prepare()
  return builder


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
  tfds.disable_progress_bar()
  return build(tmp_path_factory.mktemp("raw"), 80)


# As the emoji were encoded before there was a choice.
SQUARE = geometry.Geometry(RESOLUTION, resize="lanczos")


def encode_all(source, folder, **settings):
  settings = {
    "encode_images": encode_images,
    "tokenize": tokenize,
    "geometry": SQUARE,
    "fingerprint": "abc",
    "batch_size": 8,
  } | settings
  return encode.encode_source(source, folder, **settings)


def run(builder, folder, **settings):
  return encode_all(tfds_source.source_of_builder(builder), folder, **settings)


def contents(folder):
  """File -> bytes, of all files in a folder and below."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def raw(builder, split):
  return list(builder.as_data_source(split))


@pytest.mark.slow
def test_moments_tokens_and_order_are_those_of_the_source(builder, tmp_path):
  encoded = run(builder, tmp_path / "out")
  assert set(encoded.splits) == {"train", "validation", "test"}
  for split, source in encoded.splits.items():
    records = raw(builder, split)
    assert len(source) == len(records) == encoded.metadata["counts"][split]
    for record, pair in zip(records, (source[i] for i in range(len(source))), strict=True):
      assert pair["caption"] == record["caption"].decode()
      assert pair["couple"] == record["couple"].decode()
      assert pair["p_choice"] == record["p_choice"]
      assert pair["input_ids"].dtype == np.int32
      np.testing.assert_array_equal(pair["input_ids"], tokenize([pair["caption"]])[0])
      for side in ("w", "l"):
        picture = images.Image.fromarray(record[f"image_{side}"])
        expected = encode_images(images.to_array(picture, RESOLUTION)[None])[0]
        assert pair[f"moments_{side}"].dtype == np.float16
        np.testing.assert_array_equal(pair[f"moments_{side}"], expected.astype(np.float16))
  assert "tensorflow" not in sys.modules


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_are_full_and_pictures_encoded_once(builder, tmp_path, batch_size):
  counting = Counting()
  encoded = run(builder, tmp_path / "out", encode_images=counting, batch_size=batch_size)
  assert set(counting.shapes) == {(batch_size, RESOLUTION, RESOLUTION, 3)}
  pictures = {
    (split, record[field].tobytes())
    for split in encoded.splits
    for record in raw(builder, split)
    for field in ("image_w", "image_l")
  }
  assert encoded.metadata["images"] == len(pictures)
  # One partly filled batch at the end of each of the three shards at most.
  assert len(counting.shapes) <= len(pictures) // batch_size + 3


@pytest.mark.slow
def test_the_bounds_on_memory_change_nothing(builder, tmp_path, monkeypatch):
  whole = run(builder, tmp_path / "whole")
  monkeypatch.setattr(encode_shard, "_CACHED_IMAGES", 4)
  monkeypatch.setattr(encode_shard, "_WAITING_BATCHES", 1)
  monkeypatch.setattr(encode_shard, "_AHEAD", 1)
  bounded = run(builder, tmp_path / "bounded", batch_size=3)
  assert bounded.metadata["images"] > whole.metadata["images"]  # the bound did bite
  for split, source in whole.splits.items():
    for position in range(len(source)):
      pair, other = source[position], bounded.splits[split][position]
      assert pair["couple"] == other["couple"] and pair["caption"] == other["caption"]
      np.testing.assert_array_equal(pair["moments_w"], other["moments_w"])
      np.testing.assert_array_equal(pair["moments_l"], other["moments_l"])


def test_metadata_and_progress(builder, tmp_path):
  calls = []
  encoded = run(builder, tmp_path / "out", progress=lambda *call: calls.append(call))
  counts = list(encoded.metadata["counts"].values())
  ends = list(itertools.accumulate(counts))
  assert [pairs for pairs, _, _ in calls if calls] == sorted([*range(1, ends[-1] + 1), *ends])
  assert calls[-1] == (ends[-1], 3, 3) and calls[0] == (1, 0, 3)
  assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
  again = encode.open_encoded(tmp_path / "out", fingerprint="abc")
  assert again.metadata == encoded.metadata
  assert again.metadata["source"] == "emoji_choice/top80x/1.0.0"
  assert again.metadata["resolution"] == RESOLUTION
  assert again.metadata["geometry"]["resize"] == "lanczos"
  assert again.metadata["rows"] == sum(counts) and again.metadata["broken"] == 0
  assert again.metadata["homepage"] == "https://hdl.handle.net/11356/1048"
  assert again.empty_ids.dtype == np.int32
  np.testing.assert_array_equal(again.empty_ids, tokenize([""])[0])


def test_the_pipeline_reads_it(builder, tmp_path):
  encoded = run(builder, tmp_path / "out")
  source = encoded.splits["train"]
  batches = pipeline.preference_batches(
    source, seed=0, batch_size=4, caption_dropout=0.5, empty_caption=encoded.empty_caption
  )
  first = next(itertools.islice(batches, 1))
  assert first.moments_w.shape == (4, 8, 8, 4) and first.input_ids.shape == (4, 10)
  names = pipeline.record_ids(source, seed=0, batch_size=4, step=0)
  known = [
    f"{pair['caption']} ({pair['couple']})" for pair in map(source.__getitem__, range(len(source)))
  ]
  assert len(names) == 4 and set(names) <= set(known)
  position = known.index(names[0])
  np.testing.assert_array_equal(first.moments_w[0], source[position]["moments_w"])


def test_a_second_call_reuses_and_encodes_nothing(builder, tmp_path):
  first = run(builder, tmp_path / "out")
  counting = Counting()
  second = run(builder, tmp_path / "out", encode_images=counting, batch_size=5)
  assert not counting.shapes and second.metadata == first.metadata


def test_a_different_call_is_refused_and_overwrites_nothing(builder, tmp_path):
  run(builder, tmp_path / "out")
  before = contents(tmp_path / "out")
  message = r"made with another fingerprint \(there abc, wanted xyz\), resolution \(there 32,"
  with pytest.raises(ValueError, match=message):
    run(builder, tmp_path / "out", fingerprint="xyz", geometry=geometry.Geometry(64))
  other = build(tmp_path / "raw", 30)
  with pytest.raises(ValueError, match=r"another source \(there emoji_choice/top80x/1.0.0"):
    run(other, tmp_path / "out")
  assert before == contents(tmp_path / "out")


def test_a_folder_with_something_else_is_left_alone(builder, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match="out: not an encoded data set; give another folder"):
    run(builder, tmp_path / "out")
  assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_missing_folder_and_wrong_fingerprint(builder, tmp_path):
  with pytest.raises(ValueError, match="no encoded data set there; run `dmpo prepare`"):
    encode.open_encoded(tmp_path / "nowhere", fingerprint="abc")
  run(builder, tmp_path / "out")
  message = r"made with another VAE or tokenizer \(fingerprint abc, expected xyz\)"
  with pytest.raises(ValueError, match=message):
    encode.open_encoded(tmp_path / "out", fingerprint="xyz")
  (tmp_path / "out" / "metadata.json").write_text("{}")
  with pytest.raises(ValueError, match="metadata.json: not of an encoded data set"):
    encode.open_encoded(tmp_path / "out", fingerprint="abc")


def test_truncated_missing_and_flipped_files(builder, tmp_path):
  run(builder, tmp_path / "out")
  (path,) = (tmp_path / "out").glob("*-train.array_record*")
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  with pytest.raises(
    ValueError, match="train.array_record-00000-of-00001: truncated or damaged: expected"
  ):
    encode.open_encoded(tmp_path / "out", fingerprint="abc")
  path.unlink()
  with pytest.raises(ValueError, match="got missing; delete the folder and run `dmpo prepare`"):
    encode.open_encoded(tmp_path / "out", fingerprint="abc")
  path.write_bytes(data[:100] + bytes(50) + data[150:])
  with pytest.raises(ValueError, match="train.* damaged .*run `dmpo prepare` again"):
    encode.open_encoded(tmp_path / "out", fingerprint="abc")


def test_a_record_damaged_in_the_middle_is_named_when_read(builder, tmp_path):
  run(builder, tmp_path / "out")
  (path,) = (tmp_path / "out").glob("*-train.array_record*")
  data = bytearray(path.read_bytes())
  third = len(data) // 3
  data[third : third + 64] = bytes(64)
  path.write_bytes(bytes(data))
  source = encode.open_encoded(tmp_path / "out", fingerprint="abc").splits["train"]
  with pytest.raises(ValueError, match=r"split train, pair \d+: damaged .*run `dmpo prepare`"):
    for position in range(len(source)):
      source[position]


def test_a_position_outside_is_an_index_error(builder, tmp_path):
  source = run(builder, tmp_path / "out").splits["test"]
  with pytest.raises(IndexError, match="split test: pair"):
    source[len(source)]


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ({"broken_limit": 1.1}, r"broken_limit: expected \[0, 1\], got 1.1"),
    ({"encode_images": lambda batch: batch * np.inf}, "encode_images: expected .* got .*, 3"),
    (
      {"encode_images": lambda batch: np.full((len(batch), 4, 4, 8), 1e6)},
      "not finite in float16: the VAE gave values up to 1000000.0",
    ),
    ({"tokenize": lambda captions: np.zeros((1, 9))}, r"tokenize: expected int32 .* got float64"),
  ],
)
def test_wrong_settings_are_refused(builder, tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    run(builder, tmp_path / "out", **settings)
  assert not list(tmp_path.rglob("*array_record*"))
  run(builder, tmp_path / "out", fingerprint="other")  # nothing was finished with the wrong ones


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Pairs of given picture bytes."""

  VERSION = tfds.core.Version("1.0.0")
  name = "tiny"

  def __init__(self, picture, features, **kwargs):
    self._picture, self._names = picture, features
    super().__init__(file_format="array_record", **kwargs)

  def _info(self):
    known = {
      "caption": tfds.features.Text(),
      "image_w": tfds.features.Image(),
      "image_l": tfds.features.Image(),
      "p_choice": np.float32,
      "couple": tfds.features.Text(),
    }
    features = tfds.features.FeaturesDict({name: known[name] for name in self._names})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    buffer = io.BytesIO()
    emoji_lib.draw(emoji_lib.load_emoji(2)[0]).save(buffer, "PNG")
    for position, data in enumerate([buffer.getvalue(), self._picture]):
      values = {
        "caption": "a cat",
        "image_w": io.BytesIO(buffer.getvalue()),
        "image_l": io.BytesIO(data),
        "p_choice": 1.0,
        "couple": "x",
      }
      yield position, {name: values[name] for name in self._names}


FIELDS = ("caption", "image_w", "image_l", "p_choice", "couple")


def test_a_broken_picture_is_counted_and_named(tmp_path):
  tiny = Tiny(b"\x89PNG\r\n\x1a\nnothing", FIELDS, data_dir=tmp_path / "raw")
  with pytest.raises(ValueError, match="tiny/1.0.0: holds no pairs; run its download_and_prepare"):
    run(tiny, tmp_path / "out")
  tiny.download_and_prepare()
  with pytest.raises(ValueError, match=r"1 of 2 rows are broken, more than the limit of 1.00%"):
    run(tiny, tmp_path / "out")
  encoded = run(tiny, tmp_path / "out", broken_limit=0.5)
  assert encoded.metadata["counts"] == {"train": 1}
  (where,) = encoded.metadata["examples"]["unreadable image"]
  assert where.startswith("tiny/1.0.0, split train, pair 1, image_l: ")


def test_a_source_without_a_feature_is_refused(tmp_path):
  tiny = Tiny(b"", FIELDS[:3], data_dir=tmp_path / "raw")
  tiny.download_and_prepare()
  with pytest.raises(ValueError, match=r"lacks the features \['p_choice', 'couple'\]"):
    run(tiny, tmp_path / "out")


def test_few_emoji_may_leave_a_split_out(tmp_path):
  encoded = run(build(tmp_path / "raw", 8), tmp_path / "out")
  assert encoded.metadata["counts"] == {"train": 7, "test": 4}


def test_a_builder_whose_folder_is_gone_is_named(tmp_path):
  tiny = Tiny(b"", FIELDS, data_dir=tmp_path / "raw")
  tiny.download_and_prepare()
  source = tfds_source.source_of_builder(tiny)
  gone = source.splits["train"][0]
  assert gone.name == "tiny/1.0.0, split train, pairs 0 to 1"
  for path in pathlib.Path(gone.data_dir).glob("*array_record*"):
    path.write_bytes(b"")
  with pytest.raises(ValueError, match="pairs 0 to 1 in .*raw.* damaged .* build it again"):
    list(gone.read())


class Row(NamedTuple):
  """What a shard of the tests holds: a pair of noise pictures, a tie or a broken row."""

  kind: str
  number: int
  edit: bool = False


def noise_png(seed, width=40, height=36):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return images.encode_png(Image.fromarray(pixels))


class Listed(NamedTuple):
  """A shard made of a list."""

  name: str
  entries: tuple[Row, ...]

  def read(self):
    for position, row in enumerate(self.entries):
      where = f"{self.name}, row {position}"
      if row.kind in ("tie", "image is missing"):
        yield rows.Dropped(row.kind, where, broken=row.kind != "tie")
        continue
      yield rows.Pair(
        caption=f"caption {row.number % 3}",
        image_w=noise_png(row.number),
        image_l=b"GIF89a" if row.kind == "cut" else noise_png(row.number + 1, 36, 60),
        p_choice=0.75,
        couple=f"{row.number}-{row.number + 1}",
        where=where,
        image_source=noise_png(row.number + 2) if row.edit else None,
      )


def listed_source(*lists, name="listed", **splits):
  shards = tuple(Listed(f"part-{i}.parquet", tuple(each)) for i, each in enumerate(lists))
  splits = {split: tuple(Listed(split, tuple(each)) for each in of) for split, of in splits.items()}
  return rows.Source(name, {"train": shards} | splits, "cc0", "https://example.org", "1")


def good(start, stop):
  return [Row("pair", number) for number in range(start, stop)]


def test_shards_keep_their_order_and_names_and_may_be_empty(tmp_path):
  source = listed_source(good(0, 5), [], good(5, 8), validation=[[]], test=[good(20, 22)])
  encoded = encode_all(source, tmp_path)
  assert encoded.metadata["counts"] == {"train": 8, "validation": 0, "test": 2}
  couples = [encoded.splits["train"][i]["couple"] for i in range(8)]
  assert couples == [f"{i}-{i + 1}" for i in range(8)]
  assert encoded.splits["train"][3]["p_choice"] == np.float32(0.75)
  assert set(encoded.metadata["files"]) == {
    *(f"encoded_pairs-train.array_record-{i:05d}-of-00003" for i in range(3)),
    "encoded_pairs-validation.array_record-00000-of-00001",
    "encoded_pairs-test.array_record-00000-of-00001",
  }
  assert len(encoded.splits["validation"]) == 0
  sidecar = json.loads(
    (tmp_path / "shards" / "encoded_pairs-train.array_record-00002-of-00003.json").read_text()
  )
  assert sidecar["source_shard"] == "part-2.parquet" and sidecar["pairs"] == 3
  assert len(tfds.builder_from_directory(tmp_path).as_data_source("train")) == 8


def test_a_split_without_shards_and_a_source_without_pairs(tmp_path):
  encoded = encode_all(listed_source(good(0, 2), test=[]), tmp_path / "one")
  assert encoded.metadata["counts"] == {"train": 2, "test": 0}
  with pytest.raises(ValueError, match="listed: has no shards"):
    encode_all(listed_source(), tmp_path / "two")
  with pytest.raises(ValueError, match="holds no pairs; all of its 3 rows were dropped"):
    encode_all(listed_source([Row("tie", 0)] * 3), tmp_path / "three")
  with pytest.raises(ValueError, match="two shards have the same name"):
    encode_all(listed_source(good(0, 2), test=[good(0, 1), good(2, 3)]), tmp_path / "four")


def test_ties_and_broken_rows_are_counted_and_named(tmp_path):
  entries = [*good(0, 30), *[Row("tie", 0)] * 40, *[Row("image is missing", 0)] * 25]
  source = listed_source(entries, [Row("cut", 1), *good(0, 3), Row("image is missing", 0)])
  found = encode_all(source, tmp_path, broken_limit=0.3).metadata
  assert found["rows"] == 100 and found["broken"] == 27 and found["counts"] == {"train": 33}
  assert found["dropped"] == {"image is missing": 26, "tie": 40, "unreadable image": 1}
  assert found["examples"]["image is missing"] == [
    f"part-0.parquet, row {number}" for number in range(70, 90)
  ]
  (cut,) = found["examples"]["unreadable image"]
  assert cut.startswith("part-1.parquet, row 0, image_l: ") and " at 0x" not in cut
  assert "tie" not in found["examples"]


def test_too_many_broken_rows_stop_a_shard_of_a_hundred_at_once(tmp_path):
  bad = [*good(0, 97), *[Row("image is missing", 0)] * 3]
  counting = Counting()
  source = listed_source(good(0, 4), bad, good(4, 9))
  message = r"part-1.parquet: 3 of 100 rows are broken, more than the limit of 1.00% \(image is"
  message += r" missing: part-1.parquet, row 97, part-1.parquet, row 98"
  with pytest.raises(ValueError, match=message):
    encode_all(source, tmp_path, encode_images=counting)
  with pytest.raises(ValueError, match=r"not finished, 1 of 3 shards are encoded; run `dmpo prep"):
    encode.open_encoded(tmp_path, fingerprint="abc")
  first = tmp_path / "encoded_pairs-train.array_record-00000-of-00003"
  before = first.stat().st_mtime_ns
  encoded = encode_all(source, tmp_path, broken_limit=0.03)
  assert encoded.metadata["counts"] == {"train": 106} and first.stat().st_mtime_ns == before


def test_too_many_broken_rows_in_all_stop_at_the_end(tmp_path):
  source = listed_source(*[[*good(0, 9), Row("image is missing", 0)]] * 2)
  source = source._replace(
    splits={"train": [each._replace(name=f"{i}") for i, each in enumerate(source.splits["train"])]}
  )
  with pytest.raises(ValueError, match="listed: 2 of 20 rows are broken"):
    encode_all(source, tmp_path)
  assert not (tmp_path / "metadata.json").exists() and not (tmp_path / "features.json").exists()
  counting = Counting()
  assert len(encode_all(source, tmp_path, broken_limit=0.1, encode_images=counting).splits["train"])
  assert not counting.shapes  # the shards were finished


class Stop(Exception):
  pass


def stop_after(pairs):
  def progress(done, _, __):
    if done == pairs:
      raise Stop

  return progress


def test_an_interrupted_run_goes_on_with_the_shard_it_was_in(tmp_path):
  source = listed_source(good(0, 9), good(9, 20), good(20, 24))
  whole = encode_all(source, tmp_path / "whole")
  with pytest.raises(Stop):
    encode_all(source, tmp_path / "out", progress=stop_after(12))
  assert [path.name for path in (tmp_path / "out").glob("*array_record*")] == [
    "encoded_pairs-train.array_record-00000-of-00003"
  ]
  assert not list((tmp_path / "out").rglob("*.tmp"))
  calls, counting = [], Counting()
  encoded = encode_all(
    source,
    tmp_path / "out",
    encode_images=counting,
    progress=lambda *call: calls.append(call),
  )
  assert calls[:2] == [(9, 1, 3), (10, 1, 3)]
  assert sum(shape[0] for shape in counting.shapes) < whole.metadata["images"]
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  assert encoded.metadata == whole.metadata


def test_a_finished_shard_that_changed_is_encoded_anew(tmp_path):
  source = listed_source(good(0, 9), good(9, 20))
  encode_all(source, tmp_path / "whole")
  with pytest.raises(Stop):
    encode_all(source, tmp_path / "out", progress=stop_after(12))
  (path,) = (tmp_path / "out").glob("*array_record*")
  path.write_bytes(path.read_bytes()[:-7])
  encode_all(source, tmp_path / "out")
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"fingerprint": "xyz"}, r"begun with another fingerprint \(there abc, wanted xyz\);"),
    ({"time_ids": True}, r"time_ids \(there False, wanted True\)"),
    ({"geometry": geometry.Geometry(RESOLUTION, flip=0.5)}, r"geometry \(there .*'flip': 0.0"),
  ],
)
def test_a_folder_begun_with_other_settings_is_refused(tmp_path, settings, message):
  source = listed_source(good(0, 4), good(4, 9))
  with pytest.raises(Stop):
    encode_all(source, tmp_path, progress=stop_after(6))
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=message):
    encode_all(source, tmp_path, **settings)
  with pytest.raises(ValueError, match=r"shards \(there {'train': 2}, wanted {'train': 1}\)"):
    encode_all(listed_source(good(0, 4)), tmp_path)
  assert contents(tmp_path) == before


def test_winner_loser_and_source_are_cropped_alike_and_time_ids_are_the_winners(tmp_path):
  free = geometry.Geometry(RESOLUTION, crop="random", flip=0.5, seed=3)
  entries = [Row("pair", number, edit=True) for number in range(12)]
  source = listed_source(entries)
  encoded = encode_all(source, tmp_path, geometry=free, time_ids=True)
  pairs = zip(source.splits["train"][0].read(), encoded.splits["train"], strict=True)
  for number, (pair, record) in enumerate(pairs):
    drawn = geometry.draw(free, pair.caption, pair.couple, "w")
    for image, moments in (
      (pair.image_w, "moments_w"),
      (pair.image_l, "moments_l"),
      (pair.image_source, "source_moments"),
    ):
      placed = geometry.place(images.decode(image), free, drawn)
      expected = encode_images(images.to_float(placed.pixels)[None])[0].astype(np.float16)
      np.testing.assert_array_equal(record[moments], expected)
      if moments == "moments_w":
        assert record["time_ids"].dtype == np.float32
        np.testing.assert_array_equal(record["time_ids"], placed.time_ids, str(number))
  batch = pipeline.load_split(encoded.splits["train"])
  assert batch.time_ids.shape == (12, 6) and batch.source_moments is not None
  assert batch.time_ids[0, :2].tolist() == [36, 40]


def test_batches_without_time_ids_have_none(tmp_path):
  encoded = encode_all(listed_source(good(0, 4)), tmp_path)
  assert pipeline.load_split(encoded.splits["train"]).time_ids is None


def test_a_source_image_in_some_pairs_only_is_refused(tmp_path):
  entries = [Row("pair", 0, edit=True), Row("pair", 1)]
  with pytest.raises(ValueError, match=r"'caption 1' \(1-2\): expected the arrays .* or none has"):
    encode_all(listed_source(entries), tmp_path / "one")
  with pytest.raises(ValueError, match=r"part-1.parquet has the arrays .*source image or none has"):
    encode_all(listed_source(entries[1:], entries[:1]), tmp_path / "two")


SIX = [good(start, start + 12) for start in range(0, 72, 12)]


def test_missing_shards_are_those_that_would_be_encoded(tmp_path):
  source = listed_source(good(0, 4), good(4, 9), test=[good(9, 11)])
  recipe = encode_shard.Recipe(encode_images, tokenize, SQUARE, False, 8)
  whole = encode_all(source, tmp_path / "whole")
  with pytest.raises(Stop):
    encode_all(source, tmp_path / "out", progress=stop_after(6))
  jobs = encode.missing_shards(source, tmp_path / "out", recipe, fingerprint="abc")
  assert [job.shard.name for job in jobs] == ["part-1.parquet", "test"]
  for job in reversed(jobs):  # in any order, here or elsewhere
    encode_shard.encode_shard(job.shard, job.path, recipe, settings=job.settings, broken_limit=0.01)
  counting = Counting()
  encoded = encode_all(source, tmp_path / "out", encode_images=counting)
  assert not counting.shapes and encoded.metadata == whole.metadata
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  assert encode.missing_shards(source, tmp_path / "out", recipe, fingerprint="abc") == []


def make_recipe():
  return encode_shard.Recipe(encode_images, tokenize, SQUARE, False, 8)


def test_without_beam_its_absence_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(ValueError, match="apache-beam is not installed; run `pip install"):
    beam_encode.encode_source(
      listed_source(good(0, 2)), tmp_path / "out", make_recipe=make_recipe, fingerprint="abc"
    )
  assert not (tmp_path / "out").exists()


class Embedding:
  """A 'text encoder' of two outputs: each row is a function of its ids alone."""

  def __init__(self, scale=1.0):
    self.scale, self.calls = scale, []

  def __call__(self, ids):
    self.calls.append(ids.copy())
    tokens = ids.astype(np.float32)[..., None] * self.scale * np.arange(1, 4, dtype=np.float32)
    return {"prompt_embeds": tokens, "text_embeds": tokens.sum(1)}


class Captioned(NamedTuple):
  """A shard of pairs of the same two pictures; captions are given."""

  name: str
  captions: tuple[str, ...]

  def read(self):
    for position, caption in enumerate(self.captions):
      yield rows.Pair(
        caption, noise_png(0), noise_png(1), 1.0, f"{position}-x", f"{self.name}, row {position}"
      )


def captioned_source(*lists):
  shards = tuple(Captioned(f"part-{i}", tuple(each)) for i, each in enumerate(lists))
  return rows.Source("captioned", {"train": shards}, "cc0", "https://example.org", "1")


def test_embeddings_are_stored_beside_the_ids(tmp_path):
  embedding = Embedding()
  captions = [f"{number % 5} caption" for number in range(12)]
  encoded = encode_all(captioned_source(captions), tmp_path / "out", embed=embedding)
  assert encoded.metadata["prompt_embeds"] is True
  for caption, record in zip(captions, encoded.splits["train"], strict=True):
    ids = tokenize([caption])
    expected = Embedding()(ids)
    np.testing.assert_array_equal(record["input_ids"], ids[0])
    for name in ("prompt_embeds", "text_embeds"):
      assert record[name].dtype == np.float16
      np.testing.assert_array_equal(record[name], expected[name][0].astype(np.float16))
  # Five captions at once, and the empty one.
  assert [len(ids) for ids in embedding.calls] == [5, 1]
  empty, expected = encoded.empty_caption, Embedding()(tokenize([""]))
  assert set(empty) == {"input_ids", "prompt_embeds", "text_embeds"}
  np.testing.assert_array_equal(empty["input_ids"], tokenize([""])[0])
  for name in ("prompt_embeds", "text_embeds"):
    assert empty[name].dtype == np.float16
    np.testing.assert_array_equal(empty[name], expected[name][0].astype(np.float16))
  stored = safetensors.numpy.load_file(tmp_path / "out" / "empty_caption.safetensors")
  assert set(stored) == set(empty)
  for name, value in stored.items():
    np.testing.assert_array_equal(value, empty[name])
  batch = pipeline.load_split(encoded.splits["train"])
  assert batch.prompt_embeds.shape == (12, 10, 3) and batch.text_embeds.shape == (12, 3)
  calls = len(embedding.calls)
  again = encode_all(captioned_source(captions), tmp_path / "out", embed=embedding)
  assert len(embedding.calls) == calls and again.metadata == encoded.metadata


def test_distinct_captions_are_embedded_once_in_full_batches(tmp_path):
  """200 captions of one shard, two pictures: nothing is embedded twice, no batch is over 64."""
  embedding = Embedding()
  captions = [f"{number % 200} caption" for number in range(500)]
  encode_all(captioned_source(captions), tmp_path, embed=embedding)
  assert [len(ids) for ids in embedding.calls] == [64, 64, 64, 8, 1]
  assert len(np.unique(np.concatenate(embedding.calls), axis=0)) == 201


def test_bounds_on_captions_in_memory_change_nothing(tmp_path, monkeypatch):
  captions = [f"{number % 90} caption" for number in range(200)]
  source = captioned_source(captions)
  whole, bounded = Embedding(), Embedding()
  encode_all(source, tmp_path / "whole", embed=whole)
  monkeypatch.setattr(encode_shard, "_CACHED_CAPTIONS", 10)
  monkeypatch.setattr(encode_shard, "_WAITING_BATCHES", 2)
  encode_all(source, tmp_path / "bounded", embed=bounded)
  assert len(bounded.calls) > len(whole.calls)  # the bounds did bite
  assert contents(tmp_path / "whole") == contents(tmp_path / "bounded")


def test_without_embeddings_nothing_speaks_of_them(tmp_path):
  encoded = encode_all(listed_source(good(0, 4)), tmp_path)
  assert encoded.metadata["prompt_embeds"] is False
  assert list(encoded.empty_caption) == ["input_ids"]
  np.testing.assert_array_equal(encoded.empty_caption["input_ids"], tokenize([""])[0])
  assert not any(b"embeds" in content for content in contents(tmp_path).values())
  assert not (tmp_path / "empty_caption.safetensors").exists()


def test_an_interrupted_run_with_embeddings_goes_on_and_keeps_its_choice(tmp_path):
  source = listed_source(good(0, 9), good(9, 20), good(20, 24))
  whole = encode_all(source, tmp_path / "whole", embed=Embedding())
  with pytest.raises(Stop):
    encode_all(source, tmp_path / "out", embed=Embedding(), progress=stop_after(12))
  assert not (tmp_path / "out" / "empty_caption.safetensors").exists()
  before = contents(tmp_path / "out")
  with pytest.raises(ValueError, match=r"begun with another prompt_embeds \(there True, wanted F"):
    encode_all(source, tmp_path / "out")
  assert contents(tmp_path / "out") == before
  encoded = encode_all(source, tmp_path / "out", embed=Embedding())
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  assert encoded.metadata == whole.metadata
  with pytest.raises(ValueError, match=r"made with another prompt_embeds \(there True, wanted Fal"):
    encode_all(source, tmp_path / "out")
  encode_all(source, tmp_path / "plain")
  with pytest.raises(ValueError, match=r"made with another prompt_embeds \(there False, wanted Tr"):
    encode_all(source, tmp_path / "plain", embed=Embedding())
  message = r"or with another data.prompt_embeds \(there True\); run `dmpo prepare` into another"
  with pytest.raises(ValueError, match=message):
    encode.open_encoded(tmp_path / "out", fingerprint="xyz")


@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_file_of_the_empty_caption_is_named(tmp_path, keep):
  encode_all(listed_source(good(0, 4)), tmp_path, embed=Embedding())
  path = tmp_path / "empty_caption.safetensors"
  data = path.read_bytes()
  path.write_bytes(data[:keep])
  with pytest.raises(ValueError, match="empty_caption.safetensors: truncated or damaged: expected"):
    encode.open_encoded(tmp_path, fingerprint="abc")
  path.write_bytes(bytes(len(data)))
  with pytest.raises(ValueError, match="damaged .*run `dmpo prepare` again"):
    encode.open_encoded(tmp_path, fingerprint="abc")


@pytest.mark.parametrize(
  ("embed", "message"),
  [
    (Embedding(1e3), "prompt_embeds are not finite in float16: the text encoder gave .* 'caption"),
    (
      lambda ids: {"text_embeds": np.zeros((len(ids), 2))},
      r"expected prompt_embeds \[3, 10, D",
    ),
    (lambda ids: {"prompt_embeds": np.zeros((len(ids), 9, 2))}, r"got {'prompt_embeds': \[3, 9, 2"),
    (lambda ids: {"prompt_embeds": np.zeros((1, 10, 2))}, r"got {'prompt_embeds': \[1, 10, 2\]}"),
    (lambda ids: {"prompt_embeds": np.zeros((len(ids), 10))}, r"got {'prompt_embeds': \[3, 10\]}"),
  ],
)
def test_embeddings_that_cannot_be_stored_are_refused(tmp_path, embed, message):
  with pytest.raises(ValueError, match=message):
    encode_all(listed_source(good(0, 6)), tmp_path, embed=embed)
  assert not list(tmp_path.glob("*array_record*"))


CHILD = """
import sys
import test_encode as t

def encode_images(batch):
  print("batch", flush=True)
  sys.stdin.readline()
  return t.encode_images(batch)

t.encode_all(t.listed_source(*t.SIX), sys.argv[1], encode_images=encode_images)
"""


def start_child(folder, code):
  return subprocess.Popen(
    [sys.executable, "-c", code, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parent,
  )


@pytest.mark.slow
def test_killed_five_times_the_result_is_that_of_an_uninterrupted_run(tmp_path):
  """A shard is three batches; the child asks before each, so that it never gets to the end."""
  whole = encode_all(listed_source(*SIX), tmp_path / "whole")
  generator = random.Random(0)
  for batches in (4, 3, 2, 3, 3):
    child = start_child(tmp_path / "out", CHILD)
    for _ in range(batches):
      assert child.stdout.readline() == "batch\n"
      child.stdin.write("\n")
      child.stdin.flush()
    time.sleep(generator.uniform(0.0, 0.03))  # it decodes, writes, renames
    child.kill()
    child.communicate()
    assert child.returncode == -9
    assert not (tmp_path / "out" / "features.json").exists()
  finished = len(list((tmp_path / "out" / "shards").glob("enc*.json")))
  assert 0 < finished < 6
  calls = []
  encoded = encode_all(
    listed_source(*SIX), tmp_path / "out", progress=lambda *call: calls.append(call)
  )
  assert calls[: finished + 1] == [(12 * i, i, 6) for i in range(1, finished + 1)] + [
    (12 * finished + 1, finished, 6)
  ]
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")
  assert encoded.metadata == whole.metadata
  for record, expected in zip(encoded.splits["train"], whole.splits["train"], strict=True):
    assert record["couple"] == expected["couple"]
    np.testing.assert_array_equal(record["moments_l"], expected["moments_l"])


FULL = """
import resource, sys
import test_encode as t

lists = [t.good(0, 12), [t.Row("pair", i) for i in range(3000)]]
limit = 2**18  # a file of array_record takes at least 2**17 bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
  t.encode_all(t.listed_source(*lists), sys.argv[1])
except OSError as error:
  print("OSError:", error)
"""


@pytest.mark.slow
def test_a_full_disk_is_an_error_with_the_path_and_finished_shards_stay(tmp_path):
  child = start_child(tmp_path / "out", FULL)
  output, errors = child.communicate()
  assert child.returncode == 0, errors
  assert "train.array_record-00001-of-00002" in output and "File too large" in output
  assert "finished shards are kept" in output
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert names == {"shards", "started.json", "encoded_pairs-train.array_record-00000-of-00002"}
  calls = []
  encode_all(
    listed_source(good(0, 12), good(12, 15)),
    tmp_path / "out",
    progress=lambda *call: calls.append(call),
  )
  assert calls[0] == (12, 1, 2)
