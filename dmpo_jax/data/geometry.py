"""Resize, crop and flip, the same for both images of a pair: one draw that a restart repeats."""

import dataclasses
import hashlib
import json
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from dmpo_jax.data import images

CROPS = ("center", "random")
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS}


@dataclasses.dataclass(frozen=True)
class Geometry:
  """How a picture of any size becomes a square.

  The order is that of diffusers' train_text_to_image_sdxl.py: the short side is resized, the
  picture is flipped, then cropped.

  Attributes:
    resolution: side of the square in pixels.
    crop: "center", or "random": the position along the long side is drawn.
    flip: probability in [0, 1] of a horizontal flip.
    independent: draws winner and loser apart, as the published code of Diffusion-DPO
      (github.com/SalesforceAIResearch/DiffusionDPO, train.py) does. Their errors then differ by the
      crop too, which is noise in the margin; only for a comparison with that code.
    seed: of the draws.
    resize: "bilinear", as there, or "lanczos"; both antialiased, by Pillow.

  Raises:
    ValueError: names the field.
  """

  resolution: int
  crop: str = "center"
  flip: float = 0.0
  independent: bool = False
  seed: int = 0
  resize: str = "bilinear"

  def __post_init__(self):
    if self.resolution < 1:
      raise ValueError(f"geometry.resolution: expected at least 1 pixel, got {self.resolution}")
    if self.crop not in CROPS:
      raise ValueError(f"geometry.crop: expected one of {', '.join(CROPS)}, got {self.crop!r}")
    if not 0 <= self.flip <= 1:
      raise ValueError(f"geometry.flip: expected a probability in [0, 1], got {self.flip}")
    if self.resize not in _RESAMPLE:
      raise ValueError(
        f"geometry.resize: expected one of {', '.join(_RESAMPLE)}, got {self.resize!r}"
      )


class Draw(NamedTuple):
  """Where to crop and whether to flip.

  Attributes:
    top: of the crop, as a share of the room there is, [0, 1).
    left: likewise, after the flip.
    flipped: left to right.
  """

  top: float
  left: float
  flipped: bool


class Placed(NamedTuple):
  """A square picture.

  Attributes:
    pixels: RGB.
    time_ids: see `types.AddedConditions`: height and width as displayed before the resize, top and
      left of the crop in the resized and flipped picture, target height and width.
  """

  pixels: UInt8[np.ndarray, "H W 3"]
  time_ids: Float[np.ndarray, "6"]


def draw(geometry: Geometry, caption: str, couple: str, side: str) -> Draw:
  """The draw of a pair: a function of (seed, caption, couple), not of the order of the data.

  Args:
    side: "w", "l" or "source"; matters only if the geometry is independent, where the source image
      goes with the winner.

  >>> fixed, free = Geometry(8, "random", 0.5), Geometry(8, "random", 0.5, independent=True)
  >>> draw(fixed, "a cat", "1-2", "w") == draw(fixed, "a cat", "1-2", "l")
  True
  >>> draw(free, "a cat", "1-2", "w") == draw(free, "a cat", "1-2", "l")
  False
  """
  apart = "l" if geometry.independent and side == "l" else "w"
  text = json.dumps([geometry.seed, caption, couple, apart])
  words = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=24).digest(), "<u8")
  # 53 bits, the precision of a float64.
  top, left, coin = ((words >> np.uint64(11)) * 2.0**-53).tolist()
  return Draw(top, left, coin < geometry.flip)


def place(image: Image.Image, geometry: Geometry, drawn: Draw) -> Placed:
  """Resizes, flips and crops an RGB picture.

  Raises:
    ValueError: so long a strip that its resized picture would not fit into memory.
  """
  width, height = image.size
  size = geometry.resolution
  resized = images.resize_short_side(image, size, _RESAMPLE[geometry.resize])
  if drawn.flipped:
    resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  room_left, room_top = (side - size for side in resized.size)
  if geometry.crop == "center":
    top, left = room_top // 2, room_left // 2
  else:
    top, left = int(drawn.top * (room_top + 1)), int(drawn.left * (room_left + 1))
  pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
  return Placed(pixels, np.array([height, width, top, left, size, size], np.float32))
