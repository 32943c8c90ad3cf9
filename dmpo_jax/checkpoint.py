"""Checkpoints of a TrainState: written by orbax while training goes on, checked when read.

A step folder holds three items: `params`, `opt_state` and `metadata` (JSON), so that export and
evaluation read the parameters without knowing the optimiser. The frozen reference is never saved,
only its fingerprint. orbax restores a flipped bit and casts a wrong dtype without a word, so a
checksum of every leaf, with its dtype and shape, is saved and compared; the metadata has its own.

All functions that take arrays are collective: with several processes, every one must call them.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

import dmpo_jax
from dmpo_jax import train_step

ITEMS = ("params", "opt_state")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")

# 2^64 / golden ratio spreads the positions (Fibonacci hashing: Knuth, TAOCP vol. 3, section 6.4);
# the multiplier and the shifts are one round of the degski64 mixer.
_SPREAD = 0x9E3779B97F4A7C15
_MULTIPLY = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_MASK = 2**64 - 1
_CHUNK = 2**16  # elements mixed at once: the intermediate arrays stay in cache


def fingerprint(params: PyTree) -> dict[str, str]:
  """A checksum of every leaf: of its dtype, shape and bits, whatever mesh it is split over.

  The sum over elements, modulo 2^64, of mix(position * spread + bits), where mix is a bijection
  of 64-bit words: one changed element always changes the sum, and each process adds up the shards
  it holds, so that no leaf is ever gathered. [derived] Guards against accidents, not attacks.

  Args:
    params: arrays of at most 8 bytes an element; numpy arrays are taken to be the same on every
      process.

  Returns:
    {path joined with dots: "dtype[shape]:sum"}, the sum as 16 hexadecimal digits.

  Raises:
    ValueError: two paths are the same once joined.

  >>> fingerprint({"bias": np.zeros(2, np.float32)})
  {'bias': 'float32[2]:17fb89ee9dcab42a'}
  """
  leaves = flatten(params)
  sums = np.array([_owned_sum(leaf) for leaf in leaves.values()], np.uint64)
  if jax.process_count() > 1:
    # As 32-bit halves: jax would cut 64-bit words.
    halves = multihost_utils.process_allgather(sums.view(np.uint32))
    sums = np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)
  return {
    path: f"{_layout(leaf)}:{total:016x}"
    for (path, leaf), total in zip(leaves.items(), sums.tolist(), strict=True)
  }


def flatten(tree: PyTree) -> dict[str, Any]:
  """Leaves by their path, joined with dots.

  Raises:
    ValueError: two paths are the same once joined.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if name in leaves:
      raise ValueError(f"{name}: two leaves have this path; rename one")
    leaves[name] = leaf
  return leaves


def _layout(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _owned_sum(leaf: Any) -> int:
  """The part of a leaf's sum that this process adds; every element is added by one process."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    if jax.process_index() > 0:
      return 0
  if not isinstance(leaf, jax.Array):
    return _mixed_sum(np.asarray(leaf), (0,) * np.ndim(leaf), np.shape(leaf))
  total = 0
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      start = tuple(axis.start or 0 for axis in shard.index)
      total += _mixed_sum(np.asarray(shard.data), start, leaf.shape)
  return total & _MASK


def _mixed_sum(values: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
  """The sum over the block `values` that begins at `start` of an array of `shape`."""
  if values.size == 0:
    return 0
  offsets, stride = [], 1
  for first, size, whole in zip(start[::-1], values.shape[::-1], shape[::-1], strict=True):
    positions = np.arange(first, first + size, dtype=np.uint64)
    offsets.insert(0, positions * np.uint64(stride * _SPREAD & _MASK))
    stride *= whole
  *outer, columns = offsets or [np.zeros(1, np.uint64)]
  rows = functools.reduce(np.add.outer, outer, np.zeros((), np.uint64)).reshape(-1, 1)
  bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").reshape(rows.size, -1)
  total, step = 0, max(1, _CHUNK // columns.size)
  for i in range(0, rows.size, step):
    mixed = rows[i : i + step] + columns
    mixed += bits[i : i + step]
    mixed ^= mixed >> _HALF
    mixed *= _MULTIPLY
    mixed ^= mixed >> _HALF
    total += int(mixed.sum(dtype=np.uint64))
  return total & _MASK


class Damaged(ValueError):
  """A checkpoint's files are not those that were saved."""


class PutAside(RuntimeError):
  """A damaged checkpoint was put aside; the command, run again, goes on from the one before."""


def damaged_folder(folder: str | os.PathLike) -> epath.Path:
  """Where damaged checkpoints of a folder are put aside: beside it."""
  folder = epath.Path(folder)
  return folder.with_name(folder.name + "-damaged")


class _KeepLastAndBest:
  """Keeps the last `keep` steps and the one with the highest metric (the later of equals)."""

  def __init__(self, keep: int, metric: str | None):
    self.keep, self.metric = keep, metric

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: checkpoint_managers.PreservationContext
  ) -> Sequence[bool]:
    del context
    metrics = {each.step: each.metrics or {} for each in checkpoints}
    kept = {each.step for each in checkpoints[-self.keep :]} | {_best(metrics, self.metric)}
    return [each.step in kept for each in checkpoints]


