"""What `dmpo prepare` costs: memory, whatever the number of rows, and its encoder beside PyTorch's.

    python benchmarks/prepare.py memory     # 12 minutes and 2 GB of disk under $TMPDIR
    python benchmarks/prepare.py encoder    # 4 minutes

`memory` writes shards of Pick-a-Pic's published schema, emoji on backgrounds of all colours as JPEG
bytes, with winners on both sides, ties, rows without a label and truncated pictures, and runs `dmpo
prepare` and a few steps of `dmpo train` on them, first on few rows, then on many. The peak is the
largest resident set of each command's process, which finds its programs compiled. What came out is
compared with what was written: counts by reason, and for some pairs whether the latents are those
of the winner and the loser. The exit status is 1 where a peak grows by more than a tenth, or
anything else is found than was written.

`encoder` encodes the same pictures with our jitted VAE and with diffusers' AutoencoderKL on the
same weights, in turn, on all cores: SD 1.5's at full width with random weights, and the shipped
one. The exit status is 1 where they disagree.
"""

import argparse
import collections
import concurrent.futures
import functools
import io
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dmpo_jax.data import images
from dmpo_jax.data.emoji_choice import emoji as emoji_lib

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))  # where the judges live

SHARD_ROWS, GROUP_ROWS = 1000, 100
VALIDATION = 5  # one row in so many is held out: `tasks.MAX_VALIDATION_PAIRS` of few rows as well
# Of every 500 rows. About 12 % of Pick-a-Pic are ties; broken rows stay below `data.broken_limit`.
KINDS = {"jpg_0": 215, "jpg_1": 215, "tie": 60, "not labelled": 9, "unreadable image": 1}
WON = ("jpg_0", "jpg_1")
SPLITS = ("train", "validation")
GROWTH = 1.1  # of the peak, from few rows to many
TOLERANCE = 1e-3  # largest difference over the judge's root mean square, float32


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parts = parser.add_subparsers(dest="part", required=True)
  memory = parts.add_parser("memory", help="peak memory by the number of rows")
  memory.add_argument("--rows", type=int, nargs="+", default=(2000, 20_000), help="few to many")
  memory.add_argument("--side", type=int, default=256, help="pixels of the shorter side")
  memory.add_argument("--steps", type=int, default=20, help="of training")
  memory.add_argument("--base", default="emoji", help="a base folder")
  memory.add_argument("--sampled", type=int, default=64, help="pairs whose latents are compared")
  memory.set_defaults(run=run_memory)
  encoder = parts.add_parser("encoder", help="images a second beside PyTorch")
  encoder.add_argument("--side", type=int, default=256, help="pixels, for SD 1.5's VAE")
  encoder.add_argument("--batch", type=int, default=4, help="pictures, for SD 1.5's VAE")
  encoder.add_argument("--rounds", type=int, default=7, help="measurements of each")
  encoder.set_defaults(run=run_encoder)
  options = parser.parse_args()
  options.run(options)


# Memory.


class Run(NamedTuple):
  """Seconds and peak memory of a command, in bytes."""

  seconds: float
  peak: int


