"""sample.py against diffusers' schedulers and against exact densities."""

import dataclasses
import functools
import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete

from dmpo_jax import diffusion, objectives, sample, types

# diffusers calls numpy.array on torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# All that a class may need to be one of ours; what the class does not know diffusers passes over.
NEEDED = dict(BETAS, clip_sample=False, skip_prk_steps=True)
SHAPE = (3, 2, 2, 4)
WIDTH = 5  # of the prompt embedding
SCALE = 3.0  # of guidance
KEY_SEED = 8

# Betas and interpolated levels are float32 in diffusers, as is x of its Euler schedulers, up to
# 4096 at zero terminal SNR; ours are float32 throughout. Measured on a CPU at 20 steps, over all
# that is below: 1.3e-4 for pndm, whose weights add up to 7 in absolute value, 5e-5 for the others.
TOLERANCE = 2e-4


def schedule(**more):
  return diffusion.ScheduleConfig(**{**NEEDED, **more})


def scheduler_of(sampler, raw):
  return getattr(diffusers, diffusion.SAMPLER_CLASSES[sampler]).from_config(raw)


def denoiser_of(unet, prediction_type):
  return objectives.Denoiser(unet, None, None, prediction_type, 1.0, jnp.float32)


def embeds(array):
  return types.Conditions(jnp.asarray(array))


# --- the network ---


def as_prediction(x0, x, signal, sigma, prediction_type):
  """What a network of each type would say where one says x_0."""
  eps = (x - signal * x0) / sigma
  velocity = signal * eps - sigma * x0
  return {"epsilon": eps, "sample": x0, "v_prediction": velocity}[prediction_type]


def nonlinear(tanh, params, x, timestep, context):
  """x_0 from one hidden layer over channels, with time and prompt in it."""
  prompt = context.mean(1)[:, None, None, : x.shape[-1]]
  return 1.5 * tanh(x @ params + prompt + (timestep / 1000 - 0.5))


def inputs(seed=0):
  """(params, noise, prompt embeddings, negative embeddings), float32."""
  generator = np.random.default_rng(seed)
  params = 0.4 * generator.standard_normal((SHAPE[-1], SHAPE[-1]), np.float32)
  noise = generator.standard_normal(SHAPE, np.float32)
  prompt, negative = generator.standard_normal((2, SHAPE[0], 3, WIDTH), np.float32)
  return params, noise, prompt, negative


@functools.cache
def compiled(sampler, prediction_type):
  """One program for all plans of a sampler, as far as their timesteps are of one type."""

  @jax.jit
  def run(init_scale, levels, abar, params, noise, prompt, negative, key):
    def unet(params, x, timesteps, conditions):
      times = timesteps.astype(jnp.float32)
      level = jnp.interp(times, jnp.arange(len(abar), dtype=jnp.float32), abar)
      signal, sigma = (jnp.sqrt(each)[:, None, None, None] for each in (level, 1 - level))
      x0 = nonlinear(jnp.tanh, params, x, times[:, None, None, None], conditions.prompt_embeds)
      return as_prediction(x0, x, signal, sigma, prediction_type)

    return sample.sample_latents(
      denoiser_of(unet, prediction_type),
      params,
      noise,
      embeds(prompt),
      embeds(negative),
      plan=sample.Plan(sampler, init_scale, levels),
      guidance_scale=SCALE,
      key=key,
    )

  return run


def sample_ours(config, steps, sampler, arguments):
  plan = sample.make_plan(config, steps, sampler)
  run = compiled(plan.sampler, config.prediction_type)
  abar = diffusion.alphas_cumprod(config)
  key = jax.random.key(KEY_SEED)
  return np.asarray(run(plan.init_scale, plan.levels, abar, *arguments, key))


def sample_diffusers(scheduler, steps, abar, arguments, scale=SCALE):
  """The loop of a diffusers pipeline, in float64 but for what the scheduler rounds."""
  params, noise, prompt, negative = (torch.from_numpy(each).double() for each in arguments)
  scheduler.set_timesteps(steps)
  x = noise * scheduler.init_noise_sigma
  for timestep in scheduler.timesteps:
    scaled = scheduler.scale_model_input(x, timestep)
    level = np.interp(timestep.item(), np.arange(len(abar)), abar.astype(np.float64))
    uncond, cond = (
      as_prediction(
        nonlinear(torch.tanh, params, scaled, timestep.item(), context),
        scaled,
        level**0.5,
        (1 - level) ** 0.5,
        scheduler.config.prediction_type,
      )
      for context in (negative, prompt)
    )
    x = scheduler.step(uncond + scale * (cond - uncond), timestep, x).prev_sample
  assert x.dtype == torch.float64
  return x.numpy()


