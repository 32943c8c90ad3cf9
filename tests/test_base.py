"""Folders of every kind: what they hold, and what is refused with which words."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import transformers

from dmpo_jax import base as base_lib
from dmpo_jax import export, hub, types
from dmpo_jax.data import tokenizer as tokenizer_lib

pytestmark = pytest.mark.slow  # a base of each kind is made and read several times


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def folder(request, tmp_path_factory):
  return tiny.make_base(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
  return tiny.make_base(tmp_path_factory.mktemp("sdxl"), kind="sdxl")


def change(folder, file, **fields):
  path = folder / file
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_conditions_have_what_the_unet_asks_for(folder):
  base = base_lib.load_base(str(folder))
  ids = base.tokenizer(["love", "a sad cat"])
  conditions = jax.eval_shape(base.embed, base.text_params, ids)
  noise = jax.ShapeDtypeStruct((2, *base.latent_shape), np.float32)
  if base.edits:
    conditions = conditions._replace(image_latents=noise)
  timesteps = jax.ShapeDtypeStruct((2,), np.int32)
  output = jax.eval_shape(base.apply_unet, base.params["unet"], noise, timesteps, conditions)
  assert output.shape == noise.shape
  assert (conditions.added is not None) == (len(base.encoders) == 2)


def test_sdxl_conditions_equal_transformers(sdxl):
  base = base_lib.load_base(str(sdxl))
  captions = ["love", "a sad cat!"]
  ids = base.tokenizer(captions)
  states = []
  for i, name in enumerate(base.encoders):
    their_tokenizer = transformers.CLIPTokenizer.from_pretrained(
      str(sdxl / base_lib.tokenizer_folder(name))
    )
    theirs = their_tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt")
    np.testing.assert_array_equal(ids[:, i], theirs.input_ids.numpy())
    kind = transformers.CLIPTextModelWithProjection if i else transformers.CLIPTextModel
    encoder = kind.from_pretrained(str(sdxl / name)).eval()
    output = encoder(theirs.input_ids, output_hidden_states=True)
    states.append(output.hidden_states[-2].detach().numpy())
  got = jax.jit(base.embed)(base.text_params, ids)
  # 1e-4: float32 sums in another order.
  np.testing.assert_allclose(got.prompt_embeds, np.concatenate(states, axis=-1), atol=1e-4)
  pooled = output.text_embeds.detach().numpy()
  np.testing.assert_allclose(got.added.text_embeds, pooled, atol=1e-4)
  # The whole image at the base's size, 8 pixels: original, crop, target.
  np.testing.assert_array_equal(got.added.time_ids, [[8, 8, 0, 0, 8, 8]] * 2)


def test_given_time_ids_are_taken(sdxl):
  base = base_lib.load_base(str(sdxl))
  time_ids = np.arange(6, dtype=np.float32)[None]
  got = jax.jit(base.embed)(base.text_params, base.tokenizer(["love"]), time_ids)
  np.testing.assert_array_equal(got.added.time_ids, time_ids)
  assert isinstance(got.added, types.AddedConditions)


def test_long_captions_warn_once_for_both_tokenizers(sdxl):
  base = base_lib.load_base(str(sdxl), parts=())
  with pytest.warns(UserWarning, match="1 of 2 captions are longer than 77") as record:
    base.tokenizer(["love " * 100, "sad"])
  assert len(record) == 1


def test_only_the_parts_asked_for_are_read(folder):
  base = base_lib.load_base(str(folder), parts=("vae",))
  assert list(base.params) == ["vae"]
  assert set(base.shapes) == set(base.models)


@pytest.mark.parametrize(
  ("file", "fields", "message"),
  [
    (
      "model_index.json",
      {"_class_name": "FluxPipeline"},
      "_class_name is 'FluxPipeline'; expected one of StableDiffusionPipeline",
    ),
    (
      "unet/config.json",
      {"cross_attention_dim": 81},
      "cross_attention_dim 81 differs from text_encoder . text_encoder_2 hidden_size 80",
    ),
    (
      "unet/config.json",
      {"in_channels": 5},
      "unet in_channels is 5; expected 4 for a StableDiffusionXLPipeline",
    ),
    (
      "unet/config.json",
      {"projection_class_embeddings_input_dim": 45},
      "projection_class_embeddings_input_dim is 45; expected 44: text_encoder_2's 20 and 6",
    ),
    (
      "scheduler/scheduler_config.json",
      {"_class_name": "KDPM2DiscreteScheduler"},
      "KDPM2DiscreteScheduler",
    ),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type.*'flow'"),
  ],
)
def test_parts_that_do_not_fit_are_refused(sdxl, tmp_path, file, fields, message):
  broken = shutil.copytree(sdxl, tmp_path / "broken")
  change(broken, file, **fields)
  with pytest.raises(ValueError, match=message):
    base_lib.load_base(str(broken))


def test_a_pipeline_without_the_second_encoder_is_refused(sdxl, tmp_path):
  broken = shutil.copytree(sdxl, tmp_path / "broken")
  change(broken, "model_index.json", _class_name="StableDiffusionPipeline")
  with pytest.raises(ValueError, match="cross_attention_dim 80 differs from text_encoder"):
    base_lib.load_base(str(broken))


def test_a_single_file_is_no_base(tmp_path):
  file = tmp_path / "model.safetensors"
  file.touch()
  with pytest.raises(ValueError, match="is a single file; make a folder of it first: dmpo import"):
    base_lib.resolve(str(file))


def test_hub_ids_without_a_network_say_what_to_download():
  """In a process of its own: the hub's library reads its setting when it is imported."""
  command = "from dmpo_jax import base; base.resolve('stabilityai/none-such')"
  done = subprocess.run(
    [sys.executable, "-c", command],
    env={**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert "hf download stabilityai/none-such --local-dir FOLDER" in done.stderr


def test_hub_downloads_what_is_needed_and_no_more():
  from huggingface_hub import utils

  files = (
    "model_index.json README.md v1-5.safetensors unet/config.json vae/model.bin "
    "unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors "
    "unet/diffusion_pytorch_model.safetensors.index.json tokenizer/vocab.json tokenizer/merges.txt "
    "safety_checker/model.safetensors unet/diffusion_pytorch_model.non_ema.safetensors "
    "scheduler/scheduler_config.json"
  ).split()
  kept = utils.filter_repo_objects(files, allow_patterns=hub.WANTED, ignore_patterns=hub.UNWANTED)
  assert set(files) - set(kept) == {
    "README.md",
    "v1-5.safetensors",
    "vae/model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
  }


def test_an_export_goes_without_the_safety_checker_that_is_not_there(tmp_path):
  folder = tiny.make_base(tmp_path)
  for name in ("safety_checker", "feature_extractor"):
    change(folder, "model_index.json", **{name: ["x", "y"]})
  (folder / "feature_extractor").mkdir()
  (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
  (folder / "feature_extractor" / "old.bin").write_bytes(b"pickle")
  base = base_lib.load_base(str(folder))
  out = export.export_folder(base, tmp_path / "out", trained={}, card="")
  index = json.loads((out / "model_index.json").read_text())
  assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
  assert index["feature_extractor"] == ["x", "y"]
  names = [path.name for path in (out / "feature_extractor").iterdir()]
  assert names == ["preprocessor_config.json"]


def test_tokenizer_2_pads_otherwise(sdxl):
  first, second = (tokenizer_lib.load_tokenizer(sdxl / n) for n in ("tokenizer", "tokenizer_2"))
  a, b = first(["love"])[0], second(["love"])[0]
  end = int(np.argmax(a == first([""])[0, 1]))
  np.testing.assert_array_equal(a[: end + 1], b[: end + 1])
  assert a[-1] != b[-1] and b[-1] == 0
