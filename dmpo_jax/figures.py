"""The report's pictures as PNG bytes: sample grids, training curves, the trade-off plots.

The same input gives the same bytes: nothing is stamped with a time.
"""

import io
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib import figure as mpl_figure
from matplotlib import ticker
from matplotlib.backends import backend_agg
from PIL import Image, ImageDraw, ImageFont

from dmpo_jax import report_style

COLUMNS = 8  # samples in a row before a grid breaks into two strips
_CELL = 128  # side of an enlarged sample: a whole multiple of 32 and 64, sharp on dense screens
_GAP = 10
_CORNER = 30
_DPI = 200
_PANEL_INCHES = (3.5, 2.35)
_SMOOTHING = 25  # a moving average over records / _SMOOTHING records leaves the trend


class Panel(NamedTuple):
  """One training curve: the records' field under train/, under validation/, or both."""

  title: str
  field: str
  splits: tuple[str, ...] = ("train",)
  baseline: float | None = None
  log: bool = False
  smooth: bool = True


PANELS = (
  Panel("Loss", "loss"),
  Panel("Margin u", "margin", baseline=0.0),
  Panel("Accuracy: share of pairs with u > 0", "accuracy", ("train", "validation"), 0.5),
  Panel("Winner advantage", "winner_advantage", ("train", "validation"), 0.0),
  Panel("Loser advantage", "loser_advantage", ("train", "validation"), 0.0),
  Panel("Validation margin, fixed noise", "margin", ("validation",), 0.0),
  Panel("Share of pairs in the dead zone", "dead_zone"),
  Panel("Gradient norm", "grad_norm", log=True),
  Panel("Learning rate", "learning_rate", smooth=False),
)
# Denoising errors of winner and loser share a unit, so their panels share an axis.
_SAME_AXIS = ("winner_advantage", "loser_advantage")


class Point(NamedTuple):
  """A model in the trade-off plots: {"mean", "low", "high"} per axis; role picks the colour."""

  label: str
  x: dict
  y: dict
  role: str  # "reference", "policy" or "other"


