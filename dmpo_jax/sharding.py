"""The mesh ("data", "fsdp"), the placement of batches and states on it, and the batch-size check.

A batch is split over both axes: every device works on its own examples. Parameters and optimiser
moments are split over "fsdp" only and repeated along "data".
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from dmpo_jax.models import shards

AXES = ("data", shards.AXIS)
# Elements; chosen here: below 256 KiB of float32 a gather's latency costs more than it saves.
MIN_SHARDED_SIZE = 2**16
# Name of a parameter, of whatever model -> its axes, from the end, of which one may be split over
# "fsdp". Optimiser moments, averages and the reference carry the names of their parameters. Biases,
# scales and all else of one axis are whole everywhere.
PARTITION_RULES = {
  "kernel": (-1, -2),  # output or input features; a convolution's window stays in one piece
  "embedding": (-1, -2),  # width or words
  "down": (-1, -2),  # of a low-rank delta: rank or input features
  "up": (-1, -2),
}


class DoesNotDivide(ValueError):
  """A parameter cannot be split over as many devices."""


def make_mesh(
  data: int | None = None, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of `data` x `fsdp` devices.

  Args:
    data: groups of devices that each hold a whole state; None: as many as the devices allow. Of
      several TPU slices each has as many of them.
    fsdp: devices over which one state is split.
    devices: all devices of all processes if None.

  Raises:
    ValueError: `data` x `fsdp` is not the number of devices.

  >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1}
  """
  devices = jax.devices() if devices is None else list(devices)
  if fsdp < 1 or (data is not None and data < 1):
    raise ValueError(f"mesh: data {data} x fsdp {fsdp}; expected both at least 1")
  if data is None:
    data = len(devices) // fsdp
  if data * fsdp != len(devices):
    valid = [f"{len(devices) // n} x {n}" for n in _divisors(len(devices))]
    raise ValueError(
      f"mesh: data {data} x fsdp {fsdp} is not the {len(devices)} device(s) there are; "
      f"expected one of {', '.join(valid)}"
    )
  slices = len({_slice_of(device) for device in devices})
  if slices > 1:
    if data % slices:
      raise ValueError(
        f"mesh: data {data} x fsdp {fsdp} on {slices} slices; expected fsdp to divide the "
        f"{len(devices) // slices} devices of a slice: parameters are not split between slices"
      )
    grid = mesh_utils.create_hybrid_device_mesh((data // slices, fsdp), (slices, 1), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)
  # Auto: with the default, Explicit, indexing or convolving a sharded array raises.
  return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def _slice_of(device: jax.Device) -> int:
  """Number of a TPU's slice; devices of other kinds, and of a single slice, have none."""
  return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis split over all devices, the other axes whole."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def fsdp_shardings(
  tree: PyTree, mesh: Mesh | AbstractMesh, *, min_size: int = MIN_SHARDED_SIZE
) -> PyTree[NamedSharding]:
  """A sharding for every leaf, by `PARTITION_RULES`.

  Of the axes that a rule names the largest is split that "fsdp" divides; of two of one size the
  last: the output features of a linen kernel, which leaves the sums over the input features on one
  device. Leaves of one axis or fewer than `min_size` elements are replicated.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`; a whole TrainState will do.
    min_size: elements.

  Raises:
    DoesNotDivide: "fsdp" divides none of those axes of a leaf.
    ValueError: a leaf has a name that no rule knows.

  >>> mesh = make_mesh(devices=jax.devices()[:1])
  >>> fsdp_shardings({"step": np.zeros(())}, mesh)["step"].spec
  P()
  """
  specs = _specs(tree, mesh.shape["fsdp"], min_size)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _specs(tree: PyTree, parts: int, min_size: int) -> PyTree[PartitionSpec]:
  def spec(path, leaf):
    if parts == 1 or len(leaf.shape) < 2 or math.prod(leaf.shape) < min_size:
      return PartitionSpec()
    sizes = _splittable(path, leaf)
    fitting = [(size, axis) for axis, size in sizes.items() if size % parts == 0]
    if not fitting:
      raise DoesNotDivide(
        f"fsdp: {parts} divides neither of the {' and '.join(map(str, sizes.values()))} features "
        f"of {_name(path)} {list(leaf.shape)}; expected {_nearest(tree, parts, min_size)}"
      )
    return PartitionSpec(*[None] * max(fitting)[1], "fsdp")

  return jax.tree_util.tree_map_with_path(spec, tree)


def _splittable(path, leaf) -> dict[int, int]:
  """Axis -> size, of those that a leaf's rule names."""
  rule = PARTITION_RULES.get(_name(path).rpartition("/")[2])
  if rule is None:
    raise ValueError(
      f"sharding: no rule for {_name(path)} {list(leaf.shape)}; expected a parameter that is "
      f"called {', '.join(PARTITION_RULES)}, or one of a single axis"
    )
  return {len(leaf.shape) + axis: leaf.shape[axis] for axis in rule}


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _nearest(tree: PyTree, parts: int, min_size: int) -> str:
  """The numbers of parts next to `parts` that all leaves can be split into."""
  sizes = {
    tuple(_splittable(path, leaf).values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if len(leaf.shape) > 1 and math.prod(leaf.shape) >= min_size
  }

  def fits(number):
    return all(any(size % number == 0 for size in each) for each in sizes)

  below = max(filter(fits, range(1, parts)))  # 1 always does
  above = next(filter(fits, range(parts + 1, 2 * max(map(max, sizes)))), None)
  return f"{below}" + (f" or {above}" if above else "")


def map_rows(
  function: Callable, params: PyTree, frozen: PyTree, rows: PyTree, *, split: bool = True
) -> PyTree:
  """`function(params, frozen, rows)`, each device working on its own rows.

  Nothing of the rows is sent between devices: left to itself the compiler may split a layer by
  its features in place of the batch, and send activations around. For use under `jax.set_mesh`;
  without a mesh of several devices the function is called as it is.

  Args:
    function: -> values by row. It finds parameters as `models.shards.Shard`.
    params: at `fsdp_shardings`; likewise `frozen`.
    rows: arrays [B, ...].
    split: rows lie at `batch_sharding`; if not, every device takes all of them.
  """
  return _on_devices(function, params, frozen, rows, split=split, gradients=False)


def mean_gradients(
  function: Callable, params: PyTree, frozen: PyTree, rows: PyTree
) -> tuple[PyTree, PyTree]:
  """`map_rows` of a function that gives (gradients, values by row).

  Args:
    function: -> gradients of the mean over the rows it is given, with the structure of `params`.

  Returns:
    Gradients of the mean over all rows, at the places of `params`; the values.
  """
  return _on_devices(function, params, frozen, rows, split=True, gradients=True)


def mean_over_devices(value: jax.Array) -> jax.Array:
  """Of a device's own value, within `map_rows` and `mean_gradients`; elsewhere the value itself."""
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return jax.lax.pmean(value, axes) if axes else value


def _on_devices(function, params, frozen, rows, *, split, gradients):
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(params, frozen, rows)
  specs = [_specs(tree, mesh.shape["fsdp"], MIN_SHARDED_SIZE) for tree in (params, frozen)]
  by_row = PartitionSpec(AXES) if split else PartitionSpec()

  def local(params, frozen, rows):
    result = function(_shards(params, specs[0]), _shards(frozen, specs[1]), rows)
    if not gradients:
      return result
    totals, values = result
    return jax.tree.map(functools.partial(_mean, mesh), totals, is_leaf=shards.is_shard), values

  return jax.shard_map(
    local,
    in_specs=(*specs, by_row),
    out_specs=(specs[0], by_row) if gradients else by_row,
    check_vma=False,
  )(params, frozen, rows)


def _shards(tree: PyTree, specs: PyTree) -> PyTree:
  return jax.tree.map(
    lambda leaf, spec: shards.Shard(leaf, len(spec) - 1) if len(spec) else leaf, tree, specs
  )


def _mean(mesh: AbstractMesh, total: jax.Array | shards.Shard) -> jax.Array:
  """Over the devices; a `Shard` was summed over "fsdp" where it was gathered."""
  if isinstance(total, shards.Shard):
    return jax.lax.psum(total.value, "data") / mesh.size
  return jax.lax.psum(total, AXES) / mesh.size


def abstract_tree(tree: PyTree, shardings: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
  """Shapes, dtypes and places without values: what a checkpoint is restored onto."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


def put_batch(batch: PyTree[np.ndarray], mesh: Mesh) -> PyTree[jax.Array]:
  """This process's share of a batch -> global arrays, split over all devices.

  Args:
    batch: arrays [global batch / processes, ...]; the shares are joined in the order of the mesh.
  """
  place = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)


def place_ahead(
  batches: Iterable[PyTree[np.ndarray]], mesh: Mesh, *, ahead: int = 1
) -> Iterator[PyTree[jax.Array]]:
  """`put_batch` of every batch, `ahead` of them before they are asked for.

  The copy to the devices then runs beside the step before it. Each batch ahead is held in device
  memory besides the one that is worked on.
  """
  placed: collections.deque[PyTree[jax.Array]] = collections.deque()
  for batch in batches:
    placed.append(put_batch(batch, mesh))
    if len(placed) > ahead:
      yield placed.popleft()
  yield from placed


def put_tree(tree: PyTree, shardings: PyTree) -> PyTree[jax.Array]:
  """Host values, the same on every process -> global arrays where `shardings` says.

  Always copies, so that one source may give both the policy, whose buffers are donated, and the
  reference.

  Args:
    tree: numpy arrays, arrays that are read when numpy asks for them, or jax arrays that this
      process holds whole.
    shardings: one for all, or a tree of them.
  """

  def put(leaf, place):
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, place, lambda index: np.array(host[index]))

  return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
  """Refuses a batch that cannot be cut into equal parts.

  Args:
    batch_size: global examples (pairs) per update.
    accumulation: parts of a batch that run one after the other.

  Raises:
    ValueError: `batch_size` is not a positive multiple of devices x accumulation, or
      `accumulation` is below 1.
  """
  if accumulation < 1:
    raise ValueError(f"accumulation: {accumulation}; expected at least 1")
  unit = mesh.size * accumulation
  if batch_size > 0 and batch_size % unit == 0:
    return
  below = max(batch_size, 0) // unit * unit
  nearest = [str(size) for size in (below, below + unit) if size > 0]
  raise ValueError(
    f"batch_size: {batch_size} cannot be split over {mesh.size} device(s) x {accumulation} "
    f"accumulation part(s); expected a multiple of {unit}: {' or '.join(nearest)}"
  )
