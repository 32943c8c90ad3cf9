"""What scorers see of a picture, against their authors' libraries on real photographs."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmpo_jax.scorers import preprocess

# In scikit-image's wheel; greyscale: camera, coins, moon, clock_motion, brick, grass, gravel, page.
PHOTOGRAPHS = (
  "astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
  "gravel.png hubble_deep_field.jpg moon.png motorcycle_left.png motorcycle_right.png page.png "
  "retina.jpg rocket.jpg"
).split()
SIZE = 224
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def views():
  """Each photograph whole, portrait or landscape with an odd width, and smaller than `SIZE`."""
  spec = importlib.util.find_spec("skimage")
  if spec is None:
    pytest.skip("scikit-image, whose photographs these are, is not installed")
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  for i, name in enumerate(PHOTOGRAPHS):
    with Image.open(folder / name) as image:
      image.load()
    width, height = image.size
    yield name, image
    yield name, image.crop((3, 1, width - i % 2, height)).transpose(Image.Transpose.TRANSPOSE)
    small = image.crop((0, 0, 97 + 5 * i, 95 + i))
    yield name, small.transpose(Image.Transpose.TRANSPOSE) if i % 2 else small


def as_rgb(image):
  return np.asarray(image.convert("RGB"))


def test_clip_pixels_equal_those_of_transformers():
  # By name: transformers' plain CLIPImageProcessor needs torchvision.
  from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

  judge, run = CLIPImageProcessorPil(), jax.jit(preprocess.normalise)
  largest, shapes = 0.0, set()
  for _, image in views():
    expected = judge(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = run(preprocess.transformers_crop(as_rgb(image), SIZE)[None])[0]
    largest = max(largest, np.abs(got - expected).max())
    shapes.add((image.width > image.height, min(image.size) < SIZE, image.mode))
  print(f"largest difference {largest:.2e}")
  assert largest < 1e-6
  # Portrait and landscape, below and above the size, colour and grey.
  assert len(shapes) == 8


def torchvision_rule(image):
  """Resize(224, BICUBIC) and CenterCrop(224) of torchvision/transforms/functional.py, by Pillow."""
  width, height = image.size
  short, long = min(image.size), max(image.size)
  sides = (SIZE, int(SIZE * long / short)) if width <= height else (int(SIZE * long / short), SIZE)
  image = image.resize(sides, Image.Resampling.BICUBIC)
  left, top = (int(round((side - SIZE) / 2.0)) for side in image.size)
  return image.crop((left, top, left + SIZE, top + SIZE)).convert("RGB")


def open_clip_rule(image):
  """ResizeMaxSize(224) of open_clip/transform.py of 2023, by Pillow."""
  scale = SIZE / float(max(image.size))
  width, height = (round(side * scale) for side in image.size)
  image = image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")
  square = Image.new("RGB", (SIZE, SIZE), 0)
  square.paste(image, ((SIZE - width) // 2, (SIZE - height) // 2))
  return square


@pytest.mark.parametrize(
  ("rule", "judge"),
  [
    (preprocess.torchvision_crop, torchvision_rule),
    (preprocess.pad_to_square, open_clip_rule),
  ],
)
def test_pixels_equal_those_of_the_authors_rule(rule, judge):
  # The authors resize before they make RGB of grey, which changes no pixel.
  for name, image in views():
    got = rule(as_rgb(image), SIZE)
    np.testing.assert_array_equal(got, np.asarray(judge(image)), err_msg=f"{name} {image.size}")


def test_crops_differ_where_a_half_is_rounded():
  # 227 rows of 224: 1.5 are cut off above, which is 1 rounded down and 2 to the even number.
  pixels = np.zeros((227, 224, 3), np.uint8)
  pixels[:] = np.arange(227, dtype=np.uint8)[:, None, None]
  assert preprocess.transformers_crop(pixels, 224)[0, 0, 0] == 1
  assert preprocess.torchvision_crop(pixels, 224)[0, 0, 0] == 2


def test_square_images_are_the_same_by_every_rule():
  pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
  first = preprocess.transformers_crop(pixels, 31)
  np.testing.assert_array_equal(preprocess.torchvision_crop(pixels, 31), first)
  np.testing.assert_array_equal(preprocess.pad_to_square(pixels, 31), first)


@pytest.mark.parametrize(("height", "width"), [(224, 100), (1, 3000), (3000, 1), (224, 224)])
def test_bars_are_black_and_the_square_is_whole(height, width):
  got = preprocess.pad_to_square(np.full((height, width, 3), 9, np.uint8), 224)
  assert got.shape == (224, 224, 3)
  tall, wide = (
    max(1, round(224 * height / max(height, width))),
    max(1, round(224 * width / max(height, width))),
  )
  assert (got == 9).all(-1).sum() == tall * wide and (got == 0).all(
    -1
  ).sum() == 224**2 - tall * wide


def test_normalisation_by_hand():
  pixels = jnp.array([0, 255, 51], jnp.uint8).reshape(1, 1, 1, 3)
  expected = (np.array([0, 1, 0.2]) - MEAN) / STD
  np.testing.assert_allclose(preprocess.normalise(pixels)[0, 0, 0], expected, rtol=1e-6)