def encode(image: Image.Image) -> bytes:
  """PNG bytes of a picture."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


def enlarge(sample: UInt8[np.ndarray, "H W 3"], side: int = _CELL) -> Image.Image:
  """A `side` x `side` picture; small samples grow by nearest neighbour, so their pixels stay."""
  image = Image.fromarray(np.asarray(sample, np.uint8))
  if max(image.size) > side:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
  return image.resize((side, side), Image.Resampling.NEAREST)


def comparison_strip(
  reference: UInt8[np.ndarray, "n H W 3"],
  policy: UInt8[np.ndarray, "n H W 3"],
  better: Sequence[int],
  columns: int | None = None,
) -> Image.Image:
  """Reference row above policy row, same seed in each column; RGBA with transparent gaps.

  A policy sample whose emoji is used more than its neighbour above has a green upper right corner,
  one used less a red lower right corner: place and colour both tell them apart.

  Args:
    better: per sample +1, 0 (tie: no mark) or -1.
    columns: width in samples, at least n (default n); the rest stays empty.
  """
  canvas = sample_rows([reference, policy], columns)
  draw, pitch = ImageDraw.Draw(canvas), _CELL + _GAP
  for column, mark in enumerate(better):
    left = column * pitch
    if mark:
      _mark_corner(draw, left + _CELL - 1, pitch, better=mark > 0)
      _outline(draw, left, pitch)
  return canvas


def sample_rows(
  rows: Sequence[UInt8[np.ndarray, "n H W 3"]], columns: int | None = None
) -> Image.Image:
  """A row for each model, the same seed in each column; RGBA with transparent gaps.

  Args:
    columns: width in samples, at least n (default n); the rest stays empty.
  """
  pitch = _CELL + _GAP
  size = ((columns or len(rows[0])) * pitch - _GAP, len(rows) * pitch - _GAP)
  canvas = Image.new("RGBA", size)
  draw = ImageDraw.Draw(canvas)
  for number, samples in enumerate(rows):
    for column, sample in enumerate(samples):
      canvas.paste(enlarge(sample), (column * pitch, number * pitch))
      _outline(draw, column * pitch, number * pitch)
  return canvas


def _outline(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
  box = (left, top, left + _CELL - 1, top + _CELL - 1)
  draw.rectangle(box, outline="#b9bbbf", width=2)


def _mark_corner(draw: ImageDraw.ImageDraw, right: int, top: int, *, better: bool) -> None:
  edge, inward = (top, 1) if better else (top + _CELL - 1, -1)
  # The white triangle beneath keeps the mark apart from a drawing of the same colour.
  for size, colour in (
    (_CORNER + 6, "white"),
    (_CORNER, report_style.LIGHT.better if better else report_style.LIGHT.worse),
  ):
    draw.polygon([(right, edge), (right - size, edge), (right, edge + inward * size)], fill=colour)


def labelled_grid(
  captions: Sequence[str], strips: Sequence[Image.Image], theme: str
) -> Image.Image:
  """Strips under each other with the prompt and the row names on the left, on the theme's page."""
  palette = report_style.THEMES[theme]
  large, small = _font(34, bold=True), _font(22)
  label_width, space, edge = 330, 40, 36
  height = sum(strip.height + space for strip in strips) - space + 2 * edge
  width = label_width + max(strip.width for strip in strips) + 2 * edge
  canvas = Image.new("RGB", (width, height), palette.page)
  draw = ImageDraw.Draw(canvas)
  top = edge
  for caption, strip in zip(captions, strips, strict=True):
    middle = _CELL // 2
    right, bottom = edge + label_width - 24, top + strip.height
    draw.text((right, top + middle), "reference", palette.muted, small, anchor="rm")
    draw.text((right, bottom - middle), "policy", palette.policy, small, anchor="rm")
    caption = _shorten(caption, large, label_width - 24)
    draw.text((edge, top + strip.height // 2), caption, palette.ink, large, anchor="lm")
    canvas.paste(strip, (edge + label_width, top), strip)
    top += strip.height + space
  return canvas


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
  """DejaVu Sans of matplotlib's wheel: the same letters on every machine."""
  name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
  return ImageFont.truetype(pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
  text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(text + "…") > width:
    text = text[:-1]
  return text.rstrip() + "…"


def tile(pictures: Sequence[bytes], columns: int, theme: str) -> Image.Image:
  """PNGs of one size side by side, `columns` to a row, on the theme's page."""
  images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
  width, height = images[0].size
  columns, pad = min(columns, len(images)), 30
  rows = -(-len(images) // columns)
  size = (columns * (width + pad) + pad, rows * (height + pad) + pad)
  canvas = Image.new("RGB", size, report_style.THEMES[theme].page)
  for position, image in enumerate(images):
    row, column = divmod(position, columns)
    canvas.paste(image, (pad + column * (width + pad), pad + row * (height + pad)))
  return canvas


def series(metrics: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and finite values of one field, by step; of records with the same step the last counts.

  A run that was cut off and resumed repeats the steps after its last checkpoint.
  """
  last = {record["step"]: record[key] for record in metrics if record.get(key) is not None}
  steps = np.array(sorted(last), np.int64)
  values = np.array([last[step] for step in steps.tolist()], np.float64)
  finite = np.isfinite(values)
  return steps[finite], values[finite]


def moving_average(values: np.ndarray) -> np.ndarray:
  """Centred mean over about a 25th of the curve; at both ends over what the window still holds.

  >>> moving_average(np.arange(50.0))[[0, 25, 49]].tolist()
  [0.5, 25.0, 48.5]
  """
  half = len(values) // (2 * _SMOOTHING)
  total = np.concatenate([[0.0], np.cumsum(values)])
  position = np.arange(len(values))
  start, stop = np.maximum(position - half, 0), np.minimum(position + half + 1, len(values))
  return (total[stop] - total[start]) / (stop - start)


def panels_of(metrics: Sequence[dict]) -> list[Panel]:
  """The panels for which the records hold something, with only the splits that they hold."""
  found = []
  for panel in PANELS:
    splits = tuple(s for s in panel.splits if len(series(metrics, f"{s}/{panel.field}")[0]))
    if splits:
      found.append(panel._replace(splits=splits))
  return found


def curve(metrics: Sequence[dict], panel: Panel, theme: str) -> bytes:
  """PNG of one training curve: train records pale under their moving average, validation dotted."""
  palette = report_style.THEMES[theme]
  with matplotlib.rc_context(_settings(palette)):
    figure, axes = _axes(panel.title)
    for split in panel.splits:
      steps, values = series(metrics, f"{split}/{panel.field}")
      if split == "train":
        axes.plot(steps, values, color=palette.policy, alpha=0.3, linewidth=0.7)
        trend = moving_average(values) if panel.smooth else values
        axes.plot(steps, trend, color=palette.policy, label="train")
      else:
        style = {"marker": "o", "markersize": 3.2, "markeredgewidth": 0}
        axes.plot(steps, values, color=palette.validation, label="validation", **style)
    if panel.log and (series(metrics, f"train/{panel.field}")[1] > 0).all():
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
    elif panel.baseline is not None:
      axes.axhline(panel.baseline, color=palette.muted, linewidth=0.8, dashes=(3, 3), zorder=0)
    axes.yaxis.set_major_formatter(_tick)
    if panel.field in _SAME_AXIS:
      axes.set_ylim(_limits(metrics))
    if len(panel.splits) > 1:
      axes.legend(loc="best", frameon=False, handlelength=1.2, fontsize=7.5)
    axes.set_xlabel("step")
    return png(figure)


def _limits(metrics: Sequence[dict]) -> tuple[float, float]:
  """Shared axis of both advantages: the middle 98 % of their values, zero and some room."""
  keys = [f"{split}/{field}" for split in ("train", "validation") for field in _SAME_AXIS]
  values = np.concatenate([series(metrics, key)[1] for key in keys])
  low, high = (float(edge) for edge in np.percentile(values, [1, 99]))
  low, high = min(low, 0.0), max(high, 0.0)
  room = 0.1 * (high - low) or 1.0
  return low - room, high + room


def trade_off(points: Sequence[Point], x_title: str, theme: str) -> bytes:
  """PNG of use rank (up: what people use) against a measure of fidelity, with intervals.

  An arrow leads from the reference to the policy; other points are hollow and joined in order.
  """
  palette = report_style.THEMES[theme]
  colours = {
    "reference": palette.muted,
    "policy": palette.policy,
    "other": palette.validation,
  }
  points = [point for point in points if _measured(point.x) and _measured(point.y)]
  with matplotlib.rc_context(_settings(palette)):
    figure, axes = _axes("Use rank, held-out", inches=(4.6, 3.3))
    axes.set_xlabel(x_title)
    axes.axhline(0.5, color=palette.muted, linewidth=0.8, dashes=(3, 3), zorder=0)
    others = [point for point in points if point.role == "other"]
    axes.plot(
      [p.x["mean"] for p in others], [p.y["mean"] for p in others],
      color=palette.validation, linewidth=0.9, alpha=0.6, zorder=1,
    )  # fmt: skip
    _arrow(axes, points, palette)
    for point in points:
      _point(axes, point, colours[point.role], palette)
    axes.margins(x=0.16, y=0.2)
    _label_points(axes, points, colours)
    axes.annotate(
      "chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(-2, 3),
      textcoords="offset points", ha="right", fontsize=7, color=palette.muted,
    )  # fmt: skip
    return png(figure)


def _point(axes, point: Point, colour: str, palette: report_style.Palette) -> None:
  hollow = point.role == "other"
  axes.errorbar(
    point.x["mean"], point.y["mean"], xerr=_reach(point.x), yerr=_reach(point.y),
    fmt="o", color=colour, markersize=4.5 if hollow else 7, zorder=2 if hollow else 3,
    markerfacecolor=palette.page if hollow else colour,
    elinewidth=0.8 if hollow else 1.4, alpha=0.9 if hollow else 1,
  )  # fmt: skip


def _label_points(axes, points: Sequence[Point], colours: dict[str, str]) -> None:
  """Each name goes to the corner of its point that covers least; the two models choose first."""
  means = [(point.x["mean"], point.y["mean"]) for point in points]
  centres = axes.transData.transform(np.reshape(means, (-1, 2))) * 72 / axes.figure.dpi
  boxes = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in centres]
  for position in sorted(range(len(points)), key=lambda p: points[p].role == "other"):
    point, (x, y) = points[position], centres[position]
    small = point.role == "other"
    size, gap = (7.0, 4.0) if small else (9.0, 6.0)
    width = 0.65 * size * len(point.label)  # DejaVu Sans: a letter is about 0.6 em wide
    candidates = []
    for right, up in ((1, 1), (1, 0), (0, 1), (0, 0)):
      left = x + gap if right else x - gap - width
      bottom = y + gap if up else y - gap - size
      candidates.append((left, bottom, left + width, bottom + size))
    box = min(candidates, key=lambda c: sum(_overlap(c, other) for other in boxes))
    boxes.append(box)
    axes.annotate(
      point.label, means[position], xytext=(box[0] - x, box[1] - y), textcoords="offset points",
      color=colours[point.role], fontsize=size, fontweight="normal" if small else "bold",
    )  # fmt: skip


def _overlap(one: tuple, other: tuple) -> float:
  """Shared area of two boxes (left, bottom, right, top)."""
  width = min(one[2], other[2]) - max(one[0], other[0])
  return max(width, 0.0) * max(min(one[3], other[3]) - max(one[1], other[1]), 0.0)


def _arrow(axes, points: Sequence[Point], palette: report_style.Palette) -> None:
  ends = {point.role: (point.x["mean"], point.y["mean"]) for point in points}
  if ends.keys() >= {"reference", "policy"}:
    style = {"arrowstyle": "->", "color": palette.muted, "shrinkA": 8, "shrinkB": 8}
    axes.annotate("", ends["policy"], ends["reference"], arrowprops=style, zorder=1)


def _measured(interval: dict) -> bool:
  return interval["mean"] is not None and math.isfinite(interval["mean"])


def _reach(interval: dict) -> np.ndarray:
  """Error bar lengths; a bootstrap interval may miss its mean by rounding, a bar cannot."""
  mean = interval["mean"]
  low, high = (interval[end] if interval[end] is not None else mean for end in ("low", "high"))
  return np.nan_to_num(np.maximum([[mean - low], [high - mean]], 0.0))


def _axes(title: str, inches: tuple[float, float] = _PANEL_INCHES):
  # Figure without pyplot draws with Agg, opens no window and leaves nothing global behind.
  figure = mpl_figure.Figure(figsize=inches)
  # Room for the labels in inches: the same in all panels, so that they line up in a grid.
  width, height = inches
  left, right, bottom, top = 0.6 / width, 1 - 0.1 / width, 0.5 / height, 1 - 0.38 / height
  axes = figure.add_axes((left, bottom, right - left, top - bottom))
  axes.set_title(title, loc="left")
  axes.grid(axis="y")
  axes.locator_params(axis="x", nbins=5)
  return figure, axes


def _tick(value: float, position: int) -> str:
  """Every tick in full: matplotlib's common factor above an axis would displace its title."""
  del position
  return f"{value:g}".replace("-", "−")


def png(figure: mpl_figure.Figure, dpi: int = _DPI) -> bytes:
  """A matplotlib figure's PNG, small and the same every time."""
  figure.set_dpi(dpi)
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
  # 256 colours hold lines and text without visible loss and halve the size of the page.
  return encode(image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))


def _settings(palette: report_style.Palette) -> dict:
  """matplotlib's settings for one theme. Labels are data, so no "$" in them is mathematics."""
  return {
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.facecolor": palette.page,
    "figure.facecolor": palette.page,
    "savefig.facecolor": palette.page,
    "axes.edgecolor": palette.line,
    "axes.labelcolor": palette.muted,
    "axes.titlecolor": palette.ink,
    "text.color": palette.ink,
    "xtick.color": palette.muted,
    "ytick.color": palette.muted,
    "ytick.left": False,
    "grid.color": palette.line,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
  }
