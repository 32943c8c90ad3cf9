"""Metric files and progress, on a real folder."""

import io
import json
import math
import struct
import time

import numpy as np
import pytest

from dmpo_jax import logs


def write(folder, resume_step, records):
  with logs.MetricLog(folder, resume_step) as log:
    for step, value in records:
      log.write(step, {"loss": value})


def events(folder):
  """[(file number, step, tag, value)], as TensorBoard reads them, and the steps it purges at."""
  from tensorboardX.proto import event_pb2

  found, purges = [], []
  for number, path in enumerate(sorted((folder / logs.TENSORBOARD_FOLDER).iterdir())):
    data, i = path.read_bytes(), 0
    while i < len(data):
      (size,) = struct.unpack_from("<Q", data, i)
      event = event_pb2.Event.FromString(data[i + 12 : i + 12 + size])
      i += 12 + size + 4
      found += [(number, event.step, v.tag, v.simple_value) for v in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        purges.append(event.step)
  return found, purges


def test_records_come_back_and_are_on_disk_at_once(tmp_path):
  expected = [{"step": 0, "validation/margin": 0.0}, {"step": 10, "loss": 0.5, "lr": 1e-8}]
  with logs.MetricLog(tmp_path / "run", 0) as log:
    log.write(0, {"validation/margin": 0.0})
    log.write(10, {"loss": np.float32(0.5), "lr": 1e-8})
    assert logs.read(tmp_path / "run") == expected  # before close: a killed run keeps them
  assert logs.read(tmp_path / "run") == expected
  lines = (tmp_path / "run" / logs.METRICS_FILE).read_text().splitlines()
  assert [json.loads(line) for line in lines] == expected


def test_values_are_written_exactly_and_non_finite_ones_too(tmp_path):
  values = [0.1 + 0.2, 1e-300, math.inf]
  write(tmp_path, 0, enumerate(values, 1))
  assert [record["loss"] for record in logs.read(tmp_path)] == values
  write(tmp_path, 3, [(4, math.nan)])
  assert math.isnan(logs.read(tmp_path)[-1]["loss"])


def test_resume_drops_what_lies_beyond_and_keeps_each_step_once(tmp_path):
  write(tmp_path, 0, [(0, 9.0), (1, 1.0), (2, 2.0), (3, 3.0)])
  write(tmp_path, 2, [(2, 2.5), (3, 3.5), (4, 4.5)])
  records = [(record["step"], record["loss"]) for record in logs.read(tmp_path)]
  assert records == [(0, 9.0), (1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
  assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
  write(tmp_path, 0, [(0, 9.0), (1, 1.0), (2, 2.0)])
  assert events(tmp_path) == ([(0, 0, "loss", 9.0), (0, 1, "loss", 1.0), (0, 2, "loss", 2.0)], [])
  time.sleep(1.1)  # event files are named by the second
  write(tmp_path, 1, [(2, 2.5)])
  found, purges = events(tmp_path)
  assert found[-1] == (1, 2, "loss", 2.5)
  assert purges == [2]


def test_line_cut_by_a_kill_is_left_out_and_dropped(tmp_path):
  write(tmp_path, 0, [(1, 1.0), (2, 2.0)])
  with open(tmp_path / logs.METRICS_FILE, "a") as file:
    file.write('{"step": 3, "lo')
  assert [record["step"] for record in logs.read(tmp_path)] == [1, 2]
  write(tmp_path, 2, [(3, 3.0)])
  assert [record["step"] for record in logs.read(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("not json", "metrics.jsonl, line 2: .*expected one JSON object"),
    ('{"loss": 1.0}', "metrics.jsonl, line 2: expected a JSON object with an integer step"),
  ],
)
def test_damaged_line_is_named_and_the_file_stays(tmp_path, line, message):
  path = tmp_path / logs.METRICS_FILE
  text = f'{{"step": 1, "loss": 1.0}}\n{line}\n{{"step": 2, "loss": 1.0}}\n'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    logs.read(tmp_path)
  with pytest.raises(ValueError, match=message):
    logs.MetricLog(tmp_path, 1)
  assert path.read_text() == text


def test_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="metrics.jsonl: no such file; expected the folder of a run"):
    logs.read(tmp_path)


def test_steps_only_go_up_and_step_is_no_metric(tmp_path):
  with logs.MetricLog(tmp_path, 0) as log:
    log.write(5, {"loss": 1.0})
    for step in (5, 4):
      with pytest.raises(ValueError, match=f"step {step} is already past: .* of step 5"):
        log.write(step, {"loss": 1.0})
    with pytest.raises(ValueError, match="'step' is the record's own field"):
      log.write(6, {"step": 6.0})
  assert len(logs.read(tmp_path)) == 1


def test_only_the_kept_step_may_come_twice_and_once(tmp_path):
  write(tmp_path, 0, [(1, 1.0), (2, 2.0)])
  with logs.MetricLog(tmp_path, 2) as log:
    with pytest.raises(ValueError, match="step 1 is already past: the last record is of step 2"):
      log.write(1, {"loss": 1.5})
    log.write(2, {"loss": 2.5})
    with pytest.raises(ValueError, match="step 2 is already past"):
      log.write(2, {"loss": 2.5})
  assert [record["loss"] for record in logs.read(tmp_path)] == [1.0, 2.0]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal_is_a_bar():
  terminal = Terminal()
  with logs.progress(10, 4, "train", file=terminal) as bar:
    bar.update(3)
    bar.set_postfix_str("loss 0.5")
  text = terminal.getvalue()
  assert "\r" in text
  assert "train:  70%" in text
  assert "7/10" in text
  assert "loss 0.5" in text


def test_progress_elsewhere_is_the_first_line_and_the_last():
  file = io.StringIO()
  with logs.progress(1000, 100, "train", file=file) as bar:
    for _ in range(400):
      bar.set_postfix_str("loss 0.5")
      bar.update()
    bar.set_description("validate")
  first, last = file.getvalue().splitlines()
  assert first.startswith("train: 101/1000 (10 %), 00:00 gone, 00:0")
  assert last.startswith("validate: 500/1000 (50 %), 00:00 gone, 00:0")
  assert last.endswith(" left, loss 0.5")


def test_progress_lines_come_back_after_their_time(monkeypatch):
  monkeypatch.setattr(logs, "LINE_SECONDS", 0.2)
  file = io.StringIO()
  with logs.progress(4, file=file, title="train") as bar:
    bar.update()
    bar.update()  # too soon
    time.sleep(0.25)
    bar.update()
  assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/4", "3/4"]


def test_progress_text_by_hand():
  # 150 steps in 15 s are 10 a second: 750 more take 75 s.
  text = logs.progress_text("train", 250, 1000, 150, 15.0)
  assert text == "train: 250/1000 (25 %), 00:15 gone, 01:15 left"
  assert logs.progress_text("train", 0, 0, 0, 0.0) == "train: 0/0 (100 %), 00:00 gone, ? left"


def test_progress_before_the_first_step_knows_no_end():
  file = io.StringIO()
  logs.progress(5, 2, "train", file=file).close()
  assert file.getvalue() == "train: 2/5 (40 %), 00:00 gone, ? left\n"
