"""What every source of preference data is turned into: rows, read one at a time, shard by shard.

A source is a set of shards (a parquet file, a tar, a part of a list). A shard is read from start to
end, gives `Pair` (or `Judged`, in all of the source) or `Dropped` for every row of the source, and
never holds more than a few rows; different shards may be read by different processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Pair(NamedTuple):
  """One comparison; the images are as they were stored: JPEG, PNG or WebP bytes.

  Attributes:
    caption: what both images were made for.
    image_w: the preferred image.
    image_l: the dispreferred image.
    p_choice: probability that people choose image_w over image_l, [0.5, 1]; 1 for a single choice.
    couple: id of the two images; the same two give the same in any order.
    where: file and row, for messages.
    image_source: the image that both are edits of, if they are.
    side: the column or file name the winner stood in, for the check of label leaks.
  """

  caption: str
  image_w: bytes
  image_l: bytes
  p_choice: float
  couple: str
  where: str
  image_source: bytes | None = None
  side: str | None = None


class Judged(NamedTuple):
  """One image that people called desirable or not, by itself; bytes as in `Pair`.

  Attributes:
    caption: what the image was made for.
    image: the image.
    desirable: the verdict.
    couple: id of the image, in the place of that of a pair.
    where: file and row, for messages.
    image_source: the image that it is an edit of, if it is.
  """

  caption: str
  image: bytes
  desirable: bool
  couple: str
  where: str
  image_source: bytes | None = None


class Dropped(NamedTuple):
  """A row that is neither.

  Attributes:
    reason: in two or three words, the same for all of a kind: "tie", "image is missing".
    where: file and row.
    broken: whether the row is damaged (counted against the user's limit) or is left out by a rule
      of the source (a tie).
  """

  reason: str
  where: str
  broken: bool


Row = Pair | Judged | Dropped


@runtime_checkable
class Shard(Protocol):
  """A part of a source; can be pickled, so that other processes can read it."""

  @property
  def name(self) -> str: ...

  def read(self) -> Iterator[Row]:
    """Rows in the order of the file.

    Raises:
      ValueError: the file as a whole is missing, damaged or lacks a column.
    """
    ...


class Source(NamedTuple):
  """A data set as it lies on disk or in a bucket.

  Attributes:
    name: of the data set, `pickapic_v2`.
    splits: name -> shards in order.
    licence: as its authors state it; None if they state none.
    homepage: where it comes from.
    fingerprint: changes when its files change (names and sizes).
  """

  name: str
  splits: Mapping[str, Sequence[Shard]]
  licence: str | None
  homepage: str
  fingerprint: str
