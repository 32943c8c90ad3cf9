"""What a training step would take on a TPU slice that is not here: compiled, not run.

The TPU compiler runs on any x86 Linux machine (`pip install 'dmpo_jax[tpu]'`). It is given the true
step, `program.make_program`, for the devices of a topology; memory, FLOPs and collectives are read
from the compiled program. Nothing is executed, and times are bounds, not measurements.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dmpo_jax
from dmpo_jax import base as base_lib
from dmpo_jax import config as config_lib
from dmpo_jax import hlo, objectives, optimizer, program, sharding, tasks, train_step, types
from dmpo_jax.data import encode_shard
from dmpo_jax.models import attention

LABEL = "compiled, not run"
GIB = 2**30
EFFORTS = {
  # At its default effort the compiler takes half an hour and more for Stable Diffusion on 2 cores.
  "quick": {"exec_time_optimization_effort": -1.0, "memory_fitting_effort": -1.0},
  "full": {},
}


class Kind(NamedTuple):
  """A TPU chip, by Google's documentation (cloud.google.com/tpu/docs), November 2026.

  Attributes:
    peak: bfloat16 FLOP/s.
    memory: bytes of HBM.
    links: bytes/s of all links between chips together.
    topologies: shapes that can be had.
  """

  peak: float
  memory: float
  links: float
  topologies: tuple[str, ...]


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
KINDS = {
  "v4": Kind(275e12, 32 * GIB, 300e9, _CUBES),
  "v5e": Kind(197e12, 16 * GIB, 200e9, _FLAT),
  "v5p": Kind(459e12, 95 * GIB, 600e9, _CUBES),
  "v6e": Kind(918e12, 32 * GIB, 448e9, _FLAT),
  "tpu7x": Kind(2307e12, 192 * GIB, 1200e9, _CUBES),
}


class Topology(NamedTuple):
  """Attributes:
  name: as the compiler knows it: "v5e:4x4".
  slices: of this shape, joined by the data centre's network.
  chips: of all slices.
  """

  name: str
  slices: int
  chips: int

  @property
  def kind(self) -> Kind:
    return KINDS[self.name.partition(":")[0]]

  def __str__(self) -> str:
    return self.name + (f" x {self.slices} slices" if self.slices > 1 else "")


def read_topology(text: str, slices: int = 1) -> Topology:
  """`v5e:16x16` -> a topology; `7x` is short for tpu7x.

  Raises:
    ValueError: unknown kind or shape; the known ones are listed.

  >>> read_topology("v5e:4x4").chips
  16
  >>> read_topology("7x:2x2x1", 2).chips
  8
  """
  kind, _, shape = text.partition(":")
  kind = "tpu7x" if kind == "7x" else kind
  if kind not in KINDS:
    raise ValueError(f"--topology: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
  if shape not in KINDS[kind].topologies:
    known = ", ".join(f"{kind}:{each}" for each in KINDS[kind].topologies)
    raise ValueError(f"--topology: unknown shape in {text!r}; expected one of {known}")
  if slices < 1:
    raise ValueError(f"--slices: expected at least 1, got {slices}")
  chips = math.prod(map(int, shape.split("x")))
  return Topology(f"{kind}:{shape}", slices, slices * chips)


class DoesNotFit(ValueError):
  """The compiler finds no room for the program in a chip's memory."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Figures of one compiled step; bytes and FLOPs are per chip, and all of them not run.

  Attributes:
    pairs_per_chip: of one update.
    memory: bytes by part: params, optimizer, reference, text_encoders, batch, temporaries, program.
    memory_limit: bytes that the chip has.
    flops: of one update by the compiler's count, and kernels by ours.
    minimum_flops: the forward passes of the UNet that each pair needs, see `minimum_forwards`.
    collectives: kind -> (number, bytes of their results) in one update.
    compute_seconds: the compiler's estimate of one update, kernels at peak; nothing waits.
    link_seconds: the collectives' bytes over the links' bandwidth, were none hidden.
  """

  topology: str
  chips: int
  mesh: dict[str, int]
  remat: str
  pairs_per_chip: int
  accumulation: int
  effort: str
  memory: dict[str, int]
  memory_limit: int
  flops: float
  kernel_flops: float
  minimum_flops: float
  collectives: dict[str, tuple[int, int]]
  compute_seconds: float
  link_seconds: float
  steps: int
  compile_seconds: float
  versions: dict[str, str]
  label: str = LABEL

  @property
  def total_memory(self) -> int:
    return sum(self.memory.values())

  @property
  def seconds(self) -> float:
    """Of one update, if nothing of the collectives were hidden behind the computation."""
    return self.compute_seconds + self.link_seconds

  @property
  def pairs_per_second(self) -> float:
    return self.chips * self.pairs_per_chip / self.seconds

  @property
  def share_of_peak(self) -> float:
    """FLOPs that had to be done over those that the chip could have done meanwhile."""
    kind = KINDS[self.topology.partition(":")[0]]
    return self.minimum_flops / (self.seconds * kind.peak)

  @property
  def hours(self) -> float:
    return self.steps * self.seconds / 3600

  def to_dict(self) -> dict[str, Any]:
    derived = "total_memory seconds pairs_per_second share_of_peak hours".split()
    return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what libtpu writes of missing accelerators from the user; shown if something fails."""
  sys.stderr.flush()
  with tempfile.TemporaryFile() as log:
    before = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
      yield
    except Exception:
      log.seek(0)
      os.write(before, log.read())
      raise
    finally:
      os.dup2(before, 2)
      os.close(before)


