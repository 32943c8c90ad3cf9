"""The study's rules: equal passes, swapped pairs, what is chosen and what its tables say."""

import importlib.util
import json
import pathlib

import ml_collections
import numpy as np
import pytest

from dmpo_jax.data import encode

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "study.py"
PROMPTS = 20


@pytest.fixture(scope="module")
def study():
  spec = importlib.util.spec_from_file_location("study", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def shipped(study):
  return study.read_settings(str(SCRIPT.parents[1] / "configs" / "study" / "emoji.py"))


def small(**changes):
  methods = {
    "dmpo": ("emoji_dmpo", ("objective.beta=500.0", "objective.beta=1000.0")),
    "sft": ("emoji_sft", ("optim.learning_rate=2e-5", "optim.learning_rate=1e-4")),
  }
  return ml_collections.ConfigDict({**dict(methods=methods, passes=64_000), **changes})


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
  row = next(line for line in lines if line.startswith("| dmpo |"))
  assert "| beta=1000.0 | 250 | 0.650 [0.650, 0.650] | 0.600, 0.700 | 0.650 [0.650, 0.650] |" in row
  assert "| 0.500 | -1.0e-03 / -2.0e-03 |" in row
  assert "| sft | -0.200 [-0.200, -0.200] |" in lines
  assert [line.split("|")[3] for line in lines[-2:]] == [
    " beta=1000.0 ",
    " beta=1000.0 alpha=0.0597 ",
  ]
  points = study.points_of(made)
  assert len(points) == 8 and {point["split"] for point in points} == {"validation", "test"}


def test_spread_by_hand(study):
  black, white = np.full((1, 1, 2, 2, 3), -1.0), np.full((1, 1, 2, 2, 3), 1.0)
  assert study.spread(np.concatenate([black, black], axis=1)) == [0.0]
  # Two of the three couples are 2 apart.
  assert study.spread(np.concatenate([black, white, black], axis=1)) == pytest.approx([4 / 3])
