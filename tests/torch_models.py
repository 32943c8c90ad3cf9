"""PyTorch models of diffusers and transformers with random weights: the judges of ours.

Names with FULL are the config.json files of published checkpoints, every field of them; names with
SMALL have their topology (blocks, layers, depths, heads, conditioning) at a fraction of the width.
"""

import diffusers
import numpy as np
import torch
import transformers

torch.set_num_threads(1)

# SD 1.x in small: 1x1 convolutions around the transformers, one head count for all blocks.
UNET_SD1 = {
  "block_out_channels": (32, 64),
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
  "layers_per_block": 1,
  "attention_head_dim": 4,
  "cross_attention_dim": 32,
  "norm_num_groups": 8,
  "sample_size": 8,
}
# SD 2.x in small: linear projections, head counts per block.
UNET_SD2 = {
  "block_out_channels": (16, 24, 32, 32),
  "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
  "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
  "layers_per_block": 2,
  "attention_head_dim": (1, 2, 4, 4),
  "cross_attention_dim": 24,
  "norm_num_groups": 8,
  "use_linear_projection": True,
  "upcast_attention": True,
  "sample_size": 16,
}
# The remaining fields, each away from its default.
UNET_OTHER = UNET_SD1 | {
  "in_channels": 8,
  "out_channels": 3,
  "down_block_types": ("CrossAttnDownBlock2D",) * 2,
  "up_block_types": ("CrossAttnUpBlock2D",) * 2,
  "norm_eps": 1e-2,
  "flip_sin_to_cos": False,
  "freq_shift": 1,
  "transformer_layers_per_block": (2, 1),
}
VAE = {
  "block_out_channels": (16, 32),
  "down_block_types": ("DownEncoderBlock2D",) * 2,
  "up_block_types": ("UpDecoderBlock2D",) * 2,
  "layers_per_block": 2,
  "latent_channels": 4,
  "norm_num_groups": 8,
  "sample_size": 16,
}
CLIP = {
  "vocab_size": 50,
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 11,
  "bos_token_id": 48,
  "eos_token_id": 49,
}

# stable-diffusion-v1-5/stable-diffusion-v1-5, once runwayml's; v1-4 has the same.
UNET_SD15_FULL = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False,
  "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
  "downsample_padding": 1,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_scale_factor": 1,
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "out_channels": 4,
  "sample_size": 64,
  "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
# stabilityai/stable-diffusion-2-1: 768 pixels, v-prediction.
UNET_SD21_FULL = UNET_SD15_FULL | {
  "_diffusers_version": "0.10.0.dev0",
  "attention_head_dim": [5, 10, 20, 20],
  "cross_attention_dim": 1024,
  "dual_cross_attention": False,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "sample_size": 96,
  "use_linear_projection": True,
  "upcast_attention": True,
}
# timbrooks/instruct-pix2pix: the noise beside the latents of the image to edit.
UNET_IP2P_FULL = UNET_SD15_FULL | {
  "_diffusers_version": "0.12.0.dev0",
  "class_embed_type": None,
  "dual_cross_attention": False,
  "in_channels": 8,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "num_class_embeds": None,
  "only_cross_attention": False,
  "resnet_time_scale_shift": "default",
  "upcast_attention": False,
  "use_linear_projection": False,
}
# stabilityai/stable-diffusion-xl-base-1.0
UNET_SDXL_FULL = {
  "_class_name": "UNet2DConditionModel",
  "_diffusers_version": "0.19.0.dev0",
  "act_fn": "silu",
  "addition_embed_type": "text_time",
  "addition_embed_type_num_heads": 64,
  "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20],
  "block_out_channels": [320, 640, 1280],
  "center_input_sample": False,
  "class_embed_type": None,
  "class_embeddings_concat": False,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
  "cross_attention_dim": 2048,
  "cross_attention_norm": None,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
  "downsample_padding": 1,
  "dual_cross_attention": False,
  "encoder_hid_dim": None,
  "encoder_hid_dim_type": None,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "in_channels": 4,
  "layers_per_block": 2,
  "mid_block_only_cross_attention": None,
  "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "norm_eps": 1e-05,
  "norm_num_groups": 32,
  "num_attention_heads": None,
  "num_class_embeds": None,
  "only_cross_attention": False,
  "out_channels": 4,
  "projection_class_embeddings_input_dim": 2816,
  "resnet_out_scale_factor": 1.0,
  "resnet_skip_time_act": False,
  "resnet_time_scale_shift": "default",
  "sample_size": 128,
  "time_cond_proj_dim": None,
  "time_embedding_act_fn": None,
  "time_embedding_dim": None,
  "time_embedding_type": "positional",
  "timestep_post_act": None,
  "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
  "upcast_attention": None,
  "use_linear_projection": True,
}
UNET_SD15_SMALL = UNET_SD15_FULL | {
  "block_out_channels": [16, 32, 64, 64],
  "cross_attention_dim": 24,
  "norm_num_groups": 8,
  "sample_size": 8,
}
UNET_SD21_SMALL = UNET_SD21_FULL | {
  "block_out_channels": [20, 40, 80, 80],
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
  "sample_size": 8,
}
UNET_IP2P_SMALL = UNET_IP2P_FULL | {
  "block_out_channels": [16, 32, 64, 64],
  "cross_attention_dim": 24,
  "norm_num_groups": 8,
  "sample_size": 8,
}
UNET_SDXL_SMALL = UNET_SDXL_FULL | {
  "addition_time_embed_dim": 6,
  "block_out_channels": [20, 40, 80],
  "cross_attention_dim": 24,
  "norm_num_groups": 4,
  "projection_class_embeddings_input_dim": 10 + 6 * 6,
  "sample_size": 8,
}
# SDXL's conditioning alone: one transformer layer and one resnet per block.
UNET_TEXT_TIME = UNET_SDXL_SMALL | {
  "attention_head_dim": [2, 4],
  "block_out_channels": [8, 16],
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
  "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
  "layers_per_block": 1,
  "transformer_layers_per_block": [1, 1],
}

