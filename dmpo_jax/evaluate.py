"""Paired comparison of a policy with its reference: same prompts, same seeds, same sampler."""

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree, UInt32

from dmpo_jax import base as base_lib
from dmpo_jax import config as config_lib
from dmpo_jax import logs, sample, sharding, train_step
from dmpo_jax.data import images as images_lib
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import measure
from dmpo_jax.models import vae

BATCH_PER_DEVICE = 64
POSITIONS_PER_DEVICE = 2**14  # of latents: 4 images of 64 x 64, 1 of 128 x 128
BOOTSTRAP_DRAWS = 2000


class Interval(NamedTuple):
  """A mean over prompts with its 95 % bootstrap interval."""

  mean: float
  low: float
  high: float


def bootstrap(
  values: Float[np.ndarray, "p s"] | Bool[np.ndarray, "p s"],
  counted: Bool[np.ndarray, "p s"] | None = None,
  *,
  seed: int = 0,
) -> Interval:
  """Percentile bootstrap (Efron 1979) of the mean, resampling prompts: rows, not images.

  Images of one prompt are not independent, so the interval is that of new prompts.

  Args:
    counted: which values enter the mean; all if None. A row may have none.

  Returns:
    The interval; NaN where nothing is counted.

  >>> bootstrap(np.full((3, 2), 0.5))
  Interval(mean=0.5, low=0.5, high=0.5)
  """
  counted = np.ones(values.shape, bool) if counted is None else counted
  if not counted.any():
    return Interval(math.nan, math.nan, math.nan)
  sums = np.where(counted, values, 0.0).sum(axis=1, dtype=np.float64)
  counts = counted.sum(axis=1)
  rows = counts > 0
  sums, counts = sums[rows], counts[rows]
  generator = np.random.default_rng(seed)
  chosen = generator.integers(len(sums), size=(BOOTSTRAP_DRAWS, len(sums)))
  draws = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
  low, high = np.percentile(draws, [2.5, 97.5])
  return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def initial_noise(
  prompts: Sequence[str], images_per_prompt: int, shape: tuple[int, int, int], seed: int
) -> Float[np.ndarray, "p s h w c"]:
  """`noise_of` each prompt and each number of an image."""
  numbers = range(images_per_prompt)
  return np.stack([[noise_of(prompt, n, shape, seed) for n in numbers] for prompt in prompts])


def noise_of(
  prompt: str, number: int, shape: tuple[int, int, int], seed: int
) -> Float[np.ndarray, "h w c"]:
  """N(0, I) as a function of (seed, prompt, image number): the same whatever else is sampled."""
  generator = np.random.default_rng((seed, zlib.crc32(prompt.encode()), number))
  return generator.standard_normal(shape, np.float32)


