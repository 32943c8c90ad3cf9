"""Exported folders are opened by diffusers itself, which then draws what we draw."""

import json
import os
import subprocess
import sys
import textwrap

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch

from dmpo_jax import base as base_lib
from dmpo_jax import evaluate, export, lora, lora_files

PROMPTS = ["love", "sad", "A dog, please!"]


def open_pipeline(folder):
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32)
  pipeline.set_progress_bar_config(disable=True)
  return pipeline


@pytest.fixture(scope="module", params=["tiny", "emoji"])
def exported(request, tiny_base, tmp_path_factory):
  """An export of the tiny base (random weights) and of the shipped one, its UNet a little moved."""
  base = base_lib.load_base(str(tiny_base) if request.param == "tiny" else request.param)
  generator = np.random.default_rng(0)
  unet = {"unet": _moved(base.params["unet"], generator)}
  folder = tmp_path_factory.mktemp("export") / "model"
  export.export_folder(base, folder, trained=unet, card="# card")
  return folder, base_lib.load_base(str(folder))


def _moved(tree, generator):
  if isinstance(tree, dict):
    return {name: _moved(value, generator) for name, value in tree.items()}
  return (tree * (1 + 0.01 * generator.standard_normal(tree.shape))).astype(np.float32)


@pytest.mark.slow
def test_diffusers_draws_the_same_images(exported):
  folder, base = exported
  sampling = tiny.sampling(steps=10, guidance_scale=3.0)
  noise = evaluate.initial_noise(PROMPTS, 1, base.latent_shape, 0)[:, 0]
  sampler = evaluate.make_sampler(base, sampling)
  ours = sampler(base.params["unet"], base.text_params, PROMPTS, noise)
  pipeline = open_pipeline(folder)
  theirs = pipeline(
    PROMPTS,
    height=base.resolution,
    width=base.resolution,
    num_inference_steps=10,
    guidance_scale=3.0,
    latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
    output_type="np",
  ).images
  # 1e-3 of the range [0, 1]: ten guided steps of two float32 implementations.
  np.testing.assert_allclose(ours / 2 + 0.5, theirs, atol=1e-3)
  assert theirs.std() > 0.01


@pytest.mark.slow
def test_diffusers_predicts_the_same_noise(exported):
  folder, base = exported
  noise = evaluate.initial_noise(PROMPTS, 1, base.latent_shape, 1)[:, 0]
  timesteps = np.array([1, 500, 999])
  denoiser = base.denoiser()
  conditions = denoiser.embed(base.text_params, jnp.asarray(base.tokenizer(PROMPTS)))
  embeds = conditions.prompt_embeds
  ours = denoiser.unet(base.params["unet"], jnp.asarray(noise), jnp.asarray(timesteps), conditions)
  pipeline = open_pipeline(folder)
  ids = pipeline.tokenizer(
    PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
  ).input_ids
  np.testing.assert_array_equal(ids.numpy(), base.tokenizer(PROMPTS))
  with torch.no_grad():
    context = pipeline.text_encoder(ids)[0]
    theirs = pipeline.unet(
      torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), torch.from_numpy(timesteps), context
    ).sample
  np.testing.assert_allclose(embeds, context.numpy(), atol=1e-4)
  np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-3)


