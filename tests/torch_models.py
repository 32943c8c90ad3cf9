"""Tiny PyTorch models of diffusers and transformers with random weights: the judges of ours."""

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


def unet(config, seed=0):
  """A diffusers UNet2DConditionModel with random weights."""
  return randomise(diffusers.UNet2DConditionModel(**config), seed)


def vae(config=VAE, seed=0):
  """A diffusers AutoencoderKL with random weights."""
  return randomise(diffusers.AutoencoderKL(**config), seed)


def clip(config=CLIP, seed=0):
  """A transformers CLIPTextModel with random weights."""
  return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)), seed)


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
      parameter.copy_(torch.from_numpy(value))
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
