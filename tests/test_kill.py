"""Real processes that end in every way they may; the same command goes on to the same bits.

Each is ended when it has come to a stated point; `benchmarks/chaos.py`, whose processes these are,
ends them at random.
"""

import contextlib
import importlib.util
import pathlib
import signal
import sys
import time

import pytest
import tiny

from dmpo_jax import cli

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "chaos.py"
DEADLINE = 300  # seconds; of a machine that does much else

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chaos():
  specification = importlib.util.spec_from_file_location("chaos", SCRIPT)
  module = sys.modules["chaos"] = importlib.util.module_from_spec(specification)
  specification.loader.exec_module(module)
  module.STEPS = 24  # enough of them that each signal finds the run still going on
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", tiny.QUICK_TO_COMPILE)  # of the processes; this one has read its own
    yield module


@pytest.fixture(scope="module")
def place(chaos, tmp_path_factory):
  return chaos.prepare(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def straight(chaos, place):
  return chaos.straight(place, 1)


def wait(processes, ready):
  """Until `ready()` says so; fails where a process ends before."""
  end = time.monotonic() + DEADLINE
  while time.monotonic() < end:
    with contextlib.suppress(FileNotFoundError):  # a file that went meanwhile
      if ready():
        return
    assert all(each.poll() is None for each in processes), processes[0].log.read_text()[-2500:]
    time.sleep(0.001)
  pytest.fail(f"not there after {DEADLINE} s")


def end(chaos, processes, sent):
  """Sends a signal to all; returns exit statuses."""
  for each in processes:
    each.send_signal(sent)
  return [status for status, _ in chaos._ended(processes)]


def saved(out):
  """Steps whose checkpoint is there, in order."""
  return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def in_a_save(out, after):
  """Whether a checkpoint is being written, and one of step `after` or later is there."""
  being_written = any("tmp" in path.name for path in (out / "checkpoints").iterdir())
  return being_written and len(saved(out)) > 1 and saved(out)[-1] >= after


def flip_a_bit(out):
  """In the middle of the largest file of the last checkpoint, which holds arrays."""
  step = saved(out)[-1]
  files = [path for path in (out / "checkpoints" / str(step)).rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(bytes(content))
  return step


def test_one_process(chaos, place, straight):
  out = place.folder / "one"
  running = chaos.train(place, out, 1)
  wait(running, lambda: in_a_save(out, after=2 * chaos.SAVE_EVERY))
  assert end(chaos, running, signal.SIGKILL) == [-signal.SIGKILL]
  damaged = flip_a_bit(out)

  running = chaos.train(place, out, 1)
  wait(running, lambda: (out / "checkpoints-damaged").exists() and saved(out)[-1] > damaged)
  assert end(chaos, running, signal.SIGTERM) == [cli.AGAIN]
  assert saved(out)[-1] < chaos.STEPS
  (kept,) = (out / "checkpoints-damaged").iterdir()
  assert kept.name.split("-")[0] == str(damaged)

  chaos.finish(*chaos.train(place, out, 1))
  assert chaos.differing(*(chaos.fingerprint(place, run) for run in (out, straight))) == []


def test_one_of_two_processes(chaos, place):
  out = place.folder / "two"
  running = chaos.train(place, out, 2)
  wait(running, lambda: in_a_save(out, after=chaos.SAVE_EVERY))
  running[1].kill()
  time.sleep(chaos.PATIENCE)  # as schedulers give the others
  statuses = end(chaos, [each for each in running if each.poll() is None], signal.SIGKILL)
  assert running[1].returncode == -signal.SIGKILL and 0 not in statuses
  assert saved(out)[-1] < chaos.STEPS

  chaos.run_again(place, out, 2)
  left_alone = chaos.straight(place, 2)
  assert chaos.differing(*(chaos.fingerprint(place, run) for run in (out, left_alone))) == []


def test_export(chaos, place, straight):
  target = place.folder / "killed" / "model"
  process = chaos.export_command(place, target)
  wait([process], lambda: any(target.parent.iterdir()))
  assert end(chaos, [process], signal.SIGKILL) == [-signal.SIGKILL]
  assert not target.exists()  # whole or not at all
  got, whole = (chaos.files_of(chaos.export(place, to)) for to in (target, place.folder / "model"))
  assert whole and chaos.differing(got, whole) == []
