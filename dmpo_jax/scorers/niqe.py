"""NIQE: how far the statistics of a picture's small contrasts are from those of good pictures.

Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", IEEE SPL 2013.
Nothing is learnt and no weights are published with it here: a Gaussian is fitted to 36 features of
patches of reference pictures, another to those of the picture at hand, and the distance of the two
is the measure. The features are those of BRISQUE ("No-reference image quality assessment in the
spatial domain", IEEE TIP 2012) with scales in place of variances, as NIQE has them. Constants and
the numbers of equations are those that public implementations name (chaofengc/IQA-PyTorch,
scikit-video); the papers' text was not at hand.

float64 NumPy: the inverse of a covariance makes much of rounding, and of a flat region float32
would keep nothing but rounding.
"""

import functools
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from dmpo_jax import safetensors_io
from dmpo_jax.data import images as images_lib
from dmpo_jax.data.sources import faults
from dmpo_jax.data.sources import files as source_files
from dmpo_jax.scorers import batches

# Of the paper: side of a patch, and the share of the sharpest patch's sharpness that a patch of a
# reference picture must have (its "patch selection"). At the second scale the side is half of it.
PATCH = 96
SHARPNESS = 0.75
SCALES = 2
FEATURES = 36
# Twice the features, chosen here: from 37 patches on the covariance has an inverse, of mere chance.
LEAST_PATCHES = 2 * FEATURES
LEAST_SIDE = 16  # chosen here: two windows, and of the second scale one

FILE = "niqe.safetensors"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# BRISQUE, section III-A: a window of 7 x 7, sampled out to 3 deviations, and C of equation 1 on the
# scale of 0 to 255.
_REACH, _DEVIATION, _C = 3, 7 / 6, 1.0
# Neighbours to the right, below, and on both diagonals, in the order of the published code.
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
_SHAPES = np.linspace(0.2, 10, 9801)  # the published code's grid, in steps of 0.001
# Keys' cubic kernel (a = -1/2), stretched to twice its width, at distances 0.5, 1.5, 2.5 and 3.5.
_HALVING = np.array([111, 29, -9, -3]) / 256


class Statistics(NamedTuple):
  """What pictures are measured against: a Gaussian of the features of good patches.

  Attributes:
    mean: of the features.
    covariance: of the features.
  """

  mean: Float[np.ndarray, "36"]
  covariance: Float[np.ndarray, "36 36"]


class Patches(NamedTuple):
  """One picture's patches.

  Attributes:
    features: at either scale shape and scale of the normalised luminance, then of its products with
      each of four neighbours shape, mean, left scale and right scale.
    sharpness: mean over the patch of the local deviation at the first scale.
  """

  features: Float[np.ndarray, "p 36"]
  sharpness: Float[np.ndarray, " p"]


