"""The TFDS builder over real files of several sources."""

import io
import json
import subprocess
import sys

import numpy as np
import pair_files
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dmpo_jax.data import rows
from dmpo_jax.data.preference_pairs import preference_pairs_dataset_builder as builders
from dmpo_jax.data.sources import registry

# Built and read in a process of its own, so that no other test can have imported TensorFlow.
BUILD = """
import sys
from dmpo_jax.data.preference_pairs import preference_pairs_dataset_builder as builders
from dmpo_jax.data.sources import registry
import tensorflow_datasets as tfds
tfds.disable_progress_bar()
source = registry.open_source(sys.argv[1], sys.argv[2])
builder = builders.Builder(source, data_dir=sys.argv[3])
builder.download_and_prepare()
records = tfds.builder_from_directory(builder.data_dir).as_data_source("train")
assert records[len(records) - 1]["image_w"].shape == (72, 72, 3)
found = [name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")]
assert not found, found
print(builder.data_dir)
"""


def build(name, path, folder):
  done = subprocess.run(
    [sys.executable, "-c", BUILD, name, str(path), str(folder)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return tfds.builder_from_directory(done.stdout.splitlines()[-1])


def read(builder, split):
  fields = [field for field in builder.info.features if field.startswith("image")]
  skip = dict.fromkeys(fields, tfds.decode.SkipDecoding())
  return list(builder.as_data_source(split, decoders=skip))


def metadata(builder):
  return json.loads((builder.data_path / "metadata.json").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """Pick-a-Pic of two splits with ties and broken rows; a third without any pair."""
  folder = tmp_path_factory.mktemp("v2")
  labels = [1.0, 0.0, 0.5, 1.0, 0.5]
  table = [pair_files.pickapic_row(index, label) for index, label in enumerate(labels)]
  table += [pair_files.pickapic_row(5, jpg_0=None), pair_files.pickapic_row(6, caption="")]
  pair_files.write_pickapic(folder / "train-0.parquet", table)
  pair_files.write_pickapic(folder / "train-1.parquet", [pair_files.pickapic_row(7, 0.0)])
  pair_files.write_pickapic(folder / "test-0.parquet", [pair_files.pickapic_row(8)])
  pair_files.write_pickapic(folder / "validation-0.parquet", [pair_files.pickapic_row(9, 0.5)])
  return folder, build("pickapic_v2", folder, tmp_path_factory.mktemp("tfds"))


def test_the_records_are_the_pairs(built):
  folder, builder = built
  source = registry.open_source("pickapic_v2", folder)
  assert builder.info.full_name == f"preference_pairs/pickapic_v2-{source.fingerprint}/1.0.0"
  assert builder.info.file_format.value == "array_record"
  assert set(builder.info.features) == {"caption", "image_w", "image_l", "p_choice", "couple"}
  assert set(builder.info.splits) == {"train", "test"}
  for split in ("train", "test"):
    wanted = {
      (row.caption.encode(), row.image_w, row.image_l, row.p_choice, row.couple.encode())
      for shard in source.splits[split]
      for row in shard.read()
      if isinstance(row, rows.Pair)
    }
    found = [
      (record["caption"], record["image_w"], record["image_l"], float(record["p_choice"]))
      + (record["couple"],)
      for record in read(builder, split)
    ]
    assert len(found) == len(wanted) and set(found) == wanted


def test_what_was_left_out_is_counted_by_reason(built):
  folder, builder = built
  fingerprint = registry.open_source("pickapic_v2", folder).fingerprint
  assert metadata(builder) == {
    "source": "pickapic_v2",
    "licence": None,
    "fingerprint": fingerprint,
    "train": {
      "pairs": 4,
      "left_out": {"tie": 2},
      "broken": {"image is missing": 1, "caption is empty": 1},
    },
    "test": {"pairs": 1, "left_out": {}, "broken": {}},
  }
  text = " ".join(builder.info.description.split())
  assert "source pickapic_v2 (licence: not stated)" in text
  assert "Ties and broken rows are left out" in text


def test_images_are_decoded_as_they_were_stored(built):
  _, builder = built
  (record,) = builder.as_data_source("test")
  with Image.open(io.BytesIO(pair_files.picture(16))) as image:
    # Decoders of JPEG differ by a level or two.
    np.testing.assert_allclose(record["image_w"], np.asarray(image), atol=3)


def test_edits_keep_the_image_that_they_start_from(tmp_path):
  pair_files.write_images(tmp_path, "before.webp")
  pair_files.write_own_pairs(tmp_path, 2, "train.jsonl", source="before.webp")
  extra = {"caption": "p", "winner": "images/0.png", "loser": "images/1.jpg"}
  with (tmp_path / "train.jsonl").open("a") as stream:
    stream.write(json.dumps(extra) + "\n")
  source = registry.open_source("pairs", tmp_path, validation_share=0.0)
  builder = builders.Builder(source, data_dir=tmp_path / "tfds")
  builder.download_and_prepare()
  records = read(builder, "train")
  assert len(records) == 2
  assert {record["image_source"] for record in records} == {pair_files.picture(0, "WEBP")}
  broken = {"image_source is missing or is not on all rows": 1}
  assert metadata(builder)["train"] == {"pairs": 2, "left_out": {}, "broken": broken}
  assert "both are edits of" in builder.info.description


def test_another_source_is_another_data_set(tmp_path):
  pair_files.write_own_pairs(tmp_path, 2)
  first = builders.Builder(registry.open_source("pairs", tmp_path), data_dir=tmp_path / "tfds")
  pair_files.write_own_pairs(tmp_path, 3)
  second = builders.Builder(registry.open_source("pairs", tmp_path), data_dir=tmp_path / "tfds")
  assert first.data_dir != second.data_dir
  emoji = builders.Builder(registry.open_source("emoji_choice/top160"), data_dir=tmp_path)
  assert emoji.info.full_name.startswith("preference_pairs/emoji_choice_top160-")


def test_a_source_without_pairs_is_refused(tmp_path):
  pair_files.write_jsonl(tmp_path / "all.jsonl", ["{", "{"])
  source = registry.open_source("pairs", tmp_path)
  with pytest.raises(ValueError, match=r"pairs: no pair in any of its splits \['train', 'valid"):
    builders.Builder(source, data_dir=tmp_path)