def _best(metrics: Mapping[int, Mapping[str, float]], metric: str | None) -> int | None:
  values = [(each[metric], step) for step, each in metrics.items() if metric in each]
  return max(((v, step) for v, step in values if math.isfinite(v)), default=(None, None))[1]


class Checkpoints:
  """The checkpoints of one run, in a folder of their own.

  What is found damaged is put aside, in `damaged_folder`, and never removed.

  Args:
    folder: made if missing; what an interrupted save left there is removed.
    keep: number of the last checkpoints to keep, at least 1.
    best_metric: the checkpoint with the highest value of this metric is kept besides; None: none.
    reference: `fingerprint` of the frozen reference; {} where there is none.
    config: the run's configuration, what JSON can hold (tuples come back as lists).

  Raises:
    ValueError: `keep` is below 1, or `config` is not JSON.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int,
    best_metric: str | None,
    reference: Mapping[str, str],
    config: Mapping[str, Any],
  ):
    if keep < 1:
      raise ValueError(f"keep: {keep}; expected at least 1 checkpoint")
    try:
      self._config = json.loads(json.dumps(config))
    except TypeError as error:
      raise ValueError(f"config: {error}; expected what JSON can hold") from error
    self._folder = epath.Path(folder).resolve()
    self._reference = dict(reference)
    self._manager = None
    self._check_metrics()
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_names=(*ITEMS, "metadata"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_KeepLastAndBest(keep, best_metric),
        best_fn=lambda metrics: metrics.get(best_metric, -math.inf),  # only so that they are saved
        cleanup_tmp_directories=True,
      ),
    )

  def save(self, state: train_step.TrainState, metrics: Mapping[str, SupportsFloat]) -> bool:
    """Saves `state` in the background; on return its buffers may be donated.

    Waits for the save before this one, and for the checksums.

    Returns:
      False if this step is already saved: nothing is written then.

    Raises:
      ValueError: a later step is saved, so that this one would never be restored.
    """
    step, latest = int(state.step), self.latest_step()
    if latest is not None and step <= latest:
      if step in self._manager.all_steps():
        return False
      raise ValueError(
        f"{self._folder}: step {step} cannot be saved after step {latest}; resume from step "
        f"{latest}, or choose another folder"
      )
    metrics = {name: float(value) for name, value in metrics.items()}
    metadata = {
      "step": step,
      "metrics": metrics,
      "reference": self._reference,
      "config": self._config,
      "versions": _versions(),
      "checksums": {item: fingerprint(getattr(state, item)) for item in ITEMS},
    }
    metadata["checksum"] = _text_sum(metadata)
    # On an accelerator orbax copies to the host before it returns; on the CPU it reads the buffers
    # in place, and its hold on them keeps jax from reusing them when the step donates them.
    return self._manager.save(
      step,
      metrics=metrics,
      force=True,  # we have decided above
      args=ocp.args.Composite(
        **{item: ocp.args.StandardSave(getattr(state, item)) for item in ITEMS},
        metadata=ocp.args.JsonSave(metadata),
      ),
    )

  def restore_latest(self, abstract_state: train_step.TrainState) -> train_step.TrainState | None:
    """The last saved state that is whole, checked; None if nothing was saved yet.

    A damaged one is put aside with a warning, and the one before is taken.

    Args:
      abstract_state: shapes, dtypes and shardings (`sharding.abstract_tree`), of any mesh. A leaf
        without a sharding goes to this process's first device.

    Raises:
      ValueError: made with another reference, other shapes or dtypes (the first leaf that differs
        is named), or all that was saved is damaged: a run never starts anew by itself.
      PutAside: one was damaged and there are several processes, which must agree on the next.
    """
    self.wait()
    while (step := self.latest_step()) is not None:
      try:
        return self._restore(step, abstract_state)
      except Damaged:
        pass
      try:  # read anew: it may have been the reading
        return self._restore(step, abstract_state)
      except Damaged as error:
        self._put_aside(step, str(error))
    aside = damaged_folder(self._folder)
    if aside.exists():
      raise ValueError(
        f"{self._folder}: no checkpoint is left, and {aside} has the damaged ones; give another "
        "--out, or remove that folder to start anew"
      )
    return None

  def _check_metrics(self) -> None:
    """Puts aside steps whose metrics are damaged: orbax reads those of all steps when it opens."""
    if not self._folder.exists():
      return
    for step in sorted(ocp.utils.checkpoint_steps(self._folder), reverse=True):
      file = self._folder / str(step) / "metrics" / "metrics"
      try:
        whole = not file.exists() or isinstance(json.loads(file.read_bytes()), dict)
      except ValueError:
        whole = False
      if not whole:
        self._put_aside(step, f"{file}: damaged, not a JSON object")

  def _put_aside(self, step: int, reason: str) -> None:
    where, aside = self._folder / str(step), damaged_folder(self._folder)
    number = 1
    while (to := aside / f"{step}-{number}").exists():
      number += 1
    aside.mkdir(parents=True, exist_ok=True)
    try:
      where.rename(to)
    except FileNotFoundError:  # another process was first
      pass
    steps = ocp.utils.checkpoint_steps(self._folder)
    before = max((each for each in steps if each < step), default=None)
    following = "there is none before it" if before is None else f"step {before} is tried"
    text = f"{reason}. Put aside as {to}; {following}"
    if jax.process_count() > 1:
      raise PutAside(f"{text}; run the command again")
    warnings.warn(text, stacklevel=3)
    if self._manager is not None:
      self._manager.reload()

  def _restore(self, step: int, abstract_state: train_step.TrainState) -> train_step.TrainState:
    where = self._folder / str(step)
    metadata = _read_metadata(where)
    _check_reference(metadata["reference"], self._reference, where)
    return _read_state(where, metadata, abstract_state)

  def latest_step(self) -> int | None:
    """The last step that was saved, or is being saved."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Until what was given to `save` is on disk; raises what went wrong there."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then ends the background threads."""
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


def load_params(
  folder: str | os.PathLike, abstract_params: PyTree, step: int | None = None
) -> PyTree:
  """The parameters of a checkpoint, checked; the optimiser's state is not read.

  Args:
    folder: as given to `Checkpoints`; may belong to a run in progress.
    abstract_params: as in `Checkpoints.restore_latest`.
    step: the latest if None; see `best_step`.

  Raises:
    ValueError: no such checkpoint, other shapes or dtypes, unreadable, or damaged.
  """
  where = _find(folder, step)
  return _read_items(where, _read_metadata(where), {"params": abstract_params})["params"]


def load_state(
  folder: str | os.PathLike, abstract_state: train_step.TrainState, step: int | None = None
) -> train_step.TrainState:
  """The state of a checkpoint, checked; as `load_params`."""
  where = _find(folder, step)
  return _read_state(where, _read_metadata(where), abstract_state)


def read_metadata(folder: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
  """What was saved beside the arrays of a checkpoint.

  Returns:
    step, metrics, reference (fingerprint), config, versions and checksums {item: fingerprint}.

  Raises:
    ValueError: no such checkpoint, or its metadata is unreadable.
  """
  return _read_metadata(_find(folder, step))


def saved_steps(folder: str | os.PathLike) -> list[int]:
  """The steps of which a complete checkpoint is saved, in order; of no folder, none."""
  path = epath.Path(folder).resolve()
  return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def best_step(folder: str | os.PathLike, metric: str) -> int | None:
  """The saved step with the highest `metric` (the later of equals); None if none has it.

  Raises:
    ValueError: no checkpoint, or one's metadata is unreadable.
  """
  path = _find(folder, None).parent
  steps = ocp.utils.checkpoint_steps(path)
  metrics = {step: _read_metadata(path / str(step))["metrics"] for step in steps}
  return _best(metrics, metric)


def _find(folder: str | os.PathLike, step: int | None) -> epath.Path:
  """The folder of a complete step, the latest if None."""
  # No CheckpointManager: it would tidy up a folder in which its run may be writing.
  path = epath.Path(folder).resolve()
  if not path.is_dir():
    raise ValueError(f"{path}: no such folder; expected the checkpoints of a run")
  steps = sorted(ocp.utils.checkpoint_steps(path))
  if not steps:
    raise ValueError(f"{path}: holds no complete checkpoint; expected the checkpoints of a run")
  step = steps[-1] if step is None else step
  if step not in steps:
    raise ValueError(f"{path}: step {step} is not there; expected one of {steps}")
  return path / str(step)


def _versions() -> dict[str, str]:
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {**versions, "dmpo_jax": dmpo_jax.__version__}


def _read_metadata(where: epath.Path) -> dict[str, Any]:
  metadata = _read(where, metadata=ocp.args.JsonRestore())["metadata"]
  if not isinstance(metadata, dict) or "checksum" not in metadata:
    raise Damaged(f"{where}: its metadata lacks what we write")
  if metadata.pop("checksum") != _text_sum(metadata):
    raise Damaged(f"{where}: its metadata is damaged: another checksum than the one it gives")
  if str(metadata["step"]) != where.name:
    raise Damaged(f"{where}: its metadata is of step {metadata['step']}")
  return metadata


def _text_sum(metadata: Mapping[str, Any]) -> str:
  text = json.dumps(metadata, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _read(where: epath.Path, **args: Any) -> Any:
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    try:
      return checkpointer.restore(where, args=ocp.args.Composite(**args))
    except Exception as error:  # a damaged file can raise anything, deep in tensorstore
      reason = next(iter(str(error).splitlines()), "")[:200]  # the rest is tensorstore's state
      text = f"{type(error).__name__}: {reason}"
      raise Damaged(f"{where}: cannot be read ({text})") from error


def _read_state(
  where: epath.Path, metadata: Mapping[str, Any], abstract: train_step.TrainState
) -> train_step.TrainState:
  restored = _read_items(where, metadata, {item: getattr(abstract, item) for item in ITEMS})
  place = _placed(abstract.step).sharding
  count = np.asarray(metadata["step"], abstract.step.dtype)
  count = jax.make_array_from_callback((), place, lambda index: count[index])
  return train_step.TrainState(count, restored["params"], restored["opt_state"])


def _read_items(
  where: epath.Path, metadata: Mapping[str, Any], abstract: Mapping[str, PyTree]
) -> dict[str, PyTree]:
  """The items that `abstract` names, of the saved layouts and with the saved checksums."""
  for item, target in abstract.items():
    _check_layouts(metadata["checksums"][item], target, f"{where}: {item}")
  args = {
    item: ocp.args.StandardRestore(jax.tree.map(_placed, target))
    for item, target in abstract.items()
  }
  restored = _read(where, **args)
  for item in abstract:
    check_sums(metadata["checksums"][item], fingerprint(restored[item]), f"{where}: {item}")
  return {item: restored[item] for item in abstract}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
  # Else orbax takes the sharding of the file, whose devices may not be here.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = getattr(leaf, "sharding", None) or here
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _check_layouts(saved: Mapping[str, str], target: PyTree, where: str) -> None:
  wanted = {path: _layout(leaf) for path, leaf in flatten(target).items()}
  for path in {**wanted, **saved}:
    got = saved[path].split(":")[0] if path in saved else "nothing"
    expected = wanted.get(path, "nothing")
    if got != expected:
      raise ValueError(
        f"{where}: {path} is {got} in the checkpoint; expected {expected}; is this the model and "
        "the optimiser it was made with?"
      )


def check_sums(saved: Mapping[str, str], got: Mapping[str, str], where: str) -> None:
  """Compares two fingerprints.

  Raises:
    Damaged: a leaf differs; the first is named.
  """
  for path, expected in saved.items():
    found = got.get(path, "nothing")
    if found != expected:
      raise Damaged(f"{where}: {path} is damaged: checksum {found}, expected {expected}")


def _check_reference(saved: Mapping[str, str], ours: Mapping[str, str], where: Any) -> None:
  for path in {**saved, **ours}:
    if saved.get(path) != ours.get(path):
      raise ValueError(
        f"{where}: made with another reference, first different leaf {path}: "
        f"{saved.get(path, 'nothing')} in the checkpoint, {ours.get(path, 'nothing')} now; give "
        "the reference it was made with, or choose another folder"
      )
