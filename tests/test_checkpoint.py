"""Checkpoints in real orbax folders, on 8 CPU devices."""

import gc
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmpo_jax import checkpoint, optimizer, sharding, train_step

METRIC = "validation/margin"
CONFIG = {"beta": 500.0, "optim": {"lr": 1e-8}, "name": "test"}


def random_params(seed=0):
  generator = np.random.default_rng(seed)

  def normal(*shape):
    return generator.standard_normal(shape, np.float32)

  params = {
    "conv_in": {"kernel": normal(3, 3, 4, 16), "bias": normal(16)},
    "down_blocks.0": {"to_q": {"kernel": normal(32, 24)}},
    "scale": normal(7),
  }
  return jax.tree.map(jnp.asarray, params)


def chain():
  schedule = optax.linear_schedule(0.0, 1e-3, 10)
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule), optimizer.params_ema(0.9)
  )


def loss(params, frozen, batch):
  del frozen
  total = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
  return batch * total, {}


OBJECTIVE = train_step.Objective(lambda batch, key: batch, loss)


def make_step(places):
  return jax.jit(
    lambda state: train_step.train_step(
      state,
      None,
      jnp.ones(8),
      jax.random.key(0),
      objective=OBJECTIVE,
      optimizer=chain(),
    )[0],
    out_shardings=places,
    donate_argnums=0,
  )


def placed_state(mesh, seed=0):
  """(state on `mesh`, its shardings); the moments are filled as if training had gone on."""
  state = train_step.init_state(random_params(seed), chain())
  generator = np.random.default_rng(seed + 1)

  def fill(leaf):
    if leaf.dtype != np.float32:
      return np.asarray(leaf)
    return generator.standard_normal(leaf.shape, np.float32)

  state = state._replace(opt_state=jax.tree.map(fill, state.opt_state))
  places = sharding.fsdp_shardings(state, mesh, min_size=100)
  return sharding.put_tree(state, places), places


def at(state, step):
  return state._replace(step=jnp.asarray(step, jnp.int32))


def open_folder(folder, *, keep=2, reference=None, best_metric=METRIC):
  return checkpoint.Checkpoints(
    folder, keep=keep, best_metric=best_metric, reference=reference or {}, config=CONFIG
  )


def save_one(folder, step=3, **options):
  state, places = placed_state(sharding.make_mesh(fsdp=2))
  state = at(state, step)
  with open_folder(folder, **options) as checkpoints:
    assert checkpoints.save(state, {METRIC: 0.5})
  return state, sharding.abstract_tree(state, places)


def assert_same_bits(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# fingerprint


def test_fingerprint_is_of_dtype_shape_and_bits():
  leaf = np.arange(6, dtype=np.float32).reshape(2, 3)
  base = checkpoint.fingerprint({"a": leaf})["a"]
  assert base == checkpoint.fingerprint({"a": leaf.copy()})["a"]
  flipped = leaf.copy()
  flipped.view(np.uint32)[1, 1] ^= 1
  others = [leaf.T, leaf.reshape(3, 2), leaf[::-1], flipped, leaf.view(np.int32), -leaf]
  prints = [checkpoint.fingerprint({"a": other})["a"] for other in others]
  assert len({base, *prints}) == 1 + len(others)
  assert base.startswith("float32[2,3]:")


def test_fingerprint_against_python_integers():
  mask = 2**64 - 1
  values = np.random.default_rng(0).standard_normal((5, 3, 2)).astype(jnp.bfloat16)
  total = 0
  for position, bits in enumerate(values.view(np.uint16).ravel().tolist()):
    word = (position * 0x9E3779B97F4A7C15 + bits) & mask
    word = (word ^ word >> 32) * 0xD6E8FEB86659FD93 & mask
    total += word ^ word >> 32
  expected = {"a": f"bfloat16[5,3,2]:{total & mask:016x}"}
  assert checkpoint.fingerprint({"a": values}) == expected
  assert checkpoint.fingerprint({"a": jnp.asarray(values)}) == expected


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 200_000])
def test_fingerprint_of_long_arrays_does_not_depend_on_chunks(size, monkeypatch):
  values = np.random.default_rng(size).standard_normal((size, 2), np.float32)
  whole = checkpoint.fingerprint(values)
  monkeypatch.setattr(checkpoint, "_CHUNK", 2**20)
  assert checkpoint.fingerprint(values) == whole


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (1, 8)])
def test_fingerprint_does_not_depend_on_the_mesh(data, fsdp):
  params = {"kernel": np.random.default_rng(0).standard_normal((3, 16, 8), np.float32)}
  places = sharding.fsdp_shardings(params, sharding.make_mesh(data, fsdp), min_size=1)
  placed = sharding.put_tree(params, places)
  assert checkpoint.fingerprint(placed) == checkpoint.fingerprint(params)


