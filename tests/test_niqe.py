"""NIQE against its formulas on photographs, and what it says of noise, blur and compression."""

import importlib.util
import io
import json
import pathlib

import numpy as np
import oracles
import pytest
import tiny
from PIL import Image, ImageFilter
from scipy import optimize, special

from dmpo_jax import cli, safetensors_io
from dmpo_jax.scorers import niqe, registry

# In scikit-image's wheel; of motorcycle_left there is a twin, which is not judged.
REFERENCE = (
  "brick.png camera.png clock_motion.png coins.png grass.png gravel.png hubble_deep_field.jpg "
  "moon.png motorcycle_left.png"
).split()
JUDGED = "astronaut.png chelsea.png coffee.png".split()
OTHERS = "motorcycle_right.png retina.jpg rocket.jpg".split()


@pytest.fixture(scope="module")
def photographs():
  spec = importlib.util.find_spec("skimage")
  if spec is None:
    pytest.skip("scikit-image, whose photographs these are, is not installed")
  folder = pathlib.Path(spec.submodule_search_locations[0]) / "data"
  found = {}
  for name in REFERENCE + JUDGED + OTHERS:
    with Image.open(folder / name) as image:
      found[name] = np.asarray(image.convert("RGB"))
  return found


def write(folder, pictures):
  folder.mkdir(exist_ok=True)
  for number, pixels in enumerate(pictures):
    Image.fromarray(pixels).save(folder / f"{number:03d}.png")
  return folder


@pytest.fixture(scope="module")
def folder(photographs, tmp_path_factory):
  return write(tmp_path_factory.mktemp("good"), [photographs[name] for name in REFERENCE])


@pytest.fixture(scope="module")
def reference(folder):
  return niqe.fit(folder)


@pytest.fixture(scope="module")
def scorer(reference, tmp_path_factory):
  folder = tmp_path_factory.mktemp("fitted")
  niqe.save(folder / niqe.FILE, reference)
  return registry.load_scorer("niqe", folder)


def score_one(scorer, pixels):
  return float(scorer(pixels[None], [""])[0])


