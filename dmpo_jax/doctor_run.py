"""`dmpo doctor run`: reads the folder of a run and finds what is wrong with it.

Nothing of the model is computed and nothing is written; the run may be going on. Every finding
comes from a rule that is stated beside it, and names the record or file in which it was met.
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dmpo_jax import checkpoint, logs, reading, train, watch
from dmpo_jax import config as config_lib

Record = dict[str, int | float]

SEVERITIES = ("error", "warning")
_STALE = 120.0  # seconds: 12 heartbeats; a bucket's cache may show a file a minute late
_SLOWER = 0.5
_LINES = 5  # last records whose speed is the present one
_TEMPORARY = "orbax-checkpoint-tmp"


_AGAIN = "Run the same command again: it goes on from the last checkpoint."
RULES: dict[str, reading.Rule] = {
  "bad-config": reading.Rule(
    "error",
    "The configuration cannot be read",
    "run.json is missing, or is not a configuration of this version.",
    "Restore it from a copy: without it the run is not resumed, evaluated or exported.",
  ),
  "not-running": reading.Rule(
    "error",
    "Not finished, and not running",
    "The last checkpoint is before the last step, and the heartbeat is older than two minutes and "
    "tells no end, or is missing: killed, out of memory, or the machine is gone.",
    _AGAIN,
  ),
  "preempted": reading.Rule(
    "error",
    "Told to stop, and saved",
    "The heartbeat's last word is `preempted`: SIGTERM, or the platform's notice, came.",
    _AGAIN,
  ),
  "non-finite": reading.Rule(
    "error",
    "Stopped: loss or gradient not finite",
    "The heartbeat's last word is TrainingStopped.",
    "The same command would stop there again: lower optim.learning_rate or objective.beta in a new "
    "folder, or look at the records named.",
  ),
  "stopped": reading.Rule(
    "error",
    "Stopped by an error",
    "The heartbeat's last word is `stopped`, for another reason than a loss that is not finite.",
    "Remove the cause, then run the same command again.",
  ),
  "silent-process": reading.Rule(
    "error",
    "One of several processes is silent",
    "The run goes on by process 0's heartbeat, and another process's is older than two minutes.",
    "Look at that host. The others wait for it and end by themselves; then run the command again.",
  ),
  "stalled": reading.Rule(
    "error",
    "Stalled",
    "The run is alive, and the last file in stalls/ does not say that it went on.",
    "Read the stacks in that file: waiting for the input, for the disk, or for another process.",
  ),
  "stall": reading.Rule(
    "warning",
    "It stalled",
    "stalls/ holds a file: a step took ten times the median and more than five minutes.",
    "Read the stacks in that file; if it comes again, read ahead more, or move the data nearer.",
  ),
  "no-checkpoint": reading.Rule(
    "error",
    "No checkpoint",
    "No complete one in checkpoints/, though the run has ended or has records of 2 x save_every.",
    "All that it did is lost: start it again; check space and rights of the disk.",
  ),
  "checkpoint-behind": reading.Rule(
    "error",
    "Checkpoints are missing",
    "metrics.jsonl is 2 x save_every steps or more ahead of the last checkpoint, or the run is done"
    " and its last step is not saved.",
    "Were they removed? Run the same command again: the steps after the last one are repeated.",
  ),
  "metrics-behind": reading.Rule(
    "warning",
    "Records are missing",
    "The last record is before the last multiple of log_every that the last checkpoint has passed.",
    "Was metrics.jsonl cut or replaced? The parameters are whole; the curves are not.",
  ),
  "incomplete-checkpoint": reading.Rule(
    "warning",
    "A save was not completed",
    "checkpoints/ holds a temporary folder, and nothing runs.",
    "Nothing: the next start removes it and goes on from the step before.",
  ),
  "damaged-checkpoint": reading.Rule(
    "error",
    "A checkpoint is damaged",
    "Its metadata cannot be read or an item is missing; with --verify: an array cannot be read or "
    "its checksum is not the saved one.",
    "Run the command again: it puts this step aside and goes on from the one before.",
  ),
  "set-aside": reading.Rule(
    "warning",
    "A damaged checkpoint was put aside",
    "checkpoints-damaged/ holds a step, or checkpoints/ a folder that is not the number of one.",
    "Look at it if you want to know what was damaged; then remove it.",
  ),
  "no-metrics": reading.Rule(
    "error",
    "No metrics",
    "metrics.jsonl is missing or empty, though there is a checkpoint or the run has ended.",
    "The curves are lost; the parameters are not. Check who else writes into the folder.",
  ),
  "bad-metrics": reading.Rule(
    "error",
    "metrics.jsonl is damaged",
    "A whole line is not a JSON object with an integer step.",
    "Remove that line: the run does not go on before.",
  ),
  "metrics-order": reading.Rule(
    "error",
    "Steps do not ascend",
    "A record's step is not above the one before: two runs wrote here, or the file was edited.",
    "End all but one; keep one of the two records.",
  ),
  "metrics-gap": reading.Rule(
    "warning",
    "Steps are missing",
    "Two records lie more than log_every apart, and twice as far as those before and after.",
    "Lines were lost: read the curves there with care.",
  ),
  "not-exact": reading.Rule(
    "error",
    "The policy did not start as the reference",
    "margin_abs_max of step 0 is not exactly 0 (objectives with a reference that is computed in "
    "every step, data.reference_draws = 0).",
    "All margins are off by this much: look for what policy and reference do not share.",
  ),
  **reading.RULES,
  "zero-rate": reading.Rule(
    "error",
    "The learning rate is zero",
    "train/learning_rate is 0 in a record; no schedule reaches it before the end.",
    "Nothing is trained from there on: check optim.schedule, warmup_steps and steps.",
  ),
  "slower": reading.Rule(
    "warning",
    "It became half as fast",
    f"Median train/pairs_per_second of the last {_LINES} records is below half of that of the "
    f"first half ({2 * _LINES} records at least, without the first, which compiles).",
    "Look at the host: other processes, a throttled device, input that is further away.",
  ),
  "no-validation": reading.Rule(
    "warning",
    "No validation",
    "There are records, and none holds a validation metric (methods on pairs).",
    "Hold captions out (data.validation_share): a falling winner likelihood goes unseen.",
  ),
}


class Finding(NamedTuple):
  """One fault.

  Attributes:
    code: a key of `RULES`.
    severity: its rule's.
    where: the record or file in which it was met.
    detail: what was found there.
  """

  code: str
  severity: str
  where: str
  detail: str


class Diagnosis(NamedTuple):
  """What `diagnose` found.

  Attributes:
    folder: of the run.
    state: done, running, or not running.
    summary: where the run is, in words.
    findings: errors first.
  """

  folder: str
  state: str
  summary: str
  findings: tuple[Finding, ...]

  @property
  def ok(self) -> bool:
    """Whether the run is done or goes on, and nothing spoils it."""
    return all(finding.severity != "error" for finding in self.findings)


@dataclasses.dataclass
class _Run:
  """A run folder as it was read."""

  folder: pathlib.Path
  now: datetime.datetime
  config: config_lib.Config | None
  heartbeats: dict[int, dict[str, Any]]
  lines: list[tuple[str, Record]]  # where, record
  checkpoints: list[int]
  others: list[str]  # folders beside the checkpoints

  @property
  def last_checkpoint(self) -> int:
    return max(self.checkpoints, default=0)

  @property
  def last_record(self) -> int:
    return max((record["step"] for _, record in self.lines), default=0)

  @property
  def steps(self) -> int | None:
    return self.config.steps if self.config else None

  @property
  def warmup_steps(self) -> int:
    return self.config.optim.warmup_steps if self.config else 0

  def age(self, process: int) -> float:
    """Seconds since a process's heartbeat."""
    then = datetime.datetime.fromisoformat(self.heartbeats[process]["time"])
    return (self.now - then).total_seconds()

  @property
  def state(self) -> str:
    """The heartbeat's word, but `running` for any while it is fresh; `killed`; `done`."""
    last = self.heartbeats.get(0, {}).get("state", "")
    if last == "done" or last == "preempted" or last.startswith("stopped"):
      return last
    if last and self.age(0) <= _STALE:
      return "running"
    return "done" if self.steps and self.last_checkpoint >= self.steps else "killed"

  def series(self, name: str) -> list[tuple[str, float]]:
    """Where a metric was recorded, and its values, after the warm-up."""
    return reading.series(self.lines, name, self.warmup_steps)


