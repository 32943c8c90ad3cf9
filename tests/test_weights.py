"""Names, layouts and files against diffusers and transformers themselves."""

import json
import os
import re

import diffusers
import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
import torch_models
import transformers

from dmpo_jax import weights
from dmpo_jax.models import clip, init, unet, vae

# The network fields of unet/config.json of Stable Diffusion 1.5.
SD15_UNET = {
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": (320, 640, 1280, 1280),
  "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
  "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
  "layers_per_block": 2,
  "attention_head_dim": 8,
  "cross_attention_dim": 768,
  "sample_size": 64,
}


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


def assert_same_tensors(got, expected):
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)


def assert_same_tree(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


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
  assert_same_tensors(exported, tensors)
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
  }
  tensors = weights.to_diffusers(params)
  assert tensors.keys() == {
    "conv.weight",
    "blocks.0.dense.weight",
    "blocks.0.dense.bias",
    "norm.weight",
    "table.weight",
  }
  assert tensors["conv.weight"].tolist() == [
    [[[0, 6]], [[2, 8]], [[4, 10]]],
    [[[1, 7]], [[3, 9]], [[5, 11]]],
  ]
  assert tensors["blocks.0.dense.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
  assert tensors["table.weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
  with pytest.raises(ValueError, match="'lora.down': expected a leaf kernel, scale, embedding"):
    weights.to_diffusers({"lora": {"down": np.zeros(2)}})


def test_params_do_not_share_memory_with_what_they_were_read_from():
  bias = np.zeros(2, np.float32)
  params = weights.from_diffusers({"norm.bias": bias}, {"norm": {"bias": bias}})
  bias += 1
  assert params["norm"]["bias"].tolist() == [0, 0]


def test_full_size_sd15_unet_has_diffusers_tensors():
  shapes = unet_shapes(SD15_UNET)
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 859_520_964
  with torch.device("meta"):
    judge = diffusers.UNet2DConditionModel(**SD15_UNET)
  expected = {name: tuple(value.shape) for name, value in judge.state_dict().items()}
  assert len(expected) == 686
  # Written out here once more: arrays to convert would take 3.4 GB.
  layouts = {("kernel", 4): (3, 2, 0, 1), ("kernel", 2): (1, 0)}
  got = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    *modules, kind = (entry.key for entry in path)
    axes = layouts.get((kind, leaf.ndim), range(leaf.ndim))
    name = ".".join((*modules, "bias" if kind == "bias" else "weight"))
    got[name] = tuple(leaf.shape[axis] for axis in axes)
  assert got == expected


def test_names_of_both_transformers_versions_are_read(tmp_path):
  judge, shapes = clip_case()
  bare = torch_models.state_dict(judge)
  assert "final_layer_norm.weight" in bare  # transformers 5
  params = weights.from_diffusers(bare, shapes)
  exported = weights.to_diffusers(params)
  assert exported.keys() == {"text_model." + name for name in bare}  # transformers 4
  positions = {"text_model.embeddings.position_ids": np.arange(11)[None]}
  assert_same_tree(weights.from_diffusers(exported | positions, shapes), params)
  bare_positions = {"embeddings.position_ids": np.arange(11)[None]}
  assert_same_tree(weights.from_diffusers(bare | bare_positions, shapes), params)

  judge.config.save_pretrained(tmp_path)
  weights.save_safetensors(tmp_path / "model.safetensors", exported)
  reopened, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
  assert not any(report.values()), report
  assert_same_tensors(torch_models.state_dict(reopened), bare)


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
  assert str(caught.value).startswith(
    f"vae/x.safetensors: expected the {len(tensors)} tensors of the model, got {len(tensors)}: "
    "1 missing (decoder.conv_in.weight), 1 unexpected (lora.down); "
  )


def test_a_long_list_of_names_is_cut(vae_tensors):
  _, shapes = vae_tensors
  with pytest.raises(ValueError, match=r"\d+ missing \(([\w.]+, ){5}and \d+ more\)"):
    weights.from_diffusers({}, shapes)


def test_wrong_shapes_are_named(vae_tensors):
  tensors, shapes = vae_tensors
  changed = tensors | {
    "encoder.conv_in.weight": np.zeros((16, 4, 3, 3), np.float32),
    # A 1x1 convolution for a dense layer is read under the old names only.
    "encoder.mid_block.attentions.0.to_q.weight": np.zeros((32, 32, 1, 1), np.float32),
  }
  with pytest.raises(ValueError) as caught:
    weights.from_diffusers(changed, shapes, where="x")
  text = str(caught.value)
  assert "x: tensor " in text
  assert "'encoder.conv_in.weight' has shape (16, 4, 3, 3), expected (16, 3, 3, 3)" in text
  assert "to_q.weight' has shape (32, 32, 1, 1), expected (32, 32)" in text


def test_a_tensor_under_two_names_is_refused(vae_tensors):
  tensors, shapes = vae_tensors
  attention = "encoder.mid_block.attentions.0"
  both = tensors | {f"{attention}.query.bias": np.zeros(32, np.float32)}
  with pytest.raises(ValueError, match="to_q.bias' and '.*query.bias' are the same parameter"):
    weights.from_diffusers(both, shapes)


def test_quantised_tensors_are_refused(vae_tensors):
  tensors, shapes = vae_tensors
  changed = tensors | {"quant_conv.bias": np.zeros(8, np.int8)}
  with pytest.raises(ValueError, match="'quant_conv.bias' is int8; expected float64 or float32"):
    weights.from_diffusers(changed, shapes)


def test_files_of_diffusers_are_read(tmp_path):
  judge, shapes = vae_case()
  params = weights.from_diffusers(torch_models.state_dict(judge), shapes)
  folders = {}
  for name, settings in {
    "whole": {},
    "fp16": {"variant": "fp16"},
    "sharded": {"max_shard_size": "100KB"},
    "sharded-fp16": {"max_shard_size": "100KB", "variant": "fp16"},
  }.items():
    folders[name] = tmp_path / name
    judge.save_pretrained(folders[name], **settings)
    assert_same_tree(weights.load_params(folders[name], shapes), params)
  assert len(list(folders["sharded"].glob("*.safetensors"))) > 2
  file = folders["whole"] / "diffusion_pytorch_model.safetensors"
  assert_same_tree(weights.load_params(str(file), shapes), params)


def test_full_precision_comes_before_fp16(tmp_path):
  for name, value in (("model.fp16", 1), ("model", 2), ("diffusion_pytorch_model.fp16", 3)):
    tensors = {"x": np.full(1, value, np.float32)}
    weights.save_safetensors(tmp_path / f"{name}.safetensors", tensors)
  assert weights.load_safetensors(tmp_path)["x"] == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_has_metadata_and_dtype_and_opens_in_diffusers(tmp_path, vae_tensors, dtype):
  tensors, shapes = vae_tensors
  params = weights.from_diffusers(tensors, shapes)
  file = tmp_path / "made" / "diffusion_pytorch_model.safetensors"
  weights.save_safetensors(file, weights.to_diffusers(params), dtype)
  assert os.listdir(file.parent) == [file.name]  # no temporary file
  assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
  with safetensors.safe_open(file, framework="numpy") as opened:
    assert opened.metadata() == {"format": "pt"}
  loaded = weights.load_safetensors(file)
  assert {value.dtype.name for value in loaded.values()} == {dtype}
  rounded = {name: value.astype(weights.DTYPES[dtype]) for name, value in tensors.items()}
  assert_same_tensors(dict(loaded), rounded)
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


def test_a_save_replaces_the_file_and_does_not_write_into_it(tmp_path):
  file = tmp_path / "model.safetensors"
  weights.save_safetensors(file, {"x": np.zeros(2)})
  opened = weights.load_safetensors(file)
  weights.save_safetensors(file, {"x": np.ones(2)})
  assert opened["x"].tolist() == [0, 0]
  assert weights.load_safetensors(file)["x"].tolist() == [1, 1]


def test_a_failed_save_leaves_nothing_behind(tmp_path):
  folder = tmp_path / "model.safetensors"
  (folder / "inside").mkdir(parents=True)
  with pytest.raises(IsADirectoryError):
    weights.save_safetensors(folder, {"x": np.zeros(2)})
  assert os.listdir(tmp_path) == [folder.name]


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path):
  file = tmp_path / "model.safetensors"
  with pytest.raises(ValueError, match="tensor 'x' is not finite in float16 .*magnitude 7e.04"):
    weights.save_safetensors(file, {"x": np.array([1.0, 7e4], np.float32)}, "float16")
  with pytest.raises(ValueError, match="tensor 'x' is not finite in float32"):
    weights.save_safetensors(file, {"x": np.array([np.nan], np.float32)})
  with pytest.raises(ValueError, match="dtype is 'int8'; expected 'float32' or 'float16' or"):
    weights.save_safetensors(file, {"x": np.zeros(1)}, "int8")
  assert not os.listdir(tmp_path)
  weights.save_safetensors(file, {"x": np.array([7e4], np.float32)}, "bfloat16")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path, kept):
  file = tmp_path / "model.safetensors"
  weights.save_safetensors(file, {"x": np.zeros(100)})
  file.write_bytes(file.read_bytes()[:kept])
  message = rf"{re.escape(str(file))}: expected a whole safetensors file, got \d+ bytes"
  with pytest.raises(ValueError, match=message):
    weights.load_safetensors(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167540\n")
  with pytest.raises(ValueError, match="model.safetensors: .* with git-lfs if you use git"):
    weights.load_safetensors(file)


def test_missing_files_are_named_with_what_was_looked_for(tmp_path):
  with pytest.raises(ValueError) as caught:
    weights.load_safetensors(tmp_path)
  assert str(caught.value).startswith(
    f"{tmp_path}: no weights; looked for diffusion_pytorch_model.safetensors, model.safetensors, "
  )
  assert "model.fp16.safetensors" in str(caught.value)
  with pytest.raises(ValueError, match="absent: no such folder or file; .* download it first"):
    weights.load_safetensors(tmp_path / "absent")
  (tmp_path / "model_index.json").write_text("{}")
  with pytest.raises(ValueError, match="this is a whole pipeline: name a component's folder"):
    weights.load_safetensors(tmp_path)


def test_pickles_are_refused(tmp_path):
  file = tmp_path / "diffusion_pytorch_model.bin"
  file.write_bytes(b"\x80\x02")
  message = "diffusion_pytorch_model.bin is a pickle, which is not read .*safe_serialization=True"
  with pytest.raises(ValueError, match=f"no weights; looked for .*; {message}"):
    weights.load_safetensors(tmp_path)
  with pytest.raises(ValueError, match=f"expected a .safetensors file; {message}"):
    weights.load_safetensors(file)


def test_a_damaged_index_or_missing_shard_is_named(tmp_path):
  index = tmp_path / "model.safetensors.index.json"
  index.write_text("{")
  with pytest.raises(ValueError, match="index.json: expected JSON with a 'weight_map'"):
    weights.load_safetensors(tmp_path)
  index.write_text(json.dumps({"metadata": {}}))
  with pytest.raises(ValueError, match="index.json: expected JSON with a 'weight_map'"):
    weights.load_safetensors(tmp_path)
  shards = {"x": "a-1.safetensors", "y": "a-2.safetensors"}
  index.write_text(json.dumps({"weight_map": shards}))
  weights.save_safetensors(tmp_path / "a-1.safetensors", {"x": np.zeros(1)})
  message = "1 of its 2 shards are not in the folder: a-2.safetensors; download them"
  with pytest.raises(ValueError, match=message):
    weights.load_safetensors(tmp_path)
  weights.save_safetensors(tmp_path / "a-2.safetensors", {"y": np.ones(1)})
  loaded = weights.load_safetensors(tmp_path)
  assert len(loaded) == 2 and loaded["y"] == 1
