"""Kills real runs at random moments, again and again, and compares them with one left alone.

    python benchmarks/chaos.py --kills 200    # an hour on 2 cores; root, for a full disk (tmpfs)

`dmpo train` on a tiny base, as one process and as two, is started with the same command until it
ends; whatever ends it before: SIGKILL and SIGTERM at random times, SIGKILL in the middle of a save,
one of two processes, a full disk, a flipped bit or a cut file in the last checkpoint, a clock that
jumps. So are `dmpo prepare` and `dmpo export`. What is left must equal, bit for bit, what a run
that nothing happened to leaves: parameters, optimiser, the record of every step (but for measured
speeds), prepared and exported files. The exit status is 1 if anything differs.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))  # where the tiny base lives

STEPS, SAVE_EVERY = 16, 2
AGAIN = 75  # exit status: run the command again
BAD_INPUT = 2  # also of a full disk
MEASURED = ("train/pairs_per_second", "train/mfu")  # differ from run to run
LONGEST = 300  # seconds that a process is given to end
SPARE = 2**20  # bytes left on the disk that fills up, about two checkpoints of the tiny base
PATIENCE = 5  # seconds until a scheduler ends the processes that one has left alone

# Put into the path of a process whose wall clock is wrong by a random number of days.
CLOCK = """
  import os, time
  jump, real = float(os.environ["CHAOS_CLOCK"]) * 86400, time.time
  time.time = lambda: real() + jump
