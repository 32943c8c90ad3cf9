"""`dmpo prepare --beam` with a real Apache Beam, which needs an environment of its own.

Where apache-beam is not installed beside the tests, as it should not be, the environment is made
from the package as it would be installed: a minute or two and 1.4 GB, in the folder of the tests.
"""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import venv

import pair_files
import pytest
import tiny

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
WORKERS = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
# What pip says where there is no registry to be reached.
UNREACHABLE = ("NewConnectionError", "Temporary failure in name resolution", "Network is unreach")
SHARDS, ROWS = 6, 40
TIMEOUT = 300  # seconds, of a command that takes ten


@pytest.fixture(scope="module")
def python(tmp_path_factory):
  """The interpreter of an environment with dmpo_jax[beam]."""
  if importlib.util.find_spec("apache_beam"):
    yield sys.executable
    return
  folder = tmp_path_factory.mktemp("beam")
  source = folder / "source"  # setuptools writes beside what it builds
  for name in ("dmpo_jax", "configs"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, ignore=ignored)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
    shutil.copy(ROOT / name, source / name)
  venv.create(folder / "venv", with_pip=True)
  python = folder / "venv" / "bin" / "python"
  # Most of what is installed is never imported: it need not be compiled.
  command = [python, "-m", "pip", "install", "-q", "--no-compile", f"{source}[beam]"]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode and any(sign in done.stderr for sign in UNREACHABLE):
    pytest.skip("no registry can be reached to install apache-beam from")
  assert done.returncode == 0, done.stderr
  yield str(python)
  shutil.rmtree(folder)


@pytest.fixture(scope="module")
def overrides(tiny_base, tmp_path_factory):
  """Settings for six shards of 40 rows, with all that a record can hold of its caption."""
  folder = tmp_path_factory.mktemp("pick")
  for shard in range(SHARDS):
    rows = [
      pair_files.pickapic_row(
        shard * ROWS + i, (1.0, 0.0, 0.5)[i % 3], caption=f"word {i % 7} of {shard}"
      )
      for i in range(ROWS)
    ]
    pair_files.write_pickapic(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet", rows)
  return tiny.overrides(
    tiny_base,
    **{
      "data.dataset": "pickapic_v2",
      "data.path": folder,
      "data.resize": "bilinear",
      "data.crop": "random",
      "data.prompt_embeds": True,
      "data.validation_share": 0.0,
    },
  )


def start(python, data, overrides, *arguments):
  """`dmpo prepare` in a process group of its own, so that its workers can be killed with it."""
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  return subprocess.Popen(
    [python, "-m", "dmpo_jax.cli", "prepare", "--data", str(data), *overrides, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=data.parent,  # not the checkout: what is installed is what runs
    env=environment,
    start_new_session=True,
  )


def run(python, data, overrides, *arguments):
  child = start(python, data, overrides, *arguments)
  try:
    output, _ = child.communicate(timeout=TIMEOUT)
  finally:
    if child.poll() is None:
      os.killpg(child.pid, signal.SIGKILL)
  return child.returncode, output


def contents(folder):
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(overrides, tmp_path_factory):
  """What is written without Beam, in the environment of the tests."""
  data = tmp_path_factory.mktemp("whole") / "data"
  status, output = run(sys.executable, data, overrides)
  assert status == 0, output
  return contents(data)


def sidecars(data):
  return {path: path.stat().st_mtime_ns for path in data.rglob("shards/*.json")}


def test_two_workers_killed_in_the_middle_write_the_same_files(python, overrides, whole, tmp_path):
  data = tmp_path / "data"
  child = start(python, data, overrides, f"--beam={WORKERS}")
  deadline = time.monotonic() + TIMEOUT
  while child.poll() is None and len(sidecars(data)) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  os.killpg(child.pid, signal.SIGKILL)
  output, _ = child.communicate()
  assert child.returncode == -9, output
  finished = sidecars(data)
  assert 2 <= len(finished) < SHARDS and not list(data.rglob("metadata.json"))
  status, output = run(python, data, overrides, f"--beam={WORKERS}")
  assert status == 0, output
  after = sidecars(data)
  assert all(after[path] == written for path, written in finished.items())  # kept, not made anew
  assert contents(data) == whole


def test_the_local_runner_and_what_no_worker_has_to_do(python, overrides, whole, tmp_path):
  data = tmp_path / "data"
  status, output = run(python, data, overrides, "--beam=")
  assert status == 0, output
  assert contents(data) == whole
  status, output = run(sys.executable, data, overrides)  # without Beam: it is finished
  assert status == 0 and contents(data) == whole, output


def test_a_failing_worker_says_why_and_keeps_what_is_finished(python, tiny_base, tmp_path):
  folder = pair_files.write_drawings(tmp_path / "own", 120, broken=30)
  settings = {"data.dataset": "pairs", "data.path": folder}
  overrides = tiny.overrides(tiny_base, **settings)
  status, output = run(python, tmp_path / "data", overrides, "--beam=")
  last = output.splitlines()[-1]
  assert status == 2 and last.startswith("dmpo prepare: error: beam: a worker failed"), output
  assert "rows are broken" in last and "pairs.jsonl, line 1" in last


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("runner=DirectRunner", "beam: expected options of Beam, --NAME=VALUE"),
    ("--direct_running_mode=none", "beam: Beam refuses the options '--direct_running_mode=none'"),
    ("--runner=Nope", "Nope"),
  ],
)
def test_bad_options_are_refused(python, overrides, tmp_path, options, message):
  status, output = run(python, tmp_path / "data", overrides, f"--beam={options}")
  assert status == 2 and message in output.splitlines()[-1], output
  assert not list((tmp_path / "data").rglob("*array_record*"))
