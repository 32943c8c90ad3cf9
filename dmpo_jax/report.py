"""The report of a run: a self-contained HTML file, its pictures beside it, a terminal's table.

Data in, files out. Captions, names and settings come from outside: all of them are escaped.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax import figures, reading, report_page, report_style, report_table

PREFERENCE = (
  "What “preferred” means here: a prompt is a keyword that several emoji share, and of two such "
  "emoji the one that people used clearly more often in tweets is the winner. It is a revealed "
  "choice of a symbol, counted over tweets in 13 European languages whatever the topic; it is not "
  "a rating of a drawing, and nobody compared two pictures."
)
README_GRIDS = 6  # prompts in grids.png: as many as a screen shows at once
_ICON = 64  # side of a bar's icon in pixels, twice what the page shows, for dense screens
SHIFT_ROWS = 6  # emoji of a prompt that get their own bar; the others are summed


class Grid(NamedTuple):
  """Samples of one prompt, the same seeds for both models.

  better: per sample +1 (the policy's emoji is used more), 0 (tie) or -1 (used less).
  """

  caption: str
  split: str
  reference: UInt8[np.ndarray, "n H W 3"]
  policy: UInt8[np.ndarray, "n H W 3"]
  better: list[int]


class PromptShift(NamedTuple):
  """Which emoji a prompt's samples are nearest to; shares of all samples, in [0, 1]."""

  caption: str
  split: str
  names: list[str]
  icons: UInt8[np.ndarray, "k H W 3"]
  uses: list[int]
  reference_share: list[float]
  policy_share: list[float]


def write_report(
  folder: pathlib.Path,
  *,
  summary: dict,
  metrics: list[dict],
  grids: list[Grid],
  shifts: list[PromptShift],
  config: dict,
  command: str,
  curve: list[dict] | None = None,
) -> pathlib.Path:
  """Writes report.html and its pictures (grids, curves, trade_off; each also as *_dark.png).

  Args:
    folder: made if absent; a report in it is replaced.
    summary: what summary.json holds.
    metrics: the records of metrics.jsonl; validation fields may be absent.
    grids: prompts to show, at most 8 samples to a row; the first 6 make grids.png.
    shifts: prompts whose emoji shares to show.
    config: the run's configuration, nested at will.
    command: what a reader types to repeat the run.
    curve: further models for the trade-off, in order: {"label": str} and the fields of
      summary["policy"]; "split" says on which couples they were measured if not on test.

  Returns:
    The path of report.html.

  Raises:
    ValueError: `summary`, a grid, a shift or a point of `curve` lacks something or does not fit.
  """
  _check(summary, grids, shifts, curve or [])
  strips = [_strips(grid) for grid in grids]
  panels = figures.panels_of(metrics)
  curves = {
    theme: [figures.curve(metrics, panel, theme) for panel in panels]
    for theme in report_style.THEMES
  }
  plots = {theme: _trade_offs(summary, curve or [], theme) for theme in report_style.THEMES}
  page = report_page.page(
    _title(summary),
    [
      _opening(summary),
      _grid_section(grids, strips),
      _shift_section(shifts),
      report_page.result_section(summary, plots, curve or []),
      report_page.curve_section(_verdicts(summary, metrics, config), panels, curves),
      report_page.run_section(summary, metrics, config, command),
    ],
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for theme in report_style.THEMES:
    for name, picture in _pictures(grids, strips, curves[theme], plots[theme], theme).items():
      suffix = "" if theme == "light" else f"_{theme}"
      (folder / f"{name}{suffix}.png").write_bytes(picture)
  path = folder / "report.html"
  # A lone surrogate in a caption has no UTF-8: it becomes a character reference.
  path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
  return path


def result_table(summary: dict) -> str:
  """Reference against policy in plain text, with 95 % intervals: what a terminal prints.

  Raises:
    ValueError: `summary` lacks a number.
  """
  report_table.check_summary(summary)
  rows = [("", "reference", "policy")]
  for field, name, _ in report_table.MEASURES:
    models = (summary[model][field] for model in ("reference", "policy"))
    rows.append((name, *(report_table.plain(interval) for interval in models)))
  rate = report_table.plain(summary["heldout_win_rate"])
  rows.append(("win rate, held-out", f"{report_table.CHANCE} by definition", rate))
  widths = [max(len(row[column]) for row in rows) for column in range(3)]
  lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(r, widths, strict=True)) for r in rows]
  lines.insert(1, "  ".join("-" * width for width in widths))
  lines.append(f"{summary['samples']:,} samples per model; [95 % bootstrap interval over prompts]")
  return "\n".join(line.rstrip() for line in lines)


