"""LoRA files against diffusers and peft, which are the judge."""

import json
import re
import types

import diffusers
import numpy as np
import pytest
import torch
import torch_models
from diffusers.utils import state_dict_utils

from dmpo_jax import lora_files, safetensors_io

peft = pytest.importorskip("peft")

UNET = torch_models.UNET_SD1
UNET_SDXL = torch_models.UNET_SD1 | {
  "block_out_channels": (32, 64, 64),
  "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
  "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
  "layers_per_block": 2,
  "use_linear_projection": True,
}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
# Dense layers and convolutions of 1x1, 3x3 and stride 2; ranks and alphas of each.
ATTENTION = {
  f"{BLOCK}.attn1.to_q": (2, 2.0),
  f"{BLOCK}.attn2.to_k": (3, 6.0),
  f"{BLOCK}.attn2.to_out.0": (2, 1.0),
  "mid_block.attentions.0.proj_in": (2, 4.0),
}
MODULES = ATTENTION | {
  f"{BLOCK}.ff.net.0.proj": (2, 2.0),
  f"{BLOCK}.ff.net.2": (2, 3.0),
  "up_blocks.1.resnets.1.conv1": (4, 2.0),
  "up_blocks.1.resnets.1.conv_shortcut": (2, 2.0),
  "mid_block.resnets.0.time_emb_proj": (2, 5.0),
  "down_blocks.0.downsamplers.0.conv": (2, 2.0),
  "time_embedding.linear_1": (2, 2.0),
  "conv_in": (1, 0.5),
}


def find_kernels(judge):
  """The judge's kernels in our layout, as `lora.find_kernels` finds them in our parameters."""
  kernels = {}
  for name, value in judge.state_dict().items():
    if name.endswith(".weight") and value.ndim > 1:
      out, width, *space = value.shape
      kernels[name.removesuffix(".weight")] = types.SimpleNamespace(shape=(*space, width, out))
  return kernels


def make_lora(kernels, modules):
  generator = np.random.default_rng(0)
  pairs = {}
  for name, (rank, _) in modules.items():
    *space, width, out = kernels[name].shape
    down = generator.standard_normal((*space, width, rank), np.float32) / 8
    up = generator.standard_normal((*(1 for _ in space), rank, out), np.float32) / 8
    pairs[name] = lora_files.LoraPair(down, up)
  return lora_files.LoraFile(pairs, {name: alpha for name, (_, alpha) in modules.items()})


@pytest.fixture(scope="module")
def judge():
  return torch_models.unet(UNET)


@pytest.fixture(scope="module")
def kernels(judge):
  return find_kernels(judge)


@pytest.fixture(scope="module")
def lora(kernels):
  return make_lora(kernels, MODULES)


def assert_same_lora(got, expected):
  assert got.alphas == expected.alphas
  assert got.modules.keys() == expected.modules.keys()
  for name, pair in expected.modules.items():
    np.testing.assert_array_equal(got.modules[name].down, pair.down, err_msg=name)
    np.testing.assert_array_equal(got.modules[name].up, pair.up, err_msg=name)


def run(unet):
  generator = torch.Generator().manual_seed(0)
  latents = torch.randn(2, 4, 8, 8, generator=generator)
  context = torch.randn(2, 5, UNET["cross_attention_dim"], generator=generator)
  with torch.no_grad():
    return unet(latents, torch.tensor([3, 700]), context).sample.numpy()


def merged(lora):
  """A UNet with alpha / rank * down @ up in its weights, formed here in PyTorch's layout."""
  unet = torch_models.unet(UNET)
  state = unet.state_dict()
  for name, pair in lora.modules.items():
    change = np.einsum("...ir,ro->oi...", pair.down, pair.up.reshape(pair.up.shape[-2:]))
    scaled = lora.alphas[name] / pair.down.shape[-1] * change
    state[f"{name}.weight"] += torch.from_numpy(scaled.astype(np.float32))
  unet.load_state_dict(state)
  return unet


@pytest.fixture
def pipeline():
  return diffusers.StableDiffusionPipeline(
    vae=torch_models.vae(),
    text_encoder=None,
    tokenizer=None,
    unet=torch_models.unet(UNET),
    scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )


