"""diffusion.py against diffusers' schedulers and float64 formulas."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from dmpo_jax import diffusion, sample

# diffusers calls numpy.array on torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

SCHEDULES = {
  "sd15": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
  "ddpm": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
  "cosine": dict(beta_schedule="squaredcos_cap_v2"),
  "short": dict(beta_schedule="linear", num_train_timesteps=37),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
SHAPE = (6, 3, 4, 2)


def config_of(name, **more):
  return diffusion.ScheduleConfig(**SCHEDULES[name], **more)


def alphas_oracle(name):
  """prod (1 - beta) in float64, one factor after the other."""
  s = {"beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000, **SCHEDULES[name]}
  total, found, product = s["num_train_timesteps"], [], 1.0
  for t in range(total):
    share = t / (total - 1)
    if s["beta_schedule"] == "linear":
      beta = s["beta_start"] + share * (s["beta_end"] - s["beta_start"])
    elif s["beta_schedule"] == "scaled_linear":
      low, high = s["beta_start"] ** 0.5, s["beta_end"] ** 0.5
      beta = (low + share * (high - low)) ** 2
    else:
      this, last = (np.cos((u / total + 0.008) / 1.008 * np.pi / 2) ** 2 for u in (t + 1, t))
      beta = min(1 - this / last, 0.999)
    product *= 1 - beta
    found.append(product)
  return np.array(found)


def example(seed=0, total=1000):
  """(latents, noise, timesteps) with both ends of the schedule among the timesteps."""
  generator = np.random.default_rng(seed)
  latents, noise = generator.standard_normal((2, *SHAPE), np.float32)
  timesteps = np.array([0, total - 1, *generator.integers(0, total, SHAPE[0] - 2)], np.int32)
  return latents, noise, timesteps


@every_schedule
def test_schedule_is_the_product_of_its_betas(name):
  abar = diffusion.alphas_cumprod(config_of(name))
  assert abar.dtype == np.float32
  # One rounding to float32; the float64 products differ by far less.
  np.testing.assert_allclose(abar, alphas_oracle(name), rtol=2.0**-24 * 1.01)
  assert (np.diff(abar) < 0).all() and 0 < abar[-1] < abar[0] < 1


@every_schedule
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_schedule_is_that_of_diffusers(name, scheduler):
  theirs = scheduler(**SCHEDULES[name]).alphas_cumprod.numpy()
  ours = diffusion.alphas_cumprod(config_of(name))
  # diffusers rounds every 1 - beta and every product to float32: up to 1000 factors, each within
  # 2 roundings of 2^-24, is 1.2e-4; near the capped end of the cosine 1 - beta = 0.001 itself was
  # rounded with an error of 2^-25 absolute, 3e-5 relative.
  np.testing.assert_allclose(ours, theirs, rtol=1.5e-4)


@pytest.mark.parametrize("name", ["sd15", "ddpm", "short"])
def test_zero_terminal_snr_is_that_of_diffusers_and_of_the_paper(name):
  """Lin et al., algorithm 1: sqrt(abar) from where it was down to 0, differences in proportion."""
  plain = alphas_oracle(name) ** 0.5
  abar = diffusion.alphas_cumprod(config_of(name, rescale_betas_zero_snr=True))
  theirs = DDIMScheduler(**SCHEDULES[name], rescale_betas_zero_snr=True).alphas_cumprod.numpy()
  assert abar.dtype == np.float32 and abar[-1] == theirs[-1] == 0
  # diffusers goes back to betas and forth again in float32, at abar down to 1e-7.
  np.testing.assert_allclose(abar, theirs, rtol=3e-4, atol=1e-7)
  root = np.sqrt(abar.astype(np.float64))
  share = (root[0] - root) / root[0]
  np.testing.assert_allclose(share, (plain[0] - plain) / (plain[0] - plain[-1]), atol=2e-7)


@every_schedule
def test_add_noise_is_that_of_diffusers_and_the_formula(name):
  config = config_of(name)
  abar = diffusion.alphas_cumprod(config)
  latents, noise, timesteps = example(total=config.num_train_timesteps)
  ours = jax.jit(diffusion.add_noise)(latents, noise, timesteps, jnp.asarray(abar))
  theirs = DDPMScheduler(**SCHEDULES[name]).add_noise(
    *map(torch.from_numpy, example(total=config.num_train_timesteps)[:2]),
    torch.from_numpy(timesteps).long(),
  )
  # 1.5e-4 relative in abar (above) is half of that in its root; |x| < 5.
  np.testing.assert_allclose(ours, theirs.numpy(), atol=4e-4)
  level = alphas_oracle(name)[timesteps][:, None, None, None]
  oracle = np.sqrt(level) * latents + np.sqrt(1 - level) * noise
  # 1 - abar_0 is 1e-4 with a rounding of 2^-24: 3e-4 relative, its root (0.01) 1.5e-6 absolute.
  np.testing.assert_allclose(ours, oracle, atol=1e-5)


@every_schedule
def test_velocity_is_that_of_diffusers_and_the_formula(name):
  config = config_of(name)
  abar = jnp.asarray(diffusion.alphas_cumprod(config))
  latents, noise, timesteps = example(1, config.num_train_timesteps)
  ours = diffusion.prediction_target(
    "v_prediction", jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(timesteps), abar
  )
  theirs = DDPMScheduler(**SCHEDULES[name]).get_velocity(
    torch.from_numpy(latents), torch.from_numpy(noise), torch.from_numpy(timesteps).long()
  )
  np.testing.assert_allclose(ours, theirs.numpy(), atol=4e-4)
  level = alphas_oracle(name)[timesteps][:, None, None, None]
  oracle = np.sqrt(level) * noise - np.sqrt(1 - level) * latents
  np.testing.assert_allclose(ours, oracle, atol=1e-5)


def test_other_targets_are_the_arguments_themselves():
  latents, noise, timesteps = map(jnp.asarray, example())
  abar = jnp.asarray(diffusion.alphas_cumprod(config_of("sd15")))
  for kind, expected in (("epsilon", noise), ("sample", latents)):
    target = diffusion.prediction_target(kind, latents, noise, timesteps, abar)
    np.testing.assert_array_equal(target, expected)


@every_prediction
@pytest.mark.parametrize("name", ["sd15", "ddpm"])
def test_a_perfect_prediction_splits_into_latents_and_noise(prediction_type, name):
  """What training asks for is what sampling understands."""
  abar = jnp.asarray(diffusion.alphas_cumprod(config_of(name)))
  latents, noise, _ = map(jnp.asarray, example(2))

  @jax.jit
  def recover(timestep):
    timesteps = jnp.full(SHAPE[:1], timestep)
    noisy = diffusion.add_noise(latents, noise, timesteps, abar)
    target = diffusion.prediction_target(prediction_type, latents, noise, timesteps, abar)
    signal, sigma = jnp.sqrt(abar[timestep]), jnp.sqrt(1 - abar[timestep])
    return sample.split_prediction(prediction_type, target, noisy, signal, sigma)

  for timestep in (0, 1, 500, 998, 999):
    x0, eps = recover(jnp.int32(timestep))
    # Of the three, x_0 from eps is divided by the signal and eps from x_0 by the noise level:
    # |x| < 5 with three roundings of 2^-24, over a level of at least 0.006.
    worst = 5 * 3 * 2.0**-24 / 0.006
    np.testing.assert_allclose(x0, latents, atol=worst)
    np.testing.assert_allclose(eps, noise, atol=worst)


# --- the draw ---


@pytest.mark.slow
def test_noising_is_a_function_of_the_key():
  shape = (8, 2, 2, 3)
  first = diffusion.sample_noising(jax.random.key(5), shape, 1000)
  again = jax.jit(diffusion.sample_noising, static_argnums=(1, 2))(jax.random.key(5), shape, 1000)
  other = diffusion.sample_noising(jax.random.key(6), shape, 1000)
  for this, same, different in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(this, same)
    assert (np.asarray(this) != np.asarray(different)).any()
  assert first.timesteps.shape == (8,) and first.timesteps.dtype == jnp.int32
  assert first.noise.shape == shape and first.noise.dtype == jnp.float32


@pytest.mark.parametrize("power", [1.0, 0.5, 4.0])
def test_timesteps_have_their_density_over_the_whole_range(power):
  """P(t <= k) = ((k + 1) / T)^power; chi-square, with rare timesteps pooled."""
  total, count = 100, 50_000
  timesteps, _ = diffusion.sample_noising(jax.random.key(11), (count, 1, 1, 1), total, power)
  counts = np.bincount(timesteps, minlength=total)
  assert timesteps.dtype == jnp.int32 and len(counts) == total
  expected = count * np.diff((np.arange(total + 1) / total) ** power)
  if power == 1.0:
    np.testing.assert_allclose(expected, count / total)
  rare = expected < 20
  bins = [np.append(each[~rare], each[rare].sum()) for each in (counts, expected)]
  observed, mean = (each[: len(each) - (not rare.any())] for each in bins)
  statistic = ((observed - mean) ** 2 / mean).sum()
  low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(mean) - 1)
  assert low < statistic < high


@pytest.mark.slow
def test_noise_is_standard_normal_and_independent():
  timesteps, noise = diffusion.sample_noising(jax.random.key(12), (256, 4, 4, 8), 1000)
  flat = np.asarray(noise, np.float64).reshape(256, -1)
  count = flat.size
  # Five standard errors of the first four moments of a standard normal.
  assert abs(flat.mean()) < 5 / count**0.5
  assert abs(flat.var() - 1) < 5 * (2 / count) ** 0.5
  assert abs((flat**3).mean()) < 5 * (15 / count) ** 0.5
  assert abs((flat**4).mean() - 3) < 5 * (96 / count) ** 0.5
  between = np.corrcoef(flat)[np.triu_indices(256, 1)]  # examples
  assert abs(between).max() < 6 / flat.shape[1] ** 0.5
  assert abs(np.corrcoef(flat[:, 0], timesteps)[0, 1]) < 5 / 256**0.5


# --- scheduler_config.json ---

every_class = pytest.mark.parametrize("name", diffusion.SAMPLER_OF)


def class_defaults(name):
  """What the class takes for every field, by its constructor."""
  return json.loads(getattr(diffusers, name)().to_json_string())


@every_class
def test_read_config_takes_what_diffusers_writes(name):
  raw = class_defaults(name) | {"clip_sample": False, "skip_prk_steps": True}
  read = diffusion.read_config(raw)
  assert read.sampler == diffusion.SAMPLER_OF[name]
  for field in dataclasses.fields(diffusion.ScheduleConfig):
    if field.name in raw:
      assert getattr(read, field.name) == raw[field.name], field.name


@pytest.mark.parametrize("sampler, name", diffusion.SAMPLER_CLASSES.items())
def test_absent_fields_are_those_of_the_class(sampler, name):
  """Of a file that names its class alone, as far as that is implemented."""
  needed = diffusion.REQUIRED.get(sampler, {})
  read = diffusion.read_config({"_class_name": name, **needed})
  filled, theirs = diffusion.for_sampler(read, sampler), class_defaults(name) | needed
  for field in dataclasses.fields(diffusion.ScheduleConfig):
    if field.name in theirs:
      assert getattr(filled, field.name) == theirs[field.name], field.name


def test_ddpm_is_read_and_drawn_by_ddim():
  read = diffusion.read_config({"_class_name": "DDPMScheduler", "clip_sample": False})
  ddim = diffusion.read_config({"_class_name": "DDIMScheduler", "clip_sample": False})
  assert read == ddim


def test_read_config_keeps_every_field_that_matters():
  raw = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 500,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
  }
  expected = diffusion.ScheduleConfig(
    num_train_timesteps=500,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    sampler="pndm",
  )
  assert diffusion.read_config(raw) == expected
  assert expected.timestep_spacing is expected.clip_sample is None


NOT_IMPLEMENTED = {
  "algorithm_type": ("sde-dpmsolver++", "dpmsolver++"),
  "interpolation_type": ("log_linear", "linear"),
  "lambda_min_clipped": (-5.1, float("-inf")),
  "solver_order": (3, 2),
  "solver_type": ("heun", "midpoint"),
  "thresholding": (True, False),
  "timestep_type": ("continuous", "discrete"),
  "trained_betas": ([0.1], None),
  "use_beta_sigmas": (True, False),
  "use_dynamic_shifting": (True, False),
  "use_exponential_sigmas": (True, False),
  "use_flow_sigmas": (True, False),
  "use_karras_sigmas": (True, False),
  "use_lu_lambdas": (True, False),
  "variance_type": ("learned_range", None),
}


def refusal(raw):
  with pytest.raises(ValueError) as caught:
    diffusion.read_config(raw)
  return str(caught.value)


def test_all_that_is_not_implemented_is_refused_by_name():
  assert NOT_IMPLEMENTED.keys() == diffusion.NEUTRAL.keys()
  for field, (value, expected) in NOT_IMPLEMENTED.items():
    raw = {"_class_name": "EulerDiscreteScheduler", field: value}
    assert refusal(raw) == (
      f"scheduler_config.json: {field} is {value!r}, which is not implemented; "
      f"expected {expected!r}"
    )
    assert diffusion.read_config(raw | {field: expected}).sampler == "euler"


@pytest.mark.parametrize(
  "field, value, text",
  [
    ("_class_name", "LCMScheduler", "_class_name is 'LCMScheduler'; expected one of ('DDIMSched"),
    ("_class_name", None, "_class_name is None; expected one of ('DDIMScheduler', 'PNDMSchedul"),
    ("beta_schedule", "sigmoid", "beta_schedule is 'sigmoid'; expected one of ('linear', 'scaled"),
    ("prediction_type", "flow", "prediction_type is 'flow'; expected one of ('epsilon', 'v_pred"),
    ("timestep_spacing", "ends", "timestep_spacing is 'ends'; expected one of ('leading', 'trai"),
    ("timestep_spacing", None, "timestep_spacing is None; expected str"),
    ("final_sigmas_type", "one", "final_sigmas_type is 'one'; expected one of ('zero', 'sigma_mi"),
    ("num_train_timesteps", 0, "num_train_timesteps is 0; expected >= 1"),
    ("num_train_timesteps", "1000", "num_train_timesteps is '1000'; expected int"),
    ("num_train_timesteps", True, "num_train_timesteps is True; expected int"),
    ("steps_offset", -1, "steps_offset is -1; expected >= 0"),
    ("beta_start", 0.0, "beta_start is 0.0; expected within (0, 1)"),
    ("beta_end", 1.5, "beta_end is 1.5; expected within (0, 1)"),
    ("beta_end", "0.02", "beta_end is '0.02'; expected float"),
    ("set_alpha_to_one", 1, "set_alpha_to_one is 1; expected bool"),
    ("clip_sample", True, "clip_sample is True, which is not implemented for DDIMScheduler; expec"),
  ],
)
def test_bad_values_are_refused(field, value, text):
  raw = {"_class_name": "DDIMScheduler", "clip_sample": False, field: value}
  assert refusal(raw).startswith(f"scheduler_config.json: {text}")


def test_an_unknown_sampler_is_refused():
  with pytest.raises(ValueError, match="sampler is 'heun'; expected one of"):
    diffusion.ScheduleConfig(sampler="heun")
  # In a file it is no field: the class says it.
  raw = {"_class_name": "EulerDiscreteScheduler", "sampler": "ddim"}
  assert diffusion.read_config(raw).sampler == "euler"


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_clipping_by_default_is_refused(name):
  """A file that leaves clip_sample out makes diffusers clip: its samples would not be ours."""
  assert class_defaults(name)["clip_sample"] is True
  assert refusal({"_class_name": name}) == (
    "scheduler_config.json: clip_sample is absent, that is True, which is not implemented for "
    "DDIMScheduler; expected false"
  )


def test_runge_kutta_steps_are_refused():
  assert class_defaults("PNDMScheduler")["skip_prk_steps"] is False
  assert refusal({"_class_name": "PNDMScheduler"}) == (
    "scheduler_config.json: skip_prk_steps is absent, that is False, which is not implemented for "
    "PNDMScheduler; expected true"
  )


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_what_a_class_does_not_read_is_passed_over(name):
  """Files carry the fields of schedulers that they were made from."""
  raw = {"_class_name": name, "clip_sample": True, "skip_prk_steps": False, "unheard_of": 3}
  assert diffusion.read_config(raw).sampler == diffusion.SAMPLER_OF[name]
