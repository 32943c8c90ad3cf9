"""Every method on a real (tiny) UNet of Stable Diffusion 1.5's topology and on emoji_choice."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import doctor_run, losses, objectives, other_losses, sharding, stages, tasks, train
from dmpo_jax.data import pipeline

pytestmark = [
  pytest.mark.slow,  # every test compiles a step
  pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse"),
]
# File -> the loss of the first step where it has a closed form: policy == reference.
METHODS = {
  "dmpo": 0.5 * math.log(1 / (4 * 0.01 * 0.99)),
  "dpo": math.log(2),
  "fpo": oracles.fpo(0.0, 0.01, oracles.GENERATORS["js"]),
  "ipo": 0.25,
  "sdpo": 0.5 * math.log(1 / (4 * 0.01 * 0.99)),
  "dmpo_sft": 0.5 * math.log(1 / (4 * 0.01 * 0.99)),
  "sft": None,
  "mapo": None,
  "kto": 0.5,
}
WITHOUT = ("sft", "mapo")


def make_task(base_folder, data, name, **more):
  config = tiny.config(base_folder, path=f"configs/emoji_{name}.py", batch_size=8, **more)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  return config, tasks.preference_task(config, base, stages.open_data(config, base, data))


def evaluated(task, params, count=8):
  """Examples of the validation batch, and what the objective makes of them."""
  batch = jax.tree.map(lambda x: x[:count], task.validation)
  examples = jax.jit(task.objective.draw)(batch, jax.random.key(3))
  return examples, jax.jit(task.objective.loss)(params, task.frozen, examples)


@pytest.mark.parametrize("name", METHODS)
def test_training(tiny_base, tiny_data, tmp_path, name):
  config, task = make_task(tiny_base, tiny_data, name, steps=2, validate_every=2, save_every=2)
  assert (task.frozen.reference is None) == (name in WITHOUT)
  params = train.train(config, task, tmp_path / "run", jax.devices()[:1])
  changed = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), params, task.params)
  assert all(jax.tree.leaves(changed))
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  start, first, last = map(json.loads, lines)
  if METHODS[name] is not None:
    assert start["validation/margin_abs_max"] == first["train/margin_abs_max"] == 0.0
    assert start["validation/accuracy"] == 0.5
    assert start["validation/winner_advantage"] == 0.0
    # float32, and where a term is kappa = 500 times a difference of 0, exactly that.
    assert start["validation/loss"] == pytest.approx(METHODS[name], rel=1e-6)
    assert last["validation/margin_abs_max"] > 0.0
  else:
    fields = {field.split("/")[1] for field in start}
    assert not fields & {"winner_advantage", "loser_advantage"}
    assert ("margin" in fields) == (name == "mapo")
  if name == "sdpo":
    assert 0 < first["train/loser_scale"] < 1
  found = doctor_run.examine(tmp_path / "run").findings
  assert not [each for each in found if each.rule.level == "error"]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sdpo", "kto"])
def test_margins_at_step_0_are_exactly_zero(tiny_base, tiny_data, name, compute):
  """Of the two methods whose errors take another path than the plain losses of the margin."""
  settings = {"precision.compute": compute, "precision.reference": compute}
  _, task = make_task(tiny_base, tiny_data, name, **settings)

  @jax.jit
  def with_gradient(params, examples):
    def mean_loss(params):
      values, metrics = task.objective.loss(params, task.frozen, examples)
      return values.mean(), metrics

    return jax.grad(mean_loss, has_aux=True)(params)

  batch = jax.tree.map(lambda x: x[:8], task.validation)
  examples = jax.jit(task.objective.draw)(batch, jax.random.key(3))
  _, metrics = with_gradient(task.params, examples)
  assert not np.any(metrics["margin"])
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  _, metrics = with_gradient(moved, examples)
  assert np.abs(metrics["margin"]).max() > 1e-3


def test_loser_scaling_scales_the_losers_gradient_alone(tiny_base, tiny_data):
  """The gradient is that of the plain loss with s d err_l in place of d err_l, s formed in float64
  from the network's outputs; errors and margins are those of the plain objective."""
  _, plain = make_task(tiny_base, tiny_data, "dmpo")
  config, task = make_task(tiny_base, tiny_data, "sdpo")
  moved = jax.tree.map(lambda x: x * 1.001, task.params)
  examples, (values, metrics) = evaluated(task, moved)
  _, (expected, expected_metrics) = evaluated(plain, moved)
  # kappa = 500 times errors of which each may be rounded otherwise by 2^-24.
  atol = 500 * 4 * 2.0**-24
  np.testing.assert_allclose(metrics["margin"], expected_metrics["margin"], atol=atol)
  np.testing.assert_allclose(values, expected, atol=2 * atol)

  denoiser = base_lib.load_base(config.base).denoiser()
  conditions = objectives.conditions_of(denoiser, task.frozen, examples)
  left = np.asarray(objectives.pair_residuals(denoiser, moved, examples, conditions))
  scales = [oracles.loser_scale(*pair, config.objective.loser_scaling) for pair in left]
  np.testing.assert_allclose(metrics["loser_scale"], scales, rtol=1e-4)
  assert min(scales) < 1

  def by_hand(params):
    err = objectives.pair_errors(denoiser, params, examples, conditions)
    fixed = jax.lax.stop_gradient(err[:, 1])
    err_l = fixed + jnp.asarray(scales, jnp.float32) * (err[:, 1] - fixed)
    ref_err = objectives.pair_errors(denoiser, task.frozen.reference, examples, conditions)
    loss = functools.partial(losses.dmpo_loss, beta=config.objective.beta, alpha=0.01)
    return loss(err[:, 0], err_l, ref_err[:, 0], ref_err[:, 1])[0].mean()

  def as_coded(params):
    return task.objective.loss(params, task.frozen, examples)[0].mean()

  got, wanted = (jax.jit(jax.grad(f))(moved) for f in (as_coded, by_hand))
  scale = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
  for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4 * scale)