def diagnose(
  folder: pathlib.Path, *, verify: bool = False, now: datetime.datetime | None = None
) -> Diagnosis:
  """Reads a run folder.

  Args:
    folder: with run.json in it.
    verify: also reads the arrays of every checkpoint and compares their checksums; takes as much
      memory as the optimiser's state.
    now: time to compare heartbeats with; None: the clock's.

  Raises:
    ValueError: it is not the folder of a run.
  """
  names = (train.RUN_FILE, train.CHECKPOINTS, logs.METRICS_FILE)
  if not any((folder / name).exists() for name in names):
    inside = sorted(path.parent.name for path in folder.glob(f"*/{train.RUN_FILE}"))
    hint = f"; did you mean {folder / inside[0]}?" if inside else ""
    raise ValueError(
      f"{folder}: no {train.RUN_FILE}; expected the folder of a training run, --out of `dmpo train`"
      f"{hint}"
    )
  findings: list[Finding] = []

  def add(code: str, where: str, detail: str) -> None:
    findings.append(Finding(code, RULES[code].severity, where, detail))

  config = None
  try:
    config = train.read_run(folder)
  except (ValueError, OSError) as error:
    add("bad-config", train.RUN_FILE, str(error))
  lines = []
  for where, record in _read_lines(folder / logs.METRICS_FILE):
    if isinstance(record, str):
      add("bad-metrics", where, record)
    else:
      lines.append((where, record))
  steps, others = _list_checkpoints(folder / train.CHECKPOINTS)
  now = now or datetime.datetime.now(datetime.UTC)
  run = _Run(folder, now, config, _read_heartbeats(folder), lines, steps, others)
  for code, where, detail in itertools.chain(
    _state_faults(run),
    _stall_faults(run),
    _checkpoint_faults(run, verify),
    _record_faults(run),
    _training_faults(run),
  ):
    add(code, where, detail)
  order = list(RULES)
  findings.sort(key=lambda each: (SEVERITIES.index(each.severity), order.index(each.code)))
  state = run.state if run.state in ("done", "running") else "not running"
  return Diagnosis(str(folder), state, _summary(run, state), tuple(findings))