def find_devices(topology: Topology) -> list[jax.Device]:
  """The devices of a topology, for a mesh; they can be compiled for and not computed on.

  Raises:
    ValueError: the TPU compiler is not installed, or does not know the topology.
  """
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a killed process leaves a lock
  more = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    with _quiet():
      found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **more)
  except (ModuleNotFoundError, NotImplementedError, RuntimeError) as error:
    raise ValueError(
      f"plan: no TPU compiler for {topology}: {str(error).splitlines()[0]}; it comes with "
      "pip install 'dmpo_jax[tpu]', for Linux on x86-64"
    ) from error
  return list(found.devices)


def abstract_task(
  config: config_lib.Config, base: base_lib.Base
) -> tuple[Any, objectives.Frozen, train_step.Objective, types.Batch]:
  """What the configuration trains, as shapes: parameters, frozen, objective, a global batch."""
  unet, seed = base.shapes["unet"], config.seed
  adapter = tasks.initial_adapter(config.lora, unet, seed)
  params = unet if adapter is None else _shapes(adapter.delta)
  reference = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, tasks.reference_dtype(leaf, config.precision.reference)
    ),
    unet,
  )
  encoders = {name: base.shapes[name] for name in base.encoders}
  if config.data.prompt_embeds:
    encoders = None
  if not tasks.holds_reference(config):
    reference = None
  frozen = objectives.Frozen(reference, encoders, None if adapter is None else _shapes(adapter))
  return params, frozen, tasks.make_objective(config, base), abstract_batch(config, base)


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), tree)


def abstract_batch(config: config_lib.Config, base: base_lib.Base) -> types.Batch:
  """Shapes of a global batch as `dmpo prepare` writes it."""
  rows, (height, width, channels) = config.batch_size, base.latent_shape

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct((rows, *shape), dtype)

  moments = array(jnp.float16, height, width, 2 * channels)
  length = base.models[base.encoders[0]].config.max_position_embeddings
  several, unet = len(base.encoders) > 1, base.unet.config
  stored, drawn = config.data.prompt_embeds, config.data.reference_draws
  of_both = {
    "input_ids": array(jnp.int32, *((len(base.encoders),) if several else ()), length),
    "time_ids": array(jnp.float32, 6) if several else None,
    "source_moments": moments if base.edits else None,
    "prompt_embeds": array(jnp.float16, length, unet.cross_attention_dim) if stored else None,
    "text_embeds": array(jnp.float16, unet.text_embeds_dim) if stored and several else None,
    "draw": array(jnp.int32) if drawn else None,
  }
  if config.data.judged:
    errors = array(jnp.float32, 1) if drawn else None
    return types.JudgedBatch(
      moments=moments, desirable=array(jnp.bool_), reference_errors=errors, **of_both
    )
  own_losers = config.objective.reference_every is not None
  return types.PreferenceBatch(
    moments_w=moments,
    moments_l=moments,
    p_choice=array(jnp.float32) if config.objective.labels == "soft" else None,
    reference_errors=array(jnp.float32, 2) if drawn else None,
    latents_l=array(jnp.float32, *base.latent_shape) if own_losers else None,
    **of_both,
  )


