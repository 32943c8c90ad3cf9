"""Names and layouts against diffusers and transformers themselves."""

import dataclasses
import os
import re
import tracemalloc

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import torch_models
import transformers

from dmpo_jax import safetensors_io, weights
from dmpo_jax.models import clip, init, unet, vae


def unet_shapes(config):
  ours = unet.UNet2DConditionModel(unet.read_config(config))
  latents = np.zeros((1, 8, 8, config["in_channels"]), np.float32)
  prompt_embeds = np.zeros((1, 3, config["cross_attention_dim"]), np.float32)
  return init.param_shapes(ours, latents, np.zeros(1, np.int32), prompt_embeds)


def unet_case(config):
  judge = torch_models.unet(config)
  return judge, unet_shapes(dict(judge.config))


def vae_case():
  judge = torch_models.vae()
  ours = vae.AutoencoderKL(vae.read_config(dict(judge.config)))
  return judge, init.param_shapes(ours, np.zeros((1, 8, 8, 3), np.float32))


def clip_case():
  judge = torch_models.clip()
  ours = clip.CLIPTextModel(clip.read_config(torch_models.CLIP))
  return judge, init.param_shapes(ours, np.zeros((1, 5), np.int32))


CASES = {
  "unet-sd1": lambda: unet_case(torch_models.UNET_SD1),
  "unet-sd2": lambda: unet_case(torch_models.UNET_SD2),
  "vae": vae_case,
  "clip": clip_case,
}


@pytest.fixture(scope="module")
def vae_tensors():
  """A VAE's tensors in diffusers' layout, and the shapes of our tree for them."""
  judge, shapes = vae_case()
  return torch_models.state_dict(judge), shapes


def assert_same_tree(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_bijection_and_strict_load_into_the_judge(case):
  judge, shapes = CASES[case]()
  tensors = torch_models.state_dict(judge)
  if case == "clip":  # transformers 5 leaves the prefix out in memory
    tensors = {"text_model." + name: value for name, value in tensors.items()}
  params = weights.from_diffusers(tensors, shapes)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))
  exported = weights.to_diffusers(params)
  torch_models.assert_same_tensors(exported, tensors)
  assert all(value.flags.c_contiguous for value in exported.values())
  assert_same_tree(weights.from_diffusers(exported, shapes), params)
  if case != "clip":
    judge.load_state_dict({name: torch.from_numpy(value) for name, value in exported.items()})