def _read_heartbeats(folder: pathlib.Path) -> dict[int, dict[str, Any]]:
  """Process -> its heartbeat; those of an earlier run with more processes are left out."""
  found = {}
  for process in itertools.count():
    if process > 0 and process >= found.get(0, {}).get("processes", 1):
      return found
    path = folder / watch.heartbeat_file(process)
    if path.is_file():
      try:
        found[process] = json.loads(path.read_text(encoding="utf-8"))
      except ValueError:  # not ours: written in one go, it is never half there
        continue


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, Record | str]]:
  """Every whole line with its place: the record, or what is wrong with it."""
  if not path.is_file():
    return
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
  for number, line in enumerate(lines, 1):
    try:
      record = logs.parse_record(line, f"{path.name}, line {number}")
      yield f"{path.name}, line {number} (step {record['step']})", record
    except ValueError as error:
      yield f"{path.name}, line {number}", str(error)


def _list_checkpoints(folder: pathlib.Path) -> tuple[list[int], list[str]]:
  """Complete steps, and the names of all other folders."""
  if not folder.is_dir():
    return [], []
  steps = sorted(ocp.utils.checkpoint_steps(folder))
  names = sorted(path.name for path in folder.iterdir() if path.is_dir())
  return steps, [name for name in names if name not in map(str, steps)]


Fault = tuple[str, str, str]  # code, where, detail


