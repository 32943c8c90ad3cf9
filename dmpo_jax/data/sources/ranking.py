"""Pairs out of several ranked images of one prompt."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dmpo_jax.data import rows
from dmpo_jax.data.sources import faults, files


class Ranking(NamedTuple):
  """Images of one prompt.

  Attributes:
    caption: the prompt.
    names: of the images, in their folder.
    ranks: one for each name; the lowest is the best, equal ones are ties.
  """

  caption: str
  names: tuple[str, ...]
  ranks: tuple[float, ...]


def check_limit(dataset: str, pairs_per_prompt: int | None) -> None:
  """Raises ValueError unless the option is None or at least 1."""
  if pairs_per_prompt is not None and pairs_per_prompt < 1:
    raise ValueError(
      f"{dataset}: pairs_per_prompt: expected at least 1 or None for all, got {pairs_per_prompt}"
    )


def read_pairs(
  ranking: Ranking,
  where: str,
  read_image: Callable[[str], bytes],
  *,
  pairs_per_prompt: int | None,
) -> Iterator[rows.Pair | rows.Dropped]:
  """All pairs of two images of unequal rank; every two of equal rank are dropped as a tie.

  With `pairs_per_prompt`, only so many of the pairs: the first by `files.couple`, which is a choice
  at random, but always the same one. Nothing is known of how clear a choice was: p_choice is 1.
  The winner's side is whether it stands before or after the loser in `ranking.names`.

  Args:
    ranking: images of a prompt.
    where: file and entry, for messages.
    read_image: name -> bytes; raises `faults.Fault`.
    pairs_per_prompt: at most so many pairs; None for all.
  """
  ranks, names = ranking.ranks, ranking.names
  if len(set(names)) < len(names):
    yield rows.Dropped("image is listed twice", where, True)
    return
  image = functools.cache(read_image)
  twos = list(itertools.combinations(range(len(names)), 2))
  for i, j in twos:
    if ranks[i] == ranks[j]:
      yield rows.Dropped("tie", where, False)
  pairs = [sorted(two, key=ranks.__getitem__) for two in twos if ranks[two[0]] != ranks[two[1]]]
  couples = [(files.couple(names[i], names[j]), i, j) for i, j in pairs]
  for couple, winner, loser in _choose(couples, pairs_per_prompt):
    side = "listed first" if winner < loser else "listed second"
    try:
      image_w, image_l = image(names[winner]), image(names[loser])
    except faults.Fault as fault:
      yield rows.Dropped(fault.reason, where, fault.broken)
      continue
    yield rows.Pair(ranking.caption, image_w, image_l, 1.0, couple, where, side=side)


def _choose(
  couples: list[tuple[str, int, int]], pairs_per_prompt: int | None
) -> list[tuple[str, int, int]]:
  return couples if pairs_per_prompt is None else sorted(couples)[:pairs_per_prompt]
