"""optimizer.py: schedules by hand, updates against float64 loops and torch's Adafactor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import optimization

from dmpo_jax import config as config_lib
from dmpo_jax import optimizer

PLAIN = config_lib.OptimConfig(
  name="adamw",
  learning_rate=0.01,
  schedule="constant",
  warmup_steps=0,
  b1=0.9,
  b2=0.99,
  eps=1e-8,
  weight_decay=0.0,
  clip_norm=1e6,
  ema_decay=0.0,
)


def settings(**changes):
  return dataclasses.replace(PLAIN, **changes)


def random_tree(seed, shapes=((3, 2), (4,))):
  generator = np.random.default_rng(seed)
  return {f"w{i}": generator.standard_normal(shape, np.float32) for i, shape in enumerate(shapes)}


def run(config, params, gradients, steps=100):
  """[params after each update], and the last optimiser state."""
  rule = optimizer.make_optimizer(config, steps)

  @jax.jit
  def step(params, state, grads):
    updates, state = rule.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.asarray, params)
  state, history = rule.init(params), []
  for grads in gradients:
    params, state = step(params, state, grads)
    history.append(params)
  return history, state


def assert_close(tree, expected, rtol=1e-5, atol=1e-6):
  assert tree.keys() == expected.keys()
  for name, leaf in tree.items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_allclose(leaf, expected[name], rtol=rtol, atol=atol, err_msg=name)


# --- schedules ---


@pytest.mark.parametrize(
  "schedule, warmup, expected",
  [  # peak 8, 10 steps
    ("constant", 0, {0: 8, 5: 8, 9: 8}),
    ("constant", 1, {0: 8, 1: 8, 9: 8}),
    ("constant", 4, {0: 2, 1: 4, 2: 6, 3: 8, 4: 8, 9: 8}),
    ("linear", 0, {0: 8, 5: 4, 9: 0.8, 10: 0}),
    ("linear", 2, {0: 4, 1: 8, 2: 8, 4: 6, 6: 4, 9: 1, 10: 0}),
    ("cosine", 0, {0: 8, 5: 4, 10: 0}),
    # (1 + cos(pi k / 8)) / 2 of 8 for k = 0, 2, 4, 6
    ("cosine", 2, {0: 4, 1: 8, 2: 8, 4: 4 + 8**0.5, 6: 4, 8: 4 - 8**0.5, 10: 0}),
  ],
)
def test_schedules_pass_through_points_by_hand(schedule, warmup, expected):
  rate = optimizer.learning_rate(
    settings(learning_rate=8.0, schedule=schedule, warmup_steps=warmup), 10
  )
  for step, value in expected.items():
    assert float(rate(step)) == pytest.approx(value, rel=1e-6, abs=1e-6), step
    assert float(jax.jit(rate)(jnp.int32(step))) == pytest.approx(value, rel=1e-6, abs=1e-6), step


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_first_update_already_moves_by_its_share_of_the_peak(name):
  """Both rules normalise the first gradient to its sign, so that the update is -lr sign(g)."""
  config = settings(name=name, learning_rate=0.5, warmup_steps=5)
  params, grads = {"w": np.zeros(4, np.float32)}, {"w": np.float32([1.0, -2.0, 3.0, -4.0])}
  history, _ = run(config, params, [grads] * 2)
  np.testing.assert_allclose(history[0]["w"], -0.1 * np.sign(grads["w"]), rtol=1e-5)
  # The second step's rate is 0.2, and the gradient is what it was.
  np.testing.assert_allclose(history[1]["w"], -0.3 * np.sign(grads["w"]), rtol=1e-5)


def test_the_last_update_of_a_decay_still_moves():
  for schedule in ("linear", "cosine"):
    rate = optimizer.learning_rate(settings(schedule=schedule, warmup_steps=3), 20)
    assert float(rate(19)) > 0 == float(rate(20))


# --- clip and AdamW ---


def adamw_oracle(config, params, gradients, steps):
  """Loshchilov and Hutter, algorithm 2, behind clipping by global norm; float64."""
  params = {name: np.float64(leaf) for name, leaf in params.items()}
  m = {name: 0.0 * leaf for name, leaf in params.items()}
  v = {name: 0.0 * leaf for name, leaf in params.items()}
  history = []
  for t, grads in enumerate(gradients):
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
    scale = min(1.0, config.clip_norm / norm)
    share = 1 - t / steps if config.schedule == "linear" else 1.0
    for name in params:
      g = scale * np.float64(grads[name])
      m[name] = config.b1 * m[name] + (1 - config.b1) * g
      v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
      m_hat = m[name] / (1 - config.b1 ** (t + 1))
      v_hat = v[name] / (1 - config.b2 ** (t + 1))
      update = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * params[name]
      params[name] = params[name] - share * config.learning_rate * update
    history.append(dict(params))
  return history


def test_adamw_is_clip_then_the_papers_algorithm():
  config = settings(schedule="linear", weight_decay=0.1, clip_norm=2.0, eps=1e-3)
  params = random_tree(0)
  # Norms around 3, some far above and some below the clip.
  gradients = [
    {name: leaf * factor for name, leaf in random_tree(seed).items()}
    for seed, factor in enumerate((1.0, 50.0, 0.1, 1.0, 0.01, 2.0), 1)
  ]
  history, _ = run(config, params, gradients, steps=6)
  for ours, expected in zip(history, adamw_oracle(config, params, gradients, 6), strict=True):
    assert_close(ours, expected)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_gradients_beyond_the_clip_count_as_if_on_it(name):
  params, small = random_tree(0), random_tree(1)
  norm = float(optax.tree.norm(small))
  huge = {key: 100 * leaf for key, leaf in small.items()}
  config = settings(name=name, clip_norm=norm)
  same, _ = run(config, params, [random_tree(2), small, small])
  clipped, _ = run(config, params, [random_tree(2), huge, huge])
  unclipped, _ = run(settings(name=name), params, [random_tree(2), huge, huge])
  assert_close(clipped[-1], jax.tree.map(np.asarray, same[-1]))
  assert max(np.abs(clipped[-1][key] - unclipped[-1][key]).max() for key in params) > 1e-3


# --- Adafactor ---


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (128, 160)])
def test_adafactor_is_that_of_the_launcher_in_torch(shape, weight_decay):
  """transformers' Adafactor factors every matrix, optax only those of 128 rows and more."""
  config = settings(name="adafactor", weight_decay=weight_decay)
  params = random_tree(0, (shape,))
  gradients = [
    {"w0": leaf * factor}
    for factor, leaf in zip(
      (1.0, 30.0, 0.1, 1.0), (random_tree(s, (shape,))["w0"] for s in range(1, 5)), strict=True
    )
  ]
  history, _ = run(config, params, gradients)
  weight = torch.nn.Parameter(torch.from_numpy(params["w0"].copy()))
  if shape == (3, 4):  # flat, so that torch does not factor it either
    weight = torch.nn.Parameter(weight.detach().reshape(-1).clone())
  theirs = optimization.Adafactor(
    [weight],
    lr=config.learning_rate,
    weight_decay=weight_decay,
    clip_threshold=1.0,
    scale_parameter=False,
    relative_step=False,
  )
  for grads, ours in zip(gradients, history, strict=True):
    weight.grad = torch.from_numpy(grads["w0"]).reshape(weight.shape)
    theirs.step()
    assert_close(ours, {"w0": weight.detach().numpy().reshape(shape)}, rtol=1e-4, atol=2e-6)


