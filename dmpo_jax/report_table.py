"""The summary's numbers as text and as the page's table of results."""

import math
from collections.abc import Sequence
from typing import Any

CHANCE = 0.5  # win rate and use rank of a model that knows nothing of use

MEASURES = (  # field of summary["reference"] and summary["policy"], name, which way is better
  ("prompt_match", "prompt match", "higher"),
  ("rmse", "RMSE", "lower"),
  ("use_rank_train", "use rank, train", "higher"),
  ("use_rank_heldout", "use rank, held-out", "higher"),
)


def check_summary(summary: dict) -> None:
  """Refuses a summary from which no report can be made.

  Raises:
    ValueError: names the first field that is missing or is no interval.
  """
  paths = ["heldout_win_rate", "samples", "method"]
  paths += [f"{model}.{field}" for model in ("reference", "policy") for field, *_ in MEASURES]
  for path in paths:
    value: Any = summary
    for part in path.split("."):
      if not isinstance(value, dict) or part not in value:
        raise ValueError(f"summary: the field {path} is missing; run the evaluation again")
      value = value[part]
    measured = path not in ("samples", "method")
    if measured and not (isinstance(value, dict) and value.keys() >= {"mean", "low", "high"}):
      raise ValueError(f"summary: {path}: expected mean, low and high, got {value!r}")


def known(value: float | int | None) -> bool:
  """Whether something was measured: no None, no NaN."""
  return value is not None and math.isfinite(value)


def fixed(value: float | int | None, digits: int = 3) -> str:
  """A number with a true minus sign; "n/a" where nothing could be measured."""
  return f"{value:.{digits}f}".replace("-", "−") if known(value) else "n/a"


def percent(value: float | int | None, digits: int = 0) -> str:
  """A share as a percentage.

  >>> percent(0.631)
  '63 %'
  """
  return f"{100 * value:.{digits}f} %" if known(value) else "n/a"


def plain(interval: dict) -> str:
  """Mean and interval for a terminal."""
  low, high = fixed(interval["low"]), fixed(interval["high"])
  return f"{fixed(interval['mean'])} [{low}, {high}]"


def table(summary: dict) -> str:
  """The results as an HTML table, each row with its intervals drawn on an axis."""
  rows = []
  rmse_end = _round_up([summary[model]["rmse"]["high"] for model in ("reference", "policy")])
  for field, name, better in MEASURES:
    models = {model: summary[model][field] for model in ("reference", "policy")}
    means = [interval["mean"] for interval in models.values()]
    change = means[1] - means[0] if all(known(mean) for mean in means) else None
    sign = "+" if known(change) and change > 0 else ""
    cells = [_cell(interval) for interval in models.values()] + [f"<td>{sign}{fixed(change)}</td>"]
    scale = rmse_end if field == "rmse" else 1.0
    label = f"{name} <small>({better} is better)</small>"
    mark = CHANCE if field.startswith("use_rank") else None
    rows.append((label, cells, _forest(models, scale, mark)))
  rate = summary["heldout_win_rate"]
  cells = ["<td></td>", _cell(rate), "<td></td>"]
  label = "win rate, held-out <small>(0.5 is no change)</small>"
  rows.append((label, cells, _forest({"policy": rate}, 1.0, CHANCE)))
  body = "\n".join(
    f'<tr><td>{label}</td>{"".join(cells)}<td class="forest">{forest}</td></tr>'
    for label, cells, forest in rows
  )
  return (
    '<div class="scroll"><table>\n<thead><tr><th>measure</th><th>reference</th><th>policy</th>'
    f'<th>change</th><th class="forest">0 to 1 (RMSE: 0 to {rmse_end:g}); dashed: chance</th></tr>'
    f"</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
  )


def _cell(interval: dict) -> str:
  low, high = fixed(interval["low"]), fixed(interval["high"])
  return f"<td>{fixed(interval['mean'])} <small>{low} – {high}</small></td>"


def _forest(models: dict[str, dict], scale: float, mark: float | None) -> str:
  """Intervals on a line from 0 to `scale`, reference above policy, `mark` dashed."""
  parts = [f'<s style="left:{100 * mark / scale:.1f}%"></s>'] if mark is not None else []
  for model, interval in models.items():
    if not all(known(interval[end]) for end in ("mean", "low", "high")):
      continue
    low, mean, high = (100 * min(max(interval[k] / scale, 0), 1) for k in ("low", "mean", "high"))
    parts.append(f'<i class="{model}" style="left:{low:.1f}%;width:{high - low:.1f}%"></i>')
    parts.append(f'<u class="{model}" style="left:{mean:.1f}%"></u>')
  return f'<div class="axis">{"".join(parts)}</div>'


def _round_up(values: Sequence[float | int | None]) -> float:
  """The next of 1, 2, 5, 10 times a power of ten: an axis end for `values`."""
  top = max((value for value in values if known(value) and value > 0), default=1.0)
  power = 10.0 ** math.floor(math.log10(top))
  return next((step * power for step in (1, 2, 5) if step * power >= top), 10 * power)
