"""Why a row of a source cannot be used, and the checks that every source makes."""

import math
from collections.abc import Callable

from dmpo_jax.data import rows

# First bytes of the three formats that `rows.Pair` promises.
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class Fault(Exception):
  """A row cannot be used; `reason` and `broken` as in `rows.Dropped`."""

  def __init__(self, reason: str, *, broken: bool = True):
    super().__init__(reason)
    self.reason, self.broken = reason, broken


def row_or_dropped(where: str, make: Callable[[], rows.Row]) -> rows.Row:
  """What `make` returns, or the fault that it raised as a dropped row.

  >>> def fail(): raise Fault("tie", broken=False)
  >>> row_or_dropped("a.csv, line 2", fail)
  Dropped(reason='tie', where='a.csv, line 2', broken=False)
  """
  try:
    return make()
  except Fault as fault:
    return rows.Dropped(fault.reason, where, fault.broken)


def check_caption(caption: object) -> str:
  """The caption as it is.

  Raises:
    Fault: it is missing, no text, blank or cannot be written as UTF-8.
  """
  if caption is None:
    raise Fault("caption is missing")
  if not isinstance(caption, str):
    raise Fault("caption is no text")
  if not caption.strip():
    raise Fault("caption is empty")
  try:
    caption.encode()
  except UnicodeEncodeError as error:  # JSON can hold half a character
    raise Fault("caption is not UTF-8") from error
  return caption


def check_image(data: bytes | None) -> bytes:
  """The bytes as they are; only their beginning is looked at.

  Raises:
    Fault: they are missing, empty or of another format than JPEG, PNG and WebP.
  """
  if data is None:
    raise Fault("image is missing")
  if not data:
    raise Fault("image is empty")
  is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
  if not (is_webp or data.startswith((_JPEG, _PNG))):
    raise Fault("image is not JPEG, PNG or WebP")
  return data


def are_numbers(values: object) -> bool:
  """Whether it is a list of finite numbers that a float can hold; JSON's may have any length.

  >>> are_numbers([1, 0.5]), are_numbers([True]), are_numbers([10**400]), are_numbers(1)
  (True, False, False, False)
  """
  return isinstance(values, list) and all(
    isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    for value in values
  )


def _is_finite(value: int | float) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:
    return False