def _check(
  summary: dict, grids: Sequence[Grid], shifts: Sequence[PromptShift], curve: list
) -> None:
  report_table.check_summary(summary)
  for grid in grids:
    sizes = {len(grid.reference), len(grid.policy), len(grid.better)}
    if len(sizes) != 1 or sizes == {0}:
      raise ValueError(
        f"grid of prompt {grid.caption!r}: expected as many reference samples as policy samples "
        f"and marks, at least 1, got {len(grid.reference)}, {len(grid.policy)}, {len(grid.better)}"
      )
  for shift in shifts:
    lengths = [len(part) for part in shift[2:]]
    if len(set(lengths)) != 1:
      raise ValueError(
        f"shift of prompt {shift.caption!r}: expected names, icons, uses and both shares of one "
        f"length, got {lengths}"
      )
  for position, point in enumerate(curve):
    for field in ("label", "rmse", "prompt_match", "use_rank_heldout"):
      if field not in point:
        raise ValueError(f"curve[{position}]: expected the field {field!r}, got {sorted(point)}")


def _strips(grid: Grid) -> list[Image.Image]:
  """The grid as strips of at most 8 columns, all equally wide."""
  columns = min(figures.COLUMNS, len(grid.better))
  return [
    figures.comparison_strip(
      grid.reference[start : start + columns],
      grid.policy[start : start + columns],
      grid.better[start : start + columns],
      columns,
    )
    for start in range(0, len(grid.better), columns)
  ]


def _trade_offs(summary: dict, curve: list[dict], theme: str) -> list[bytes]:
  models = [(str(point["label"]), point, "other") for point in curve]
  models += [(role, summary[role], role) for role in ("reference", "policy")]
  plots = []
  for field, title in (
    ("rmse", "RMSE to the nearest real emoji (left is better)"),
    ("prompt_match", "Prompt match (right is better)"),
  ):
    points = [figures.Point(n, m[field], m["use_rank_heldout"], role) for n, m, role in models]
    plots.append(figures.trade_off(points, title, theme))
  return plots


def _pictures(grids, strips, curves, plots, theme: str) -> dict[str, bytes]:
  pictures = {"trade_off": figures.encode(figures.tile(plots, 2, theme))}
  if curves:
    pictures["curves"] = figures.encode(figures.tile(curves, 3, theme))
  if grids:
    captions = [grid.caption for grid in grids[:README_GRIDS]]
    first = [parts[0] for parts in strips[:README_GRIDS]]
    pictures["grids"] = figures.encode(figures.labelled_grid(captions, first, theme))
  return pictures


def _verdicts(summary: dict, metrics: list[dict], config: dict) -> list[reading.Verdict]:
  rmse = tuple(summary[model]["rmse"]["mean"] for model in ("reference", "policy"))
  return reading.read(
    metrics,
    warmup_steps=config.get("optim", {}).get("warmup_steps", 0),
    rmse=rmse if all(map(report_table.known, rmse)) else None,
  )


def _title(summary: dict) -> str:
  return f"Teaching a diffusion model which emoji people use, with {summary['method'].upper()}"


def _opening(summary: dict) -> str:
  return (
    f"<header>\n<h1>{report_page.text(_title(summary))}</h1>\n"
    f'<p class="lede">{_done(summary)} {_outcome(summary)}</p>\n'
    f'<p class="note">{report_page.text(PREFERENCE)}</p>\n</header>\n{_tiles(summary)}'
  )


def _done(summary: dict) -> str:
  steps, pairs = summary.get("steps"), summary.get("pairs", {}).get("train")
  text = "A small Stable Diffusion was fine-tuned"
  text += f" for {steps:,} steps" if steps is not None else ""
  text += f" on {pairs:,} pairs of emoji" if pairs is not None else " on pairs of emoji"
  return text + ", to draw, for a word, the emoji that people use more often."


def _outcome(summary: dict) -> str:
  """What came out, in one sentence that says so if nothing did."""
  rate = summary["heldout_win_rate"]
  if not all(report_table.known(rate[end]) for end in ("mean", "low", "high")):
    return "No win rate could be measured on held-out couples."
  mean, low, high = (f"{100 * rate[end]:.1f}" for end in ("mean", "low", "high"))
  found = (
    f"{mean} % of comparisons with the same word and seed (95 % interval {low} to {high}; 50 % is "
    "no change)"
  )
  if rate["low"] > report_table.CHANCE:
    verdict = f"On couples held out from training, the policy’s emoji wins {found}"
  elif rate["high"] < report_table.CHANCE:
    verdict = f"It got worse: on held-out couples the policy’s emoji wins only {found}"
  else:
    verdict = f"No effect on held-out couples is certain: the policy’s emoji wins {found}"
  return f"{verdict}; {_price(summary)}."


def _price(summary: dict) -> str:
  match, rmse = (" to ".join(_means(summary, field)) for field in ("prompt_match", "rmse"))
  return (
    f"prompt match went from {match} and the distance to the nearest real emoji (RMSE) from {rmse}"
  )


def _means(summary: dict, field: str) -> tuple[str, str]:
  before, after = (summary[model][field]["mean"] for model in ("reference", "policy"))
  return report_table.fixed(before), report_table.fixed(after)


