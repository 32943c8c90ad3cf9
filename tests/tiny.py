"""A complete base in diffusers' layout, a hundredth of a second to run, with random weights."""

import dataclasses
import pathlib

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


def make_base(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """Writes the base; every weight is random, none zero, so that errors depend on all of them."""
  design = folder / "design"
  words = [word for each in emoji_lib.load_emoji(160) for word in each.keywords]
  emoji_base.write_design(DESIGN, design, words)
  base = base_lib.load_base(str(design), initial_seed=seed)
  generator = np.random.default_rng(seed)
  unet = jax.tree.map(
    lambda x: (x + 0.1 * generator.standard_normal(x.shape)).astype(np.float32),
    base.params["unet"],
  )
  base = dataclasses.replace(base, params={**base.params, "unet": unet})
  return export.export_folder(base, folder / "base", trained=base.params, card="tiny")


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


def config(base: pathlib.Path, **more) -> config_lib.Config:
  """The demo's configuration, shrunk; `more` names fields with their path."""
  return config_lib.from_dict(cli.read_config(cli.DEFAULT_CONFIG, overrides(base, **more)))
