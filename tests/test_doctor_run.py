"""Faults sown into copies of a real run, each found by its code; a sound run has none."""

import datetime
import json
import os
import pathlib
import shutil
import signal
import warnings

import jax
import numpy as np
import pytest
import tiny

from dmpo_jax import base, cli, doctor, doctor_run, stages, tasks, train, watch

pytestmark = pytest.mark.slow  # the run compiles a step

STEPS = 24
LATER = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def prepared(tiny_base, tiny_data):
  config = tiny.config(tiny_base, steps=STEPS, save_every=4, **{"optim.learning_rate": 1e-3})
  loaded = base.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  return config, tasks.preference_task(config, loaded, stages.open_data(config, loaded, tiny_data))


def run(prepared, out, batches=None):
  config, task = prepared
  if batches is not None:
    own = task.batches
    task = task._replace(batches=lambda start: batches(own(start)))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # alarms are other tests' subject
    train.train(config, task, out, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def sound(prepared, tmp_path_factory):
  out = tmp_path_factory.mktemp("sound") / "run"
  run(prepared, out)
  # What random weights learn, and how fast a busy machine is, are chance; no rule below is about
  # them unless its test says so.
  usual = {"validation/winner_advantage": 0.1, "train/pairs_per_second": 100.0}
  edit(out, lambda records: set_all(records, **usual))
  return out


@pytest.fixture
def copy(sound, tmp_path):
  return shutil.copytree(sound, tmp_path / "run")


def read(out):
  return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def edit(out, change):
  """Writes the records that `change` makes of a run's own."""
  lines = [json.dumps(record) + "\n" for record in change(read(out))]
  (out / "metrics.jsonl").write_text("".join(lines))


def set_all(records, first=0, **values):
  return [
    record | {name: value for name, value in values.items() if name in record}
    if record["step"] >= first
    else record
    for record in records
  ]


def beat(out, **fields):
  path = out / "heartbeat.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def configure(out, change):
  path = out / "run.json"
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def codes(out, **settings):
  return [finding.code for finding in doctor_run.diagnose(out, **settings).findings]


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_sound_run_has_no_findings(sound):
  diagnosis = doctor_run.diagnose(sound, verify=True)
  assert diagnosis.findings == () and diagnosis.ok and diagnosis.state == "done"
  assert f"{STEPS + 1} records up to step {STEPS} of {STEPS}" in diagnosis.summary
  assert doctor.show_run(diagnosis).endswith("done, healthy")
  (sound / "heartbeat.json").rename(sound / "gone.json")  # a run of an earlier version
  assert doctor_run.diagnose(sound).state == "done" and codes(sound) == []
  (sound / "gone.json").rename(sound / "heartbeat.json")


def test_a_run_that_goes_on_is_called_running(prepared, tmp_path):
  seen = []

  def batches(found):
    for position, batch in enumerate(found):
      if position in (2, 15):
        seen.append(doctor_run.diagnose(tmp_path / "run"))
      yield batch

  run(prepared, tmp_path / "run", batches)
  early, late = seen
  assert early.state == late.state == "running" and early.ok and late.ok
  assert early.summary.startswith("running; ")
  chance = {"winners-worse", "slower"}  # random weights, a busy machine
  assert {finding.code for each in seen for finding in each.findings} <= chance
  stale = datetime.datetime.now(datetime.UTC) + LATER
  assert doctor_run.diagnose(tmp_path / "run", now=stale).state == "done"


def test_a_run_told_to_stop(prepared, tmp_path):
  def batches(found):
    for position, batch in enumerate(found):
      if position == 6:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with pytest.raises(train.Preempted):
    run(prepared, tmp_path / "run", batches)
  diagnosis = doctor_run.diagnose(tmp_path / "run", verify=True)
  assert diagnosis.state == "not running" and not diagnosis.ok
  assert [each.code for each in diagnosis.findings if each.severity == "error"] == ["preempted"]
  run(prepared, tmp_path / "run")  # the remedy
  assert doctor_run.diagnose(tmp_path / "run").state == "done"


def test_a_run_that_met_a_loss_that_is_not_finite(prepared, tmp_path):
  def batches(found):
    for position, batch in enumerate(found):
      yield (
        batch if position < 6 else batch._replace(moments_w=np.full_like(batch.moments_w, np.nan))
      )

  with pytest.raises(train.TrainingStopped):
    run(prepared, tmp_path / "run", batches)
  findings = doctor_run.diagnose(tmp_path / "run").findings
  assert findings[0].code == "non-finite" and "not finite in step 7" in findings[0].detail
  assert [each.code for each in findings if each.severity == "error"] == ["non-finite"]


def killed(out):
  beat(out, state="training", step=20, time="2026-01-01T00:00:00+00:00")
  shutil.rmtree(out / "checkpoints" / str(STEPS))
  edit(out, lambda records: records[:23])


def silent(out):
  beat(out, state="training", processes=3, time=watch._utc().isoformat())
  for process, age in ((1, 0), (2, 3600), (7, 3600)):  # 7: of an earlier run with more processes
    content = json.loads((out / "heartbeat.json").read_text())
    time = watch._utc() - datetime.timedelta(seconds=age)
    path = out / watch.heartbeat_file(process)
    path.write_text(json.dumps(content | {"time": time.isoformat(), "process": process}))


def stall(out, end=False):
  with watch.Watch(out, STEPS, watch.Limits(beat=0.01, floor=0.03)) as watcher:
    watcher.resume(STEPS - 1)
    watcher.finish(STEPS - 1)
    while not list((out / "stalls").glob("*.txt")):
      pass
    if end:
      watcher.finish(STEPS)
    watcher.end = "done"


def stalled(out):
  stall(out)
  beat(out, state="training", time=watch._utc().isoformat())


def flip(out):
  path = largest_file(out / "checkpoints" / str(STEPS))
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0xFF
  path.write_bytes(content)


def repeat(records):
  return records[:10] + records[9:]


def flat(records):
  return set_all(records, **{"validation/loss": 1.6, "validation/margin": 0.0})


def pay(records):
  """The preference grows, and the denoising error with it."""
  start = records[0]["validation/denoising_loss"]
  last = {"validation/denoising_loss": 2.8 * start, "validation/margin": 1.0}
  return set_all(records, 24, **last)


def slow(records):
  speeds = {record["step"]: 100.0 if record["step"] < 18 else 40.0 for record in records[1:]}
  return records[:1] + [
    record | {"train/pairs_per_second": speeds[record["step"]]} for record in records[1:]
  ]


def without_validation(records):
  return [
    {name: value for name, value in record.items() if not name.startswith("validation/")}
    for record in records[1:]
  ]


def cut(out):
  with (out / "metrics.jsonl").open("a") as file:
    file.write('{"step": 25, "train/lo\n')


# A fault -> how it is sown, the only codes that must be found, and a word of what is said of it.
FAULTS = {
  "not-running": (killed, "training, step 20"),
  "silent-process": (silent, "training, step 24, 60 min ago"),
  "stopped": (lambda out: beat(out, state="stopped: OSError: disk full"), "OSError: disk full"),
  "stall": (lambda out: stall(out, end=True), "went on"),
  "stalled": (stalled, f"step {STEPS} of {STEPS}: training for"),
  "bad-config": (lambda out: (out / "run.json").unlink(), "no run.json"),
  "no-checkpoint": (lambda out: shutil.rmtree(out / "checkpoints"), f"step {STEPS}"),
  "checkpoint-behind": (
    lambda out: shutil.rmtree(out / "checkpoints" / str(STEPS)),
    "step 20 is the last that is saved",
  ),
  "metrics-behind": (lambda out: edit(out, lambda r: r[:-1]), "step 23 is the last record"),
  "incomplete-checkpoint": (
    lambda out: (out / "checkpoints" / f"28.{doctor_run._TEMPORARY}-1").mkdir(),
    "left by a save",
  ),
  "set-aside": (
    lambda out: (out / "checkpoints-damaged" / "16-1").mkdir(parents=True),
    "damaged when",
  ),
  "damaged-checkpoint": (
    lambda out: (out / "checkpoints" / "20" / "metadata" / "metadata").write_text("{"),
    "cannot be read",
  ),
  "no-metrics": (lambda out: (out / "metrics.jsonl").unlink(), "no record"),
  "bad-metrics": (cut, "expected one JSON object"),
  "metrics-order": (lambda out: edit(out, repeat), "it comes after step 9"),
  "metrics-gap": (lambda out: edit(out, lambda r: r[:10] + r[12:]), "the record before is of step"),
  "not-exact": (
    lambda out: edit(out, lambda r: [r[0] | {"validation/margin_abs_max": 1e-4}, *r[1:]]),
    "validation/margin_abs_max is 0.0001",
  ),
  "diverging": (
    lambda out: edit(out, lambda r: set_all(r, 20, **{"validation/denoising_loss": 99.0})),
    "times that of metrics.jsonl, line 1 (step 0)",
  ),
  "over-optimised": (lambda out: edit(out, pay), "2.8 times that of"),
  "dead-zone": (
    lambda out: edit(out, lambda r: set_all(r, 22, **{"train/dead_zone": 0.97})),
    "train/dead_zone is 0.97",
  ),
  "flat-loss": (lambda out: edit(out, flat), "from 1.6 to 1.6"),
  "winners-worse": (
    lambda out: edit(out, lambda r: set_all(r, 20, **{"validation/winner_advantage": -1e-3})),
    "-1.00e-03; below 0 first in metrics.jsonl, line 21 (step 20)",
  ),
  "zero-rate": (
    lambda out: edit(out, lambda r: set_all(r, 12, **{"train/learning_rate": 0.0})),
    "train/learning_rate is 0",
  ),
  "slower": (lambda out: edit(out, slow), "100 pairs/s before, 40 now"),
  "no-validation": (lambda out: edit(out, without_validation), "24 records without"),
}


@pytest.mark.parametrize("code", FAULTS)
def test_a_fault_is_found_by_its_code_alone(copy, code):
  spoil, detail = FAULTS[code]
  spoil(copy)
  (finding,) = doctor_run.diagnose(copy).findings
  assert finding.code == code and detail in finding.detail
  assert finding.severity == doctor_run.RULES[code].severity
  place = finding.where.split(",")[0]
  missing = code in ("bad-config", "no-checkpoint", "no-metrics")
  assert missing or (copy / place).exists()


def test_every_rule_is_tested_and_documented():
  others = {"preempted", "non-finite"}  # by runs of their own, above
  assert set(FAULTS) | others == set(doctor_run.RULES)
  page = (pathlib.Path(__file__).parent.parent / "docs" / "watching.md").read_text()
  for code, rule in doctor_run.RULES.items():
    assert f"| `{code}` | {rule.severity} |" in page


def test_checksums_are_compared_when_asked(copy):
  flip(copy)
  assert codes(copy) == []
  (finding,) = doctor_run.diagnose(copy, verify=True).findings
  assert finding.code == "damaged-checkpoint" and finding.where == f"checkpoints/{STEPS}"


@pytest.mark.parametrize("draws, found", [(0, ["not-exact"]), (2, [])])
def test_cached_errors_of_the_reference_promise_no_exact_start(copy, draws, found):
  edit(copy, lambda records: [records[0] | {"validation/margin_abs_max": 1e-4}, *records[1:]])
  configure(copy, lambda content: content["data"].update(reference_draws=draws))
  assert codes(copy) == found


def test_records_at_uneven_steps_are_no_gap(copy):
  """Logged every 4 steps and validated every 3, then logged every 6 after resuming."""
  steps = {s for s in range(STEPS + 1) if s % 3 == 0 or (s % 4 == 0 and s < 12) or s % 6 == 0}
  edit(copy, lambda records: [record for record in records if record["step"] in steps])
  configure(copy, lambda content: content.update(log_every=4))
  assert codes(copy) == []


def test_a_last_line_that_is_being_written_is_no_fault(copy):
  with (copy / "metrics.jsonl").open("a") as file:
    file.write('{"step": 25, "train/lo')
  assert codes(copy) == []


def test_the_command(copy, capsys, tmp_path):
  arguments = ["doctor", "run", str(copy), "--out", str(tmp_path / "doctor.json")]
  assert cli.main([*arguments, "--verify"]) == 0
  assert "no findings" in capsys.readouterr().out
  edit(copy, lambda records: set_all(records, 22, **{"train/dead_zone": 0.97}))
  assert cli.main(arguments) == 1
  shown = capsys.readouterr().out
  assert "[dead-zone]" in shown and "metrics.jsonl, line 25 (step 24)" in shown
  assert "Rule: " in shown and "something is wrong" in shown
  content = json.loads((tmp_path / "doctor.json").read_text())
  assert content["ok"] is False and content["state"] == "done"
  assert content["findings"][0]["code"] == "dead-zone" and content["findings"][0]["remedy"]


def test_a_folder_that_is_no_run(copy, capsys):
  assert cli.main(["doctor", "run", str(copy.parent)]) == 2
  assert "expected the folder of a training run" in capsys.readouterr().err
  with pytest.raises(ValueError, match=f"did you mean {copy}"):
    doctor_run.diagnose(copy.parent)
