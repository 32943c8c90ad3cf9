"""The benchmarks as they are run by hand, on little: what they count is exact, times are not."""

import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.slow


def run(name, *arguments):
  """What it printed, and its tables as lists of rows of cells, without their heads."""
  done = subprocess.run(
    [sys.executable, BENCHMARKS / name, *map(str, arguments)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    timeout=900,
  )
  lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
  rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
  rules = [number for number, row in enumerate(rows) if set("".join(row)) == {"-"}]
  ends = [rule - 1 for rule in rules[1:]] + [len(rows)]
  return done, [rows[rule + 1 : end] for rule, end in zip(rules, ends, strict=True)]


def first_number(cell):
  return float(cell.split()[0].rstrip("%").replace(",", ""))


def test_input_pipeline():
  done, tables = run("input_pipeline.py", "--pairs", 64, "--batches", 4, "--rounds", 1)
  # Seconds may mislead on a busy machine; nothing else may go wrong.
  assert done.returncode == 0 or done.stderr.startswith("seeking: expected a ratio"), done.stderr
  speeds, seeks, demand = tables
  assert [row[0] for row in speeds] == [row[0] for row in seeks] == ["SD 1.5", "SDXL"]
  for row, side in zip(speeds, (64, 128), strict=True):
    raw = 2 * side * side * 8 * 2 / 1e3  # two pictures' moments in float16
    assert 0.7 * raw < first_number(row[1]) < 1.1 * raw
    assert all(first_number(cell) > 0 for cell in row[2:])
  for _, near, far, ratio in seeks:
    assert first_number(ratio) == pytest.approx(first_number(far) / first_number(near), abs=0.05)
  assert [row[0] for row in demand] == ["SD 1.5", "SD 1.5", "SDXL", "SDXL"]
  for row, macs in zip(demand, (0.40, 0.40, 3.0, 3.0), strict=True):
    _, forward, pair, utilisation, pairs, host, cores = row
    # Multiply-adds of one forward pass as others have counted them, two operations each.
    assert 2 * macs * 0.9 < float(forward) < 2 * macs * 1.2
    assert float(pair) == pytest.approx(8 * float(forward), abs=0.06)
    chips = 256 * 197 * first_number(utilisation) / 100
    assert float(pairs) == pytest.approx(chips / (8 * float(forward)), rel=0.01)
    assert float(host) == pytest.approx(float(pairs) / 64, abs=0.1) and float(cores) >= 0
  assert "Estimated, not run" in done.stdout


def test_prepare_memory(tiny_base):
  settings = ["--side", 48, "--steps", 2, "--base", tiny_base, "--sampled", 20]
  done, tables = run("prepare.py", "memory", "--rows", 500, 1000, *settings)
  assert done.returncode == 0, done.stderr
  few, many = tables[0]
  # Pairs, ties, rows without a label and truncated pictures in every 500 rows.
  assert [few[0], *few[2:6]] == ["500", "430", "60", "9", "1"]
  assert [many[0], *many[2:6]] == ["1,000", "860", "120", "18", "2"]
  for row in (few, many):
    assert all(100 < first_number(peak) < 10_000 for peak in row[-2:])  # MiB
  assert done.stdout.endswith("Pairs whose latents were compared with their pictures: 40\n")


def test_prepare_encoder():
  done, tables = run("prepare.py", "encoder", "--side", 64, "--batch", 2, "--rounds", 1)
  assert done.returncode == 0, done.stderr
  assert [row[:2] for row in tables[0]] == [
    ["SD 1.5", "2 of 64 x 64"],
    ["shipped", "64 of 32 x 32"],
  ]
  for *_, ours, judge, ratio, difference in tables[0]:
    assert first_number(ratio) == pytest.approx(first_number(ours) / first_number(judge), rel=0.02)
    assert 0 < float(difference) < 1e-4
