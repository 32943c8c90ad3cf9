"""All methods side by side on revealed emoji choice: same base, same data, same cost.

    python benchmarks/study.py --out runs/study               # goes on where it was stopped
    python benchmarks/study.py --out runs/study --only dmpo   # rows whose name begins so
    python benchmarks/study.py --out runs/study --jobs 2      # two runs at a time, a core each
    python benchmarks/study.py --out runs/study --table       # what there is so far, nothing run

Every run may spend the same number of forward passes of the UNet, a backward pass counting as two,
samples that a method draws to train on included: a method that needs more a pair gets fewer
updates; or, where the study's configuration has `updates`, all get as many of these. Then

1. each setting of a method is trained with the sweep's seed and measured on the validation split;
2. chosen is the one with the highest win rate over the base (ties one half) of those that keep
   prompt match and RMSE within the stated bounds; where none does, the one with the lowest RMSE,
   and the table says so;
3. the chosen one is trained with the other seeds and measured on the test split, once;
4. DMPO and Diffusion-DPO are trained again with a share of the training pairs swapped, and DMPO
   beside it with the alpha that such swaps amount to, sigmoid(-(1 - 2 share) m).

Everything that was done is in a folder of its own with its result.json, so that anyone may look at
a single run (`dmpo doctor run`), and a table can be made again of another set of seeds.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import cli, evaluate, logs, plan, stages, tasks, train
from dmpo_jax import config as config_lib
from dmpo_jax.data import encode
from dmpo_jax.data.emoji_choice import measure
from dmpo_jax.data.emoji_choice import pairs as pairs_lib
from dmpo_jax.scorers import diversity

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
DRAWS = 4000  # of the bootstrap


class Cell(NamedTuple):
  """One run.

  Attributes:
    row: a method of the study.
    settings: "field=value field=value".
    seed: of order, noise and timesteps.
    noise: share of the training pairs whose winner and loser are swapped.
    split: that it is measured on.
  """

  row: str
  settings: str
  seed: int
  noise: float
  split: str

  @property
  def name(self) -> str:
    values = [each.rpartition("=")[2] for each in self.settings.split()]
    noise = [f"swapped{self.noise:g}"] if self.noise else []
    return "-".join([self.row, *values, *noise, f"seed{self.seed}"])


@dataclasses.dataclass(frozen=True)
class Swapped:
  """Training pairs of which a share has winner and loser exchanged: the same ones for every seed.

  Attributes:
    source: the pairs.
    chosen: whether the pair at a position is swapped.
  """

  source: Any
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, position) -> dict[str, Any]:
    pair = dict(self.source[position])
    if self.chosen[position]:
      pair["moments_w"], pair["moments_l"] = pair["moments_l"], pair["moments_w"]
    return pair


def swap(encoded: encode.Encoded, share: float) -> encode.Encoded:
  """The encoded pairs with a share of the training split swapped."""
  if not share:
    return encoded
  source = encoded.splits["train"]
  chosen = np.random.default_rng(0).permutation(len(source)) < round(share * len(source))
  splits = {**encoded.splits, "train": Swapped(source, chosen)}
  return dataclasses.replace(encoded, splits=splits)


def alpha_of_noise(alpha: float, share: float) -> float:
  """The alpha that DMPO with a share of swapped labels amounts to: same gradient in expectation.

  >>> round(alpha_of_noise(0.01, 0.2), 4)
  0.0597
  """
  target = math.log((1.0 - alpha) / alpha)
  return 1.0 / (1.0 + math.exp((1.0 - 2.0 * share) * target))


def passes_a_pair(config: config_lib.Config) -> int:
  """Forward passes of the UNet for a pair and update, guided samples that it is drawn included.

  SePPO draws once for each pair and checkpoint: in a round no longer than an epoch once an update.
  """
  drawn = 2 * config.sampling.steps if config.objective.reference_every else 0
  return plan.minimum_forwards(config) + drawn


class Study:
  """Runs cells and remembers them.

  Attributes:
    settings: the study's configuration.
    out: folder of all runs.
  """

  def __init__(self, settings, out: pathlib.Path, overrides: Sequence[str]):
    self.settings, self.out, self._overrides = settings, out, list(overrides)
    out.mkdir(parents=True, exist_ok=True)

  def config(self, cell: Cell) -> config_lib.Config:
    """The configuration of a run; without `updates` its steps come from the passes it may spend."""
    file = CONFIGS / f"{self.settings.methods[cell.row][0]}.py"
    fields = [f"--config.{each}" for each in cell.settings.split()]
    fields += [f"--config.seed={cell.seed}", *self._overrides]
    config = config_lib.from_dict(cli.read_config(str(file), fields))
    steps = self.settings.updates
    if steps is None:
      steps = round(self.settings.passes / (config.batch_size * passes_a_pair(config)))
    warmup = min(config.optim.warmup_steps, steps // 4)
    return dataclasses.replace(
      config, steps=steps, optim=dataclasses.replace(config.optim, warmup_steps=warmup)
    )

  def result(self, cell: Cell) -> dict[str, Any] | None:
    """What was measured of a run; None where it has not been done."""
    path = self.out / cell.name / f"{cell.split}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

  def _is_done(self, cell: Cell) -> bool:
    done, steps = self.result(cell), self.config(cell).steps
    if done is not None and done["steps"] != steps:
      raise ValueError(
        f"{self.out / cell.name}: has {done['steps']} updates, expected {steps}: another study's;"
        " give another --out"
      )
    return done is not None

  def run(self, cell: Cell) -> dict[str, Any]:
    """Trains and measures, or says what was measured before."""
    done = self.result(cell)
    if done is not None:
      return done
    folder, config = self.out / cell.name, self.config(cell)
    # In one write: processes side by side share the pipe, and print writes the line's end apart.
    sys.stdout.write(f"{cell.name}: {config.steps} steps, measured on {cell.split}\n")
    sys.stdout.flush()
    base = self.prepare(config)
    encoded = swap(stages.open_data(config, base, self.out / "data"), cell.noise)
    train.train(config, tasks.preference_task(config, base, encoded), folder / "run")
    policy = stages.load_policy(base, folder / "run")
    result = self._measure(config, base, policy, cell.split)
    result |= _displacement(logs.read(folder / "run"))
    result |= {"steps": config.steps, "passes_a_pair": passes_a_pair(config)}
    stages.write_json(folder / f"{cell.split}.json", result)
    return self.result(cell)

  def prepare(self, config: config_lib.Config) -> base_lib.Base:
    """The base; its encoded pairs are made where they are not yet."""
    base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
    if not stages.latents_folder(config, self.out / "data").exists():
      stages.prepare(config, base, self.out / "data")
    return base

  def run_all(self, cells: Iterable[Cell], jobs: int) -> None:
    """Runs those that have not been done, some at a time, each on its share of the cores.

    Two runs with a core each are through sooner than one after the other with both: by a quarter
    at the demo's size.
    """
    cells = [cell for cell in dict.fromkeys(cells) if not self._is_done(cell)]
    if jobs == 1 or not cells:
      for cell in cells:
        self.run(cell)
      return
    self.prepare(self.config(cells[0]))  # once, before several want it
    context = multiprocessing.get_context("spawn")  # jax does not stand a fork
    numbers = context.Queue()
    for number in range(jobs):
      numbers.put(number)
    with concurrent.futures.ProcessPoolExecutor(
      jobs, mp_context=context, initializer=_take_share, initargs=(numbers, jobs, self.out)
    ) as pool:
      arguments = (self.settings.to_json(), self.out, self._overrides)
      waiting = [pool.submit(_run_apart, *arguments, cell) for cell in cells]
      for each in waiting:
        each.result()

  def _measure(self, config, base, params, split: str) -> dict[str, Any]:
    """Scores of a model beside the base's on the same prompts and noise."""
    emoji = stages.emoji_of(config)
    pairs = pairs_lib.split_pairs(pairs_lib.form_pairs(emoji))
    prompts = sorted({pair.caption for pair in pairs[split]})
    count = getattr(self.settings, f"{split}_images")
    sampler = evaluate.make_sampler(base, config.sampling)
    real = evaluate.real_images(emoji, base.resolution)

    def draw(params, title):
      images = evaluate.sample_prompts(
        sampler, base, params, prompts, count, seed=stages.EVALUATION_SEED, title=title
      )
      return images, measure.score(images, prompts, emoji, real)

    cached = self.out / f"base-{split}.npz"
    if not cached.is_file():
      images, scores = draw(base.params["unet"], "sampling the base")
      temporary = cached.with_suffix(f".{os.getpid()}.npz")
      np.savez_compressed(temporary, diversity=spread(images), **scores._asdict())
      os.replace(temporary, cached)
    with np.load(cached, allow_pickle=False) as file:
      reference = measure.Scores(**{name: file[name] for name in measure.Scores._fields})
      base_diversity = file["diversity"]
    images, policy = draw(params, "sampling the policy")
    decided = measure.decided_on(policy, reference, emoji, pairs[split])
    ranks = measure.rank_among(policy, prompts, emoji, pairs[split])
    return {
      "win": measure.compare(policy, reference).mean(axis=1).tolist(),
      "heldout_win": np.where(decided, measure.compare(policy, reference), np.nan).tolist(),
      "match": policy.match.mean(axis=1).tolist(),
      "rmse": policy.rmse.mean(axis=1).tolist(),
      "use_rank_heldout": ranks.tolist(),
      "diversity": spread(images).tolist(),
      "base": {
        "match": float(reference.match.mean()),
        "rmse": float(reference.rmse.mean()),
        "diversity": float(base_diversity.mean()),
      },
    }

  # What is run, in turn.

  def sweep(self, row: str) -> list[Cell]:
    seed = self.settings.sweep_seed
    return [Cell(row, each, seed, 0.0, "validation") for each in self.settings.methods[row][1]]

  def chosen(self, row: str) -> tuple[str, bool] | None:
    """The settings of a row, and whether they keep within the bounds; None before the sweep."""
    found = {cell.settings: self.result(cell) for cell in self.sweep(row)}
    if None in found.values():
      return None

    def keeps(result):
      lost = result["base"]["match"] - np.mean(result["match"])
      grown = np.mean(result["rmse"]) / result["base"]["rmse"]
      return lost <= self.settings.lost_match and grown <= self.settings.grown_rmse

    within = {name: result for name, result in found.items() if keeps(result)}
    if within:
      return max(within, key=lambda name: np.mean(within[name]["win"])), True
    return min(found, key=lambda name: np.mean(found[name]["rmse"])), False

  def finals(self, row: str, settings: str) -> list[Cell]:
    return [Cell(row, settings, seed, 0.0, "test") for seed in self.settings.seeds]

  def table_results(self, row: str) -> tuple[str, bool, list[dict]] | None:
    """The chosen settings, whether within the bounds, and all results; None before that."""
    choice = self.chosen(row)
    results = choice and [self.result(cell) for cell in self.finals(row, choice[0])]
    return (*choice, results) if results and None not in results else None

  def noisy(self, row: str, settings: str) -> Iterator[Cell]:
    """Runs with swapped pairs; of DMPO also clean ones with the alpha that they amount to."""
    seed = self.settings.seeds[0]
    for share in self.settings.noise:
      yield Cell(row, settings, seed, share, "test")
      if row == "dmpo":
        config = self.config(Cell(row, settings, seed, 0.0, "test"))
        alpha = alpha_of_noise(config.objective.alpha, share)
        yield Cell(row, f"{settings} objective.alpha={alpha:.4f}", seed, 0.0, "test")


