"""Images of any size -> the squares that scorers were trained on, as each one's authors make them.

Pillow's bicubic filter, which widens with the reduction (antialiasing), on 8-bit pixels: so do
torchvision on PIL images and transformers' slow processors, bit for bit. They differ in the rest:

| rule                | who                        | the square                                  |
|---------------------|----------------------------|---------------------------------------------|
| `transformers_crop` | transformers' CLIP         | short side to `size`, centre rounded down   |
| `torchvision_crop`  | OpenAI's CLIP, ImageReward | short side to `size`, centre rounded        |
| `pad_to_square`     | HPS v2 and v2.1            | long side to `size`, black bars             |

On square images, as generators make them, all three are the same.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

# Of OpenAI's CLIP (github.com/openai/CLIP, clip/clip.py); all scorers here kept them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Preprocess = Callable[[UInt8[np.ndarray, "H W 3"], int], UInt8[np.ndarray, "S S 3"]]


def transformers_crop(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
  """CLIPImageProcessor's resize and centre crop, before it normalises (image_transforms.py)."""
  return _resize_and_crop(pixels, size, lambda spare: spare // 2)


def torchvision_crop(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
  """torchvision's Resize(size, BICUBIC) and CenterCrop(size) of a PIL image."""
  # Python's rounding: halves go to the even number (transforms/functional.py, center_crop).
  return _resize_and_crop(pixels, size, lambda spare: round(spare / 2))


def pad_to_square(pixels: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
  """OpenCLIP's ResizeMaxSize, which HPS v2's code asks for (resize_longest_max=True).

  Nothing of the image is cut off. ResizeMaxSize itself leaves an image whose long side is `size`
  already without its bars, and cannot batch it; here it has them.
  """
  height, width = pixels.shape[:2]
  scale = size / max(height, width)
  new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
  square = np.zeros((size, size, 3), np.uint8)
  top, left = (size - new_height) // 2, (size - new_width) // 2
  resized = _resize(pixels, new_height, new_width)
  square[top : top + new_height, left : left + new_width] = resized
  return square


def _resize_and_crop(pixels, size, offset):
  height, width = pixels.shape[:2]
  # Both libraries cut off the fraction of the long side; the short side is `size` itself.
  new_height, new_width = (int(size * side / min(height, width)) for side in (height, width))
  resized = _resize(pixels, new_height, new_width)
  top, left = offset(new_height - size), offset(new_width - size)
  return resized[top : top + size, left : left + size]


def _resize(pixels, height, width):
  if pixels.shape[:2] == (height, width):
    return pixels
  image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(image)


def normalise(pixels: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
  """(x / 255 - mean) / std of each channel, float32."""
  mean, std = (jnp.array(each)[None, None, None] for each in (MEAN, STD))
  return (pixels.astype(jnp.float32) / 255 - mean) / std