def cut(photographs, side, count):
  """Pieces of photographs that are not flat."""
  pieces = []
  for pixels in photographs.values():
    for top in range(0, 193, side):
      pieces += [pixels[top : top + side, left : left + side] for left in range(0, 193, side)]
  pieces = [each for each in pieces if each.shape == (side, side, 3) and each.std() > 5]
  return np.stack(pieces[:: len(pieces) // count][:count])


def test_features_equal_the_formulas_on_photographs(photographs):
  """Rounding apart, but for single pixels of 4,608 or more on whose side of zero it decides."""
  largest = {}
  for name, pixels in photographs.items():
    part = pixels[:212, :200]
    expected, sharpness = oracles.niqe_features(part, 96)
    got = niqe.measure(part)
    assert got.features.shape == expected.shape == (4, 36)
    np.testing.assert_allclose(got.sharpness, sharpness, rtol=1e-10, atol=1e-10)
    largest[name] = np.abs(got.features - expected).max()
  print(largest)
  assert len(largest) == 15 and max(largest.values()) < 1e-4
  assert np.median(list(largest.values())) < 1e-12


@pytest.mark.parametrize("side", [72, 71, 32, 16])
def test_small_pictures_are_one_patch_of_even_sides(photographs, side):
  for pixels in cut(photographs, side, 5):
    expected, _ = oracles.niqe_features(pixels, side // 2 * 2)
    np.testing.assert_allclose(niqe.measure(pixels).features, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
  ("height", "width", "patches"),
  [(191, 500, 1), (500, 191, 1), (192, 192, 4), (192, 500, 10), (287, 288, 6)],
)
def test_patches_are_counted(height, width, patches):
  pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
  found = niqe.measure(pixels)
  assert found.features.shape == (patches, 36) and found.sharpness.shape == (patches,)
  if patches > 1:
    np.testing.assert_array_equal(
      niqe.measure(pixels[: height // 96 * 96, : width // 96 * 96]).features, found.features
    )


def test_the_distance_equals_the_formula(photographs, reference):
  expected = []
  for name in JUDGED + OTHERS:
    features = niqe.measure(photographs[name]).features
    assert len(features) > 1
    for rows in (features, features[:1]):
      expected.append(oracles.niqe_distance(rows, *reference))
      assert niqe.distance(rows, reference) == pytest.approx(expected[-1], rel=1e-6)
  assert min(expected) > 1 and np.ptp(expected) > 1


def test_reference_statistics_are_of_the_sharp_patches(photographs, reference):
  sharp = []
  for name in REFERENCE:
    found = niqe.measure(photographs[name])
    sharp += [
      row
      for row, value in zip(found.features, found.sharpness, strict=True)
      if value > 0.75 * found.sharpness.max()
    ]
  assert niqe.LEAST_PATCHES < len(sharp) < 250
  np.testing.assert_allclose(reference.mean, np.mean(sharp, axis=0), rtol=1e-12)
  np.testing.assert_allclose(reference.covariance, np.cov(np.transpose(sharp)), rtol=1e-9)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_shapes_are_the_roots_of_the_ratio_and_those_that_were_drawn(shape):
  generator = np.random.default_rng(0)
  drawn = generator.gamma(1 / shape, size=200_000) ** (1 / shape)
  drawn *= np.where(generator.random(drawn.size) < 0.6, -3.0, 2.0)  # as many, as the scales are
  found, left, right, mean = (float(each[0]) for each in niqe.fit_shape(drawn.reshape(1, 400, -1)))
  assert [found, left, right] == pytest.approx([shape, 3, 2], rel=0.03)
  assert mean == pytest.approx((right - left) * special.gamma(2 / found) / special.gamma(1 / found))
  assert mean == pytest.approx(drawn.mean(), rel=0.05)

  low, high = (np.sqrt(np.mean(side**2)) for side in (drawn[drawn < 0], drawn[drawn > 0]))
  ratio = np.mean(np.abs(drawn)) ** 2 / np.mean(drawn**2)
  ratio *= (low**3 + high**3) * (low + high) / (low**2 + high**2) ** 2

  def excess(x):
    one, two, three = special.gamma(np.array([1, 2, 3]) / x)
    return two**2 / (one * three) - ratio

  assert found == pytest.approx(optimize.brentq(excess, 0.2, 10), abs=5.1e-4)  # half a step


NOISE, BLUR, QUALITY = (0, 5, 10, 20, 40), (0, 1, 2, 4), (None, 20, 10, 5)


def add_noise(pixels, deviation):
  noise = np.random.default_rng(0).normal(0, 1, pixels.shape)
  return np.clip(np.round(pixels + deviation * noise), 0, 255).astype(np.uint8)


def blur(pixels, radius):
  return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def compress(pixels, quality):
  if quality is None:
    return pixels
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=quality)
  return np.asarray(Image.open(file))


@pytest.mark.parametrize(
  ("damage", "strengths"), [(add_noise, NOISE), (blur, BLUR), (compress, QUALITY)]
)
@pytest.mark.parametrize("name", JUDGED)
def test_scores_fall_as_damage_grows(photographs, scorer, name, damage, strengths):
  scores = [score_one(scorer, damage(photographs[name], each)) for each in strengths]
  print(name, damage.__name__, np.round(scores, 2))
  assert np.all(np.diff(scores) < 0)


def test_a_mirrored_picture_has_its_diagonals_exchanged(photographs):
  """No more changes where whole patches fill it; the score does, as references know left and right.

  A pair of neighbours stays one: of those on the diagonals one kind becomes the other.
  """
  pixels = photographs["astronaut.png"][:192, :288]
  plain, mirrored = (niqe.measure(each).features for each in (pixels, pixels[:, ::-1].copy()))
  scale = [*range(10), *range(14, 18), *range(10, 14)]
  exchanged = plain.reshape(2, 3, 36)[:, ::-1].reshape(6, 36)[:, scale + [18 + k for k in scale]]
  np.testing.assert_allclose(mirrored, exchanged, rtol=1e-9, atol=1e-12)
  assert np.abs(plain[:, 10:14] - plain[:, 14:18]).max() > 0.01


def test_brightness_does_not_count_and_contrast_only_beside_c(photographs):
  luminance = photographs["coffee.png"].mean(axis=2).round()
  plain, deviation = niqe.normalise(luminance)
  np.testing.assert_allclose(niqe.normalise(luminance + 40)[0], plain, atol=1e-9)
  expected = plain * (deviation + 1) / (deviation + 1 / 3)
  np.testing.assert_allclose(niqe.normalise(3 * luminance)[0], expected, atol=1e-9)


def test_the_order_of_images_does_not_matter(photographs, scorer):
  pictures = cut(photographs, 96, 7)
  scores = scorer(pictures, [""] * 7)
  assert scores.dtype == np.float32 and scores.shape == (7,) and len(set(scores)) == 7
  order = np.random.default_rng(0).permutation(7)
  np.testing.assert_array_equal(scorer(pictures[order], list("abcdefg")), scores[order])
  assert scorer(pictures[:0], []).shape == (0,)
  with pytest.raises(ValueError, match="captions: 1 for 7 images"):
    scorer(pictures, ["a"])
  with pytest.raises(ValueError, match="images: float64"):
    scorer(pictures / 255, [""] * 7)


@pytest.mark.parametrize("shape", [(16, 16), (72, 72), (300, 200)])
def test_pictures_without_detail_are_finite_and_far(photographs, scorer, shape):
  flat = np.full((*shape, 3), 200, np.uint8)
  dot, half, ramp, stripes = flat.copy(), flat.copy(), flat.copy(), flat.copy()
  dot[5, 5] = 0
  half[: shape[0] // 2] = 255
  ramp[:] = np.minimum(np.arange(shape[1]), 255).astype(np.uint8)[None, :, None]
  stripes[::2] = 0
  worst = score_one(scorer, photographs["coffee.png"])
  for pixels in (flat, dot, half, ramp, stripes, np.zeros_like(flat), np.full_like(flat, 255)):
    assert np.isfinite(niqe.measure(pixels).features).all()
    score = score_one(scorer, pixels)
    assert np.isfinite(score) and score < worst
  found = niqe.measure(flat)
  assert not found.sharpness.any()
  np.testing.assert_array_equal(found.features[0], ([0.2, 0.0] + [0.2, 0.0, 0.0, 0.0] * 4) * 2)


def test_pictures_of_a_folder_are_the_reference(photographs, folder, reference, scorer, tmp_path):
  pictures = cut(photographs, 200, 3)
  expected = scorer(pictures, [""] * 3)
  np.testing.assert_array_equal(registry.load_scorer("niqe", folder)(pictures, [""] * 3), expected)
  niqe.save(tmp_path / niqe.FILE, reference)
  stored = niqe.load(tmp_path / niqe.FILE)
  np.testing.assert_array_equal(stored.covariance, reference.covariance)
  # Other kinds of pictures, and files that are none, beside them; the file goes first.
  for name, suffix in zip(REFERENCE, ("webp", "JPG", "jpeg", "png") * 3, strict=False):
    Image.fromarray(photographs[name]).save(tmp_path / f"{name}.{suffix}")
  (tmp_path / "notes.txt").write_text("x")
  np.testing.assert_array_equal(
    registry.load_scorer("niqe", tmp_path)(pictures, [""] * 3), expected
  )
  (tmp_path / niqe.FILE).unlink()
  assert np.all(registry.load_scorer("niqe", tmp_path)(pictures, [""] * 3) != expected)


def test_what_no_picture_varies_in_does_not_count():
  """Also where rounding leaves it a little variance, which would make the distance 1e7 or more."""
  generator = np.random.default_rng(0)
  for turn in [np.eye(36), *np.linalg.qr(generator.standard_normal((20, 36, 36)))[0]]:
    covariance = turn @ np.diag([4.0] * 18 + [0.0] * 18) @ turn.T
    row = 3 * turn[:, :1].T + 7 * turn[:, 20:21].T
    found = niqe.distance(row, niqe.Statistics(np.zeros(36), covariance))
    assert found == pytest.approx(3 / np.sqrt(4 / 2))


def test_folders_that_will_not_do_are_refused(photographs, tmp_path):
  def refused(message, path=tmp_path):
    for read in (registry.check_scorer, registry.load_scorer):  # also before anything is drawn
      with pytest.raises(ValueError, match=message):
        read("niqe", path)

  refused("NIQE: .* has no picture and no niqe.safetensors; expected PNG, JPEG or WebP")
  refused("absent does not exist; expected a folder: put PNG", tmp_path / "absent")
  refused("scorer niqe: owner/photos does not exist; expected a folder: put", "owner/photos")
  pieces = cut(photographs, 48, niqe.LEAST_PATCHES + 2)
  write(tmp_path, [*pieces[: niqe.LEAST_PATCHES - 1], np.full((48, 48, 3), 7, np.uint8)])
  refused(f"71 sharp patches in 72 pictures; expected at least {niqe.LEAST_PATCHES} for")
  refused("071.png is a file; expected a folder: put", tmp_path / "071.png")
  write(tmp_path, pieces)
  registry.load_scorer("niqe", tmp_path)
  (tmp_path / "broken.png").write_bytes((tmp_path / "000.png").read_bytes()[:200])
  refused("broken.png: .*; replace the picture or take it away")
  (tmp_path / "broken.png").write_text("hello")
  refused("broken.png: image is not JPEG, PNG or WebP; replace")
  Image.fromarray(pieces[0][:15]).save(tmp_path / "broken.png")
  refused("broken.png: NIQE: a picture of 48x15 pixels; expected sides of at least 16")


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ({"mean": np.zeros(36)}, "'covariance' is missing; expected .36, 36., finite"),
    ({"mean": np.zeros(18), "covariance": np.eye(36)}, r"'mean' is \(18,\)"),
    ({"mean": np.zeros(36), "covariance": -np.eye(36)}, "'covariance' has a negative eigenvalue"),
  ],
)
def test_statistics_that_are_none_are_refused(tmp_path, tensors, message):
  safetensors_io.save_safetensors(tmp_path / niqe.FILE, tensors, dtype=None)
  with pytest.raises(ValueError, match=f"niqe.safetensors: {message}"):
    registry.load_scorer("niqe", tmp_path)


@pytest.mark.slow
def test_the_command_compares_by_it(photographs, tmp_path):
  good = write(tmp_path / "good", cut(photographs, 16, 80))
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a cat\na dog\n")
  bases = [tiny.make_base(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1)]
  for each in bases:  # 16 pixels in place of 8
    file = each / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 8}))
  arguments = ["evaluate", *map(str, bases), "--prompts", str(prompts), "--vote-pairs", "0"]
  arguments += ["--scorer", f"niqe={good}", "--out", str(tmp_path / "out")]
  assert cli.main([*arguments, *tiny.overrides(bases[0])]) == 0
  lines = (tmp_path / "out" / "scores" / "niqe.jsonl").read_text().splitlines()
  scores = [json.loads(line)["niqe"] for line in lines[1:]]
  assert len(scores) == 4 and np.isfinite(scores).all() and max(scores) < 0
  results = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
  (found,) = [each for each in results if each["measure"] == "niqe"]
  assert found["better"] == "higher" and len(found["means"]) == 2
