"""The objectives: what each makes of errors; every method on real topologies is in test_methods."""

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
from dmpo_jax import doctor_run, losses, objectives, sharding, stages, tasks, train, types

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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse")
def test_a_run_without_margin_and_reference(tiny_base, tiny_data, tmp_path):
  """The loop, its records and checkpoints, and the doctor, for SFT, which logs the least."""
  config, task = make_task(tiny_base, tiny_data, "sft", steps=2, validate_every=2, save_every=2)
  params = train.train(config, task, tmp_path / "run", jax.devices()[:1])
  changed = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), params, task.params)
  assert all(jax.tree.leaves(changed))
  start, *_, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  assert {name for name in start if name.startswith("validation/")} == {
    "validation/loss",
    "validation/denoising_loss",
  }
  assert last["validation/loss"] < start["validation/loss"]
  found = doctor_run.diagnose(tmp_path / "run")
  assert found.ok and not {each.code for each in found.findings} & {"not-exact", "no-validation"}


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_margins_at_step_0_are_exactly_zero_with_loser_scaling(tiny_base, tiny_data, compute):
  """Its errors are made of residuals, which another value is made of too."""
  settings = {"precision.compute": compute, "precision.reference": compute}
  _, task = make_task(tiny_base, tiny_data, "sdpo", **settings)

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


# What each makes of errors, on a network of one matrix.

PAIRS = 8


def network(params, noisy, timesteps, conditions):
  embeds = conditions.prompt_embeds  # a row for each pair
  bias = embeds.mean(axis=1).repeat(len(noisy) // len(embeds), axis=0)[:, None, None]
  return noisy @ params["kernel"] + bias + 0.001 * timesteps[:, None, None, None]


DENOISER = objectives.Denoiser(
  unet=network,
  embed=lambda encoders, ids, time_ids: types.Conditions(encoders["table"][ids]),
  alphas_cumprod=jnp.linspace(0.999, 0.01, 100),
  prediction_type="epsilon",
  scaling_factor=1.0,
  dtype=jnp.float32,
)


def problem(name, seed=0, moved=0.1):
  """Objective, a policy moved away from its reference, what is frozen, a batch."""
  config = tiny.config("emoji", path=f"configs/emoji_{name}.py")
  generator = np.random.default_rng(seed)
  moments = generator.standard_normal((2, PAIRS, 2, 2, 6)).astype(np.float32)
  moments[1] = 2 * moments[0] + moments[1]
  ids = generator.integers(0, 5, (PAIRS, 3)).astype(np.int32)
  table, kernel, change = (
    generator.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (3, 3), (3, 3))
  )
  make = tasks.OBJECTIVES.get(config.objective.method, tasks.margin_objective)
  objective = make(config.objective, DENOISER, objectives.Draw())
  frozen = objectives.Frozen({"kernel": kernel}, {"table": 0.1 * table})
  params = {"kernel": kernel + np.float32(moved) * change}
  return config.objective, objective, params, frozen, types.PreferenceBatch(*moments, ids)


def evaluate(objective, params, frozen, batch):
  examples = objective.draw(batch, jax.random.key(3))
  return examples, objective.loss(params, frozen, examples)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_reference_gets_no_gradient_and_closed_values_hold(name):
  _, objective, params, frozen, batch = problem(name, moved=0.001)
  examples = objective.draw(batch, jax.random.key(3))

  def total(params, frozen):
    values, _ = objective.loss(params, frozen, examples)
    return values.sum(), values

  gradients, values = jax.grad(total, (0, 1), has_aux=True)(params, frozen)
  own, reference = gradients
  assert np.any(own["kernel"]) and not np.any(reference.reference["kernel"])
  assert values.shape == (PAIRS,)
  if name in WITHOUT:  # nothing of the reference is read
    objective.loss(params, frozen._replace(reference=None), examples)
    return
  # Not jitted: XLA fuses this network's one product with the sum of squares as it likes.
  at_reference, metrics = objective.loss(frozen.reference, frozen, examples)
  np.testing.assert_allclose(at_reference, np.full(PAIRS, METHODS[name]), rtol=1e-6)
  np.testing.assert_array_equal(metrics["margin"], np.zeros(PAIRS))


def test_loser_scaling_scales_the_losers_gradient_alone():
  """Values are the plain loss's, the gradient is it with s times the loser's; s in float64."""
  _, plain, params, frozen, batch = problem("dmpo", moved=0.002)
  config, scaled, *_ = problem("sdpo", moved=0.002)
  examples, (values, metrics) = evaluate(scaled, params, frozen, batch)
  _, (expected, expected_metrics) = evaluate(plain, params, frozen, batch)
  # kappa = 500 times errors near 10, rounded otherwise by 2^-24 of them.
  np.testing.assert_allclose(metrics["margin"], expected_metrics["margin"], atol=5e-3)
  np.testing.assert_allclose(values, expected, atol=5e-3)
  conditions = objectives.conditions_of(DENOISER, frozen, examples)
  left = objectives.pair_residuals(DENOISER, params, examples, conditions)
  scales = [oracles.loser_scale(*pair, config.loser_scaling) for pair in np.asarray(left)]
  np.testing.assert_allclose(metrics["loser_scale"], scales, rtol=1e-4)
  assert min(scales) < 0.1 and max(scales) == 1.0

  def by_hand(params):
    err = objectives.pair_errors(DENOISER, params, examples, conditions)
    fixed = jax.lax.stop_gradient(err[:, 1])
    err_l = fixed + jnp.asarray(scales, jnp.float32) * (err[:, 1] - fixed)
    ref_err = objectives.pair_errors(DENOISER, frozen.reference, examples, conditions)
    loss = functools.partial(losses.dmpo_loss, beta=config.beta, alpha=config.alpha)
    return loss(err[:, 0], err_l, ref_err[:, 0], ref_err[:, 1])[0].mean()

  got = jax.grad(lambda p: scaled.loss(p, frozen, examples)[0].mean())(params)["kernel"]
  wanted = jax.grad(by_hand)(params)["kernel"]
  np.testing.assert_allclose(got, wanted, atol=2e-3 * np.abs(wanted).max())
  other = jax.grad(lambda p: plain.loss(p, frozen, examples)[0].mean())(params)["kernel"]
  assert np.abs(other - wanted).max() > 0.1 * np.abs(wanted).max()


