"""What a run's curves say, in words: every verdict from a stated rule, with the record that met it.

Pure functions of records. The report and `dmpo doctor run` ask the same ones, so that a page never
calls healthy what the doctor would not.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dmpo_jax import alarms

Record = Mapping[str, int | float]
Line = tuple[str, Record]  # where a record stands, in words, and the record

FEW, MANY = 8, 20  # records below which a level of validation, or of noisy batches, is not judged
_FLAT = 0.01  # of the loss
STILL = 0.05  # nats: preferences within 1.3 % of a coin flip
_EXPLODED = 4.0  # times the denoising error; the demo, whose drawings stay sharp, ends at 1.8
_PAID = 2.5  # times it, halfway between the two as factors go
_BLURRED = 1.5  # times the RMSE to the nearest real drawing; the demo ends at 1.1
_FAR = 64.0  # nats: where `losses.peak_gradient_weight` stops looking; float32 is 1 from 17 on


class Rule(NamedTuple):
  """A kind of finding.

  Attributes:
    severity: "error": the run does not go on, or what it makes is spoilt; "warning"; or "good".
    title: what it is called.
    rule: when it is found.
    remedy: what to do.
  """

  severity: str
  title: str
  rule: str
  remedy: str


RULES = {
  "diverging": Rule(
    "error",
    "Diverging",
    f"The denoising error is {_EXPLODED:g} times the one at the start, the mean margin beyond "
    f"{_FAR:g} nats, or a metric not finite.",
    "The model forgets how to denoise: take an earlier checkpoint, lower optim.learning_rate or "
    "raise objective.beta.",
  ),
  "dead-zone": Rule(
    "error",
    "Most pairs have no gradient left",
    f"dead_zone is at least {alarms.DEAD_SHARE} in the last {alarms.DEAD_RECORDS} records.",
    "Lower objective.beta or optim.learning_rate in a new folder; if the pairs are ranked right, "
    "the run has learnt what it was asked.",
  ),
  "over-optimised": Rule(
    "warning",
    "Over-optimised: the preference grows at the cost of fidelity",
    f"The mean margin is above {STILL:g} nats, and the denoising error is {_PAID:g} times the one "
    "at the start, or, where samples were compared, the policy's RMSE to the nearest real drawing "
    f"{_BLURRED:g} times the reference's.",
    "Look at samples, and at those of an earlier checkpoint; train for fewer steps, lower "
    "optim.learning_rate or raise objective.beta.",
  ),
  "flat-loss": Rule(
    "warning",
    "Nothing learnt yet",
    f"After the warm-up, the loss of the last quarter of the records is within {_FLAT:.0%} of the "
    f"first quarter's and the mean margin within {STILL:g} nats of 0 ({FEW} validations, or "
    f"{MANY} records without).",
    "Raise optim.learning_rate or objective.beta; check that winners and losers differ.",
  ),
  "winners-worse": Rule(
    "warning",
    "Worse than the reference on the preferred images",
    "winner_advantage of the last validation is below 0: the margin grows because the dispreferred "
    "images are denoised worse still (likelihood displacement).",
    "Look at samples. If it goes on falling, lower optim.learning_rate or raise objective.beta.",
  ),
}
"""Faults that records alone tell of, the gravest first."""

OUTCOMES = {
  "healthy": Rule(
    "good",
    "Healthy",
    f"None of the faults, the mean margin of the last quarter of the records is above {STILL:g} "
    f"nats, and validation says so ({FEW} of them at least).",
    "Nothing. A margin is no picture: look at samples and at held-out couples before you trust it.",
  ),
  "undecided": Rule(
    "warning",
    "Too early to tell",
    "None of the faults, and not what is called healthy.",
    f"Train on, and validate at least {FEW} times: fewer, or batches alone, are not judged.",
  ),
}
"""What is said where there is no fault."""


class Verdict(NamedTuple):
  """One thing that curves say.

  Attributes:
    code: a key of `RULES` or `OUTCOMES`.
    where: the record that met the rule.
    detail: what was found there.
  """

  code: str
  where: str
  detail: str

  @property
  def rule(self) -> Rule:
    return (RULES | OUTCOMES)[self.code]


def read(
  records: Sequence[Record],
  *,
  warmup_steps: int = 0,
  rmse: tuple[float, float] | None = None,
) -> list[Verdict]:
  """What the curves of a run say, the gravest first; never empty.

  Args:
    records: of metrics.jsonl, in order.
    warmup_steps: of the learning rate; levels before it are not judged.
    rmse: of the reference's and the policy's samples to the nearest real drawing, where an
      evaluation measured them.

  One record is no curve:

  >>> [verdict.code for verdict in read([{"step": 10, "train/loss": 0.6, "train/margin": 0.2}])]
  ['undecided']
  """
  lines = [(f"step {record['step']}", record) for record in records]
  has_reference = any("winner_advantage" in name for record in records for name in record)
  found = list(find(lines, warmup_steps=warmup_steps, has_reference=has_reference))
  codes = {verdict.code for verdict in found}
  if rmse is not None and not codes & {"over-optimised", "diverging"}:
    found += _judge_samples(lines, *rmse)
  found.sort(key=lambda verdict: list(RULES).index(verdict.code))
  return found or [_outcome(lines, warmup_steps)]


def find(lines: Sequence[Line], *, warmup_steps: int, has_reference: bool) -> Iterator[Verdict]:
  """The faults that records tell of, each at most once.

  Args:
    lines: all records in order, each with where it stands.
    warmup_steps: as in `read`.
    has_reference: whether the objective compares with one.
  """
  if not lines:
    return
  if has_reference:
    yield from _dead_zone(lines)
    yield from _displacement(lines, warmup_steps)
  diverging = list(_divergence(lines, warmup_steps))
  yield from diverging
  if has_reference and not diverging:
    yield from _over_optimisation(lines, warmup_steps)
  yield from _flatness(lines, warmup_steps, has_reference)


def series(lines: Sequence[Line], name: str, first: int = 0) -> list[tuple[str, float]]:
  """Where a metric was recorded, and its values, from step `first` on."""
  return [(where, r[name]) for where, r in lines if name in r and r["step"] >= first]


def _dead_zone(lines: Sequence[Line]) -> Iterator[Verdict]:
  alarm, said = alarms.DeadZoneAlarm(), None
  for where, record in lines:
    text = alarm.check(record)
    said = (where, text) if text else said
  if alarm.active:
    yield Verdict("dead-zone", *said)


def _displacement(lines: Sequence[Line], warmup_steps: int) -> Iterator[Verdict]:
  advantages = series(lines, "validation/winner_advantage", warmup_steps)
  if advantages and advantages[-1][1] < 0:
    where, advantage = advantages[-1]
    first = next(place for place, value in advantages if value < 0)
    detail = f"winner_advantage is {advantage:.2e}; below 0 first in {first}"
    if margins := series(lines, "validation/margin", warmup_steps):
      detail += f"; the margin is {margins[-1][1]:.3g} nats"
    yield Verdict("winners-worse", where, detail)


def _divergence(lines: Sequence[Line], warmup_steps: int) -> Iterator[Verdict]:
  for where, record in lines:
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    if bad:
      yield Verdict("diverging", where, f"{', '.join(bad)} not finite")
      return
  for part in ("validation", "train"):
    growth = _growth(lines, part)
    if growth and growth.times > _EXPLODED:
      yield Verdict("diverging", growth.where, str(growth))
      return
    margins = series(lines, f"{part}/margin", warmup_steps)
    if margins and abs(margins[-1][1]) > _FAR:
      yield Verdict("diverging", margins[-1][0], f"{part}/margin is {margins[-1][1]:.3g}")
      return


class _Growth(NamedTuple):
  """Of the denoising error, from the first record that has it to the last."""

  name: str
  times: float
  start: str
  where: str

  def __str__(self) -> str:
    return f"{self.name} is {self.times:.1f} times that of {self.start}"


def _growth(lines: Sequence[Line], part: str) -> _Growth | None:
  name = f"{part}/denoising_loss"
  errors = series(lines, name)
  if len(errors) < 2 or errors[0][1] <= 0:
    return None
  (start, first), (where, last) = errors[0], errors[-1]
  return _Growth(name, last / first, start, where)


def _over_optimisation(lines: Sequence[Line], warmup_steps: int) -> Iterator[Verdict]:
  for part in ("validation", "train"):
    growth, margins = _growth(lines, part), series(lines, f"{part}/margin", warmup_steps)
    if growth and margins:
      margin = margins[-1][1]
      if growth.times >= _PAID and margin > STILL:
        detail = f"{growth}, and {part}/margin {margin:.3g} nats"
        yield Verdict("over-optimised", growth.where, detail)
      return


def _judge_samples(lines: Sequence[Line], reference: float, policy: float) -> Iterator[Verdict]:
  for part in ("validation", "train"):
    margins = series(lines, f"{part}/margin")
    if margins:
      margin = margins[-1][1]
      if margin > STILL and policy >= _BLURRED * reference > 0:
        yield Verdict(
          "over-optimised",
          "evaluation",
          f"RMSE {policy:.3f} is {policy / reference:.1f} times the reference's {reference:.3f}, "
          f"and {part}/margin {margin:.3g} nats",
        )
      return


def _flatness(lines: Sequence[Line], warmup_steps: int, has_reference: bool) -> Iterator[Verdict]:
  for part, enough in (("validation", FEW), ("train", MANY)):
    values = series(lines, f"{part}/loss", warmup_steps)
    if len(values) < enough:
      continue
    quarter = len(values) // 4
    first, last = (
      statistics.fmean(value for _, value in each) for each in (values[:quarter], values[-quarter:])
    )
    margins = series(lines, f"{part}/margin", warmup_steps)[-quarter:]
    still = not has_reference
    if margins:
      still = statistics.fmean(abs(value) for _, value in margins) < STILL
    if still and abs(last - first) < _FLAT * abs(first):
      detail = f"{part}/loss went from {first:.5g} to {last:.5g}"
      yield Verdict("flat-loss", values[-1][0], detail)
    return


def _outcome(lines: Sequence[Line], warmup_steps: int) -> Verdict:
  margins = series(lines, "validation/margin", warmup_steps)
  if len(margins) < FEW:
    where = margins[-1][0] if margins else lines[-1][0] if lines else "no record"
    return Verdict("undecided", where, f"{len(margins)} validations after the warm-up")
  margin = statistics.fmean(value for _, value in margins[-(len(margins) // 4) :])
  detail = f"validation/margin is {margin:.3g} nats, the mean of the last quarter"
  if margin <= STILL:
    return Verdict("undecided", margins[-1][0], detail)
  advantages = series(lines, "validation/winner_advantage", warmup_steps)
  if advantages:
    detail += f"; winners are denoised better than by the reference ({advantages[-1][1]:.1e})"
  return Verdict("healthy", margins[-1][0], detail)
