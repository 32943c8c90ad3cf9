"""sample.py against diffusers' DDIMScheduler and against exact densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from dmpo_jax import diffusion, objectives, sample

SD15 = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SHAPE = (3, 2, 2, 4)
WIDTH = 5  # of the prompt embedding


def schedule(**more):
  return diffusion.ScheduleConfig(**{**SD15, **more})


def scheduler_of(config):
  fields = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")
  fields += ("set_alpha_to_one", "steps_offset", "timestep_spacing", "clip_sample")
  return DDIMScheduler(**{name: getattr(config, name) for name in fields})


def denoiser_of(unet, config):
  return objectives.Denoiser(unet, None, None, config.prediction_type, 1.0, jnp.float32)


# --- levels ---


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 333, 500, 999])
def test_levels_are_those_of_diffusers(steps, steps_offset, set_alpha_to_one):
  config = schedule(steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one)
  theirs = scheduler_of(config)
  theirs.set_timesteps(steps)
  ours = sample.ddim_steps(config, steps)
  np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
  table = theirs.alphas_cumprod.numpy()
  following = theirs.timesteps.numpy() - 1000 // steps
  expected = np.where(following >= 0, table[following], theirs.final_alpha_cumprod.numpy())
  # diffusers forms the products in float32 (tests/test_diffusion.py).
  np.testing.assert_allclose(ours.alphas, table[ours.timesteps], rtol=1.5e-4)
  np.testing.assert_allclose(ours.next_alphas, expected, rtol=1.5e-4)
  assert ours.timesteps.dtype == np.int32
  assert ours.alphas.dtype == ours.next_alphas.dtype == np.float32


def test_all_timesteps_can_be_visited():
  config = schedule(num_train_timesteps=50)
  levels = sample.ddim_steps(config, 50)
  abar = diffusion.alphas_cumprod(config)
  assert levels.timesteps.tolist() == list(range(49, -1, -1))
  np.testing.assert_array_equal(levels.alphas, abar[::-1])
  np.testing.assert_array_equal(levels.next_alphas, [*abar[-2::-1], 1.0])


def test_step_counts_out_of_range_are_refused():
  for steps in (0, 1001):
    with pytest.raises(ValueError, match=f"sampling steps: expected 1 to 1000, got {steps}"):
      sample.ddim_steps(schedule(), steps)
  text = (
    "sampling steps: 1000 with steps_offset=1 start at timestep 1000, but the last of the "
    "schedule is 999; expected fewer steps"
  )
  with pytest.raises(ValueError, match=text):
    sample.ddim_steps(schedule(steps_offset=1), 1000)


# --- trajectories ---


def as_prediction(eps, x, alpha, prediction_type):
  """What a network of another type would say where one says eps."""
  signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
  x0 = (x - sigma * eps) / signal
  return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - sigma * x0}[prediction_type]


def gaussian_eps(x, alpha, mean, deviation):
  """E[eps | x_t] for x_0 ~ N(mean, deviation^2 I), in closed form."""
  return (1 - alpha) ** 0.5 * (x - alpha**0.5 * mean) / (alpha * deviation**2 + 1 - alpha)


def gaussian(tanh, params, x, alpha, context):
  """Exact for data whose mean is that of the prompt's embedding; deviation 0.5."""
  del tanh
  mean = context.mean((1, 2))[:, None, None, None] + 0.0 * params[0, 0]
  return gaussian_eps(x, alpha, mean, 0.5)


def nonlinear(tanh, params, x, alpha, context):
  """One hidden layer over channels, with level and prompt in it."""
  prompt = context.mean(1)[:, None, None, : x.shape[-1]]
  return tanh(x @ params + prompt + (1 - 2 * alpha)) * 0.8 + 0.3 * x


MODELS = {"gaussian": gaussian, "nonlinear": nonlinear}


def inputs(seed=0):
  """(params, noise, prompt embeddings, negative embeddings), float32."""
  generator = np.random.default_rng(seed)
  params = 0.4 * generator.standard_normal((SHAPE[-1], SHAPE[-1]), np.float32)
  noise = generator.standard_normal(SHAPE, np.float32)
  prompt, negative = generator.standard_normal((2, SHAPE[0], 3, WIDTH), np.float32)
  return params, noise, prompt, negative


