"""What TPU slices would make of the reference runs' steps: compiled, not run.

    pip install -e '.[tpu]' && python benchmarks/tpu_plan.py           # an hour and more on 2 cores
    python benchmarks/tpu_plan.py --only sd15_dmpo_lora                # rows whose name has this

Each row is a `dmpo plan` of its own, in a process of its own; what was compiled before comes from
the cache. FLOPs are those of the compiler and, within attention kernels, counted by hand; "of
least" is their ratio to the forward passes that a pair cannot do without. Times are bounds: the
compiler's estimate, kernels at the peak with heads padded to the matrix unit, collectives not
hidden at all.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

from dmpo_jax import cli
from dmpo_jax import plan as plan_lib


class Row(NamedTuple):
  config: str
  topology: str
  at_once: int  # pairs a chip
  settings: tuple[str, ...] = ()

  def __str__(self) -> str:
    return f"{self.config} {self.topology} {self.at_once} {' '.join(self.settings)}".strip()


SD15, SDXL, LORA = "sd15_dmpo_pickapic", "sdxl_dmpo_pickapic", "sd15_dmpo_lora"
DELTA = ("lora.rank=16", "lora.alpha=16.0", "lora.targets=to_q to_k to_v to_out.0")
ROWS = (
  Row(SD15, "v5e:4x4", 8),
  Row(SDXL, "v5e:16x16", 2),
  Row(SD15, "v5e:16x16", 8),
  Row(LORA, "v5e:2x2", 4),
  Row(SDXL, "v5p:4x4x4", 4),
  Row(SDXL, "v5e:4x4", 2, (*DELTA, "batch_size=64")),
  Row(SD15, "v6e:4x4", 8),
  Row(SD15, "v5p:2x2x1", 8, ("remat=layers", "fsdp=4")),
  Row(SD15, "v5e:4x4", 4, ("remat=layers",)),
)
GIB = 2**30


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--only", default="", help="rows with this in their name")
  parser.add_argument("--effort", choices=("quick", "full"), default="quick")
  options = parser.parse_args()
  print(
    "| configuration | topology | at once | remat | mesh | GiB | FLOPs of least | all-gather, MiB |"
    " scattered and reduced, MiB | ms, computing | ms, links | pairs/s | of peak | hours |"
  )
  print(f"|{'---|' * 14}", flush=True)
  failed = []
  for row in ROWS:
    if options.only not in str(row):
      continue
    plan = run(row, options.effort)
    if isinstance(plan, str):
      print(f"| {row.config} | {row.topology} | {row.at_once} | {plan} |", flush=True)
      failed.append(str(row))
    else:
      print(show(row, plan), flush=True)
  if failed:
    raise SystemExit(f"no plan for {'; '.join(failed)}")


def run(row: Row, effort: str) -> dict | str:
  """The figures, or why there are none."""
  config = pathlib.Path(__file__).parents[1] / "configs" / f"{row.config}.py"
  settings = dict(each.split("=") for each in row.settings)
  batch = int(settings.get("batch_size", cli.read_config(str(config), [])["batch_size"]))
  settings["accumulation"] = batch // plan_lib.read_topology(row.topology).chips // row.at_once
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "plan.json"
    command = [sys.executable, "-m", "dmpo_jax.cli", "plan", "--config", str(config)]
    command += ["--topology", row.topology, "--effort", effort, "--out", str(out)]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      return (done.stderr.strip().splitlines() or ["?"])[-1]
    return json.loads(out.read_text(encoding="utf-8"))["plans"][0]


def show(row: Row, plan: dict) -> str:
  """A line of the table."""
  sizes = {name: size / 2**20 for name, (_, size) in plan["collectives"].items()}
  gathered = sizes.pop("all-gather", 0.0)
  cells = [
    row.config,
    plan["topology"],
    str(row.at_once),
    plan["remat"],
    " x ".join(str(size) for size in plan["mesh"].values()),
    f"{plan['total_memory'] / GIB:.1f} of {plan['memory_limit'] / GIB:.0f}",
    f"{plan['flops'] / plan['minimum_flops']:.2f}",
    f"{gathered:,.0f}",
    f"{sum(sizes.values()):,.0f}",
    f"{1e3 * plan['compute_seconds']:,.0f}",
    f"{1e3 * plan['link_seconds']:,.0f}",
    f"{plan['pairs_per_second']:,.1f}",
    f"{plan['share_of_peak']:.0%}",
    f"{plan['hours']:.1f}",
  ]
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
