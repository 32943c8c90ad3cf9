"""One training step on CPU beside the same step in PyTorch: time, loss and gradient norm.

    python benchmarks/cpu_step.py    # 40 minutes on 2 cores, most of them compiling; 8 GiB

The step is DMPO's: the policy forward and backward, the reference forward, the gradient clipped to
norm 1, AdamW; all in float32. Ours is `train_step.train_step`, jitted as `dmpo train` does it. The
judge is diffusers' UNet2DConditionModel with the same weights and the same arrays: latents, noise,
timesteps and prompt embeddings (no text encoder runs on either side). Winner and loser are one
batch for both. `emoji` is the shipped UNet at the demo's batch, `sd15` Stable Diffusion 1.5's with
random weights at a quarter of its widths.

PyTorch may choose: eager, torch.compile, or that without fusion of kernels, which need a C++
compiler, each with either memory format. Always on are fused AdamW, scaled_dot_product_attention,
inference mode for the reference, denormals flushed to zero. The first table has the least time of
every variant; the fastest is the judge. Each side has a process of its own, bound to the same
cores, and they take turns: while one works, the other waits for a message. Ratios are those of
neighbouring runs.

The reference differs from the policy, so that margins are not zero. The first table compares the
first loss, the norm of the first gradient and the loss after the update. The exit status is 1 where
eager PyTorch has others than we, or every variant has; a compiled one that has others is marked as
wrong and is no judge.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import sys
import time
import traceback
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))  # where the judges live

CASES = ("emoji", "sd15")
# torch.compile's options by mode. With fusion PyTorch 2.13 makes gradients of the shipped UNet on
# CPU that are wrong in the first digit; without it, and by the `aot_eager` backend, they are right.
MODES = {"eager": None, "compiled": {}, "unfused": {"max_fusion_size": 1}}
LAYOUTS = ("contiguous", "channels_last")
PARTS = {
  "step": "step",
  "forward": "policy forward",
  "backward": "policy forward and backward",
  "reference": "reference forward",
  "optimiser": "clipping and AdamW",
}
WARM_UP = 2  # steps or parts, beside the first, which compiles
TRIALS = 5  # of each PyTorch variant
PAUSE = 0.1  # seconds between runs, in which the threads of the other side fall asleep
TOKENS = 77
CROSS_ATTENTION = 768
GROUPS = 16  # must divide a fraction of 320 channels
PERTURBATION = 0.1  # of the policy's weights, relative
# Multiplies the rounding of the errors, each about 1e-6 of itself for sums in another order, before
# they enter the loss. The demo's 1000 would leave three digits of the margin; the time is the same.
BETA = 10.0
# Loss and norm are sums of up to 1e8 float32 products that the two sides add up in another order:
# they differ by some 1e-6. A wrong weight or term of the loss shows in the first digits.
TOLERANCE = 1e-4


class Case(NamedTuple):
  """What both sides compute.

  Attributes:
    name: emoji or sd15.
    pairs: of the batch.
    divisor: of Stable Diffusion's widths; sd15 only.
    side: of the latents; sd15 only.
  """

  name: str
  pairs: int
  divisor: int
  side: int


class Problem(NamedTuple):
  """What PyTorch is given; numpy arrays, in our layout but for the weights.

  Attributes:
    unet: config.json of the UNet.
    policy, reference: tensors by diffusers' names.
    latents, noise, timesteps, embeds: of winners and losers in turn, [2 B, ...].
    optim: fields of `config.OptimConfig`.
  """

  unet: dict[str, Any]
  policy: dict[str, np.ndarray]
  reference: dict[str, np.ndarray]
  latents: np.ndarray
  noise: np.ndarray
  timesteps: np.ndarray
  embeds: np.ndarray
  alphas_cumprod: np.ndarray
  alpha: float
  optim: dict[str, Any]


class First(NamedTuple):
  """What is compared: loss and gradient norm of step 0, and the loss after its update."""

  loss: float
  norm: float
  after: float


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
  parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of PyTorch")
  parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="of PyTorch")
  parser.add_argument("--rounds", type=int, default=10, help="runs of each side")
  parser.add_argument("--seconds", type=float, default=1.0, help="of a run, at least")
  parser.add_argument("--pairs", type=int, help="of a batch; 32 of emoji, 2 of sd15 if not given")
  parser.add_argument("--divisor", type=int, default=4, help="of Stable Diffusion's widths")
  parser.add_argument("--side", type=int, default=32, help="of Stable Diffusion's latents")
  parser.add_argument("--threads", type=int, help="cores of either side; all if not given")
  options = parser.parse_args()
  cores = available_cores()[: options.threads]
  print(f"{len(cores)} cores, {options.rounds} pairs of runs, median [least, most]")
  wrong = []
  for name in options.cases:
    pairs = options.pairs or {"emoji": 32, "sd15": 2}[name]
    case = Case(name, pairs, options.divisor, options.side)
    with Side(Ours, cores) as ours, Side(Theirs, cores) as theirs:
      wrong += compare(case, ours, theirs, options)
  if wrong:
    raise SystemExit("; ".join(wrong))


def available_cores() -> list[int]:
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count()))


def compare(case: Case, ours: "Side", theirs: "Side", options: argparse.Namespace) -> list[str]:
  """Prints the tables of a case; returns what is wrong."""
  problem = ours("prepare", case)
  first = ours("first_step")
  theirs("prepare", problem)
  size = sum(tensor.size for tensor in problem.policy.values())
  print(f"\n{case.name}: {size / 1e6:.1f} M parameters, ", end="")
  print(f"{case.pairs} pairs of {' x '.join(map(str, problem.latents.shape[1:]))}")
  print(f"ours: loss {first.loss:.6f}, then {first.after:.6f}; gradient norm {first.norm:.6f}\n")
  print("| PyTorch | ms, least | loss | gradient norm | loss after |")
  print("|---|---|---|---|---|", flush=True)
  wrong, times = [], {}
  variants = [(mode, layout) for mode in options.modes for layout in options.layouts]
  for variant in variants:
    label = ", ".join(variant)
    try:
      judged = theirs("first_step", *variant)
    except JudgeFailed as error:
      if variant[0] == "eager":
        raise
      print(f"| {label} | failed: {error} | | | |", flush=True)
      continue
    differences = [abs(a - b) / abs(b) for a, b in zip(first, judged, strict=True)]
    cells = [f"{difference:.1e}" for difference in differences]
    agrees = max(differences) <= TOLERANCE  # False for NaN
    # By the least, which other programs on the machine lengthen least.
    least = min(theirs("run", "step", 1) for _ in range(WARM_UP + TRIALS))
    marked = f"{1e3 * least:.4g}" + ("" if agrees else " (wrong)")
    print(f"| {label} | {marked} | {' | '.join(cells)} |", flush=True)
    if agrees:
      times[variant] = least
    elif variant[0] == "eager":
      wrong.append(f"{case.name}: PyTorch ({label}) differs by {max(differences):.1e}")
    if times:
      theirs("keep", min(times, key=times.get))
  if not times:
    return [*wrong, f"{case.name}: no variant of PyTorch agrees with ours"]
  best = min(times, key=times.get)
  print(f"\nFastest, and the judge from here on: {', '.join(best)}\n")
  print("| ms | ours | PyTorch | ours over PyTorch |")
  print("|---|---|---|---|", flush=True)
  for part, label in PARTS.items():
    for _ in range(1 + WARM_UP):
      lasts = [side("run", part, 1) for side in (ours, theirs)]
    count = max(1, round(options.seconds / min(lasts)))
    seconds = []
    for _ in range(options.rounds):
      seconds.append([])
      for side in (ours, theirs):
        time.sleep(PAUSE)
        seconds[-1].append(side("run", part, count))
    mine, judges = 1e3 * np.array(seconds).T
    print(f"| {label} | {spread(mine)} | {spread(judges)} | {spread(mine / judges)} |", flush=True)
  return wrong


def spread(values: np.ndarray) -> str:
  """Median, least and most, of three digits."""
  return f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]"


# Processes.


class JudgeFailed(Exception):
  """A variant of PyTorch does not run here."""


class Side:
  """Makes an object in a process of its own, and calls its methods there."""

  def __init__(self, kind: type, cores: list[int]):
    context = multiprocessing.get_context("spawn")
    self._executor = concurrent.futures.ProcessPoolExecutor(
      1, mp_context=context, initializer=start, initargs=(kind, cores)
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._executor.shutdown()

  def __call__(self, method: str, *arguments: Any) -> Any:
    return self._executor.submit(call, method, *arguments).result()


def start(kind: type, cores: list[int]) -> None:
  """Binds this process to the cores before any library counts them."""
  global worker
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, cores)
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["OMP_NUM_THREADS"] = str(len(cores))
  worker = kind(len(cores))


def call(method: str, *arguments: Any) -> Any:
  return getattr(worker, method)(*arguments)


# Ours.


class Ours:
  def __init__(self, threads: int):
    import jax

    # XLA takes as many threads as the process may use cores.
    if len(available_cores()) != threads:
      raise SystemExit("--threads: this system cannot bind a process to cores")
    self._jax = jax

  def prepare(self, case: Case) -> Problem:
    """Draws weights and examples, and makes the functions that are timed."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import optax

    from dmpo_jax import base as base_lib
    from dmpo_jax import cli, losses, objectives, optimizer, train_step, weights
    from dmpo_jax import config as config_lib
    from dmpo_jax.models import init, remat, unet

    config = config_lib.from_dict(cli.read_config(cli.DEFAULT_CONFIG, []))
    base = base_lib.load_base(config.base, remat=config.remat)
    if case.name == "emoji":
      raw = base_lib.read_json(base.folder / "unet" / "config.json")
      shape, length = base.latent_shape, base.tokenizer.length
      reference = base.params["unet"]
    else:
      raw = narrow_sd15(case.divisor)
      model = base.unet.clone(config=unet.read_config(raw))
      base = dataclasses.replace(base, models={**base.models, "unet": model})
      shape, length = (case.side, case.side, raw["in_channels"]), TOKENS
      inputs = (np.zeros((1, 8, 8, 4)), np.zeros(1, np.int32), np.zeros((1, 8, CROSS_ATTENTION)))
      reference = init.initial_params(model, 0, *inputs)
    generator = np.random.default_rng(0)

    def perturb(leaf):
      change = PERTURBATION * generator.standard_normal(leaf.shape, np.float32)
      return leaf * (1.0 + change)

    policy = jax.tree.map(perturb, reference)
    denoiser = base.denoiser()
    loss_fn = functools.partial(losses.dmpo_loss, beta=BETA, alpha=config.objective.alpha)
    objective = objectives.preference_objective(
      denoiser, loss_fn, peak_weight=losses.peak_gradient_weight(loss_fn)
    )
    width = raw["cross_attention_dim"]
    batch = random_batch(generator, case.pairs, shape, length, width)
    examples = jax.jit(objective.draw)(batch, jax.random.key(0))
    optim = dataclasses.replace(config.optim, warmup_steps=0)
    chain = optimizer.make_optimizer(optim, config.steps)
    # Drawn beforehand: PyTorch has the same.
    given = objective._replace(draw=lambda examples, key: examples)
    step = functools.partial(train_step.train_step, objective=given, optimizer=chain)
    self._step = jax.jit(step, donate_argnums=0)
    self._key = jax.random.key(1)
    self._examples = examples
    self._frozen = objectives.Frozen(jax.tree.map(jnp.array, reference), None)
    self._state = train_step.init_state(jax.tree.map(jnp.array, policy), chain)

    # The policy's share of the objective, as the objective has it.
    forward = remat.checkpoint(functools.partial(objectives.squared_errors, denoiser), config.remat)
    latents, noise, timesteps = jax.jit(both_of_each)(examples)
    conditions = examples.stored  # a row for each pair

    def errors(params):
      kernels = objectives.cast_kernels(params, denoiser.dtype)
      return forward(kernels, latents, noise, timesteps, conditions)

    def update(params, opt_state, grads):
      updates, opt_state = chain.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    self._errors = jax.jit(errors)
    self._gradient = jax.jit(jax.grad(lambda params: mean_advantage(errors(params))))
    self._update = jax.jit(update, donate_argnums=(0, 1))
    self._updated = None
    return Problem(
      raw,
      dict(weights.to_diffusers(policy)),
      dict(weights.to_diffusers(reference)),
      *map(np.asarray, (latents, noise, timesteps)),
      np.asarray(conditions.prompt_embeds).repeat(2, axis=0),
      np.asarray(denoiser.alphas_cumprod),
      config.objective.alpha,
      dataclasses.asdict(optim),
    )

  def first_step(self) -> First:
    metrics = []
    for _ in range(2):
      self._state, each = self._step(self._state, self._frozen, self._examples, self._key)
      metrics.append(each)
    before, after = metrics
    return First(float(before["loss"]), float(before["grad_norm"]), float(after["loss"]))

  def run(self, part: str, count: int) -> float:
    """Seconds of one step or part, the mean of `count`."""
    jax, params = self._jax, self._state.params
    if part == "optimiser" and self._updated is None:
      grads = self._gradient(params)
      self._updated = jax.tree.map(lambda x: x.copy(), (params, self._state.opt_state)), grads
    jax.block_until_ready((self._state, self._updated))
    begun = time.perf_counter()
    for _ in range(count):
      if part == "step":
        self._state, done = self._step(self._state, self._frozen, self._examples, self._key)
      elif part == "forward":
        done = self._errors(params)
      elif part == "reference":
        done = self._errors(self._frozen.reference)
      elif part == "backward":
        done = self._gradient(params)
      else:
        trained, grads = self._updated
        self._updated = self._update(*trained, grads), grads
        done = self._updated
    jax.block_until_ready((done, self._state))
    return (time.perf_counter() - begun) / count