VAE_SD15_FULL = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.6.0",
  "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": ["DownEncoderBlock2D"] * 4,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "out_channels": 3,
  "sample_size": 512,
  "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_SD21_FULL = VAE_SD15_FULL | {"_diffusers_version": "0.10.0.dev0", "sample_size": 768}
VAE_SDXL_FULL = VAE_SD15_FULL | {
  "_diffusers_version": "0.20.0.dev0",
  "_name_or_path": "../sdxl-vae/",
  "force_upcast": True,
  "sample_size": 1024,
  "scaling_factor": 0.13025,
}
# What diffusers of 2024 adds where it writes an SDXL autoencoder, as fp16-fix and fine-tunes have.
VAE_SDXL_RESAVED_FULL = VAE_SDXL_FULL | {
  "_diffusers_version": "0.31.0",
  "latents_mean": None,
  "latents_std": None,
  "mid_block_add_attention": True,
  "shift_factor": None,
  "use_post_quant_conv": True,
  "use_quant_conv": True,
}

VAE_SDXL_SMALL = VAE_SDXL_FULL | {
  "block_out_channels": [8, 16, 32, 32],
  "norm_num_groups": 4,
  "sample_size": 32,
}

# OpenAI's CLIP ViT-L/14: text encoder of SD 1.5 and InstructPix2Pix, first one of SDXL.
TEXT_L_FULL = {
  "_name_or_path": "openai/clip-vit-large-patch14",
  "architectures": ["CLIPTextModel"],
  "attention_dropout": 0.0,
  "bos_token_id": 0,
  "dropout": 0.0,
  "eos_token_id": 2,
  "hidden_act": "quick_gelu",
  "hidden_size": 768,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 77,
  "model_type": "clip_text_model",
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pad_token_id": 1,
  "projection_dim": 768,
  "torch_dtype": "float32",
  "transformers_version": "4.22.0.dev0",
  "vocab_size": 49408,
}
# OpenCLIP ViT-H/14 without its last layer: SD 2.1.
TEXT_H_FULL = TEXT_L_FULL | {
  "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
  "hidden_act": "gelu",
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_attention_heads": 16,
  "num_hidden_layers": 23,
  "projection_dim": 512,
  "transformers_version": "4.25.0.dev0",
}
# OpenCLIP ViT-bigG/14: second text encoder of SDXL.
TEXT_BIGG_FULL = TEXT_L_FULL | {
  "architectures": ["CLIPTextModelWithProjection"],
  "hidden_act": "gelu",
  "hidden_size": 1280,
  "intermediate_size": 5120,
  "num_attention_heads": 20,
  "num_hidden_layers": 32,
  "projection_dim": 1280,
  "torch_dtype": "float16",
  "transformers_version": "4.32.0.dev0",
}
_SMALL_TEXT = {"vocab_size": 50, "max_position_embeddings": 11, "intermediate_size": 40}
TEXT_L_SMALL = TEXT_L_FULL | _SMALL_TEXT | {"hidden_size": 24}
TEXT_H_SMALL = TEXT_H_FULL | _SMALL_TEXT | {"hidden_size": 32}
TEXT_BIGG_SMALL = TEXT_BIGG_FULL | _SMALL_TEXT | {"hidden_size": 40, "projection_dim": 10}

