"""How well a run uses its devices: a trace of some steps, and the model FLOPs utilisation."""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from dmpo_jax import plan

# Dense bfloat16 FLOP/s of one device, by `device_kind`. Of TPUs: Google's documentation, see
# `plan.Kind`; the two names of a chip are those that versions of jax give it.
TPU_PEAKS = {
  "TPU v4": plan.KINDS["v4"].peak,
  "TPU v5 lite": plan.KINDS["v5e"].peak,
  "TPU v5e": plan.KINDS["v5e"].peak,
  "TPU v5": plan.KINDS["v5p"].peak,
  "TPU v5p": plan.KINDS["v5p"].peak,
  "TPU v6 lite": plan.KINDS["v6e"].peak,
  "TPU v6e": plan.KINDS["v6e"].peak,
  "TPU7x": plan.KINDS["tpu7x"].peak / 2,  # a chip is two devices
}
# Of GPUs, whose kind has this in it: NVIDIA's data sheets of the A100, H100 and H200 Tensor Core
# GPUs. Those of Hopper give the rate with sparsity, which is twice the dense one.
GPU_PEAKS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 1979e12 / 2,
  "NVIDIA H100 PCIe": 1513e12 / 2,
  "NVIDIA H200": 1979e12 / 2,
}
# Parts of a GPU, and cards with fewer or slower cores than the name alone stands for.
UNKNOWN_GPUS = (" MIG ", " NVL")


def peak_flops(kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of one device of this `device_kind`, None if unknown.

  >>> peak_flops("TPU v4"), peak_flops("NVIDIA A100-SXM4-80GB"), peak_flops("cpu")
  (275000000000000.0, 312000000000000.0, None)
  """
  if kind in TPU_PEAKS:
    return TPU_PEAKS[kind]
  if any(mark in kind for mark in UNKNOWN_GPUS):
    return None
  found = [name for name in GPU_PEAKS if name in kind]
  return GPU_PEAKS[max(found, key=len)] if found else None


def mfu(flops: float | None, per_second: float, devices: int, kind: str) -> float | None:
  """Model FLOPs utilisation: what had to be computed over what the devices could have computed.

  Recomputation (remat) is not counted as useful, and the peak is that of bfloat16 whatever the
  precision (Chowdhery et al. 2022, PaLM, appendix B).

  Args:
    flops: that an example cannot do without; None if unknown.
    per_second: examples per second, of all devices together.
    kind: of a device, `device_kind`.

  Returns:
    A share, usually in [0, 1]; None if `flops` or the peak is unknown.
  """
  peak = peak_flops(kind)
  if flops is None or peak is None:
    return None
  return flops * per_second / (devices * peak)


def count_flops(count: Callable[[], float] | None, kind: str) -> float | None:
  """FLOPs of an example, counted only where `mfu` can make use of them.

  Args:
    count: lowers the model and takes XLA's count, some seconds; None if there is nothing to count.
    kind: of a device, `device_kind`.

  Returns:
    None without `count`, on a device whose peak is unknown, or (with a warning) if jax was told to
    do without CPU, the only platform that counts before compiling.
  """
  if count is None or peak_flops(kind) is None:
    return None
  try:
    jax.local_devices(backend="cpu")
  except RuntimeError as error:
    warnings.warn(
      f"train/mfu is left out, as FLOPs are counted on CPU ({error}); JAX_PLATFORMS is "
      f"{os.environ.get('JAX_PLATFORMS', '')!r}: add ',cpu' to have it",
      stacklevel=2,
    )
    return None
  with jax.default_device("cpu"):
    return count()


class Steps(NamedTuple):
  """The steps to trace, from `first` to `last`, counted from 1 as in the records of a run."""

  first: int
  last: int

  def __str__(self) -> str:
    return f"{self.first}:{self.last}"


def read_steps(text: str, total: int) -> Steps:
  """`10:15` or `10` -> the steps to trace in a run of `total` steps.

  Raises:
    ValueError: it is neither, or beyond the run.

  >>> read_steps("10:15", 100), read_steps("10", 100)
  (Steps(first=10, last=15), Steps(first=10, last=10))
  """
  found = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text)
  if not found:
    raise ValueError(f"--profile: expected FIRST:LAST or one step, such as 10:15, got {text!r}")
  first = int(found[1])
  last = first if found[2] is None else int(found[2])
  if not 1 <= first <= last <= total:
    raise ValueError(
      f"--profile: expected 1 <= FIRST <= LAST <= {total}, the steps of the run, got {text!r}"
    )
  return Steps(first, last)


class Trace:
  """Writes a trace of some steps for TensorBoard's profile plugin (XProf).

  A context manager around the loop: however the loop ends, a trace that has begun is written. On
  process 0 alone: all processes run the same program.

  Args:
    steps: which; none if None.
    folder: of TensorBoard; the trace comes under `plugins/profile/` in it.
  """

  def __init__(self, steps: Steps | None, folder: str | os.PathLike):
    self._steps = steps if jax.process_index() == 0 else None
    self._folder = folder
    self._active, self._result = False, None

  @contextlib.contextmanager
  def step(self, number: int, before: Any) -> Iterator[None]:
    """Marks what the host does for a step: waiting for its batch and giving it to the devices.

    Args:
      number: of the step, from 1, rising.
      before: arrays made by the steps before, which are waited for ahead of a trace.
    """
    if self._steps is None or not self._steps.first <= number <= self._steps.last:
      yield
      return
    if not self._active:
      jax.block_until_ready(before)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # every call of every thread: four times the file
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._active = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after_step(self, number: int, result: Any) -> None:
    """Says what a step gave; after the last one it is waited for and the trace is written."""
    if not self._active:
      return
    self._result = result
    if number >= self._steps.last:
      self._stop()

  def _stop(self) -> None:
    self._active = False
    try:
      jax.block_until_ready(self._result)  # the devices' work belongs into the trace
    finally:
      jax.profiler.stop_trace()
      self._result = None

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
    if not self._active:
      return
    try:
      self._stop()
    except Exception as failure:
      if error is None:
        raise
      # What ended the loop is what has to be told.
      warnings.warn(f"--profile: while the trace was written: {failure}", stacklevel=2)
