"""Errors of the reference computed once: the live reference's to the bit, refused where stale."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import (
  objectives,
  program,
  reference_cache,
  sharding,
  stages,
  tasks,
  train,
  train_step,
)
from dmpo_jax.data import drawn, pipeline

DRAWS = 3


def settings(base, **more):
  return tiny.config(base, **{"data.reference_draws": DRAWS, "data.caption_dropout": 0.3, **more})


@pytest.fixture(scope="module")
def cached(tiny_base, tiny_data, tmp_path_factory):
  """Configuration, base, and a folder of encoded pairs with the cache beside them."""
  folder = tmp_path_factory.mktemp("cached") / "data"
  shutil.copytree(tiny_data, folder)
  config = settings(tiny_base)
  base = base_lib.load_base(config.base, remat=config.remat)
  stages.cache_reference(config, base, folder, jax.devices()[:1])
  return config, base, folder


def one_step(config, objective, params, frozen, batch):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  rule = optax.sgd(1.0)
  built = program.make_program(params, frozen, objective, rule, mesh)
  state = train_step.init_state(sharding.put_tree(params, built.state.params), rule)
  compiled = program.lower(built, mesh, frozen, batch).compile()
  new, metrics = compiled(state, frozen, batch, jax.random.key(0))
  return new.params, metrics, compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_gradients_are_those_of_the_live_reference_to_the_bit(cached):
  config, base, folder = cached
  encoded = stages.open_data(config, base, folder)
  split, rows = encoded.splits["train"], range(0, 7 * config.batch_size, 7)
  assert len(split) == DRAWS * len(split.source)
  batch = pipeline.stack([split[row] for row in rows])
  moved = jax.tree.map(lambda p: p * np.float32(1.01), base.params["unet"])
  objective = tasks.make_objective(config, base)
  live = objectives.Frozen(tasks.reference_params(base.params["unet"], "float32"), base.text_params)
  params, metrics, flops = one_step(config, objective, moved, live._replace(reference=None), batch)
  expected, theirs, all_flops = one_step(
    config, objective, moved, live, batch._replace(reference_errors=None)
  )
  assert float(metrics["margin_abs_max"]) == float(theirs["margin_abs_max"]) > 0
  for name, value in theirs.items():
    np.testing.assert_array_equal(metrics[name], value, err_msg=name)
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  # Two of some eight forward passes are not done; text encoders and optimiser stay.
  assert 0.70 < flops / all_flops < 0.82


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*worse than the reference")
def test_a_run_with_the_cache_starts_from_zero_margins_and_resumes(cached, tmp_path):
  config, base, folder = cached
  task = tasks.preference_task(config, base, stages.open_data(config, base, folder))
  assert task.frozen.reference is None
  straight = train.train(config, task, tmp_path / "straight", jax.devices()[:1])
  lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert records[1]["train/margin_abs_max"] == 0.0
  # Validation is one large batch, whose sums round otherwise than those of the cache's batches: one
  # unit in the last place of an error near 1 is 1.2e-7, times kappa 500, for two pairs of errors.
  assert records[0]["validation/margin_abs_max"] <= 4 * 500 * 1.2e-7
  half = dataclasses.replace(config, save_every=1)
  train.train(half, task, tmp_path / "again", jax.devices()[:1])
  again = train.load_trained(tmp_path / "again", task.params)
  jax.tree.map(np.testing.assert_array_equal, straight, again)


@pytest.mark.slow
def test_a_cache_that_was_stopped_goes_on(cached, monkeypatch):
  config, base, folder = cached
  out = stages.latents_folder(config, folder) / reference_cache.FOLDER
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  first = sorted(out.glob("train-*"))[0]
  first.unlink()
  with pytest.raises(ValueError, match="not whole; run dmpo cache again"):
    stages.open_data(config, base, folder)
  stages.cache_reference(config, base, folder, jax.devices()[:1])
  assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, message",
  [
    ({"seed": 1}, "seed is 0 there and 1 here"),
    ({"data.reference_draws": 2}, "data.reference_draws is 3 there and 2 here"),
    ({"data.timestep_power": 1.0}, "data.timestep_power is 4.0 there and 1.0 here"),
    ({"data.caption_dropout": 0.0}, "data.caption_dropout is 0.3 there and 0.0 here"),
    ({"precision.compute": "bfloat16"}, "precision.compute is 'float32' there"),
  ],
)
def test_a_stale_cache_is_refused(cached, changes, message):
  config, base, folder = cached
  other = settings(config.base, **changes)
  with pytest.raises(ValueError, match=message):
    stages.open_data(other, base, folder)


@pytest.mark.slow
def test_a_cache_of_another_reference_is_refused(cached):
  config, base, folder = cached
  params = dict(base.params)
  params["unet"] = jax.tree.map(lambda p: p * np.float32(1.0001), params["unet"])
  with pytest.raises(ValueError, match="reference is '.*' there and '.*' here"):
    stages.open_data(config, dataclasses.replace(base, params=params), folder)


@pytest.mark.slow
def test_without_a_cache_the_command_is_named(tiny_base, tiny_data):
  config = settings(tiny_base)
  with pytest.raises(ValueError, match="run dmpo cache with the same configuration"):
    stages.open_data(config, base_lib.load_base(config.base), tiny_data)


class Numbers:
  def __len__(self):
    return 5

  def __getitem__(self, position):
    return {"input_ids": np.full(2, position, np.int32)}


def test_draws_of_a_pair_follow_one_another_and_are_settled():
  empty = {"input_ids": np.full(2, -1, np.int32)}
  errors = np.arange(40, dtype=np.float32).reshape(20, 2)
  draws = drawn.Drawn(Numbers(), 4, 0, 0.5, empty, errors)
  assert len(draws) == 20
  records = [draws[position] for position in range(20)]
  assert [int(record["draw"]) for record in records] == list(range(20))
  np.testing.assert_array_equal([record["reference_errors"] for record in records], errors)
  ids = [int(record["input_ids"][0]) for record in records]
  assert all(found in (-1, position // 4) for position, found in enumerate(ids))
  assert 4 <= ids.count(-1) <= 16
  assert ids == [int(draws[position]["input_ids"][0]) for position in range(20)]


@pytest.mark.parametrize("draws, errors, message", [(0, None, "draws:"), (2, 9, "errors:")])
def test_draws_out_of_range_are_refused(draws, errors, message):
  errors = None if errors is None else np.zeros((errors, 2), np.float32)
  with pytest.raises(ValueError, match=message):
    drawn.Drawn(Numbers(), draws, 0, 0.0, {}, errors)


def test_errors_are_shared_by_methods_that_draw_alike(tiny_base, tiny_data):
  """Diffusion-KTO draws timestep and noise for each image: its errors are of other latents."""
  base = base_lib.load_base(str(tiny_base))
  found = {}
  for name in ("dmpo", "dpo", "sdpo", "kto"):
    config = settings(tiny_base, path=f"configs/emoji_{name}.py")
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, reference_draws=0))
    encoded = stages.open_data(without, base, tiny_data)
    found[name] = reference_cache.settings_of(config, base, encoded)
  assert found["dmpo"] == found["dpo"] == found["sdpo"] != found["kto"]