# The image half of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore and HPSv2 fine-tuned.
VISION_H_FULL = {
  "architectures": ["CLIPVisionModelWithProjection"],
  "attention_dropout": 0.0,
  "dropout": 0.0,
  "hidden_act": "gelu",
  "hidden_size": 1280,
  "image_size": 224,
  "initializer_factor": 1.0,
  "initializer_range": 0.02,
  "intermediate_size": 5120,
  "layer_norm_eps": 1e-05,
  "model_type": "clip_vision_model",
  "num_attention_heads": 16,
  "num_channels": 3,
  "num_hidden_layers": 32,
  "patch_size": 14,
  "projection_dim": 1024,
  "torch_dtype": "float16",
  "transformers_version": "4.28.0.dev0",
}
VISION_SMALL = VISION_H_FULL | {
  "hidden_size": 32,
  "image_size": 23,  # no multiple of the patch
  "intermediate_size": 40,
  "layer_norm_eps": 1e-3,
  "num_hidden_layers": 2,
  "patch_size": 5,
  "projection_dim": 12,
}

# A CLIPModel in small; a caption's length is that of real ones, 77.
CLIP_TEXT_SMALL = {
  "hidden_size": 32,
  "intermediate_size": 48,
  "max_position_embeddings": 77,
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
}
CLIP_VISION_SMALL = {
  "hidden_size": 40,
  "image_size": 28,
  "intermediate_size": 56,
  "num_attention_heads": 2,
  "num_hidden_layers": 3,
  "patch_size": 14,
}


def unet(config, seed=0):
  """A diffusers UNet2DConditionModel with random weights."""
  return randomise(diffusers.UNet2DConditionModel(**public(config)), seed)


def vae(config=VAE, seed=0):
  """A diffusers AutoencoderKL with random weights."""
  return randomise(diffusers.AutoencoderKL(**public(config)), seed)


def clip(config=CLIP, seed=0):
  """A transformers CLIPTextModel, or what `config` says it is, with random weights."""
  return randomise(bare_clip(config), seed)


def bare_clip(config):
  """A CLIPTextModel(WithProjection) or CLIPVisionModelWithProjection as `config` says."""
  name = config.get("architectures", ["CLIPTextModel"])[0]
  kind = transformers.CLIPVisionConfig if "Vision" in name else transformers.CLIPTextConfig
  settings = {key: value for key, value in public(config).items() if key != "torch_dtype"}
  return getattr(transformers, name)(kind(**settings))


class OpenClip(torch.nn.Module):
  """OpenCLIP's CLIP with its own tensor names and layouts, written out in plain PyTorch.

  Source: github.com/mlfoundations/open_clip, src/open_clip/model.py and transformer.py.
  """

  def __init__(self, text, vision, embed_dim):
    super().__init__()
    self.visual = OpenClipVision(vision, embed_dim)
    width, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["heads"]
    self.token_embedding = torch.nn.Embedding(text["vocab_size"], width)
    self.positional_embedding = torch.nn.Parameter(torch.empty(77, width))
    self.transformer = OpenClipTransformer(width, text["intermediate_size"], layers, heads)
    self.ln_final = torch.nn.LayerNorm(width)
    self.text_projection = torch.nn.Parameter(torch.empty(width, embed_dim))
    self.logit_scale = torch.nn.Parameter(torch.empty(()))

  def encode_text(self, ids):
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
    x = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
    return torch.nn.functional.normalize(x @ self.text_projection, dim=-1)

  def encode_image(self, pixels):
    return torch.nn.functional.normalize(self.visual(pixels), dim=-1)


