"""A comparison of models, told: a table for the terminal, and a page with the images.

Prompts and names come from outside: all of them are escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dmpo_jax import figures, report_page, report_table

PROTOCOL = (
  "Every model draws from the same prompt, the same seed and the same initial noise, with one "
  "sampler. Means and win rates have 95 % bootstrap intervals over prompts; a tie counts one half. "
  "A prompt is won by whoever won more of its images. "
  "The sign test is exact and two-sided: of the prompts on which two models differ, how likely is "
  "a division as uneven as this one, or more, if each prompt were a coin’s toss."
)
CAUTION = (
  "A scorer is a model with tastes of its own, and can be pleased without a person being pleased. "
  "Another sampler, guidance or number of steps moves scores as much as training does: compare "
  "within this page, not with a published table. Of {tests} tests, up to {chance:.1f} would on "
  "average fall below 0.05 if no model differed from another."
)
HEAD = ("measure", "model", "mean", "over", "win rate", "won · lost · tied", "sign test")


class Samples(NamedTuple):
  """Images of a prompt: a row for each model, the same seed in each column."""

  prompt: str
  set: str
  rows: list[UInt8[np.ndarray, "n H W 3"]]


def show(comparison: Mapping[str, Any]) -> str:
  """What a terminal prints."""
  blocks = []
  for title, results in _sets(comparison):
    rows = [HEAD, *(row for result in results for row in _rows(result))]
    blocks.append(f"{title}\n{_align(rows)}")
  if comparison["votes"] is not None:
    blocks.append(f"{_votes_title(comparison)}\n{_align([_VOTE_HEAD, *_vote_rows(comparison)])}")
  note = (
    "[95 % bootstrap interval over prompts]; win rates: images, ties one half; "
    "won · lost · tied: prompts"
  )
  return "\n\n".join([*blocks, note])


def _align(rows: Sequence[Sequence[str]]) -> str:
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(r, widths, strict=True)) for r in rows]
  lines.insert(1, "  ".join("-" * width for width in widths))
  return "\n".join(line.rstrip() for line in lines)


def _sets(comparison: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
  """(title, results) of each set that was measured, in order."""
  results = comparison["results"]
  for name in dict.fromkeys(result["set"] for result in results):
    found = [result for result in results if result["set"] == name]
    count = comparison["sampling"]["images_per_prompt"]
    yield f"{name}: {found[0]['prompts']:,} prompts, {count} images each", found


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
  """A row for each model with its mean; the pairs follow, each beside its first model."""
  better = f" ({result['better']} is better)" if result["better"] else ""
  label = result["measure"] + better
  for model, interval in result["means"].items():
    mean = report_table.plain(interval)
    pairs = [pair for pair in result["pairs"] if pair["model"] == model]
    if not pairs:
      yield (label, model, mean, *[""] * 4)
    for pair in pairs:
      yield (label, model, mean, *_pair_cells(pair))
      label = mean = model = ""
    label = ""


def _pair_cells(pair: Mapping[str, Any]) -> tuple[str, ...]:
  counts = " · ".join(f"{pair[f'prompts_{each}']:,}" for each in ("won", "lost", "tied"))
  return pair["over"], report_table.plain(pair["win_rate"]), counts, p_value(pair["sign_test"])


def p_value(value: float) -> str:
  """A p-value, to three places.

  >>> p_value(0.04567), p_value(1e-9)
  ('0.046', '< 0.001')
  """
  return "< 0.001" if value < 0.001 else f"{value:.3f}"


_VOTE_HEAD = ("model", "over", "win rate", "won · lost · tied", "sign test", "votes")


def _vote_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
  for pair in comparison["votes"]["pairs"]:
    yield (pair["model"], *_pair_cells(pair), f"{pair['comparisons']:,}")


def _votes_title(comparison: Mapping[str, Any]) -> str:
  votes = comparison["votes"]
  voters = "one voter" if votes["voters"] == 1 else f"{votes['voters']:,} voters"
  return f"people: {votes['votes']:,} votes by {voters}, who saw no names"


def html(comparison: Mapping[str, Any], samples: Sequence[Samples]) -> str:
  """The page; it needs no other file."""
  names = [model["name"] for model in comparison["models"]]
  title = f"{', '.join(names[1:])} against {names[0]}"
  sections = [_opening(title, comparison)]
  sections += [
    _section(heading, _table(HEAD, [row for result in results for row in _rows(result)]))
    for heading, results in _sets(comparison)
  ]
  if comparison["votes"] is not None:
    note = (
      '<p class="note">Two images of one prompt, side by side, left and right by lot. The interval '
      "and the test are over prompts, all votes on a prompt together.</p>\n"
    )
    body = note + _table(_VOTE_HEAD, list(_vote_rows(comparison)))
    sections.append(_section(_votes_title(comparison), body))
  sections.append(_samples_section(names, samples))
  sections.append(_settings_section(comparison))
  emoji = "emoji" in comparison["prompt_sets"]
  return report_page.page(title, sections, report_page.ATTRIBUTION if emoji else "")


def _opening(title: str, comparison: Mapping[str, Any]) -> str:
  tests = sum(len(result["pairs"]) for result in comparison["results"])
  caution = CAUTION.format(tests=tests, chance=0.05 * tests)
  paragraphs = "\n".join(f'<p class="note">{report_page.text(t)}</p>' for t in (PROTOCOL, caution))
  return f"<header>\n<h1>{report_page.text(title)}</h1>\n{paragraphs}\n</header>"


def _section(heading: str, body: str) -> str:
  return f"<section>\n<h2>{report_page.text(heading)}</h2>\n{body}\n</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  titles = "".join(f'<th scope="col">{report_page.text(each)}</th>' for each in head)
  body = "\n".join(
    "<tr>" + "".join(f"<td>{report_page.text(cell)}</td>" for cell in row) + "</tr>" for row in rows
  )
  return (
    f'<div class="scroll"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
    "</table></div>"
  )


def _samples_section(names: Sequence[str], samples: Sequence[Samples]) -> str:
  if not samples:
    return ""
  legend = ", ".join(names)
  note = (
    f'<p class="note">From above to below: {report_page.text(legend)}; in a column all start from '
    "the same noise. Which prompts are shown is decided by their letters, not by the results.</p>\n"
  )
  blocks = "\n".join(_figure(names, each) for each in samples)
  return _section("Side by side", f'{note}<div class="grids">\n{blocks}\n</div>')


def _figure(names: Sequence[str], samples: Samples) -> str:
  columns = min(figures.COLUMNS, len(samples.rows[0]))
  picture = figures.sample_rows([row[:columns] for row in samples.rows])
  address = report_page.uri(figures.encode(picture))
  alternative = report_page.text(f"images for {samples.prompt}, from above: {', '.join(names)}")
  prompt, name = report_page.text(samples.prompt), report_page.text(samples.set)
  return (
    f'<figure><div class="prompt"><b>{prompt}</b><small>{name}</small></div>'
    f'<img src="{address}" alt="{alternative}"></figure>'
  )


def _settings_section(comparison: Mapping[str, Any]) -> str:
  facts = {
    **{f"model {each['name']}": each["source"] for each in comparison["models"]},
    **{f"scorer {name}": path for name, path in comparison["scorers"].items()},
    **comparison["sampling"],
    **{name: comparison[name] for name in ("seed", "compute", "devices")},
  }
  rows = "".join(
    f"<div><dt>{report_page.text(name)}</dt><dd>{report_page.text(value)}</dd></div>"
    for name, value in facts.items()
  )
  return _section("What was compared", f'<dl class="facts">{rows}</dl>')