"""


class Place(NamedTuple):
  """Attributes:
  base, data: what is trained and on what.
  folder: for runs.
  clock: a folder whose sitecustomize.py makes the clock jump.
  stopping: seconds from each SIGTERM to the last process's exit, as they come.
  """

  base: pathlib.Path
  data: pathlib.Path
  folder: pathlib.Path
  clock: pathlib.Path
  stopping: list[float]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--kills", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--lanes", type=int, default=1, help="runs at a time")
  parser.add_argument("--minutes", type=float, default=120.0, help="no new run after so long")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    place = prepare(pathlib.Path(name))
    expected = {
      "one process": fingerprint(place, straight(place, 1)),
      "two processes": fingerprint(place, straight(place, 2)),
      "prepare": files_of(place.data),
      "export": files_of(export(place, place.folder / "exported")),
    }
    counts: collections.Counter = collections.Counter()
    wrong: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    with concurrent.futures.ThreadPoolExecutor(options.lanes) as executor:
      jobs = [
        executor.submit(lane, place, expected, options, lane_number, counts, wrong, end)
        for lane_number in range(options.lanes)
      ]
      for each in jobs:
        each.result()
  print(f"\n| what | how | times |\n|{'---|' * 3}")
  for (what, how), count in sorted(counts.items()):
    print(f"| {what} | {how} | {count} |")
  total = sum(counts.values())
  print(f"\n{total} interruptions, {len(wrong)} runs that left something else")
  if place.stopping:
    print(
      f"SIGTERM to exit: median {statistics.median(place.stopping):.1f} s, "
      f"longest {max(place.stopping):.1f} s, of {len(place.stopping)}"
    )
  if wrong:
    raise SystemExit("\n".join(wrong))


def lane(place, expected, options, number, counts, wrong, end) -> None:
  """Runs after runs, each interrupted until it ends, until there were enough interruptions."""
  chance = random.Random(f"{options.seed} {number}")
  turn = 0
  while sum(counts.values()) < options.kills and time.monotonic() < end:
    turn += 1
    # Training by one process most of the time; a lane begins where the other does not.
    what = ("one process", "two processes", "one process", "prepare", "one process", "export")[
      (turn + 3 * number) % 6
    ]
    folder = place.folder / f"{number}-{turn}"
    happened: list[str] = []
    try:
      if what == "prepare":
        interrupt_command(
          functools.partial(command, place, "prepare", "--data", str(folder)), chance, happened
        )
        got = files_of(folder)
      elif what == "export":
        target = folder / "model"
        interrupt_command(functools.partial(export_command, place, target), chance, happened)
        got = files_of(target)
      else:
        processes = 1 if what == "one process" else 2
        interrupt_training(place, folder, processes, chance, happened)
        got = fingerprint(place, folder)
      differences = differing(got, expected[what])
    except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
      differences = [str(error)[-3000:]]
    for how in happened:
      counts[what, how] += 1
    status = "equal" if not differences else f"DIFFERS: {differences[:3]}"
    print(f"{sum(counts.values()):4} {what}: {', '.join(happened)}: {status}", flush=True)
    if differences:
      wrong.append(f"{what} after {', '.join(happened)}: {differences[:3]}")
      if folder.exists():
        shutil.copytree(folder, tempfile.mkdtemp(prefix="chaos-"), dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prepare(folder: pathlib.Path) -> Place:
  import tiny

  os.environ["JAX_PLATFORMS"] = "cpu"
  base = tiny.make_base(folder)
  clock = folder / "clock"
  clock.mkdir()
  (clock / "sitecustomize.py").write_text(textwrap.dedent(CLOCK), encoding="utf-8")
  runs = folder / "runs"
  runs.mkdir()
  place = Place(base, folder / "data", runs, clock, [])
  finish(command(place, "prepare", "--data", str(place.data)))
  return place


# Processes.


def command(place: Place, name: str, *arguments: str, **environment: str) -> subprocess.Popen:
  import tiny

  words = [sys.executable, "-m", "dmpo_jax.cli", name, *arguments]
  if name != "export":
    settings = {"steps": STEPS, "save_every": SAVE_EVERY, "validate_every": 8, "log_every": 1}
    words += tiny.overrides(place.base, **settings, **{"optim.ema_decay": 0.5})
  log = place.folder / f"{os.urandom(6).hex()}.log"
  with log.open("wb") as output:
    process = subprocess.Popen(
      words,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", **environment},
      stdout=output,
      stderr=subprocess.STDOUT,
    )
  process.log = log
  return process


def train(place: Place, out: pathlib.Path, processes: int, **more: str) -> list[subprocess.Popen]:
  arguments = ["--data", str(place.data), "--out", str(out)]
  if processes == 1:
    return [command(place, "train", *arguments, **more)]
  with socket.socket() as found:
    found.bind(("localhost", 0))
    port = found.getsockname()[1]
  common = {
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": str(processes),
  }
  return [
    command(place, "train", *arguments, "--distributed", JAX_PROCESS_ID=str(i), **common, **more)
    for i in range(processes)
  ]


def finish(*processes: subprocess.Popen) -> None:
  """Waits for processes that must succeed.

  Raises:
    RuntimeError: one did not; with the end of what was printed.
  """
  _check(_ended(processes))


def _check(ends: Sequence[tuple[int, str]]) -> None:
  for status, text in ends:
    if status:
      raise RuntimeError(f"exit status {status}: {text[-2500:]}")


def _ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
  """Waits for all; the status and what was printed, of each."""
  for each in processes:
    each.wait(LONGEST)
  ends = []
  for each in processes:
    text = each.log.read_text(encoding="utf-8", errors="replace")
    each.log.unlink()
    ends.append((each.returncode, text))
  return ends


def straight_run(place: Place) -> pathlib.Path:
  return place.folder / "straight-1"


def straight(place: Place, processes: int) -> pathlib.Path:
  out = place.folder / f"straight-{processes}"
  finish(*train(place, out, processes))
  return out


def export_command(place: Place, target: pathlib.Path) -> subprocess.Popen:
  return command(place, "export", "--run", str(straight_run(place)), "--out", str(target))


def export(place: Place, target: pathlib.Path) -> pathlib.Path:
  finish(export_command(place, target))
  return target


# Interruptions.


def interrupt_command(start: Callable[[], subprocess.Popen], chance, happened: list[str]) -> None:
  """A command that is killed at three random times, then left to end."""
  for _ in range(3):
    process = start()
    time.sleep(chance.uniform(1.0, 12.0))
    process.kill()
    ((status, _text),) = _ended([process])
    if status == 0:  # it was through
      return
    happened.append("SIGKILL")
  finish(start())


def interrupt_training(place, out, processes: int, chance, happened: list[str]) -> None:
  """The same command again and again, each time ended by something else, until the run ends."""
  ways: list[Callable[..., bool]] = [at_random, at_random, told, in_a_save, in_a_save]
  ways += [flipped, cut, *([one_of_two] * 3 if processes == 2 else [full_disk, wrong_clock])]
  for _ in range(12):
    if chance.choice(ways)(place, out, processes, chance, happened):
      return
  run_again(place, out, processes)


def run_again(place, out, processes: int) -> None:
  """The same command until the run ends; several processes ask for that after a damaged file."""
  for _ in range(3):
    ends = _ended(train(place, out, processes))
    if not all(status == AGAIN for status, _ in ends):
      break
  _check(ends)


def _end(processes, sent: int) -> None:
  for each in processes:
    with contextlib.suppress(ProcessLookupError):
      each.send_signal(sent)


def _interrupted(
  processes, how: str, happened: list[str], expected: Sequence[int], saying: str = ""
) -> bool:
  """Whether all were through; if not, they were interrupted.

  Raises:
    RuntimeError: a process that was alone ended with another status than those expected, or without
      `saying` so.
  """
  ends = _ended(processes)
  if all(status == 0 for status, _ in ends):
    return True
  ((status, text), *others) = ends
  if not others and (
    status not in expected or saying not in text
  ):  # of two, one may fail as the other goes
    raise RuntimeError(f"{how}: exit status {status}: {text[-2500:]}")
  happened.append(how)
  return False


def _killed(processes, how: str, happened: list[str]) -> bool:
  _end(processes, signal.SIGKILL)
  return _interrupted(processes, how, happened, (-signal.SIGKILL, AGAIN))


def at_random(place, out, processes, chance, happened):
  running = train(place, out, processes)
  time.sleep(chance.uniform(2.0, 16.0))
  return _killed(running, "SIGKILL", happened)


def told(place, out, processes, chance, happened):
  """SIGTERM to one, when it has begun to train."""
  size = _size(out)
  running = train(place, out, processes)
  end = time.monotonic() + 90
  while _size(out) == size and time.monotonic() < end and running[-1].poll() is None:
    time.sleep(0.1)
  time.sleep(chance.uniform(1.0, 8.0))
  _end(running[-1:], signal.SIGTERM)
  begun = time.monotonic()
  # Before training begins, SIGTERM ends a process as it does any other.
  through = _interrupted(running, "SIGTERM", happened, (AGAIN, -signal.SIGTERM))
  if not through:
    place.stopping.append(time.monotonic() - begun)
  return through


def in_a_save(place, out, processes, chance, happened):
  """SIGKILL as soon as a save has begun, or a little later."""
  running = train(place, out, processes)
  end = time.monotonic() + 60
  skip = chance.randrange(3)  # saves let through
  seen: set[str] = set()
  while time.monotonic() < end and any(each.poll() is None for each in running):
    with contextlib.suppress(FileNotFoundError):
      seen |= {path.name for path in (out / "checkpoints").iterdir() if "tmp" in path.name}
    if len(seen) > skip:
      break
    time.sleep(0.002)
  time.sleep(chance.choice([0.0, 0.01, 0.05, 0.2]))
  return _killed(running, "SIGKILL in a save", happened)


def one_of_two(place, out, processes, chance, happened):
  """SIGKILL to one, and a little later to the other, as schedulers do."""
  running = train(place, out, processes)
  time.sleep(chance.uniform(5.0, 25.0))
  running[chance.randrange(2)].kill()
  time.sleep(PATIENCE)
  return _killed(running, "SIGKILL of one of two", happened)


def full_disk(place, out, processes, chance, happened):
  """The run's folder lies on a disk that is full after a few checkpoints, for one start."""
  del chance
  disk = out.with_name(out.name + "-disk")
  disk.mkdir(exist_ok=True)
  mount = ["mount", "-t", "tmpfs", "-o", f"size={_size(out) + SPARE}", "none", str(disk)]
  if subprocess.run(mount, check=False).returncode:
    disk.rmdir()
    return False  # not allowed to
  try:
    if out.exists():
      for path in out.iterdir():
        _copy(path, disk / path.name)
    (running,) = train(place, disk, processes)
    through = _interrupted([running], "full disk", happened, (BAD_INPUT,), "No space left")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(disk, out)
    return through
  finally:
    subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()