def test_fingerprint_of_empty_and_scalar_leaves():
  prints = checkpoint.fingerprint((np.zeros((0, 3), np.float32), np.int32(0), np.int32(1)))
  assert prints["0"] == "float32[0,3]:" + "0" * 16
  assert prints["1"] == "int32[]:" + "0" * 16
  assert prints["2"] != prints["1"]


def test_fingerprint_refuses_paths_that_coincide():
  leaf = np.zeros(1)
  with pytest.raises(ValueError, match="a.b: two leaves have this path"):
    checkpoint.fingerprint({"a": {"b": leaf}, "a.b": leaf})


# round trip


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(4, 2), (1, 8), (8, 1)])
def test_state_comes_back_bit_for_bit_on_any_mesh(tmp_path, data, fsdp):
  state, _ = save_one(tmp_path)
  places = sharding.fsdp_shardings(state, sharding.make_mesh(data, fsdp), min_size=100)
  with open_folder(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(sharding.abstract_tree(state, places))
  assert_same_bits(restored, state)
  assert isinstance(restored, train_step.TrainState)
  assert jax.tree.map(lambda x: x.sharding, restored) == places


@pytest.mark.slow
def test_restored_state_trains_on_as_the_saved_one(tmp_path):
  state, abstract = save_one(tmp_path)
  step = make_step(jax.tree.map(lambda x: x.sharding, abstract))
  with open_folder(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(abstract)
  assert_same_bits(step(restored), step(sharding.put_tree(state, _places(abstract))))


def _places(abstract):
  return jax.tree.map(lambda x: x.sharding, abstract)


def test_restore_without_shardings_goes_to_one_device(tmp_path):
  state, _ = save_one(tmp_path)
  with open_folder(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(jax.eval_shape(lambda: jax.device_get(state)))
  assert_same_bits(restored, state)
  assert restored.params["scale"].devices() == {jax.devices()[0]}


def test_empty_folder_restores_nothing(tmp_path):
  state, places = placed_state(sharding.make_mesh())
  with open_folder(tmp_path / "new") as checkpoints:
    assert checkpoints.restore_latest(sharding.abstract_tree(state, places)) is None
    assert checkpoints.latest_step() is None


def test_donating_the_state_at_once_does_not_change_what_is_saved(tmp_path):
  """The step is compiled before, so that it overwrites buffers while the save is under way."""
  mesh = sharding.make_mesh(fsdp=2)
  state = {"kernel": np.random.default_rng(0).standard_normal((1024, 1024), np.float32)}
  state = train_step.TrainState(np.int32(1), state, (np.zeros((), np.float32),))
  places = sharding.fsdp_shardings(state, mesh)
  wipe = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 + 7, s), donate_argnums=0, out_shardings=places
  )
  jax.block_until_ready(wipe(sharding.put_tree(state, places)))
  live = sharding.put_tree(state, places)
  with open_folder(tmp_path) as checkpoints:
    checkpoints.save(live, {})
    live = jax.block_until_ready(wipe(wipe(live)))
    restored = checkpoints.restore_latest(sharding.abstract_tree(state, places))
  assert_same_bits(restored, state)


# what is kept


@pytest.mark.slow
def test_last_and_best_are_kept(tmp_path):
  state, _ = placed_state(sharding.make_mesh())
  margins = {1: 0.9, 2: 0.9, 3: float("nan"), 4: 0.3, 5: None}
  with open_folder(tmp_path) as checkpoints:
    for step, margin in margins.items():
      checkpoints.save(at(state, step), {} if margin is None else {METRIC: margin, "loss": 1.0})
  assert steps_in(tmp_path) == [2, 4, 5]
  assert checkpoint.best_step(tmp_path, METRIC) == 2
  assert checkpoint.best_step(tmp_path, "nothing") is None
  with open_folder(tmp_path) as checkpoints:  # a resumed run knows the best of before
    checkpoints.save(at(state, 6), {METRIC: 0.5})
  assert steps_in(tmp_path) == [2, 5, 6]


def test_without_a_best_metric_the_last_are_kept(tmp_path):
  state, _ = placed_state(sharding.make_mesh())
  with open_folder(tmp_path, best_metric=None, keep=1) as checkpoints:
    for step, margin in {1: 0.9, 2: 0.1}.items():
      checkpoints.save(at(state, step), {METRIC: margin})
  assert steps_in(tmp_path) == [2]


def steps_in(folder):
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_saved_step_is_skipped_and_an_earlier_one_refused(tmp_path):
  state, abstract = save_one(tmp_path)
  with open_folder(tmp_path) as checkpoints:
    changed = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert checkpoints.save(changed, {}) is False
    with pytest.raises(ValueError, match="step 2 cannot be saved after step 3; resume from step 3"):
      checkpoints.save(at(state, 2), {})
    assert_same_bits(checkpoints.restore_latest(abstract), state)


# parameters alone and metadata


def test_load_params_reads_parameters_alone(tmp_path):
  state, abstract = save_one(tmp_path)
  shutil.rmtree(tmp_path / "3" / "opt_state")  # it is not looked at
  for target in (abstract.params, random_params()):
    assert_same_bits(checkpoint.load_params(tmp_path, target), state.params)


def test_load_params_of_a_step(tmp_path):
  first, places = placed_state(sharding.make_mesh(), 0)
  second, _ = placed_state(sharding.make_mesh(), 5)
  with open_folder(tmp_path) as checkpoints:
    checkpoints.save(at(first, 1), {})
    checkpoints.save(at(second, 2), {})
  target = sharding.abstract_tree(first, places).params
  assert_same_bits(checkpoint.load_params(tmp_path, target, 1), first.params)
  assert_same_bits(checkpoint.load_params(tmp_path, target), second.params)
  with pytest.raises(ValueError, match=r"step 7 is not there; expected one of \[1, 2\]"):
    checkpoint.load_params(tmp_path, target, 7)


def test_reading_leaves_a_save_under_way_alone(tmp_path):
  state, _ = save_one(tmp_path)
  under_way = tmp_path / "4.orbax-checkpoint-tmp"
  under_way.mkdir()
  checkpoint.load_params(tmp_path, random_params())
  assert checkpoint.read_metadata(tmp_path)["step"] == 3
  assert under_way.exists()
  with open_folder(tmp_path) as checkpoints:  # the next training run removes it when it saves
    checkpoints.save(at(state, 5), {})
  assert not under_way.exists()


def test_metadata_says_what_was_saved(tmp_path):
  reference = checkpoint.fingerprint(random_params(9))
  state, _ = save_one(tmp_path, reference=reference)
  metadata = checkpoint.read_metadata(tmp_path)
  assert metadata["step"] == 3
  assert metadata["metrics"] == {METRIC: 0.5}
  assert metadata["reference"] == reference
  assert metadata["config"] == CONFIG
  assert set(metadata["versions"]) == {"jax", "flax", "optax", "orbax-checkpoint", "dmpo_jax"}
  assert metadata["versions"]["jax"] == jax.__version__
  assert metadata["checksums"]["params"] == checkpoint.fingerprint(state.params)
  assert "1.0.mu.conv_in.kernel" in metadata["checksums"]["opt_state"]
  assert metadata == checkpoint.read_metadata(tmp_path, 3)


@pytest.mark.parametrize("read", [checkpoint.read_metadata, checkpoint.load_params])
def test_missing_and_empty_folders_are_told(tmp_path, read):
  arguments = (random_params(),) if read is checkpoint.load_params else ()
  with pytest.raises(
    ValueError, match="nowhere: no such folder; expected the checkpoints of a run"
  ):
    read(tmp_path / "nowhere", *arguments)
  with pytest.raises(ValueError, match="holds no complete checkpoint"):
    read(tmp_path, *arguments)


def test_bad_settings_are_refused(tmp_path):
  with pytest.raises(ValueError, match="keep: 0; expected at least 1"):
    open_folder(tmp_path, keep=0)
  with pytest.raises(ValueError, match="config: .*not JSON serializable"):
    checkpoint.Checkpoints(
      tmp_path, keep=1, best_metric=None, reference={}, config={"dtype": jnp.float32}
    )


# another reference, another model


def test_another_reference_is_refused_by_its_first_leaf(tmp_path):
  reference = random_params(9)
  _, abstract = save_one(tmp_path, reference=checkpoint.fingerprint(reference))
  kernel = reference["down_blocks.0"]["to_q"]["kernel"]
  reference["down_blocks.0"]["to_q"]["kernel"] = kernel.at[3, 4].add(1e-6)
  reference["scale"] += 1.0
  with open_folder(tmp_path, reference=checkpoint.fingerprint(reference)) as checkpoints:
    message = r"3: made with another reference, first different leaf down_blocks\.0\.to_q\.kernel: "
    with pytest.raises(ValueError, match=message):
      checkpoints.restore_latest(abstract)
  with open_folder(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match="leaf conv_in.bias: .* in the checkpoint, nothing now"):
      checkpoints.restore_latest(abstract)


def replaced(abstract, shape, dtype):
  params = dict(abstract.params, scale=jax.ShapeDtypeStruct(shape, dtype))
  return abstract._replace(params=params)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    pytest.param(
      lambda a: replaced(a, (7,), jnp.bfloat16),
      r"params: scale is float32\[7\] in the checkpoint; expected bfloat16\[7\]",
      id="dtype",
    ),
    pytest.param(
      lambda a: replaced(a, (8,), jnp.float32),
      r"params: scale is float32\[7\] in the checkpoint; expected float32\[8\]",
      id="shape",
    ),
    pytest.param(
      lambda a: a._replace(params={"conv_in": a.params["conv_in"], "scale": a.params["scale"]}),
      r"params: down_blocks.0.to_q.kernel is float32\[32,24\] .* expected nothing",
      id="extra",
    ),
    pytest.param(
      lambda a: a._replace(params=dict(a.params, bias=a.params["scale"])),
      r"params: bias is nothing in the checkpoint; expected float32\[7\]",
      id="missing",
    ),
    pytest.param(
      lambda a: a._replace(opt_state=a.opt_state[:2]),
      r"opt_state: 2.ema.conv_in.bias is float32\[16\] .* expected nothing",
      id="another-optimizer",
    ),
  ],
)
def test_another_model_is_refused_by_name(tmp_path, change, message):
  _, abstract = save_one(tmp_path)
  with open_folder(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=message):
      checkpoints.restore_latest(change(abstract))


