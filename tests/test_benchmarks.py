"""The benchmarks as they are run by hand, on little: what they count is exact, times are not."""

import os
import pathlib
import subprocess
import sys

import diffusers
import pytest
import torch
import torch_models
from torch.utils import flop_counter

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


def count_flops(raw):
  """PyTorch's count of the products and convolutions of one forward pass; nothing is computed."""
  with torch.device("meta"), torch.no_grad():
    model = diffusers.UNet2DConditionModel(**torch_models.public(raw))
    size, width = model.config.sample_size, model.config.cross_attention_dim
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    with flop_counter.FlopCounterMode(display=False) as counter:
      model(
        torch.zeros(1, 4, size, size),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1, 77, width),
        added_cond_kwargs=added,
      )
  return counter.get_total_flops()


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
  counts = [count_flops(raw) for raw in (torch_models.UNET_SD15_FULL, torch_models.UNET_SDXL_FULL)]
  for row, flops in zip(demand, (counts[0], counts[0], counts[1], counts[1]), strict=True):
    _, forward, pair, utilisation, pairs, host, cores = row
    assert float(forward) == pytest.approx(flops / 1e12, rel=0.03)  # ours counts no padding
    assert float(pair) == pytest.approx(8 * float(forward), abs=0.06)
    chips = 256 * 197 * first_number(utilisation) / 100
    assert float(pairs) == pytest.approx(chips / (8 * float(forward)), rel=0.01)
    assert float(host) == pytest.approx(float(pairs) / 64, abs=0.1) and float(cores) >= 0
  assert "Estimated, not run" in done.stdout


def test_prepare_memory(tiny_base):
  settings = ["--side", 48, "--steps", 2, "--base", tiny_base, "--sampled", 20]
  done, tables = run("prepare.py", "memory", "--rows", 1500, *settings)
  assert done.returncode == 0, done.stderr
  ((rows, _, *counts, _, _, prepared, trained),) = tables[0]
  # Pairs, ties, rows without a label and truncated pictures: three times those of 500 rows.
  assert rows == "1,500" and counts == ["1,290", "180", "27", "3"]
  assert all(100 < first_number(peak) < 10_000 for peak in (prepared, trained))  # MiB
  assert "over that of few: prepare 1.000, train 1.000\n" in done.stdout
  assert done.stdout.endswith("Pairs whose latents were compared with their pictures: 20\n")


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


def test_cpu_step():
  settings = ["--cases", "emoji", "--pairs", 1, "--rounds", 2, "--seconds", 0]
  done, (variants, parts) = run("cpu_step.py", *settings, "--modes", "eager")
  # That loss, gradient norm and update agree is in the exit status.
  assert done.returncode == 0, done.stderr
  assert "emoji: 4.3 M parameters, 1 pairs of 4 x 4 x 16\n" in done.stdout
  assert [row[0] for row in variants] == ["eager, contiguous", "eager, channels_last"]
  for _, seconds, *differences in variants:
    assert float(seconds) > 0 and all(0 <= float(each) < 1e-4 for each in differences)
  assert len(parts) == 5 and parts[0][0] == "step"
  for _, *cells in parts:
    assert all(first_number(cell) > 0 for cell in cells)
