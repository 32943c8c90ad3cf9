"""Plans: the real TPU compiler on the shipped base, and what is read from its programs."""

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest
import tiny
import torch_models

from dmpo_jax import base as base_lib
from dmpo_jax import cli, hlo, plan, tasks
from dmpo_jax import config as config_lib

PROGRAM = """
HloModule jit_step

%body (p: (f32[4])) -> (f32[4]) {
  %g = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%a), dimensions={0}
  %r = (f32[16]{0}, f32[2,2]{1,0}) all-reduce(%b, %c), to_apply=%sum
  %flash_attention.3 = (bf16[2,8,1024,40]{3,2,1,0}, f32[2,8,1024,128]{3,2,1,0}) \
custom-call(%q, %k, %v), custom_call_target="tpu_custom_call"
}

%other (p: f32[4]) -> f32[4] {
  ROOT %s = f32[4]{0} reduce-scatter(%p), dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w = (f32[4]) while(%x), condition=%cond, body=%body
  %p = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=1
  ROOT %f = f32[4]{0} fusion(%w), kind=kLoop, calls=%other
}
"""

INPO = {
  "objective.method": "inpo",
  "objective.alpha": None,
  "objective.labels": None,
  "objective.sft_weight": None,
  "objective.inversion": "exact",
  "objective.inversion_steps": 10,
}


def test_collectives_are_counted_as_often_as_they_run():
  expected = {
    "all-gather": (3, 3 * 32 * 16 * 2),
    "all-reduce": (3, 3 * (16 + 4) * 4),
    "reduce-scatter": (1, 16),
    "collective-permute": (1, 20),
  }
  assert hlo.find_collectives(PROGRAM, loops=3) == expected


def test_kernels_are_counted_by_hand():
  products = 2 * 2 * 2 * 8 * 1024**2  # two products, a multiply and an add, batch 2, 8 heads
  assert list(hlo.find_kernels(PROGRAM, loops=3)) == [(3 * products * 40, 3 * products * 128)]


def test_an_unknown_kernel_is_refused():
  with pytest.raises(ValueError, match="'splash.1' is not known"):
    list(hlo.find_kernels(PROGRAM.replace("flash_attention.3", "splash.1")))


@pytest.mark.parametrize(
  "text, slices, message",
  [
    ("v9:2x2", 1, "unknown kind 'v9'; expected one of v4, v5e, v5p, v6e, tpu7x"),
    ("v5e:3x3", 1, "unknown shape in 'v5e:3x3'; expected one of v5e:2x2, v5e:2x4"),
    ("v5e", 1, "expected one of v5e:2x2"),
    ("v5e:2x2", 0, "--slices: expected at least 1, got 0"),
  ],
)
def test_unknown_topologies_are_named(text, slices, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    plan.read_topology(text, slices)


@pytest.mark.slow
def test_published_configurations_are_those_of_the_judges():
  """And so the parameters: `test_full_size` counts those."""
  models = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": torch_models.UNET_SD15_FULL,
    "stabilityai/stable-diffusion-2-1": torch_models.UNET_SD21_FULL,
    "stabilityai/stable-diffusion-xl-base-1.0": torch_models.UNET_SDXL_FULL,
    "timbrooks/instruct-pix2pix": torch_models.UNET_IP2P_FULL,
  }
  assert set(models) == set(base_lib.PUBLISHED)
  for name, unet in models.items():
    base = base_lib.load_architecture(name, compute="bfloat16", kernel="tpu", remat="blocks")
    assert list(base.unet.config.block_out_channels) == list(unet["block_out_channels"])
    assert base.unet.config.cross_attention_dim == unet["cross_attention_dim"]
    assert base.unet.config.sample_size == unet["sample_size"]


@pytest.mark.slow
def test_forward_flops_of_stable_diffusion():
  """0.34e12 multiplications without attention's scores, as is published for 64 x 64 latents."""
  base = base_lib.load_architecture(
    "stable-diffusion-v1-5/stable-diffusion-v1-5", compute="bfloat16", kernel="tpu", remat="full"
  )
  channels_and_tokens = [(320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1)]
  scores = sum(4 * tokens**2 * width * n for width, tokens, n in channels_and_tokens)
  assert plan.forward_flops(base) - scores == pytest.approx(2 * 0.339e12, rel=0.02)


@pytest.mark.slow
def test_a_low_rank_delta_needs_fewer_flops():
  base = base_lib.load_architecture("emoji", compute="float32", kernel="tpu", remat="full")
  full = tiny.config("emoji")
  lora = tiny.config("emoji", **{"lora.rank": 2, "lora.alpha": 2.0, "lora.targets": "to_q"})
  assert plan.minimum_flops(lora, base) == 0.75 * plan.minimum_flops(full, base)
  stored = tiny.config("emoji", **{"data.reference_draws": 2})
  assert plan.minimum_flops(stored, base) == 0.75 * plan.minimum_flops(full, base)
  inpo = tiny.config("emoji", **INPO)  # both images are inverted in 10 forward passes each
  assert plan.minimum_flops(inpo, base) == 28 / 8 * plan.minimum_flops(full, base)


def test_a_step_with_a_loop_that_the_compiler_does_not_count_is_refused():
  with pytest.raises(ValueError, match="another method than 'inpo'.* 20 of 28 forward passes"):
    plan.make_plan(tiny.config("emoji", **INPO), plan.read_topology("v5e:2x2"))


