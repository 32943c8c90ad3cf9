"""A complete base in diffusers' layout, a hundredth of a second to run, with random weights."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import cli, emoji_base, export
from dmpo_jax import config as config_lib
from dmpo_jax.data.emoji_choice import emoji as emoji_lib

DESIGN = {
  "vocab_size": 600,
  "unet": {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
  },
  "vae": {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "scaling_factor": 0.5,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
  },
  "text_encoder": {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "projection_dim": 16,
  },
  "scheduler": {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
  },
}


TEXT_ENCODER_2 = DESIGN["text_encoder"] | {
  "architectures": ["CLIPTextModelWithProjection"],
  "hidden_act": "gelu",
  "hidden_size": 64,
  "num_attention_heads": 1,
  "num_hidden_layers": 2,
  "projection_dim": 20,
}
# What the three other topologies have that Stable Diffusion 1 has not.
KINDS = {
  "sd1": {},
  "sd2": {
    "unet": {"use_linear_projection": True, "attention_head_dim": [1, 2]},
    "text_encoder": {"hidden_act": "gelu"},
    "scheduler": {"prediction_type": "v_prediction"},
  },
  "sdxl": {
    "unet": {
      "use_linear_projection": True,
      "attention_head_dim": [1, 2],
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
      "transformer_layers_per_block": [1, 2],
      "cross_attention_dim": 16 + 64,
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": 4,
      "projection_class_embeddings_input_dim": 20 + 6 * 4,
    },
    "text_encoder": {"num_hidden_layers": 2},
    "model_index": {
      "_class_name": "StableDiffusionXLPipeline",
      "force_zeros_for_empty_prompt": True,
      "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
      "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
  },
  "pix2pix": {
    "unet": {"in_channels": 8},
    "model_index": {"_class_name": "StableDiffusionInstructPix2PixPipeline"},
  },
}


# Widths from which a single file's heads can be told (64 channels a head, 8 heads in SD 1), and the
# published layers and groups, which it does not tell.
WIDE = {
  "unet": {
    "block_out_channels": [64, 64],
    "cross_attention_dim": 64,
    "norm_num_groups": 32,
    "layers_per_block": 2,
  },
  "vae": {"block_out_channels": [32, 32], "norm_num_groups": 32, "layers_per_block": 2},
  "text_encoder": {"hidden_size": 64, "num_attention_heads": 1},
}
WIDE_KINDS = {
  "sd1": {"unet": {"attention_head_dim": 8}},
  "sd2": {"unet": {"attention_head_dim": [1, 1]}},
  "sdxl": {"unet": {"attention_head_dim": [1, 1], "cross_attention_dim": 64 + 64}},
  "pix2pix": {"unet": {"attention_head_dim": 8}},
}


# XLA_FLAGS of processes whose runs are compared with each other's alone. XLA's own passes are those
# of any run; LLVM's, which these leave out, are half of what compiling a step takes.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def make_base(
  folder: pathlib.Path, seed: int = 0, kind: str = "sd1", wide: bool = False
) -> pathlib.Path:
  """Writes the base; every weight is random, none zero, so that errors depend on all of them."""
  design, more = folder / "design", dict(KINDS[kind])
  if wide:
    for part in WIDE:
      own = more.get(part, {}) | WIDE[part] | WIDE_KINDS[kind].get(part, {})
      more[part] = own
  words = [word for each in emoji_lib.load_emoji(160) for word in each.keywords]
  changed = {
    name: part | more.get(name, {}) if isinstance(part, dict) else part
    for name, part in DESIGN.items()
  }
  emoji_base.write_design(changed, design, words)
  if "model_index" in more:
    index = json.loads((design / "model_index.json").read_text()) | more["model_index"]
    if kind == "sdxl":
      for unknown in ("requires_safety_checker", "safety_checker"):
        index.pop(unknown)
    export.write_json(design / "model_index.json", index)
  if kind == "sdxl":
    _write_second_encoder(design)
  base = base_lib.load_base(str(design), initial_seed=seed)
  generator = np.random.default_rng(seed)
  unet = jax.tree.map(
    lambda x: (x + 0.1 * generator.standard_normal(x.shape)).astype(np.float32),
    base.params["unet"],
  )
  base = dataclasses.replace(base, params={**base.params, "unet": unet})
  return export.export_folder(base, folder / "base", trained=base.params, card="tiny")


def _write_second_encoder(design: pathlib.Path) -> None:
  """SDXL's second encoder; its tokenizer pads with "!", token 0, in place of the end token."""
  first = json.loads((design / "text_encoder" / "config.json").read_text())
  vocabulary = {name: first[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
  export.write_json(design / "text_encoder_2" / "config.json", TEXT_ENCODER_2 | vocabulary)
  shutil.copytree(design / "tokenizer", design / "tokenizer_2")
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    path = design / "tokenizer_2" / name
    export.write_json(path, json.loads(path.read_text()) | {"pad_token": "!"})


def sampling(**more) -> config_lib.SamplingConfig:
  """Settings of a sampler."""
  values = {
    "sampler": None,
    "steps": 2,
    "guidance_scale": 2.0,
    "guidance_rescale": 0.0,
    "image_guidance_scale": None,
    "images_per_prompt": 1,
  }
  return config_lib.SamplingConfig(**values | more)


def overrides(base: pathlib.Path, **more) -> list[str]:
  """Command-line overrides of configs/emoji_dmpo.py for a run of seconds."""
  values = {
    "base": base,
    "steps": 4,
    "batch_size": 16,
    "log_every": 1,
    "validate_every": 2,
    "save_every": 2,
    "optim.warmup_steps": 1,
    "sampling.steps": 2,
    "sampling.images_per_prompt": 1,
    **more,
  }
  return [f"--config.{name}={value}" for name, value in values.items()]


def config(base: pathlib.Path, *, path: str = cli.DEFAULT_CONFIG, **more) -> config_lib.Config:
  """The demo's configuration, or another file's, shrunk; `more` names fields with their path."""
  return config_lib.from_dict(cli.read_config(path, overrides(base, **more)))
