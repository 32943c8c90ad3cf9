"""Each reader of foreign files against hundreds of damaged ones; `benchmarks/fuzz.py` runs more."""

import importlib.util
import json
import os
import pathlib
import random
import subprocess
import sys
import types

import hypothesis
import pytest
from hypothesis import strategies

from dmpo_jax import json_files, safetensors_io
from dmpo_jax.data import images

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
FEW = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}


@pytest.fixture(scope="module")
def fuzz():
  specification = importlib.util.spec_from_file_location("fuzz", SCRIPT)
  module = importlib.util.module_from_spec(specification)
  specification.loader.exec_module(module)
  return module


def run(*arguments):
  """Exit status, the cells of the table's rows, and what was written to stderr."""
  done = subprocess.run(
    [sys.executable, SCRIPT, *map(str, arguments)],
    env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    capture_output=True,
    text=True,
    timeout=600,
  )
  lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
  return done.returncode, lines, done.stderr


@pytest.mark.slow
def test_every_reader_refuses_by_its_documented_error(fuzz):
  status, lines, errors = run("--inputs", 300)
  assert status == 0, errors
  assert [line[0] for line in lines] == list(fuzz.READERS)
  for name, inputs, read, refused, failed, longest, memory, _ in lines:
    assert (inputs, failed) == ("300", "0") and int(read) + int(refused) == 300
    assert int(read) < 300 or name == "jsonl"  # whose broken lines are rows, and not errors
    assert float(longest) < 10 and int(memory) < 1024


@pytest.mark.parametrize("name", ["safetensors", "scheduler", "csv", "image"])
def test_an_input_is_a_function_of_its_number(fuzz, tmp_path, name):
  reader = fuzz.READERS[name](tmp_path)
  inputs = [fuzz.make_input(name, reader, 0, number) for number in range(30)]
  assert inputs == [fuzz.make_input(name, reader, 0, number) for number in range(30)]
  assert inputs != [fuzz.make_input(name, reader, 1, number) for number in range(30)]
  assert len(set(map(repr, inputs))) > 20


def reader_that(fuzz, read):
  return lambda folder: fuzz.Reader(b"valid", lambda dice: dice.randbytes(4), read)


@pytest.mark.parametrize(
  "error, failed", [(ValueError, 0), (KeyError, 1), (MemoryError, 1), (RecursionError, 1)]
)
def test_an_undocumented_error_fails(fuzz, monkeypatch, capsys, tmp_path, error, failed):
  def read(content):
    if content != b"valid":
      raise error("oh")

  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setitem(fuzz.READERS, "csv", reader_that(fuzz, read))
  options = types.SimpleNamespace(inputs=7, first=3, seed=0, guided=False)
  assert fuzz.run_alone("csv", options) == failed
  output = capsys.readouterr()
  assert output.out.startswith(f"| csv | 7 | 0 | {7 * (1 - failed)} | {7 * failed} |")
  assert ("csv, input 3: Traceback" in output.err) == bool(failed)


def test_an_input_that_takes_too_long_or_too_much_fails(fuzz, monkeypatch, capsys, tmp_path):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setitem(fuzz.READERS, "csv", reader_that(fuzz, lambda content: None))
  options = types.SimpleNamespace(inputs=2, first=0, seed=0, guided=False)
  assert fuzz.run_alone("csv", options) == 0
  monkeypatch.setattr(fuzz, "MOST_SECONDS", -1.0)
  assert fuzz.run_alone("csv", options) == 1
  assert "took 0.0 s" in capsys.readouterr().err
  monkeypatch.setattr(fuzz, "MOST_SECONDS", 10.0)
  monkeypatch.setattr(fuzz, "MOST_MEMORY", -1)
  assert fuzz.run_alone("csv", options) == 1


@pytest.mark.parametrize("name", ["csv", "image"])
def test_guided_changes_are_a_function_of_the_bytes(fuzz, tmp_path, name):
  reader = fuzz.READERS[name](tmp_path)
  drawn = [random.Random(number).randbytes(256) for number in range(30)]
  first, second = ([reader.change(fuzz.GuidedDice(data)) for data in drawn] for _ in range(2))
  assert first == second and len(set(map(repr, first))) > 20
  dice = fuzz.GuidedDice(b"\x00\x80" + b"\xff" * 9)
  assert dice.random() == 0.5 and dice.getrandbits(3) == 7 and dice.getrandbits(8) == 255


@pytest.mark.slow
def test_a_guided_run_counts_its_inputs_and_says_how_to_make_one_again(fuzz):
  pytest.importorskip("atheris")
  status, lines, errors = run("--inputs", 200, "--readers", "csv", "--guided")
  assert status == 0, errors
  name, inputs, read, refused, failed, *_ = lines[0]
  assert (name, inputs, failed) == ("csv", "200", "0") and int(read) + int(refused) == 200


def test_bytes_are_read_by_one_reader(fuzz, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["fuzz.py", "--data", "00"])
  with pytest.raises(SystemExit):
    fuzz.main()
  assert "--data: expected one of --readers, got 14" in capsys.readouterr().err
  monkeypatch.setattr(sys, "argv", ["fuzz.py", "--data", "00ff", "--readers", "jsonl"])
  assert fuzz.main() == 0


def test_without_atheris_a_guided_run_says_what_to_install(fuzz, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["fuzz.py", "--guided"])
  monkeypatch.setattr(fuzz.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(SystemExit):
    fuzz.main()
  assert "pip install atheris" in capsys.readouterr().err


def test_changes_reach_every_part_of_a_tree(fuzz):
  tree = {"a": [1, {"b": "text"}], "c": None, "d": 0.5}
  dice = random.Random(0)
  changed = [fuzz.change_value(dice, tree) for _ in range(500)]
  assert all(each is not tree for each in changed) and tree["a"][1] == {"b": "text"}
  names = {name for each in changed if isinstance(each, dict) for name in each}
  assert {"a", "c", "d"} <= names and names & set(fuzz.PATHS)
  assert any(isinstance(each, dict) and "a" not in each for each in changed)


# What hypothesis makes up, beside what the script changes.

values = strategies.recursive(
  strategies.none()
  | strategies.booleans()
  | strategies.integers()
  | strategies.floats()
  | strategies.text(),
  lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
)


@hypothesis.settings(max_examples=200, **FEW)
@hypothesis.given(value=values)
def test_json_is_read_as_it_was_written_or_refused(value):
  try:
    assert json_files.parse_object(json.dumps(value)) == value
  except ValueError:
    finite = json.dumps(value).replace('"', "")
    is_object = isinstance(value, dict)
    assert not is_object or "NaN" in finite or "Infinity" in finite or len(finite) > 310


@hypothesis.settings(max_examples=200, **FEW)
@hypothesis.given(data=strategies.binary(max_size=200), length=strategies.integers(0, 300))
def test_any_bytes_are_tensors_or_refused(tmp_path_factory, data, length):
  file = tmp_path_factory.mktemp("any") / "x.safetensors"
  file.write_bytes(length.to_bytes(8, "little") + data)
  try:
    assert not safetensors_io.load_safetensors(file)
  except ValueError as error:
    assert str(error).startswith(f"{file}: expected a whole safetensors file")


@hypothesis.settings(max_examples=200, **FEW)
@hypothesis.given(
  start=strategies.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF", b"GIF89a"]
  ),
  data=strategies.binary(max_size=200),
)
def test_any_bytes_are_a_picture_or_refused(start, data):
  try:
    assert images.decode(start + data).mode == "RGB"
  except ValueError as error:
    assert str(error)
