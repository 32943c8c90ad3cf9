"""inversion.py against diffusers' stepping, closed forms and Diffusion-DPO; InPO's step."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch
import torch_models

from dmpo_jax import base as base_lib
from dmpo_jax import (
  diffusion,
  inversion,
  losses,
  objectives,
  program,
  sample,
  sharding,
  stages,
  tasks,
  train_step,
  types,
  weights,
)
from dmpo_jax.data import pipeline
from dmpo_jax.models import unet

# diffusers calls numpy.array on torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

SD15 = dict(
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  clip_sample=False,
  set_alpha_to_one=False,
  steps_offset=1,
)
SCHEDULE = diffusion.ScheduleConfig(**SD15)
ABAR = diffusion.alphas_cumprod(SCHEDULE)
SHAPE = (2, 3, 4)
# float32, over the root mean square: betas are float32 in diffusers, and a UNet agrees to 1e-4.
TOLERANCE = 1e-4


def normal(seed, *shape):
  return jnp.asarray(draw(seed, *shape))


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def denoiser_of(apply, prediction_type="epsilon"):
  return objectives.Denoiser(apply, None, jnp.asarray(ABAR), prediction_type, 1.0, jnp.float32)


def nothing(rows):
  """Conditions that the network does not read."""
  return types.Conditions(jnp.zeros((rows, 1, 1)))


def assert_close(got, expected, tolerance=TOLERANCE):
  expected = np.asarray(expected)
  assert np.abs(np.asarray(got) - expected).max() <= tolerance * np.sqrt(np.square(expected).mean())


# --- the levels ---


def test_every_latent_ends_exactly_on_its_own_timestep():
  timesteps = jnp.array([0, 1, 9, 499, 998, 999])
  levels = inversion.exact_levels(timesteps, ABAR, steps=10)
  np.testing.assert_array_equal(levels.next_abar[-1], ABAR[timesteps])
  np.testing.assert_array_equal(levels.abar[0], np.ones(6, np.float32))
  np.testing.assert_array_equal(levels.abar[1:], levels.next_abar[:-1])
  # t + 1 noisings in 10 steps: timestep 0 is one step, and a step up always makes it noisier.
  assert levels.moves.sum(axis=0).tolist() == [1, 2, 10, 10, 10, 10]
  np.testing.assert_array_equal(levels.moves, levels.next_abar < levels.abar)
  assert levels.timesteps[:, 5].tolist() == [0, 99, 199, 299, 399, 499, 599, 699, 799, 899]


def test_published_levels_stop_on_the_grid_and_not_on_the_timestep():
  """Grid -99, 1, ..., 801; a latent goes up from every grid time below t, to at most 901."""
  ends = {0: 1, 1: 1, 2: 101, 101: 101, 102: 201, 801: 801, 802: 901, 901: 901, 999: 901}
  timesteps = jnp.array(list(ends))
  levels = inversion.published_levels(
    timesteps, ABAR, steps=10, steps_offset=1, first_abar=float(ABAR[0])
  )
  assert levels.timesteps[:, 0].tolist() == [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801]
  last = levels.moves.sum(axis=0) - 1
  reached = levels.next_abar[last, np.arange(len(last))]
  np.testing.assert_array_equal(reached, ABAR[list(ends.values())])


# --- against diffusers ---


def trailing(steps):
  scheduler = diffusers.DDIMInverseScheduler(
    **SD15 | {"set_alpha_to_one": True, "steps_offset": 0}, timestep_spacing="trailing"
  )
  scheduler.set_timesteps(steps)
  return scheduler


@pytest.mark.slow
def test_inversion_of_a_unet_equals_diffusers():
  """The small SD 1.5 in PyTorch, stepped by DDIMInverseScheduler, and ours on its weights.

  Two latents with timesteps of their own in one batch: 999 by 4 steps, and 499, which is half way
  of 8 steps. The network is told where a step starts.
  """
  config = torch_models.UNET_SD15_SMALL
  judge = torch_models.unet(config)
  model = unet.UNet2DConditionModel(unet.read_config(config))
  state = torch_models.state_dict(judge)
  latents, embeds = draw(0, 2, 8, 8, 4), draw(1, 2, 5, 24)
  inputs = (latents[:1], np.zeros(1, np.int32), embeds[:1])
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  params = weights.from_diffusers(state, shapes)

  expected = []
  for row, (steps, taken) in enumerate(((4, 4), (8, 4))):
    scheduler, told = trailing(steps), 0
    x = torch_models.channels_first(latents[row : row + 1])
    for t in scheduler.timesteps[:taken]:
      with torch.no_grad():
        noise = judge(x, told, torch.from_numpy(embeds[row : row + 1])).sample
      x, told = scheduler.step(noise, t, x).prev_sample, t
    expected.append(torch_models.channels_last(x)[0])

  def apply(params, x, timesteps, conditions):
    return model.apply({"params": params}, x, timesteps, conditions.prompt_embeds)

  @jax.jit
  def run(params, latents, embeds):
    levels = inversion.exact_levels(jnp.array([999, 499]), ABAR, steps=4)
    conditions = types.Conditions(embeds)
    return inversion.invert(denoiser_of(apply), params, latents, conditions, levels)

  assert_close(run(params, latents, embeds), np.stack(expected))
  assert np.abs(expected[0] - latents[0]).max() > 0.5


def nonlinear(tanh, cos, x, timesteps):
  """A network of (x, t) for numpy and jax."""
  return tanh(x + 0.3) + 0.2 * cos(0.01 * timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_exact_inversion_equals_diffusers_on_any_prediction(prediction_type):
  scheduler, x, told = trailing(10), draw(2, 1, *SHAPE), 0
  latents = jnp.asarray(x)
  scheduler.register_to_config(prediction_type=prediction_type)
  for t in scheduler.timesteps:
    noise = nonlinear(np.tanh, np.cos, x, np.float64(told))
    x = scheduler.step(torch.from_numpy(noise), t, torch.from_numpy(x)).prev_sample.numpy()
    told = int(t)

  def apply(params, x, timesteps, conditions):
    return nonlinear(jnp.tanh, jnp.cos, x, timesteps.reshape(-1, 1, 1, 1))

  levels = inversion.exact_levels(jnp.array([999]), ABAR, steps=10)
  got = inversion.invert(
    denoiser_of(apply, prediction_type), None, latents, nothing(len(latents)), levels
  )
  assert_close(got, x)


@pytest.mark.slow
def test_published_inversion_is_that_of_the_published_code():
  """Its loop in diffusers' schedulers, pair by pair, on the noise that ours draws.

  diffusers 0.42 is told where a step goes, 0.20, which that code was written for, where it starts.
  """
  timesteps, steps = [0, 2, 350, 801, 950], 10
  latents, keys = normal(3, 5, *SHAPE), jax.random.key_data(jax.random.split(jax.random.key(1), 5))
  inverse, forward = diffusers.DDIMInverseScheduler(**SD15), diffusers.DDIMScheduler(**SD15)
  inverse.set_timesteps(steps)
  stride = 1000 // steps
  expected = []
  for latent, key, timestep in zip(np.array(latents), keys, timesteps, strict=True):
    x = torch.from_numpy(latent)
    for number, above in enumerate(inverse.timesteps.tolist()):
      t = above - stride
      if t >= timestep:
        break
      noise = nonlinear(np.tanh, np.cos, x.numpy(), np.float64(t))
      x = inverse.step(torch.from_numpy(noise), above, x).prev_sample
      fresh = jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(key), number), SHAPE)
      x = x + 0.1 * forward._get_variance(above, t) ** 0.5 * torch.from_numpy(np.array(fresh))
    abar = forward.alphas_cumprod[timestep]
    expected.append(((x - abar**0.5 * torch.from_numpy(latent)) / (1 - abar) ** 0.5).numpy())

  def apply(params, x, told, conditions):
    return nonlinear(jnp.tanh, jnp.cos, x, told.reshape(-1, 1, 1, 1))

  run = inversion.make_inversion(denoiser_of(apply), SCHEDULE, kind="published", steps=steps)
  got = run(None, latents, jnp.array(timesteps), nothing(5), keys)
  for ours, theirs in zip(got, expected, strict=True):
    assert_close(ours, theirs)


# --- closed forms ---

MEAN, DEVIATION = 0.7, 0.5


def gaussian(prediction_type):
  """The exact network for latents ~ N(MEAN, DEVIATION^2), told a timestep; 0 is the clean latent
  too, where it is off by the noise of timestep 0."""

  def apply(params, x, timesteps, conditions):
    timesteps = jnp.broadcast_to(timesteps, x.shape[:1])
    signal, sigma = (
      jnp.sqrt(each).reshape(-1, 1, 1, 1)
      for each in (jnp.asarray(ABAR)[timesteps], 1 - jnp.asarray(ABAR)[timesteps])
    )
    eps = sigma * (x - signal * MEAN) / (signal**2 * DEVIATION**2 + sigma**2)
    if prediction_type == "epsilon":
      return eps
    return (eps - sigma * x) / signal  # v = signal eps - sigma x_0, x_0 = (x - sigma eps) / signal

  return denoiser_of(apply, prediction_type)


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_converges_to_the_flow_of_an_exact_network(prediction_type):
  """x_t is on the same quantile as x_0: (x_t - signal MEAN) / sd_t = (x_0 - MEAN) / DEVIATION."""
  timesteps = jnp.array([299, 799])
  latents = MEAN + DEVIATION * normal(4, 2, *SHAPE)
  abar = ABAR[timesteps].reshape(-1, 1, 1, 1).astype(np.float64)
  deviation = np.sqrt(abar * DEVIATION**2 + 1 - abar)
  exact = np.sqrt(abar) * MEAN + deviation * (latents - MEAN) / DEVIATION
  errors = []
  for steps in (25, 50, 100, 200):
    levels = inversion.exact_levels(timesteps, ABAR, steps=steps)
    got = inversion.invert(gaussian(prediction_type), None, latents, nothing(len(latents)), levels)
    errors.append(np.abs(got - exact).max())
  ratios = np.divide(errors[:-1], errors[1:])
  assert errors[-1] < 0.04 and (ratios > 1.6).all() and (ratios < 2.6).all(), errors


def test_sampling_back_gives_the_clean_latent():
  """Up to pure noise, and down again with DDIM on the same levels; both are of first order."""
  latents = MEAN + DEVIATION * normal(5, 2, *SHAPE)
  schedule = diffusion.ScheduleConfig(
    **SD15 | {"set_alpha_to_one": True, "steps_offset": 0}, timestep_spacing="trailing"
  )
  denoiser, errors = gaussian("epsilon"), []
  for steps in (50, 100, 200):
    levels = inversion.exact_levels(jnp.array([999, 999]), ABAR, steps=steps)
    up = inversion.invert(denoiser, None, latents, nothing(len(latents)), levels)
    plan = sample.make_plan(schedule, steps, "ddim")
    back = sample.sample_latents(
      denoiser, None, up, nothing(2), nothing(2), plan=plan, guidance_scale=1.0
    )
    errors.append(np.abs(back - latents).max())
  assert errors[-1] < 0.05 and errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2], errors


# --- the identity with Diffusion-DPO ---


def test_the_noise_that_a_noised_latent_implies_is_the_noise_it_was_given():
  timesteps = jnp.arange(0, 1000, 37)
  latents, noise = normal(6, 2, len(timesteps), *SHAPE)
  noisy = diffusion.add_noise(latents, noise, timesteps, ABAR)
  got = inversion.implied_noise(noisy, latents, timesteps, ABAR)
  # A unit of rounding of x_t, divided by its sigma.
  unit = np.spacing(np.abs(noisy).max(axis=(1, 2, 3)))
  bound = 2 * unit / np.sqrt(1 - ABAR[timesteps])
  assert (np.abs(got - noise).max(axis=(1, 2, 3)) <= bound).all()


def linear(params, x, timesteps, conditions):
  """A network whose one kernel is large enough to be split over fsdp."""
  flat = x.reshape(len(x), -1) @ params["kernel"] + 0.001 * timesteps[:, None]
  prompts = conditions.prompt_embeds.mean(axis=(1, 2))  # one for a pair
  return flat.reshape(x.shape) + prompts.repeat(len(x) // len(prompts)).reshape(-1, 1, 1, 1)


PAIRS, SIDE = 8, 8  # 8 x 8 x 4 latents: the kernel has 256^2 = sharding.MIN_SHARDED_SIZE elements


def linear_problem(invert, seed=7):
  denoiser = denoiser_of(linear)
  loss_fn = functools.partial(losses.dpo_loss, beta=20.0, label_smoothing=0.0)
  objective = objectives.preference_objective(denoiser, loss_fn, peak_weight=1.0, invert=invert)
  kernel = draw(seed, 256, 256) / 32
  moments = draw(seed + 1, 2, PAIRS, SIDE, SIDE, 8)
  batch = types.PreferenceBatch(
    *moments, np.zeros((PAIRS, 3), np.int32), prompt_embeds=draw(seed + 2, PAIRS, 3, 5)
  )
  policy = {"kernel": kernel + draw(seed + 3, 256, 256) / 320}
  return policy, objectives.Frozen({"kernel": kernel}, None), objective, batch


@pytest.mark.slow
def test_on_ordinary_noised_latents_the_loss_is_that_of_diffusion_dpo():
  noise = normal(8, PAIRS, SIDE, SIDE, 4)

  def ordinary(params, latents, timesteps, conditions, keys):
    noisy = diffusion.add_noise(latents, noise.repeat(2, axis=0), timesteps, ABAR)
    return inversion.implied_noise(noisy, latents, timesteps, ABAR)

  policy, frozen, inpo, batch = linear_problem(ordinary)
  _, _, dpo, _ = linear_problem(None)
  examples = inpo.draw(batch, jax.random.key(0))
  noising = examples.noising._replace(noise=jnp.asarray(noise))
  got, parts = inpo.loss(policy, frozen, examples)
  expected, others = dpo.loss(policy, frozen, examples._replace(noising=noising))
  assert np.abs(others["margin"]).max() > 0.1
  np.testing.assert_allclose(parts["margin"], others["margin"], atol=2e-5)
  np.testing.assert_allclose(got, expected, atol=1e-5)


# --- the step ---


def exact(steps=3):
  return inversion.make_inversion(denoiser_of(linear), SCHEDULE, kind="exact", steps=steps)


def test_no_gradient_flows_through_the_inversion():
  """The gradient is that of the loss with the noise that was found given as a constant."""
  policy, frozen, inpo, batch = linear_problem(exact())
  _, _, dpo, _ = linear_problem(None)
  examples = inpo.draw(batch, jax.random.key(0))
  conditions = objectives.conditions_of(denoiser_of(linear), frozen, examples)
  found = objectives.inverted(denoiser_of(linear), exact(), policy, examples, conditions)
  noise = np.asarray(found.noising.noise)
  assert noise.shape == (PAIRS, 2, SIDE, SIDE, 4)
  assert np.abs(noise[:, 0] - noise[:, 1]).max() > 0.1  # winner and loser apart

  def mean(params, objective, examples):
    return objective.loss(params, frozen, examples)[0].mean()

  got = jax.grad(mean)(policy, inpo, examples)["kernel"]
  expected = jax.grad(mean)(policy, dpo, found)["kernel"]
  assert np.abs(expected).max() > 1e-4
  assert_close(got, expected, 1e-5)


def test_the_policy_inverts_and_not_the_reference():
  policy, frozen, inpo, batch = linear_problem(exact())
  examples = inpo.draw(batch, jax.random.key(0))
  other = objectives.Frozen({"kernel": frozen.reference["kernel"] + 0.01}, None)
  one, two = (inpo.loss(policy, each, examples)[1]["denoising_loss"] for each in (frozen, other))
  np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, accumulation", [(2, 2, 1), (1, 4, 2)])
def test_every_mesh_and_accumulation_gives_the_update_of_one_device(data, fsdp, accumulation):
  policy, frozen, objective, batch = linear_problem(exact())

  def run(mesh, accumulation):
    chain = optax.sgd(1.0)
    built = program.make_program(policy, frozen, objective, chain, mesh, accumulation)
    assert ("fsdp" in built.state.params["kernel"].spec) == (mesh.shape["fsdp"] > 1)
    state = program.initial_state(built, policy, chain)
    key = jax.device_put(jax.random.key(0), built.everywhere)
    with jax.set_mesh(mesh):
      state, metrics = built.step(
        state, sharding.put_tree(frozen, built.frozen), sharding.put_batch(batch, mesh), key
      )
    return float(metrics["margin"]), np.asarray(state.params["kernel"]) - policy["kernel"]

  margin, change = run(sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp]), accumulation)
  expected, gradient = run(sharding.make_mesh(devices=jax.devices()[:1]), 1)
  assert margin == pytest.approx(expected, rel=1e-4)
  np.testing.assert_allclose(change, gradient, atol=2e-5 * np.abs(gradient).max())


def tiny_task(tiny_base, tiny_data, **more):
  settings = {
    "objective.method": "inpo",
    "objective.alpha": None,
    "objective.labels": None,
    "objective.sft_weight": None,
    "objective.inversion": "exact",
    "objective.inversion_steps": 2,
  }
  config = tiny.config(tiny_base, **settings | more)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  encoded = stages.open_data(config, base, tiny_data)
  task = tasks.preference_task(config, base, encoded)
  return task, pipeline.load_split(encoded.splits["train"], 4)


@pytest.mark.slow
def test_a_step_from_the_reference_has_margins_of_exactly_zero(tiny_base, tiny_data):
  task, batch = tiny_task(tiny_base, tiny_data)
  state = train_step.init_state(task.params, optax.sgd(1.0))
  step = functools.partial(
    train_step.train_step, objective=task.objective, optimizer=optax.sgd(1.0)
  )
  _, metrics = jax.jit(step)(state, task.frozen, batch, jax.random.key(0))
  assert float(metrics["margin_abs_max"]) == 0.0
  assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
  assert float(metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_a_low_rank_policy_inverts_with_its_delta(tiny_base, tiny_data):
  """Margins are exactly zero at the start, in bfloat16 too; another delta finds other noise."""
  more = {
    "lora.rank": 2,
    "lora.alpha": 2.0,
    "lora.targets": "to_q",
    "precision.compute": "bfloat16",
  }
  task, batch = tiny_task(tiny_base, tiny_data, **more)
  examples = jax.jit(task.objective.draw)(batch, jax.random.key(0))
  loss = jax.jit(task.objective.loss)
  _, start = loss(task.params, task.frozen, examples)
  assert np.abs(start["margin"]).max() == 0.0
  moved = jax.tree.map(lambda x: x + 0.5, task.params)
  _, other = loss(moved, task.frozen, examples)
  reference = (each["winner_advantage"] + each["loser_advantage"] for each in (start, other))
  assert np.abs(next(reference)).max() == 0.0 and np.abs(next(reference)).max() > 0.0


# --- refusals ---


@pytest.mark.parametrize(
  "kind, steps, prediction_type, text",
  [
    ("fast", 10, "epsilon", "objective.inversion: expected one of exact, published, got 'fast'"),
    ("exact", 1001, "epsilon", "objective.inversion_steps: expected 1 to 1000, got 1001"),
    ("exact", 10, "sample", "predicts epsilon or v_prediction, got 'sample'"),
    ("published", 10, "v_prediction", "'published' needs a base that predicts epsilon, got"),
  ],
)
def test_what_cannot_be_inverted_is_refused(kind, steps, prediction_type, text):
  schedule = diffusion.ScheduleConfig(**SD15, prediction_type=prediction_type)
  with pytest.raises(ValueError, match=text):
    inversion.make_inversion(denoiser_of(linear), schedule, kind=kind, steps=steps)
