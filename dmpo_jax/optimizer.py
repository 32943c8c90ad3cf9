"""The optax chain: clip, Adam or Adafactor, schedule, and an optional average of the parameters."""

from typing import NamedTuple

import jax
import optax

from dmpo_jax import config as config_lib


def learning_rate(config: config_lib.OptimConfig, steps: int) -> optax.Schedule:
  """Linear warm-up to `config.learning_rate`, then constant, or cosine/linear decay to zero.

  Args:
    steps: updates of the whole run, warm-up included.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(steps - warmup, 1)
  after = {
    "constant": optax.constant_schedule(peak),
    "linear": optax.linear_schedule(peak, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(peak, rest),
  }[config.schedule]
  if warmup == 0:
    return after
  # The first update already moves: step 0 takes 1/warmup of the peak.
  ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([ramp, after], [warmup])


class ParamsEmaState(NamedTuple):
  ema: optax.Params


def params_ema(decay: float) -> optax.GradientTransformation:
  """Keeps ema <- decay ema + (1 - decay) params of the updated parameters; last in a chain."""

  def init(params):
    return ParamsEmaState(jax.tree.map(lambda p: p.copy(), params))

  def update(updates, state, params=None):
    new = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, new)
    return updates, ParamsEmaState(ema)

  return optax.GradientTransformation(init, update)


def make_optimizer(config: config_lib.OptimConfig, steps: int) -> optax.GradientTransformation:
  """Clip by global norm -> AdamW or Adafactor -> (optionally) average of the parameters.

  Adafactor's settings are those of the Diffusion-DPO launcher for SDXL: no parameter scaling, no
  relative step, update clipping at 1 (code of arXiv 2311.12908).
  """
  schedule = learning_rate(config, steps)
  if config.name == "adamw":
    rule = optax.adamw(
      schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay
    )
  else:
    # optax.adafactor's own decay is not multiplied by the learning rate; AdamW's and torch's are.
    rule = optax.chain(
      optax.adafactor(None, multiply_by_parameter_scale=False, clipping_threshold=1.0),
      optax.add_decayed_weights(-config.weight_decay),
      optax.scale_by_schedule(schedule),
    )
  chain = [optax.clip_by_global_norm(config.clip_norm), rule]
  if config.ema_decay > 0:
    chain.append(params_ema(config.ema_decay))
  return optax.chain(*chain)


def averaged_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
  """The averaged parameters if the chain keeps them, else `params`."""
  states = [each for each in opt_state if isinstance(each, ParamsEmaState)]
  return states[0].ema if states else params