@functools.cache
def fresh_noise():
  """What euler_ancestral draws at each of 20 steps: of each image's key, by step."""
  key = jax.random.key(KEY_SEED)

  def draw(image, step):
    folded = jax.random.fold_in(jax.random.fold_in(key, image), step)
    return jax.random.normal(folded, SHAPE[1:])

  over_images = jax.vmap(draw, (0, None))
  return np.array(jax.vmap(over_images, (None, 0))(jnp.arange(SHAPE[0]), jnp.arange(20)))


@pytest.fixture
def same_noise(monkeypatch):
  """A function after whose call diffusers' ancestral sampler draws what ours draws."""

  def start():
    draws = iter(torch.from_numpy(fresh_noise()))

    def randn_tensor(shape, dtype, **_):
      assert tuple(shape) == SHAPE
      return next(draws).to(dtype)

    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", randn_tensor)

  return start


def worst_difference(sampler, raw, steps, same_noise, read=None):
  """Between both, as a share of the largest latent where that is above 1."""
  config = read or diffusion.ScheduleConfig(**raw)
  arguments = inputs()
  ours = sample_ours(config, steps, sampler, arguments)
  same_noise()
  abar = diffusion.alphas_cumprod(config)
  theirs = sample_diffusers(scheduler_of(sampler, raw), steps, abar, arguments)
  assert np.abs(theirs).max() > 0.5
  return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1.0)


# --- levels ---


def check_levels(plan, theirs, steps):
  """Timesteps exactly, levels and scale of the noise as far as float32 goes."""
  theirs.set_timesteps(steps)
  levels = plan.levels
  np.testing.assert_array_equal(levels.timesteps, theirs.timesteps.numpy())
  np.testing.assert_allclose(levels.signals**2 + levels.sigmas**2, 1, atol=3e-7)
  first = 1.0
  if hasattr(theirs, "sigmas"):
    s = theirs.sigmas.numpy()
    np.testing.assert_allclose(levels.sigmas / levels.signals, s[:-1], rtol=1e-5)
    if plan.sampler.startswith("euler"):
      first = (1 + s[0] ** 2) ** 0.5
    else:
      np.testing.assert_allclose(levels.next_sigmas / levels.next_signals, s[1:], rtol=1e-5)
  np.testing.assert_allclose(plan.init_scale * first, float(theirs.init_noise_sigma), rtol=1e-5)
  for each in levels:
    if each is not None:
      assert each.dtype in (np.int32, np.float32, bool) and len(each) == len(theirs.timesteps)
      assert np.isfinite(each).all()


@pytest.mark.parametrize("timestep_spacing", diffusion.TIMESTEP_SPACINGS)
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_levels_are_those_of_diffusers(sampler, timestep_spacing):
  for steps_offset in (0, 1):
    raw = NEEDED | dict(timestep_spacing=timestep_spacing, steps_offset=steps_offset)
    theirs = scheduler_of(sampler, raw)
    for steps in (1, 2, 3, 7, 20, 50, 333, 900):
      check_levels(sample.make_plan(schedule(**raw), steps, sampler), theirs, steps)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("timestep_spacing", diffusion.TIMESTEP_SPACINGS)
def test_goals_of_ddim_are_those_of_diffusers(timestep_spacing, set_alpha_to_one):
  config = schedule(timestep_spacing=timestep_spacing, set_alpha_to_one=set_alpha_to_one)
  theirs = scheduler_of("ddim", dataclasses.asdict(config))
  for steps in (1, 7, 20, 333):
    theirs.set_timesteps(steps)
    table = theirs.alphas_cumprod.numpy()
    following = theirs.timesteps.numpy() - 1000 // steps
    expected = np.where(following >= 0, table[following], theirs.final_alpha_cumprod.numpy())
    levels = sample.make_plan(config, steps).levels
    np.testing.assert_allclose(levels.next_signals**2, expected, rtol=1e-5)
    np.testing.assert_allclose(levels.next_sigmas**2, 1 - expected, rtol=1e-4)


