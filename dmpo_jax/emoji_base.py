"""The recipe of the shipped base: tokenizer, autoencoder, UNet with text encoder, measurement.

Every stage reuses what an earlier call left in the run folder, and each training resumes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import config as config_lib
from dmpo_jax import evaluate, export, logs, tasks, train
from dmpo_jax.data import tokenizer as tokenizer_lib
from dmpo_jax.data.emoji_choice import captions, measure
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.models import vae as vae_lib

MODEL_INDEX = {
  "_class_name": "StableDiffusionPipeline",
  "feature_extractor": [None, None],
  "image_encoder": [None, None],
  "requires_safety_checker": False,
  "safety_checker": [None, None],
  "scheduler": ["diffusers", "DDIMScheduler"],
  "text_encoder": ["transformers", "CLIPTextModel"],
  "tokenizer": ["transformers", "CLIPTokenizer"],
  "unet": ["diffusers", "UNet2DConditionModel"],
  "vae": ["diffusers", "AutoencoderKL"],
}
DENOISING = ("denoise", "condition")  # trainings of UNet and text encoder, in this order
ATTRIBUTION = (
  "Trained on Twemoji artwork, copyright Twitter, Inc. and other contributors, CC-BY 4.0 "
  "(https://creativecommons.org/licenses/by/4.0/), with keywords of emojilib (MIT)."
)


def make_base(raw: Mapping[str, Any], out: pathlib.Path) -> pathlib.Path:
  """Runs the recipe of `configs/emoji_base.py` in the folder `out`; returns the base's folder."""
  runs = {
    name: config_lib.from_dict({**raw[name], "base": str(out / "design")})
    for name in ("autoencoder", *DENOISING)
  }
  emoji = emoji_lib.load_emoji(raw["emoji"])
  design = out / "design"
  if not (design / "model_index.json").exists():
    write_design(raw, design, [word for each in emoji for word in each.keywords])
  base = base_lib.load_base(str(design), initial_seed=raw["seed"])
  images = evaluate.real_images(emoji, base.resolution)

  vae_params = train.train(
    runs["autoencoder"],
    tasks.autoencoder_task(runs["autoencoder"], base, images),
    out / "autoencoder",
  )
  # From here on the parameters are those that ship: rounded to half precision.
  vae_params = jax.tree.map(round_to_half, vae_params)
  moments = np.asarray(jax.jit(base.encode)(vae_params, images))
  base = with_scaling(base, design, vae_params, moments)

  source = captions.CaptionedEmoji(emoji, moments, base.tokenizer)
  for name in DENOISING:
    trained = train.train(runs[name], tasks.denoising_task(runs[name], base, source), out / name)
    trained = jax.tree.map(round_to_half, trained)
    base = dataclasses.replace(base, params={**trained, "vae": vae_params})

  quality = measure_base(base, emoji, runs["condition"])
  hours = sum(training_hours(out / name, run.batch_size) for name, run in runs.items())
  card = base_card(raw, quality, hours)
  return export.export_folder(
    base, out / "base", trained=base.params, dtype="float16", card=card, replace=True
  )


def write_design(raw: Mapping[str, Any], folder: pathlib.Path, words: list[str]) -> None:
  """Everything of a base folder but its weights; `model_index.json` comes last."""
  vocabulary = sorted(set(words))
  tokenizer_lib.train_tokenizer(vocabulary, raw["vocab_size"], folder / "tokenizer")
  tokenizer = tokenizer_lib.load_tokenizer(folder / "tokenizer")
  end = int(tokenizer([""])[0, -1])
  text_encoder = {
    **raw["text_encoder"],
    "vocab_size": tokenizer.vocab_size,
    "bos_token_id": end - 1,
    "eos_token_id": end,
    "pad_token_id": end,
  }
  files = {
    "unet/config.json": raw["unet"],
    "vae/config.json": raw["vae"],
    "text_encoder/config.json": text_encoder,
    "scheduler/scheduler_config.json": raw["scheduler"],
    "model_index.json": MODEL_INDEX,
  }
  for name, content in files.items():
    export.write_json(folder / name, content)


def round_to_half(leaf: Any) -> np.ndarray:
  """float32 values that float16 holds exactly."""
  return np.asarray(leaf).astype(np.float16).astype(np.float32)