def narrow_sd15(divisor: int) -> dict[str, Any]:
  """config.json of Stable Diffusion 1.5's UNet with its widths divided; blocks and heads stay."""
  import torch_models

  full = torch_models.UNET_SD15_FULL
  widths = [width // divisor for width in full["block_out_channels"]]
  changes = {"block_out_channels": widths, "norm_num_groups": GROUPS}
  return json.loads(json.dumps(torch_models.public(full) | changes))


def random_batch(generator, pairs: int, shape, length: int, width: int):
  from dmpo_jax import types

  height, across, channels = shape
  moments = generator.standard_normal((2, pairs, height, across, 2 * channels), np.float32)
  embeds = generator.standard_normal((pairs, length, width), np.float32)
  ids = np.zeros((pairs, length), np.int32)  # not read: the embeddings are given
  return types.PreferenceBatch(*moments, ids, prompt_embeds=embeds)


def both_of_each(examples):
  """Latents, noise and timesteps of winners and losers in turn, [2 B, ...]."""
  import jax

  latents = examples.latents.reshape(-1, *examples.latents.shape[2:])
  noising = jax.tree.map(lambda x: x.repeat(2, axis=0), examples.noising)
  return latents, noising.noise, noising.timesteps


def mean_advantage(errors):
  """A number that depends on every error, in place of the loss; of arrays or tensors."""
  pairs = errors.reshape(-1, 2)
  return (pairs[:, 1] - pairs[:, 0]).mean()


# Theirs.


class Theirs:
  def __init__(self, threads: int):
    import torch

    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # as XLA does
    self._trainers: dict[tuple[str, str], TorchTrainer] = {}
    self._threads = threads

  def prepare(self, problem: Problem) -> None:
    import torch
    import torch_models  # sets one thread

    torch.set_num_threads(self._threads)
    del torch_models
    self._problem = problem

  def first_step(self, mode: str, layout: str) -> First:
    """Makes a variant, whose parts `run` times from now on."""
    try:
      trainer = TorchTrainer(self._problem, mode, layout)
      loss, norm = trainer.step()
      after, _ = trainer.step()
    except Exception as error:  # of any kind where there is no compiler
      traceback.print_exc()
      lines = str(error).splitlines() or [""]
      raise JudgeFailed(f"{type(error).__name__}: {lines[0][:100]}") from None
    self._trainers[mode, layout] = self._current = trainer
    return First(loss.item(), norm.item(), after.item())

  def keep(self, variant: tuple[str, str]) -> None:
    """Forgets all other variants; `run` times this one."""
    self._trainers = {variant: self._trainers[variant]}
    self._current = self._trainers[variant]

  def run(self, part: str, count: int) -> float:
    """Seconds of one step or part, the mean of `count`."""
    function = getattr(self._current, part)
    begun = time.perf_counter()
    for _ in range(count):
      function()
    return (time.perf_counter() - begun) / count


class TorchTrainer:
  """The step and its parts in PyTorch."""

  def __init__(self, problem: Problem, mode: str, layout: str):
    import torch
    import torch_models

    self._torch = torch
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

    def image(array):
      return torch_models.channels_first(array).contiguous(memory_format=formats[layout])

    levels = torch.from_numpy(problem.alphas_cumprod[problem.timesteps]).reshape(-1, 1, 1, 1)
    self._inputs = (
      image(problem.latents),
      image(problem.noise),
      levels,
      torch.from_numpy(problem.timesteps),
      torch.from_numpy(problem.embeds),
    )
    policy, reference = (
      make_unet(problem.unet, tensors).to(memory_format=formats[layout])
      for tensors in (problem.policy, problem.reference)
    )
    reference.requires_grad_(False)
    self._params = list(policy.parameters())
    self._errors, self._reference_errors = (
      functools.partial(squared_errors, unet) for unet in (policy, reference)
    )
    if mode != "eager":
      torch._dynamo.config.recompile_limit = 64  # counted over all variants
      compiled = functools.partial(
        torch.compile, options=MODES[mode], dynamic=False, fullgraph=True
      )
      self._errors = compiled(self._errors)
      self._reference_errors = compiled(self._reference_errors)
    optim = problem.optim
    self._clip_norm, self._alpha = optim["clip_norm"], problem.alpha
    self._optimizer = torch.optim.AdamW(
      self._params,
      lr=optim["learning_rate"],
      betas=(optim["b1"], optim["b2"]),
      eps=optim["eps"],
      weight_decay=optim["weight_decay"],
      fused=True,
    )

  def step(self):
    """One update; returns the loss and the norm of the gradient."""
    self._optimizer.zero_grad(set_to_none=True)
    reference = self.reference()
    loss = dmpo_loss(self.forward(), reference, self._alpha)
    loss.backward()
    return loss.detach(), self.optimiser()

  def forward(self):
    return self._errors(*self._inputs)

  def backward(self) -> None:
    self._optimizer.zero_grad(set_to_none=True)
    mean_advantage(self.forward()).backward()

  def reference(self):
    with self._torch.inference_mode():
      return self._reference_errors(*self._inputs)

  def optimiser(self):
    norm = self._torch.nn.utils.clip_grad_norm_(self._params, self._clip_norm, foreach=True)
    self._optimizer.step()
    return norm


def make_unet(config: dict[str, Any], tensors: dict[str, np.ndarray]):
  import diffusers
  import torch

  unet = diffusers.UNet2DConditionModel.from_config(config)
  unet.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
  return unet.eval()  # there is no dropout


def squared_errors(unet, latents, noise, levels, timesteps, embeds):
  """As `objectives.squared_errors` for a model that predicts the noise."""
  noisy = levels.sqrt() * latents + (1.0 - levels).sqrt() * noise
  prediction = unet(noisy, timesteps, embeds, return_dict=False)[0]
  return (prediction - noise).square().mean(dim=(1, 2, 3))


def dmpo_loss(errors, reference_errors, alpha: float):
  """As `losses.dmpo_loss`, the mean."""
  import torch

  advantages = (reference_errors - errors).reshape(-1, 2)
  margin = 0.5 * BETA * (advantages[:, 0] - advantages[:, 1])
  log_p, log_other = (torch.nn.functional.logsigmoid(each) for each in (margin, -margin))
  winner, loser = log_p - np.log1p(-alpha), log_other - np.log(alpha)
  return (log_p.exp() * winner + log_other.exp() * loser).mean()


if __name__ == "__main__":
  main()