def test_rounded_trailing_spacing_ends_where_it_should():
  """1000 / 499 is rounded, so that diffusers takes a 500th step at timestep -1; ours does not."""
  theirs = scheduler_of("ddim", NEEDED | dict(timestep_spacing="trailing"))
  theirs.set_timesteps(499)
  levels = sample.make_plan(schedule(timestep_spacing="trailing"), 499).levels
  assert theirs.timesteps[-1] == -1
  np.testing.assert_array_equal(levels.timesteps, theirs.timesteps.numpy()[:-1])


def test_all_timesteps_can_be_visited():
  config = schedule(num_train_timesteps=50, set_alpha_to_one=True)
  levels = sample.make_plan(config, 50).levels
  abar = diffusion.alphas_cumprod(config)
  assert levels.timesteps.tolist() == list(range(49, -1, -1))
  np.testing.assert_allclose(levels.signals**2, abar[::-1], rtol=1e-6)
  np.testing.assert_allclose(levels.next_signals**2, [*abar[-2::-1], 1.0], rtol=1e-6)


# --- scheduler_config.json ---


def written_by(scheduler):
  return {"_class_name": type(scheduler).__name__, **scheduler.config}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
def test_defaults_are_those_of_the_class(sampler):
  """A file that says as little as it may, and one that says all, are what the class makes of it."""
  needed = {name: NEEDED[name] for name in diffusion.REQUIRED.get(sampler, ())}
  theirs = scheduler_of(sampler, needed)
  name = diffusion.SAMPLER_CLASSES[sampler]
  for raw in ({"_class_name": name, **needed}, written_by(theirs)):
    config = diffusion.read_config(raw)
    assert config.sampler == sampler
    check_levels(sample.make_plan(config, 20), theirs, 20)
    assert worst_difference_of_defaults(config, theirs) < TOLERANCE


def worst_difference_of_defaults(config, theirs):
  if config.sampler == "euler_ancestral":
    return 0.0  # see below, where the noise is shared
  arguments, abar = inputs(), diffusion.alphas_cumprod(config)
  ours = sample_ours(config, 20, None, arguments)
  return np.abs(ours - sample_diffusers(theirs, 20, abar, arguments)).max()


