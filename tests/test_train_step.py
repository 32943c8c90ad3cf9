"""The objectives and the step on a real (tiny) UNet, text encoder and encoded pairs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import losses, objectives, optimizer, stages, tasks, train_step, types
from dmpo_jax.data import pipeline

KEY = 5


def make_task(base_folder, data, **more):
  config = tiny.config(base_folder, **more)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  return config, base, tasks.preference_task(config, base, stages.open_data(config, base, data))


def batch_of(config, base, data, size=16):
  return pipeline.load_split(stages.open_data(config, base, data).splits["train"], size)


def run_step(config, task, batch, params=None, accumulation=1):
  chain = optimizer.make_optimizer(config.optim, config.steps)
  state = train_step.init_state(task.params if params is None else params, chain)
  step = functools.partial(
    train_step.train_step,
    objective=task.objective,
    optimizer=chain,
    accumulation=accumulation,
  )
  return jax.jit(step)(state, task.frozen, batch, jax.random.key(KEY))


def examples_of(task, batch):
  return jax.jit(task.objective.draw)(batch, jax.random.key(KEY))


@pytest.mark.slow
@pytest.mark.parametrize(
  "compute, reference",
  [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
def test_margins_at_step_0_are_exactly_zero(tiny_base, tiny_data, compute, reference):
  settings = {"precision.compute": compute, "precision.reference": reference}
  config, base, task = make_task(tiny_base, tiny_data, **settings)
  _, metrics = run_step(config, task, batch_of(config, base, tiny_data))
  assert float(metrics["margin_abs_max"]) == 0.0
  alpha = config.objective.alpha
  # L(0) = 0.5 log(1 / (4 alpha (1 - alpha))); 1e-6: float32 rounding of a number near 1.6.
  expected = 0.5 * np.log(1 / (4 * alpha * (1 - alpha)))
  assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
  assert float(metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_a_changed_policy_has_a_margin(tiny_base, tiny_data):
  """Guards the test above: its zero is not that of a metric that is always zero."""
  config, base, task = make_task(tiny_base, tiny_data)
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  _, metrics = run_step(config, task, batch_of(config, base, tiny_data), moved)
  assert float(metrics["margin_abs_max"]) > 1e-3


@pytest.mark.slow
def test_winner_and_loser_share_timestep_and_noise(tiny_base, tiny_data):
  """A pair whose two images are equal has margin 0 for any policy, if and only if they share both
  (the posterior sample is switched off by a log-variance of -30)."""
  config, base, task = make_task(tiny_base, tiny_data)
  batch = batch_of(config, base, tiny_data)
  moments = batch.moments_w.copy()
  moments[..., moments.shape[-1] // 2 :] = -30
  batch = types.PreferenceBatch(moments, moments, batch.input_ids)
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  _, metrics = jax.jit(task.objective.loss)(moved, task.frozen, examples_of(task, batch))
  # exp(-15) of posterior noise is left: 3e-7 of each latent.
  assert np.abs(metrics["margin"]).max() < 1e-2
  assert np.abs(metrics["winner_advantage"]).min() > 0


@pytest.mark.slow
def test_swapping_winner_and_loser_flips_the_margin(tiny_base, tiny_data):
  config, base, task = make_task(tiny_base, tiny_data)
  batch = batch_of(config, base, tiny_data)
  examples = examples_of(task, batch)
  swapped = examples._replace(latents=examples.latents[:, ::-1])
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  loss = jax.jit(task.objective.loss)
  _, one = loss(moved, task.frozen, examples)
  _, other = loss(moved, task.frozen, swapped)
  np.testing.assert_array_equal(one["margin"], -other["margin"])
  np.testing.assert_array_equal(one["winner_advantage"], other["loser_advantage"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_stored_embeddings_stand_for_the_text_encoders(tmp_path, kind):
  """Then the text encoders are in no argument."""
  config = tiny.config(tiny.make_base(tmp_path, kind=kind))
  base = base_lib.load_base(config.base)
  objective = objectives.preference_objective(
    base.denoiser(), tasks.bind_loss(config.objective), peak_weight=1.0
  )
  generator = np.random.default_rng(0)
  size = base.latent_shape[0]
  moments = generator.standard_normal((2, 4, size, size, 8), np.float32)
  ids = base.tokenizer(["a cat", "a dog", "", "love"])
  sdxl = kind == "sdxl"
  time_ids = generator.integers(0, 9, (4, 6)).astype(np.float32) if sdxl else None
  batch = types.PreferenceBatch(*moments, ids, time_ids=time_ids)
  conditions = jax.jit(base.embed)(base.text_params, ids, time_ids)
  stored = batch._replace(prompt_embeds=conditions.prompt_embeds)
  if sdxl:
    stored = stored._replace(text_embeds=conditions.added.text_embeds)
  moved = jax.tree.map(lambda x: x * 1.01, base.params["unet"])

  def run(batch, text_params):
    frozen = objectives.Frozen(base.params["unet"], text_params)
    examples = jax.jit(objective.draw)(batch, jax.random.key(KEY))
    return jax.jit(objective.loss)(moved, frozen, examples)[0]

  expected = run(batch, base.text_params)
  assert np.ptp(expected) > 1e-4  # the captions matter
  np.testing.assert_allclose(run(stored, None), expected, rtol=1e-5)  # fused otherwise
  half = stored._replace(prompt_embeds=stored.prompt_embeds.astype(np.float16))
  # Float16 keeps 11 bits of an embedding; the margins hold kappa = beta / 2 times its share.
  np.testing.assert_allclose(run(half, None), expected, rtol=1e-2)


@pytest.mark.slow
def test_errors_equal_float64_numpy(tiny_base):
  """The error is the mean over h, w, c of (eps - prediction)^2, formed in float64 from the
  network's own output."""
  base = base_lib.load_base(str(tiny_base))
  denoiser = base.denoiser()
  generator = np.random.default_rng(0)
  latents, noise = generator.standard_normal((2, 3, 4, 4, 4), np.float32)
  timesteps = np.array([0, 400, 999])
  embeds = types.Conditions(jnp.asarray(generator.standard_normal((3, 77, 16), np.float32)))
  params = base.params["unet"]
  errors = jax.jit(functools.partial(objectives.squared_errors, denoiser))
  got = errors(params, latents, noise, timesteps, embeds)
  level = np.asarray(denoiser.alphas_cumprod, np.float64)[timesteps][:, None, None, None]
  noisy = np.sqrt(level) * latents + np.sqrt(1 - level) * noise
  output = np.asarray(jax.jit(denoiser.unet)(params, np.float32(noisy), timesteps, embeds))
  expected = np.mean((noise.astype(np.float64) - output) ** 2, axis=(1, 2, 3))
  np.testing.assert_allclose(got, expected, rtol=2e-5)  # float32 input noise through the network


