"""The sharded step: the same numbers on every mesh, one compilation, no activations sent around."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import hlo, objectives, program, sharding, tasks, types
from dmpo_jax.models import shards

PAIRS = 8


@functools.cache
def problem(name="emoji"):
  """Parameters, frozen, objective and a batch of a base, with the policy off its reference."""
  base = base_lib.load_base(name, remat="layers")
  generator = np.random.default_rng(0)
  height, width, channels = base.latent_shape
  moments = generator.standard_normal((2, PAIRS, height, width, 2 * channels), np.float32)
  batch = types.PreferenceBatch(*moments, base.tokenizer(["love", "cat"] * (PAIRS // 2)))
  params = jax.tree.map(
    lambda p: p * (1 + 0.05 * generator.standard_normal(p.shape, np.float32)), base.params["unet"]
  )
  # A gentle beta: at the demo's, rounding of the errors is a thousandth of the loss.
  config = tiny.config(name, **{"objective.beta": 10.0})
  frozen = objectives.Frozen(base.params["unet"], base.text_params)
  return params, frozen, tasks.make_objective(config, base), batch


def run(mesh, accumulation=1, steps=1, name="emoji"):
  """The compiled program's text, its first metrics, and the change of the parameters."""
  params, frozen, objective, batch = problem(name)
  built = program.make_program(params, frozen, objective, optax.sgd(1.0), mesh, accumulation)
  state = program.initial_state(built, params, optax.sgd(1.0))
  there = sharding.put_tree(frozen, built.frozen)
  rows = sharding.put_batch(batch, mesh)
  key = jax.device_put(jax.random.key(0), built.everywhere)
  with jax.set_mesh(mesh):
    for step in range(steps):
      state, metrics = built.step(state, there, rows, key)
      if step == 0:
        first = jax.tree.map(float, metrics)
  change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
  return built, first, change


@functools.cache
def alone():
  return run(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("data, fsdp, accumulation", [(8, 1, 1), (1, 8, 1), (4, 2, 1), (2, 2, 2)])
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(data, fsdp, accumulation):
  mesh = sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])
  _, metrics, change = run(mesh, accumulation)
  _, expected, gradient = alone()
  assert abs(expected["margin_abs_max"]) > 1e-3  # the policy is not the reference
  for name, value in expected.items():
    # Means over the batch, of float32 errors that were summed in another order.
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
  for ours, theirs in zip(jax.tree.leaves(change), jax.tree.leaves(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)


@pytest.mark.slow
def test_parameters_are_gathered_and_activations_stay():
  mesh = sharding.make_mesh(4, 2, jax.devices())
  params, frozen, objective, batch = problem()
  built = program.make_program(params, frozen, objective, optax.adam(1e-3), mesh)
  found = hlo.find_collectives(program.lower(built, mesh, frozen, batch).compile().as_text())
  assert "all-to-all" not in found and "collective-permute" not in found
  leaves, places = jax.tree.leaves(params), jax.tree.leaves(built.state.params)
  split = [leaf.size for leaf, at in zip(leaves, places, strict=True) if "fsdp" in at.spec]
  number, size = found["all-gather"]
  assert len(split) > 5
  # The policy for both passes and the reference; the compiler may gather the first once or twice.
  assert 2 * len(split) <= number <= 3 * len(split) + 4
  assert 2 * 4 * sum(split) <= size <= 1.05 * 3 * 4 * sum(split)


@pytest.mark.slow
def test_a_hundred_steps_are_compiled_once(tiny_base):
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  built, metrics, _ = run(mesh, steps=100, name=str(tiny_base))
  assert built.step._cache_size() == 1
  assert np.isfinite(metrics["loss"])


def squares(params, frozen, rows):
  """(Gradient of the mean over the rows, a value by row)."""

  def loss(params):
    kernel, bias = shards.gathered(params["kernel"]), shards.gathered(params["bias"])
    values = jnp.square(rows @ kernel + bias[None]).sum(axis=1)
    return values.mean(), values

  return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("data, fsdp", [(1, 4), (2, 2), (4, 1)])
def test_gradients_go_back_to_where_parameters_lie(data, fsdp):
  mesh = sharding.make_mesh(data, fsdp, jax.devices()[:4])
  generator = np.random.default_rng(0)
  host = {
    "kernel": generator.standard_normal((512, 256), np.float32),
    "bias": generator.standard_normal(256, np.float32),
  }
  rows = generator.standard_normal((8, 512), np.float32)
  places = sharding.fsdp_shardings(host, mesh)
  there = jax.device_put(rows, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    gradients, values = jax.jit(functools.partial(sharding.mean_gradients, squares))(
      sharding.put_tree(host, places), None, there
    )
  for name, place in places.items():
    assert gradients[name].sharding.is_equivalent_to(place, host[name].ndim)
  assert values.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 1)
  # float64 NumPy; float32 sums of 512 products.
  outputs = rows.astype(np.float64) @ host["kernel"] + host["bias"]
  np.testing.assert_allclose(values, np.square(outputs).sum(axis=1), rtol=1e-5)
  expected = {"kernel": 2 * rows.T @ outputs / 8, "bias": 2 * outputs.mean(axis=0)}
  for name, value in expected.items():
    np.testing.assert_allclose(gradients[name], value, atol=1e-5 * np.abs(value).max())


@pytest.mark.parametrize("split", [True, False])
def test_rows_are_worked_on_where_they_lie_or_everywhere(split):
  mesh = sharding.make_mesh(1, 4, jax.devices()[:4])
  kernel = {"kernel": np.ones((512, 256), np.float32)}
  place = sharding.fsdp_shardings(kernel, mesh)
  rows = np.arange(8 * 512, dtype=np.float32).reshape(8, 512) / 4096

  def product(params, frozen, rows):
    assert rows.shape[0] == (2 if split else 8)
    return rows @ shards.gathered(params)["kernel"]

  with jax.set_mesh(mesh):
    function = jax.jit(functools.partial(sharding.map_rows, product, split=split))
    got = function(sharding.put_tree(kernel, place), None, rows)
  np.testing.assert_allclose(got, rows @ kernel["kernel"], rtol=1e-5)


def test_without_a_mesh_parameters_are_as_they_were():
  params = {"kernel": jnp.ones((512, 512))}
  assert sharding.map_rows(lambda params, frozen, rows: params, params, None, None) is params
  assert shards.gathered(params)["kernel"] is params["kernel"]
