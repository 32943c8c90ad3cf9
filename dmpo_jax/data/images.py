"""Pictures to arrays and back: one rule for every source."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def to_array(image: Image.Image, resolution: int) -> Float[np.ndarray, "H W 3"]:
  """Short side resized (Lanczos) to `resolution`, centre crop, float32 in [-1, 1].

  Transparent pictures are composited on white.
  """
  if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
    rgba = image.convert("RGBA")
    image = Image.new("RGBA", rgba.size, "white")
    image.alpha_composite(rgba)
  image = image.convert("RGB")
  scale = resolution / min(image.size)
  size = [max(resolution, round(side * scale)) for side in image.size]
  image = image.resize(size, Image.Resampling.LANCZOS)
  left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
  image = image.crop((left, top, left + resolution, top + resolution))
  return np.asarray(image, np.float32) / 127.5 - 1.0


def to_uint8(images: Float[np.ndarray, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
  """[-1, 1] -> 0..255, clipped and rounded as diffusers' image processor does."""
  unit = np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0.0, 1.0)
  return np.round(unit * 255).astype(np.uint8)


def encode_png(image: Image.Image) -> bytes:
  """PNG bytes of a picture."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


def tile(pictures: UInt8[np.ndarray, "rows columns H W 3"], gap: int = 1) -> np.ndarray:
  """One picture: rows and columns with a grey gap between them.

  >>> tile(np.zeros((2, 3, 4, 4, 3), np.uint8)).shape
  (9, 14, 3)
  """
  rows, columns, height, width, _ = pictures.shape
  canvas = np.full((rows, height + gap, columns, width + gap, 3), 200, np.uint8)
  canvas[:, :height, :, :width] = pictures.swapaxes(1, 2)
  flat = canvas.reshape(rows * (height + gap), columns * (width + gap), 3)
  return flat[:-gap, :-gap] if gap else flat
