"""Samplers as pure scans, with guidance: what diffusers' schedulers draw from the same noise.

A sampler goes down levels of noise, x = signal x_0 + sigma eps with signal^2 + sigma^2 = 1. At each
the network's output is read as an estimate of (x_0, eps), of which the next state is made: that is
DDIM (Song et al., arXiv 2010.02502, eq. 12, eta = 0). diffusers' Euler schedulers keep
x / signal = x_0 + s eps, s = sigma / signal, and scale it for the network; a step of Euler's method
in s (Karras et al., arXiv 2206.00364, algorithm 1) is x_0 + s' eps, which is DDIM's step once more
when seen in x, on other levels. All that a step needs is computed before, in numpy: the plan.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dmpo_jax import diffusion, objectives, train_step, types

SAMPLERS = tuple(diffusion.SAMPLER_CLASSES)
# abar_T of zero terminal SNR where a sampler divides by it: the smallest float16, as in diffusers.
SMALLEST_ABAR = 2.0**-24
# Adams-Bashforth weights of the latest predictions, newest first: of order 4 those of Liu et al.,
# arXiv 2202.09778, eq. 12; the rows before start up as diffusers' PNDMScheduler does.
PLMS_WEIGHTS = (
  (1.0, 0.0, 0.0, 0.0),
  (1 / 2, 1 / 2, 0.0, 0.0),
  (3 / 2, -1 / 2, 0.0, 0.0),
  (23 / 12, -16 / 12, 5 / 12, 0.0),
  (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Levels(NamedTuple):
  """The levels of a trajectory, noisiest first; numpy arrays [n], n evaluations of the network.

  Attributes:
    timesteps: as the network is told: int32, or float32 for Euler's linspace spacing.
    signals, sigmas: x = signal x_0 + sigma eps at this level.
    next_signals, next_sigmas: weights of x_0 and eps in the next state.
    noise: euler_ancestral: weight of fresh noise in the next state.
    change: dpmpp_2m: weight of the last change in x_0 in the next state.
    weights: pndm [n, 4]: of this and the three last predictions, newest first.
    again: pndm, bool: the step starts from the initial noise once more.
  """

  timesteps: np.ndarray
  signals: np.ndarray
  sigmas: np.ndarray
  next_signals: np.ndarray
  next_sigmas: np.ndarray
  noise: np.ndarray | None = None
  change: np.ndarray | None = None
  weights: np.ndarray | None = None
  again: np.ndarray | None = None


class Plan(NamedTuple):
  """All of a sampler that does not depend on the network.

  Attributes:
    sampler: one of `SAMPLERS`.
    init_scale: the first state is init_scale * noise.
  """

  sampler: str
  init_scale: float
  levels: Levels


def make_plan(config: diffusion.ScheduleConfig, steps: int, sampler: str | None = None) -> Plan:
  """The levels that diffusers' scheduler of this sampler visits in `steps` steps.

  Args:
    sampler: one of `SAMPLERS`; None is that of the configuration. Another one reads the file as
      diffusers' `from_config` does, see `diffusion.for_sampler`.

  Raises:
    ValueError: sampler, file and number of steps do not go together; what is expected is said.

  >>> c = diffusion.ScheduleConfig(num_train_timesteps=10, steps_offset=1, clip_sample=False)
  >>> make_plan(c, 2).levels.timesteps.tolist()  # 10 // 2 apart, plus 1
  [6, 1]
  >>> make_plan(c, 2, "euler").levels.timesteps.tolist()  # linspace: both ends
  [9.0, 0.0]
  """
  config = diffusion.for_sampler(config, config.sampler if sampler is None else sampler)
  total = config.num_train_timesteps
  if not 1 <= steps <= total:
    raise ValueError(f"sampling steps: expected 1 to {total}, got {steps}")
  init_scale, levels = PLANS[config.sampler](config, steps)
  first = levels.timesteps[0]
  if first >= total:
    raise ValueError(
      f"sampling steps: {steps} with steps_offset={config.steps_offset} start at timestep "
      f"{first}, but the last of the schedule is {total - 1}; expected fewer steps"
    )
  return Plan(config.sampler, init_scale, levels)


def _spaced(config, count):
  """`count` timesteps, falling, float64; leading ones beyond the schedule for large offsets."""
  total = config.num_train_timesteps
  if config.timestep_spacing == "linspace":
    return np.linspace(0, total - 1, count)[::-1]
  if config.timestep_spacing == "leading":
    return (np.arange(count) * (total // count))[::-1] + float(config.steps_offset)
  # Where total / count is rounded, arange may end in one more: diffusers goes on to timestep -1.
  return np.round(np.arange(total, 0, -total / count))[:count] - 1


def _table(config, timesteps):
  """(abar of the timesteps, abar_t of all t), float64; a timestep beyond the last as the last."""
  abar = diffusion.alphas_cumprod(config).astype(np.float64)
  return abar[np.minimum(timesteps, len(abar) - 1)], abar


def _variance_levels(config, evaluated, start, end, **more):
  """Levels from timestep `start` to `end`, where negative is the final one, of DDIM and PNDM."""
  now, abar = _table(config, start)
  final = 1.0 if config.set_alpha_to_one else abar[0]
  following = np.where(end >= 0, _table(config, np.maximum(end, 0))[0], final)
  if config.prediction_type == "epsilon" and (now == 0).any():
    raise ValueError(
      f"scheduler_config.json: with rescale_betas_zero_snr timestep {len(abar) - 1} is all noise, "
      "where prediction_type 'epsilon' says nothing of x_0; expected 'v_prediction' or 'sample', "
      "or timestep_spacing 'leading'"
    )
  columns = (np.sqrt(each) for each in (now, 1 - now, following, 1 - following))
  return Levels(evaluated.astype(np.int32), *map(np.float32, columns), **more)


def _plan_ddim(config, steps):
  timesteps = np.round(_spaced(config, steps)).astype(int)
  # diffusers goes down by this stride whatever the spacing, not to the next timestep.
  stride = config.num_train_timesteps // steps
  return 1.0, _variance_levels(config, timesteps, timesteps, timesteps - stride)


def _plan_pndm(config, steps):
  """Pseudo linear multistep: the first step is taken twice, as there is nothing to start from."""
  timesteps = np.round(_spaced(config, steps)).astype(int)
  stride = config.num_train_timesteps // steps
  evaluated = np.concatenate([timesteps[:2], timesteps[1:]])
  start, end = evaluated.copy(), evaluated - stride
  if steps > 1:
    start[1], end[1] = evaluated[1] + stride, evaluated[1]
  number = np.arange(len(evaluated))
  weights = np.float32(PLMS_WEIGHTS)[np.minimum(number, 4)]
  return 1.0, _variance_levels(config, evaluated, start, end, weights=weights, again=number == 1)


def _sigma_levels(config, timesteps, final):
  """(s = sigma / signal of the timesteps, then of where each step goes), float64."""
  _, abar = _table(config, np.zeros(0, int))
  if config.rescale_betas_zero_snr:
    abar[-1] = SMALLEST_ABAR
  table = np.sqrt((1 - abar) / abar)
  s = np.interp(timesteps, np.arange(len(abar)), table)
  return s, np.append(s[1:], table[0] if final == "sigma_min" else 0.0)


def _signal(s):
  return 1 / np.sqrt(1 + s**2)


def _plan_euler(config, steps, final=None):
  timesteps = _spaced(config, steps).astype(np.float32)
  s, goal = _sigma_levels(config, timesteps, final or config.final_sigmas_type)
  signal, next_signal = _signal(s), _signal(goal)
  # What diffusers keeps is x / signal, and where it ends is not scaled back.
  next_signal[-1] = 1.0
  columns = (signal, s * signal, next_signal, goal * next_signal)
  # diffusers starts from max(s) * noise, or sqrt(max(s)^2 + 1) * noise where spacing is leading.
  leading = config.timestep_spacing == "leading"
  init_scale = 1.0 if leading else float(s[0] * signal[0])
  if config.timestep_spacing != "linspace":
    timesteps = timesteps.astype(np.int32)
  return init_scale, Levels(timesteps, *map(np.float32, columns))


def _plan_euler_ancestral(config, steps):
  """Down to s'^2 / s, and up to s' by noise: s'^2 = down^2 + up^2 (k-diffusion, eta = 1)."""
  init_scale, levels = _plan_euler(config, steps, "zero")
  s, goal = _sigma_levels(config, _spaced(config, steps).astype(np.float32), "zero")
  down = goal**2 / s
  up = np.sqrt(goal**2 - down**2)
  next_sigmas, noise = (np.float32(levels.next_signals * each) for each in (down, up))
  return init_scale, levels._replace(next_sigmas=next_sigmas, noise=noise)


