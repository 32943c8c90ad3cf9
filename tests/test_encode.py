import io
import itertools
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from dmpo_jax.data import encode, images, pipeline
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


def run(builder, folder, **settings):
  settings = {
    "encode_images": encode_images,
    "tokenize": tokenize,
    "resolution": RESOLUTION,
    "fingerprint": "abc",
    "batch_size": 8,
  } | settings
  return encode.encode_pairs(builder, folder, **settings)


def raw(builder, split):
  return list(builder.as_data_source(split))


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


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_are_full_and_pictures_encoded_once(builder, tmp_path, batch_size):
  counting = Counting()
  encoded = run(builder, tmp_path / "out", encode_images=counting, batch_size=batch_size)
  assert set(counting.shapes) == {(batch_size, RESOLUTION, RESOLUTION, 3)}
  pictures = {
    record[field].tobytes()
    for split in encoded.splits
    for record in raw(builder, split)
    for field in ("image_w", "image_l")
  }
  assert encoded.metadata["images"] == len(pictures)
  # One partly filled batch at the end of each split at most.
  assert len(counting.shapes) <= len(pictures) // batch_size + 3


def test_the_bounds_on_memory_change_nothing(builder, tmp_path, monkeypatch):
  whole = run(builder, tmp_path / "whole")
  monkeypatch.setattr(encode, "_CACHED_IMAGES", 4)
  monkeypatch.setattr(encode, "_WAITING_BATCHES", 1)
  monkeypatch.setattr(encode, "_WRITTEN_TOGETHER", 3)
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
  total = sum(encoded.metadata["counts"].values())
  assert calls == [(done, total) for done in range(1, total + 1)]
  again = encode.open_encoded(tmp_path / "out", fingerprint="abc")
  assert again.metadata == encoded.metadata
  assert again.metadata["source"] == "emoji_choice/top80x/1.0.0"
  assert again.metadata["resolution"] == RESOLUTION
  assert again.empty_ids.dtype == np.int32
  np.testing.assert_array_equal(again.empty_ids, tokenize([""])[0])


def test_the_pipeline_reads_it(builder, tmp_path):
  encoded = run(builder, tmp_path / "out")
  source = encoded.splits["train"]
  batches = pipeline.preference_batches(
    source, seed=0, batch_size=4, caption_dropout=0.5, empty_ids=encoded.empty_ids
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
  before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  message = r"made with another fingerprint \(there abc, wanted xyz\), resolution \(there 32,"
  with pytest.raises(ValueError, match=message):
    run(builder, tmp_path / "out", fingerprint="xyz", resolution=64)
  other = build(tmp_path / "raw", 30)
  with pytest.raises(ValueError, match=r"another source \(there emoji_choice/top80x/1.0.0"):
    run(other, tmp_path / "out")
  assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_with_something_else_is_left_alone(builder, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "thesis.txt").write_text("precious")
  with pytest.raises(ValueError, match="out: not an encoded data set .*give another folder"):
    run(builder, tmp_path / "out")
  assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_an_interrupted_run_leaves_no_folder_and_the_next_one_cleans_up(builder, tmp_path):
  class Stop(Exception):
    pass

  def stop(done, total):
    if done == total // 2:
      raise Stop

  with pytest.raises(Stop):
    run(builder, tmp_path / "out", progress=stop)
  assert list(tmp_path.iterdir()) == []
  killed = tmp_path / ".out.x1y2.draft"  # what kill -9 leaves
  killed.mkdir()
  (tmp_path / ".other.x1y2.draft").mkdir()
  run(builder, tmp_path / "out")
  assert sorted(path.name for path in tmp_path.iterdir()) == [".other.x1y2.draft", "out"]


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
  with pytest.raises(ValueError, match="train.array_record-00000: truncated or damaged: expected"):
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
    ({"batch_size": 0}, "batch_size and resolution of at least 1, got batch_size 0"),
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
  assert list(tmp_path.iterdir()) == []


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


def test_a_broken_picture_is_named(tmp_path):
  tiny = Tiny(b"\x89PNG\r\n\x1a\nnothing", FIELDS, data_dir=tmp_path / "raw")
  with pytest.raises(ValueError, match="tiny/1.0.0: holds no pairs; run its download_and_prepare"):
    run(tiny, tmp_path / "out")
  tiny.download_and_prepare()
  message = r"split train, pair 1 \('a cat'\), image_l: not a readable picture"
  with pytest.raises(ValueError, match=message):
    run(tiny, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_source_without_a_feature_is_refused(tmp_path):
  tiny = Tiny(b"", FIELDS[:3], data_dir=tmp_path / "raw")
  tiny.download_and_prepare()
  with pytest.raises(ValueError, match=r"lacks the features \['p_choice', 'couple'\]"):
    run(tiny, tmp_path / "out")


def test_few_emoji_may_leave_a_split_out(tmp_path):
  encoded = run(build(tmp_path / "raw", 8), tmp_path / "out")
  assert encoded.metadata["counts"] == {"train": 7, "test": 4}
