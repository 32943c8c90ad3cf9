"""The report's pictures: what they show, pixel by pixel where that can be said."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from dmpo_jax import figures, report_style

CELL, GAP = 128, 10


def samples(count, side=32, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def interval(mean, reach=0.1):
  return {"mean": mean, "low": mean - reach, "high": mean + reach}


def decode(png):
  return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def rgb(colour):
  return np.array(ImageColor.getrgb(colour))


def test_samples_are_enlarged_by_whole_pixels():
  picture = np.asarray(figures.enlarge(samples(1)[0]))
  np.testing.assert_array_equal(picture, samples(1)[0].repeat(4, 0).repeat(4, 1))


def test_large_samples_shrink_to_a_cell():
  assert figures.enlarge(samples(1, side=512)[0]).size == (CELL, CELL)


def test_strip_has_the_reference_above_and_marks_only_the_policy():
  reference, policy = samples(3, seed=1), samples(3, seed=2)
  strip = np.asarray(figures.comparison_strip(reference, policy, [1, 0, -1]))
  pitch = CELL + GAP
  assert strip.shape == (2 * pitch - GAP, 3 * pitch - GAP, 4)
  centre = slice(40, 80)
  for column in range(3):
    for top, shown in ((0, reference), (pitch, policy)):
      cell = strip[top : top + CELL, column * pitch : column * pitch + CELL, :3]
      expected = shown[column].repeat(4, 0).repeat(4, 1)
      np.testing.assert_array_equal(cell[centre, centre], expected[centre, centre])
  assert (strip[:, CELL : CELL + GAP, 3] == 0).all(), "gaps are transparent"
  right = np.arange(3) * pitch + CELL - 5
  green, red = rgb(report_style.LIGHT.better), rgb(report_style.LIGHT.worse)
  np.testing.assert_array_equal(strip[pitch + 4, right[0], :3], green)
  np.testing.assert_array_equal(strip[pitch + CELL - 5, right[2], :3], red)
  tie = strip[pitch:, pitch : pitch + CELL, :3].reshape(-1, 3)
  above = strip[:CELL, :, :3].reshape(-1, 3)
  for colour in (green, red):
    assert not (tie == colour).all(-1).any()
    assert not (above == colour).all(-1).any()


def test_labelled_grid_takes_any_caption():
  strips = [figures.comparison_strip(samples(2), samples(2), [0, 0])] * 3
  captions = ["a very long caption " * 20, "line\nbreak\x00 \ud800 ☃", ""]
  grid = figures.labelled_grid(captions, strips, "dark")
  assert grid.size == (330 + strips[0].width + 72, 3 * strips[0].height + 2 * 40 + 72)
  assert grid.getpixel((2, 2)) == ImageColor.getrgb(report_style.DARK.page)


def test_series_keeps_the_last_record_of_a_step_and_finite_values():
  metrics = [
    {"step": 0, "train/loss": 0.7},
    {"step": 10, "train/loss": 9.0},
    {"step": 20, "train/loss": math.nan},
    {"step": 10, "train/loss": 0.6},
    {"step": 30, "validation/margin": 0.1},
    {"step": 40, "train/loss": None},
  ]
  steps, values = figures.series(metrics, "train/loss")
  assert steps.tolist() == [0, 10]
  assert values.tolist() == [0.7, 0.6]


@pytest.mark.parametrize("count", [1, 2, 49, 50, 301])
def test_moving_average_against_a_loop(count):
  values = np.random.default_rng(3).normal(size=count)
  half = count // 50
  expected = [values[max(0, k - half) : k + half + 1].mean() for k in range(count)]
  np.testing.assert_allclose(figures.moving_average(values), expected, atol=1e-12)


def test_panels_follow_the_records():
  metrics = [{"step": 0, "train/loss": 0.7, "train/accuracy": 0.5, "train/margin": 0.0}]
  panels = figures.panels_of(metrics)
  assert [(panel.field, panel.splits) for panel in panels] == [
    ("loss", ("train",)),
    ("margin", ("train",)),
    ("accuracy", ("train",)),
  ]
  metrics.append({"step": 5, "validation/margin": 0.0, "validation/accuracy": 0.5})
  fields = [(panel.field, panel.splits) for panel in figures.panels_of(metrics)]
  assert ("accuracy", ("train", "validation")) in fields
  assert ("margin", ("validation",)) in fields
  assert figures.panels_of([]) == []


def test_curve_shows_its_values_and_repeats_its_bytes():
  panel = figures.Panel("Loss", "loss")
  falling = [{"step": step, "train/loss": 1 - step / 20} for step in range(20)]
  rising = [{"step": step, "train/loss": step / 20} for step in range(20)]
  first = figures.curve(falling, panel, "light")
  assert first == figures.curve(falling, panel, "light")
  assert first != figures.curve(rising, panel, "light")
  light, dark = decode(first), decode(figures.curve(falling, panel, "dark"))
  assert light.shape == dark.shape == (470, 700, 3)
  np.testing.assert_allclose(light[0, 0], rgb(report_style.LIGHT.page), atol=3)
  np.testing.assert_allclose(dark[0, 0], rgb(report_style.DARK.page), atol=3)


def test_log_axis_falls_back_where_a_value_is_not_positive():
  panel = next(panel for panel in figures.PANELS if panel.log)
  metrics = [{"step": step, "train/grad_norm": float(step)} for step in range(3)]
  assert decode(figures.curve(metrics, panel, "light")).shape == (470, 700, 3)


def test_winner_and_loser_share_an_axis():
  metrics = [
    {"step": 0, "train/winner_advantage": 0.0, "train/loser_advantage": 0.0},
    {"step": 1, "train/winner_advantage": 0.5, "train/loser_advantage": -2.0},
  ]
  low, high = figures._limits(metrics)
  assert low < -1.9 and high > 0.4


def test_trade_off_takes_labels_literally_and_gaps_silently():
  nothing = {"mean": math.nan, "low": None, "high": None}
  no_interval = {"mean": 0.5, "low": None, "high": None}
  points = [
    figures.Point("$\\frac{$", interval(0.5), interval(0.6), "other"),
    figures.Point("unmeasured", nothing, interval(0.6), "other"),
    figures.Point("reference", no_interval, interval(0.5), "reference"),
    # The mean lies outside its interval: rounding can do that and no bar may point backwards.
    figures.Point("policy", {"mean": 0.5, "low": 0.6, "high": 0.4}, interval(0.7), "policy"),
  ]
  for some in (points, points[2:], []):
    shape = decode(figures.trade_off(some, "RMSE", "light")).shape
    np.testing.assert_allclose(shape, (660, 920, 3), atol=2)  # versions round otherwise


def test_tile_fills_rows():
  pictures = [figures.encode(Image.new("RGB", (40, 20), "red")) for _ in range(4)]
  tiled = figures.tile(pictures, 3, "light")
  assert tiled.size == (3 * 70 + 30, 2 * 50 + 30)
  assert tiled.getpixel((30 + 5, 30 + 50 + 5)) == (255, 0, 0)
  assert tiled.getpixel((30 + 70 + 5, 30 + 50 + 5)) != (255, 0, 0)
