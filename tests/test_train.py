"""The loop: resume bit for bit, one mesh against another, refusals, alarms."""

import json

import jax
import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import checkpoint, logs, objectives, stages, tasks, train

pytestmark = pytest.mark.slow  # every test compiles a step


def prepare_task(base_folder, data, **more):
  config = tiny.config(base_folder, **more)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  return config, tasks.preference_task(config, base, stages.open_data(config, base, data))


def checksums(out):
  return checkpoint.read_metadata(out / train.CHECKPOINTS)["checksums"]


@pytest.fixture(scope="module")
def straight(tiny_base, tiny_data, tmp_path_factory):
  """A run of 4 steps on 8 devices, without interruption."""
  out = tmp_path_factory.mktemp("straight") / "run"
  config, task = prepare_task(tiny_base, tiny_data, fsdp=2)
  params = train.train(config, task, out)
  return out, config, task, jax.tree.map(np.asarray, params)


def test_records_and_files_of_a_run(straight):
  out, config, _, _ = straight
  records = logs.read(out)
  assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
  assert records[0]["validation/margin_abs_max"] == 0.0
  assert records[1]["train/margin_abs_max"] == 0.0
  names = (
    "loss margin accuracy winner_advantage loser_advantage dead_zone grad_norm learning_rate "
    "pairs_per_second"
  ).split()
  for record in records[1:]:
    assert {f"train/{name}" for name in names} <= set(record)
  assert [r["step"] for r in records if "validation/margin" in r] == [0, 2, 4]
  assert records[-1]["validation/margin"] != 0.0
  assert (out / "tensorboard").is_dir()
  assert json.loads((out / train.RUN_FILE).read_text())["objective"]["beta"] == 1000.0
  assert train.read_run(out) == config


def test_another_call_of_a_finished_run_changes_nothing(straight):
  out, config, task, params = straight
  before = (out / logs.METRICS_FILE).read_bytes()
  again = train.train(config, task, out)
  jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, again))
  assert (out / logs.METRICS_FILE).read_bytes() == before


def test_load_trained_gives_the_last_parameters(straight):
  out, _, task, params = straight
  jax.tree.map(np.testing.assert_array_equal, params, train.load_trained(out, task.params))


