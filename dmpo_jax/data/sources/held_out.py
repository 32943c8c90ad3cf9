"""A validation split out of data that come without one, by caption."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from dmpo_jax.data import rows


class Part(NamedTuple):
  """One of the two parts of a file.

  Which part a caption belongs to is a function of the caption alone, but for case and spacing: all
  pairs of a caption are in the same part, whatever the files and their order.

  Attributes:
    share: of the captions that are held out, [0, 1).
    validation: whether this is the held-out part.
  """

  share: float
  validation: bool

  def holds(self, caption: object) -> bool:
    """Whether the pair of that caption is in this part; what is no text is in the training part.

    >>> parts = Part(0.5, validation=False), Part(0.5, validation=True)
    >>> [part.holds("A Red  cat") for part in parts] == [part.holds("a red cat") for part in parts]
    True
    >>> sum(part.holds("a red cat") for part in parts)
    1
    """
    return self._is_held_out(caption) == self.validation

  def _is_held_out(self, caption: object) -> bool:
    if not isinstance(caption, str):
      return False
    digest = hashlib.sha256(" ".join(caption.casefold().split()).encode("utf-8", "replace"))
    return int.from_bytes(digest.digest()[:8]) < self.share * 2**64


@dataclasses.dataclass(frozen=True)
class PartShard:
  """The pairs of a shard whose captions are in a part."""

  whole: rows.Shard
  part: Part

  @property
  def name(self) -> str:
    return self.whole.name

  def read(self) -> Iterator[rows.Row]:
    """The rows in order; rows that are no pairs are those of the training part, named once."""
    for row in self.whole.read():
      if isinstance(row, rows.Dropped):
        held = not self.part.validation
      else:
        held = self.part.holds(row.caption)
      if held:
        yield row


def hold_out(source: rows.Source, share: float) -> rows.Source:
  """Gives a source without a validation split one: all pairs of a share of the training captions.

  The training shards are read once for each of the two.

  Args:
    share: of the captions, [0, 1); 0 for no validation split.

  Raises:
    ValueError: `share` is out of range.
  """
  if not 0 <= share < 1:
    raise ValueError(f"{source.name}: validation_share: expected [0, 1), got {share}")
  if not share or "train" not in source.splits or "validation" in source.splits:
    return source
  parts = {"train": Part(share, validation=False), "validation": Part(share, validation=True)}
  shards = source.splits["train"]
  divided = {name: [PartShard(each, part) for each in shards] for name, part in parts.items()}
  digest = hashlib.sha256(f"{source.fingerprint} {share}".encode()).hexdigest()[:16]
  return source._replace(splits={**source.splits, **divided}, fingerprint=digest)