# UNet forward passes of a pair: images x (forward, backward, forward of the reference).
FORWARDS = {
  "dmpo": (8, 6, 6),
  "dpo": (8, 6, 6),
  "fpo": (8, 6, 6),
  "ipo": (8, 6, 6),
  "sdpo": (8, 6, 6),
  "dmpo_sft": (8, 6, 6),
  "sft": (3, 2, None),
  "mapo": (6, 4, None),
  "kto": (8, 6, 6),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_passes_of_each_method(name):
  """Full training, a low-rank delta, stored errors of the reference; what the step reads fits."""
  whole, low_rank, stored = FORWARDS[name]
  path = f"configs/emoji_{name}.py"
  lora = {"lora.rank": 2, "lora.alpha": 2.0, "lora.targets": "to_q"}
  for expected, more in ((whole, {}), (low_rank, lora), (stored, {"data.reference_draws": 2})):
    if expected is not None:
      config = tiny.config("emoji", path=path, **more)
      assert plan.minimum_forwards(config) == expected
      reference = tasks.holds_reference(config)
      assert reference == (whole == 8 and "data.reference_draws" not in more or "lora.rank" in more)


@pytest.mark.slow
def test_stored_errors_stand_in_the_batch_for_the_reference():
  config = tiny.config("emoji", **{"data.reference_draws": 2})
  base = base_lib.load_architecture("emoji", compute="float32", kernel="tpu", remat="layers")
  params, frozen, objective, batch = plan.abstract_task(config, base)
  assert frozen.reference is None and batch.reference_errors.shape == (16, 2)
  examples = jax.eval_shape(objective.draw, batch, jax.random.key(0))
  loss, _ = jax.eval_shape(objective.loss, params, frozen, examples)
  assert loss.shape == (16,)


def test_batches_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="30 cannot be split over 16 chips.*16 or 32"):
    plan.candidates(30, plan.read_topology("v5e:4x4"))


def test_candidates_divide_the_batch():
  found = plan.candidates(96, plan.read_topology("v5e:4x4"))
  assert {each.pairs for each in found} == {1, 2}
  assert {each.fsdp for each in found} == {1, 8, 16}
  assert {each.remat for each in found} == {"layers", "blocks"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_dmpo_pickapic", "sdxl_dmpo_pickapic", "sd15_dmpo_lora"])
def test_the_batch_is_what_training_would_read(name):
  config = config_lib.from_dict(cli.read_config(f"configs/{name}.py", []))
  base = base_lib.load_architecture(
    config.base, compute="bfloat16", kernel="tpu", remat=config.remat
  )
  params, frozen, objective, batch = plan.abstract_task(config, base)
  examples = jax.eval_shape(objective.draw, batch, jax.random.key(0))
  loss, metrics = jax.eval_shape(objective.loss, params, frozen, examples)
  assert loss.shape == (config.batch_size,) and "margin" in metrics
  trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert trained == {"sd15": 859_520_964, "sdxl": 2_567_463_684}.get(
    name.removesuffix("_dmpo_pickapic"), 3_188_736
  )


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
  """The environment of a process that finds the TPU compiler; nothing else is installed by it."""
  folder = tmp_path_factory.mktemp("libtpu")
  needed = next(
    each.partition(";")[0].strip()
    for each in importlib.metadata.requires("jax")
    if each.startswith("libtpu")
  )
  command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
  subprocess.run([*command, needed], check=True)
  environment = {**os.environ, "PYTHONPATH": str(folder)}
  environment["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  return environment


def dmpo_plan(environment, out, *settings):
  command = [sys.executable, "-m", "dmpo_jax.cli", "plan", "--topology", "v5e:2x2", "--out", out]
  command += [f"--config.{each}" for each in settings]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_the_shipped_base_is_planned(compiler, tmp_path):
  settings = ("fsdp=4", "precision.compute=bfloat16", "precision.reference=bfloat16")
  out = tmp_path / "plan.json"
  status, text, errors = dmpo_plan(compiler, out, *settings)
  assert status == 0, errors
  assert "compiled, not run" in text and "fits" in text and "WARNING" not in errors
  (figures,) = json.loads(out.read_text())["plans"]
  assert figures["label"] == "compiled, not run"
  assert figures["mesh"] == {"data": 1, "fsdp": 4} and figures["pairs_per_chip"] == 8
  # Outputs of layers are kept, so that the step hardly does more than it must.
  assert 0.9 < figures["flops"] / figures["minimum_flops"] < 1.1
  kinds = set(figures["collectives"])
  assert "all-gather" in kinds and "all-to-all" not in kinds
  sizes = figures["memory"]
  assert sizes["optimizer"] == pytest.approx(2 * sizes["params"], rel=0.01)
  assert sum(sizes.values()) == figures["total_memory"] < figures["memory_limit"]
  assert len(os.listdir(os.path.join(compiler["XDG_CACHE_HOME"], "dmpo_jax", "plans"))) == 1
  again = dmpo_plan(compiler, tmp_path / "again.json", *settings)
  assert again[0] == 0 and json.loads((tmp_path / "again.json").read_text()) == {"plans": [figures]}


@pytest.mark.slow
def test_without_a_compiler_the_package_is_named(tmp_path):
  environment = dict(os.environ)
  status, _, errors = dmpo_plan(environment, tmp_path / "plan.json")
  if status == 0:  # the user's own environment has it
    pytest.skip("libtpu is installed here")
  assert status == 2 and "pip install 'dmpo_jax[tpu]'" in errors


@pytest.mark.slow
def test_a_batch_that_does_not_fit_the_chips_is_refused(compiler, tmp_path):
  status, _, errors = dmpo_plan(compiler, tmp_path / "plan.json", "batch_size=30")
  assert status == 2 and "expected a multiple of 4: 28 or 32" in errors
