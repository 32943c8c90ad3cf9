"""The training loop: build, jit, restore, step, log, validate, save. The same for every task.

A run is a folder: `run.json` (the configuration), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`heartbeat.json` and, where a step did not finish, `stalls/`; for SePPO `references/` besides, see
`rounds`. The same command run again goes on from the last checkpoint.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dmpo_jax import (
  alarms,
  checkpoint,
  logs,
  optimizer,
  profiling,
  program,
  sharding,
  tasks,
  train_step,
  watch,
)
from dmpo_jax import config as config_lib

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
BEST_METRIC = "validation/margin"
# What may differ when a run is resumed: it changes neither the parameters nor what they mean.
FREE_ON_RESUME = "fsdp remat log_every validate_every save_every keep sampling data.workers".split()
VALIDATION_STREAM = 2**31 - 1  # folded into the root key in place of a step, which stays below


class TrainingStopped(RuntimeError):
  """The loss or the gradient is not finite; the last good checkpoint stays."""


class Preempted(RuntimeError):
  """The machine is being taken away: the state is saved, and the same command goes on from it."""


def train(
  config: config_lib.Config,
  task: tasks.Task,
  out: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
  profile: profiling.Steps | None = None,
  limits: watch.Limits = watch.LIMITS,
) -> train_step.Params:
  """Trains up to `config.steps`, resuming what `out` holds.

  Args:
    devices: all of them if None.
    profile: steps of which a trace is written into the TensorBoard folder; writing it takes its
      time, from pairs_per_second and mfu of that record too.
    limits: of the heartbeat and the watchdog.

  Returns:
    The trained parameters (their average if `optim.ema_decay` > 0), on the mesh.

  Raises:
    ValueError: the batch does not fit the devices, or `out` holds another run.
    TrainingStopped: a loss or gradient norm is not finite.
    Preempted: SIGTERM, or the platform's notice, came to any process.
  """
  mesh = sharding.make_mesh(fsdp=config.fsdp, devices=devices)
  sharding.check_batch(config.batch_size, config.accumulation, mesh)
  claim_folder(out, config)
  with watch.Watch(out, config.steps, limits) as watcher:
    return _train(config, task, out, mesh, profile, watcher)


def _train(
  config: config_lib.Config,
  task: tasks.Task,
  out: pathlib.Path,
  mesh: jax.sharding.Mesh,
  profile: profiling.Steps | None,
  watcher: watch.Watch,
) -> train_step.Params:
  chain = optimizer.make_optimizer(config.optim, config.steps)

  built = program.make_program(
    task.params, task.frozen, task.objective, chain, mesh, config.accumulation
  )
  frozen = sharding.put_tree(task.frozen, built.frozen)
  # Made on the devices: a host array cannot be put where other processes have theirs.
  root_key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=built.everywhere)()
  validate = _make_validation(task, mesh, root_key)

  reference = getattr(frozen, "reference", None)
  with checkpoint.Checkpoints(
    out / CHECKPOINTS,
    keep=config.keep,
    best_metric=BEST_METRIC if validate else None,
    reference=checkpoint.fingerprint(reference) if reference is not None else {},
    config=dataclasses.asdict(config),
  ) as checkpoints:
    state = checkpoints.restore_latest(sharding.abstract_tree(built.shapes, built.state))
    if state is None:
      state = program.initial_state(built, task.params, chain)
    start = int(state.step)
    watcher.resume(start)
    if validate:
      validate = watcher.during("validating")(validate)
    _announce(config, mesh, built.shapes, start, out, profile)
    kind = mesh.devices.flat[0].device_kind
    flops = profiling.count_flops(task.flops, kind)
    pending = collections.deque()
    validation, alarm = {}, 0.0
    dead_zone = alarms.DeadZoneAlarm()
    with (
      _notice_of_preemption() as is_preempted,
      logs.MetricLog(out, start) as log,
      logs.progress(config.steps, start, f"training ({config.objective.method})") as bar,
      profiling.Trace(profile, out / logs.TENSORBOARD_FOLDER) as trace,
    ):
      if validate and start == 0:
        validation = validate(state.params, frozen)
        log.write(0, validation)
      clock, clock_step = time.monotonic(), start
      bar.set_postfix_str("compiling the step")
      reads, placed = frozen, None
      for step in range(start, config.steps):
        done = step + 1
        if placed is None or (task.rounds is not None and step % task.rounds.every == 0):
          if pending:
            _check_finite(*pending[-1], task)
          reads, batches = _begin(task, step, state.params, frozen, out, mesh, watcher)
          placed = sharding.place_ahead(itertools.islice(batches, config.steps - step), mesh)
        with trace.step(done, before=state):
          with jax.profiler.TraceAnnotation("wait for the batch"):
            batch = next(placed, None)
          if batch is None:
            break
          with jax.set_mesh(mesh):
            state, metrics = built.step(state, reads, batch, root_key)
        trace.after_step(done, metrics)
        pending.append((done, metrics))
        if len(pending) > 1:  # let the device run one step ahead of the host
          _check_finite(*pending[-2], task)
        last = done == config.steps
        record = {}
        if validate and (last or done % config.validate_every == 0):
          validation = validate(state.params, frozen)
          record.update(validation)
          _check_finite(done, {**metrics, **validation}, task)
          alarm = _warn_if_worse(validation, done, alarm)
        if last or done % config.log_every == 0 or record:
          _check_finite(*pending[-1], task)
          record.update(_mean_of(pending))
          pending.clear()
          now = time.monotonic()
          speed = (done - clock_step) * config.batch_size / max(now - clock, 1e-9)
          record["train/pairs_per_second"] = speed
          share = profiling.mfu(flops, speed, mesh.size, kind)
          if share is not None:
            record["train/mfu"] = share
          record["train/learning_rate"] = float(
            optimizer.learning_rate(config.optim, config.steps)(step)
          )
          log.write(done, record)
          if warning := dead_zone.check(record):
            warnings.warn(f"step {done}: {warning}", stacklevel=2)
          bar.set_postfix_str(_postfix(record))
          clock, clock_step = time.monotonic(), done
        preempted = is_preempted(done) and not last
        if last or preempted or done % config.save_every == 0:
          if pending:
            _check_finite(*pending[-1], task)
          with watcher.during("saving"):
            checkpoints.save(state, validation)
          watcher.save(done)
        bar.update()
        watcher.finish(done)
        if preempted:
          with watcher.during("saving"):
            checkpoints.wait()
          watcher.end = "preempted"
          raise Preempted(f"told to stop after step {done}; {out} is saved, run the command again")
    with watcher.during("saving"):
      checkpoints.wait()
  return optimizer.averaged_params(state.opt_state, state.params)


def _begin(task: tasks.Task, step: int, params, frozen, out: pathlib.Path, mesh, watcher):
  """What the step reads beside its state, and the batches, from `step` on: to the end of a round
  where the task has rounds."""
  if task.rounds is None:
    return frozen, task.batches(step)
  drawing = functools.partial(watcher.during, "drawing")
  return task.rounds.begin(step, params, frozen, out, out / CHECKPOINTS, mesh, drawing)


@contextlib.contextmanager
def _notice_of_preemption() -> Iterator[Callable[[int], bool]]:
  """Whether to save and stop after a step, the same answer on all processes at the same step."""
  if jax.process_count() > 1:  # jax listens to SIGTERM itself, and agrees on a step
    yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # signals are the main thread's
    return
  received = threading.Event()
  before = signal.signal(signal.SIGTERM, lambda *_: received.set())
  try:
    yield lambda step: received.is_set()
  finally:
    signal.signal(signal.SIGTERM, before)


def claim_folder(out: pathlib.Path, config: config_lib.Config) -> None:
  """Writes `run.json`, or checks that the folder's own says the same.

  Raises:
    ValueError: the folder holds another run (the fields that differ are named), or something else.
  """
  if jax.process_index() == 0:
    _claim(out, config)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"claimed {out}")
  if jax.process_index() > 0:
    _claim(out, config)


def _claim(out: pathlib.Path, config: config_lib.Config) -> None:
  path = out / RUN_FILE
  ours = json.loads(json.dumps(dataclasses.asdict(config)))
  drawn = config.objective.reference_every is not None  # then sampling makes what is trained on
  free = [name for name in FREE_ON_RESUME if not (drawn and name == "sampling")]
  if path.exists():
    theirs = json.loads(path.read_text(encoding="utf-8"))
    differences = list(config_lib.differences(theirs, ours, free=free))
    if differences:
      raise ValueError(
        f"{out} already holds another run: {'; '.join(differences)}. Give another --out, or the "
        "configuration that it was started with"
      )
    return
  if out.exists() and any((out / name).exists() for name in (CHECKPOINTS, logs.METRICS_FILE)):
    raise ValueError(f"{out} holds checkpoints or metrics but no {RUN_FILE}; give another --out")
  out.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
  os.replace(temporary, path)


def read_run(out: pathlib.Path) -> config_lib.Config:
  """The configuration of the run in a folder.

  Raises:
    ValueError: there is no run.
  """
  path = out / RUN_FILE
  if not path.is_file():
    raise ValueError(f"{out}: no {RUN_FILE}; expected the folder of a training run")
  return config_lib.from_dict(json.loads(path.read_text(encoding="utf-8")))


def load_trained(
  out: pathlib.Path, params: train_step.Params, step: int | None = None
) -> train_step.Params:
  """The parameters that a run trained (their average if it keeps one), numpy.

  Args:
    params: a tree of the same shapes, for instance the base's.
    step: of the checkpoint; the last one if None.

  Raises:
    ValueError: no checkpoint, damaged, or of another model.
  """
  config, folder = read_run(out), out / CHECKPOINTS
  if config.optim.ema_decay == 0:
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), params)
    return jax.tree.map(np.asarray, checkpoint.load_params(folder, shapes, step))
  chain = optimizer.make_optimizer(config.optim, config.steps)
  shapes = jax.eval_shape(functools.partial(train_step.init_state, optimizer=chain), params)
  state = checkpoint.load_state(folder, shapes, step)
  return jax.tree.map(np.asarray, optimizer.averaged_params(state.opt_state, state.params))


def _make_validation(task: tasks.Task, mesh, root_key):
  """A function (params, frozen) -> metrics on the validation batch, the same noise every time."""
  if task.validation is None:
    return None
  count = len(jax.tree.leaves(task.validation)[0])
  few = count < mesh.size  # then every device takes all of them
  size = count if few else count // mesh.size * mesh.size
  batch = jax.tree.map(lambda x: x[:size], task.validation)
  key = jax.random.fold_in(root_key, VALIDATION_STREAM)
  objective = task.validation_objective or task.objective
  examples = jax.jit(objective.draw)(batch, key)
  place = sharding.replicated(mesh) if few else sharding.batch_sharding(mesh)
  examples = jax.device_put(examples, place)

  @jax.jit
  def evaluate(params, frozen, examples):
    loss, metrics = sharding.map_rows(objective.loss, params, frozen, examples, split=not few)
    summary = {name: jnp.mean(values) for name, values in {"loss": loss, **metrics}.items()}
    if "margin" in metrics:
      summary["margin_abs_max"] = jnp.max(jnp.abs(metrics["margin"]))
    return summary

  def validate(params, frozen):
    with jax.set_mesh(mesh):
      values = evaluate(params, frozen, examples)
    return {f"validation/{name}": float(value) for name, value in values.items()}

  return validate


def _check_finite(step: int, metrics: Mapping[str, jax.Array | float], task: tasks.Task) -> None:
  checked = ("loss", "grad_norm", "validation/loss")
  bad = [name for name in checked if not math.isfinite(float(metrics.get(name, 0.0)))]
  if bad:
    raise TrainingStopped(
      f"{' and '.join(bad)} not finite in step {step} (from step {step - 1} to {step}), records "
      f"{', '.join(task.describe(step - 1))}. Nothing was repaired and the last checkpoint is "
      "intact; lower optim.learning_rate or objective.beta, or look at those records"
    )


def _mean_of(pending) -> dict[str, float]:
  names = pending[0][1]
  return {
    f"train/{name}": float(np.mean([float(metrics[name]) for _, metrics in pending]))
    for name in names
  }


def _warn_if_worse(validation: Mapping[str, float], step: int, alarm: float) -> float:
  """Warns when the policy has become worse than the reference on winners, and again whenever that
  has doubled since; returns the advantage last warned of (0: never)."""
  advantage = validation.get("validation/winner_advantage", 0.0)
  if advantage >= 0 or advantage > 2 * alarm:
    return alarm
  warnings.warn(
    f"step {step}: the policy denoises the preferred images worse than the reference does "
    f"(validation/winner_advantage {advantage:.2e}): the margin grows by pushing the "
    "dispreferred images away. If it goes on falling, lower the learning rate or raise beta",
    stacklevel=2,
  )
  return advantage


def _postfix(record: Mapping[str, float]) -> str:
  shown = ("train/loss", "train/margin", "train/accuracy", "validation/margin")
  return ", ".join(f"{name} {record[name]:.4g}" for name in shown if name in record)


def _announce(
  config: config_lib.Config,
  mesh,
  shapes,
  start: int,
  out: pathlib.Path,
  profile: profiling.Steps | None,
) -> None:
  if jax.process_index() > 0:
    return
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  objective = config.objective
  settings = {
    name: value
    for name, value in dataclasses.asdict(objective).items()
    if value is not None and name != "method"
  }
  trained = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.params))
  what = "all of it"
  if config.lora.rank > 0:
    what = f"a low-rank delta, rank {config.lora.rank}, alpha {config.lora.alpha:g}"
  lines = [
    f"run      {out}" + (f", resumed at step {start}" if start else ""),
    f"trains   {what}: {trained:,} parameters",
    f"method   {objective.method} {settings}"
    + (" (mean-form errors, kappa = beta / 2)" if objective.needs_reference else ""),
    f"batch    {config.batch_size} per update, {config.accumulation} accumulation part(s), "
    f"{config.steps} steps",
    f"rate     {config.optim.learning_rate:g} peak, {config.optim.schedule}, warm-up "
    f"{config.optim.warmup_steps} steps, {config.optim.name}",
    f"devices  {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {dict(mesh.shape)}, "
    f"state {size / 2**20 / mesh.shape['fsdp']:.1f} MiB a device",
  ]
  if profile is not None and profile.last <= start:
    lines.append(f"profile  nothing: steps {profile} are done, the run goes on after step {start}")
  elif profile is not None:
    traced = profile._replace(first=max(profile.first, start + 1))
    lines.append(f"profile  steps {traced}, into {out / logs.TENSORBOARD_FOLDER}")
  print("\n".join(lines), flush=True)
