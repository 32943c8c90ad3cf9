"""The user's own pairs and Pick-a-Pic's files, from the disk to a trained model."""

import json

import numpy as np
import pair_files
import pytest
import tiny
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import cli, stages, train
from dmpo_jax.data import pipeline

FREE = {"batch_size": 8, "data.dataset": "pairs", "data.resize": "bilinear", "data.flip": 0.5}


def overrides(base, path, **more):
  return tiny.overrides(base, **{**FREE, "data.path": path, **more})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse")
def test_from_a_folder_to_images(tiny_base, tmp_path, capsys):
  settings = overrides(tiny_base, pair_files.write_drawings(tmp_path / "own", 60))
  data = ["--data", str(tmp_path / "data")]
  assert cli.main(["prepare", *data, *settings]) == 0, capsys.readouterr().err
  assert cli.main(["train", *data, "--out", str(tmp_path / "run"), *settings]) == 0
  arguments = ["--run", str(tmp_path / "run"), "--prompt", "drawing 3"]
  assert cli.main(["sample", *arguments, "--out", str(tmp_path / "images"), *settings]) == 0
  with Image.open(tmp_path / "images" / "grid.png") as grid:
    assert grid.size == (8, 8)
  # Emoji measures say nothing about other pictures.
  arguments = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "evaluation")]
  assert cli.main(["evaluate", *arguments, *settings]) == 2
  assert "pairs cannot be measured yet" in capsys.readouterr().err


@pytest.mark.slow
def test_prepare_counts_what_it_leaves_out_and_goes_on(tiny_base, tmp_path, capsys):
  rows = [pair_files.pickapic_row(index, [1.0, 0.0, 0.5][index % 3]) for index in range(30)]
  folder = tmp_path / "pickapic" / "data"
  pair_files.write_pickapic(folder / "train-00000-of-00002.parquet", rows[:20])
  pair_files.write_pickapic(folder / "train-00001-of-00002.parquet", rows[20:])
  more = {"data.dataset": "pickapic_v2", "data.validation_share": 0.0}
  config = tiny.config(tiny_base, **{**FREE, **more, "data.path": tmp_path / "pickapic"})
  base = base_lib.load_base(config.base)
  encoded = stages.prepare(config, base, tmp_path / "data")
  assert encoded.metadata["counts"] == {"train": 20}
  assert encoded.metadata["dropped"] == {"tie": 10}
  captions = {encoded.splits["train"][i]["caption"] for i in range(20)}
  assert captions == {f"emoji {index}" for index in range(30) if index % 3 < 2}
  again = stages.prepare(config, base, tmp_path / "data")
  assert again.metadata == encoded.metadata


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse")
def test_two_data_sets_are_mixed(tiny_base, tmp_path, capsys):
  own = overrides(tiny_base, pair_files.write_drawings(tmp_path / "own", 20))
  rows = [pair_files.pickapic_row(index) for index in range(30)]
  pair_files.write_pickapic(tmp_path / "p" / "train-00000-of-00001.parquet", rows)
  other = overrides(tiny_base, tmp_path / "p", **{"data.dataset": "pickapic_v2"})
  data = ["--data", str(tmp_path / "data")]
  for settings in (own, other):
    assert cli.main(["prepare", *data, *settings]) == 0, capsys.readouterr().err
  # The path is that of one of the two; the mixture reads neither.
  mix = [*own, "--config.data.mixture=pairs=1 pickapic_v2=3", "--config.data.workers=1"]
  assert cli.main(["train", *data, "--out", str(tmp_path / "run"), *mix]) == 0
  config = train.read_run(tmp_path / "run")
  encoded = stages.open_data(config, base_lib.load_base(config.base), tmp_path / "data")
  names = pipeline.record_ids(encoded.splits["train"], seed=0, batch_size=40, step=0)
  assert sum(name.startswith("emoji") for name in names) == 30
  assert cli.main(["prepare", *data, *mix]) == 2
  assert "data.mixture: is of sets that are prepared" in capsys.readouterr().err
  wrong = [*own, "--config.data.mixture=pairs=1 hpdv3=3"]
  assert cli.main(["train", *data, "--out", str(tmp_path / "other"), *wrong]) == 2
  assert "hpdv3: no encoded data set there" in capsys.readouterr().err


@pytest.mark.slow
def test_pick_a_pic_holds_out_captions_for_validation(tiny_base, tmp_path, capsys):
  rows = [pair_files.pickapic_row(index) for index in range(60)]
  pair_files.write_pickapic(tmp_path / "p" / "train-00000-of-00001.parquet", rows)
  more = {"data.dataset": "pickapic_v2", "data.validation_share": 0.3}
  data = ["--data", str(tmp_path / "data")]
  assert cli.main(["prepare", *data, *overrides(tiny_base, tmp_path / "p", **more)]) == 0
  config = tiny.config(tiny_base, **{**FREE, **more, "data.path": tmp_path / "p"})
  encoded = stages.open_data(config, base_lib.load_base(config.base), tmp_path / "data")
  train_pairs, held = (encoded.splits[split] for split in ("train", "validation"))
  assert len(held) > 5 and len(train_pairs) + len(held) == 60
  captions = [{pairs[i]["caption"] for i in range(len(pairs))} for pairs in (train_pairs, held)]
  assert not captions[0] & captions[1]


def test_winner_and_loser_keep_their_sides(tiny_base, tmp_path):
  """The moments of a pair are those of its own pictures, whichever column the winner stood in."""
  rows = [pair_files.pickapic_row(0, 1.0), pair_files.pickapic_row(0, 0.0, caption="other")]
  pair_files.write_pickapic(tmp_path / "p" / "train-00000-of-00001.parquet", rows)
  more = {"data.dataset": "pickapic_v2", "data.flip": 0.0, "data.validation_share": 0.0}
  config = tiny.config(tiny_base, **{**FREE, **more, "data.path": tmp_path / "p"})
  encoded = stages.prepare(config, base_lib.load_base(config.base), tmp_path / "data")
  first, second = (encoded.splits["train"][i] for i in range(2))
  np.testing.assert_array_equal(first["moments_w"], second["moments_l"])
  np.testing.assert_array_equal(first["moments_l"], second["moments_w"])
  assert np.any(first["moments_w"] != first["moments_l"])


@pytest.mark.parametrize(
  ("dataset", "path", "message"),
  [
    ("pickapic_v3", None, "data.dataset: expected one of "),
    ("pairs", None, "data.path: expected the folder where it lies, for pairs, got None"),
    ("emoji_choice/top160", "x", "data.path: expected None: it comes with installed packages"),
    ("pairs", "/none/such", "/none/such"),
  ],
)
def test_bad_settings(tiny_base, tmp_path, capsys, dataset, path, message):
  settings = overrides(tiny_base, path, **{"data.dataset": dataset})
  assert cli.main(["prepare", "--data", str(tmp_path / "data"), *settings]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_too_many_broken_rows_stop_with_examples(tiny_base, tmp_path, capsys):
  folder = pair_files.write_drawings(tmp_path / "own", 60, broken=3)
  settings = overrides(tiny_base, folder)
  assert cli.main(["prepare", "--data", str(tmp_path / "data"), *settings]) == 2
  error = capsys.readouterr().err
  assert "broken" in error and "pairs.jsonl, line 1" in error
  settings = overrides(tiny_base, folder, **{"data.broken_limit": 0.1})
  assert cli.main(["prepare", "--data", str(tmp_path / "data"), *settings]) == 0
  metadata = json.loads(next((tmp_path / "data").rglob("metadata.json")).read_text())
  assert metadata["broken"] == 3