def _copy(path: pathlib.Path, to: pathlib.Path) -> None:
  (shutil.copytree if path.is_dir() else shutil.copy2)(path, to)


def _size(folder: pathlib.Path) -> int:
  """Bytes on disk, in whole pages."""
  total = 0
  with contextlib.suppress(FileNotFoundError):  # a file that went meanwhile
    for path in folder.rglob("*"):
      total += -(-path.stat().st_size // 4096) * 4096
  return total


def _damage(out: pathlib.Path, chance, change: Callable[[bytes], bytes]) -> bool:
  """Changes a file of the last checkpoint, if there is one before it."""
  folder = out / "checkpoints"
  steps = (
    sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else ()
  )
  if len(steps) < 2:
    return False
  files = [p for p in (folder / str(steps[-1])).rglob("*") if p.is_file() and p.stat().st_size]
  file = chance.choice(sorted(files))
  file.write_bytes(change(file.read_bytes()))
  return True


def flipped(place, out, processes, chance, happened):
  def flip(content: bytes) -> bytes:
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]

  if _damage(out, chance, flip):
    happened.append("flipped bit in the last checkpoint")
  return False


def cut(place, out, processes, chance, happened):
  if _damage(out, chance, lambda content: content[: chance.randrange(len(content))]):
    happened.append("cut file in the last checkpoint")
  return False


