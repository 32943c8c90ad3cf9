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
from dmpo_jax.data.emoji_choice import pairs as pairs_lib


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


def rank_among(
  scores: Scores,
  prompts: Sequence[str],
  emoji: Sequence[emoji_lib.Emoji],
  pairs: Sequence[pairs_lib.Pair],
) -> Float[np.ndarray, "p s"]:
  """Share of its prompt's `pairs` that the image's emoji wins: use rank on these couples.

  0.5 is chance. 0 where the image does not show the prompt; NaN where its emoji is in no pair of
  that prompt.
  """
  position = {each.character: i for i, each in enumerate(emoji)}
  row = {prompt: i for i, prompt in enumerate(prompts)}
  won, met = np.zeros((2, len(prompts), len(emoji)))
  for pair in pairs:
    if pair.caption in row:
      winner, loser = position[pair.winner.character], position[pair.loser.character]
      won[row[pair.caption], winner] += 1
      met[row[pair.caption], [winner, loser]] += 1
  share = np.divide(won, met, out=np.full_like(won, np.nan), where=met > 0)
  rows = np.arange(len(prompts))[:, None]
  return np.where(scores.match, share[rows, scores.nearest], 0.0)


def decided_on(
  policy: Scores,
  reference: Scores,
  emoji: Sequence[emoji_lib.Emoji],
  pairs: Sequence[pairs_lib.Pair],
) -> Bool[np.ndarray, "p s"]:
  """The comparisons that say something about the couples of `pairs`.

  Those in which the two models drew the two emoji of such a couple, and, whatever the couple, those
  in which one of the two models alone drew something that shows the prompt.
  """
  position = {each.character: i for i, each in enumerate(emoji)}
  member = np.zeros((len(emoji), len(emoji)), bool)
  for pair in pairs:
    i, j = position[pair.winner.character], position[pair.loser.character]
    member[i, j] = member[j, i] = True
  both = policy.match & reference.match & member[policy.nearest, reference.nearest]
  return both | (policy.match != reference.match)


def compare(policy: Scores, reference: Scores) -> Float[np.ndarray, "p s"]:
  """1 where the policy's emoji is used more than the reference's, 0 where less, ties 0.5."""
  return (np.sign(policy.uses - reference.uses) + 1) / 2
