"""What curves say: rules at their thresholds, on records of real runs, on runs made to go wrong.

tests/records holds metrics.jsonl of real runs; its README has the commands that made them.
"""

import json
import math
import pathlib
import warnings

import jax
import pytest
import tiny

from dmpo_jax import base, doctor_run, logs, reading, stages, tasks, train

RUNS = pathlib.Path(__file__).parent / "records"
RECORDED = {  # run -> what must be said, the gravest first, and words of it
  "displaced": (["winners-worse"], "-1.05e-02; below 0 first in step 10"),
  "dead_zone": (["diverging", "dead-zone", "winners-worse"], "validation/dead_zone is 1.00"),
  "diverged": (["diverging", "dead-zone", "winners-worse"], "139.3 times that of step 0"),
  "over_optimised": (["over-optimised", "winners-worse"], "and validation/margin"),
  "healthy": (["healthy"], "winners are denoised better than by the reference"),
  "flat": (["flat-loss"], "validation/loss went from 1.6144 to 1.6142"),
}


def recorded(name):
  return [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text().splitlines()]


def codes(records, **settings):
  return [verdict.code for verdict in reading.read(records, **settings)]


def curve(count=10, **fields):
  """Records with validation: each field a function of the position, or one value."""
  return [
    {"step": 10 * i} | {f"validation/{n}": v(i) if callable(v) else v for n, v in fields.items()}
    for i in range(count)
  ]


@pytest.mark.parametrize("name", RECORDED)
def test_real_runs_are_read(name):
  expected, words = RECORDED[name]
  verdicts = reading.read(recorded(name), warmup_steps=5)
  assert [verdict.code for verdict in verdicts] == expected
  assert any(words in verdict.detail for verdict in verdicts)
  steps = {f"step {record['step']}" for record in recorded(name)}
  assert all(verdict.where in steps for verdict in verdicts)


def test_every_recorded_run_is_tested():
  assert {path.stem for path in RUNS.glob("*.jsonl")} == set(RECORDED)


def grow(i):
  return 0.1 * i


GOOD = {"margin": grow, "winner_advantage": 1e-4, "loss": lambda i: 1.6 - grow(i)}


@pytest.mark.parametrize(
  "changes, expected",
  [
    ({}, "healthy"),
    ({"winner_advantage": lambda i: -1e-4 if i == 9 else 1e-4}, "winners-worse"),
    ({"winner_advantage": lambda i: -1e-4 if i == 8 else 1e-4}, "healthy"),
    ({"denoising_loss": lambda i: 0.1 if i < 9 else 0.25}, "over-optimised"),
    ({"denoising_loss": lambda i: 0.1 if i < 9 else 0.24}, "healthy"),
    ({"denoising_loss": lambda i: 0.1 if i < 9 else 0.41}, "diverging"),
    ({"denoising_loss": lambda i: 0.1 if i < 9 else 0.3, "margin": 0.04}, "undecided"),
    ({"margin": lambda i: 65.0 if i == 9 else 1.0}, "diverging"),
    ({"loss": lambda i: math.nan if i == 4 else 1.0}, "diverging"),
    ({"dead_zone": lambda i: 0.9 if i > 6 else 0.0}, "dead-zone"),
    ({"dead_zone": lambda i: 0.9 if i > 7 else 0.0}, "healthy"),
    ({"margin": 0.04, "loss": 1.6}, "flat-loss"),
    ({"margin": 0.04, "loss": lambda i: 1.6 - 0.01 * i}, "undecided"),
    ({"margin": lambda i: -grow(i)}, "undecided"),
  ],
)
def test_rules_at_their_thresholds(changes, expected):
  assert codes(curve(**GOOD | changes)) == [expected]


def test_levels_are_not_judged_on_few_validations_or_during_the_warm_up():
  assert codes(curve(reading.FEW, **GOOD)) == ["healthy"]
  assert codes(curve(reading.FEW - 1, **GOOD)) == ["undecided"]
  assert codes(curve(reading.FEW, **GOOD), warmup_steps=5) == ["undecided"]
  falling = curve(winner_advantage=lambda i: -1e-4, margin=grow)
  assert codes(falling, warmup_steps=1000) == ["undecided"]
  assert codes([]) == ["undecided"]


def test_samples_tell_of_fidelity_too():
  records = curve(**GOOD)
  assert codes(records, rmse=(0.04, 0.0596)) == ["healthy"]
  (verdict,) = reading.read(records, rmse=(0.04, 0.0604))
  assert (verdict.code, verdict.where) == ("over-optimised", "evaluation")
  assert "RMSE 0.060 is 1.5 times the reference's 0.040" in verdict.detail
  # What has moved nobody's preference is not bought with it.
  assert codes(curve(margin=0.0, loss=lambda i: 1.6 - grow(i)), rmse=(0.04, 0.2)) == ["undecided"]
  # Said once: by the curves where they tell.
  both = curve(**GOOD | {"denoising_loss": lambda i: 0.1 + 0.02 * i})
  assert codes(both, rmse=(0.04, 0.2)) == ["over-optimised"]


def test_several_faults_are_all_said_the_gravest_first():
  records = curve(margin=70.0, winner_advantage=-1.0, dead_zone=1.0, loss=1.0)
  assert codes(records) == ["diverging", "dead-zone", "winners-worse"]


def test_the_doctor_and_the_report_have_one_rule_each():
  assert reading.RULES.items() <= doctor_run.RULES.items()
  assert not set(reading.OUTCOMES) & set(doctor_run.RULES)


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_told_so(tiny_base, tiny_data, tmp_path):
  """A real one; `tests/test_alarms.py` reads one whose pairs have no gradient left."""
  more = {"steps": 12, "validate_every": 1, "save_every": 12, "optim.learning_rate": 1e-9}
  config = tiny.config(tiny_base, **more)
  loaded = base.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  task = tasks.preference_task(config, loaded, stages.open_data(config, loaded, tiny_data))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # alarms are other tests' subject
    train.train(config, task, tmp_path, devices=jax.devices()[:1])
  verdicts = reading.read(logs.read(tmp_path), warmup_steps=config.optim.warmup_steps)
  assert "flat-loss" in [verdict.code for verdict in verdicts]