def _state_faults(run: _Run) -> Iterator[Fault]:
  beat = run.heartbeats.get(0)
  where = watch.heartbeat_file(0)
  state = run.state
  if state == "killed" and (beat or run.config):
    steps = f"{run.last_checkpoint} of {run.steps or 'unknown'} steps are saved"
    if beat is None:
      yield "not-running", where, f"there is none; {steps}"
    else:
      yield (
        "not-running",
        where,
        f"{beat['state']}, step {beat['step']}, {_duration(run.age(0))} ago on {beat['host']}, "
        f"pid {beat['pid']}; {steps}",
      )
  elif state == "preempted":
    yield "preempted", where, f"after step {beat['step']} of {beat['steps']}, on {beat['host']}"
  elif state.startswith("stopped"):
    code = "non-finite" if train.TrainingStopped.__name__ in state else "stopped"
    yield code, where, f"after step {beat['step']}: {state.removeprefix('stopped: ')}"
  elif state == "running":
    for process, other in run.heartbeats.items():
      if process and run.age(process) > _STALE:
        ago = _duration(run.age(process))
        yield (
          "silent-process",
          watch.heartbeat_file(process),
          f"{other['state']}, step {other['step']}, {ago} ago on {other['host']}",
        )


def _stall_faults(run: _Run) -> Iterator[Fault]:
  paths = sorted((run.folder / watch.STALLS_FOLDER).glob("*.txt"))
  if not paths:
    return
  lines = paths[-1].read_text(encoding="utf-8", errors="replace").splitlines() or [""]
  ended = lines[-1].startswith(watch.WENT_ON)
  count = f"{len(paths)} in all; the last: " if len(paths) > 1 else ""
  code = "stalled" if run.state == "running" and not ended else "stall"
  more = f"; {lines[-1]}" if ended else ""
  yield code, f"{watch.STALLS_FOLDER}/{paths[-1].name}", f"{count}{lines[0]}{more}"


def _checkpoint_faults(run: _Run, verify: bool) -> Iterator[Fault]:
  folder, running = run.folder / train.CHECKPOINTS, run.state == "running"
  last, every = run.last_checkpoint, run.config.save_every if run.config else 0
  late = every > 0 and run.last_record >= last + 2 * every
  if not run.checkpoints:
    if late or not running:
      yield "no-checkpoint", train.CHECKPOINTS, f"the last record is of step {run.last_record}"
  elif late or (run.state == "done" and run.steps and last < run.steps):
    yield (
      "checkpoint-behind",
      f"{train.CHECKPOINTS}/{last}",
      f"step {last} is the last that is saved; the last record is of step {run.last_record}"
      + (f", the run has {run.steps}" if run.steps else ""),
    )
  for name in run.others:
    if _TEMPORARY not in name:
      yield "set-aside", f"{train.CHECKPOINTS}/{name}", "not read on resuming"
    elif not running:
      yield "incomplete-checkpoint", f"{train.CHECKPOINTS}/{name}", "left by a save"
  aside = checkpoint.damaged_folder(folder)
  for path in sorted(aside.iterdir()) if aside.is_dir() else ():
    yield "set-aside", f"{aside.name}/{path.name}", "damaged when the run went on"
  for step in run.checkpoints:
    fault = _checkpoint_damage(folder, step, verify)
    # One that is not kept any more may be removed by the run while it is read.
    if fault and (folder / str(step)).is_dir():
      yield "damaged-checkpoint", f"{train.CHECKPOINTS}/{step}", fault


def _checkpoint_damage(folder: pathlib.Path, step: int, verify: bool) -> str | None:
  where = folder / str(step)
  missing = [item for item in checkpoint.ITEMS if not (where / item).is_dir()]
  if missing:
    return f"{' and '.join(missing)} missing"
  try:
    checksums = checkpoint.read_metadata(folder, step)["checksums"]
  except ValueError as error:
    return str(error)
  for item in checkpoint.ITEMS if verify else ():
    try:
      found = checkpoint.fingerprint(_read_arrays(where / item))
      checkpoint.check_sums(checksums[item], found, item)
    except checkpoint.Damaged as error:
      return str(error)
    except Exception as error:  # a damaged file can raise anything, deep in tensorstore
      return f"{item} cannot be read: {type(error).__name__}: {str(error)[:200]}"
  return None


def _read_arrays(where: pathlib.Path) -> Any:
  """An item as it was saved, numpy, whatever devices it lay on."""
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(epath.Path(where)).tree
  with ocp.Checkpointer(handler) as checkpointer:
    plain = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      tree,
      is_leaf=lambda node: not isinstance(node, dict | list | tuple),
    )
    return checkpointer.restore(where, args=ocp.args.PyTreeRestore(restore_args=plain))


