"""What a generated emoji is worth, without a learned scorer.

An image is assigned to its nearest real drawing. It then has a fidelity (the distance), it either
carries the prompt's keyword or not, and it was used so many times by people. An image that does not
show the prompt counts as never used: it loses against any that does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dmpo_jax.data.emoji_choice import emoji as emoji_lib


class Scores(NamedTuple):
  """Per prompt and image.

  Attributes:
    nearest: position of the nearest real emoji.
    rmse: root mean squared distance to it, pixels in [-1, 1].
    match: whether that emoji carries the prompt as a keyword.
    uses: how often that emoji was used; 0 without a match.
    use_rank: rank of `uses` among the prompt's emoji, 0 (least used) to 1; 0 without a match.
  """

  nearest: Int[np.ndarray, "p s"]
  rmse: Float[np.ndarray, "p s"]
  match: Bool[np.ndarray, "p s"]
  uses: Int[np.ndarray, "p s"]
  use_rank: Float[np.ndarray, "p s"]


def find_nearest(
  images: Float[np.ndarray, "n H W 3"], real: Float[np.ndarray, "m H W 3"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Position of, and root mean squared distance to, the nearest of the real images.

  >>> real = np.stack([np.zeros((1, 1, 3)), np.ones((1, 1, 3))])
  >>> nearest, rmse = find_nearest(np.full((1, 1, 1, 3), 0.75), real)
  >>> nearest.tolist(), rmse.tolist()
  ([1], [0.25])
  """
  flat = images.reshape(len(images), -1).astype(np.float64)
  targets = real.reshape(len(real), -1).astype(np.float64)
  # |a - b|^2 = |a|^2 - 2 a.b + |b|^2 finds the nearest; its distance is then formed exactly.
  nearest = ((targets**2).sum(1) - 2.0 * flat @ targets.T).argmin(axis=1)
  rmse = np.sqrt(np.mean((flat - targets[nearest]) ** 2, axis=1))
  return nearest, rmse


def score(
  images: Float[np.ndarray, "p s H W 3"],
  prompts: Sequence[str],
  emoji: Sequence[emoji_lib.Emoji],
  real: Float[np.ndarray, "m H W 3"],
) -> Scores:
  """Scores s images of each of p prompts against the drawings `real` of `emoji`.

  Raises:
    ValueError: a prompt is carried by fewer than two emoji.
  """
  carriers = emoji_lib.shared_keywords(tuple(emoji))
  unknown = [prompt for prompt in prompts if prompt not in carriers]
  if unknown:
    raise ValueError(
      f"prompt {unknown[0]!r}: expected a keyword that {emoji_lib.MIN_SHARED} to "
      f"{emoji_lib.MAX_SHARED} of the {len(emoji)} emoji carry"
    )
  nearest, rmse = find_nearest(images.reshape(-1, *images.shape[2:]), real)
  shape = images.shape[:2]
  nearest, rmse = nearest.reshape(shape), rmse.reshape(shape)
  uses = np.array([each.uses for each in emoji])
  ranks = np.zeros((len(prompts), len(emoji)))
  match = np.zeros((len(prompts), len(emoji)), bool)
  for i, prompt in enumerate(prompts):
    positions = np.array(carriers[prompt])
    match[i, positions] = True
    ranks[i, positions] = normalised_ranks(uses[positions])
  rows = np.arange(len(prompts))[:, None]
  matched = match[rows, nearest]
  return Scores(nearest, rmse, matched, uses[nearest] * matched, ranks[rows, nearest])


def normalised_ranks(values: np.ndarray) -> Float[np.ndarray, " n"]:
  """0 for the smallest, 1 for the largest; equal values share their mean rank.

  >>> normalised_ranks(np.array([10, 5, 10])).tolist()
  [0.75, 0.0, 0.75]
  """
  below = (values[None, :] < values[:, None]).sum(axis=1)
  equal = (values[None, :] == values[:, None]).sum(axis=1)
  return (below + (equal - 1) / 2) / (len(values) - 1)


def compare(policy: Scores, reference: Scores) -> Float[np.ndarray, "p s"]:
  """1 where the policy's emoji is used more than the reference's, 0 where less, ties 0.5."""
  return (np.sign(policy.uses - reference.uses) + 1) / 2