def test_layouts_by_hand():
  params = {
    "conv": {"kernel": np.arange(12).reshape(1, 2, 3, 2)},  # HWIO
    "blocks.0": {"dense": {"kernel": np.arange(6).reshape(2, 3), "bias": np.arange(3)}},
    "norm": {"scale": np.arange(2)},
    "table": {"embedding": np.arange(6).reshape(3, 2)},
    "vision_model.embeddings": {"class_embedding": np.arange(4)},
  }
  tensors = weights.to_diffusers(params)
  assert tensors.keys() == {
    "conv.weight",
    "blocks.0.dense.weight",
    "blocks.0.dense.bias",
    "norm.weight",
    "table.weight",
    "vision_model.embeddings.class_embedding",
  }
  assert tensors["conv.weight"].tolist() == [
    [[[0, 6]], [[2, 8]], [[4, 10]]],
    [[[1, 7]], [[3, 9]], [[5, 11]]],
  ]
  assert tensors["blocks.0.dense.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
  assert tensors["table.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
  assert tensors["vision_model.embeddings.class_embedding"].tolist() == [0, 1, 2, 3]
  with pytest.raises(
    ValueError, match="'lora.down': expected a leaf kernel, .*, class_embedding, logit_scale"
  ):
    weights.to_diffusers({"lora": {"down": np.zeros(2)}})


def test_params_do_not_share_memory_with_what_they_were_read_from():
  bias = np.zeros(2, np.float32)
  params = weights.from_diffusers({"norm.bias": bias}, {"norm": {"bias": bias}})
  bias += 1
  assert params["norm"]["bias"].tolist() == [0, 0]


def test_lazy_leaves_are_read_when_they_are_asked_for(tmp_path):
  shapes = {"proj": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}
  tensors = {
    "proj.weight": np.arange(6, dtype=np.float16).reshape(3, 2),
    "proj.bias": np.arange(3, dtype=np.float16),
  }
  file = tmp_path / "model.safetensors"
  safetensors_io.save_safetensors(file, tensors)
  lazy = weights.load_params(file, shapes, lazy=True)
  assert_same_tree(jax.tree.map(np.asarray, lazy), weights.load_params(file, shapes))
  kernel = lazy["proj"]["kernel"]
  assert kernel.shape == (2, 3) and np.asarray(kernel).dtype == np.float32
  assert np.asarray(kernel.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  file.unlink()
  with pytest.raises(ValueError, match="changed since it was opened"):
    np.asarray(kernel)


def test_names_of_both_transformers_versions_are_read(tmp_path):
  judge, shapes = clip_case()
  bare = torch_models.state_dict(judge)
  assert "final_layer_norm.weight" in bare  # transformers 5
  params = weights.from_diffusers(bare, shapes)
  exported = weights.to_diffusers(params)
  assert exported.keys() == {"text_model." + name for name in bare}  # transformers 4
  positions = {"text_model.embeddings.position_ids": np.arange(11)[None]}
  assert_same_tree(weights.from_diffusers(dict(exported) | positions, shapes), params)
  bare_positions = {"embeddings.position_ids": np.arange(11)[None]}
  assert_same_tree(weights.from_diffusers(bare | bare_positions, shapes), params)

  judge.config.save_pretrained(tmp_path)
  safetensors_io.save_safetensors(tmp_path / "model.safetensors", exported)
  reopened, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  torch_models.assert_same_tensors(torch_models.state_dict(reopened), bare)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolution", [False, True])
def test_old_attention_names_of_the_vae_are_read(vae_tensors, convolution):
  tensors, shapes = vae_tensors
  old = {}
  for name, value in tensors.items():
    for new_name, old_name in OLD_NAMES.items():
      name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
    is_projection = re.search(r"\.(query|key|value|proj_attn)\.weight", name)
    old[name] = value[:, :, None, None] if convolution and is_projection else value
  assert len(old.keys() - tensors.keys()) == 16  # encoder and decoder, 4 weights and 4 biases
  assert_same_tree(weights.from_diffusers(old, shapes), weights.from_diffusers(tensors, shapes))


def test_missing_and_unexpected_tensors_are_named(vae_tensors):
  tensors, shapes = vae_tensors
  tensors = dict(tensors)
  del tensors["decoder.conv_in.weight"]
  with pytest.raises(ValueError, match=r"1 missing \(decoder.conv_in.weight\)"):
    weights.from_diffusers(tensors, shapes)
  tensors["lora.down"] = np.zeros(3, np.float32)
  with pytest.raises(ValueError) as caught:
    weights.from_diffusers(tensors, shapes, where="vae/x.safetensors")
  assert str(caught.value) == (
    f"vae/x.safetensors: expected the {len(tensors)} tensors of the model, got {len(tensors)}: "
    "1 missing (decoder.conv_in.weight); 1 unexpected (lora.down); is this the component and the "
    "config.json you mean?"
  )


def test_a_misspelt_name_comes_with_the_one_it_is_like(vae_tensors):
  tensors, shapes = vae_tensors
  misspelt = dict(tensors)
  misspelt["decoder.conv_inn.weight"] = misspelt.pop("decoder.conv_in.weight")
  with pytest.raises(ValueError) as caught:
    weights.from_diffusers(misspelt, shapes)
  assert "(decoder.conv_in.weight [the file has decoder.conv_inn.weight])" in str(caught.value)
  assert "(decoder.conv_inn.weight [expected is decoder.conv_in.weight])" in str(caught.value)


def test_a_long_list_of_names_is_cut(vae_tensors):
  _, shapes = vae_tensors
  with pytest.raises(ValueError, match=r"\d+ missing \(([\w.]+, ){5}and \d+ more\)"):
    weights.from_diffusers({}, shapes)


def test_all_problems_are_named_at_once_and_before_anything_is_read(vae_tensors):
  tensors, shapes = vae_tensors
  attention = "encoder.mid_block.attentions.0"
  changed = tensors | {
    "encoder.conv_in.weight": np.zeros((16, 4, 3, 3), np.float32),
    # A 1x1 convolution for a dense layer is read under the old names only.
    f"{attention}.to_q.weight": np.zeros((32, 32, 1, 1), np.float32),
    f"{attention}.query.bias": np.zeros(32, np.float32),
    "quant_conv.bias": np.zeros(8, np.int8),
    "surplus": np.zeros(1, np.float32),
  }
  del changed["decoder.conv_out.bias"]

  def read():
    raise AssertionError("read")

  entries = safetensors_io.as_tensors(changed).entries
  unread = safetensors_io.Tensors(
    {name: dataclasses.replace(entry, read=read) for name, entry in entries.items()}
  )
  with pytest.raises(ValueError) as caught:
    weights.from_diffusers(unread, shapes, where="x")
  text = str(caught.value)
  assert "1 missing (decoder.conv_out.bias)" in text
  assert "1 unexpected (surplus)" in text
  assert f"1 present twice ('{attention}.to_q.bias' and '{attention}.query.bias')" in text
  assert "2 of another shape ('encoder.conv_in.weight' has shape (16, 4, 3, 3), " in text
  assert "expected (16, 3, 3, 3), " in text
  assert "to_q.weight' has shape (32, 32, 1, 1), expected (32, 32))" in text
  assert "1 of no floating-point type ('quant_conv.bias' is int8: use the weights that" in text


def test_bare_names_of_the_vision_model_are_read():
  shapes = {"vision_model": {"embeddings": {"class_embedding": np.zeros(3)}}}
  bare = {"embeddings.class_embedding": np.ones(3), "embeddings.position_ids": np.arange(5)}
  params = weights.from_diffusers(bare, shapes)
  assert params["vision_model"]["embeddings"]["class_embedding"].tolist() == [1, 1, 1]


def test_jax_arrays_are_laid_out():
  kernel = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
  tensors = weights.to_diffusers({"dense": {"kernel": kernel}})
  assert tensors.entries["dense.weight"].shape == (3, 2)
  assert isinstance(tensors["dense.weight"], np.ndarray)
  assert tensors["dense.weight"].dtype.name == "bfloat16"
  assert tensors["dense.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_neither_export_nor_import_holds_a_second_copy(tmp_path):
  tensor, count = 2**20, 16  # of float32: 4 MB each, 64 MB together
  params = {str(i): {"kernel": np.ones((2**10, 2**10), np.float32)} for i in range(count)}
  file = tmp_path / "model.safetensors"
  tracemalloc.start()
  try:
    safetensors_io.save_safetensors(file, weights.to_diffusers(params), "float16")
    _, peak = tracemalloc.get_traced_memory()
    assert peak < 2.5 * 4 * tensor  # the transpose of one and its float16
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    loaded = weights.load_params(file, params)
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < (count + 2.5) * 4 * tensor
  finally:
    tracemalloc.stop()
  assert_same_tree(loaded, params)


def test_files_of_diffusers_are_read(tmp_path):
  judge, shapes = vae_case()
  params = weights.from_diffusers(torch_models.state_dict(judge), shapes)
  folders = {}
  for name, settings in {
    "whole": {},
    "fp16": {"variant": "fp16"},
    "bf16": {"variant": "bf16"},
    "sharded": {"max_shard_size": "100KB"},
    "sharded-fp16": {"max_shard_size": "100KB", "variant": "fp16"},
  }.items():
    folders[name] = tmp_path / name
    judge.save_pretrained(folders[name], **settings)
    assert_same_tree(weights.load_params(folders[name], shapes), params)
  assert len(list(folders["sharded"].glob("*.safetensors"))) > 2
  file = folders["whole"] / "diffusion_pytorch_model.safetensors"
  assert_same_tree(weights.load_params(str(file), shapes), params)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_has_metadata_and_dtype_and_opens_in_diffusers(tmp_path, vae_tensors, dtype):
  tensors, shapes = vae_tensors
  params = weights.from_diffusers(tensors, shapes)
  file = tmp_path / "made" / "diffusion_pytorch_model.safetensors"
  safetensors_io.save_safetensors(file, weights.to_diffusers(params), dtype)
  assert os.listdir(file.parent) == [file.name]  # no temporary file
  assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
  with safetensors.safe_open(file, framework="numpy") as opened:
    assert opened.metadata() == {"format": "pt"}
  loaded = safetensors_io.load_safetensors(file)
  assert {value.dtype.name for value in loaded.values()} == {dtype}
  rounded = {name: value.astype(safetensors_io.DTYPES[dtype]) for name, value in tensors.items()}
  torch_models.assert_same_tensors(dict(loaded), rounded)
  reread = weights.load_params(file, shapes)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(reread)} == {"float32"}

  diffusers.AutoencoderKL(**torch_models.VAE).save_config(file.parent)
  reopened, report = diffusers.AutoencoderKL.from_pretrained(
    file.parent, output_loading_info=True, low_cpu_mem_usage=False
  )
  assert not any(report.values()), report
  assert_same_tree(weights.from_diffusers(torch_models.state_dict(reopened), shapes), reread)


def current_umask():
  umask = os.umask(0)
  os.umask(umask)
  return umask