def sample_ours(model, config, steps, scale, arguments):
  table = jnp.asarray(diffusion.alphas_cumprod(config))

  def unet(params, x, timesteps, context):
    alpha = table[timesteps][:, None, None, None]
    return as_prediction(
      model(jnp.tanh, params, x, alpha, context), x, alpha, config.prediction_type
    )

  run = functools.partial(
    sample.ddim_sample,
    denoiser_of(unet, config),
    steps=sample.ddim_steps(config, steps),
    guidance_scale=scale,
  )
  return np.asarray(jax.jit(run)(*arguments))


def sample_diffusers(model, config, steps, scale, arguments):
  """The loop of a diffusers pipeline, in float64 but for the scheduler's own table."""
  params, x, prompt, negative = (torch.from_numpy(each).double() for each in arguments)
  scheduler = scheduler_of(config)
  scheduler.set_timesteps(steps)
  for timestep in scheduler.timesteps:
    alpha = scheduler.alphas_cumprod[timestep].double()
    uncond, cond = (
      as_prediction(model(torch.tanh, params, x, alpha, context), x, alpha, config.prediction_type)
      for context in (negative, prompt)
    )
    x = scheduler.step(uncond + scale * (cond - uncond), timestep, x).prev_sample
  assert x.dtype == torch.float64
  return x.numpy()


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_guided_trajectory_is_that_of_diffusers(model, prediction_type):
  config = schedule(prediction_type=prediction_type, set_alpha_to_one=False, steps_offset=1)
  arguments = inputs()
  ours = sample_ours(MODELS[model], config, 20, 3.0, arguments)
  theirs = sample_diffusers(MODELS[model], config, 20, 3.0, arguments)
  assert np.abs(theirs).max() > 0.5
  # The first step divides by sqrt(abar) = 0.09, which magnifies roundings of 2^-24 to 7e-7; some
  # ten of them a step, over 20 steps, on values up to 5.
  scale = max(np.abs(theirs).max(), 1.0)
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale)


def test_unguided_trajectory_is_that_of_diffusers():
  config, arguments = schedule(), inputs(1)
  ours = sample_ours(nonlinear, config, 7, 1.0, arguments)
  theirs = sample_diffusers(nonlinear, config, 7, 1.0, arguments)
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(np.abs(theirs).max(), 1.0))


# --- densities ---


def run_gaussian(noise, steps, mean, deviation, prediction_type="epsilon"):
  """DDIM with the exact denoiser of N(mean, deviation^2 I), under the DDPM paper's schedule."""
  config = diffusion.ScheduleConfig(prediction_type=prediction_type)  # abar_T = 4e-5
  table = jnp.asarray(diffusion.alphas_cumprod(config))

  def unet(params, x, timesteps, context):
    alpha = table[timesteps][:, None, None, None]
    eps = gaussian_eps(x, alpha, mean, deviation)
    return as_prediction(eps, x, alpha, prediction_type)

  embeds = jnp.zeros((len(noise), 1, 1))
  levels = sample.ddim_steps(config, steps)
  run = functools.partial(
    sample.ddim_sample, denoiser_of(unet, config), steps=levels, guidance_scale=1.0
  )
  return np.asarray(jax.jit(run)({}, jnp.asarray(noise), embeds, embeds)), levels


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_steps_converge_to_the_exact_flow(prediction_type):
  """The probability flow of a Gaussian is affine: z = (x_T - sqrt(a) mean) / std_T stays put, so
  that x_0 = mean + deviation z. Two starting points give slope and offset of the sampler."""
  mean, deviation = 1.5, 0.4
  ends = np.array([0.0, 1.0], np.float32)[:, None, None, None]
  errors = []
  for steps in (10, 40, 160):
    result, levels = run_gaussian(ends, steps, mean, deviation, prediction_type)
    alpha = float(levels.alphas[0])
    z = (ends - alpha**0.5 * mean) / (alpha * deviation**2 + 1 - alpha) ** 0.5
    errors.append(np.abs(result - (mean + deviation * z)).max())
  assert errors[0] > 2.5 * errors[1] > 6 * errors[2]  # a first-order method: about 4 each time
  assert errors[2] < 0.02