def images_per_device(latent_shape: tuple[int, int, int]) -> int:
  """How many images a device draws at once.

  >>> [images_per_device((side, side, 4)) for side in (4, 64, 128)]
  [64, 4, 1]
  """
  return max(1, min(BATCH_PER_DEVICE, POSITIONS_PER_DEVICE // math.prod(latent_shape[:2])))


class BatchSampler(NamedTuple):
  """Sampling batch by batch, with parameters that stay on the devices in between.

  Attributes:
    place: (unet_params, text_params) -> the parameters on all devices, with the VAE's.
    size: count -> images of one batch where `count` are wanted in all; a multiple of the devices.
    draw: (placed, token ids [n, ...], noise [n, h, w, c], source images or None) -> images
      [n, H, W, 3] in [-1, 1]; n images are one batch. It compiles once for each n.
  """

  place: Callable[[Any, Any], Any]
  size: Callable[[int], int]
  draw: Callable[..., Float[np.ndarray, "n H W 3"]]


def make_batch_sampler(
  base: base_lib.Base, config: config_lib.SamplingConfig, *, negative_prompt: str | None = None
) -> BatchSampler:
  """Sampling over all devices, see `make_sampler`."""
  mesh = sharding.make_mesh()
  plan = sample.make_plan(base.schedule, config.steps, config.sampler)
  denoiser = base.denoiser()
  negative_ids = base.tokenizer([negative_prompt or ""])
  zero = negative_prompt is None and base.zero_negative
  largest = images_per_device(base.latent_shape)
  rows = sharding.batch_sharding(mesh)

  @functools.partial(jax.jit, in_shardings=(None, None, None, rows), out_shardings=rows)
  def generate(unet_params, text_params, vae_params, batch):
    input_ids, noise, keys, sources = batch
    both = denoiser.embed(text_params, jnp.concatenate([input_ids, negative_ids]))
    conditions = jax.tree.map(lambda x: x[:-1], both)
    negative = jax.tree.map(lambda x: jnp.broadcast_to(x[-1:], (len(noise), *x.shape[1:])), both)
    if zero:
      negative = sample.without_prompt(negative)
    if sources is not None:
      image_latents, _ = vae.split_moments(base.encode(vae_params, sources))
      conditions = conditions._replace(image_latents=image_latents)
    latents = sample.sample_latents(
      denoiser,
      unet_params,
      noise,
      conditions,
      negative,
      plan=plan,
      guidance_scale=config.guidance_scale,
      guidance_rescale=config.guidance_rescale,
      image_guidance_scale=config.image_guidance_scale if base.edits else None,
      key=jax.random.wrap_key_data(keys),
    )
    return base.decode(vae_params, latents)

  def place(unet_params, text_params):
    replicated = sharding.replicated(mesh)
    params = (unet_params, text_params, base.params["vae"])
    return [sharding.put_tree(each, replicated) for each in params]

  def draw(placed, input_ids, noise, sources=None):
    part = (input_ids, noise, noise_keys(noise), sources)
    return np.asarray(generate(*placed, sharding.put_batch(part, mesh)))

  return BatchSampler(place, lambda count: mesh.size * min(largest, -(-count // mesh.size)), draw)


def make_sampler(
  base: base_lib.Base, config: config_lib.SamplingConfig, *, negative_prompt: str | None = None
) -> Callable[..., Float[np.ndarray, "n H W 3"]]:
  """A function (unet_params, text_params, prompts [n], noise [n, h, w, c]) -> images in [-1, 1].

  It works in batches of one size over all devices, so that it compiles once.

  Args:
    negative_prompt: for guidance; None is the empty prompt, or what the base has in its place.

  Raises:
    ValueError: a sampler or a number of steps that the base's schedule does not allow.
  """
  sampler = make_batch_sampler(base, config, negative_prompt=negative_prompt)

  def run(unet_params, text_params, prompts, noise, title="sampling", sources=None):
    if (sources is not None) != base.edits:
      expected = "one for each prompt" if base.edits else "none: this base does not edit images"
      raise ValueError(f"source images: expected {expected}")
    placed, input_ids = sampler.place(unet_params, text_params), base.tokenizer(list(prompts))
    count = len(prompts)
    size, images = sampler.size(count), []
    whole = (input_ids, noise, sources)
    with logs.progress(count, 0, title) as bar:
      for (ids, drawn_from, shown), own in cut_rows(whole, count, size):
        images.append(sampler.draw(placed, ids, drawn_from, shown)[:own])
        bar.update(own)
    return np.concatenate(images)

  return run


def cut_rows(rows: PyTree, count: int, size: int) -> Iterator[tuple[PyTree, int]]:
  """Arrays [count, ...] in parts of `size` rows, with how many are its own: the last repeats some.

  >>> [(part.tolist(), own) for part, own in cut_rows(np.arange(5), 5, 3)]
  [([0, 1, 2], 3), ([3, 4, 3], 2)]
  """
  for start in range(0, count, size):
    part = jax.tree.map(lambda x, start=start: x[start : start + size], rows)
    filled = jax.tree.map(lambda x: np.resize(x, (size, *x.shape[1:])), part)
    yield filled, min(size, count - start)


def noise_keys(noise: Float[np.ndarray, "n h w c"]) -> UInt32[np.ndarray, "n 2"]:
  """Key data for each image's further noise (ancestral sampling), a function of its first noise."""
  digests = (hashlib.blake2b(each.tobytes(), digest_size=8).digest() for each in noise)
  return np.stack([np.frombuffer(digest, np.uint32) for digest in digests])


class Comparison(NamedTuple):
  """Images [p, s, H, W, 3] in [-1, 1] and scores of both models on the same noise."""

  prompts: tuple[str, ...]
  reference_images: np.ndarray
  policy_images: np.ndarray
  reference: measure.Scores
  policy: measure.Scores


def real_images(emoji: Sequence[emoji_lib.Emoji], resolution: int) -> np.ndarray:
  """The drawings [n, H, W, 3] in [-1, 1]."""
  return np.stack([images_lib.to_array(emoji_lib.draw(each), resolution) for each in emoji])


def sample_prompts(
  sampler,
  base,
  unet_params,
  prompts,
  images_per_prompt: int,
  *,
  seed: int,
  title: str,
  sources: Float[np.ndarray, "p H W 3"] | None = None,
) -> Float[np.ndarray, "p s H W 3"]:
  """`images_per_prompt` images of every prompt; of its source image, where the base edits."""
  noise = initial_noise(prompts, images_per_prompt, base.latent_shape, seed)
  repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
  if sources is not None:
    sources = sources.repeat(images_per_prompt, axis=0)
  noise = noise.reshape(-1, *base.latent_shape)
  flat = sampler(unet_params, base.text_params, repeated, noise, title, sources)
  return flat.reshape(len(prompts), images_per_prompt, *flat.shape[1:])


def compare_emoji(
  base: base_lib.Base,
  policy_params: train_step.Params,
  prompts: Sequence[str],
  emoji: Sequence[emoji_lib.Emoji],
  config: config_lib.SamplingConfig,
  *,
  seed: int,
) -> Comparison:
  """Samples reference and policy on the same prompts and noise, and scores both."""
  sampler, real = make_sampler(base, config), real_images(emoji, base.resolution)

  def both(params, title):
    images = sample_prompts(
      sampler, base, params, prompts, config.images_per_prompt, seed=seed, title=title
    )
    return images, measure.score(images, prompts, emoji, real)

  reference_images, reference = both(base.params["unet"], "sampling the reference")
  policy_images, policy = both(policy_params, "sampling the policy")
  return Comparison(tuple(prompts), reference_images, policy_images, reference, policy)


def summarise(scores: measure.Scores) -> dict[str, Interval]:
  """Prompt match, RMSE and use rank with intervals over prompts."""
  return {
    "prompt_match": bootstrap(scores.match),
    "rmse": bootstrap(scores.rmse),
    "use_rank": bootstrap(scores.use_rank),
  }