def _record_faults(run: _Run) -> Iterator[Fault]:
  if not run.lines:
    if run.checkpoints or run.state != "running":
      yield "no-metrics", logs.METRICS_FILE, "no record"
    return
  every = run.config.log_every if run.config else 1
  if run.last_record < run.last_checkpoint // every * every:
    yield (
      "metrics-behind",
      run.lines[-1][0],
      f"step {run.last_record} is the last record; step {run.last_checkpoint} is saved",
    )
  steps = [record["step"] for _, record in run.lines]
  for i in range(1, len(steps)):
    if steps[i] <= steps[i - 1]:
      yield "metrics-order", run.lines[i][0], f"it comes after step {steps[i - 1]}"
  gaps = [b - a for a, b in itertools.pairwise(steps)]
  for i, gap in enumerate(gaps):
    # Both neighbours: where log_every was changed on resuming, one of them is as wide.
    beside = gaps[max(i - 1, 0) : i] + gaps[i + 1 : i + 2]
    if gap > every and beside and all(gap >= 2 * abs(other) for other in beside):
      yield "metrics-gap", run.lines[i + 1][0], f"the record before is of step {steps[i]}"


def _training_faults(run: _Run) -> Iterator[Fault]:
  if not run.lines:
    return
  has_reference = run.config is not None and run.config.objective.needs_reference
  if has_reference:
    yield from _start_faults(run)
  if run.config is not None and run.config.objective.method not in config_lib.ON_IMAGES:
    if not any(name.startswith("validation/") for _, record in run.lines for name in record):
      yield "no-validation", logs.METRICS_FILE, f"{len(run.lines)} records without"
  yield from reading.find(run.lines, warmup_steps=run.warmup_steps, has_reference=has_reference)
  for where, rate in run.series("train/learning_rate"):
    if rate == 0.0:
      yield "zero-rate", where, "train/learning_rate is 0"
      break
  yield from _slowness(run)


def _start_faults(run: _Run) -> Iterator[Fault]:
  """The margin of step 0: of validation before it, and of its own batch, which record 1 holds."""
  if run.config.data.reference_draws > 0:  # those errors may come from other devices
    return
  for step, part in ((0, "validation"), (1, "train")):
    for where, record in run.lines[:2]:
      largest = record.get(f"{part}/margin_abs_max", 0.0)
      if record["step"] == step and largest != 0.0:
        yield "not-exact", where, f"{part}/margin_abs_max is {largest:.3g}"


def _slowness(run: _Run) -> Iterator[Fault]:
  speeds = [(w, r["train/pairs_per_second"]) for w, r in run.lines if "train/pairs_per_second" in r]
  speeds = speeds[1:]
  if len(speeds) < 2 * _LINES:
    return
  before, now = (
    statistics.median(value for _, value in each)
    for each in (speeds[: len(speeds) // 2], speeds[-_LINES:])
  )
  if now < _SLOWER * before:
    yield "slower", speeds[-1][0], f"{before:.3g} pairs/s before, {now:.3g} now"


def _summary(run: _Run, state: str) -> str:
  steps = f" of {run.steps}" if run.steps else ""
  saved = ", ".join(map(str, run.checkpoints)) or "none"
  parts = [f"{len(run.lines)} records up to step {run.last_record}{steps}", f"checkpoints: {saved}"]
  beat = run.heartbeats.get(0)
  if state == "running":
    speed = beat["seconds_per_step"]
    pace = f", {speed:.3g} s a step" if speed else ""
    parts.insert(
      0,
      f"{beat['state']}, step {beat['step']}{steps}{pace}, {_duration(run.age(0))} ago on"
      f" {beat['host']}",
    )
  return "; ".join([state, *parts])


def _duration(seconds: float) -> str:
  """In words.

  >>> _duration(42.0), _duration(400.0), _duration(10_000.0)
  ('42 s', '7 min', '2.8 h')
  """
  if seconds < 120:
    return f"{max(seconds, 0):.0f} s"
  return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
