"""data/images.py: transparency, aspect, and the way back to bytes."""

import io

import numpy as np
import pytest
import torch
from diffusers import image_processor
from PIL import Image

from dmpo_jax.data import images


def noise_picture(width, height, mode="RGB", seed=0):
  generator = np.random.default_rng(seed)
  shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
  return Image.fromarray(generator.integers(0, 256, shape, np.uint8))


def pixels(color, size=(6, 6)):
  """A uniform RGB picture as `to_array` should give it."""
  return np.broadcast_to(np.float32(color) / 127.5 - 1, (*size, 3))


def test_bytes_come_back_exactly():
  ramp = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)
  ramp[..., 1], ramp[..., 2] = ramp[..., 1].T, ramp[::-1, :, 2]
  array = images.to_array(Image.fromarray(ramp), 16)
  assert array.dtype == np.float32 and array.shape == (16, 16, 3)
  assert array.min() == -1.0 and array.max() == 1.0
  np.testing.assert_array_equal(images.to_uint8(array), ramp)


@pytest.mark.parametrize("opacity, expected", [(0, 255), (255, 40), (51, 212)])
def test_transparency_is_laid_on_white(opacity, expected):
  """By hand for 51 = 255 / 5: (40 + 4 * 255) / 5 = 212."""
  rgba = Image.new("RGBA", (6, 6), (40, 40, 40, opacity))
  grey = Image.new("LA", (6, 6), (40, opacity))
  for picture in (rgba, grey):
    # Composition in bytes may round to the neighbour.
    np.testing.assert_allclose(images.to_array(picture, 6), pixels(expected), atol=1.01 / 127.5)


def test_black_under_full_transparency_does_not_shine_through_at_edges():
  """Resizing before composition would mix in the hidden colour."""
  picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
  picture.paste((255, 255, 255, 255), (5, 5, 27, 27))
  np.testing.assert_array_equal(images.to_array(picture, 8), pixels(255, (8, 8)))


def test_a_palette_with_a_transparent_entry_is_laid_on_white():
  picture = Image.new("P", (6, 6), 0)
  picture.putpalette([10, 20, 30, 200, 100, 50])
  picture.paste(1, (3, 0, 6, 6))
  stream = io.BytesIO()
  picture.save(stream, "PNG", transparency=0)
  array = images.to_array(Image.open(stream), 6)
  np.testing.assert_array_equal(array[:, :3], pixels(255, (6, 3)))
  np.testing.assert_array_equal(array[:, 3:], pixels([200, 100, 50], (6, 3)))


def test_grey_pictures_get_three_equal_channels():
  array = images.to_array(noise_picture(8, 8, "L"), 8)
  assert array.shape == (8, 8, 3) and np.ptp(array, axis=-1).max() == 0.0


@pytest.mark.parametrize("width, height", [(30, 10), (31, 10), (10, 30), (10, 31), (10, 10)])
def test_the_centre_is_kept_where_no_resizing_is_needed(width, height):
  picture = noise_picture(width, height)
  left, top = (width - 10) // 2, (height - 10) // 2
  expected = np.asarray(picture)[top : top + 10, left : left + 10]
  np.testing.assert_array_equal(images.to_uint8(images.to_array(picture, 10)), expected)


@pytest.mark.parametrize(
  "width, height", [(90, 30), (30, 90), (200, 33), (9, 3), (3, 1000), (5, 5)]
)
@pytest.mark.parametrize("resolution", [8, 32])
def test_the_aspect_is_kept(width, height, resolution):
  """A centred square of half the short side fills half of each side of the result."""
  short = min(width, height)
  picture = Image.new("RGB", (width, height), (255, 0, 0))
  box = [(side - short) / 2 + short / 4 for side in (width, height)]
  inner = [round(low) for low in box] + [round(low + short / 2) for low in box]
  picture.paste((0, 0, 255), tuple(inner))
  array = images.to_array(picture, resolution)
  assert array.shape == (resolution, resolution, 3)
  blue = (array[..., 2] + 1) / 2
  # Rounding the drawn square to whole pixels moves each of its sides by at most half a pixel.
  slack = 1.0 / short + 1.0 / resolution
  assert abs(np.sqrt(blue.mean()) - 0.5) < slack
  for axis in (0, 1):  # centred
    weight = blue.sum(axis=1 - axis)
    centre = (weight * (np.arange(resolution) + 0.5)).sum() / weight.sum() / resolution
    assert abs(centre - 0.5) < slack


def test_uniform_pictures_stay_uniform():
  for side in (5, 72):
    picture = Image.new("RGB", (side, side + 3), (10, 200, 77))
    np.testing.assert_array_equal(images.to_array(picture, 32), pixels([10, 200, 77], (32, 32)))


def test_to_uint8_is_what_diffusers_does():
  generator = np.random.default_rng(1)
  array = generator.uniform(-1.3, 1.3, (2, 8, 8, 3)).astype(np.float32)
  unit = image_processor.VaeImageProcessor.denormalize(torch.from_numpy(array)).numpy()
  pictures = image_processor.VaeImageProcessor.numpy_to_pil(unit)
  np.testing.assert_array_equal(images.to_uint8(array), [np.asarray(each) for each in pictures])
  assert images.to_uint8(array[None]).shape == (1, 2, 8, 8, 3)


def test_to_uint8_clips_and_rounds():
  values = np.float32([-7.0, -1.0, -1 + 0.9 / 127.5, -1 + 0.4 / 127.5, 0.0, 1.0, 7.0])
  picture = np.broadcast_to(values[:, None, None], (7, 1, 3))
  # 0.0 is 127.5, which numpy and diffusers round to the even neighbour.
  assert images.to_uint8(picture)[:, 0, 0].tolist() == [0, 0, 1, 0, 128, 255, 255]


def test_png_bytes_hold_the_picture():
  picture = noise_picture(5, 7)
  again = Image.open(io.BytesIO(images.encode_png(picture)))
  assert again.format == "PNG" and again.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(again), np.asarray(picture))


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_tiles_lie_where_they_should(gap):
  pictures = np.random.default_rng(2).integers(0, 199, (2, 3, 4, 5, 3), np.uint8)
  canvas = images.tile(pictures, gap)
  assert canvas.dtype == np.uint8
  assert canvas.shape == (2 * 4 + gap, 3 * 5 + 2 * gap, 3)
  rest = np.ones(canvas.shape[:2], bool)
  for row in range(2):
    for column in range(3):
      place = np.s_[row * (4 + gap) :, column * (5 + gap) :]
      np.testing.assert_array_equal(canvas[place][:4, :5], pictures[row, column])
      rest[place][:4, :5] = False
  assert (canvas[rest] == 200).all()
  assert rest.sum() == canvas.shape[0] * canvas.shape[1] - 6 * 4 * 5
