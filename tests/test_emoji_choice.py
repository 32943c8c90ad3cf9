import collections
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import pairs as pairs_lib

# Built and read in a process of its own, so that no other test can have imported TensorFlow.
BUILD = """
import sys
from dmpo_jax.data.emoji_choice import emoji_choice_dataset_builder as builders
import tensorflow_datasets as tfds
tfds.disable_progress_bar()
builder = builders.Builder(data_dir=sys.argv[1])
builder.download_and_prepare()
source = tfds.builder_from_directory(builder.data_dir).as_data_source("train")
assert source[len(source) - 1]["image_w"].shape == (72, 72, 3)
found = [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
assert not found, found
print(builder.data_dir)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  done = subprocess.run(
    [sys.executable, "-c", BUILD, str(tmp_path_factory.mktemp("tfds"))],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return tfds.builder_from_directory(done.stdout.splitlines()[-1])


def read(builder, split):
  skip = tfds.decode.SkipDecoding()
  return list(builder.as_data_source(split, decoders={"image_w": skip, "image_l": skip}))


def make_emoji(character, uses, *keywords):
  return emoji_lib.Emoji(character, keywords[0], keywords, uses, pathlib.Path())


@pytest.mark.parametrize(
  ("count", "expected"), [(160, (156, 1614, 820)), (None, (630, 7415, 5375))]
)
def test_the_join_gives_so_many_prompts_pairs_and_couples(count, expected):
  pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(count))
  found = len({pair.caption for pair in pairs}), len(pairs), len({pair.couple for pair in pairs})
  assert found == expected


def test_known_choices():
  pairs = {
    (pair.caption, pair.winner.character, pair.loser.character): pair
    for pair in pairs_lib.form_pairs(emoji_lib.load_emoji(160))
  }
  love = pairs["love", "\u2764", "\U0001f495"]  # red heart 8050, two hearts 2400
  assert love.couple == "1f495-2764"
  assert love.p_choice == 8050 / (8050 + 2400)
  assert ("sad", "\U0001f62d", "\U0001f629") in pairs  # loudly crying 5526, weary 1808
  assert ("love", "\U0001f495", "\u2764") not in pairs


def test_the_rule_at_its_two_borders():
  assert not pairs_lib.is_preferred(199, 100)  # z = 5.7, but less than twice
  assert pairs_lib.is_preferred(200, 100)
  assert not pairs_lib.is_preferred(38, 19)  # z = 19 / sqrt(57) = 2.517
  assert pairs_lib.is_preferred(40, 20)  # z = 20 / sqrt(60) = 2.582
  assert not pairs_lib.is_preferred(5, 5) and not pairs_lib.is_preferred(0, 0)


def test_pairs_of_three_by_hand():
  emoji = (
    make_emoji("a", 1000, "one", "pet"),
    make_emoji("b", 400, "two", "pet"),
    make_emoji("c", 399, "three", "pet", "alone"),
  )
  found = [
    (pair.caption, pair.winner.character, pair.loser.character, round(pair.p_choice, 4))
    for pair in pairs_lib.form_pairs(emoji)
  ]
  assert found == [("pet", "a", "b", 0.7143), ("pet", "a", "c", 0.7148)]


@pytest.mark.parametrize("count", [80, 160, None])
def test_splits_share_no_couple(count):
  pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(count))
  splits = pairs_lib.split_pairs(pairs)
  assert list(splits) == ["train", "validation", "test"] and all(splits.values())
  couples = [{pair.couple for pair in members} for members in splits.values()]
  assert len(set.union(*couples)) == sum(map(len, couples))
  assert sum(map(len, splits.values())) == len(pairs)


def test_sizes_of_the_splits():
  pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(160))
  splits = pairs_lib.split_pairs(pairs)
  assert {split: len(members) for split, members in splits.items()} == {
    "train": 1137,
    "validation": 153,
    "test": 324,
  }
  counted = collections.Counter(pairs_lib.assign_couples(pairs).values())
  assert counted == {"test": 164, "validation": 82, "train": 574}


def test_the_split_does_not_depend_on_the_order_of_pairs():
  pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(160))
  assert pairs_lib.assign_couples(pairs) == pairs_lib.assign_couples(pairs[::-1])


def test_the_data_set_holds_exactly_the_pairs(built):
  assert built.info.full_name == "emoji_choice/top160/1.0.0"
  assert built.info.file_format.value == "array_record"
  assert set(built.info.features) == {"caption", "image_w", "image_l", "p_choice", "couple"}
  pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(160))
  for split, members in pairs_lib.split_pairs(pairs).items():
    records = read(built, split)
    found = {(record["caption"].decode(), record["couple"].decode()) for record in records}
    assert len(found) == len(records) == built.info.splits[split].num_examples
    assert found == {(pair.caption, pair.couple) for pair in members}


def test_a_record_holds_both_drawings_in_their_roles(built):
  pairs = {
    (pair.caption, pair.couple): pair for pair in pairs_lib.form_pairs(emoji_lib.load_emoji(160))
  }
  for record in read(built, "validation")[::40]:
    pair = pairs[record["caption"].decode(), record["couple"].decode()]
    assert record["p_choice"] == pytest.approx(pair.p_choice, rel=1e-6)
    for field, emoji in (("image_w", pair.winner), ("image_l", pair.loser)):
      with Image.open(io.BytesIO(record[field])) as image:
        assert image.format == "PNG" and image.size == (72, 72)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(emoji_lib.draw(emoji)))


def test_description_and_metadata_say_what_it_is(built):
  text = " ".join(built.info.description.split())
  for words in (
    "revealed choice",
    "no ties by construction",
    "A held-out couple is in no training pair",
    "CC-BY 4.0",
    "CC BY-SA 4.0",
    "emojilib, MIT",
  ):
    assert words in text, words
  assert "11356/1048" in built.info.citation
  metadata = json.loads((built.data_path / "metadata.json").read_text())
  assert metadata == {
    "emoji": 160,
    "prompts": 156,
    "pairs": 1614,
    "couples": 820,
  }


def test_too_many_emoji_are_refused():
  with pytest.raises(ValueError, match="number of emoji: expected 2 to 736, got 737"):
    emoji_lib.load_emoji(737)


def test_a_missing_package_is_named():
  with pytest.raises(ValueError, match="needs the package 'no-such', .* pip install no-such"):
    emoji_lib.package_folder("no_such_module", "no-such")
