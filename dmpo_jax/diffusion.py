"""The forward process: noise schedules, noising, prediction targets. Pure functions of arrays.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al., arXiv 2006.11239, eq. 4), with the
schedules and prediction types of diffusers' `scheduler_config.json`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
MAX_BETA = 0.999  # diffusers' betas_for_alpha_bar


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """The fields of scheduler_config.json that define the forward process."""

  num_train_timesteps: int = 1000
  beta_start: float = 0.0001
  beta_end: float = 0.02
  beta_schedule: str = "linear"
  prediction_type: str = "epsilon"
  set_alpha_to_one: bool = True
  steps_offset: int = 0
  timestep_spacing: str = "leading"
  clip_sample: bool = False

  def __post_init__(self):
    for name, allowed in (
      ("beta_schedule", BETA_SCHEDULES),
      ("prediction_type", PREDICTION_TYPES),
      ("timestep_spacing", ("leading",)),
      ("clip_sample", (False,)),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"scheduler_config.json: {name} is {getattr(self, name)!r}; expected one of {allowed}"
        )
    for name, lowest in (("num_train_timesteps", 1), ("steps_offset", 0)):
      value = getattr(self, name)
      if value < lowest:
        raise ValueError(f"scheduler_config.json: {name} is {value!r}; expected >= {lowest}")
    for name in ("beta_start", "beta_end"):
      value = getattr(self, name)
      if not 0 < value < 1:
        raise ValueError(f"scheduler_config.json: {name} is {value!r}; expected within (0, 1)")


# Fields that change sampling in a way we do not implement, at the values that switch them off.
NEUTRAL = {
  "rescale_betas_zero_snr": (False,),
  "thresholding": (False,),
  "trained_betas": (None,),
}
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # clip_sample is True where these do not say


def read_config(raw: Mapping[str, Any]) -> ScheduleConfig:
  """Reads scheduler_config.json of any diffusers scheduler; absent fields take its defaults.

  Raises:
    ValueError: a value of the wrong type, out of range or not implemented, named.
  """
  for name, allowed in NEUTRAL.items():
    if name in raw and raw[name] not in allowed:
      raise ValueError(
        f"scheduler_config.json: {name} is {raw[name]!r}, which is not implemented; "
        f"expected {allowed[0]!r}"
      )
  if raw.get("_class_name") in CLIPPING and "clip_sample" not in raw:
    raise ValueError(
      f"scheduler_config.json: clip_sample is absent, which {raw['_class_name']} takes as True, "
      "not implemented; expected false"
    )
  types = {field.name: field.type for field in dataclasses.fields(ScheduleConfig)}
  known = {name: value for name, value in raw.items() if name in types}
  for name, value in known.items():
    if type(value) is not types[name]:
      raise ValueError(
        f"scheduler_config.json: {name} is {value!r}; expected {types[name].__name__}"
      )
  return ScheduleConfig(**known)


def alphas_cumprod(config: ScheduleConfig) -> Float[np.ndarray, " T"]:
  """abar_t = prod_{s <= t} (1 - beta_s), float32, formed in float64.

  >>> c = ScheduleConfig(num_train_timesteps=2, beta_start=0.5, beta_end=0.5)
  >>> alphas_cumprod(c).tolist()
  [0.5, 0.25]
  """
  steps = config.num_train_timesteps
  if config.beta_schedule == "linear":
    betas = np.linspace(config.beta_start, config.beta_end, steps, dtype=np.float64)
  elif config.beta_schedule == "scaled_linear":
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=np.float64) ** 2
  else:  # squaredcos_cap_v2 (Nichol and Dhariwal, arXiv 2102.09672, eq. 17)
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], MAX_BETA)
  return np.cumprod(1.0 - betas).astype(np.float32)


class Noising(NamedTuple):
  """One draw of the forward process for each example; shared by winner and loser."""

  timesteps: Int[Array, " B"]
  noise: Float[Array, "B h w c"]


def sample_noising(
  key: Key[Array, ""], shape: tuple[int, ...], num_train_timesteps: int, power: float = 1.0
) -> Noising:
  """Draws timesteps and noise ~ N(0, I), float32, for a batch of latents of `shape`.

  Args:
    power: the density of t is proportional to t^(power - 1): 1 is U{0..T-1}, as every paper here
      has it; more than 1 prefers noisy levels, where alone the caption decides what is drawn.
  """
  key_t, key_noise = jax.random.split(key)
  if power == 1.0:
    timesteps = jax.random.randint(key_t, shape[:1], 0, num_train_timesteps)
  else:
    levels = jax.random.uniform(key_t, shape[:1]) ** (1.0 / power)
    timesteps = jnp.minimum(levels * num_train_timesteps, num_train_timesteps - 1)
    timesteps = timesteps.astype(jnp.int32)
  return Noising(timesteps, jax.random.normal(key_noise, shape, jnp.float32))


def _signal_and_noise(abar, timesteps, ndim):
  level = jnp.asarray(abar)[timesteps]
  level = level.reshape(level.shape + (1,) * (ndim - level.ndim))
  return jnp.sqrt(level), jnp.sqrt(1.0 - level)


def add_noise(
  latents: Float[Array, "B h w c"],
  noise: Float[Array, "B h w c"],
  timesteps: Int[Array, " B"],
  abar: Float[Array | np.ndarray, " T"],
) -> Float[Array, "B h w c"]:
  """x_t from x_0: sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

  >>> x = add_noise(jnp.full((1, 1, 1, 1), 2.0), jnp.ones((1, 1, 1, 1)), jnp.array([0]),
  ...               jnp.array([0.64]))
  >>> round(float(x[0, 0, 0, 0]), 5)  # 0.8 * 2 + 0.6 * 1
  2.2
  """
  signal, sigma = _signal_and_noise(abar, timesteps, latents.ndim)
  return signal * latents + sigma * noise


def prediction_target(
  prediction_type: str,
  latents: Float[Array, "B h w c"],
  noise: Float[Array, "B h w c"],
  timesteps: Int[Array, " B"],
  abar: Float[Array | np.ndarray, " T"],
) -> Float[Array, "B h w c"]:
  """What the network should output: eps, v = sqrt(abar) eps - sqrt(1-abar) x_0, or x_0.

  v is that of Salimans and Ho (arXiv 2202.00512, section 4).
  """
  if prediction_type == "epsilon":
    return noise
  if prediction_type == "sample":
    return latents
  signal, sigma = _signal_and_noise(abar, timesteps, latents.ndim)
  return signal * noise - sigma * latents