@pytest.mark.parametrize("style", lora_files.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_back(tmp_path, kernels, lora, style, dtype):
  file = tmp_path / "lora.safetensors"
  lora_files.write_lora(file, lora, style, dtype)
  stored = safetensors_io.DTYPES[dtype]
  rounded = {
    name: lora_files.LoraPair(*(each.astype(stored).astype(np.float32) for each in pair))
    for name, pair in lora.modules.items()
  }
  assert_same_lora(lora_files.read_lora(file, kernels), lora._replace(modules=rounded))


@pytest.mark.parametrize("style", lora_files.STYLES)
def test_diffusers_opens_it_with_the_effect_of_merged_weights(
  tmp_path, kernels, lora, pipeline, style
):
  plain = run(pipeline.unet)
  if style == "kohya":
    # Of kohya's files diffusers 0.42 reads alphas of attentions only where all are the same: it
    # looks for the others under names that its own modules do not have.
    lora = make_lora(kernels, {name: (rank, 3.0) for name, (rank, _) in MODULES.items()})
  lora_files.write_lora(tmp_path / "pytorch_lora_weights.safetensors", lora, style)
  pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
  got, expected = run(pipeline.unet), run(merged(lora))
  assert np.abs(expected - plain).max() > 1e-2
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_one_rank_and_one_alpha_for_all(tmp_path, kernels, pipeline):
  lora = make_lora(kernels, dict.fromkeys(ATTENTION, (4, 1.0)))
  lora_files.write_lora(tmp_path / "x.safetensors", lora)
  metadata = safetensors_io.read_metadata(tmp_path / "x.safetensors")
  config = json.loads(metadata["lora_adapter_metadata"])
  assert config["unet.alpha_pattern"] == config["unet.rank_pattern"] == {}
  assert (config["unet.r"], config["unet.lora_alpha"]) == (4, 1.0)
  pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
  np.testing.assert_allclose(run(pipeline.unet), run(merged(lora)), rtol=0, atol=1e-4)


def adapted(seed=0):
  unet = torch_models.unet(UNET)
  config = peft.LoraConfig(
    r=2,
    lora_alpha=3,
    target_modules=["to_q", "to_out.0", "conv1"],
    alpha_pattern={"attn2.to_q": 5},
    rank_pattern={"conv1": 3},
  )
  unet.add_adapter(config)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in unet.named_parameters():
      if ".lora_" in name:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
  return unet.eval()


@pytest.mark.parametrize("way", ["pipeline", "adapter"])
def test_files_of_diffusers_are_read(tmp_path, kernels, way):
  unet = adapted()
  if way == "adapter":  # without the prefix "unet."
    unet.save_lora_adapter(tmp_path)
  else:
    diffusers.StableDiffusionPipeline.save_lora_weights(
      tmp_path,
      unet_lora_layers=peft.get_peft_model_state_dict(unet),
      unet_lora_adapter_metadata=unet.peft_config["default"].to_dict()
      | {"target_modules": sorted(unet.peft_config["default"].target_modules)},
    )
  lora = lora_files.read_lora(tmp_path / "pytorch_lora_weights.safetensors", kernels)
  assert set(lora.alphas.values()) == {3.0, 5.0}
  assert {pair.rank for pair in lora.modules.values()} == {2, 3}
  np.testing.assert_allclose(run(merged(lora)), run(unet), rtol=0, atol=1e-4)


def old_names(lora, processor):
  """Attention as diffusers before peft wrote it, by hand."""
  tensors = {}
  for name, pair in lora.modules.items():
    parent, _, projection = name.replace(".to_out.0", ".to_out").rpartition(".")
    if ".attn" not in name:
      stem = f"unet.{name}.lora"
    elif processor:
      stem = f"unet.{parent}.processor.{projection}_lora"
    else:
      stem = f"unet.{name}.lora"
    for half, value in zip(("down", "up"), pair, strict=True):
      tensors[f"{stem}.{half}.weight"] = np.moveaxis(value, (-1, -2), (0, 1))
  return tensors


@pytest.mark.parametrize("processor", [True, False])
def test_older_files_of_diffusers_are_read(tmp_path, kernels, processor):
  lora = make_lora(kernels, ATTENTION)
  tensors = old_names(lora, processor)
  safetensors_io.save_safetensors(tmp_path / "x.safetensors", tensors)
  got = lora_files.read_lora(tmp_path / "x.safetensors", kernels)
  ranks = {name: float(rank) for name, (rank, _) in ATTENTION.items()}
  assert_same_lora(got, lora._replace(alphas=ranks))
  theirs = state_dict_utils.convert_unet_state_dict_to_peft(dict.fromkeys(tensors))
  expected = {f"unet.{name}.lora_{half}.weight" for name in ATTENTION for half in "AB"}
  assert theirs.keys() == expected


SDXL_NAMES = {
  "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
  ),
  "lora_unet_input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
  "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0": (
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
  ),
  "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_0_proj": (
    "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"
  ),
  "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
  "lora_unet_output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
  "lora_unet_output_blocks_7_0_in_layers_2": "up_blocks.2.resnets.1.conv1",
  "lora_unet_middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
}


