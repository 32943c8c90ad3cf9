"""Traces of some steps, and model FLOPs utilisation."""

import os
import signal
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import checkpoint, cli, logs, plan, profiling, stages, train


@pytest.mark.parametrize(
  "text, expected", [("10:15", (10, 15)), ("10", (10, 10)), ("1:20", (1, 20)), ("20", (20, 20))]
)
def test_steps_to_trace(text, expected):
  assert profiling.read_steps(text, 20) == expected


@pytest.mark.parametrize("text", ["", ":", "a", "1:", ":2", "1:2:3", "1-2", "1.5", "-1", " 1", "²"])
def test_what_are_no_steps(text):
  with pytest.raises(ValueError, match="--profile: expected FIRST:LAST or one step") as refused:
    profiling.read_steps(text, 20)
  assert str(refused.value).endswith(f"got {text!r}")


@pytest.mark.parametrize("text", ["0", "0:3", "3:2", "21", "19:21"])
def test_steps_beyond_the_run(text):
  with pytest.raises(ValueError, match=f"1 <= FIRST <= LAST <= 20, .* got '{text}'"):
    profiling.read_steps(text, 20)


@pytest.mark.parametrize("text, message", [("4:5", "LAST <= 4"), ("x", "expected FIRST:LAST")])
def test_command_refuses_before_any_work(capsys, monkeypatch, tmp_path, text, message):
  monkeypatch.setattr(cli, "_join_processes", lambda: pytest.fail("joined the others"))
  monkeypatch.setattr(base_lib, "load_base", lambda *_, **__: pytest.fail("loaded the base"))
  arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--profile", text]
  arguments += ["--distributed", *tiny.overrides(tmp_path)]
  assert cli.main(["train", *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith("dmpo train: error: --profile: ")
  assert message in error and repr(text) in error
  assert not (tmp_path / "run").exists()


# Dense bfloat16 FLOP/s of a device, from the vendors' pages; jax sees a TPU7x chip as two devices.
@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989.5e12),
    ("NVIDIA H100 PCIe", 756.5e12),
    ("NVIDIA H200", 989.5e12),
  ],
)
def test_peaks(kind, peak):
  assert profiling.peak_flops(kind) == peak


@pytest.mark.parametrize(
  "kind",
  ["cpu", "", "TPU v3", "TPU v4 lite", "TPU v5 x", "NVIDIA GH200 480GB", "NVIDIA H100 NVL"]
  + ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090"],
)
def test_unknown_devices_have_no_utilisation(kind):
  assert profiling.peak_flops(kind) is None
  assert profiling.mfu(1e12, 10.0, 8, kind) is None
  assert profiling.count_flops(lambda: pytest.fail("counted in vain"), kind) is None


def test_utilisation_by_hand():
  """6.4e12 FLOPs a pair, 100 pairs/s on 4 chips of 275e12 FLOP/s: 640 of 1100."""
  assert profiling.mfu(6.4e12, 100.0, 4, "TPU v4") == pytest.approx(640 / 1100)
  assert profiling.mfu(None, 100.0, 4, "TPU v4") is None


def test_flops_are_counted_on_cpu():
  """An accelerator's backend counts nothing before it compiles."""
  places = []

  def count():
    places.append(jax.config.jax_default_device)
    return 7.0

  assert profiling.count_flops(count, "TPU v4") == 7.0
  assert places == ["cpu"]
  assert profiling.count_flops(None, "TPU v4") is None