class OpenClipVision(torch.nn.Module):
  """The image half of `OpenClip`."""

  def __init__(self, c, embed_dim):
    super().__init__()
    width, patch = c["hidden_size"], c["patch_size"]
    self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
    self.class_embedding = torch.nn.Parameter(torch.empty(width))
    places = (c["image_size"] // patch) ** 2 + 1
    self.positional_embedding = torch.nn.Parameter(torch.empty(places, width))
    self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
    self.transformer = OpenClipTransformer(
      width, c["intermediate_size"], c["num_hidden_layers"], c["heads"]
    )
    self.proj = torch.nn.Parameter(torch.empty(width, embed_dim))

  def forward(self, pixels):
    x = self.conv1(pixels).flatten(2).transpose(1, 2)
    first = self.class_embedding.expand(len(x), 1, -1)
    x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
    return self.ln_post(self.transformer(x, None)[:, 0]) @ self.proj


class OpenClipTransformer(torch.nn.Module):
  def __init__(self, width, inner, layers, heads):
    super().__init__()
    self.resblocks = torch.nn.ModuleList(OpenClipBlock(width, inner, heads) for _ in range(layers))

  def forward(self, x, mask):
    for block in self.resblocks:
      x = block(x, mask)
    return x


class OpenClipBlock(torch.nn.Module):
  def __init__(self, width, inner, heads):
    super().__init__()
    self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
    self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    self.mlp = torch.nn.Sequential()
    self.mlp.add_module("c_fc", torch.nn.Linear(width, inner))
    self.mlp.add_module("gelu", torch.nn.GELU())
    self.mlp.add_module("c_proj", torch.nn.Linear(inner, width))

  def forward(self, x, mask):
    hidden = self.ln_1(x)
    x = x + self.attn(hidden, hidden, hidden, need_weights=False, attn_mask=mask)[0]
    return x + self.mlp(self.ln_2(x))


def linear_head(width):
  """The head of LAION's aesthetic predictor and of ImageReward, as its source has it."""
  nn = torch.nn
  return nn.Sequential(
    nn.Linear(width, 1024),
    nn.Dropout(0.2),
    nn.Linear(1024, 128),
    nn.Dropout(0.2),
    nn.Linear(128, 64),
    nn.Dropout(0.1),
    nn.Linear(64, 16),
    nn.Linear(16, 1),
  )


class ImageReward(torch.nn.Module):
  """BLIP of transformers and the head of ImageReward: github.com/THUDM/ImageReward."""

  def __init__(self, vision, text):
    super().__init__()
    text = transformers.BlipTextConfig(encoder_hidden_size=vision["hidden_size"], **text)
    text._attn_implementation = "eager"
    self.vision = transformers.BlipVisionModel(
      transformers.BlipVisionConfig(layer_norm_eps=1e-6, **vision)
    )
    self.text = transformers.BlipTextModel(text, add_pooling_layer=False)
    self.mlp = linear_head(text.hidden_size)

  def forward(self, pixels, ids, mask):
    states = self.vision(pixels).last_hidden_state
    texts = self.text(ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state
    return (self.mlp(texts[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072

  def published(self):
    """The state dict under the names that ImageReward.pt has."""
    replacements = (
      ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
      ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
      ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
      ("vision.encoder.layers", "blip.visual_encoder.blocks"),
      ("vision.post_layernorm", "blip.visual_encoder.norm"),
      ("layer_norm", "norm"),
      ("self_attn.projection", "attn.proj"),
      ("self_attn.qkv", "attn.qkv"),
    )
    named = {}
    for name, value in self.state_dict().items():
      name = f"mlp.layers.{name[4:]}" if name.startswith("mlp.") else name
      name = f"blip.text_encoder.{name[5:]}" if name.startswith("text.") else name
      for theirs, ours in replacements:
        name = name.replace(theirs, ours)
      named[name] = value
    width = self.text.config.hidden_size
    named["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    for half, columns in (("vision", self.vision.config.hidden_size), ("text", width)):
      named[f"blip.{half}_proj.weight"] = torch.zeros(256, columns)
      named[f"blip.{half}_proj.bias"] = torch.zeros(256)
    return named


def public(config):
  """Without the fields that only say who wrote the file."""
  return {name: value for name, value in config.items() if not name.startswith("_")}


def randomise(model, seed):
  """Sets every parameter away from its initial value (norms start at 1 and 0, biases at 0)."""
  generator = np.random.default_rng(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      value = generator.standard_normal(tuple(parameter.shape), np.float32)
      if parameter.ndim > 1:
        value *= np.prod(parameter.shape[1:]) ** -0.5
      else:
        value = 0.1 * value + float(name.endswith("weight"))
      parameter.copy_(torch.as_tensor(value))  # logit_scale is a number
  return model.eval()


def shrink(model, factor):
  """Scales what the normalisations see, so that their epsilons count."""
  before_norms = ("conv_in", "conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "time_emb_p")
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if any(part in name for part in before_norms):
        parameter.mul_(factor)
  return model


def state_dict(model):
  """The model's tensors as numpy arrays, under its own names."""
  return {name: value.numpy() for name, value in model.state_dict().items()}


def channels_first(array):
  """NHWC array -> NCHW tensor."""
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def channels_last(tensor):
  """NCHW tensor -> NHWC array."""
  return np.moveaxis(tensor.detach().numpy(), 1, -1)


def assert_same_tensors(got, expected):
  """The same names, shapes, types and values."""
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert got[name].dtype == value.dtype, name
