"""What watches a run from beside it: its heartbeat, and the watchdog for stalls.

Both are one thread of every process. The loop tells it where it is, which costs an assignment, and
never waits for it.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

STALLS_FOLDER = "stalls"
WENT_ON = "went on: "  # begins the last line of a stall that ended
_LAST_STEPS = 50  # whose median is the time of a step
_STDERR = 2  # faulthandler writes to a file descriptor
_REASON = 300  # characters of an error in a heartbeat


class Limits(NamedTuple):
  """How often the heart beats, and after how many seconds a run counts as stalled.

  Attributes:
    beat: between two heartbeats and two looks at the run.
    factor: a step is stalled after this many times the median of the last steps. Steps are one
      program on equal batches; a slow read of the input doubles one, it does not take ten.
    floor: no step is stalled sooner: a bucket's retries and a machine's maintenance take minutes.
    compiling: bound for starting, for the first step and for validation, whose first call compiles.
      A compiler took half an hour for Stable Diffusion on 2 cores; this is four times that.
    saving: bound for a save: 31 GB, SDXL with both moments, at 10 MB a second.
  """

  beat: float = 10.0
  factor: float = 10.0
  floor: float = 300.0
  compiling: float = 7200.0
  saving: float = 3600.0


LIMITS = Limits()


class _Stall(NamedTuple):
  since: float
  waited: float
  path: pathlib.Path


def heartbeat_file(process: int) -> str:
  """Name of a process's heartbeat in the run folder.

  >>> heartbeat_file(0), heartbeat_file(3)
  ('heartbeat.json', 'heartbeat-3.json')
  """
  return "heartbeat.json" if process == 0 else f"heartbeat-{process}.json"


class Watch:
  """Writes this process's heartbeat, and the stacks of all threads when a step does not finish.

  A context manager around the whole run: how it is left, orderly or by which exception, is the
  heartbeat's last word. A stall is written to stderr and to `stalls/`, again whenever it has
  doubled, and the run is left alone. A file that cannot be written is told once and changes
  nothing else.

  Args:
    folder: of the run; must exist.
    steps: of the whole run.

  Attributes:
    end: the last state, if it is not to be told from how the run is left.
  """

  def __init__(self, folder: pathlib.Path, steps: int, limits: Limits = LIMITS):
    self._folder, self._steps, self._limits = folder, steps, limits
    self._process, self._processes = jax.process_index(), jax.process_count()
    self._step, self._saved = 0, None
    self._now = ("starting", time.monotonic())  # one tuple: the thread sees both change or none
    self._times: tuple[float, ...] = ()
    self._spent = 0.0
    self._stall: _Stall | None = None
    self._told = False
    self.end: str | None = None
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

  def resume(self, step: int) -> None:
    """The state of this step is there; what follows is the compilation of the step."""
    self._step, self._saved = step, step or None
    self._now = ("compiling", time.monotonic())

  def finish(self, step: int) -> None:
    """A step is done."""
    (state, since), now = self._now, time.monotonic()
    if state == "training":  # else it was the first, which compiles
      self._times = (*self._times[1 - _LAST_STEPS :], self._spent + now - since)
    self._step, self._spent = step, 0.0
    self._now = ("training", now)

  @contextlib.contextmanager
  def during(self, state: str) -> Iterator[None]:
    """What is done in it (`validating`, `saving`, `drawing`) is no part of a step's time."""
    before, since = self._now
    now = time.monotonic()
    if before == "training":
      self._spent += now - since
    self._now = (state, now)
    yield  # after an exception the state stays: it is where the run ended
    self._now = (before, time.monotonic())

  def save(self, step: int) -> None:
    """The state of this step was given to be saved."""
    self._saved = step

  def __enter__(self) -> "Watch":
    self._beat(self._now[0])
    self._thread.start()
    return self

  def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
    self._over.set()
    self._thread.join()
    self._look()  # a stall may have ended since the last look
    state = self.end or "done"
    if self.end is None and error is not None:
      reason = next(iter(str(error).splitlines()), "")
      state = f"stopped: {type(error).__name__}: {reason}"[:_REASON]
    elif self.end is None and self._step < self._steps:
      state = f"stopped: the data ended after step {self._step}"
    self._beat(state)

  def _watch(self) -> None:
    while not self._over.wait(self._limits.beat):
      self._beat(self._now[0])
      self._look()

  def _beat(self, state: str) -> None:
    content = {
      "step": self._step,
      "steps": self._steps,
      "time": _utc().isoformat(timespec="seconds"),
      "state": state,
      "seconds_in_state": round(time.monotonic() - self._now[1], 3),
      "seconds_per_step": self._median(),
      "saved_step": self._saved,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "process": self._process,
      "processes": self._processes,
    }
    path = self._folder / heartbeat_file(self._process)
    temporary = path.with_suffix(".tmp")
    try:
      temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
      temporary.replace(path)
    except OSError as error:
      self._tell_once(f"{path} cannot be written: {error}")

  def _median(self) -> float | None:
    return round(statistics.median(self._times), 6) if self._times else None

  def _limit(self, state: str) -> float:
    if state == "training":
      return max(self._limits.factor * (self._median() or 0.0), self._limits.floor)
    return self._limits.saving if state == "saving" else self._limits.compiling

  def _look(self) -> None:
    """Tells of a stall that begins, has doubled or has ended."""
    (state, since), now = self._now, time.monotonic()
    stall, waited = self._stall, now - since
    if stall is not None and stall.since != since:
      took = now - stall.since
      self._write(stall.path, f"{WENT_ON}after at most {took:.0f} s; now {state}\n")
      self._stall = stall = None
    limit = self._limit(state) if stall is None else 2 * stall.waited
    if waited <= limit or self._over.is_set():
      return
    step = min(self._step + 1, self._steps)  # validated and saved before it is finished
    text = (
      f"{_utc():%Y-%m-%d %H:%M:%S} UTC: step {step} of {self._steps}: {state} for {waited:.0f} s,"
      f" expected at most {self._limit(state):.0f} s; process {self._process}, pid {os.getpid()}"
      f" on {socket.gethostname()}. The run is left alone; where its threads are:"
    )
    name = f"{_utc():%Y%m%dT%H%M%SZ}-step-{step}-process-{self._process}.txt"
    path = self._folder / STALLS_FOLDER / name if stall is None else stall.path
    self._stall = _Stall(since, waited, path)
    self._write(path, text + "\n", stacks=True)
    print(f"warning: {text}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=_STDERR)

  def _write(self, path: pathlib.Path, text: str, stacks: bool = False) -> None:
    try:
      path.parent.mkdir(exist_ok=True)
      with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if stacks:
          faulthandler.dump_traceback(file=file)
    except OSError as error:
      self._tell_once(f"{path} cannot be written: {error}")

  def _tell_once(self, text: str) -> None:
    if not self._told:
      print(f"warning: {text}; the run goes on", file=sys.stderr, flush=True)
    self._told = True


def _utc() -> datetime.datetime:
  return datetime.datetime.now(datetime.UTC)
