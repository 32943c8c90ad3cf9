"""Time and compiled FLOPs of the demo's training step, by batch size.

    python benchmarks/train_step.py

FLOPs are XLA's count of the compiled program; per pair they should not depend on the batch. The
floor is what the objective cannot do without: two images, each forward and backward through the
policy (3 forward passes' worth) and forward through the reference (1), 8 in all; a little less, as
the two share the projections of their prompt. What `remat` computes again comes on top.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import cli, losses, objectives, optimizer, tasks, train_step, types
from dmpo_jax import config as config_lib

REPEATS = 5


def main():
  config = config_lib.from_dict(cli.read_config(cli.DEFAULT_CONFIG, []))
  base = base_lib.load_base(config.base, remat=config.remat)
  loss_fn = tasks.bind_loss(config.objective)
  objective = objectives.preference_objective(
    base.denoiser(), loss_fn, peak_weight=losses.peak_gradient_weight(loss_fn)
  )
  chain = optimizer.make_optimizer(config.optim, config.steps)
  frozen = objectives.Frozen(base.params["unet"], base.text_params)
  step = jax.jit(functools.partial(train_step.train_step, objective=objective, optimizer=chain))
  print(f"{jax.devices()[0].device_kind}, median of {REPEATS}")
  print(f"{'pairs':>6} {'ms/step':>9} {'pairs/s':>9} {'GFLOP/pair':>11} {'of 8 forward':>13}")
  forward = forward_flops(base)
  for pairs in (8, 32, 64):
    batch = random_batch(base, pairs)
    state = train_step.init_state(jax.tree.map(jnp.asarray, base.params["unet"]), chain)
    compiled = step.lower(state, frozen, batch, jax.random.key(0)).compile()
    seconds = []
    for _ in range(REPEATS + 1):
      start = time.perf_counter()
      jax.block_until_ready(compiled(state, frozen, batch, jax.random.key(0)))
      seconds.append(time.perf_counter() - start)
    flops = compiled.cost_analysis()["flops"] / pairs
    median = float(np.median(seconds[1:]))
    print(
      f"{pairs:6d} {1e3 * median:9.0f} {pairs / median:9.1f} {flops / 1e9:11.3f} "
      f"{flops / (8 * forward):13.2f}"
    )


def forward_flops(base) -> float:
  """Compiled FLOPs of one UNet forward pass on one image."""
  size, config = 32, base.unet.config
  noise = jnp.zeros((size, *base.latent_shape))
  embeds = jnp.zeros((size, base.tokenizer.length, config.cross_attention_dim))
  lowered = jax.jit(base.apply_unet).lower(
    base.params["unet"], noise, jnp.zeros(size, jnp.int32), types.Conditions(embeds)
  )
  return lowered.compile().cost_analysis()["flops"] / size


def random_batch(base, pairs: int) -> types.PreferenceBatch:
  generator = np.random.default_rng(0)
  height, width, channels = base.latent_shape
  shape = (2, pairs, height, width, 2 * channels)
  moments = generator.standard_normal(shape).astype(np.float16)
  return types.PreferenceBatch(*moments, base.tokenizer(["love"] * pairs))


if __name__ == "__main__":
  main()
