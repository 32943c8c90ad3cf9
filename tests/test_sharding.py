"""Mesh, placement and batch check, on 8 CPU devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dmpo_jax import base as base_lib
from dmpo_jax import optimizer, safetensors_io, sharding, train_step
from dmpo_jax.models import init, unet

UNET = unet.UNetConfig(
  in_channels=4,
  out_channels=4,
  block_out_channels=(8, 16),
  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
  layers_per_block=1,
  cross_attention_dim=12,
  attention_head_dim=2,
  sample_size=8,
  norm_num_groups=4,
)


def unet_params():
  inputs = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.int32), np.zeros((1, 5, 12))
  return init.initial_params(unet.UNet2DConditionModel(UNET, np.dtype(np.float32)), 0, *inputs)


def chain():
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optimizer.params_ema(0.9))


def spec(shape, name="kernel", *, fsdp=2, min_size=1):
  mesh = sharding.make_mesh(fsdp=fsdp)
  tree = {"unet": {name: jax.ShapeDtypeStruct(shape, np.float32)}}
  return sharding.fsdp_shardings(tree, mesh, min_size=min_size)["unet"][name].spec


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [({}, (8, 1)), ({"fsdp": 2}, (4, 2)), ({"data": 1, "fsdp": 8}, (1, 8))],
)
def test_mesh_has_the_asked_axes(arguments, expected):
  mesh = sharding.make_mesh(**arguments)
  assert tuple(mesh.shape.items()) == (("data", expected[0]), ("fsdp", expected[1]))
  assert set(mesh.devices.flat) == set(jax.devices())
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_mesh_of_some_devices():
  mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
  assert list(mesh.devices.flat) == jax.devices()[:2]


def test_mesh_that_does_not_match_the_devices_is_refused():
  message = r"data 3 x fsdp 2 is not the 8 device\(s\).*8 x 1, 4 x 2, 2 x 4, 1 x 8"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(3, 2)
  with pytest.raises(ValueError, match="data 2 x fsdp 3 is not the 8"):
    sharding.make_mesh(fsdp=3)
  with pytest.raises(ValueError, match="expected both at least 1"):
    sharding.make_mesh(fsdp=0)
  with pytest.raises(ValueError, match="expected both at least 1"):
    sharding.make_mesh(-2, 2)


@pytest.mark.parametrize(
  ("shape", "expected"),
  [
    pytest.param((3, 3, 4, 8), (None, None, None, "fsdp"), id="largest"),
    pytest.param((3, 3, 8, 4), (None, None, "fsdp"), id="largest-not-last"),
    pytest.param((6, 6), (None, "fsdp"), id="tie-takes-last"),
    pytest.param((9, 4), (None, "fsdp"), id="largest-indivisible"),
    pytest.param((8, 8, 3, 4), (None, None, None, "fsdp"), id="never-the-window"),
    pytest.param((8,), (), id="one-axis"),
    pytest.param((), (), id="scalar"),
  ],
)
def test_largest_divisible_feature_axis_is_split(shape, expected):
  assert spec(shape) == PartitionSpec(*expected)


def test_parameters_that_cannot_be_split_are_named_with_the_nearest_number_that_can():
  message = r"fsdp: 8 divides neither of the 12 and 20 features of unet/kernel \[3, 3, 20, 12\]"
  with pytest.raises(sharding.DoesNotDivide, match=message + "; expected 6 or 10$"):
    spec((3, 3, 20, 12), fsdp=8)
  with pytest.raises(sharding.DoesNotDivide, match=r"unet/kernel \[3, 5\]; expected 1 or 3$"):
    spec((3, 5), fsdp=2)
  assert spec((3, 5), fsdp=2, min_size=16) == PartitionSpec()


def test_the_nearest_number_suits_all_parameters():
  tree = {"one": {"kernel": np.zeros((7, 12))}, "other": {"kernel": np.zeros((4, 6))}}
  with pytest.raises(sharding.DoesNotDivide, match=r"one/kernel \[7, 12\]; expected 6$"):
    sharding.fsdp_shardings(tree, sharding.make_mesh(fsdp=8), min_size=1)


def test_a_parameter_without_a_rule_is_named():
  with pytest.raises(ValueError, match=r"no rule for unet/gate \[8, 8\]; .* called kernel, embed"):
    spec((8, 8), "gate")
  assert spec((8,), "gate") == spec((8, 8), "gate", min_size=65) == PartitionSpec()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(base_lib.PUBLISHED)[::2])  # SD 1.5 and SDXL
def test_rules_cover_published_models_and_their_optimisers(name):
  base = base_lib.load_architecture(name, compute="bfloat16", kernel="tpu", remat="blocks")
  for make in (optax.adamw, optax.adafactor):
    optim = make(1e-5)
    state = jax.eval_shape(lambda p, optim=optim: train_step.init_state(p, optim), base.shapes)
    for parts in (8, 16):
      mesh = jax.sharding.AbstractMesh((1, parts), sharding.AXES)
      places = jax.tree.leaves(sharding.fsdp_shardings(state, mesh))
      sizes = [leaf.size for leaf in jax.tree.leaves(state)]
      held = sum(
        size // (parts if place.spec else 1) for size, place in zip(sizes, places, strict=True)
      )
      # What is left whole is small: less than a hundredth of the state.
      assert held - sum(sizes) / parts < 0.01 * sum(sizes)


def test_small_leaves_and_one_part_are_replicated():
  assert spec((8, 8), min_size=64) == PartitionSpec(None, "fsdp")
  assert spec((8, 8), min_size=65) == PartitionSpec()
  assert spec((8, 8), fsdp=1) == PartitionSpec()


def test_state_of_a_unet_moments_lie_with_their_parameters():
  mesh = sharding.make_mesh(fsdp=2)
  state = jax.eval_shape(lambda p: train_step.init_state(p, chain()), unet_params())
  places = sharding.fsdp_shardings(state, mesh, min_size=256)
  adam, ema = places.opt_state[1][0], places.opt_state[2].ema
  assert adam.mu == places.params
  assert adam.nu == places.params
  assert ema == places.params
  assert places.step.spec == adam.count.spec == PartitionSpec()
  split = [place for place in jax.tree.leaves(places.params) if "fsdp" in place.spec]
  assert 20 < len(split) < len(jax.tree.leaves(places.params))


def test_put_tree_places_values_and_never_aliases():
  mesh = sharding.make_mesh(fsdp=2)
  params = unet_params()
  before = jax.tree.map(np.copy, params)
  places = sharding.fsdp_shardings(params, mesh, min_size=256)
  policy = sharding.put_tree(params, places)
  reference = sharding.put_tree(params, places)
  kernel = policy["conv_in"]["kernel"]
  assert kernel.sharding == places["conv_in"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 3, 4, 4)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(policy), before)

  add = jax.jit(
    lambda p: jax.tree.map(lambda x: x + 1.0, p), donate_argnums=0, out_shardings=places
  )
  jax.block_until_ready(add(policy))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(reference), before)
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_put_tree_reads_what_was_not_read_and_takes_one_place_for_all():
  place = sharding.replicated(sharding.make_mesh())
  later = safetensors_io.Tensor((2,), np.dtype("f4"), lambda: np.arange(2, dtype="f4"))
  got = sharding.put_tree({"a": later, "b": {"c": later}}, place)
  assert jax.tree.map(lambda x: x.tolist(), got) == {"a": [0.0, 1.0], "b": {"c": [0.0, 1.0]}}
  assert got["b"]["c"].sharding == place


def test_put_tree_of_arrays_already_there_copies():
  place = sharding.replicated(sharding.make_mesh())
  source = jax.device_put(jnp.arange(64.0), place)
  copy = sharding.put_tree(source, place)
  source.delete()
  np.testing.assert_array_equal(copy, np.arange(64.0, dtype=np.float32))


def test_put_batch_gives_every_device_its_own_rows():
  mesh = sharding.make_mesh(fsdp=2)
  batch = {"x": np.arange(32.0, dtype=np.float32).reshape(16, 2), "ids": np.arange(16)}
  placed = sharding.put_batch(batch, mesh)
  assert placed["x"].sharding == sharding.batch_sharding(mesh)
  np.testing.assert_array_equal(placed["x"], batch["x"])
  rows = {s.device: np.asarray(s.data).tolist() for s in placed["ids"].addressable_shards}
  assert [rows[device] for device in mesh.devices.flat] == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_batches_are_placed_before_they_are_asked_for(ahead):
  mesh, read = sharding.make_mesh(), []

  def batches():
    for number in range(5):
      read.append(number)
      yield {"ids": np.full(8, number)}

  placed = sharding.place_ahead(batches(), mesh, ahead=ahead)
  for number in range(5):
    batch = next(placed)
    assert batch["ids"].sharding == sharding.batch_sharding(mesh)
    assert int(batch["ids"][0]) == number and len(read) == min(number + 1 + ahead, 5)
  assert next(placed, None) is None


def test_abstract_tree_keeps_shape_dtype_and_place():
  mesh = sharding.make_mesh(fsdp=2)
  tree = {"kernel": np.zeros((2, 4), np.float16)}
  places = sharding.fsdp_shardings(tree, mesh, min_size=1)
  abstract = sharding.abstract_tree(tree, places)["kernel"]
  assert (abstract.shape, abstract.dtype) == ((2, 4), np.float16)
  assert abstract.sharding == places["kernel"]


def test_jitted_step_keeps_the_placement_and_compiles_once():
  mesh, optim = sharding.make_mesh(fsdp=2), chain()

  def loss(params, frozen, batch):
    return jnp.square(batch @ params["kernel"] + params["bias"][None]).mean(axis=1), {}

  objective = train_step.Objective(lambda batch, key: batch, loss)
  params = {"kernel": jnp.ones((6, 32)), "bias": jnp.zeros(32)}
  state = train_step.init_state(params, optim)
  places = sharding.fsdp_shardings(state, mesh, min_size=64)
  step = jax.jit(
    lambda state, batch, key: train_step.train_step(
      state, None, batch, key, objective=objective, optimizer=optim
    ),
    in_shardings=(places, sharding.batch_sharding(mesh), None),
    out_shardings=(places, sharding.replicated(mesh)),
    donate_argnums=0,
  )
  batch = np.random.default_rng(0).standard_normal((16, 6), np.float32)
  first = sharding.put_tree(state, places)
  second, _ = step(first, sharding.put_batch(batch, mesh), jax.random.key(0))
  assert jax.tree.map(lambda x: x.sharding, second) == places
  assert second.opt_state[1][0].mu["kernel"].addressable_shards[0].data.shape == (6, 16)
  third, metrics = step(second, sharding.put_batch(batch, mesh), jax.random.key(0))
  assert second.params["kernel"].is_deleted()  # the donation was taken
  assert step._cache_size() == 1

  alone = jax.jit(
    lambda state: train_step.train_step(
      state, None, batch, jax.random.key(0), objective=objective, optimizer=optim
    )
  )
  one, expected = alone(alone(state)[0])
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
  np.testing.assert_allclose(third.params["kernel"], one.params["kernel"], rtol=1e-6)


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (16, 2), (64, 4)])
def test_divisible_batches_pass(size, accumulation):
  sharding.check_batch(size, accumulation, sharding.make_mesh(fsdp=2))


@pytest.mark.parametrize(
  ("size", "accumulation", "message"),
  [
    (30, 2, r"batch_size: 30 .* 8 device\(s\) x 2 accumulation .* multiple of 16: 16 or 32$"),
    (4, 1, "multiple of 8: 8$"),
    (0, 1, "multiple of 8: 8$"),
    (-8, 1, "multiple of 8: 8$"),
    (8, 0, "accumulation: 0; expected at least 1"),
  ],
)
def test_other_batches_are_refused(size, accumulation, message):
  with pytest.raises(ValueError, match=message):
    sharding.check_batch(size, accumulation, sharding.make_mesh(fsdp=2))
