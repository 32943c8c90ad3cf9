"""Pairs with draws that are settled beforehand: timestep, noise, dropped caption."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from dmpo_jax.data import pipeline


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Every pair `draws` times; an epoch of it is as many of the source.

  Position p is draw p % draws of pair p // draws. The record says so as `draw`, by which the
  objective draws timestep and noise, so that what the reference makes of it is known for good.

  Attributes:
    draws: at least 1.
    seed: of caption dropout.
    caption_dropout: probability in [0, 1) that a draw has the fields of `empty_caption`.
    errors: of the reference, mean form, winner and loser (of judged images, the one), by position;
      None: records have none.
  """

  source: pipeline.PairSource
  draws: int
  seed: int
  caption_dropout: float
  empty_caption: Mapping[str, np.ndarray]
  errors: Float[np.ndarray, "n k"] | None = None

  def __post_init__(self):
    if self.draws < 1:
      raise ValueError(f"draws: expected at least 1, got {self.draws}")
    if self.errors is not None and len(self.errors) != len(self):
      raise ValueError(f"errors: expected {len(self)} rows, got {len(self.errors)}")

  def __len__(self) -> int:
    return self.draws * len(self.source)

  def __getitem__(self, position: int) -> dict[str, Any]:
    pair = dict(self.source[position // self.draws])
    if np.random.default_rng((self.seed, position)).random() < self.caption_dropout:
      pair |= self.empty_caption
    pair["draw"] = np.int32(position)
    if self.errors is not None:
      pair["reference_errors"] = self.errors[position]
    return pair

  def __repr__(self) -> str:  # grain names sources by their repr
    return f"Drawn({self.source!r}, {self.draws}, {self.seed}, {self.caption_dropout})"
