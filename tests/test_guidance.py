"""Guidance of sample.py: by text, by image, rescaled; against diffusers and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

from dmpo_jax import objectives, sample, types

# One step from x = 0.8 x_0 + 0.6 eps to x_0.
ONE_STEP = sample.Plan(
  "ddim", 1.0, sample.Levels(np.array([7], np.int32), *np.float32([[0.8], [0.6], [1.0], [0.0]]))
)
NEGATIVE, PROMPT, IMAGE = np.array([[0.5, -1.0, 2.0], [1.0, 3.0, -2.0], [0.25, -0.5, 1.5]])


def guided(unet, conditions, negative, *, noise=None, **settings):
  """The prediction, an eps, that the step was made with."""
  noise = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((1, 2, 2, 1)) if noise is None else noise
  denoiser = objectives.Denoiser(unet, None, None, "epsilon", 1.0, jnp.float32)
  x0 = sample.sample_latents(denoiser, {}, noise, conditions, negative, plan=ONE_STEP, **settings)
  return (np.asarray(noise) - 0.8 * np.asarray(x0)) / 0.6


def column(values):
  return jnp.asarray(values, jnp.float32).reshape(3, 1, 1)


def image_of(values):
  return jnp.asarray(values, jnp.float32).reshape(3, 1, 1, 1)


def echo(params, x, timesteps, conditions):
  """eps = the embedding, plus ten times the image where there is one."""
  context = conditions.prompt_embeds
  assert context.shape[0] == x.shape[0] == timesteps.shape[0]
  eps = jnp.broadcast_to(context[:, :1, :1, None], x.shape)
  return eps if conditions.image_latents is None else eps + 10 * conditions.image_latents


def by_text(scale, negative=NEGATIVE, prompt=PROMPT, **settings):
  conditions, without = (types.Conditions(column(each)) for each in (prompt, negative))
  eps = guided(echo, conditions, without, guidance_scale=scale, **settings)
  np.testing.assert_allclose(eps, np.broadcast_to(eps[:, :1, :1], eps.shape), atol=1e-6)
  return eps[:, 0, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 7.5])
def test_guidance_is_linear_for_each_image_with_its_own_prompts(scale):
  expected = NEGATIVE + scale * (PROMPT - NEGATIVE)
  np.testing.assert_allclose(by_text(scale), expected, atol=1e-5)


def test_without_guidance_the_negative_prompt_is_not_read():
  nans = [np.nan] * 3
  np.testing.assert_array_equal(by_text(1.0, nans), by_text(1.0))
  np.testing.assert_array_equal(by_text(1.0, nans, guidance_rescale=0.7), by_text(1.0))
  assert np.isnan(by_text(1.5, nans)).all()


def test_equal_prompts_make_guidance_idle():
  np.testing.assert_allclose(by_text(7.5, PROMPT), by_text(1.0), atol=1e-6)


def test_each_image_keeps_all_of_its_own_conditions():
  """SDXL's added conditions are guided too, and an image goes to both halves."""

  def unet(params, x, timesteps, conditions):
    text, ids = conditions.added
    total = text.sum(1) + 100 * ids.sum(1)
    return jnp.zeros_like(x) + total[:, None, None, None] + conditions.image_latents

  def conditions(values, image):
    ids = jnp.arange(18.0).reshape(3, 6)
    text = jnp.asarray(values, jnp.float32)[:, None] * jnp.ones((1, 2))
    return types.Conditions(column(values), types.AddedConditions(text, ids), image)

  image = image_of(IMAGE)
  expected = 2 * (NEGATIVE + 3 * (PROMPT - NEGATIVE)) + 100 * np.arange(18).reshape(3, 6).sum(1)
  for negative_image in (image, None):
    eps = guided(
      unet, conditions(PROMPT, image), conditions(NEGATIVE, negative_image), guidance_scale=3.0
    )
    np.testing.assert_allclose(eps[:, 0, 0, 0], expected + IMAGE, rtol=1e-6)


# --- rescaled ---


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(share):
  generator = np.random.default_rng(0)
  one, other = generator.standard_normal((2, 3, 4, 4, 2), np.float32)

  def unet(params, x, timesteps, conditions):
    chosen = conditions.prompt_embeds[:, :, :, None] > 0
    number = jnp.arange(len(x)) // 2  # of the image: its halves are side by side
    return jnp.where(chosen, jnp.asarray(one)[number], jnp.asarray(other)[number])

  eps = guided(
    unet,
    types.Conditions(column([1, 1, 1])),
    types.Conditions(column([-1, -1, -1])),
    noise=jnp.zeros((3, 4, 4, 2)),
    guidance_scale=7.5,
    guidance_rescale=share,
  )
  cfg, text = torch.from_numpy(other + 7.5 * (one - other)), torch.from_numpy(one)
  theirs = pipeline_stable_diffusion.rescale_noise_cfg(cfg, text, share).numpy()
  np.testing.assert_allclose(eps, theirs, atol=2e-5)
  if share == 1.0:
    np.testing.assert_allclose(eps.std((1, 2, 3)), one.std((1, 2, 3)), rtol=1e-5)


# --- by image ---


def by_image(scale, image_scale, **settings):
  conditions = types.Conditions(column(PROMPT), image_latents=image_of(IMAGE))
  negative = types.Conditions(column(NEGATIVE), image_latents=image_of([np.nan] * 3))
  eps = guided(
    echo,
    conditions,
    negative,
    guidance_scale=scale,
    image_guidance_scale=image_scale,
    **settings,
  )
  return eps[:, 0, 0, 0]


@pytest.mark.parametrize("scale, image_scale", [(7.5, 1.5), (1.0, 1.0), (2.0, 0.0), (1.0, 3.0)])
def test_image_guidance_is_that_of_instruct_pix2pix(scale, image_scale):
  """StableDiffusionInstructPix2PixPipeline: uncond + s (text - image) + s_I (image - uncond)."""
  uncond, image, text = NEGATIVE, NEGATIVE + 10 * IMAGE, PROMPT + 10 * IMAGE
  expected = uncond + scale * (text - image) + image_scale * (image - uncond)
  np.testing.assert_allclose(by_image(scale, image_scale), expected, rtol=1e-5, atol=2e-4)


def test_image_guidance_needs_an_image():
  conditions = types.Conditions(column(PROMPT))
  text = "image_guidance_scale: expected None where the conditions have no image_latents, got 1.5"
  with pytest.raises(ValueError, match=text):
    guided(echo, conditions, conditions, guidance_scale=7.5, image_guidance_scale=1.5)