def run_memory(options: argparse.Namespace) -> None:
  reasons = [kind for kind in KINDS if kind not in WON]
  print(f"| rows | MB | pairs | {' | '.join(reasons)} | prepare | pairs/s | peak | train, peak |")
  print(f"|{'---|' * (7 + len(reasons))}", flush=True)
  peaks, wrong, compared = [], [], 0
  for number, rows in enumerate(options.rows):
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      size = alone(write_rows, folder / "shards", rows, options.side)
      settings = {
        "base": options.base,
        "data.dataset": "pickapic_v2",
        "data.path": folder / "shards",
        "steps": options.steps,
        "validate_every": options.steps,
        "save_every": options.steps,
        "optim.warmup_steps": 1,
      }
      overrides = [f"--config.{field}={value}" for field, value in settings.items()]
      if not number:  # the peak of compiling differs by a sixth from run to run
        run_both(folder / "compiled", overrides)
      prepare, train = run_both(folder, overrides)
      found = alone(read_back, overrides, folder / "data", rows, options.side, options.sampled)
    expected = collections.Counter(map(kind_of, range(rows)))
    pairs, dropped = found["pairs"], found["dropped"]
    cells = [f"{rows:,}", f"{size / 1e6:.0f}", f"{pairs:,}"]
    cells += [f"{dropped.get(reason, 0):,}" for reason in reasons]
    cells += [f"{prepare.seconds:.0f} s", f"{pairs / prepare.seconds:.0f}"]
    cells += [f"{each.peak / 2**20:.0f} MiB" for each in (prepare, train)]
    print(f"| {' | '.join(cells)} |", flush=True)
    peaks.append((prepare.peak, train.peak))
    if pairs != sum(expected[kind] for kind in WON):
      wrong.append(f"{rows} rows: {pairs} pairs")
    wrong += [
      f"{rows} rows: {reason}: {dropped.get(reason, 0)} for {expected[reason]}"
      for reason in {*reasons, *dropped}
      if dropped.get(reason, 0) != expected[reason]
    ]
    wrong += [f"{rows} rows: {what}" for what in found["wrong"]]
    compared += found["compared"]
  grown = [many / few for few, many in zip(peaks[0], peaks[-1], strict=True)]
  print("\nPeak of many rows over that of few: prepare {:.3f}, train {:.3f}".format(*grown))
  print(f"Pairs whose latents were compared with their pictures: {compared}")
  if wrong or max(grown) > GROWTH:
    wrong += [f"a peak grew by more than {GROWTH}"] if max(grown) > GROWTH else []
    raise SystemExit("; ".join(wrong))