# damage


def save_long_leaves(folder):
  """Leaves too long to lie in orbax's index, whose blocks have checksums of their own."""
  generator = np.random.default_rng(0)
  params = {name: generator.standard_normal((64, 256), np.float32) for name in ("a", "b")}
  params = jax.tree.map(jnp.asarray, params)
  state = at(train_step.init_state(params, optax.sgd(0.1, momentum=0.9)), 3)
  state = state._replace(opt_state=jax.tree.map(lambda x: x + params["a"], state.opt_state))
  with open_folder(folder) as checkpoints:
    checkpoints.save(state, {})
  return jax.eval_shape(lambda: state)


def largest_file(folder):
  return max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)


# An exception in one read leaves orbax's other reads to finish on a closed event loop.
LEFT_READS = "ignore::pytest.PytestUnraisableExceptionWarning"


@pytest.fixture
def left_reads():
  """Waits until they have, and has them found here, so that no later test is blamed."""
  yield
  time.sleep(0.3)
  gc.collect()


def read_with_flip(folder, path, position, target):
  good = path.read_bytes()
  path.write_bytes(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
  with open_folder(folder) as checkpoints:
    with (
      pytest.warns(UserWarning, match=rf"{folder}/3: .* Put aside as .*none before it") as told,
      pytest.raises(ValueError, match="no checkpoint is left, and .*-damaged has the damaged ones"),
    ):
      checkpoints.restore_latest(target)
  aside = checkpoint.damaged_folder(folder)
  (aside / "3-1").rename(folder / "3")
  aside.rmdir()
  path.write_bytes(good)
  return str(told[0].message)


@pytest.mark.filterwarnings(LEFT_READS)
@pytest.mark.parametrize(("item", "leaf"), [("params", "(a|b)"), ("opt_state", r"0\.trace\.(a|b)")])
def test_flipped_bit_is_told_with_leaf_and_step(tmp_path, left_reads, item, leaf):
  target = save_long_leaves(tmp_path)
  path = largest_file(tmp_path / "3" / item)
  size = path.stat().st_size
  told = [read_with_flip(tmp_path, path, size * i // 4, target) for i in (1, 2, 3)]
  expected = rf"3: {item}: {leaf} is damaged: checksum float32\[64,256\]:\w+, expected "
  assert any(re.search(expected, text) for text in told), told
  with open_folder(tmp_path) as checkpoints:
    assert int(checkpoints.restore_latest(target).step) == 3  # the flips were undone


@pytest.mark.filterwarnings(LEFT_READS)
def test_truncated_file_is_told(tmp_path, left_reads):
  target = save_long_leaves(tmp_path)
  path = largest_file(tmp_path / "3" / "params")
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=f"{tmp_path}/3: cannot be read"):
    checkpoint.load_params(tmp_path, target.params)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"step": 2}'])
def test_damaged_metadata_is_told(tmp_path, text):
  _, abstract = save_one(tmp_path)
  (tmp_path / "3" / "metadata" / "metadata").write_text(text)
  with pytest.raises(ValueError, match=f"{tmp_path}/3: (cannot be read|its metadata)"):
    checkpoint.read_metadata(tmp_path)
  with open_folder(tmp_path) as checkpoints:
    with (
      pytest.warns(UserWarning, match=f"{tmp_path}/3: (cannot be read|its metadata)"),
      pytest.raises(ValueError, match="no checkpoint is left"),
    ):
      checkpoints.restore_latest(abstract)


def save_two(folder):
  """Steps 2 and 3, of leaves in orbax's index and out of it; what to restore, and their values."""
  generator, states = np.random.default_rng(0), {}
  with open_folder(folder) as checkpoints:
    for step in (2, 3):
      params = {
        "a": generator.standard_normal((64, 256), np.float32),
        "b": generator.standard_normal(3, np.float32),
      }
      state = at(train_step.init_state(jax.tree.map(jnp.asarray, params), optax.adam(0.1)), step)
      checkpoints.save(state, {"accuracy": 0.5})
      checkpoints.wait()
      states[step] = jax.tree.map(np.array, state)
  return jax.eval_shape(lambda: state), states


def flip(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
  "emptied": lambda content: b"",
  "cut": lambda content: content[: len(content) // 2],
  "one byte short": lambda content: content[:-1],
  "flipped": flip,
  "zeroed": lambda content: bytes(len(content)),
  "longer": lambda content: content + b"x",
  "removed": None,
}


@pytest.mark.slow
@pytest.mark.filterwarnings(LEFT_READS)
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_no_damaged_file_is_used_silently(tmp_path, left_reads, damage):
  """Every file of a step: the step is bit for bit as saved, or put aside for the one before."""
  target, states = save_two(tmp_path / "whole")
  files = [
    path.relative_to(tmp_path / "whole")
    for path in sorted((tmp_path / "whole" / "3").rglob("*"))
    if path.is_file() and path.stat().st_size
  ]
  assert len(files) >= 10
  fallen_back = 0
  for i, file in enumerate(files):
    folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
    if DAMAGES[damage] is None:
      (folder / file).unlink()
    else:
      (folder / file).write_bytes(DAMAGES[damage]((folder / file).read_bytes()))
    with warnings.catch_warnings(record=True) as told:
      warnings.simplefilter("always")
      with open_folder(folder) as checkpoints:
        restored = checkpoints.restore_latest(target)
    aside = checkpoint.damaged_folder(folder) / "3-1"
    step = int(restored.step)
    assert step == (2 if aside.exists() else 3), file
    assert aside.exists() == any("Put aside" in str(each.message) for each in told), file
    jax.tree.map(np.testing.assert_array_equal, restored, states[step])
    fallen_back += step == 2
  # Besides, orbax writes files that it does not read; bytes after the end are ignored in some.
  assert fallen_back >= (1 if damage == "longer" else 3)


def test_what_is_put_aside_is_saved_anew(tmp_path):
  target, states = save_two(tmp_path)
  for number in (1, 2):
    (tmp_path / "3" / "metadata" / "metadata").write_text("{}")
    with open_folder(tmp_path) as checkpoints:
      with pytest.warns(UserWarning, match=f"{tmp_path}/3: .*3-{number}; step 2 is tried"):
        restored = checkpoints.restore_latest(target)
      assert int(restored.step) == 2
      assert checkpoints.save(at(restored, 3), {})
    assert steps_in(tmp_path) == [2, 3]
  aside = checkpoint.damaged_folder(tmp_path)
  assert sorted(path.name for path in aside.iterdir()) == ["3-1", "3-2"]


def test_another_step_under_this_number_is_told(tmp_path):
  target, _ = save_two(tmp_path)
  shutil.rmtree(tmp_path / "3")
  shutil.copytree(tmp_path / "2", tmp_path / "3")
  with open_folder(tmp_path) as checkpoints:
    with pytest.warns(UserWarning, match="its metadata is of step 2"):
      assert int(checkpoints.restore_latest(target).step) == 2


# real processes

KILLED = """
  import os, signal, sys, time
  import jax, numpy as np
  from dmpo_jax import checkpoint, train_step

  def state(step):
    params = {"kernel": np.full((1500, 2000), step, np.float32)}
    return train_step.TrainState(np.int32(step), jax.device_put(params), (np.int32(step),))

  checkpoints = checkpoint.Checkpoints(
    sys.argv[1], keep=1, best_metric=None, reference={}, config={}
  )
  checkpoints.save(state(1), {})
  checkpoints.wait()
  checkpoints.save(state(2), {})
  time.sleep(float(sys.argv[2]))
  os.kill(os.getpid(), signal.SIGKILL)
"""


def python(text, *arguments, **environment):
  root = pathlib.Path(checkpoint.__file__).parents[1]
  environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", **environment}
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_kill_during_a_save_leaves_the_step_before(tmp_path, delay):
  process = python(KILLED, tmp_path, delay)
  output, _ = process.communicate(timeout=600)
  assert process.returncode == -signal.SIGKILL, output
  left = sorted(path.name for path in tmp_path.iterdir())
  target = train_step.TrainState(
    jax.ShapeDtypeStruct((), np.int32),
    {"kernel": jax.ShapeDtypeStruct((1500, 2000), np.float32)},
    (jax.ShapeDtypeStruct((), np.int32),),
  )
  with open_folder(tmp_path) as checkpoints:
    restored = checkpoints.restore_latest(target)
  # At the shortest delay the save cannot be through; later ones may be.
  assert int(restored.step) in ((1,) if delay == 0.0 else (1, 2)), left
  assert np.all(np.asarray(restored.params["kernel"]) == int(restored.step))
  assert steps_in(tmp_path) == [int(name) for name in left if name.isdigit()]


TWO_PROCESSES = """
  import sys
  import jax, numpy as np
  jax.config.update("jax_num_cpu_devices", 2)
  jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[3]))
  from dmpo_jax import checkpoint, sharding, train_step

  params = {"kernel": np.arange(32, dtype=np.float32).reshape(4, 8), "bias": np.ones(3, np.float32)}
  expected = checkpoint.fingerprint(params)
  state = train_step.TrainState(np.int32(5), params, (np.int32(5),))
  places = sharding.fsdp_shardings(state, sharding.make_mesh(1, 4), min_size=1)
  placed = sharding.put_tree(state, places)
  assert not placed.params["kernel"].is_fully_addressable
  assert checkpoint.fingerprint(placed.params) == expected
  with checkpoint.Checkpoints(
    sys.argv[1], keep=1, best_metric=None, reference=expected, config={}
  ) as checkpoints:
    checkpoints.save(placed, {})
    checkpoints.wait()
    restored = checkpoints.restore_latest(sharding.abstract_tree(state, places))
  for got, leaf in zip(jax.tree.leaves(restored), jax.tree.leaves(placed), strict=True):
    for a, b in zip(got.addressable_shards, leaf.addressable_shards, strict=True):
      assert np.array_equal(a.data, b.data)
  local = sharding.put_batch(np.full((2, 1), jax.process_index()), sharding.make_mesh(2, 2))
  assert local.shape == (4, 1)
  print("done")
"""


@pytest.mark.slow
def test_two_processes_save_what_one_restores(tmp_path):
  import socket

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [python(TWO_PROCESSES, tmp_path, port, i) for i in range(2)]
  for process in processes:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "done" in output
  expected = np.arange(32, dtype=np.float32).reshape(4, 8)
  target = {"kernel": expected, "bias": np.ones(3, np.float32)}
  loaded = checkpoint.load_params(tmp_path, target)
  np.testing.assert_array_equal(loaded["kernel"], expected)
  assert checkpoint.read_metadata(tmp_path)["reference"] == checkpoint.fingerprint(target)
