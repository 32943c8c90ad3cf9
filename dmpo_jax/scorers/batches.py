"""Running a model over many images in batches of one size, over the devices of this process."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from dmpo_jax import sharding
from dmpo_jax.scorers import preprocess as preprocess_lib

# Images, and for each one its caption -> for each one a number; higher is better.
Scorer = Callable[[UInt8[np.ndarray, "n H W 3"], Sequence[str]], Float[np.ndarray, " n"]]
# Images -> a vector each.
Embedder = Callable[[UInt8[np.ndarray, "n H W 3"]], Float[np.ndarray, "n d"]]

BATCH_PER_DEVICE = 8  # chosen here: one image costs as much as eight


def check_images(images: Any) -> None:
  """Refuses what is not uint8 [n, H, W, 3]; n may be 0.

  Raises:
    ValueError: of another type or shape.
  """
  dtype, shape = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", ())
  if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:]:
    raise ValueError(
      f"images: {dtype} of shape {shape}; expected uint8 [n, H, W, 3], RGB from 0 to 255"
    )


def check_captions(captions: Any, count: int) -> None:
  """Refuses what is not one text for each of `count` images.

  Raises:
    ValueError: one string in place of many, another number, or something else than strings.
  """
  if isinstance(captions, str | bytes):
    raise ValueError(f"captions: one {type(captions).__name__}; expected a list, one an image")
  if len(captions) != count:
    raise ValueError(f"captions: {len(captions)} for {count} images; expected one an image")
  for position, caption in enumerate(captions):
    if not isinstance(caption, str):
      raise ValueError(f"captions[{position}]: {type(caption).__name__}; expected str")


def make_runner(
  function: Callable[..., Any], params: PyTree
) -> Callable[[int, Callable[[slice], PyTree]], Float[np.ndarray, "n *d"]]:
  """Compiles `function(params, rows)`, whose outputs have a row for every row it is given.

  Args:
    params: placed once, whole on every device of this process.

  Returns:
    (count, rows_of) -> outputs of all rows, float32. `rows_of` gives the arrays of a slice of rows;
    the last batch is filled up with its first row, so that every batch has the same shape.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  rows_sharding, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  run = jax.jit(function, in_shardings=(whole, rows_sharding), out_shardings=rows_sharding)
  params = jax.device_put(params, whole)
  size = BATCH_PER_DEVICE * mesh.size

  def apply(count, rows_of):
    outputs = []
    for start in range(0, count, size):
      rows = rows_of(slice(start, min(start + size, count)))
      filled = jax.tree.map(lambda x: np.concatenate([x, x[:1].repeat(size - len(x), 0)]), rows)
      outputs.append(np.asarray(run(params, filled))[: count - start])
    return np.concatenate(outputs).astype(np.float32)

  return apply


def make_scorer(
  score: Callable[..., Any],
  params: PyTree,
  encode_texts: Callable[[Sequence[str]], PyTree],
  preprocess: preprocess_lib.Preprocess,
  size: int,
) -> Scorer:
  """A `Scorer` of `score(params, pixel_values, texts)`.

  Args:
    score: -> a number for each row. It is compiled.
    encode_texts: captions -> arrays with a row for each, which `score` is given as `texts`.
    preprocess: of one image, to `size` x `size` pixels; they are normalised after it.
  """
  run = make_runner(
    lambda params, rows: score(params, preprocess_lib.normalise(rows[0]), rows[1]), params
  )

  def scorer(images, captions):
    check_images(images)
    check_captions(captions, len(images))
    if not len(images):
      return np.zeros(0, np.float32)
    texts = encode_texts(captions)

    def rows_of(rows):
      pixels = np.stack([preprocess(image, size) for image in images[rows]])
      return pixels, jax.tree.map(lambda x: x[rows], texts)

    return run(len(images), rows_of)

  return scorer
