"""The UNet of SD 1.5 at full size: diffusers' file in, our forward pass, the same file out.

    python benchmarks/full_size.py

Random weights of 3.4 GB, as diffusers writes them, are imported, run on one 64 x 64 latent beside
PyTorch, and exported again. Each step has a process of its own, so that its peak of host memory is
its own: the largest resident set less that before the weights were read, files' mapped pages
counted. The seconds of a forward pass are its own, without import and compilation.
Needs 7 GB of disk under $TMPDIR.
"""

import concurrent.futures
import json
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time

import jax
import numpy as np

from dmpo_jax import safetensors_io, weights
from dmpo_jax.models import init, unet

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))  # where the judges live

FILE = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-3  # largest difference over the judge's root mean square, float32


def main():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    parameters = alone(write, folder)
    size = (folder / "judge" / FILE).stat().st_size
    print(f"SD 1.5 UNet: {parameters:,} parameters, {size / 1e9:.2f} GB in float32", flush=True)
    print(f"{'step':24} {'seconds':>8} {'peak GB':>8} {'of model':>9}", flush=True)
    for step in (import_only, import_and_export, forward, judge_forward):
      seconds, peak = alone(step, folder)
      print(f"{step.__name__:24} {seconds:8.1f} {peak / 1e9:8.2f} {peak / size:9.2f}", flush=True)
    ours, judge = np.load(folder / "ours.npy"), np.load(folder / "judge.npy")
    difference = np.abs(ours - judge).max() / np.sqrt(np.square(judge).mean())
    equal, tensors = alone(count_equal, folder)
    print(f"largest difference to PyTorch: {difference:.1e} of the root mean square")
    print(f"tensors equal byte for byte after import and export: {equal} of {tensors}")
    if difference > TOLERANCE or equal < tensors:
      raise SystemExit(f"expected at most {TOLERANCE}, and all tensors equal")


def alone(function, *arguments):
  """Calls `function` in a fresh process."""
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
    return executor.submit(function, *arguments).result()


def write(folder: pathlib.Path) -> int:
  import torch_models

  model = torch_models.unet(torch_models.UNET_SD15_FULL)
  model.save_pretrained(folder / "judge", max_shard_size="10GB")
  np.savez(
    folder / "inputs.npz",
    latents=np.random.default_rng(1).standard_normal((1, 64, 64, 4), np.float32),
    timesteps=np.array([500], np.int32),
    prompt_embeds=np.random.default_rng(2).standard_normal((1, 77, 768), np.float32),
  )
  return sum(each.numel() for each in model.parameters())


def import_only(folder: pathlib.Path) -> tuple[float, int]:
  _, shapes, _ = our_model(folder)
  before, start = peak_bytes(), time.perf_counter()
  weights.load_params(folder / "judge", shapes)
  return time.perf_counter() - start, peak_bytes() - before


def import_and_export(folder: pathlib.Path) -> tuple[float, int]:
  _, shapes, _ = our_model(folder)
  before, start = peak_bytes(), time.perf_counter()
  params = weights.load_params(folder / "judge", shapes)
  safetensors_io.save_safetensors(folder / "ours" / FILE, weights.to_diffusers(params))
  return time.perf_counter() - start, peak_bytes() - before


def forward(folder: pathlib.Path) -> tuple[float, int]:
  model, shapes, inputs = our_model(folder)
  before = peak_bytes()
  params = jax.device_put(weights.load_params(folder / "judge", shapes))
  compiled = jax.jit(model.apply).lower({"params": params}, *inputs).compile()
  start = time.perf_counter()
  np.save(folder / "ours.npy", compiled({"params": params}, *inputs))
  return time.perf_counter() - start, peak_bytes() - before


def judge_forward(folder: pathlib.Path) -> tuple[float, int]:
  import diffusers
  import torch
  import torch_models

  torch.set_num_threads(multiprocessing.cpu_count())
  latents, timesteps, prompt_embeds = load_inputs(folder)
  before = peak_bytes()
  model = diffusers.UNet2DConditionModel.from_pretrained(folder / "judge").eval()
  start = time.perf_counter()
  with torch.no_grad():
    sample = model(
      torch_models.channels_first(latents),
      torch.from_numpy(timesteps),
      torch.from_numpy(prompt_embeds),
    ).sample
  np.save(folder / "judge.npy", torch_models.channels_last(sample))
  return time.perf_counter() - start, peak_bytes() - before


def count_equal(folder: pathlib.Path) -> tuple[int, int]:
  """Tensors that are equal to the bit, and all that either file has."""
  judge, exported = (
    safetensors_io.load_safetensors(folder / name / FILE) for name in ("judge", "ours")
  )
  names = judge.keys() | exported.keys()
  equal = sum(
    name in judge and name in exported and same_bits(judge[name], exported[name]) for name in names
  )
  return equal, len(names)


def same_bits(one, other) -> bool:
  return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


def our_model(folder: pathlib.Path):
  """Our model for the judge's own config.json, its shapes, and the inputs."""
  config = unet.read_config(json.loads((folder / "judge" / "config.json").read_text()))
  model, inputs = unet.UNet2DConditionModel(config), load_inputs(folder)
  return model, init.param_shapes(model, *inputs), inputs


def load_inputs(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
  with np.load(folder / "inputs.npz") as inputs:
    return inputs["latents"], inputs["timesteps"], inputs["prompt_embeds"]


def peak_bytes() -> int:
  unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, by the system's manual
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
  main()