def test_sft_is_the_winners_error_whatever_the_loser(tiny_base, tiny_data):
  _, task = make_task(tiny_base, tiny_data, "sft")
  examples, (values, metrics) = evaluated(task, task.params)
  assert examples.latents.shape[1] == 1
  np.testing.assert_array_equal(values, metrics["denoising_loss"])
  blind = task.validation._replace(moments_l=np.full_like(task.validation.moments_l, np.nan))
  _, (other, _) = evaluated(task._replace(validation=blind), task.params)
  np.testing.assert_array_equal(other, values)


def test_mapo_is_its_loss_of_the_two_errors(tiny_base, tiny_data):
  _, task = make_task(tiny_base, tiny_data, "mapo")
  _, (values, metrics) = evaluated(task, task.params)
  errors = metrics["winner_error"], metrics["loser_error"]
  expected, u = oracles.mapo(*errors, beta_mapo=0.1, snr_value=0.5)
  np.testing.assert_allclose(metrics["margin"], u, rtol=1e-4, atol=2e-4)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_kto_sees_single_images_with_noise_of_their_own(tiny_base, tiny_data):
  """The loss is the oracle's of 2 B images; each has its timestep; the pairing does not matter."""
  config, task = make_task(tiny_base, tiny_data, "kto")
  moved = jax.tree.map(lambda x: x * 1.001, task.params)
  examples, (values, metrics) = evaluated(task, moved)
  assert examples.noising.timesteps.shape == (8, 2)
  assert np.any(examples.noising.timesteps[:, 0] != examples.noising.timesteps[:, 1])
  assert (
    np.abs(
      np.corrcoef(examples.noising.noise[:, 0].ravel(), examples.noising.noise[:, 1].ravel())[0, 1]
    )
    < 0.1
  )
  gain = np.stack([metrics["winner_advantage"], metrics["loser_advantage"]], axis=1)
  kappa, label = config.objective.beta / 2, np.array([[True, False]] * 8)
  expected, _ = oracles.kto(
    np.zeros_like(gain), gain, label, kappa=kappa, weights=(1, 1), utility="sigmoid"
  )
  np.testing.assert_allclose(values, expected.mean(axis=1), rtol=1e-4)
  np.testing.assert_allclose(metrics["baseline"], kappa * max(0, gain.mean()), rtol=1e-4, atol=1e-6)
  # Losers of other pairs beside the winners: the same images, the same mean.
  turned = examples._replace(
    latents=examples.latents.at[:, 1].set(jnp.roll(examples.latents[:, 1], 1, axis=0)),
    noising=jax.tree.map(lambda x: x.at[:, 1].set(jnp.roll(x[:, 1], 1, axis=0)), examples.noising),
    input_ids=jnp.broadcast_to(examples.input_ids[:1], examples.input_ids.shape),
  )
  same = examples._replace(input_ids=turned.input_ids)
  one, other = (jax.jit(task.objective.loss)(moved, task.frozen, e)[0] for e in (same, turned))
  np.testing.assert_allclose(one.mean(), other.mean(), rtol=1e-5)


def test_ktos_baseline_is_that_of_all_devices(tiny_base, tiny_data):
  """Four devices, two pairs on each, give the values of one with all eight."""
  _, task = make_task(tiny_base, tiny_data, "kto")
  moved = jax.tree.map(lambda x: x * 0.999, task.params)
  examples, (values, metrics) = evaluated(task, moved)
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:4])
  placed = jax.device_put(examples, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    spread, spread_metrics = jax.jit(
      lambda e: sharding.map_rows(task.objective.loss, moved, task.frozen, e)
    )(placed)
  np.testing.assert_allclose(spread_metrics["baseline"], metrics["baseline"], rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(spread, values, rtol=1e-4)
  assert np.ptp(spread_metrics["baseline"]) == 0


def test_settled_draws_of_kto_are_its_own(tiny_base, tiny_data):
  """Stored errors stand for the reference as with the other methods, and are not shared."""
  config, task = make_task(tiny_base, tiny_data, "kto")
  batch = jax.tree.map(lambda x: x[:4], task.validation)._replace(draw=np.arange(4, dtype=np.int32))
  one, other = (
    jax.jit(task.objective.draw)(batch, jax.random.key(seed)).noising for seed in (0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert one.timesteps.shape == (4, 2)
