"""What one picture is: how it is stored, what is the matter with it, and a small copy of it."""

import hashlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from dmpo_jax.data import images

Fault = tuple[str, str]  # code, what is the matter with this row

_THUMBNAIL = 160  # pixels, long side
_TEXT = 300  # characters kept of a caption: strangers wrote it, it may be a book
_ASPECT = 2.0  # from here on the centre crop loses half of the picture or more
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class Look(NamedTuple):
  """What one picture is.

  Attributes:
    size: width and height in pixels.
    format: of the file, "PNG".
    pixels: hash of the picture as RGB; None where it cannot be read.
    traits: codes of how it is stored.
    faults: other codes and their details.
  """

  size: tuple[int, int]
  format: str
  pixels: int | None
  traits: frozenset[str]
  faults: tuple[Fault, ...]


def look(data: bytes, resolution: int) -> Look:
  """Decodes a picture and says what it is; an unreadable one is a fault, not an exception.

  Pictures of more than Pillow's MAX_IMAGE_PIXELS are refused by their header, and so are strips
  that would grow beyond `images.MAX_PIXELS` when they are resized.
  """
  try:
    rgb = _decode(data)
  except ValueError as error:
    bomb = isinstance(error.__cause__, _BOMBS)
    return _unusable("oversized-image" if bomb else "unreadable-image", str(error))
  if math.prod(rgb.size) * (resolution / min(rgb.size)) ** 2 > images.MAX_PIXELS:
    return _unusable("oversized-image", f"{rgb.width} x {rgb.height}, a strip too long to resize")
  with Image.open(io.BytesIO(data)) as image:  # of a safe format, or it were not decoded
    traits, kind = _traits(image), image.format or ""
  faults = tuple(_shape_faults(rgb, resolution))
  return Look(rgb.size, kind, hash_bytes(rgb.tobytes()), traits, faults)


def _decode(data: bytes) -> Image.Image:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on odd EXIF and the like
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    return images.decode(data)


def _unusable(code: str, detail: str) -> Look:
  return Look((0, 0), "", None, frozenset(), ((code, clip(detail)),))


def _traits(image: Image.Image) -> frozenset[str]:
  may_be = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
  transparent = may_be and image.convert("RGBA").getextrema()[3][0] < 255
  present = {
    "16-bit-image": image.mode.startswith("I;16"),
    "cmyk-image": image.mode == "CMYK",
    # A photograph with a preview inside is of several pictures too, and does not move.
    "animated-image": getattr(image, "is_animated", False) and image.format != "MPO",
    "rotated-image": images.orientation(image) in range(2, 9),
    "transparent-image": transparent,
    "palette-image": image.mode in ("P", "PA"),
  }
  return frozenset(code for code, there in present.items() if there)


def _shape_faults(rgb: Image.Image, resolution: int) -> Iterator[Fault]:
  short, long = min(rgb.size), max(rgb.size)
  size = f"{rgb.width} x {rgb.height}"
  if short < resolution:
    yield "tiny-image" if 4 * short < resolution else "below-resolution", size
  if long > _ASPECT * short:
    yield "extreme-aspect", size
  if all(low == high for low, high in rgb.getextrema()):
    yield "blank-image", f"all of it is {rgb.getpixel((0, 0))}"


def thumbnail(data: bytes) -> bytes | None:
  """A small JPEG of the picture; None if it cannot be read."""
  try:
    rgb = _decode(data)
  except ValueError:  # has a finding of its own
    return None
  rgb.thumbnail((_THUMBNAIL, _THUMBNAIL))
  buffer = io.BytesIO()
  rgb.save(buffer, "JPEG", quality=80)
  return buffer.getvalue()


def hash_bytes(data: bytes | str) -> int:
  """64 bits of BLAKE2; two of 10 million different texts are alike with probability 3e-6."""
  if isinstance(data, str):
    data = data.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def clip(text: str) -> str:
  """At most `_TEXT` characters of a stranger's text, and nothing that UTF-8 cannot write."""
  text = text[: _TEXT - 1] + "…" if len(text) > _TEXT else text
  return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
