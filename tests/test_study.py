"""The study's rules: equal passes, swapped pairs, what is chosen and what its tables say."""

import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from dmpo_jax import report_style
from dmpo_jax.data import encode

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "study.py"
TINY = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(dict(
    passes=2 * 8 * 8, updates=None, validation_images=2, test_images=2, sweep_seed=0, seeds=(1,),
    lost_match=1.0, grown_rmse=10.0, noise=(0.5,), noisy=("dpo",),
    methods={"dpo": ("emoji_dpo", ("objective.beta=500.0", "objective.beta=1000.0"))},
  ))
"""
PROMPTS = 20


def load(script):
  spec = importlib.util.spec_from_file_location(script.stem, script)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def study():
  return load(SCRIPT)


def shipped(study, name="emoji"):
  return study.read_settings(str(SCRIPT.parents[1] / "configs" / "study" / f"{name}.py"))


def small(**changes):
  methods = {
    "dmpo": ("emoji_dmpo", ("objective.beta=500.0", "objective.beta=1000.0")),
    "sft": ("emoji_sft", ("optim.learning_rate=2e-5", "optim.learning_rate=1e-4")),
  }
  return ml_collections.ConfigDict(
    {**dict(methods=methods, passes=64_000, updates=None), **changes}
  )


def write(made, cell, *, win, match=0.9, rmse=0.04):
  """A result as of a run, alike for all prompts."""
  result = {
    "win": [win] * PROMPTS,
    "heldout_win": [[win, float("nan")]] * PROMPTS,
    "match": [match] * PROMPTS,
    "rmse": [rmse] * PROMPTS,
    "diversity": [0.5] * PROMPTS,
    "winner_advantage": -0.001,
    "loser_advantage": -0.002,
    "steps": 250,
    "base": {"match": 0.9, "rmse": 0.04, "diversity": 0.5},
  }
  folder = made.out / cell.name
  folder.mkdir(parents=True)
  (folder / f"{cell.split}.json").write_text(json.dumps(result))


def test_every_row_and_setting_is_a_configuration_and_costs_the_same(study, tmp_path):
  settings = shipped(study)
  made = study.Study(settings, tmp_path, [])
  names = set()
  for row, (_, tried) in settings.methods.items():
    for cell in made.sweep(row):
      config = made.config(cell)
      spent = config.steps * config.batch_size * study.passes_a_pair(config)
      # A whole number of updates: at most half of one more or less.
      assert abs(spent - settings.passes) <= 0.5 * spent / config.steps
      assert config.seed == settings.sweep_seed
      names.add(cell.name)
    assert len(set(tried)) == len(tried)
  assert len(names) == sum(len(tried) for _, tried in settings.methods.values())
  assert settings.sweep_seed not in settings.seeds


def test_equal_updates_take_the_place_of_equal_passes(study, tmp_path):
  made = study.Study(shipped(study, "emoji_updates"), tmp_path, [])
  cells = [cell for row in made.settings.methods for cell in made.sweep(row)]
  assert {made.config(cell).steps for cell in cells} == {250}
  assert len({cell.name for cell in cells}) == len(cells)
  assert {"inpo", "seppo"} < set(made.settings.methods)
  write(made, cells[0], win=0.5)
  made.run_all(cells[:1], 1)  # there are its 250 updates already
  other = study.Study(ml_collections.ConfigDict({**made.settings, "updates": 100}), tmp_path, [])
  with pytest.raises(ValueError, match="has 250 updates, expected 100: another study's; give ano"):
    other.run_all(cells[:1], 1)


def test_swapped_pairs_are_a_share_and_the_same_ones_again(study):
  pairs = [{"moments_w": np.full(2, i), "moments_l": np.full(2, -i)} for i in range(1, 41)]
  encoded = encode.Encoded({"train": pairs, "validation": pairs}, {}, {})
  assert study.swap(encoded, 0.0) is encoded
  swapped = study.swap(encoded, 0.25)
  train = swapped.splits["train"]
  turned = [i for i in range(len(train)) if train[i]["moments_w"][0] < 0]
  assert len(turned) == 10 and len(train) == 40
  assert turned == [i for i in range(40) if study.swap(encoded, 0.25).splits["train"].chosen[i]]
  assert all(train[i]["moments_l"][0] == i + 1 for i in turned)
  assert swapped.splits["validation"] is pairs
  assert pairs[turned[0]]["moments_w"][0] > 0


def test_chosen_is_the_best_that_keeps_within_the_bounds(study, tmp_path):
  settings = small(sweep_seed=0, lost_match=0.02, grown_rmse=1.25, seeds=(1,))
  made = study.Study(settings, tmp_path, [])
  dmpo, sft = made.sweep("dmpo"), made.sweep("sft")
  assert made.chosen("dmpo") is None
  write(made, dmpo[0], win=0.6)
  assert made.chosen("dmpo") is None
  write(made, dmpo[1], win=0.9, rmse=0.06)
  assert made.chosen("dmpo") == ("objective.beta=500.0", True)
  write(made, sft[0], win=0.9, match=0.7, rmse=0.045)
  write(made, sft[1], win=0.8, match=0.7)
  assert made.chosen("sft") == ("optim.learning_rate=1e-4", False)


def test_the_tables(study, tmp_path):
  settings = small(
    sweep_seed=0, lost_match=0.02, grown_rmse=1.25, seeds=(1, 2), noise=(0.2,), noisy=("dmpo",)
  )
  made = study.Study(settings, tmp_path, [])
  assert study.show(made).count("not done") == 2
  for row in settings.methods:
    for number, cell in enumerate(made.sweep(row)):
      write(made, cell, win=0.5 + 0.1 * number)
    for number, cell in enumerate(made.finals(row, made.chosen(row)[0])):
      write(made, cell, win=0.6 + 0.1 * number - 0.2 * (row == "sft"))
  for cell in made.noisy("dmpo", made.chosen("dmpo")[0]):
    write(made, cell, win=0.55)
  lines = study.show(made).splitlines()
  assert "| base | | 0 | 0.5 by definition | | | 0.900 | 0.040 | 0.500 | |" in lines
  row = next(line for line in lines if line.startswith("| dmpo |"))
  assert "| beta=1000.0 | 250 | 0.650 [0.650, 0.650] | 0.600, 0.700 | 0.650 [0.650, 0.650] |" in row
  assert "| 0.500 | -1.0e-03 / -2.0e-03 |" in row
  assert "| sft | -0.200 [-0.200, -0.200] | -0.200 [-0.200, -0.200] |" in lines
  assert [line.split("|")[3] for line in lines[-2:]] == [
    " beta=1000.0 ",
    " beta=1000.0 alpha=0.0597 ",
  ]
  points = study.points_of(made)
  assert len(points) == 8 and {point["split"] for point in points} == {"validation", "test"}
  drawn = load(SCRIPT.with_name("study_figures.py"))
  lines = drawn._lines([point for point in points if point["split"] == "validation"])
  assert [[point["settings"] for point in line] for line in lines] == [
    ["objective.beta=500.0", "objective.beta=1000.0"],
    ["optim.learning_rate=2e-5", "optim.learning_rate=1e-4"],
  ]
  assert drawn._short("objective.beta=500.0") == "β 500"
  light, dark = (drawn.draw_frontier(points, 1.25, theme) for theme in ("light", "dark"))
  with Image.open(io.BytesIO(light)) as picture:
    pixels = np.asarray(picture.convert("RGB"), int)
    assert picture.width > 1000
  expected = [int(report_style.LIGHT.policy[i : i + 2], 16) for i in (1, 3, 5)]
  assert (np.abs(pixels - expected).sum(axis=-1) <= 12).sum() > 100  # points, in 256 colours
  assert light != drawn.draw_frontier(points, 1.1, "light")
  assert light != dark and light == drawn.draw_frontier(points, 1.25, "light")


@pytest.mark.slow
def test_runs_side_by_side_are_all_done_once(tmp_path):
  """The whole study in small: sweep, seeds and swapped pairs, by two processes at a time."""
  config = tmp_path / "tiny.py"
  config.write_text(TINY, encoding="utf-8")
  command = [sys.executable, SCRIPT, "--config", config, "--out", tmp_path / "out"]
  command += ["--jobs", "2", "--config.batch_size=8", "--config.sampling.steps=2"]
  # Unbuffered, as in many containers: each write is then seen by itself.
  environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONUNBUFFERED": "1"}
  first, again = (
    subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    for _ in range(2)
  )
  assert first.returncode == 0, first.stderr
  done = [line for line in first.stdout.splitlines() if ": 2 steps, measured on" in line]
  assert len(set(done)) == len(done) == 4
  assert "measured on" not in again.stdout
  assert again.stdout == first.stdout[first.stdout.index("| method |") :]
  points = json.loads((tmp_path / "out" / "points.json").read_text(encoding="utf-8"))
  assert len(points["points"]) == 3 and points["grown_rmse"] == 10.0


def test_spread_by_hand(study):
  black, white = np.full((1, 1, 2, 2, 3), -1.0), np.full((1, 1, 2, 2, 3), 1.0)
  assert study.spread(np.concatenate([black, black], axis=1)) == [0.0]
  # Two of the three couples are 2 apart.
  assert study.spread(np.concatenate([black, white, black], axis=1)) == pytest.approx([4 / 3])
