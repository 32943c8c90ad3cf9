"""`emoji_choice` as a source: pairs of drawings from the installed packages, nothing to download.

What the pairs are and where they come from: `dmpo_jax.data.emoji_choice`.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator

from dmpo_jax.data import images, rows
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import pairs as pairs_lib
from dmpo_jax.data.sources import files

LICENCE = "CC-BY-4.0 (drawings), MIT (keywords), CC-BY-SA-4.0 (counts)"


def open_emoji(
  dataset: str, path: str | os.PathLike | None = None, *, count: int | None
) -> rows.Source:
  """Pairs of the `count` most used emoji; None: of all.

  Raises:
    ValueError: a package is missing, or `path` is given.
  """
  if path is not None:
    raise ValueError(f"{dataset}: path: expected none (it comes from packages), got {path!r}")
  emoji = emoji_lib.load_emoji(count)
  drawings = [(each.artwork.name, each.artwork.stat().st_size) for each in emoji]
  counts = [(each.character, each.uses, each.keywords) for each in emoji]
  return rows.Source(
    name=dataset,
    splits={split: [EmojiShard(dataset, split, count)] for split in pairs_lib.SPLITS},
    licence=LICENCE,
    homepage="https://hdl.handle.net/11356/1048",
    fingerprint=files.fingerprint(dataset, drawings, counts=counts),
  )


@dataclasses.dataclass(frozen=True)
class EmojiShard:
  """One split of `dataset`."""

  dataset: str
  split: str
  count: int | None

  @property
  def name(self) -> str:
    return f"{self.dataset}, {self.split}"

  def read(self) -> Iterator[rows.Pair]:
    """Pairs by prompt, then by falling use of winner and loser.

    Raises:
      ValueError: a package is missing.
    """

    @functools.cache
    def drawing(emoji: emoji_lib.Emoji) -> bytes:
      return images.encode_png(emoji_lib.draw(emoji))

    pairs = pairs_lib.form_pairs(emoji_lib.load_emoji(self.count))
    for number, pair in enumerate(pairs_lib.split_pairs(pairs)[self.split]):
      yield rows.Pair(
        caption=pair.caption,
        image_w=drawing(pair.winner),
        image_l=drawing(pair.loser),
        p_choice=pair.p_choice,
        couple=pair.couple,
        where=f"{self.name}, pair {number}",
      )