def test_sft_is_the_winners_error_whatever_the_loser():
  _, objective, params, frozen, batch = problem("sft")
  examples, (values, metrics) = evaluate(objective, params, frozen, batch)
  assert examples.latents.shape == (PAIRS, 1, 2, 2, 3)
  np.testing.assert_array_equal(values, metrics["denoising_loss"])
  blind = batch._replace(moments_l=np.full_like(batch.moments_l, np.nan))
  np.testing.assert_array_equal(evaluate(objective, params, frozen, blind)[1][0], values)
  conditions = objectives.conditions_of(DENOISER, frozen, examples)
  noise, x = np.float64(examples.noising.noise), np.float64(examples.latents[:, 0])
  level = np.float64(DENOISER.alphas_cumprod)[examples.noising.timesteps][:, None, None, None]
  output = network(
    params, np.sqrt(level) * x + np.sqrt(1 - level) * noise, examples.noising.timesteps, conditions
  )
  np.testing.assert_allclose(values, ((output - noise) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_mapo_is_its_loss_of_the_two_errors():
  _, objective, params, frozen, batch = problem("mapo")
  _, (values, metrics) = evaluate(objective, params, frozen, batch)
  errors = metrics["winner_error"], metrics["loser_error"]
  expected, u = oracles.mapo(*errors, beta_mapo=0.1, snr_value=0.5)
  np.testing.assert_allclose(metrics["margin"], u, rtol=1e-5, atol=1e-3)
  np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_kto_sees_single_images_with_noise_of_their_own():
  """The loss is the oracle's of 2 B images; whose loser stands beside a winner does not matter."""
  config, objective, params, frozen, batch = problem("kto", moved=0.003)
  batch = batch._replace(input_ids=np.broadcast_to(batch.input_ids[:1], batch.input_ids.shape))
  examples, (values, metrics) = evaluate(objective, params, frozen, batch)
  timesteps, noise = examples.noising
  assert timesteps.shape == (PAIRS, 2) and np.any(timesteps[:, 0] != timesteps[:, 1])
  assert not np.any(noise[:, 0] == noise[:, 1])
  gain = np.stack([metrics["winner_advantage"], metrics["loser_advantage"]], axis=1)
  kappa, label = config.beta / 2, np.array([[True, False]] * PAIRS)
  settings = {"kappa": kappa, "weights": (1, 1), "utility": "sigmoid"}
  expected, _ = oracles.kto(np.zeros_like(gain), gain, label, **settings)
  np.testing.assert_allclose(values, expected.mean(axis=1), rtol=1e-4, atol=1e-6)
  baseline = kappa * max(0, gain.mean())
  np.testing.assert_allclose(metrics["baseline"], np.full(PAIRS, baseline), rtol=1e-4, atol=1e-6)

  def turn(x):
    return x.at[:, 1].set(jnp.roll(x[:, 1], 1, axis=0))

  turned = examples._replace(
    latents=turn(examples.latents), noising=jax.tree.map(turn, examples.noising)
  )
  other = objective.loss(params, frozen, turned)[0]
  assert np.any(other != values)
  np.testing.assert_allclose(other.mean(), values.mean(), rtol=1e-5)


def test_ktos_baseline_is_that_of_all_devices():
  """Four devices with two pairs each give the values of one with all eight."""
  sign = next(s for s in range(9) if evaluate(*problem("kto", s, 0.003)[1:])[1][1]["baseline"][0])
  _, objective, params, frozen, batch = problem("kto", sign, 0.003)
  examples, (values, metrics) = evaluate(objective, params, frozen, batch)
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:4])
  placed = jax.device_put(examples, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    spread, spread_metrics = jax.jit(
      lambda rows: sharding.map_rows(objective.loss, params, frozen, rows)
    )(placed)
  np.testing.assert_allclose(spread_metrics["baseline"], metrics["baseline"], rtol=1e-4)
  # v is 500 times a difference of errors of about 4, rounded to 2^-22 of them by sums in another
  # order: 1.2e-4 in v and in its baseline; the utility, of slope 1/4, takes a quarter of each.
  np.testing.assert_allclose(spread, values, rtol=1e-4, atol=6e-5)


@pytest.mark.parametrize("name, shape", [("kto", (PAIRS, 2)), ("dmpo", (PAIRS,))])
def test_settled_draws_do_not_depend_on_the_key(name, shape):
  _, objective, _, _, batch = problem(name)
  batch = batch._replace(draw=np.arange(PAIRS, dtype=np.int32))
  one, other = (objective.draw(batch, jax.random.key(seed)) for seed in (0, 1))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert one.noising.timesteps.shape == shape