def _tiles(summary: dict) -> str:
  rate = summary["heldout_win_rate"]
  low, high = (report_table.percent(rate[end]) for end in ("low", "high"))
  tiles = [
    ("Win rate, held-out", report_table.percent(rate["mean"], 1), f"95 % interval {low} to {high}")
  ]
  for name, field, note in (
    ("Use rank, held-out", "use_rank_heldout", "0.5 is chance"),
    ("Prompt match", "prompt_match", "share on topic"),
    ("RMSE", "rmse", "lower is truer"),
  ):
    before, after = _means(summary, field)
    tiles.append((name, f'<em class="was">{before} →</em> {after}', note))
  return (
    '<div class="tiles">\n'
    + "\n".join(
      f'<div class="tile"><span class="what">{name}</span><b>{value}</b><span>{note}</span></div>'
      for name, value, note in tiles
    )
    + "\n</div>"
  )


def _grid_section(grids: Sequence[Grid], strips: Sequence[Sequence[Image.Image]]) -> str:
  if not grids:
    return ""
  blocks = [_grid(grid, parts) for grid, parts in zip(grids, strips, strict=True)]
  marks = [mark for grid in grids for mark in grid.better]
  counts = [marks.count(mark) for mark in (1, -1, 0)]
  return (
    "<section>\n<h2>Before and after, same seeds</h2>\n"
    '<p class="note">Upper row: the reference. Lower row: the policy, from the same noise. '
    'Marked samples show a different emoji: <i class="key better"></i> one that people use more '
    f'({counts[0]}), <i class="key worse"></i> one that they use less ({counts[1]}); the other '
    f"{counts[2]} are ties.</p>\n"
    '<div class="grids">\n' + "\n".join(blocks) + "\n</div>\n</section>"
  )


def _grid(grid: Grid, strips: Sequence[Image.Image]) -> str:
  marks = list(grid.better)
  alternative = report_page.text(
    f"samples for {grid.caption}: reference above, policy below; {marks.count(1)} show an emoji "
    f"that is used more, {marks.count(-1)} one that is used less"
  )
  sides = '<div class="sides"><span>reference</span><span>policy</span></div>'
  rows = [
    f'<div class="strip">{sides}<img src="{_source(strip)}" alt="{alternative}"></div>'
    for strip in strips
  ]
  return f"<figure>{_prompt(grid.caption, grid.split)}{''.join(rows)}</figure>"


def _source(image: Image.Image) -> str:
  return report_page.uri(figures.encode(image))


def _prompt(caption: str, split: str) -> str:
  caption, split = report_page.text(caption), report_page.text(split)
  return f'<div class="prompt"><b>{caption}</b><small>{split}</small></div>'


def _shift_section(shifts: Sequence[PromptShift]) -> str:
  if not shifts:
    return ""
  return (
    "<section>\n<h2>Where the probability went</h2>\n"
    '<p class="note">Share of each prompt’s samples that are nearest to an emoji, most used first: '
    '<i class="swatch reference"></i> reference, <i class="swatch policy"></i> policy. The number '
    "beside a name is how often people used it.</p>\n"
    '<div class="shifts">\n' + "\n".join(_shift(shift) for shift in shifts) + "\n</div>\n</section>"
  )


def _shift(shift: PromptShift) -> str:
  order = sorted(range(len(shift.names)), key=lambda k: -shift.uses[k])
  # Kept are the emoji that a model draws most; the order stays the one by use.
  drawn = sorted(order, key=lambda k: -max(shift.reference_share[k], shift.policy_share[k]))
  kept = set(drawn[:SHIFT_ROWS])
  rows = [
    _bar_row(
      f'<img src="{_source(figures.enlarge(shift.icons[k], _ICON))}" alt="">',
      shift.names[k],
      f"{shift.uses[k]:,}",
      shift.reference_share[k],
      shift.policy_share[k],
    )
    for k in order
    if k in kept
  ]
  rest = [k for k in order if k not in kept]
  if rest:
    shares = (sum(s[k] for k in rest) for s in (shift.reference_share, shift.policy_share))
    rows.append(_bar_row(_NO_ICON, f"{len(rest)} more with this keyword", "", *shares))
  missing = [1 - sum(s) for s in (shift.reference_share, shift.policy_share)]
  if max(missing) > 1e-3:  # beyond rounding of the shares
    rows.append(_bar_row(_NO_ICON, "emoji without this keyword", "", *missing))
  head = _prompt(shift.caption, shift.split)
  return f'<figure>{head}<div class="shift">{"".join(rows)}</div></figure>'


_NO_ICON = "<span></span>"


def _bar_row(icon: str, name: str, uses: str, reference: float | int, policy: float | int) -> str:
  reference, policy = (min(max(float(share), 0.0), 1.0) for share in (reference, policy))
  bars = "".join(
    f'<div class="bar"><i class="{model}" style="width:{100 * share:.1f}%"></i></div>'
    for model, share in (("reference", reference), ("policy", policy))
  )
  label = f'<div class="name"><span>{report_page.text(name)}</span><small>{uses}</small></div>'
  before, after = report_table.percent(reference), report_table.percent(policy)
  shares = f'<div class="pair">{before}<b>{after}</b></div>'
  return f"{icon}<div>{label}{bars}</div>{shares}"