def _plan_dpmpp_2m(config, steps):
  """DPM-Solver++ (2M) (Lu et al., arXiv 2211.01095, algorithm 2), in diffusers' midpoint form.

  With h the step in log(1 / s), x' = sigma'/sigma x + signal' (1 - e^-h) D, where
  D = x_0 + (x_0 - x_0 of the last level) h / (2 h_last). Without the difference it is DDIM's step:
  so is the first, and the last if it goes to s = 0 or if the file asks for it.
  """
  trailing = config.timestep_spacing == "trailing"
  if not trailing and steps >= config.num_train_timesteps:
    raise ValueError(
      f"sampling steps: expected 1 to {config.num_train_timesteps - 1} for dpmpp_2m, got {steps}"
    )
  timesteps = np.round(_spaced(config, steps if trailing else steps + 1))[:steps].astype(int)
  s, goal = _sigma_levels(config, timesteps, config.final_sigmas_type)
  signal, next_signal = _signal(s), _signal(goal)
  first_order_last = (
    config.final_sigmas_type == "zero"
    or config.euler_at_final
    or (config.lower_order_final and steps < 15)  # diffusers: for fewer than 15 steps
  )
  change, last = np.zeros(steps), steps - first_order_last
  h = np.log(s[:last] / goal[:last])
  change[1:last] = (next_signal * (1 - goal / s))[1:last] * h[1:] / (2 * h[:-1])
  columns = (signal, s * signal, next_signal, goal * next_signal)
  levels = Levels(timesteps.astype(np.int32), *map(np.float32, columns))
  return 1.0, levels._replace(change=np.float32(change))