def test_resume_is_bit_identical(straight, tmp_path):
  """k steps, then a new start from the checkpoint, against the straight run: the same bits in
  parameters and optimiser state. The loop is stopped at step 2 by its own data running out."""
  out, config, task, _ = straight
  stopped = task._replace(
    batches=lambda start: (b for b, _ in zip(task.batches(start), range(2), strict=False))
  )
  train.train(config, stopped, tmp_path / "run")
  assert checkpoint.read_metadata(tmp_path / "run" / train.CHECKPOINTS)["step"] == 2
  train.train(config, task, tmp_path / "run")
  assert checksums(tmp_path / "run") == checksums(out)
  assert [r["step"] for r in logs.read(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_eight_devices_equal_one(straight, tiny_base, tiny_data, tmp_path):
  """data 4 x fsdp 2 against one device, 4 steps: only the order of additions differs."""
  out, _, _, params = straight
  config, task = prepare_task(tiny_base, tiny_data)
  single = train.train(config, task, tmp_path / "one", devices=jax.devices()[:1])
  for a, b in zip(logs.read(out), logs.read(tmp_path / "one"), strict=True):
    if "train/loss" in a:
      assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
  rate = config.optim.learning_rate
  for a, b in zip(*map(jax.tree.leaves, (params, single)), strict=True):
    # Adam moves by about lr a step whatever the gradient's size, so a gradient that is rounding
    # noise may move either way: at most 2 lr a step apart anywhere, and 5 % of lr on average.
    difference = np.abs(np.asarray(a) - np.asarray(b))
    assert difference.max() <= 2 * 4 * rate and difference.mean() <= 0.05 * rate


def test_state_is_split_over_fsdp(tiny_base):
  """Leaves of the shipped size are split; the test above then covers real FSDP placement only for
  large leaves, so this one says which leaves those are."""
  from dmpo_jax import sharding

  mesh = sharding.make_mesh(fsdp=2)
  base = base_lib.load_base("emoji")
  specs = sharding.fsdp_shardings(base.params["unet"], mesh)
  split = [s for s in jax.tree.leaves(specs) if "fsdp" in str(s.spec)]
  assert len(split) > 10


def test_a_folder_of_another_run_is_refused(straight, tiny_base, tiny_data):
  out, _, _, _ = straight
  before = (out / train.RUN_FILE).read_bytes()
  config, task = prepare_task(tiny_base, tiny_data, fsdp=2, **{"objective.beta": 500.0})
  with pytest.raises(ValueError, match="already holds another run: objective.beta is 1000.0 there"):
    train.train(config, task, out)
  assert (out / train.RUN_FILE).read_bytes() == before


def test_a_folder_with_checkpoints_and_no_run_file_is_refused(tmp_path, tiny_base):
  (tmp_path / train.CHECKPOINTS).mkdir()
  with pytest.raises(ValueError, match="no run.json; give another --out"):
    train.claim_folder(tmp_path, tiny.config(tiny_base))


def test_another_reference_is_refused(straight):
  out, config, task, _ = straight
  other = jax.tree.map(np.array, task.frozen.reference)
  other["conv_in"]["bias"][0] += 1
  changed = task._replace(frozen=objectives.Frozen(other, task.frozen.text_encoders))
  with pytest.raises(ValueError, match="another reference, first different leaf conv_in.bias"):
    train.train(config, changed, out)


def test_indivisible_batch_is_refused_before_any_work(tiny_base, tiny_data, tmp_path):
  config, task = prepare_task(tiny_base, tiny_data, batch_size=12)
  with pytest.raises(ValueError, match="batch_size: 12 cannot be split over 8 device"):
    train.train(config, task, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_non_finite_loss_stops_with_the_records(tiny_base, tiny_data, tmp_path):
  config, task = prepare_task(
    tiny_base, tiny_data, steps=10, **{"optim.learning_rate": 1e30, "save_every": 1, "log_every": 5}
  )
  with pytest.raises(
    train.TrainingStopped, match=r"not finite in step \d+ .* records .+ \("
  ) as stop:
    train.train(config, task, tmp_path / "run")
  step = int(str(stop.value).split("in step ")[1].split(" ")[0])
  assert step < 5, "meant to stop between logged steps"
  assert f"(from step {step - 1} to {step}), records " in str(stop.value)
  assert all(record in str(stop.value) for record in task.describe(step - 1))
  params = train.load_trained(tmp_path / "run", task.params)
  assert checkpoint.read_metadata(tmp_path / "run" / train.CHECKPOINTS)["step"] < step
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_warns_when_the_policy_gets_worse_on_winners_and_when_that_doubles(recwarn):
  alarm, warned = 0.0, []
  for step, advantage in enumerate((0.1, -0.1, -0.15, -0.3, -0.5)):
    alarm = train._warn_if_worse({"validation/winner_advantage": advantage}, step, alarm)
    warned.append(len(recwarn))
  assert warned == [0, 1, 1, 2, 2]
  assert "denoises the preferred images worse than the reference" in str(recwarn[0].message)


def test_averaged_parameters_are_exported(tiny_base, tiny_data, tmp_path):
  config, task = prepare_task(tiny_base, tiny_data, **{"optim.ema_decay": 0.9})
  returned = train.train(config, task, tmp_path / "run")
  loaded = train.load_trained(tmp_path / "run", task.params)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, returned), loaded)
  config, task = prepare_task(tiny_base, tiny_data)
  raw = train.train(config, task, tmp_path / "raw")
  assert not np.array_equal(np.asarray(raw["conv_in"]["kernel"]), loaded["conv_in"]["kernel"])


def test_reading_a_run_that_keeps_averages_changes_nothing_in_it(tiny_base, tiny_data, tmp_path):
  """A step that is asked for is the one read; a damaged one is told and stays where it is."""
  config, task = prepare_task(tiny_base, tiny_data, **{"optim.ema_decay": 0.9})
  run = tmp_path / "run"
  train.train(config, task, run)
  first, last = (train.load_trained(run, task.params, step) for step in (2, 4))
  assert not np.array_equal(first["conv_in"]["kernel"], last["conv_in"]["kernel"])
  (run / "checkpoints" / "4" / "metadata" / "metadata").write_text("{}")
  before = sorted(path.relative_to(run) for path in run.rglob("*"))
  with pytest.raises(ValueError, match="checkpoints/4: its metadata lacks what we write"):
    train.load_trained(run, task.params)
  assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