def test_no_cpu_no_utilisation(monkeypatch):
  def refuse(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", refuse)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.warns(UserWarning, match="train/mfu is left out.*'cuda': add ',cpu'"):
    assert profiling.count_flops(lambda: 1.0, "NVIDIA H200") is None


def files(folder):
  return list(folder.glob("plugins/profile/*/*.xplane.pb"))


def step_numbers(folder):
  """Of the annotations in the trace: XProf groups by them."""
  (path,) = files(folder)
  with warnings.catch_warnings():
    # Python 3.12 and newer say it of jaxlib's reader, which ends the process if it is an error.
    warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
    data = jax.profiler.ProfileData.from_file(str(path))
    return sorted(
      dict(event.stats)["step_num"]
      for plane in data.planes
      for line in plane.lines
      for event in line.events
      if event.name == "train" and "step_num" in dict(event.stats)
    )


def test_trace_covers_its_steps_and_no_others(tmp_path):
  square = jax.jit(lambda x: x * x)
  x = jnp.ones(())
  with profiling.Trace(profiling.Steps(2, 3), tmp_path) as trace:
    for number in range(1, 6):
      with trace.step(number, before=x):
        x = square(x)
      trace.after_step(number, x)
      assert len(files(tmp_path)) == (1 if number >= 3 else 0)
  assert step_numbers(tmp_path) == [2, 3]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_trace_is_closed_when_the_loop_raises(tmp_path, error):
  with pytest.raises(type(error)):
    with profiling.Trace(profiling.Steps(1, 5), tmp_path) as trace:
      with trace.step(1, before=None):
        pass
      trace.after_step(1, jnp.ones(()))
      with trace.step(2, before=None):
        raise error
  assert step_numbers(tmp_path) == [1, 2]
  jax.profiler.start_trace(tmp_path / "next")  # refused while another one runs
  jax.profiler.stop_trace()


def test_what_ended_the_loop_is_told_first(tmp_path, monkeypatch):
  def fail():
    raise OSError("no space")

  stop = jax.profiler.stop_trace
  monkeypatch.setattr(jax.profiler, "stop_trace", fail)
  with pytest.raises(KeyError), pytest.warns(UserWarning, match="--profile: .* no space"):
    with profiling.Trace(profiling.Steps(1, 5), tmp_path) as trace:
      with trace.step(1, before=None):
        raise KeyError
  stop()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with profiling.Trace(profiling.Steps(1, 1), tmp_path) as trace:
    with trace.step(1, before=None):
      pass
    trace.after_step(1, None)
  assert not list(tmp_path.iterdir())


def prepare(base_folder, data, **more):
  config = tiny.config(base_folder, **more)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  return config, base, stages.open_data(config, base, data)


@pytest.fixture(scope="module")
def plain(tiny_base, tiny_data, tmp_path_factory):
  """A run without a trace."""
  out = tmp_path_factory.mktemp("plain") / "run"
  stages.train_policy(*prepare(tiny_base, tiny_data), out)
  return out


def without_times(out):
  return [{k: v for k, v in r.items() if k != "train/pairs_per_second"} for r in logs.read(out)]


@pytest.mark.slow
def test_a_run_with_a_trace_is_the_same_run(plain, tiny_base, tiny_data, tmp_path, capsys):
  command = ["train", "--data", str(tiny_data), "--out", str(tmp_path), *tiny.overrides(tiny_base)]
  assert cli.main([*command, "--profile", "2:3"]) == 0
  events = tmp_path / logs.TENSORBOARD_FOLDER
  assert f"profile  steps 2:3, into {events}" in capsys.readouterr().out
  assert step_numbers(events) == [2, 3]
  assert (tmp_path / train.RUN_FILE).read_bytes() == (plain / train.RUN_FILE).read_bytes()
  ours, theirs = (
    checkpoint.read_metadata(out / train.CHECKPOINTS)["checksums"] for out in (tmp_path, plain)
  )
  assert ours == theirs
  assert without_times(tmp_path) == without_times(plain)
  assert all("train/mfu" not in record for record in logs.read(tmp_path))  # on CPU
  # Again: the run is done, and a trace of what is past is not asked for in vain.
  assert cli.main([*command, "--profile", "2:3"]) == 0
  shown = capsys.readouterr().out
  assert "profile  nothing: steps 2:3 are done, the run goes on after step 4" in shown
  assert len(files(events)) == 1


@pytest.mark.slow
def test_training_that_stops_leaves_its_trace(tiny_base, tiny_data, tmp_path):
  more = {"steps": 10, "optim.learning_rate": 1e30}
  config, base, encoded = prepare(tiny_base, tiny_data, **more)
  with pytest.raises(train.TrainingStopped):
    stages.train_policy(config, base, encoded, tmp_path / "run", profiling.Steps(2, 10))
  assert step_numbers(tmp_path / "run" / logs.TENSORBOARD_FOLDER)[0] == 2


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_leaves_its_trace(tiny_base, tiny_data, tmp_path):
  config, base, encoded = prepare(tiny_base, tiny_data, steps=5000)
  events = tmp_path / "run" / logs.METRICS_FILE

  def stop():
    while not (events.exists() and len(logs.read(events.parent)) > 3):
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  # Should training fail, this thread ends with the test process.
  threading.Thread(target=stop, daemon=True).start()
  with pytest.raises(train.Preempted):
    stages.train_policy(config, base, encoded, tmp_path / "run", profiling.Steps(2, 5000))
  assert step_numbers(tmp_path / "run" / logs.TENSORBOARD_FOLDER)[:2] == [2, 3]


@pytest.mark.slow
def test_utilisation_of_a_run(tiny_base, tiny_data, tmp_path, monkeypatch):
  """On a device whose peak is made up: 8 UNet passes a pair over 8 devices."""
  config, base, encoded = prepare(tiny_base, tiny_data, steps=2)
  monkeypatch.setitem(profiling.TPU_PEAKS, jax.devices()[0].device_kind, 1e9)
  stages.train_policy(config, base, encoded, tmp_path / "run")
  flops = 8 * plan.forward_flops(base)
  for record in logs.read(tmp_path / "run")[1:]:
    expected = flops * record["train/pairs_per_second"] / (8 * 1e9)
    assert record["train/mfu"] == pytest.approx(expected)