def alone(function: Callable, *arguments: Any) -> Any:
  """Calls `function` in a fresh process: this one stays smaller than those it measures."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(function, *arguments).result()


def run_both(folder: pathlib.Path, overrides: list[str]) -> tuple[Run, Run]:
  """Prepares into `folder / "data"` and trains."""
  prepare = dmpo("prepare", "--data", folder / "data", *overrides)
  return prepare, dmpo("train", "--data", folder / "data", "--out", folder / "run", *overrides)


def dmpo(*arguments: Any) -> Run:
  """Runs a command as a user does; fails as it fails."""
  command = [sys.executable, "-m", "dmpo_jax.cli", *map(str, arguments)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with tempfile.TemporaryFile("w+") as output:
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
      output.seek(0)
      raise SystemExit(f"{' '.join(command)}: status {process.returncode}\n{output.read()}")
  unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, by the system's manual
  return Run(seconds, unit * usage.ru_maxrss)


@functools.cache
def kinds() -> tuple[str, ...]:
  """500 kinds of rows, the same in the same order always."""
  every = [kind for kind, count in KINDS.items() for _ in range(count)]
  return tuple(np.random.default_rng(0).permutation(every).tolist())


def kind_of(row: int) -> str:
  """The column of the winner, or why there is none."""
  return kinds()[row % len(kinds())]


def caption_of(row: int) -> str:
  emoji = emoji_lib.load_emoji()
  each = emoji[row % len(emoji)]
  return f"{each.character} {', '.join(each.keywords[:3])}, number {row}"


def picture(number: int, side: int) -> bytes:
  """An emoji on a background that blends four colours, as JPEG; no two are alike."""
  generator = np.random.default_rng(number)
  emoji = emoji_lib.load_emoji()
  corners = generator.integers(0, 256, (2, 2, 3), np.uint8)
  width = side + number % 3 * side // 4
  canvas = Image.fromarray(corners).resize((width, side), Image.Resampling.BILINEAR)
  with Image.open(emoji[generator.integers(len(emoji))].artwork) as artwork:
    size = int(generator.uniform(0.4, 0.9) * side)
    drawing = artwork.convert("RGBA").resize((size, size), Image.Resampling.BILINEAR)
  left, top = generator.integers(0, side - size + 1, 2).tolist()
  canvas.paste(drawing, (left, top), drawing)
  buffer = io.BytesIO()
  canvas.save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def rows_of(split: str, rows: int) -> list[int]:
  """Numbers of the rows of a split."""
  return [row for row in range(rows) if (row % VALIDATION == 0) == (split == "validation")]


def write_rows(folder: pathlib.Path, rows: int, side: int) -> int:
  """Writes the rows as shards of two splits; returns their bytes."""
  import pair_files

  paths = []
  for split in SPLITS:
    members = rows_of(split, rows)
    shards = [members[first : first + SHARD_ROWS] for first in range(0, len(members), SHARD_ROWS)]
    for index, numbers in enumerate(shards):
      path = folder / "data" / f"{split}-{index:05d}-of-{len(shards):05d}.parquet"
      table = [make_row(number, side) for number in numbers]
      paths.append(pair_files.write_pickapic(path, table, row_group_size=GROUP_ROWS))
  return sum(path.stat().st_size for path in paths)


def make_row(row: int, side: int) -> dict[str, Any]:
  """A row with every column of the schema."""
  kind = kind_of(row)
  first, second = picture(2 * row, side), picture(2 * row + 1, side)
  uids = [str(uuid.UUID(int=2 * row + index)) for index in (0, 1)]
  labels = {"jpg_1": (0.0, 1.0), "tie": (0.5, 0.5), "not labelled": (None, None)}
  label_0, label_1 = labels.get(kind, (1.0, 0.0))
  return {
    "are_different": kind in WON,
    "best_image_uid": uids[int(kind == "jpg_1")],
    "caption": caption_of(row),
    "created_at": None,
    "has_label": kind != "not labelled",
    "image_0_uid": uids[0],
    "image_0_url": f"https://example.org/{uids[0]}.png",
    "image_1_uid": uids[1],
    "image_1_url": f"https://example.org/{uids[1]}.png",
    "jpg_0": first[: len(first) // 2] if kind == "unreadable image" else first,
    "jpg_1": second,
    "label_0": label_0,
    "label_1": label_1,
    "model_0": "emoji",
    "model_1": "emoji",
    "ranking_id": row,
    "user_id": row % 97,
    "num_example_per_prompt": 1,
    "__index_level_0__": row,
  }


def read_back(
  overrides: list[str], data: pathlib.Path, rows: int, side: int, sampled: int
) -> dict[str, Any]:
  """Pairs and dropped rows of the encoded data, and what is wrong with some of the pairs."""
  import jax

  from dmpo_jax import base as base_lib
  from dmpo_jax import cli, stages
  from dmpo_jax import config as config_lib

  config = config_lib.from_dict(cli.read_config(cli.DEFAULT_CONFIG, overrides))
  base = base_lib.load_base(config.base)
  encoded = stages.open_data(config, base, data)
  encode, wrong, compared = jax.jit(base.encode), [], 0
  for split in SPLITS:
    kept = [row for row in rows_of(split, rows) if kind_of(row) in WON]
    found = len(encoded.splits[split])
    if found != len(kept):
      wrong.append(f"{split}: {found} pairs for {len(kept)}")
      continue
    chosen = np.random.default_rng(1).permutation(len(kept))[: sampled // 2].tolist()
    numbers = [2 * kept[position] + second for position in chosen for second in (0, 1)]
    squares = [to_square(picture(number, side), base.resolution) for number in numbers]
    moments = np.asarray(encode(base.params["vae"], np.stack(squares)))
    for index, position in enumerate(chosen):
      row, pair = kept[position], encoded.splits[split][position]
      first_won = kind_of(row) == "jpg_0"
      winner, loser = moments[2 * index : 2 * index + 2][:: 1 if first_won else -1]
      uids = [str(uuid.UUID(int=2 * row + second)) for second in (0, 1)]
      same = (pair["caption"], pair["couple"]) == (caption_of(row), "-".join(uids))
      apart = np.abs(winner - loser).max()
      for mine, theirs in (("moments_w", winner), ("moments_l", loser)):
        same &= bool(np.abs(np.float32(pair[mine]) - theirs).max() < 0.05 * apart)
      compared += 1
      if not same:
        wrong.append(f"{split}, pair {position} is not row {row}")
  metadata = encoded.metadata
  pairs = sum(metadata["counts"].values())
  return {"pairs": pairs, "dropped": metadata["dropped"], "wrong": wrong, "compared": compared}


def to_square(data: bytes, resolution: int) -> np.ndarray:
  """The picture as an encoder sees it: short side resized by Lanczos, middle, [-1, 1]."""
  with Image.open(io.BytesIO(data)) as image:
    return images.to_array(image, resolution)


# Encoder.


def run_encoder(options: argparse.Namespace) -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import torch
  import torch_models

  from dmpo_jax import base as base_lib

  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  torch.set_num_threads(cores)
  print(f"Images a second on {cores} cores, median of {options.rounds} [least, most]\n")
  print("| VAE | pictures | ours | PyTorch | ours over PyTorch | difference |")
  print("|---|---|---|---|---|---|", flush=True)
  with tempfile.TemporaryDirectory() as name:
    torch_models.vae(torch_models.VAE_SD15_FULL).save_pretrained(name)
    differences = [
      compare_encoders("SD 1.5", pathlib.Path(name), options.side, options.batch, options.rounds),
      compare_encoders("shipped", base_lib.resolve("emoji") / "vae", 32, 64, options.rounds),
    ]
  if max(differences) > TOLERANCE:
    raise SystemExit(f"expected a difference of at most {TOLERANCE}")


def compare_encoders(name: str, folder: pathlib.Path, side: int, batch: int, rounds: int) -> float:
  """Prints a line of the table; returns the largest difference over the root mean square."""
  import diffusers
  import jax
  import torch
  import torch_models

  from dmpo_jax import base as base_lib
  from dmpo_jax import weights
  from dmpo_jax.models import init, vae

  pictures = np.stack([to_square(picture(number, 2 * side), side) for number in range(batch)])
  model = vae.AutoencoderKL(vae.read_config(base_lib.read_json(folder / "config.json")))
  shapes = init.param_shapes(model, pictures)
  params = jax.device_put(weights.load_params(folder, shapes))
  encode = jax.jit(functools.partial(model.apply, method="encode"))
  judge = diffusers.AutoencoderKL.from_pretrained(folder).eval()

  def encode_ours():
    return np.asarray(encode({"params": params}, pictures))

  @torch.inference_mode()
  def encode_theirs():
    moments = judge.encode(torch_models.channels_first(pictures)).latent_dist.parameters
    return torch_models.channels_last(moments)

  ours, theirs = encode_ours(), encode_theirs()
  difference = float(np.abs(ours - theirs).max() / np.sqrt(np.square(theirs).mean()))
  speeds = []
  for _ in range(rounds):
    speeds.append([batch / seconds(each) for each in (encode_ours, encode_theirs)])
  mine, judges = np.array(speeds).T
  print(
    f"| {name} | {batch} of {side} x {side} | {spread(mine)} | {spread(judges)} |"
    f" {spread(mine / judges)} | {difference:.1e} |",
    flush=True,
  )
  return difference


def seconds(function: Callable[[], Any]) -> float:
  begun = time.perf_counter()
  function()
  return time.perf_counter() - begun


def spread(values: np.ndarray) -> str:
  """Median, least and most, of three digits."""
  return f"{np.median(values):.3g} [{values.min():.3g}, {values.max():.3g}]"


if __name__ == "__main__":
  main()
