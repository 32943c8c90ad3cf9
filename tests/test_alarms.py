"""The dead-zone alarm: its rule record by record, and on runs made to go wrong and to go well."""

import warnings

import jax
import pytest
import tiny

from dmpo_jax import alarms, base, logs, reading, stages, tasks, train


def said(alarm, *shares, part="train", accuracy=0.5):
  """Which of these records in a row the alarm spoke of."""
  records = [{f"{part}/dead_zone": share, f"{part}/accuracy": accuracy} for share in shares]
  return [i for i, record in enumerate(records) if alarm.check(record)]


@pytest.mark.parametrize("part", ["train", "validation"])
def test_speaks_at_the_third_record_in_a_row_and_again_only_after_an_end(part):
  alarm = alarms.DeadZoneAlarm()
  assert said(alarm, 0.9, 1.0, 0.89, 0.95, 0.95, part=part) == [] and not alarm.active
  assert said(alarm, 0.9, 1.0, 1.0, part=part) == [0] and alarm.active
  assert said(alarm, 0.5, part=part) == [] and not alarm.active
  assert said(alarm, 1.0, 1.0, 1.0, 1.0, part=part) == [2]


def test_records_without_a_dead_zone_are_no_end():
  alarm = alarms.DeadZoneAlarm()
  both = [{"train/dead_zone": 0.95}, {"validation/loss": 1.0}, {"train/dead_zone": 0.95}]
  assert not any(map(alarm.check, both))
  assert "train/dead_zone is 0.97" in alarm.check({"train/dead_zone": 0.97})


def test_says_what_to_change():
  for accuracy, advice in ((0.5, "start again, in another folder"), (0.95, "ranks 95% of them")):
    alarm, record = alarms.DeadZoneAlarm(), {"train/dead_zone": 1.0, "train/accuracy": accuracy}
    texts = [alarm.check(record) for _ in range(3)]
    assert texts[:2] == [None, None] and advice in texts[2] and "objective.beta" in texts[2]


def run(base_folder, data, out, **more):
  config = tiny.config(base_folder, **more)
  loaded = base.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  task = tasks.preference_task(config, loaded, stages.open_data(config, loaded, data))
  train.train(config, task, out, devices=jax.devices()[:1])
  return logs.read(out)


@pytest.mark.slow
def test_a_run_with_a_huge_beta_is_told_once_and_a_good_one_never(tiny_base, tiny_data, tmp_path):
  settings = {"steps": 8, "validate_every": 4}
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    records = run(tiny_base, tiny_data, tmp_path / "huge", **settings, **{"objective.beta": 1e9})
  told = [str(each.message) for each in caught if "dead_zone" in str(each.message)]
  assert len(told) == 1 and "lower objective.beta" in told[0]
  # Step 1 starts at the reference, where no pair is dead; the rule holds three records later.
  shares = [record["train/dead_zone"] for record in records[1:]]
  assert shares[0] == 0.0 and min(shares[1:]) >= alarms.DEAD_SHARE
  assert told[0].startswith("step 4: train/dead_zone is ")
  (verdict,) = [each for each in reading.read(records) if each.code == "dead-zone"]
  assert verdict.where == "step 4" and verdict.detail in told[0]
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    records = run(tiny_base, tiny_data, tmp_path / "good", **settings)
  assert not [each for each in caught if "dead_zone" in str(each.message)]
  assert max(record["train/dead_zone"] for record in records[1:]) < 0.5
  assert "dead-zone" not in [each.code for each in reading.read(records)]