def keep_programs(out: pathlib.Path) -> None:
  """Compiled programs are kept among the runs: seeds of a setting share them."""
  jax.config.update("jax_compilation_cache_dir", str(out / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _take_share(numbers, jobs: int, out: pathlib.Path) -> None:
  """A process of several takes every `jobs`-th core, before jax counts them."""
  if hasattr(os, "sched_setaffinity"):  # not on macOS
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[numbers.get() :: jobs] or cores)
  keep_programs(out)


def _run_apart(settings: str, out: pathlib.Path, overrides: Sequence[str], cell: Cell) -> None:
  settings = ml_collections.ConfigDict(json.loads(settings))
  Study(settings, out, overrides).run(cell)


def spread(images: np.ndarray) -> np.ndarray:
  """Mean distance between two images of a prompt, root mean square of pixels in [-1, 1]; [p]."""
  flat = images.reshape(*images.shape[:2], -1)
  distances = [diversity.mean_pairwise_distance(each) for each in flat]
  return np.array(distances) / math.sqrt(flat.shape[-1])


def _displacement(records: Sequence[dict]) -> dict[str, float | None]:
  """By how much winners and losers are denoised better than by the reference, at the end."""
  names = ("validation/winner_advantage", "validation/loser_advantage", "validation/margin")
  last = [record for record in records if names[0] in record]
  return {name.rpartition("/")[2]: last[-1][name] if last else None for name in names}


# For people.


def interval(values: np.ndarray) -> str:
  """Mean and 95 % bootstrap interval over prompts, the rows; NaN is not counted."""
  found = evaluate.bootstrap(np.nan_to_num(values), ~np.isnan(values))
  return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def of_seeds(results: Sequence[dict], field: str) -> np.ndarray:
  """[prompts, values of all seeds]."""
  columns = [np.asarray(each[field], np.float64) for each in results]
  return np.concatenate([c[:, None] if c.ndim == 1 else c for c in columns], axis=1)


def show(study: Study) -> str:
  """The tables of what there is."""
  lines = [
    "| method | settings | updates | win rate, all | by seed | held-out couples | prompt match |"
    " RMSE | diversity | winner / loser advantage |",
    f"|{'---|' * 10}",
  ]
  found = {row: study.table_results(row) for row in study.settings.methods}
  base = next((results[0]["base"] for _, _, results in filter(None, found.values())), None)
  if base is not None:
    cells = " | ".join(f"{base[name]:.3f}" for name in ("match", "rmse", "diversity"))
    lines.append(f"| base | | 0 | 0.5 by definition | | | {cells} | |")
  for row, done in found.items():
    if done is None:
      lines.append(f"| {row} | not done |{' |' * 8}")
      continue
    settings, within, results = done
    by_seed = ", ".join(f"{np.mean(each['win']):.3f}" for each in results)
    moved = ["winner_advantage", "loser_advantage"]
    moved = [[each[name] for each in results if each[name] is not None] for name in moved]
    cells = [
      row,
      settings.replace("objective.", "") + ("" if within else " (none within the bounds)"),
      str(results[0]["steps"]),
      interval(of_seeds(results, "win")),
      by_seed,
      *(interval(of_seeds(results, name)) for name in ("heldout_win", "match", "rmse")),
      f"{of_seeds(results, 'diversity').mean():.3f}",
      " / ".join(f"{np.mean(each):.1e}" if each else "n/a" for each in moved),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join([*lines, "", *_compare(found), "", *_noise_table(study)])


def _compare(found: Mapping[str, tuple | None]) -> Iterator[str]:
  """Differences to DMPO on the same prompts: with 0 in its interval a method is not told apart."""
  if found.get("dmpo") is None:
    return
  names = ("win", "heldout_win")

  def of_prompts(row):
    values = [of_seeds(found[row][2], name) for name in names]
    counts = [(~np.isnan(each)).sum(axis=1) for each in values]
    sums = [np.nansum(each, axis=1) for each in values]
    # A prompt of which no image shows a held-out couple has no rate.
    return [
      np.where(c > 0, s / np.maximum(c, 1), np.nan) for s, c in zip(sums, counts, strict=True)
    ]

  dmpo = of_prompts("dmpo")
  yield "| win rate less that of dmpo, same prompts | all | held-out couples |"
  yield "|---|---|---|"
  for row, done in found.items():
    if row != "dmpo" and done is not None:
      differences = [a - b for a, b in zip(of_prompts(row), dmpo, strict=True)]
      yield f"| {row} | {' | '.join(interval(each[:, None]) for each in differences)} |"


def _noise_table(study: Study) -> Iterator[str]:
  yield "| swapped pairs | method | settings | win rate | prompt match | RMSE |"
  yield "|---|---|---|---|---|---|"
  for row in study.settings.noisy:
    choice = study.chosen(row)
    for cell in study.noisy(row, choice[0]) if choice else ():
      result = study.result(cell)
      if result is not None:
        cells = [f"{cell.noise:.0%}", row, cell.settings.replace("objective.", "")]
        cells += [interval(of_seeds([result], name)) for name in ("win", "match", "rmse")]
        yield f"| {' | '.join(cells)} |"


def points_of(study: Study) -> list[dict[str, Any]]:
  """Every run of the sweep and of the table: reward and what it cost."""
  points = []
  for row in study.settings.methods:
    choice = study.chosen(row)
    cells = study.sweep(row) + (study.finals(row, choice[0]) if choice else [])
    for cell in cells:
      result = study.result(cell)
      if result is not None:
        point = {name: float(np.mean(result[name])) for name in ("win", "match", "rmse")}
        point |= {f"base_{name}": result["base"][name] for name in ("match", "rmse")}
        points.append({**cell._asdict(), **point})
  return points


def read_settings(path: str):
  """What `get_config` of a file gives."""
  spec = importlib.util.spec_from_file_location("study_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all runs")
  parser.add_argument("--config", default=str(CONFIGS / "study" / "emoji.py"))
  parser.add_argument("--only", default="", help="rows whose name begins so")
  parser.add_argument("--seeds", type=int, nargs="+", help="in place of the configuration's")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share")
  parser.add_argument("--table", action="store_true", help="of what there is; nothing is run")
  options, overrides = parser.parse_known_args()
  wrong = [each for each in overrides if not each.startswith("--config.")]
  if wrong:
    parser.error(f"unknown argument {wrong[0]}")
  settings = read_settings(options.config)
  if options.seeds:
    settings.seeds = tuple(options.seeds)
  study = Study(settings, options.out, overrides)
  rows = [row for row in settings.methods if row.startswith(options.only)]
  if not rows:
    parser.error(
      f"--only: no row begins with {options.only!r}; rows: {', '.join(settings.methods)}"
    )
  if options.jobs < 1:
    parser.error(f"--jobs: expected 1 or more, got {options.jobs}")
  if not options.table:
    keep_programs(options.out)
    study.run_all([cell for row in rows for cell in study.sweep(row)], options.jobs)
    chosen = {row: study.chosen(row)[0] for row in rows}
    finals = [cell for row in rows for cell in study.finals(row, chosen[row])]
    noisy = [row for row in settings.noisy if row in chosen]
    finals += [cell for row in noisy for cell in study.noisy(row, chosen[row])]
    study.run_all(finals, options.jobs)
  points = {"grown_rmse": settings.grown_rmse, "points": points_of(study)}
  stages.write_json(options.out / "points.json", points)
  print(show(study))


if __name__ == "__main__":
  main()