def test_adafactor_keeps_rows_and_columns_only():
  params = {"w": jnp.ones((256, 128)), "b": jnp.ones(128)}
  state = optimizer.make_optimizer(settings(name="adafactor", weight_decay=0.01), 10).init(params)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert 256 + 128 + 128 <= numbers < 256 + 128 + 128 + 16


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_is_scaled_by_the_learning_rate(name):
  """Without a gradient, only decay is left: (1 - lr * decay)^n."""
  config = settings(name=name, learning_rate=0.1, weight_decay=0.2)
  params = {"w": np.float32([1.0, -2.0])}
  history, _ = run(config, params, [{"w": np.zeros(2, np.float32)}] * 3)
  np.testing.assert_allclose(history[-1]["w"], params["w"] * 0.98**3, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_both_rules_descend(name):
  target = random_tree(3)
  params = jax.tree.map(np.zeros_like, target)
  config = settings(name=name, learning_rate=0.05, schedule="cosine", clip_norm=1.0)
  rule = optimizer.make_optimizer(config, 200)

  @jax.jit
  def descend(params):
    def step(carry, _):
      params, state = carry
      grads = jax.tree.map(lambda p, t: 2 * (p - t), params, target)
      updates, state = rule.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, rule.init(params)), length=200)[0][0]

  assert_close(descend(params), target, atol=0.02)


# --- the average ---


def test_average_follows_the_updated_parameters():
  decay = 0.8
  params = random_tree(0)
  gradients = [random_tree(seed) for seed in range(1, 7)]
  history, state = run(settings(ema_decay=decay), params, gradients)
  expected = {name: np.float64(leaf) for name, leaf in params.items()}  # starts at the start
  for each in history:
    for name in expected:
      expected[name] = decay * expected[name] + (1 - decay) * np.float64(each[name])
  averaged = optimizer.averaged_params(state, history[-1])
  assert_close(averaged, expected, atol=1e-7)
  assert max(np.abs(averaged[name] - history[-1][name]).max() for name in params) > 1e-3
  # Keeping an average does not change what is averaged.
  without, _ = run(settings(), params, gradients)
  assert_close(history[-1], jax.tree.map(np.asarray, without[-1]), rtol=0, atol=0)


def test_without_an_average_the_parameters_are_returned():
  params = jax.tree.map(jnp.asarray, random_tree(0))
  for name in ("adamw", "adafactor"):
    state = optimizer.make_optimizer(settings(name=name), 10).init(params)
    assert optimizer.averaged_params(state, params) is params
    state = optimizer.make_optimizer(settings(name=name, ema_decay=0.9), 10).init(params)
    averaged = optimizer.averaged_params(state, None)
    assert_close(averaged, params, rtol=0, atol=0)
    for leaf, other in zip(jax.tree.leaves(averaged), jax.tree.leaves(params), strict=True):
      # A copy: training gives its buffers away.
      assert leaf.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
