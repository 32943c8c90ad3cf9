"""Several real processes on one machine train as one, over CPU collectives (gloo)."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import cli, logs, train


def start(base, data, out, processes=1, port=None, only=None, devices=1, **settings):
  """`dmpo train` as so many processes of one device each, or as one with `devices` of them."""
  command = [sys.executable, "-m", "dmpo_jax.cli", "train", "--data", str(data), "--out", str(out)]
  command += tiny.overrides(base, save_every=5, log_every=1, validate_every=10, **settings)
  common = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    # More than one each can wait for ever for the others where there are few cores.
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "XLA_FLAGS": tiny.QUICK_TO_COMPILE,
  }
  if processes > 1:
    command.append("--distributed")
    common |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
  return [
    subprocess.Popen(command, env={**common, "JAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE)
    for index in (range(processes) if only is None else only)
  ]


def finish(processes, timeout=600):
  errors = [each.communicate(timeout=timeout)[1].decode() for each in processes]
  return [each.returncode for each in processes], errors


@pytest.fixture
def port():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def trained(base, out):
  return train.load_trained(out, base_lib.load_base(str(base)).shapes["unet"])


def wait_for_step(out, step, deadline=300):
  end = time.monotonic() + deadline
  while time.monotonic() < end:
    if (out / logs.METRICS_FILE).exists() and logs.read(out)[-1:]:
      if logs.read(out)[-1]["step"] >= step:
        return
    time.sleep(0.05)
  raise TimeoutError(f"{out}: step {step} was not reached")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(tiny_base, tiny_data, tmp_path, port, processes):
  settings = {"steps": 10, "fsdp": 2}
  one = start(tiny_base, tiny_data, tmp_path / "one", devices=processes, **settings)
  assert finish(one)[0] == [0]
  codes, errors = finish(
    start(tiny_base, tiny_data, tmp_path / "several", processes, port, **settings)
  )
  assert codes == [0] * processes, errors
  one, several = (logs.read(tmp_path / name) for name in ("one", "several"))
  assert [record["step"] for record in several] == [record["step"] for record in one]
  for record, other in zip(several, one, strict=True):
    # The same pairs and noise; sums over devices in another order.
    assert record.get("train/loss", 0) == pytest.approx(other.get("train/loss", 0), rel=1e-4)
  params = [trained(tiny_base, tmp_path / name) for name in ("one", "several")]
  # Adam moves each weight by up to 10 learning rates, whatever the size of its gradient.
  moved = 10 * tiny.config(tiny_base).optim.learning_rate
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=0.05 * moved), *params)


@pytest.mark.slow
def test_two_processes_are_preempted_and_one_goes_on(tiny_base, tiny_data, tmp_path, port):
  """SIGTERM to one of two: both save the same step and say so; one process takes the run over."""
  run = tmp_path / "run"
  processes = start(tiny_base, tiny_data, run, 2, port, steps=2000, **{"optim.warmup_steps": 1})
  wait_for_step(run, 3)
  processes[1].send_signal(signal.SIGTERM)
  codes, errors = finish(processes)
  assert codes == [cli.AGAIN] * 2, errors
  assert "told to stop after step" in errors[0]
  last = logs.read(run)[-1]["step"]
  assert 3 <= last < 2000
  (alone,) = start(tiny_base, tiny_data, run, steps=2000, **{"optim.warmup_steps": 1})
  wait_for_step(run, last + 2)
  alone.send_signal(signal.SIGTERM)
  assert finish([alone])[0] == [cli.AGAIN]
  steps = [record["step"] for record in logs.read(run)]
  assert steps == list(range(steps[-1] + 1))  # none twice, none left out


@pytest.mark.slow
def test_a_process_with_another_configuration_is_refused(tiny_base, tiny_data, tmp_path, port):
  run = tmp_path / "run"
  (first,) = start(tiny_base, tiny_data, run, 2, port, only=[0], steps=10)
  (other,) = start(tiny_base, tiny_data, run, 2, port, only=[1], steps=10, seed=3)
  (code,), (error,) = finish([other], timeout=300)
  first.kill()
  first.communicate()
  assert code == 2 and "seed is 0 there and 3 here" in error


def test_a_number_that_is_none_is_named(tiny_base, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--distributed"]
  assert cli.main(["train", *arguments, *tiny.overrides(tiny_base)]) == 2
  error = capsys.readouterr().err
  assert "JAX_NUM_PROCESSES: expected a whole number, got 'two'" in error


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_named(tiny_base, tmp_path):
  command = [
    sys.executable,
    "-m",
    "dmpo_jax.cli",
    "train",
    "--distributed",
    "--data",
    str(tmp_path),
  ]
  command += ["--out", str(tmp_path / "run"), *tiny.overrides(tiny_base)]
  unset = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  environment = {name: value for name, value in os.environ.items() if name not in unset}
  found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
  assert found.returncode == 2
  assert "no cluster was found" in found.stderr and "JAX_COORDINATOR_ADDRESS" in found.stderr
