"""DDIM inversion: from a clean latent up to a noisy one, as InPO makes its own noise.

A deterministic sampler's step (Song et al., arXiv 2010.02502, eq. 12 with eta = 0) taken upwards
(section 4.3 there): the network reads x at its level as (x_0, eps), and the next state is these two
at the next, noisier level. InPO (arXiv 2503.18454) trains on the latents so found in place of
freshly noised ones. What the network is asked for there is the noise that the latent implies,

    tau = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t),

and since sqrt(abar_t) x_0 + sqrt(1 - abar_t) tau gives x_t back, an inverted latent is one that was
noised by tau: InPO is Diffusion-DPO with tau, of winner and loser apart, in place of one drawn eps.
With the ordinary x_t, tau is eps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dmpo_jax import diffusion, objectives, sample, train_step, types
from dmpo_jax.models import remat, shards

PUBLISHED_ETA = 0.1  # `inversion_eta` of the published code


class Levels(NamedTuple):
  """The levels that each latent goes up, from clean; arrays [S, B], S evaluations of the network.

  Attributes:
    timesteps: as the network is told.
    abar, next_abar: before and after the step.
    moves: whether the step is taken; if not, the latent stays as it is.
    noise: weight of fresh noise in the next state; None: none is added.
  """

  timesteps: Int[Array, "S B"]
  abar: Float[Array, "S B"]
  next_abar: Float[Array, "S B"]
  moves: Bool[Array, "S B"]
  noise: Float[Array, "S B"] | None = None


def exact_levels(
  timesteps: Int[Array, " B"], abar: Float[Array | np.ndarray, " T"], *, steps: int
) -> Levels:
  """Each latent's own grid of `steps` steps, evenly spaced from clean to exactly its timestep.

  Level t is t + 1 noisings above clean, so the grid is floor((t + 1) k / steps) - 1, k = 0 to
  steps, with -1 for clean, where abar = 1. Steps of no length are not taken (t + 1 < steps). The
  network is told where the step starts, and timestep 0 at the clean latent.

  >>> levels = exact_levels(jnp.array([5]), jnp.linspace(0.9, 0.1, 9), steps=3)
  >>> levels.timesteps[:, 0].tolist()  # clean (told as 0), 1, 3, and on to 5
  [0, 1, 3]
  >>> [round(each, 3) for each in levels.next_abar[:, 0].tolist()]
  [0.8, 0.6, 0.4]
  """
  grid = (timesteps[None] + 1) * jnp.arange(steps + 1)[:, None] // steps - 1
  return _levels(jnp.asarray(abar), grid, jnp.maximum(grid[:-1], 0), 1.0, grid[1:] > grid[:-1])


def published_levels(
  timesteps: Int[Array, " B"],
  abar: Float[Array | np.ndarray, " T"],
  *,
  steps: int,
  steps_offset: int,
  first_abar: float,
) -> Levels:
  """What the published code does (JaydenLyh/InPO, train.py), pair by pair.

  Its grid is diffusers' of 0.20: `steps` timesteps, T // steps apart, of which the first is before
  the schedule (-99, 1, 101, ..., 801 for Stable Diffusion 1.5 and 10 steps). Every step from a grid
  time below t is taken, so that the latent ends on the first grid level at or above t (the last
  one, 901, if t is beyond it): up to 99 timesteps above t, or below. Training takes it for a latent
  of level t all the same, in the network's timestep and in tau. The network is told where a step
  starts, -99 at first. After each step noise is added, eta sqrt(variance) N(0, I), eta = 0.1, with
  DDIM's variance between the two levels (arXiv 2010.02502, eq. 16).

  Args:
    steps_offset, first_abar: of the base's scheduler: `steps_offset`, and the level before the
      first timestep, 1 or, without `set_alpha_to_one`, abar_0.

  >>> levels = published_levels(jnp.array([1, 2]), jnp.linspace(0.9, 0.1, 9), steps=3,
  ...                           steps_offset=1, first_abar=1.0)
  >>> levels.timesteps[:, 0].tolist(), levels.moves.T.tolist()
  ([-2, 1, 4], [[True, False, False], [True, True, False]])
  """
  abar = jnp.asarray(abar)
  stride = len(abar) // steps
  grid = jnp.arange(-1, steps)[:, None] * stride + steps_offset
  grid = jnp.broadcast_to(grid, (steps + 1, len(timesteps)))
  levels = _levels(abar, grid, grid[:-1], first_abar, grid[:-1] < timesteps[None])
  variance = (1 - levels.abar) / (1 - levels.next_abar) * (1 - levels.next_abar / levels.abar)
  return levels._replace(noise=PUBLISHED_ETA * jnp.sqrt(variance))


def _levels(abar, grid, told, first_abar, moves) -> Levels:
  at = jnp.where(grid < 0, first_abar, abar[jnp.maximum(grid, 0)])
  return Levels(told, at[:-1], at[1:], moves)


def invert(
  denoiser: objectives.Denoiser,
  params: train_step.Params,
  latents: Float[Array, "B h w c"],
  conditions: types.Conditions,
  levels: Levels,
  keys: UInt32[Array, "B k"] | None = None,
) -> Float[Array, "B h w c"]:
  """The clean latents at the last of their levels; without guidance.

  Args:
    params: of the UNet, or `lora.Adapted`; may be `shards.Shard`.
    latents: clean, scaled.
    keys: key data for each latent, where `levels` adds noise.
  """

  def column(values):
    return values.reshape(-1, 1, 1, 1)

  def draw(key, number):
    key = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.normal(key, latents.shape[1:], jnp.float32)

  def step(state, numbered):
    number, level = numbered
    # Tied to the state: what is gathered of parameters stays in the loop.
    tied, state = jax.lax.optimization_barrier((params, state))
    whole = shards.gathered(tied, later=remat.RUN_BLOCKS)
    prediction = denoiser.unet(whole, state, level.timesteps, conditions).astype(jnp.float32)
    signal, sigma = column(jnp.sqrt(level.abar)), column(jnp.sqrt(1 - level.abar))
    x0, eps = sample.split_prediction(denoiser.prediction_type, prediction, state, signal, sigma)
    up = column(jnp.sqrt(level.next_abar)) * x0 + column(jnp.sqrt(1 - level.next_abar)) * eps
    if level.noise is not None:
      up += column(level.noise) * jax.vmap(draw, (0, None))(keys, number)
    return jnp.where(column(level.moves), up, state), None

  steps = len(levels.timesteps)
  return jax.lax.scan(step, latents, (jnp.arange(steps), levels))[0]


def implied_noise(
  noisy: Float[Array, "B h w c"],
  latents: Float[Array, "B h w c"],
  timesteps: Int[Array, " B"],
  abar: Float[Array | np.ndarray, " T"],
) -> Float[Array, "B h w c"]:
  """tau, by which `diffusion.add_noise` makes `noisy` of `latents`; see the module.

  >>> x_0, eps = jnp.full((1, 1, 1, 1), 2.0), jnp.full((1, 1, 1, 1), -1.0)
  >>> t, abar = jnp.array([0]), jnp.array([0.64])
  >>> x_t = diffusion.add_noise(x_0, eps, t, abar)
  >>> round(float(implied_noise(x_t, x_0, t, abar)[0, 0, 0, 0]), 5)
  -1.0
  """
  level = jnp.asarray(abar)[timesteps].reshape(-1, 1, 1, 1)
  return (noisy - jnp.sqrt(level) * latents) / jnp.sqrt(1.0 - level)


def make_inversion(
  denoiser: objectives.Denoiser, schedule: diffusion.ScheduleConfig, *, kind: str, steps: int
) -> objectives.Invert:
  """What `objectives.preference_objective` takes as `invert`.

  Args:
    kind: exact, `exact_levels`; or published, `published_levels`.
    steps: evaluations of the network for each latent, whatever its timestep.

  Raises:
    ValueError: unknown kind; more steps than timesteps; a network that predicts samples, of which
      at the clean latent there is no noise to be read, or for published, one that does not
      predict epsilon.
  """
  total, prediction = schedule.num_train_timesteps, schedule.prediction_type
  kinds: dict[str, tuple[Callable[..., Levels], tuple[str, ...]]] = {
    "exact": (exact_levels, ("epsilon", "v_prediction")),
    "published": (
      lambda timesteps, abar, *, steps: published_levels(
        timesteps,
        abar,
        steps=steps,
        steps_offset=schedule.steps_offset,
        first_abar=float(abar[0]) if schedule.set_alpha_to_one is False else 1.0,
      ),
      ("epsilon",),
    ),
  }
  if kind not in kinds:
    raise ValueError(f"objective.inversion: expected one of {', '.join(kinds)}, got {kind!r}")
  levels_of, allowed = kinds[kind]
  if prediction not in allowed:
    raise ValueError(
      f"objective.inversion: {kind!r} needs a base that predicts {' or '.join(allowed)}, got "
      f"{prediction!r}"
    )
  if not 1 <= steps <= total:
    raise ValueError(f"objective.inversion_steps: expected 1 to {total}, got {steps}")
  abar = diffusion.alphas_cumprod(schedule)

  def run(params, latents, timesteps, conditions, keys):
    levels = levels_of(timesteps, abar, steps=steps)
    noisy = invert(denoiser, params, latents, conditions, levels, keys)
    return implied_noise(noisy, latents, timesteps, abar)

  return run