def with_scaling(
  base: base_lib.Base, folder: pathlib.Path, vae_params, moments: np.ndarray
) -> base_lib.Base:
  """Sets scaling_factor = 1 / std of the latents (Rombach et al., appendix G), also on disk."""
  mean, logvar = (np.asarray(each) for each in vae_lib.split_moments(jnp.asarray(moments)))
  deviation = float(np.sqrt(mean.var() + np.exp(logvar).mean()))
  config = dataclasses.replace(base.vae.config, scaling_factor=round(1 / deviation, 5))
  raw = base_lib.read_json(folder / "vae" / "config.json")
  export.write_json(
    folder / "vae" / "config.json", {**raw, "scaling_factor": config.scaling_factor}
  )
  return dataclasses.replace(
    base,
    models={**base.models, "vae": vae_lib.AutoencoderKL(config, base.vae.dtype)},
    params={**base.params, "vae": vae_params},
  )


def measure_base(
  base: base_lib.Base, emoji: tuple[emoji_lib.Emoji, ...], config: config_lib.Config
) -> dict[str, Any]:
  """Prompt match and RMSE over samples of all shared keywords, and the autoencoder's own RMSE."""
  prompts = tuple(emoji_lib.shared_keywords(emoji))
  real = evaluate.real_images(emoji, base.resolution)
  images = evaluate.sample_prompts(
    evaluate.make_sampler(base, config.sampling),
    base,
    base.params["unet"],
    prompts,
    config.sampling.images_per_prompt,
    seed=config.seed,
    title="sampling the base",
  )
  summary = evaluate.summarise(measure.score(images, prompts, emoji, real))
  reconstructed = np.asarray(jax.jit(functools.partial(reconstruct, base))(jnp.asarray(real)))
  return {
    "samples": int(np.prod(images.shape[:2])),
    "prompts": len(prompts),
    "reconstruction_rmse": float(np.sqrt(((reconstructed - real) ** 2).mean((1, 2, 3))).mean()),
    **{name: interval._asdict() for name, interval in summary.items()},
  }


def reconstruct(base: base_lib.Base, images):
  """Encodes to the posterior mean and decodes."""
  mean, _ = vae_lib.split_moments(base.encode(base.params["vae"], images))
  return base.decode(base.params["vae"], mean * base.vae.config.scaling_factor)


def training_hours(run: pathlib.Path, batch_size: int) -> float:
  """Hours that a run's steps took by its own metrics; pauses between resumptions do not count."""
  seconds, done = 0.0, 0
  for record in logs.read(run):
    if "train/pairs_per_second" in record:
      seconds += (record["step"] - done) * batch_size / record["train/pairs_per_second"]
      done = record["step"]
  return seconds / 3600


def base_card(raw: Mapping[str, Any], quality: Mapping[str, Any], hours: float) -> str:
  """README.md of the base: what it is, how it was made, how good it is."""
  sampling = raw["condition"]["sampling"]
  hardware = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} cores)"
  return f"""---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A miniature Stable Diffusion that draws emoji

32x32 pixels; CLIP-format tokenizer and text encoder, KL autoencoder, UNet: the architecture of
Stable Diffusion at a hundredth of its width, trained from scratch by dmpo_jax on the
{raw["emoji"]} most used emoji and their keywords.

Recipe: `dmpo base --config configs/emoji_base.py`, seed {raw["seed"]},
{raw["autoencoder"]["steps"]} steps for the autoencoder, {raw["denoise"]["steps"]} for UNet and
text encoder, {raw["condition"]["steps"]} more for both at noisy timesteps;
{hours:.1f} hours of training on {hardware}.

Measured over {quality["samples"]} samples ({quality["prompts"]} prompts, every keyword that 2 to 24
of the emoji share; DDIM, {sampling["steps"]} steps, guidance {sampling["guidance_scale"]}),
mean with 95 % bootstrap interval over prompts:

| quantity | value |
|---|---|
| prompt match | {_interval(quality["prompt_match"])} |
| RMSE to the nearest real image, pixels in [-1, 1] | {_interval(quality["rmse"])} |
| use rank (0.5 would be chance) | {_interval(quality["use_rank"])} |
| RMSE of the autoencoder alone | {quality["reconstruction_rmse"]:.4f} |

{ATTRIBUTION}
"""


def _interval(value: Mapping[str, float]) -> str:
  return f"{value['mean']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
