"""What scores of several models on the same prompts and noise say: means, win rates, sign tests.

Images of one prompt are no independent witnesses, so prompts are what is counted and resampled:
intervals and tests are about new prompts, with the models and the sampler as they are.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from dmpo_jax import evaluate


class Measure(NamedTuple):
  """One number for each image, or for each prompt, of each model.

  Attributes:
    name: in tables.
    higher: whether more is better; None where neither is, so that nobody wins.
    scores: model -> values [p, s], rows in the order of `prompts`; NaN is refused.
    prompts: positions of the prompts that were measured, in the list of all prompts.
  """

  name: str
  higher: bool | None
  scores: Mapping[str, Float[np.ndarray, "p s"]]
  prompts: tuple[int, ...]


def wins(
  scores: Float[np.ndarray, "p s"], others: Float[np.ndarray, "p s"], *, higher: bool = True
) -> Float[np.ndarray, "p s"]:
  """1 where `scores` are better, 0 where `others` are, ties one half.

  >>> wins(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 2.0, 2.0]])).tolist()
  [[0.0, 0.5, 1.0]]
  """
  sign = 1 if higher else -1
  return (sign * np.sign(scores - others) + 1) / 2


def sign_test(won: int, lost: int) -> float:
  """Exact two-sided sign test: P(as uneven or more | each prompt is a fair coin's).

  Ties are left out before (Conover 1999, section 3.4). With n = won + lost and m the smaller,
  p = min(1, 2 sum_{k <= m} C(n, k) / 2^n); the sum is of whole numbers, so nothing is rounded
  before the division.

  >>> sign_test(5, 0), sign_test(3, 3), sign_test(0, 0)
  (0.0625, 1.0, 1.0)

  Raises:
    ValueError: a negative count.
  """
  if min(won, lost) < 0:
    raise ValueError(f"sign test: expected counts of at least 0, got {won} and {lost}")
  total = won + lost
  term, tail = 1, 0
  for k in range(min(won, lost) + 1):
    tail += term
    term = term * (total - k) // (k + 1)
  return min(1.0, 2 * tail / 2**total)


def compare_pair(
  values: Float[np.ndarray, "p s"], counted: Bool[np.ndarray, "p s"] | None = None
) -> dict[str, Any]:
  """Win rate of one model over another with its interval, and the sign test over prompts.

  A prompt is won if more than half of its comparisons are, ties at one half.

  Args:
    values: 1 won, 0 lost, 0.5 tied.
    counted: which comparisons took place; all if None.
  """
  counted = np.ones(values.shape, bool) if counted is None else counted
  rows = counted.any(axis=1)
  balance = np.where(counted, values - 0.5, 0.0).sum(axis=1)[rows]
  won, lost = int((balance > 0).sum()), int((balance < 0).sum())
  return {
    "win_rate": evaluate.bootstrap(values, counted)._asdict(),
    "comparisons": int(counted.sum()),
    "prompts_won": won,
    "prompts_lost": lost,
    "prompts_tied": len(balance) - won - lost,
    "sign_test": sign_test(won, lost),
  }


def pairs_of(models: Sequence[str]) -> list[tuple[str, str]]:
  """All pairs (model, other), the other one earlier in the list; those with the first come first.

  >>> pairs_of(["base", "a", "b"])
  [('a', 'base'), ('b', 'base'), ('b', 'a')]
  """
  return [(later, earlier) for earlier, later in itertools.combinations(models, 2)]


def summarise(measure: Measure, name: str, members: Sequence[int]) -> dict[str, Any] | None:
  """One entry of `results` in comparison.json: a measure on a set of prompts.

  Args:
    name: of the set.
    members: positions of its prompts.

  Returns:
    None if the set was not measured, or only in part.

  Raises:
    ValueError: a score is not finite.
  """
  place = {prompt: row for row, prompt in enumerate(measure.prompts)}
  if not all(member in place for member in members):
    return None
  rows = [place[member] for member in members]
  scores = {model: values[rows] for model, values in measure.scores.items()}
  for model, values in scores.items():
    if not np.isfinite(values).all():
      raise ValueError(
        f"{measure.name} of {model}: expected finite scores, got "
        f"{values[~np.isfinite(values)][0]}; look at what the scorer does with its images"
      )
  pairs = []
  if measure.higher is not None:
    for model, other in pairs_of(list(scores)):
      values = wins(scores[model], scores[other], higher=measure.higher)
      pairs.append({"model": model, "over": other, **compare_pair(values)})
  better = {True: "higher", False: "lower", None: None}[measure.higher]
  first = next(iter(scores.values()))
  return {
    "set": name,
    "measure": measure.name,
    "better": better,
    "prompts": len(rows),
    "values_per_prompt": first.shape[1],
    "means": {model: evaluate.bootstrap(each)._asdict() for model, each in scores.items()},
    "pairs": pairs,
  }


def summarise_all(
  measures: Sequence[Measure], sets: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
  """`results` of comparison.json: each measure on each set, and on all prompts if sets are several.

  A prompt that stands in two sets counts in both, and once in `overall`.
  """
  wholes = dict(sets)
  if len(sets) > 1:
    wholes["overall"] = sorted({member for members in sets.values() for member in members})
  found = (summarise(measure, *whole) for measure in measures for whole in wholes.items())
  return [each for each in found if each is not None]