# As published: stable-diffusion-v1-5, stable-diffusion-2-1, stable-diffusion-xl-base-1.0,
# sdxl-turbo, instruct-pix2pix and PixArt's (DPM-Solver++, every field written).
COMMON = BETAS | dict(clip_sample=False, set_alpha_to_one=False, trained_betas=None)
XL = COMMON | dict(interpolation_type="linear", sample_max_value=1.0, prediction_type="epsilon")
PUBLISHED = {
  "sd15": COMMON
  | dict(_class_name="PNDMScheduler", _diffusers_version="0.6.0", steps_offset=1)
  | dict(num_train_timesteps=1000, skip_prk_steps=True),
  "sd21": COMMON
  | dict(_class_name="DDIMScheduler", prediction_type="v_prediction", steps_offset=1)
  | dict(skip_prk_steps=True),
  "sdxl": XL
  | dict(_class_name="EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1)
  | dict(use_karras_sigmas=False, skip_prk_steps=True, final_sigmas_type="zero")
  | dict(sigma_max=None, sigma_min=None, timestep_type="discrete", rescale_betas_zero_snr=False),
  "sdxl-turbo": XL
  | dict(_class_name="EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
  | dict(steps_offset=1, skip_prk_steps=True),
  "instruct-pix2pix": COMMON
  | dict(_class_name="EulerAncestralDiscreteScheduler", steps_offset=1, skip_prk_steps=True),
  "pixart": dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver++")
  | dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2)
  | dict(dynamic_thresholding_ratio=0.995, euler_at_final=False, lower_order_final=True)
  | dict(lambda_min_clipped=-float("inf"), solver_type="midpoint", timestep_spacing="linspace")
  | dict(thresholding=False, use_karras_sigmas=False, use_lu_lambdas=False, variance_type=None)
  | dict(steps_offset=0, sample_max_value=1.0, clip_sample=False, skip_prk_steps=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_drawn_as_by_diffusers(name, sampler, same_noise):
  """By their own sampler, and by any other: `from_config` over the same forward process."""
  raw = PUBLISHED[name]
  config = diffusion.read_config(raw)
  theirs = scheduler_of(sampler, raw)
  if type(theirs).__name__ == raw["_class_name"]:
    assert sample.make_plan(config, 20).sampler == sampler
  check_levels(sample.make_plan(config, 20, sampler), theirs, 20)
  assert worst_difference(sampler, raw, 20, same_noise, read=config) < TOLERANCE


def test_a_sampler_takes_its_own_defaults_where_the_file_is_silent():
  """As `from_config` of a file that was read; DDIM's constructor would write out "leading"."""
  silent = schedule(sampler="pndm")
  assert sample.make_plan(silent, 3).levels.timesteps.tolist() == [666, 333, 333, 0]
  assert sample.make_plan(silent, 3, "ddim").levels.timesteps.tolist() == [666, 333, 0]
  assert sample.make_plan(silent, 3, "euler").levels.timesteps.tolist() == [999, 499.5, 0]
  spoken = schedule(sampler="pndm", timestep_spacing="leading")
  assert sample.make_plan(spoken, 3, "euler").levels.timesteps.tolist() == [666, 333, 0]


# --- trajectories ---

VARIANTS = {  # of each sampler, beside prediction type and spacing
  "ddim": dict(
    rescale_betas_zero_snr=[False, True], set_alpha_to_one=[False, True], steps_offset=[0, 1]
  ),
  "pndm": dict(set_alpha_to_one=[False, True], steps_offset=[0, 1]),
  "euler": dict(
    rescale_betas_zero_snr=[False, True],
    steps_offset=[0, 1],
    final_sigmas_type=["zero", "sigma_min"],
  ),
  "euler_ancestral": dict(rescale_betas_zero_snr=[False, True], steps_offset=[0, 1]),
  "dpmpp_2m": dict(
    rescale_betas_zero_snr=[False, True],
    steps_offset=[0, 1],
    final_sigmas_type=["zero", "sigma_min"],
  ),
}
NOT_IN_DIFFUSERS = [("pndm", "sample"), ("euler_ancestral", "sample")]


def variants(sampler):
  names, values = zip(*VARIANTS[sampler].items(), strict=True)
  for combination in itertools.product(*values):
    yield dict(zip(names, combination, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("timestep_spacing", diffusion.TIMESTEP_SPACINGS)
@pytest.mark.parametrize(
  "sampler, prediction_type",
  [
    pair
    for pair in itertools.product(sample.SAMPLERS, diffusion.PREDICTION_TYPES)
    if pair not in NOT_IN_DIFFUSERS
  ],
)
def test_guided_trajectory_is_that_of_diffusers(
  sampler, prediction_type, timestep_spacing, same_noise
):
  for variant in variants(sampler):
    raw = NEEDED | variant
    raw |= dict(prediction_type=prediction_type, timestep_spacing=timestep_spacing)
    all_noise = variant.get("rescale_betas_zero_snr") and timestep_spacing != "leading"
    if sampler == "ddim" and prediction_type == "epsilon" and all_noise:
      continue  # divides by zero in diffusers; refused, see below
    assert worst_difference(sampler, raw, 20, same_noise) < TOLERANCE, raw


@pytest.mark.parametrize(
  "sampler, steps",
  [*(("pndm", n) for n in (1, 2, 3, 5)), *(("dpmpp_2m", n) for n in (1, 2, 14, 15))],
)
@pytest.mark.slow
def test_short_trajectories_start_and_end_as_in_diffusers(sampler, steps, same_noise):
  """Where a multistep method has too few steps behind it, or falls back at its end."""
  for final, lower, euler in itertools.product(["zero", "sigma_min"], [True, False], [True, False]):
    raw = NEEDED | dict(final_sigmas_type=final, lower_order_final=lower, euler_at_final=euler)
    raw |= dict(timestep_spacing="leading")
    assert worst_difference(sampler, raw, steps, same_noise) < TOLERANCE, raw
    if sampler == "pndm":
      break


def test_unguided_trajectory_is_that_of_diffusers():
  config, arguments = schedule(), inputs(1)
  table = diffusion.alphas_cumprod(config)

  def unet(params, x, timesteps, conditions):
    level = jnp.asarray(table)[timesteps][:, None, None, None]
    times = timesteps[:, None, None, None].astype(jnp.float32)
    x0 = nonlinear(jnp.tanh, params, x, times, conditions.prompt_embeds)
    return as_prediction(x0, x, jnp.sqrt(level), jnp.sqrt(1 - level), "epsilon")

  params, noise, prompt, negative = map(jnp.asarray, arguments)
  ours = sample.sample_latents(
    denoiser_of(unet, "epsilon"),
    params,
    noise,
    embeds(prompt),
    embeds(negative),
    plan=sample.make_plan(config, 7),
    guidance_scale=1.0,
  )
  theirs = sample_diffusers(scheduler_of("ddim", NEEDED), 7, table, arguments, 1.0)
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.slow
def test_networks_that_say_the_same_in_other_words_draw_the_same(sampler):
  """Also where diffusers does not take a type: euler_ancestral and "sample"."""
  drawn = [
    sample_ours(schedule(prediction_type=kind), 20, sampler, inputs())
    for kind in diffusion.PREDICTION_TYPES
  ]
  np.testing.assert_allclose(drawn[1], drawn[0], atol=TOLERANCE)
  np.testing.assert_allclose(drawn[2], drawn[0], atol=TOLERANCE)


# --- fresh noise ---


@pytest.mark.slow
def test_fresh_noise_belongs_to_the_image_and_the_key():
  """A smaller batch, another order with its keys, and one start with other keys."""

  def unet(params, x, timesteps, conditions):
    del timesteps, conditions
    return params * x

  plan = sample.make_plan(schedule(), 5, "euler_ancestral")
  noise = jnp.asarray(inputs()[1])
  conditions = embeds(jnp.zeros((3, 1, 1)))

  @jax.jit
  def draw(noise, key):
    here = jax.tree.map(lambda leaf: leaf[: len(noise)], conditions)
    return sample.sample_latents(
      denoiser_of(unet, "epsilon"),
      jnp.float32(0.9),
      noise,
      here,
      here,
      plan=plan,
      guidance_scale=1.0,
      key=key,
    )

  key = jax.random.key(3)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
  drawn = np.asarray(draw(noise, keys))
  np.testing.assert_array_equal(draw(noise[:2], key), drawn[:2])
  np.testing.assert_array_equal(draw(noise[::-1], keys[::-1]), drawn[::-1])
  others = np.asarray(draw(jnp.broadcast_to(noise[:1], noise.shape), keys))
  np.testing.assert_array_equal(others[0], drawn[0])
  assert (others[0] != others[1]).mean() > 0.9  # of one start, by another key
  with pytest.raises(ValueError, match="key: expected a jax.random.key for euler_ancestral"):
    draw(noise, None)


# --- refusals ---


@pytest.mark.parametrize(
  "steps, sampler, changes, text",
  [
    (0, "ddim", {}, "sampling steps: expected 1 to 1000, got 0"),
    (1001, "euler", {}, "sampling steps: expected 1 to 1000, got 1001"),
    (1000, "dpmpp_2m", {}, "sampling steps: expected 1 to 999 for dpmpp_2m, got 1000"),
    (
      1000,
      "ddim",
      dict(steps_offset=1),
      "sampling steps: 1000 with steps_offset=1 start at timestep 1000, but the last of the "
      "schedule is 999; expected fewer steps",
    ),
    (20, "heun", {}, "sampler: expected one of ('ddim', 'pndm', 'euler', 'euler_ancestral', 'dpm"),
    (
      20,
      "ddim",
      dict(clip_sample=None),
      "scheduler_config.json: clip_sample is absent, that is True, which is not implemented for "
      "DDIMScheduler; expected false",
    ),
    (
      20,
      "pndm",
      dict(skip_prk_steps=False),
      "scheduler_config.json: skip_prk_steps is False, which is not implemented for "
      "PNDMScheduler; expected true",
    ),
    (
      20,
      "pndm",
      dict(prediction_type="sample"),
      "scheduler_config.json: prediction_type is 'sample', which PNDMScheduler does not take",
    ),
    (
      20,
      "pndm",
      dict(rescale_betas_zero_snr=True),
      "scheduler_config.json: rescale_betas_zero_snr is True, which PNDMScheduler does not take",
    ),
    (
      20,
      "ddim",
      dict(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
      "scheduler_config.json: with rescale_betas_zero_snr timestep 999 is all noise, where "
      "prediction_type 'epsilon' says nothing of x_0; expected 'v_prediction' or 'sample', or",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(steps, sampler, changes, text):
  with pytest.raises(ValueError) as caught:
    sample.make_plan(schedule(**changes), steps, sampler)
  assert str(caught.value).startswith(text)


# --- densities ---


@functools.cache
def compiled_gaussian(sampler, prediction_type, steps):
  """(run, plan): the exact denoiser of N(mean, deviation^2 I) on the DDPM paper's schedule."""
  config = diffusion.ScheduleConfig(
    prediction_type=prediction_type, clip_sample=False, skip_prk_steps=True
  )  # abar_T = 4e-5
  table = jnp.asarray(diffusion.alphas_cumprod(config))

  def unet(params, x, timesteps, conditions):
    mean, deviation = params
    times = timesteps.astype(jnp.float32)
    level = jnp.exp(jnp.interp(times, jnp.arange(1000.0), jnp.log(table)))[:, None, None, None]
    signal, sigma = jnp.sqrt(level), jnp.sqrt(1 - level)
    x0 = mean + signal * deviation**2 * (x - signal * mean) / (level * deviation**2 + 1 - level)
    return as_prediction(x0, x, signal, sigma, prediction_type)

  plan = sample.make_plan(config, steps, sampler)
  run = functools.partial(
    sample.sample_latents,
    denoiser_of(unet, prediction_type),
    plan=plan,
    guidance_scale=1.0,
    key=jax.random.key(0),
  )
  return jax.jit(run), plan


def run_gaussian(noise, steps, mean, deviation, sampler, prediction_type="epsilon"):
  run, plan = compiled_gaussian(sampler, prediction_type, steps)
  nothing = embeds(jnp.zeros((len(noise), 1, 1)))
  return np.asarray(run((mean, deviation), jnp.asarray(noise), nothing, nothing)), plan


@pytest.mark.parametrize(
  "sampler, prediction_type, gain",
  [
    *(("ddim", prediction_type, 4) for prediction_type in diffusion.PREDICTION_TYPES),
    ("euler", "epsilon", 4),
    ("dpmpp_2m", "epsilon", 16),
    ("pndm", "epsilon", 16),
  ],
)
@pytest.mark.slow
def test_steps_converge_to_the_exact_flow(sampler, prediction_type, gain):
  """The probability flow of a Gaussian is affine: z = (x_T - signal mean) / std_T stays put, so
  that x_0 = mean + deviation z. Eight times the steps divide the error by 8 in a first-order
  method, by 64 in a second-order one."""
  mean, deviation = 1.5, 0.4
  ends = np.array([0.0, 1.0], np.float32)[:, None, None, None]
  errors = []
  for steps in (10, 80):
    result, plan = run_gaussian(ends, steps, mean, deviation, sampler, prediction_type)
    signal, sigma = plan.levels.signals[0], plan.levels.sigmas[0]
    z = (plan.init_scale * ends - signal * mean) / np.hypot(signal * deviation, sigma)
    errors.append(np.abs(result - (mean + deviation * z)).max())
  assert errors[0] > gain * errors[1]
  assert errors[1] < 0.03


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.slow
def test_samples_have_the_mean_and_deviation_of_the_data(sampler):
  noise = np.random.default_rng(3).standard_normal((4096, 2, 2, 1), np.float32)
  for mean, deviation in ((1.5, 0.4), (0.0, 2.0)):
    result, _ = run_gaussian(noise, 200, mean, deviation, sampler)
    # Four standard errors of 16384 draws, abar_T = 4e-5 (0.6 % of the mean), 1 % of the steps.
    assert abs(result.mean() - mean) < deviation * 4 / 128 + 0.006 * abs(mean) + 0.01 * deviation
    # Fresh noise at every step adds its own error, of first order in the steps: 4 % at 200.
    bias = 0.05 if sampler == "euler_ancestral" else 0.015
    assert abs(result.std() / deviation - 1) < 4 / (2 * 16384) ** 0.5 + bias


def test_the_networks_see_every_timestep_once_and_the_parameters():
  plan = sample.make_plan(schedule(steps_offset=1), 4)
  assert plan.levels.timesteps.tolist() == [751, 501, 251, 1]

  def unet(params, x, timesteps, conditions):
    # x counts 1 for each call and sums the timesteps in the second channel.
    del conditions
    assert timesteps.dtype == jnp.int32
    seen = x[..., 1:] + timesteps[:, None, None, None] * params["weight"]
    return jnp.concatenate([x[..., :1] + 1, seen], axis=-1)

  # Where every step goes to x_0 itself, the prediction of x_0 is the next state.
  levels = plan.levels._replace(next_signals=np.ones(4), next_sigmas=np.zeros(4))
  result = sample.sample_latents(
    denoiser_of(unet, "sample"),
    {"weight": jnp.float32(2.0)},
    jnp.zeros((2, 1, 1, 2)),
    embeds(jnp.zeros((2, 1, 1))),
    embeds(jnp.zeros((2, 1, 1))),
    plan=plan._replace(
      levels=jax.tree.map(np.float32, levels)._replace(timesteps=levels.timesteps)
    ),
    guidance_scale=1.0,
  )
  np.testing.assert_allclose(result[:, 0, 0], [[4.0, 2.0 * (751 + 501 + 251 + 1)]] * 2)