@pytest.mark.slow
def test_the_reference_gets_no_gradient_and_changes_the_loss(tiny_base, tiny_data):
  config, base, task = make_task(tiny_base, tiny_data)
  examples = examples_of(task, batch_of(config, base, tiny_data))

  def mean_loss(frozen):
    return jnp.mean(task.objective.loss(task.params, frozen, examples)[0])

  value, grads = jax.jit(jax.value_and_grad(mean_loss))(task.frozen)
  assert all(not np.any(g) for g in jax.tree.leaves(grads.reference))
  other = task.frozen._replace(reference=jax.tree.map(lambda x: x * 1.01, task.frozen.reference))
  assert float(mean_loss(other)) != float(value)


@pytest.mark.slow
def test_a_step_changes_the_policy_alone(tiny_base, tiny_data):
  config, base, task = make_task(tiny_base, tiny_data)
  before = jax.tree.map(np.array, task.frozen)
  state, _ = run_step(config, task, batch_of(config, base, tiny_data))
  jax.tree.map(np.testing.assert_array_equal, before, task.frozen)
  moved = [
    np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (state.params, task.params)), strict=True)
  ]
  assert all(moved) and int(state.step) == 1


@pytest.mark.slow
def test_accumulation_changes_the_order_of_additions_only(tiny_base, tiny_data):
  config, base, task = make_task(tiny_base, tiny_data)
  batch = batch_of(config, base, tiny_data)
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  whole, one = run_step(config, task, batch, moved)
  parts, four = run_step(config, task, batch, moved, accumulation=4)
  # A margin is kappa = 500 times differences of float32 errors below 1: each of the four may be
  # rounded otherwise by 2^-24, which is 3e-5 in the margin.
  rounding = config.objective.beta / 2 * 4 * 2.0**-24
  for name in one:
    atol = rounding if name == "margin" else 1e-6
    np.testing.assert_allclose(one[name], four[name], rtol=2e-4, atol=atol, err_msg=name)
  # Adam's first step is lr * sign(gradient) where it is large: 2 % of the learning rate.
  rate = config.optim.learning_rate
  for a, b in zip(*map(jax.tree.leaves, (whole.params, parts.params)), strict=True):
    assert np.mean(np.abs(a - b)) < 0.02 * rate