def test_kohya_files_with_original_names_are_read(tmp_path):
  unet = torch_models.unet(UNET_SDXL)
  kernels = find_kernels(unet)
  lora = make_lora(kernels, dict.fromkeys(SDXL_NAMES.values(), (2, 1.0)))
  tensors = {}
  for stem, module in SDXL_NAMES.items():
    down, up = (np.moveaxis(each, (-1, -2), (0, 1)) for each in lora.modules[module])
    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    tensors[f"{stem}.alpha"] = np.float32(1)
  safetensors_io.save_safetensors(tmp_path / "x.safetensors", tensors, "float32")
  got = lora_files.read_lora(tmp_path / "x.safetensors", kernels)
  assert_same_lora(got, lora)
  theirs, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
    str(tmp_path / "x.safetensors"), unet_config=unet.config
  )
  renamed = state_dict_utils.convert_unet_state_dict_to_peft(theirs)
  expected = {f"unet.{name}.lora_{half}.weight" for name in lora.alphas for half in "AB"}
  assert renamed.keys() == expected
  assert len(alphas) == len(lora.alphas)
  for name, pair in got.modules.items():
    down = np.moveaxis(pair.down, (-1, -2), (0, 1))
    np.testing.assert_array_equal(renamed[f"unet.{name}.lora_A.weight"].numpy(), down)


def test_alpha_defaults(tmp_path, kernels):
  """No metadata and no alpha tensors: the rank. Metadata without lora_alpha: that of peft, 8."""
  lora = make_lora(kernels, ATTENTION)
  for style in lora_files.STYLES:
    lora_files.write_lora(tmp_path / f"{style}.safetensors", lora, style)
    tensors = {
      name: value
      for name, value in safetensors_io.load_safetensors(tmp_path / f"{style}.safetensors").items()
      if not name.endswith(".alpha")
    }
    for metadata, expected in (
      (None, {name: float(rank) for name, (rank, _) in ATTENTION.items()}),
      ('{"unet.r": 2}', dict.fromkeys(ATTENTION, float(peft.LoraConfig().lora_alpha))),
    ):
      more = metadata and {"lora_adapter_metadata": metadata}
      safetensors_io.save_safetensors(tmp_path / "x.safetensors", tensors, metadata=more)
      assert lora_files.read_lora(tmp_path / "x.safetensors", kernels).alphas == expected


