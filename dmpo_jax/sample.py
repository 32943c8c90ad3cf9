"""Samplers as pure scans, with classifier-free guidance.

DDIM (Song et al., arXiv 2010.02502, eq. 12, eta = 0) with the timesteps and the last step of
diffusers' DDIMScheduler, so that both give the same latents from the same noise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dmpo_jax import diffusion, objectives, train_step


class DDIMSteps(NamedTuple):
  """The levels of a DDIM trajectory, noisiest first."""

  timesteps: np.ndarray  # [n] int32
  alphas: np.ndarray  # [n] abar at the timestep
  next_alphas: np.ndarray  # [n] abar at the level the step goes to


def ddim_steps(config: diffusion.ScheduleConfig, steps: int) -> DDIMSteps:
  """Leading spacing: T // n apart, shifted by `steps_offset`; the last step goes to
  abar = 1, or to abar_0 unless `set_alpha_to_one`.

  Raises:
    ValueError: more steps than training timesteps, or `steps_offset` leads beyond the last one.

  >>> c = diffusion.ScheduleConfig(num_train_timesteps=10, steps_offset=1)
  >>> ddim_steps(c, 2).timesteps.tolist()
  [6, 1]
  """
  total = config.num_train_timesteps
  if not 1 <= steps <= total:
    raise ValueError(f"sampling steps: expected 1 to {total}, got {steps}")
  abar = diffusion.alphas_cumprod(config)
  stride = total // steps
  timesteps = (np.arange(steps) * stride)[::-1].astype(np.int32) + config.steps_offset
  if timesteps[0] >= total:
    raise ValueError(
      f"sampling steps: {steps} with steps_offset={config.steps_offset} start at timestep "
      f"{timesteps[0]}, but the last of the schedule is {total - 1}; expected fewer steps"
    )
  following = timesteps - stride
  last = np.float32(1.0) if config.set_alpha_to_one else abar[0]
  next_alphas = np.where(following >= 0, abar[np.maximum(following, 0)], last)
  return DDIMSteps(timesteps, abar[timesteps], next_alphas.astype(np.float32))


def split_prediction(
  prediction_type: str,
  prediction: Float[Array, "B h w c"],
  latents: Float[Array, "B h w c"],
  alpha: Float[Array, ""],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
  """The network's output at level abar = alpha as (x_0, eps)."""
  signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)
  if prediction_type == "epsilon":
    return (latents - sigma * prediction) / signal, prediction
  if prediction_type == "sample":
    return prediction, (latents - signal * prediction) / sigma
  return signal * latents - sigma * prediction, signal * prediction + sigma * latents


def ddim_sample(
  denoiser: objectives.Denoiser,
  params: train_step.Params,
  noise: Float[Array, "B h w c"],
  prompt_embeds: Float[Array, "B L D"],
  negative_embeds: Float[Array, "B L D"],
  *,
  steps: DDIMSteps,
  guidance_scale: float,
) -> Float[Array, "B h w c"]:
  """Noise -> latents (scaled, as the UNet sees them).

  With guidance scale s the prediction is uncond + s (cond - uncond) (Ho and Salimans,
  arXiv 2207.12598, in diffusers' convention: s = 1 is the conditional prediction alone).

  Args:
    params: of the UNet.
    noise: N(0, I).
    negative_embeds: of the empty or negative prompt; not read when guidance_scale is 1.
  """
  guided = guidance_scale != 1.0

  def predict(latents, timestep):
    timesteps = jnp.full(latents.shape[:1], timestep)
    if not guided:
      return denoiser.unet(params, latents, timesteps, prompt_embeds)
    # Each image's two halves side by side, so that they stay on its device.
    context = jnp.stack([negative_embeds, prompt_embeds], axis=1)
    context = context.reshape(-1, *prompt_embeds.shape[1:])
    doubled = denoiser.unet(params, latents.repeat(2, 0), timesteps.repeat(2, 0), context)
    uncond, cond = doubled[0::2], doubled[1::2]
    return uncond + guidance_scale * (cond - uncond)

  def step(latents, level):
    timestep, alpha, next_alpha = level
    prediction = predict(latents, timestep)
    x0, eps = split_prediction(denoiser.prediction_type, prediction, latents, alpha)
    return jnp.sqrt(next_alpha) * x0 + jnp.sqrt(1.0 - next_alpha) * eps, None

  return jax.lax.scan(step, noise, tuple(jnp.asarray(each) for each in steps))[0]