def forward_flops(base: base_lib.Base) -> float:
  """XLA's count of one image's forward pass through the UNet, attention without blocks."""
  length = base.models[base.encoders[0]].config.max_position_embeddings
  inputs = base_lib.unet_inputs(base.unet.config, base.unet.config.sample_size, length)
  model = base.unet.clone(kernel=attention.PLAIN, remat="full")
  lowered = jax.jit(model.apply).lower({"params": base.shapes["unet"]}, *inputs)
  return lowered.cost_analysis()["flops"]


def minimum_forwards(config: config_lib.Config) -> int:
  """Forward passes of the UNet that a pair, or a judged image, cannot do without.

  For each image: policy forward, twice that backward, reference forward. SFT knows the winner
  alone, SFT and MaPO no reference. A low-rank delta needs no gradient by the weights, a third of
  the policy's part (its own products are left out), and errors that are stored
  (`data.reference_draws`) need no reference. InPO inverts both images first, in as many forward
  passes each as `objective.inversion_steps`.
  """
  policy = 2 if config.lora.rank > 0 else 3
  reference = config.objective.needs_reference and config.data.reference_draws == 0
  inversion = config.objective.inversion_steps or 0
  images = 1 if config.data.judged else config.objective.images_of_pair
  return images * (policy + reference + inversion)


def minimum_flops(config: config_lib.Config, base: base_lib.Base) -> float:
  """What the objective cannot do without, for a pair: `minimum_forwards` times a forward pass."""
  return minimum_forwards(config) * forward_flops(base)


def make_plan(
  config: config_lib.Config,
  topology: Topology,
  *,
  effort: str = "quick",
  cache: pathlib.Path | None = None,
) -> Plan:
  """Compiles the configuration's step for a topology.

  Args:
    effort: of `EFFORTS`.
    cache: folder with figures of earlier plans; the key is the program itself.

  Raises:
    ValueError: the batch or the mesh does not divide, there is no compiler, or the step inverts.
    DoesNotFit: the program needs more memory than a chip has.
  """
  if config.objective.inversion_steps is not None:
    raise ValueError(
      f"plan: expected another method than {config.objective.method!r}, which inverts in a loop: "
      "the compiler counts one pass of it; plan dpo, whose step is the same but for "
      f"{2 * config.objective.inversion_steps} of {minimum_forwards(config)} forward passes a pair"
    )
  devices = find_devices(topology)
  mesh = sharding.make_mesh(fsdp=config.fsdp, devices=devices)
  sharding.check_batch(config.batch_size, config.accumulation, mesh)
  base = base_lib.load_architecture(
    config.base, compute=config.precision.compute, kernel="tpu", remat=config.remat
  )
  params, frozen, objective, batch = abstract_task(config, base)
  chain = optimizer.make_optimizer(config.optim, config.steps)
  built = program.make_program(params, frozen, objective, chain, mesh, config.accumulation)
  lowered = program.lower(built, mesh, frozen, batch)
  versions = {"dmpo_jax": dmpo_jax.__version__, "jax": jax.__version__, "libtpu": _libtpu_version()}
  entry = None
  if cache is not None:
    digest = hashlib.blake2b(digest_size=16)
    for part in (lowered.as_text(), str(topology), effort, json.dumps(versions)):
      digest.update(part.encode())
    entry = cache / f"{digest.hexdigest()}.json"
  if entry is not None and entry.is_file():
    figures = json.loads(entry.read_text(encoding="utf-8"))
  else:
    figures = _compile(lowered, topology, effort, config.accumulation)
    if entry is not None:
      encode_shard.write_json(entry, figures)
  if "does_not_fit" in figures:
    raise DoesNotFit(figures["does_not_fit"])
  per_chip = len(devices) / topology.chips  # tpu7x has two devices on a chip
  figures = hlo.Figures(**figures)
  memory = {
    "params": _bytes(built.shapes.params, built.state.params),
    "optimizer": _bytes(built.shapes.opt_state, built.state.opt_state),
    "reference": _bytes(frozen.reference, built.frozen.reference),
    "text_encoders": _bytes(frozen.text_encoders, built.frozen.text_encoders),
    "batch": _bytes(batch, jax.tree.map(lambda _: built.rows, batch)),
    "temporaries": figures.temporaries,
    "program": figures.code,
  }
  pairs = config.batch_size // topology.chips
  kind = topology.kind
  collectives = {name: (n, round(per_chip * size)) for name, (n, size) in figures.collectives}
  moved = sum(size for _, size in collectives.values())
  return Plan(
    topology=str(topology),
    chips=topology.chips,
    mesh=dict(mesh.shape),
    remat=config.remat,
    pairs_per_chip=pairs,
    accumulation=config.accumulation,
    effort=effort,
    memory={name: round(per_chip * size) for name, size in memory.items()},
    memory_limit=round(kind.memory),
    flops=per_chip * (config.accumulation * figures.flops + figures.kernel_flops),
    kernel_flops=per_chip * figures.kernel_flops,
    minimum_flops=pairs * minimum_flops(config, base),
    collectives=collectives,
    compute_seconds=config.accumulation * figures.optimal_seconds
    + per_chip * figures.kernel_flops_padded / kind.peak,
    link_seconds=moved / kind.links,
    steps=config.steps,
    compile_seconds=figures.compile_seconds,
    versions=versions,
  )