def test_everything_wrong_is_named_at_once(tmp_path, kernels, lora):
  file = tmp_path / "lora.safetensors"
  lora_files.write_lora(file, lora)
  tensors = dict(safetensors_io.load_safetensors(file))
  query = f"unet.{BLOCK}.attn1.to_q"
  del tensors[f"{query}.lora_B.weight"]
  out = f"unet.{BLOCK}.attn2.to_out"
  tensors |= {
    f"{out}_lora.down.weight": tensors[f"{out}.0.lora_A.weight"],
    f"unet.{BLOCK}.attn2.to_k.lora_B.weight": np.zeros((32, 4), np.float32),
    "unet.conv_in.lora_A.weight": np.zeros((1, 4), np.float32),
    "unet.conv_in.lora_B.weight": np.zeros((32, 1, 1, 1), np.int8),
    "unet.conv_in.alpha": np.float32(1),
    "unet.nowhere.lora_A.weight": np.zeros((1, 4), np.float32),
    "text_encoder.text_model.x.lora_A.weight": np.zeros((1, 4), np.float32),
    "lora_te1_x.alpha": np.float32(1),
  }
  safetensors_io.save_safetensors(file, tensors)
  with pytest.raises(ValueError) as caught:
    lora_files.read_lora(file, kernels)
  text = str(caught.value)
  assert text.startswith(f"{file}: expected pairs for modules of the UNet, got tensors ")
  assert "2 of a text encoder, which is not implemented: save the UNet's alone (" in text
  assert "lora_te1_x.alpha" in text and "text_encoder.text_model.x.lora_A.weight" in text
  assert "2 that fit no module of the UNet (" in text
  assert "unet.nowhere.lora_A.weight" in text and "unet.conv_in.alpha" in text
  assert f"1 without the rest ({query}.lora_A.weight, no up)" in text
  assert re.search(r"1 for what another gives too \(\S*attn2.to_out\S*\)", text)
  assert "2 of another shape (" in text
  assert "to_k.lora_B.weight has shape (32, 4), expected (32, 3)" in text
  assert "unet.conv_in.lora_A.weight has shape (1, 4), expected (1, 4, 3, 3)" in text
  assert "1 of no floating-point type (unet.conv_in.lora_B.weight is int8)" in text


@pytest.mark.parametrize(
  "metadata, message",
  [
    ("{", "lora_adapter_metadata: expected a JSON object"),
    ("[]", "lora_adapter_metadata: expected a JSON object"),
    ('{"unet.use_rslora": true}', "use_rslora is set, which is not implemented"),
    ('{"unet.use_dora": true}', "use_dora is set, which is not implemented"),
    ('{"unet.lora_alpha": "many"}', "expected numbers as lora_alpha and in alpha_pattern"),
    ('{"unet.alpha_pattern": {"(": 1}}', "expected numbers as lora_alpha and in alpha_pattern"),
  ],
)
def test_other_adapters_are_refused(tmp_path, kernels, metadata, message):
  tensors = {
    "unet.conv_in.lora_A.weight": np.zeros((1, 4, 3, 3), np.float32),
    "unet.conv_in.lora_B.weight": np.zeros((32, 1, 1, 1), np.float32),
  }
  file = tmp_path / "x.safetensors"
  safetensors_io.save_safetensors(file, tensors, metadata={"lora_adapter_metadata": metadata})
  with pytest.raises(ValueError, match=message):
    lora_files.read_lora(file, kernels)


def test_files_that_are_no_lora_are_refused(tmp_path, kernels):
  file = tmp_path / "x.safetensors"
  safetensors_io.save_safetensors(file, {})
  with pytest.raises(ValueError, match="for modules of the UNet, got tensors of none"):
    lora_files.read_lora(file, kernels)
  pickle = tmp_path / "x.bin"
  pickle.write_bytes(b"\x80\x02")
  with pytest.raises(ValueError, match="x.bin is a pickle, which is not read"):
    lora_files.read_lora(pickle, kernels)


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, lora):
  file = tmp_path / "x.safetensors"
  with pytest.raises(ValueError, match="style is 'lycoris'; expected 'peft' or 'kohya'"):
    lora_files.write_lora(file, lora, "lycoris")
  with pytest.raises(ValueError, match="got 12 modules; without the other: conv_in"):
    alphas = {name: alpha for name, alpha in lora.alphas.items() if name != "conv_in"}
    lora_files.write_lora(file, lora._replace(alphas=alphas))
  with pytest.raises(ValueError, match="expected modules and an alpha for each, got 0 modules"):
    lora_files.write_lora(file, lora_files.LoraFile({}, {}))
  odd = lora_files.LoraPair(np.zeros((3, 2)), np.zeros((3, 4)))
  with pytest.raises(ValueError, match=r"conv: down is \(3, 2\) and up is \(3, 4\); expected"):
    lora_files.write_lora(file, lora_files.LoraFile({"conv": odd}, {"conv": 1.0}))
  assert not list(tmp_path.iterdir())