PLANS = {
  "ddim": _plan_ddim,
  "pndm": _plan_pndm,
  "euler": _plan_euler,
  "euler_ancestral": _plan_euler_ancestral,
  "dpmpp_2m": _plan_dpmpp_2m,
}


def split_prediction(
  prediction_type: str,
  prediction: Float[Array, "B h w c"],
  latents: Float[Array, "B h w c"],
  signal: Float[Array, "..."],
  sigma: Float[Array, "..."],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
  """The network's output as (x_0, eps), where latents = signal x_0 + sigma eps.

  Args:
    signal, sigma: of all latents, or [B, 1, 1, 1].
  """
  if prediction_type == "epsilon":
    return (latents - sigma * prediction) / signal, prediction
  if prediction_type == "sample":
    return prediction, (latents - signal * prediction) / sigma
  return signal * latents - sigma * prediction, signal * prediction + sigma * latents


def rescale_guided(
  guided: Float[Array, "B h w c"], cond: Float[Array, "B h w c"], share: float
) -> Float[Array, "B h w c"]:
  """Pulls the guided prediction's deviation towards that of the conditional one.

  share * guided std(cond) / std(guided) + (1 - share) * guided, the deviations of each image
  (Lin et al., arXiv 2305.08891, section 3.4).

  >>> guided, cond = (jnp.array([0.0, x]).reshape(1, 2, 1, 1) for x in (4.0, 2.0))
  >>> rescale_guided(guided, cond, 0.5).ravel().tolist()  # half of 4 * 1 / 2, half of 4
  [0.0, 3.0]
  """
  ratio = jnp.std(cond, (1, 2, 3), keepdims=True) / jnp.std(guided, (1, 2, 3), keepdims=True)
  return guided * (share * ratio + (1.0 - share))


def without_prompt(negative: types.Conditions) -> types.Conditions:
  """The negative conditions of a base whose empty prompt is zeros (`base.Base.zero_negative`)."""
  return negative._replace(
    prompt_embeds=jnp.zeros_like(negative.prompt_embeds),
    added=negative.added._replace(text_embeds=jnp.zeros_like(negative.added.text_embeds)),
  )


Predict = Callable[[Array, Array], Array]  # (latents, timestep) -> the network's guided output


def _guided(
  denoiser, params, conditions, negative, guidance_scale, guidance_rescale, image_guidance_scale
) -> Predict:
  def call_each(latents, timestep, *conditions_of_calls):
    """One call of the network on all; each image's calls side by side, to stay on its device."""
    count = len(conditions_of_calls)

    def interleave(*leaves):
      return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    stacked = jax.tree.map(interleave, *conditions_of_calls)
    repeated = latents.repeat(count, 0)
    timesteps = jnp.full(repeated.shape[:1], timestep)
    output = denoiser.unet(params, repeated, timesteps, stacked)
    return (output[i::count] for i in range(count))

  def rescaled(guided, cond):
    return rescale_guided(guided, cond, guidance_rescale) if guidance_rescale else guided

  def plain(latents, timestep):
    return next(call_each(latents, timestep, conditions))

  def by_text(latents, timestep):
    uncond, cond = call_each(latents, timestep, negative, conditions)
    return rescaled(uncond + guidance_scale * (cond - uncond), cond)

  def by_text_and_image(latents, timestep):
    neither = negative._replace(image_latents=jnp.zeros_like(conditions.image_latents))
    uncond, image, cond = call_each(latents, timestep, neither, negative, conditions)
    guided = uncond + image_guidance_scale * (image - uncond) + guidance_scale * (cond - image)
    return rescaled(guided, cond)

  negative = negative._replace(image_latents=conditions.image_latents)
  if image_guidance_scale is not None:
    return by_text_and_image
  return plain if guidance_scale == 1.0 else by_text


def _next_state(x0, eps, level):
  return level.next_signals * x0 + level.next_sigmas * eps


# Each run is (predict, split, start, levels, key) -> latents, with `split` from (prediction,
# latents, level) to (x_0, eps).


def _run_single(predict, split, start, levels, key):
  del key

  def step(latents, level):
    x0, eps = split(predict(latents, level.timesteps), latents, level)
    return _next_state(x0, eps, level), None

  return jax.lax.scan(step, start, levels)[0]


def _run_ancestral(predict, split, start, levels, key):
  if key is None:
    raise ValueError("key: expected a jax.random.key for euler_ancestral, which adds noise")
  keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(start)))

  def draw(key, number):
    return jax.random.normal(jax.random.fold_in(key, number), start.shape[1:], start.dtype)

  def step(latents, numbered):
    number, level = numbered
    x0, eps = split(predict(latents, level.timesteps), latents, level)
    fresh = jax.vmap(draw, (0, None))(keys, number)
    return _next_state(x0, eps, level) + level.noise * fresh, None

  return jax.lax.scan(step, start, (jnp.arange(len(levels.timesteps)), levels))[0]