def _bytes(tree: Any, places: Any) -> int:
  """On one device."""
  sizes = jax.tree.map(
    lambda x, place: math.prod(place.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize,
    tree,
    places,
  )
  return sum(jax.tree.leaves(sizes))


def _libtpu_version() -> str:
  import importlib.metadata

  try:
    return importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _compile(
  lowered: jax.stages.Lowered, topology: Topology, effort: str, accumulation: int
) -> dict[str, Any]:
  """Figures of the compiled program, or of why it does not fit; JSON."""
  begun = time.monotonic()
  with _quiet():
    try:
      compiled = lowered.compile(compiler_options=EFFORTS[effort])
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      compiled, refusal = None, str(error)
  if compiled is None:
    needed = hlo.needed_bytes(refusal)
    amount = "" if needed is None else f": {needed / GIB:.2f} GiB"
    message = (
      f"{topology}: the step does not fit a chip's memory of {topology.kind.memory / GIB:.0f} GiB"
      f"{amount}; fewer pairs a chip, a larger accumulation, another remat or more fsdp need less"
    )
    return {"does_not_fit": message}
  figures = hlo.read_figures(compiled, loops=accumulation)
  return figures._replace(compile_seconds=time.monotonic() - begun)._asdict()


# Search.


class Candidate(NamedTuple):
  """A way to run the same recipe."""

  pairs: int  # a chip at once
  remat: str
  fsdp: int

  def __str__(self) -> str:
    return f"{self.pairs} pairs a chip at once, remat {self.remat}, fsdp {self.fsdp}"


def candidates(batch_size: int, topology: Topology) -> list[Candidate]:
  """What divides the batch: powers of two of pairs, kept outputs, a state on a host or on a slice.

  >>> topology = read_topology("v5e:2x2")
  >>> [str(each) for each in candidates(8, topology)][-1]
  '2 pairs a chip at once, remat blocks, fsdp 4'
  """
  devices = topology.chips // topology.slices
  shares = sorted({min(devices, share) for share in (1, 8, 16, devices)})
  per_chip = batch_size // topology.chips
  if per_chip * topology.chips != batch_size:
    unit = topology.chips
    below = max(batch_size // unit * unit, unit)
    raise ValueError(
      f"batch_size: {batch_size} cannot be split over {unit} chips; expected a multiple of "
      f"{unit}: {below} or {below + unit}"
    )
  sizes = [pairs for pairs in (1, 2, 4, 8, 16, 32, 64) if per_chip % pairs == 0]
  return [
    Candidate(pairs, remat, fsdp)
    for fsdp in shares
    for remat in ("layers", "blocks")
    for pairs in sizes
  ]


def search(
  config: config_lib.Config,
  topology: Topology,
  *,
  effort: str = "quick",
  cache: pathlib.Path | None = None,
  report: Callable[[str], None] = print,
) -> list[Plan]:
  """Plans of all candidates that fit, the fastest first.

  What does not fit with some pairs is not tried with more.

  Raises:
    DoesNotFit: none fits.
  """
  plans, full, refusal = [], set(), None
  for each in candidates(config.batch_size, topology):
    if any(each[1:] == other[1:] and each.pairs > other.pairs for other in full):
      continue
    accumulation = config.batch_size // topology.chips // each.pairs
    changed = dataclasses.replace(
      config, remat=each.remat, fsdp=each.fsdp, accumulation=accumulation
    )
    try:
      plan = make_plan(changed, topology, effort=effort, cache=cache)
    except (DoesNotFit, sharding.DoesNotDivide) as error:
      full.add(each)
      refusal = error
      report(f"{each}: {error if isinstance(error, sharding.DoesNotDivide) else 'does not fit'}")
      continue
    report(f"{each}: {plan.pairs_per_second:.1f} pairs/s, {plan.total_memory / GIB:.1f} GiB")
    plans.append(plan)
  if not plans:
    raise refusal
  return sorted(plans, key=lambda plan: -plan.pairs_per_second)


# For people.


def show(plan: Plan) -> str:
  """The figures as text.

  Every line is of the compiled program; nothing of it has run.
  """
  forward = plan.minimum_flops / plan.pairs_per_chip
  free = plan.memory_limit - plan.total_memory
  lines = [
    f"{plan.topology}, {plan.chips} chips, mesh {plan.mesh}, remat {plan.remat}, "
    f"{plan.pairs_per_chip} pairs a chip and update in {plan.accumulation} part(s)",
    f"{LABEL}; {plan.effort} effort, {plan.compile_seconds:.0f} s to compile",
    "",
    "memory of a chip",
  ]
  lines += [f"  {name:<14} {size / GIB:8.3f} GiB" for name, size in plan.memory.items()]
  lines += [
    f"  {'in all':<14} {plan.total_memory / GIB:8.3f} GiB of {plan.memory_limit / GIB:.0f}: fits, "
    f"{free / GIB:.2f} GiB are left",
    "",
    "work of a chip and update",
    f"  FLOPs          {plan.flops:.4g}, {plan.flops / plan.minimum_flops:.2f} of the least "
    f"possible ({forward:.4g} a pair); {plan.kernel_flops:.3g} in kernels, counted by hand",
  ]
  for name, (number, size) in plan.collectives.items():
    lines.append(f"  {name:<14} {number} of {size / 2**20:,.1f} MiB in all")
  lines += [
    "",
    "time of an update, estimated: a bound, nothing waits in it",
    f"  computing      {1e3 * plan.compute_seconds:.1f} ms, by the compiler; kernels at peak",
    f"  links          {1e3 * plan.link_seconds:.1f} ms, if none were hidden behind computing",
    f"  rate           {plan.pairs_per_second:.1f} pairs/s, {plan.share_of_peak:.0%} of the "
    "bfloat16 peak",
    f"  recipe         {plan.steps} updates: {plan.hours:.2f} hours, "
    f"{plan.hours * plan.chips:.1f} chip-hours",
  ]
  return "\n".join(lines)


def show_ranking(plans: list[Plan]) -> str:
  """One line a plan."""
  lines = [f"{'pairs/s':>9} {'at once':>8} {'remat':>7} {'mesh':>22} {'GiB':>6} {'of peak':>8}"]
  for plan in plans:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines.append(
      f"{plan.pairs_per_second:9.1f} {plan.pairs_per_chip // plan.accumulation:8d} "
      f"{plan.remat:>7} {mesh:>22} {plan.total_memory / GIB:6.1f} {plan.share_of_peak:8.0%}"
    )
  return "\n".join(lines)


# Calibration.


def calibrate(topology: Topology) -> list[dict[str, Any]]:
  """What the compiler's counters say of programs whose FLOPs are known, on one device.

  An 8192-wide product of matrices, and a 3x3 convolution of Stable Diffusion's widest level; both
  in bfloat16. Ratios are over a count by hand (a multiply and an add are two; a convolution at the
  border multiplies padding, which the compiler leaves out) and over its time at the chip's peak.
  """
  devices = find_devices(topology)
  peak = topology.kind.peak * topology.chips / len(devices)
  place = jax.sharding.SingleDeviceSharding(devices[0])

  def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

  def convolve(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

  size, batch, pixels, channels = 8192, 8, 64, 320
  programs = {
    "product of matrices": (jnp.matmul, (array(size, size), array(size, size)), 2 * size**3),
    "convolution": (
      convolve,
      (array(batch, pixels, pixels, channels), array(3, 3, channels, channels)),
      2 * 9 * batch * pixels**2 * channels**2,
    ),
  }
  rows = []
  for name, (function, arguments, flops) in programs.items():
    with _quiet():
      costs = jax.jit(function).lower(*arguments).compile().cost_analysis()
    rows.append(
      {
        "program": name,
        "flops": costs["flops"] / flops,
        "optimal_seconds": costs["optimal_seconds"] * peak / flops,
      }
    )
  return rows


def show_calibration(topology: Topology, rows: list[dict[str, Any]]) -> str:
  """The ratios as text."""
  lines = [f"{topology}, {LABEL}: the compiler's figures over those by hand and at the peak"]
  lines += [
    f"  {row['program']:<20} FLOPs {row['flops']:.3f}, time {row['optimal_seconds']:.2f}"
    for row in rows
  ]
  return "\n".join(lines)
