"""data/geometry.py: one draw per pair, positions by hand, peers' transforms as the oracle."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dmpo_jax.data import geometry, images


def noise_picture(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


def coordinates(width, height):
  """Red is the column, green the row."""
  row, column = np.mgrid[:height, :width].astype(np.uint8)
  return Image.fromarray(np.stack([column, row, row * 0], axis=-1))


MIDDLE = geometry.Draw(0.5, 0.5, False)


@pytest.mark.parametrize("width, height", [(40, 40), (72, 72), (90, 40), (41, 77)])
def test_lanczos_in_the_centre_is_what_to_array_gives(width, height):
  picture = noise_picture(width, height)
  square = geometry.Geometry(32, resize="lanczos")
  placed = geometry.place(picture, square, MIDDLE)
  np.testing.assert_array_equal(images.to_float(placed.pixels), images.to_array(picture, 32))


def test_bilinear_is_antialiased():
  """Every second column white: without antialiasing a resize to a half could keep white alone."""
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  placed = geometry.place(Image.fromarray(stripes), geometry.Geometry(32), MIDDLE)
  assert abs(placed.pixels[:, 2:-2].astype(float) - 127.5).max() <= 1


@pytest.mark.parametrize("width, height", [(96, 64), (64, 128), (80, 80)])
def test_bilinear_agrees_with_torch(width, height):
  picture = noise_picture(width, height)
  pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float()
  size = (32 * height // min(width, height), 32 * width // min(width, height))
  resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0]
  top, left = (size[0] - 32) // 2, (size[1] - 32) // 2
  expected = resized[:, top : top + 32, left : left + 32].permute(1, 2, 0).numpy()
  placed = geometry.place(picture, geometry.Geometry(32), MIDDLE)
  # Pillow rounds to whole numbers after each of the two passes.
  assert np.abs(placed.pixels - expected).max() < 1.6


def test_crop_flip_and_time_ids_by_hand():
  """60x20 pixels, no resize: 41 positions, the draw 0.5 is column int(0.5 * 41) = 20."""
  free = geometry.Geometry(20, crop="random", flip=0.5)
  placed = geometry.place(coordinates(60, 20), free, geometry.Draw(0.9, 0.5, False))
  assert placed.pixels[0, 0].tolist() == [20, 0, 0] and placed.pixels[-1, -1, 0] == 39
  assert placed.time_ids.tolist() == [20, 60, 0, 20, 20, 20]
  flipped = geometry.place(coordinates(60, 20), free, geometry.Draw(0.9, 0.25, True))
  # Flipped first: column 10 of the flipped picture was column 49.
  assert flipped.pixels[0, 0].tolist() == [49, 0, 0] and flipped.pixels[0, -1, 0] == 30
  assert flipped.time_ids.tolist() == [20, 60, 0, 10, 20, 20]
  centre = geometry.place(coordinates(20, 61), geometry.Geometry(20), geometry.Draw(0.9, 0, False))
  assert centre.pixels[0, 0].tolist() == [0, 20, 0]
  assert centre.time_ids.tolist() == [61, 20, 20, 0, 20, 20]


def test_the_size_in_time_ids_is_that_before_the_resize():
  placed = geometry.place(noise_picture(300, 200), geometry.Geometry(32), MIDDLE)
  # 300x200 becomes 48x32.
  assert placed.time_ids.dtype == np.float32
  assert placed.time_ids.tolist() == [200, 300, 0, 8, 32, 32]


@pytest.mark.parametrize("share", [0.0, 0.999999999, 1 - 2**-53])
def test_the_ends_of_the_room_are_reached_and_not_passed(share):
  free = geometry.Geometry(20, crop="random")
  placed = geometry.place(coordinates(60, 20), free, geometry.Draw(share, share, False))
  assert placed.pixels[0, 0, 0] == (0 if share == 0 else 40)


FREE = geometry.Geometry(16, crop="random", flip=0.25, seed=1)


def test_a_pair_has_one_draw_and_others_have_others():
  for couple in map(str, range(50)):
    draws = {geometry.draw(FREE, "a cat", couple, side) for side in ("w", "l", "source")}
    assert len(draws) == 1
  by_key = {
    geometry.draw(dataclasses.replace(FREE, seed=seed), caption, couple, "w")
    for seed, caption, couple in itertools.product((0, 1), ("a", "b", "a1"), ("1", "2", "11"))
  }
  assert len(by_key) == 18


def test_independent_draws_differ_and_the_source_goes_with_the_winner():
  apart = dataclasses.replace(FREE, independent=True)
  draws = [
    [geometry.draw(apart, "a cat", str(couple), side) for side in ("w", "l", "source")]
    for couple in range(400)
  ]
  assert all(w != loser and w == source for w, loser, source in draws)
  # The flips of both sides agree as often as independent coins do: 1/16 + 9/16 = 0.625.
  agree = np.mean([w.flipped == loser.flipped for w, loser, _ in draws])
  assert abs(agree - 0.625) < 3 * np.sqrt(0.625 * 0.375 / 400)


def test_draws_are_uniform_and_flips_as_often_as_asked():
  draws = [geometry.draw(FREE, "a cat", str(couple), "w") for couple in range(4000)]
  for shares in ([d.top for d in draws], [d.left for d in draws]):
    assert 0 <= min(shares) and max(shares) < 1
    counts, _ = np.histogram(shares, 10, (0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
  assert abs(np.mean([d.flipped for d in draws]) - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 4000)
  assert abs(np.corrcoef([d.top for d in draws], [d.left for d in draws])[0, 1]) < 0.05


@pytest.mark.parametrize("flip, expected", [(0.0, False), (1.0, True)])
def test_never_and_always_flip(flip, expected):
  always = dataclasses.replace(FREE, flip=flip)
  draws = [geometry.draw(always, "a cat", str(couple), "w") for couple in range(100)]
  assert {d.flipped for d in draws} == {expected}


def test_a_draw_stays_what_it_was():
  """Encoded data would change under a user's feet."""
  drawn = geometry.draw(FREE, "a cat", "1-2", "w")
  assert drawn == geometry.Draw(0.09156411912978268, 0.5435873174424017, True)


def test_winner_and_loser_of_different_sizes_are_cropped_at_the_same_share():
  drawn = geometry.Draw(0.0, 0.5, True)
  for width in (20, 41, 60, 100):
    placed = geometry.place(coordinates(width, 20), dataclasses.replace(FREE, resolution=20), drawn)
    assert placed.time_ids[3] == (width - 20 + 1) // 2


def test_a_strip_too_long_to_resize_is_refused():
  with pytest.raises(ValueError, match="1024x51200000 pixels; expected at most 89478485"):
    geometry.place(Image.new("RGB", (1, 50000)), geometry.Geometry(1024), MIDDLE)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"resolution": 0}, "geometry.resolution: expected at least 1 pixel, got 0"),
    ({"crop": "centre"}, "geometry.crop: expected one of center, random, got 'centre'"),
    ({"flip": 1.5}, r"geometry.flip: expected a probability in \[0, 1\], got 1.5"),
    ({"flip": float("nan")}, "geometry.flip: expected a probability"),
    ({"resize": "cubic"}, "geometry.resize: expected one of bilinear, lanczos, got 'cubic'"),
  ],
)
def test_wrong_settings_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    geometry.Geometry(**({"resolution": 8} | settings))
