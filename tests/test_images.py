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


def save(picture, kind, **options):
  stream = io.BytesIO()
  picture.save(stream, kind, **options)
  return stream.getvalue()


def corners():
  """8x4 with red top left, green top right, blue bottom left, black bottom right."""
  picture = Image.new("RGB", (8, 4))
  picture.paste((255, 0, 0), (0, 0, 4, 2))
  picture.paste((0, 255, 0), (4, 0, 8, 2))
  picture.paste((0, 0, 255), (0, 2, 4, 4))
  return picture


# EXIF 2.3: where row 0 and column 0 of the file are seen; here: what stands top left, top right.
@pytest.mark.parametrize(
  "orientation, size, top_left, top_right",
  [
    (1, (8, 4), "red", "green"),
    (2, (8, 4), "green", "red"),
    (3, (8, 4), "black", "blue"),
    (4, (8, 4), "blue", "black"),
    (5, (4, 8), "red", "blue"),
    (6, (4, 8), "blue", "red"),
    (7, (4, 8), "black", "green"),
    (8, (4, 8), "green", "black"),
  ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, size, top_left, top_right, kind):
  colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
  large = corners().resize((64, 32), Image.Resampling.NEAREST)
  picture = images.decode(save(large, kind, exif=exif, **options.get(kind, {})))
  assert picture.size == (size[0] * 8, size[1] * 8)
  for x, expected in ((1, top_left), (-2, top_right)):
    np.testing.assert_allclose(np.asarray(picture)[1, x], colors[expected], atol=3)


def test_damaged_exif_is_ignored():
  data = save(corners(), "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
  np.testing.assert_array_equal(np.asarray(images.decode(data)), np.asarray(corners()))


def test_sixteen_bits_keep_their_high_byte():
  levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
  for data in (save(Image.fromarray(levels), "PNG"), save(Image.fromarray(levels), "TIFF")):
    array = np.asarray(images.decode(data))
    np.testing.assert_array_equal(array, np.stack([levels >> 8] * 3, axis=-1))


@pytest.mark.parametrize("pixels", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_pixels_without_a_range_are_refused(pixels):
  with pytest.raises(ValueError, match="pixels of mode '[FI]' have no known range; expected 8"):
    images.decode(save(Image.fromarray(pixels), "TIFF"))


def test_cmyk_palette_and_bilevel():
  cmyk = Image.new("CMYK", (4, 4), (0, 255, 0, 0))
  np.testing.assert_array_equal(np.asarray(images.decode(save(cmyk, "TIFF")))[0, 0], (255, 0, 255))
  np.testing.assert_allclose(
    np.asarray(images.decode(save(cmyk, "JPEG", quality=100)))[0, 0], (255, 0, 255), atol=4
  )
  palette = corners().quantize(4, Image.Quantize.MEDIANCUT)
  assert palette.mode == "P"
  np.testing.assert_array_equal(images.decode(save(palette, "PNG")), corners())
  bilevel = Image.new("1", (4, 4), 1)
  np.testing.assert_array_equal(images.decode(save(bilevel, "PNG")), np.full((4, 4, 3), 255))


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_frame_of_an_animation_is_taken(kind, options):
  red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
  data = save(red, kind, save_all=True, append_images=[blue], **options)
  np.testing.assert_array_equal(images.decode(data), red)


def test_what_is_no_picture_is_refused_without_an_address():
  with pytest.raises(ValueError, match="not one of JPEG, PNG, WEBP, GIF, BMP, TIFF") as caught:
    images.decode(b"<html>404</html>")
  assert "0x" not in str(caught.value)
  with pytest.raises(ValueError, match="not one of"):
    images.decode(b"")
  with pytest.raises(ValueError, match="not one of"):  # Pillow would start Ghostscript
    images.decode(save(corners(), "EPS"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_refused(kind):
  data = save(noise_picture(64, 64), kind)
  with pytest.raises(ValueError):
    images.decode(data[: len(data) // 2])


def test_decompression_bombs_are_refused_before_they_are_decoded():
  bomb = save(Image.new("1", (10000, 9000)), "PNG")
  assert len(bomb) < 20000
  with pytest.raises(ValueError):  # here Pillow's warning is an error
    images.decode(bomb)
  with pytest.warns(Image.DecompressionBombWarning):
    with pytest.raises(ValueError, match="10000x9000 pixels; expected at most 89478485 in all"):
      images.decode(bomb)
  with pytest.raises(ValueError, match="decompression bomb"):  # twice the bound: Pillow refuses
    images.decode(save(Image.new("1", (20000, 9000)), "PNG"))
