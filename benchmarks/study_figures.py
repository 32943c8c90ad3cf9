"""The study's picture: what every run won against what it cost, a panel for each method.

    python benchmarks/study_figures.py runs/study/points.json --out docs

`points.json` is written by `benchmarks/study.py`. A point is a run: hollow on the validation split
(the sweep; of a sweep over one number the points are joined in its order), filled on the test split
(the seeds of the table). Runs of the other methods are pale behind them.
"""

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Sequence

from matplotlib import figure as mpl_figure
from matplotlib import ticker

from dmpo_jax import figures, report_style

COLUMNS = 4
PANEL_INCHES = (2.45, 2.05)
SYMBOLS = {"beta": "β", "beta_mapo": "β", "alpha": "α", "order": "a", "learning_rate": "rate"}


def cost(point: dict) -> float:
  """RMSE over the base's on the same prompts and noise."""
  return point["rmse"] / point["base_rmse"]


def draw_frontier(points: Sequence[dict], bound: float, theme: str) -> bytes:
  """PNG of win rate against grown RMSE, all axes alike.

  Args:
    points: of `points.json`.
    bound: the grown RMSE beyond which no setting is chosen.
    theme: "light" or "dark".
  """
  palette = report_style.THEMES[theme]
  rows = list(dict.fromkeys(point["row"] for point in points))
  count = math.ceil(len(rows) / COLUMNS)
  figure = mpl_figure.Figure(
    figsize=(COLUMNS * PANEL_INCHES[0], count * PANEL_INCHES[1]), layout="constrained"
  )
  figure.set_facecolor(palette.page)
  panels = figure.subplots(count, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
  for axes, row in itertools.zip_longest(panels, rows):
    if row is None:
      axes.set_axis_off()
      continue
    _style(axes, palette, row)
    axes.axhline(0.5, color=palette.muted, linewidth=0.7, dashes=(3, 3), zorder=0)
    axes.axvline(bound, color=palette.worse, linewidth=0.7, dashes=(3, 3), zorder=0)
    others = [point for point in points if point["row"] != row]
    axes.scatter([cost(p) for p in others], [p["win"] for p in others], s=7, color=palette.line)
    own = [point for point in points if point["row"] == row]
    sweep = [point for point in own if point["split"] == "validation"]
    for line in _lines(sweep):
      axes.plot(
        [cost(p) for p in line], [p["win"] for p in line], color=palette.policy, marker="o",
        markersize=4, markerfacecolor=palette.page, linewidth=0.9, markeredgewidth=0.9,
      )  # fmt: skip
    for point in sweep:
      axes.annotate(
        _short(point["settings"]), (cost(point), point["win"]), xytext=(4, -7),
        textcoords="offset points", fontsize=5.5, color=palette.muted,
      )  # fmt: skip
    table = [point for point in own if point["split"] == "test"]
    axes.scatter(
      [cost(p) for p in table], [p["win"] for p in table], s=16, color=palette.policy, zorder=3
    )
  figure.supxlabel("RMSE over the base's", fontsize=8, color=palette.muted)
  figure.supylabel("win rate over the base", fontsize=8, color=palette.muted)
  return figures.png(figure, dpi=160)


def _lines(points: Sequence[dict]) -> list[list[dict]]:
  """Points whose settings differ in the same field's value, in its order."""
  lines: dict[str, list[dict]] = {}
  for point in points:
    lines.setdefault(point["settings"].rpartition("=")[0], []).append(point)
  return [sorted(each, key=lambda p: _value(p["settings"])) for each in lines.values()]


def _value(settings: str) -> float:
  """The last value: 2000 of "objective.beta=2000.0"."""
  return float(settings.rpartition("=")[2])


def _short(settings: str) -> str:
  """The last field: β 2000 of "objective.beta=2000.0"."""
  name = settings.rpartition("=")[0].rpartition(".")[2]
  return f"{SYMBOLS.get(name, name)} {_value(settings):g}"


def _style(axes, palette: report_style.Palette, title: str) -> None:
  axes.set_facecolor(palette.page)
  axes.set_title(title, fontsize=8, color=palette.ink, loc="left", pad=4)
  axes.tick_params(colors=palette.muted, labelsize=6.5, length=2)
  axes.set_xscale("log")
  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  for name, spine in axes.spines.items():
    spine.set_color(palette.line)
    spine.set_visible(name in ("left", "bottom"))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("points", type=pathlib.Path, help="points.json of a study")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the pictures")
  options = parser.parse_args()
  if not options.points.is_file():
    parser.error(f"{options.points}: not there; run benchmarks/study.py, which writes it")
  study = json.loads(options.points.read_text(encoding="utf-8"))
  if not study["points"]:
    parser.error(f"{options.points}: no run has been measured yet")
  options.out.mkdir(parents=True, exist_ok=True)
  for theme in report_style.THEMES:
    suffix = "" if theme == "light" else f"_{theme}"
    picture = draw_frontier(study["points"], study["grown_rmse"], theme)
    (options.out / f"study{suffix}.png").write_bytes(picture)


if __name__ == "__main__":
  main()