def _run_multistep(predict, split, start, levels, key):
  """Carries the last x_0; at the first level its weight is 0."""
  del key

  def step(carry, level):
    latents, last_x0 = carry
    x0, eps = split(predict(latents, level.timesteps), latents, level)
    return (_next_state(x0, eps, level) + level.change * (x0 - last_x0), x0), None

  return jax.lax.scan(step, (start, jnp.zeros_like(start)), levels)[0][0]


def _run_plms(predict, split, start, levels, key):
  """Carries the three last predictions, newest first; that of the repeated step is not kept."""
  del key

  def step(carry, level):
    latents, last = carry
    recent = jnp.concatenate([predict(latents, level.timesteps)[None], last])
    combined = jnp.tensordot(level.weights, recent, axes=1, precision="highest")
    base = jnp.where(level.again, start, latents)
    x0, eps = split(combined, base, level)
    return (_next_state(x0, eps, level), jnp.where(level.again, last, recent[:3])), None

  return jax.lax.scan(step, (start, jnp.zeros((3, *start.shape), start.dtype)), levels)[0][0]


RUNS = {
  "ddim": _run_single,
  "pndm": _run_plms,
  "euler": _run_single,
  "euler_ancestral": _run_ancestral,
  "dpmpp_2m": _run_multistep,
}


def sample_latents(
  denoiser: objectives.Denoiser,
  params: train_step.Params,
  noise: Float[Array, "B h w c"],
  conditions: types.Conditions,
  negative: types.Conditions,
  *,
  plan: Plan,
  guidance_scale: float,
  guidance_rescale: float = 0.0,
  image_guidance_scale: float | None = None,
  key: Key[Array, "..."] | None = None,
) -> Float[Array, "B h w c"]:
  """Noise -> latents (scaled, as the UNet sees them).

  With guidance scale s the prediction is uncond + s (cond - uncond) (Ho and Salimans,
  arXiv 2207.12598, in diffusers' convention: s = 1 is the conditional prediction alone). With an
  image guidance scale r as well it is uncond + r (image - uncond) + s (cond - image) (Brooks et
  al., arXiv 2211.09800, eq. 3): image has the negative prompt, uncond zeros for an image besides.

  Args:
    params: of the UNet.
    noise: N(0, I).
    negative: with the empty or negative prompt; not read when guidance_scale is 1 and there is no
      image guidance. Its image is that of `conditions`.
    guidance_rescale: in [0, 1], see `rescale_guided`; not read without guidance.
    image_guidance_scale: InstructPix2Pix only.
    key: euler_ancestral only: one for each image, or one for all, of which each image takes the
      share of its place in the batch. An image does not depend on what is drawn beside it.

  Raises:
    ValueError: no key for a sampler that adds noise, or image guidance without an image.
  """
  if image_guidance_scale is not None and conditions.image_latents is None:
    raise ValueError(
      "image_guidance_scale: expected None where the conditions have no image_latents, got "
      f"{image_guidance_scale}"
    )
  predict = _guided(
    denoiser, params, conditions, negative, guidance_scale, guidance_rescale, image_guidance_scale
  )

  def split(prediction, latents, level):
    kind = denoiser.prediction_type
    return split_prediction(kind, prediction, latents, level.signals, level.sigmas)

  levels: Any = jax.tree.map(jnp.asarray, plan.levels)
  return RUNS[plan.sampler](predict, split, plan.init_scale * noise, levels, key)
