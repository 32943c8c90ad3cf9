"""Which of two emoji people chose, for every keyword both carry; splits that share no couple."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

from dmpo_jax.data.emoji_choice import emoji as emoji_lib

MIN_RATIO = 2.0  # the winner was used at least twice as often
MIN_Z = 2.576  # two-sided 1 % point of the normal distribution; a filter, not a claim
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.10  # of the couples
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Pair:
  """For the prompt `caption`, `winner` was chosen over `loser`; `p_choice` in (0.5, 1)."""

  caption: str
  winner: emoji_lib.Emoji
  loser: emoji_lib.Emoji
  p_choice: float

  @property
  def couple(self) -> str:
    """The two code points in hex, sorted as text: the same whichever of the two won."""
    return "-".join(sorted(f"{ord(each.character):x}" for each in (self.winner, self.loser)))


def is_preferred(uses: int, other_uses: int) -> bool:
  """Whether a symbol used `uses` times counts as chosen over one used `other_uses` times.

  uses >= 2 other_uses and (uses - other_uses) / sqrt(uses + other_uses) > 2.576

  >>> is_preferred(20, 10), is_preferred(40, 20), is_preferred(20, 40)
  (False, True, False)
  """
  if uses < MIN_RATIO * other_uses or uses == 0:
    return False
  return (uses - other_uses) / math.sqrt(uses + other_uses) > MIN_Z


def form_pairs(emoji: Sequence[emoji_lib.Emoji]) -> list[Pair]:
  """All pairs of two emoji that share a prompt and of which one is preferred.

  p_choice = n_w / (n_w + n_l), Luce's choice rule on the counts of uses. Two emoji of similar use
  form no pair, hence there are no ties.

  Args:
    emoji: the emoji to compare; prompts are the keywords that 2 to 24 of them share.

  Returns:
    Pairs, ordered by prompt, then by falling use of winner and loser.
  """
  pairs = []
  for caption, positions in emoji_lib.shared_keywords(tuple(emoji)).items():
    for winner in (emoji[position] for position in positions):
      for loser in (emoji[position] for position in positions):
        if is_preferred(winner.uses, loser.uses):
          pairs.append(Pair(caption, winner, loser, winner.uses / (winner.uses + loser.uses)))
  return pairs


def assign_couples(pairs: Sequence[Pair]) -> dict[str, str]:
  """Couple -> split. Couples in the order of their sha256: first test, then validation, train."""
  couples = sorted(
    {pair.couple for pair in pairs}, key=lambda text: hashlib.sha256(text.encode()).hexdigest()
  )
  tests = round(TEST_SHARE * len(couples))
  validations = round(VALIDATION_SHARE * len(couples))
  splits = ["test"] * tests + ["validation"] * validations
  splits += ["train"] * (len(couples) - len(splits))
  return dict(zip(couples, splits, strict=True))


def split_pairs(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
  """Train, validation and test, disjoint by couple: no held-out couple is trained on under any
  prompt. Prompts are shared."""
  split_of = assign_couples(pairs)
  return {split: [pair for pair in pairs if split_of[pair.couple] == split] for split in SPLITS}