@pytest.mark.slow
def test_untrained_parts_are_copied_bit_for_bit(tiny_base, tmp_path):
  base = base_lib.load_base(str(tiny_base))
  folder = export.export_folder(base, tmp_path / "m", trained={}, card="")
  for file in sorted(path for path in tiny_base.rglob("*") if path.is_file()):
    if file.name != "README.md":
      assert (folder / file.relative_to(tiny_base)).read_bytes() == file.read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights(tiny_base, tmp_path, dtype):
  base = base_lib.load_base(str(tiny_base))
  trained = {"unet": base.params["unet"]}
  folder = export.export_folder(base, tmp_path / "m", trained=trained, dtype=dtype, card="")
  tensors = safetensors.numpy.load_file(folder / "unet" / export.WEIGHT_FILES["unet"])
  assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
  again = base_lib.load_base(str(folder)).params["unet"]["conv_in"]["kernel"]
  # Half an ulp: 2^-11 for float16, 2^-8 for bfloat16 (rounded to nearest: 2^-9).
  np.testing.assert_allclose(again, base.params["unet"]["conv_in"]["kernel"], rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_an_export_is_not_overwritten_unless_asked(tiny_base, tmp_path):
  base = base_lib.load_base(str(tiny_base))
  folder = export.export_folder(base, tmp_path / "m", trained={}, card="first")
  with pytest.raises(ValueError, match="exists; give another folder, or --replace"):
    export.export_folder(base, folder, trained={}, card="second")
  assert (folder / "README.md").read_text() == "first"
  export.export_folder(base, folder, trained={}, card="second", replace=True)
  assert (folder / "README.md").read_text() == "second"
  assert [path.name for path in tmp_path.iterdir()] == ["m"]  # no drafts left


def test_something_else_is_never_replaced(tiny_base, tmp_path):
  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
  base = base_lib.load_base(str(tiny_base))
  with pytest.raises(ValueError, match="is not an exported model; refusing to replace it"):
    export.export_folder(base, tmp_path / "thesis", trained={}, card="", replace=True)
  assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_a_failed_export_leaves_nothing(tiny_base, tmp_path):
  base = base_lib.load_base(str(tiny_base))
  trained = {"unet": {"conv_in": {"kernel": np.full((3, 3, 4, 8), np.nan, np.float32)}}}
  with pytest.raises(ValueError, match="conv_in.weight"):
    export.export_folder(base, tmp_path / "m", trained=trained, card="")
  assert list(tmp_path.iterdir()) == []


def test_model_card_says_what_was_done():
  card = export.model_card(
    base="emoji",
    config={
      "objective": {"method": "dmpo", "beta": 1000.0, "order": None},
      "sampling": {"steps": 25, "guidance_scale": 2.0},
    },
    data="real pairs",
    metrics={"win rate": {"mean": 0.6, "low": 0.55, "high": 0.65}, "steps": 300},
    versions={"jax": "0.10.2"},
    licence="cc-by-4.0",
    attribution="Twemoji",
  )
  header = card.split("---")[1]
  assert "license: cc-by-4.0" in header and "library_name: diffusers" in header
  assert "| win rate | 0.6000 (95 % interval 0.5500 to 0.6500) |" in card
  assert "| steps | 300 |" in card and "DMPO {'beta': 1000.0}" in card
  settings = card.split("```json")[1].split("```")[0]
  assert json.loads(settings)["objective"]["method"] == "dmpo"


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_or_the_old(tiny_base, tmp_path):
  """A real process whose files may not grow beyond 20 kB; SIGXFSZ is an OSError in Python."""
  base = base_lib.load_base(str(tiny_base))
  export.export_folder(base, tmp_path / "old", trained={}, card="old")
  code = f"""
    import pathlib, resource
    from dmpo_jax import base, export
    loaded = base.load_base({str(tiny_base)!r})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    for name in ("new", "old"):
      try:
        export.export_folder(
          loaded, pathlib.Path({str(tmp_path)!r}) / name, trained=loaded.params, card="new",
          replace=True,
        )
      except OSError as error:
        print(name, error.strerror)
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code)],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == ["new File too large", "old File too large"]
  assert [path.name for path in tmp_path.iterdir()] == ["old"]
  assert (tmp_path / "old" / "README.md").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single-file", "lora"])
def test_files_are_not_overwritten_unless_asked(tiny_base, tmp_path, layout):
  base = base_lib.load_base(str(tiny_base))
  pair = {"down": np.ones((16, 2), np.float32), "up": np.ones((2, 8), np.float32)}
  name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
  adapter = lora.Adapter({name: pair}, np.float32(2.0))

  def write(path, **more):
    if layout == "lora":
      return export.export_lora(adapter, path, style="peft", **more)
    return export.export_single_file(base, path, trained={}, **more)

  path = write(tmp_path / "m.safetensors")
  first = path.read_bytes()
  with pytest.raises(ValueError, match="exists; give another name, or --replace"):
    write(path)
  with pytest.raises(ValueError, match="expected a name that ends in .safetensors"):
    write(tmp_path / "m.ckpt")
  assert write(path, replace=True).read_bytes() == first
  if layout == "lora":
    found = lora_files.read_lora(path, lora.find_kernels(base.shapes["unet"]))
    assert found.alphas == {name: 4.0}  # scale 2 times rank 2