def measure(pixels: UInt8[np.ndarray, "H W 3"]) -> Patches:
  """Cuts a picture into patches and takes their features.

  From a short side of 2 PATCH on these are the whole patches of PATCH x PATCH from the upper left
  corner, as in the published code. A smaller picture is one patch as a whole, but for the last row
  or column where their number is odd.

  A flat patch has features too, where the published code has none: those that patches near as less
  and less of them is not flat, shape 0.2 and scales 0.

  Raises:
    ValueError: a side is below `LEAST_SIDE`.

  >>> flat = np.zeros((32, 32, 3), np.uint8)
  >>> measure(flat).features[0, :6].tolist()
  [0.2, 0.0, 0.2, 0.0, 0.0, 0.0]
  """
  height, width = pixels.shape[:2]
  if min(height, width) < LEAST_SIDE:
    raise ValueError(
      f"NIQE: a picture of {width}x{height} pixels; expected sides of at least {LEAST_SIDE}: it "
      "cannot judge smaller ones, nor enlarged ones, which have the enlarger's statistics"
    )
  small = min(height, width) < 2 * PATCH
  rows, columns = (height // 2 * 2, width // 2 * 2) if small else (PATCH, PATCH)
  luminance = _luminance(pixels[: height // rows * rows, : width // columns * columns])
  features = []
  for scale in range(SCALES):
    if scale:
      luminance = _halve(_halve(luminance, 0), 1)
    normalised, deviation = normalise(luminance)
    features.append(_describe(_cut(normalised, rows >> scale, columns >> scale)))
    if not scale:
      sharpness = _cut(deviation, rows, columns).mean(axis=(1, 2))
  return Patches(np.concatenate(features, axis=1), sharpness)


def normalise(
  luminance: Float[np.ndarray, "h w"],
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
  """(I - mu) / (sigma + C) and sigma, of Gaussian windows (BRISQUE, equations 1 to 3).

  The border is repeated outwards, as in the published code.

  >>> dot = np.zeros((9, 9))
  >>> dot[4, 4] = 255
  >>> [float(normalise(each)[0][0, 0]) for each in (dot, dot + 9)]
  [0.0, 0.0]
  """
  mean = _blur(luminance)
  # Rounding may leave a little less than nothing where all is flat.
  deviation = np.sqrt(np.maximum(_blur(luminance**2) - mean**2, 0))
  return (luminance - mean) / (deviation + _C), deviation


def _luminance(pixels: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W"]:
  """Rec. 601, rounded to whole numbers as the published code does, which works on 8 bits."""
  weighted = pixels.astype(np.int64) @ np.array([299, 587, 114])
  return ((weighted + 500) // 1000).astype(np.float64)


def _blur(x):
  window = np.exp(-(np.arange(_REACH + 1) ** 2) / (2 * _DEVIATION**2))
  window /= window[0] + 2 * window[1:].sum()
  for axis in range(2):
    size = x.shape[axis]
    padded = np.pad(x, [(_REACH * (i == axis),) * 2 for i in range(2)], mode="edge")
    at = [padded.take(range(i, i + size), axis) for i in range(2 * _REACH + 1)]
    # By differences, so that of flat regions and even ramps it is x itself and not x with rounding,
    # whose signs the fits below would count.
    pairs = [(window[k], at[_REACH - k] + at[_REACH + k]) for k in range(1, _REACH + 1)]
    x = x + sum(weight * (pair - 2 * x) for weight, pair in pairs)
  return x


def _halve(x, axis):
  """Half the size by the antialiased bicubic filter, mirrored at the border: MATLAB's imresize."""
  reach, size = len(_HALVING) - 1, x.shape[axis]
  padded = np.pad(x, [(reach * (i == axis),) * 2 for i in range(2)], mode="symmetric")
  at = [padded.take(range(i, i + size, 2), axis) for i in range(2 * reach + 2)]
  return sum(w * (at[reach - k] + at[reach + 1 + k]) for k, w in enumerate(_HALVING))


def _cut(x, rows, columns):
  """[h, w] -> [patches, rows, columns]."""
  blocks = x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)
  return blocks.swapaxes(1, 2).reshape(-1, rows, columns)


def _describe(patches):
  """The 18 features of one scale. Neighbours beyond a patch's border are at its other side."""
  shape, left, right, _ = fit_shape(patches)
  features = [shape, (left + right) / 2]
  for shift in _NEIGHBOURS:
    shape, left, right, mean = fit_shape(patches * np.roll(patches, shift, axis=(1, 2)))
    features += [shape, mean, left, right]
  return np.stack(features, axis=1)


def fit_shape(x: Float[np.ndarray, "p h w"]) -> tuple[Float[np.ndarray, " p"], ...]:
  """Fits an asymmetric generalised Gaussian to the numbers of each patch, by their moments.

  Its density is proportional to exp(-(|x| / beta)^shape), with beta of its own on either side of 0
  (Lasmar, Stitou and Berthoumieu, ICIP 2009; NIQE, equations 7 and 8). With l and r the root mean
  squares of the negative and the positive numbers,

      (E|x|)^2 / E[x^2] * (l^3 + r^3) (l + r) / (l^2 + r^2)^2
        = Gamma(2 / shape)^2 / (Gamma(1 / shape) Gamma(3 / shape))

  gives the shape, to the nearest of the published code's grid from 0.2 to 10.

  Returns:
    shape, left beta, right beta, and the mean (right - left) Gamma(2 / shape) / Gamma(1 / shape);
    where all numbers are 0: 0.2, 0, 0, 0.

  >>> x = np.array([[[-2.0, 0.0, 0.0, 2.0]]])  # (E|x|)^2 / E[x^2] = 1 / 2: Laplace's, shape 1
  >>> [round(float(each[0]), 3) for each in fit_shape(x)]  # beta = 2 / sqrt(2)
  [1.0, 1.414, 1.414, 0.0]
  """
  squares = x * x
  left, right = (np.sqrt(_mean_where(squares, side)) for side in (x < 0, x > 0))
  power = _ratio(np.abs(x).mean(axis=(1, 2)) ** 2, squares.mean(axis=(1, 2)))
  # Of the larger one, so that no power of them is too small.
  largest = np.maximum(left, right)
  low, high = _ratio(left, largest), _ratio(right, largest)
  skew = _ratio((low**3 + high**3) * (low + high), (low**2 + high**2) ** 2)
  ratios, scales, means = _tables()
  nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, power * skew)
  beta_left, beta_right = left * scales[nearest], right * scales[nearest]
  return _SHAPES[nearest], beta_left, beta_right, (beta_right - beta_left) * means[nearest]


def _mean_where(x, mask):
  return np.where(mask, x, 0).sum(axis=(1, 2)) / np.maximum(mask.sum(axis=(1, 2)), 1)


def _ratio(x, y):
  """0 in place of 0 / 0."""
  return np.divide(x, y, out=np.zeros_like(x), where=y > 0)


@functools.cache
def _tables():
  """Of each shape the ratio of moments, beta over the deviation, and E|x| over beta."""
  one, two, three = (np.array([math.lgamma(n / shape) for shape in _SHAPES]) for n in (1, 2, 3))
  return np.exp(2 * two - one - three), np.exp((one - three) / 2), np.exp(two - one)


def fit(folder: pathlib.Path) -> Statistics:
  """The Gaussian of the sharp patches of the pictures in a folder.

  Of each picture those count whose sharpness is above `SHARPNESS` times that of its sharpest: what
  is out of focus says little (NIQE). A flat picture has none.

  Args:
    folder: its PNG, JPEG and WebP files are read, those in folders below are not.

  Raises:
    ValueError: there is no picture, one cannot be read, or they have too few patches.
  """
  files = sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES)
  if not files:
    raise ValueError(
      f"NIQE: {folder} has no picture and no {FILE}; expected PNG, JPEG or WebP pictures that you "
      "call good, or that file as niqe.save writes it"
    )
  sharp = np.concatenate([_sharp_patches(file) for file in files])
  if len(sharp) < LEAST_PATCHES:
    raise ValueError(
      f"NIQE: {folder}: {len(sharp)} sharp patches in {len(files)} pictures; expected at least "
      f"{LEAST_PATCHES} for a covariance of {FEATURES} features: add pictures (one with a short "
      f"side below {2 * PATCH} pixels has one patch, a flat one none)"
    )
  return Statistics(sharp.mean(axis=0), np.cov(sharp, rowvar=False))


def _sharp_patches(file):
  try:
    data = source_files.read_image(file.parent, file.name)
    patches = measure(np.asarray(images_lib.decode(data)))
  except (faults.Fault, ValueError) as error:
    raise ValueError(f"{file}: {error}; replace the picture or take it away") from error
  return patches.features[patches.sharpness > SHARPNESS * patches.sharpness.max()]


def save(path: pathlib.Path, statistics: Statistics) -> None:
  """Writes FOLDER/niqe.safetensors, in float64."""
  safetensors_io.save_safetensors(path, statistics._asdict(), dtype=None)


def load(path: pathlib.Path) -> Statistics:
  """Reads what `save` wrote.

  Raises:
    ValueError: it is no such file, or its numbers are those of no Gaussian.
  """
  tensors = safetensors_io.load_safetensors(path)
  return Statistics(*(_read(path, tensors, name) for name in Statistics._fields))


def _read(path: pathlib.Path, tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray:
  shape = (FEATURES,) if name == "mean" else (FEATURES, FEATURES)
  value = np.asarray(tensors[name], np.float64) if name in tensors else np.zeros(0)
  if value.shape != shape or not np.isfinite(value).all():
    got = f"is {value.shape} or not finite" if name in tensors else "is missing"
    raise ValueError(f"{path}: {name!r} {got}; expected {shape}, finite: make it with niqe.fit")
  if name == "covariance" and np.linalg.eigvalsh(value)[0] < -1e-6 * np.abs(value).max():
    raise ValueError(f"{path}: {name!r} has a negative eigenvalue; make it with niqe.fit")
  return value


def distance(patches: Float[np.ndarray, "p 36"], reference: Statistics) -> float:
  """sqrt((m - m_r)^T ((S + S_r) / 2)^+ (m - m_r)), NIQE's equation 10.

  The covariance S of one patch is taken to be 0. ^+ is the pseudo-inverse, as in the published
  code: what no patch of either side varies in does not count.

  >>> reference = Statistics(np.zeros(36), 2 * np.eye(36))
  >>> distance(np.eye(36)[:1] * 3, reference)
  3.0
  """
  own = np.cov(patches, rowvar=False) if len(patches) > 1 else np.zeros_like(reference.covariance)
  apart = patches.mean(axis=0) - reference.mean
  # MATLAB's bound for what is 0; NumPy's own lets rounding through.
  rtol = FEATURES * np.finfo(np.float64).eps
  inverse = np.linalg.pinv((own + reference.covariance) / 2, rtol=rtol, hermitian=True)
  return math.sqrt(max(apart @ inverse @ apart, 0.0))


def load_niqe(folder: pathlib.Path) -> batches.Scorer:
  """Minus the distance from the folder's niqe.safetensors, or from its pictures. No captions.

  Raises:
    ValueError: see `load` and `fit`.
  """
  file = folder / FILE
  reference = load(file) if file.is_file() else fit(folder)

  def score(images, captions):
    batches.check_images(images)
    batches.check_captions(captions, len(images))
    return np.array([-distance(measure(each).features, reference) for each in images], np.float32)

  return score