def wrong_clock(place, out, processes, chance, happened):
  """A start whose clock is days before or after, killed at a random time."""
  days = str(chance.uniform(-400.0, 400.0))
  path = os.pathsep.join([str(place.clock), *filter(None, [os.environ.get("PYTHONPATH")])])
  running = train(place, out, processes, PYTHONPATH=path, CHAOS_CLOCK=days)
  time.sleep(chance.uniform(6.0, 20.0))
  return _killed(running, "wrong clock, SIGKILL", happened)


# What is left.


def fingerprint(place: Place, out: pathlib.Path) -> dict[str, Any]:
  """Checksums of the last checkpoint's arrays, read; and the records."""
  from dmpo_jax import base as base_lib
  from dmpo_jax import checkpoint, logs, train

  base = base_lib.load_base(str(place.base))
  metadata = checkpoint.read_metadata(out / "checkpoints")
  trained = train.load_trained(out, base.shapes["unet"])  # reads and checks the whole state
  records = [
    {name: value for name, value in record.items() if name not in MEASURED}
    for record in logs.read(out)
  ]
  return {
    "step": metadata["step"],
    "state": metadata["checksums"],
    "trained": checkpoint.fingerprint(trained),
    "records": records,
  }


def files_of(folder: pathlib.Path) -> dict[str, str]:
  """File -> digest, but for TFDS's own records: even undisturbed it gives their fields any order.

  What is made of them, the latents, is compared.
  """
  return {
    str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and not ("tfds" in path.parts and "array_record" in path.name)
  }


def differing(got: Any, expected: Any, where: str = "") -> list[str]:
  return list(_differing(json.loads(json.dumps(got)), json.loads(json.dumps(expected)), where))


def _differing(got: Any, expected: Any, where: str) -> Iterator[str]:
  if isinstance(got, dict) and isinstance(expected, dict):
    for name in {**expected, **got}:
      yield from _differing(got.get(name), expected.get(name), f"{where}/{name}")
  elif isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
      yield from _differing(a, b, f"{where}/{i}")
  elif got != expected and not (got != got and expected != expected):
    yield f"{where}: {str(got)[:100]}, expected {str(expected)[:100]}"


if __name__ == "__main__":
  main()