def test_split_batch_keeps_every_row_once():
  parts = train_step.split_batch(np.arange(12).reshape(12, 1), 3)
  assert parts.shape == (3, 4, 1)
  assert sorted(parts.reshape(-1).tolist()) == list(range(12))


@pytest.mark.slow
def test_dead_zone_counts_pairs_with_a_vanishing_gradient(tiny_base, tiny_data):
  loss = functools.partial(losses.dmpo_loss, beta=1e7, alpha=0.01)
  base = base_lib.load_base(str(tiny_base))
  objective = objectives.preference_objective(base.denoiser(), loss, peak_weight=1.2)
  config, _, task = make_task(tiny_base, tiny_data)
  examples = examples_of(task, batch_of(config, base, tiny_data))
  moved = jax.tree.map(lambda x: x * 1.01, task.params)
  _, metrics = objective.loss(moved, task.frozen, examples)
  # At such a beta every margin is far outside [-6, 6], where the gradient is below 5 % of 1.2.
  assert float(jnp.mean(metrics["dead_zone"])) > 0.8
  _, gentle = task.objective.loss(task.params, task.frozen, examples)
  assert float(jnp.mean(gentle["dead_zone"])) == 0.0


@pytest.mark.slow
def test_denoising_trains_unet_and_text_encoder(tiny_base):
  base = base_lib.load_base(str(tiny_base))
  objective = objectives.denoising_objective(base.denoiser())
  generator = np.random.default_rng(1)
  moments = jnp.asarray(generator.standard_normal((8, 4, 4, 8), np.float32))
  batch = types.CaptionedBatch(moments, jnp.asarray(base.tokenizer(["love", "sad"] * 4)))
  examples = objective.draw(batch, jax.random.key(0))
  params = {"unet": base.params["unet"], **base.text_params}

  def mean_loss(params):
    return jnp.mean(objective.loss(params, None, examples)[0])

  grads = jax.jit(jax.grad(mean_loss))(params)
  used = [np.any(g) for g in jax.tree.leaves(grads)]
  assert np.mean(used) > 0.95  # a key projection's bias cancels in the softmax


@pytest.mark.slow
def test_reconstruction_loss_equals_float64_numpy(tiny_base):
  base = base_lib.load_base(str(tiny_base))
  generator = np.random.default_rng(2)
  images = generator.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  task = tasks.autoencoder_task(
    tiny.config(
      tiny_base,
      **{
        "objective.method": "autoencoder",
        "objective.kl_weight": 0.1,
        "objective.beta": None,
        "objective.alpha": None,
        "objective.labels": None,
        "objective.sft_weight": None,
      },
    ),
    base,
    images,
  )
  examples = task.objective.draw(types.ImageBatch(jnp.asarray(images)), jax.random.key(0))
  got, _ = task.objective.loss(base.params["vae"], None, examples)
  apply = functools.partial(base.vae.apply, {"params": base.params["vae"]})
  moments = np.asarray(apply(jnp.asarray(images), method="encode"), np.float64)
  mean, logvar = np.split(moments, 2, axis=-1)
  latents = mean + np.exp(logvar / 2) * np.asarray(examples.noise)
  decoded = np.asarray(apply(jnp.asarray(latents, jnp.float32), method="decode"), np.float64)
  kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)
  expected = ((decoded - images) ** 2).mean((1, 2, 3)) + 0.1 * kl.mean((1, 2, 3))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.slow
def test_soft_labels_reach_the_loss(tiny_base, tiny_data):
  """The loss at step 0 is KL((1/2, 1/2) || (1-a, a)), a = max(alpha, 1 - p_choice) of each pair."""
  config, base, task = make_task(tiny_base, tiny_data, **{"objective.labels": "soft"})
  batch = batch_of(config, base, tiny_data)
  assert batch.p_choice.shape == (16,) and len(set(batch.p_choice.tolist())) > 4
  loss, _ = jax.jit(task.objective.loss)(task.params, task.frozen, examples_of(task, batch))
  mass = np.maximum(config.objective.alpha, 1 - batch.p_choice.astype(np.float64))
  # 1e-5: float32 logarithms of 1 - p_choice.
  np.testing.assert_allclose(loss, 0.5 * np.log(1 / (4 * mass * (1 - mass))), rtol=1e-5)
