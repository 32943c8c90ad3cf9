"""A validation split out of data that come without one."""

import hashlib
from typing import NamedTuple


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