def test_samples_have_the_mean_and_deviation_of_the_data():
  noise = np.random.default_rng(3).standard_normal((4096, 2, 2, 1), np.float32)
  for mean, deviation in ((1.5, 0.4), (-0.5, 1.0), (0.0, 2.0)):
    result, _ = run_gaussian(noise, 200, mean, deviation)
    # Four standard errors of 16384 draws, abar_T = 4e-5 (0.6 % of the mean), 1 % of the steps.
    assert abs(result.mean() - mean) < deviation * 4 / 128 + 0.006 * abs(mean) + 0.01 * deviation
    assert abs(result.std() / deviation - 1) < 4 / (2 * 16384) ** 0.5 + 0.015


# --- guidance ---


def one_step(scale, negative, prompt):
  """eps = the embedding itself, one step from abar = 0.64 to 1: x_0 = (x - 0.6 eps) / 0.8."""

  def unet(params, x, timesteps, context):
    assert context.shape[0] == x.shape[0] == timesteps.shape[0]
    return jnp.broadcast_to(context[:, :1, :1, None], x.shape)

  levels = sample.DDIMSteps(np.array([7], np.int32), np.float32([0.64]), np.float32([1.0]))
  noise = jnp.arange(3.0).reshape(3, 1, 1, 1) * jnp.ones((1, 2, 2, 1))
  embeds = [jnp.asarray(each, jnp.float32).reshape(3, 1, 1) for each in (prompt, negative)]
  latents = sample.ddim_sample(
    denoiser_of(unet, schedule()), {}, noise, *embeds, steps=levels, guidance_scale=scale
  )
  eps = (np.asarray(noise) - 0.8 * np.asarray(latents)) / 0.6
  np.testing.assert_allclose(eps, np.broadcast_to(eps[:, :1, :1], eps.shape), atol=1e-6)
  return eps[:, 0, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 7.5])
def test_guidance_is_linear_for_each_image_with_its_own_prompts(scale):
  negative, prompt = np.array([0.5, -1.0, 2.0]), np.array([1.0, 3.0, -2.0])
  expected = negative + scale * (prompt - negative)
  np.testing.assert_allclose(one_step(scale, negative, prompt), expected, atol=1e-5)


def test_without_guidance_the_negative_prompt_is_not_read():
  prompt, nans = [1.0, 3.0, -2.0], [np.nan] * 3
  np.testing.assert_array_equal(one_step(1.0, nans, prompt), one_step(1.0, [0.0] * 3, prompt))
  assert np.isnan(one_step(1.5, nans, prompt)).all()


def test_equal_prompts_make_guidance_idle():
  prompt = [1.0, 3.0, -2.0]
  np.testing.assert_allclose(one_step(7.5, prompt, prompt), one_step(1.0, prompt, prompt))


def test_the_networks_see_every_timestep_once_and_the_parameters():
  levels = sample.ddim_steps(schedule(steps_offset=1), 4)
  assert levels.timesteps.tolist() == [751, 501, 251, 1]

  def unet(params, x, timesteps, context):
    # x counts 1 for each call and keeps the timesteps in base 1000 of the second channel.
    del context
    assert timesteps.dtype == jnp.int32
    seen = x[..., 1:] + timesteps[:, None, None, None] * params["weight"]
    return jnp.concatenate([x[..., :1] + 1, seen], axis=-1)

  denoiser = objectives.Denoiser(unet, None, None, "sample", 1.0, jnp.float32)
  # With abar = 1 at the goal of every step, the prediction of x_0 is the next state.
  levels = levels._replace(next_alphas=np.ones(4, np.float32))
  result = sample.ddim_sample(
    denoiser,
    {"weight": jnp.float32(2.0)},
    jnp.zeros((2, 1, 1, 2)),
    jnp.zeros((2, 1, 1)),
    jnp.zeros((2, 1, 1)),
    steps=levels,
    guidance_scale=1.0,
  )
  np.testing.assert_allclose(result[:, 0, 0], [[4.0, 2.0 * (751 + 501 + 251 + 1)]] * 2)
