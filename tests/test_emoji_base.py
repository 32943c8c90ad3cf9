"""The recipe of the shipped base, run for a few steps, and the shipped base itself."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import cli, emoji_base, evaluate, logs
from dmpo_jax import config as config_lib
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import measure

MAX_BYTES = 16 * 2**20
STAGES = ("autoencoder", *emoji_base.DENOISING)


def shrink(raw):
  """The shipped recipe with tiny models and a few steps."""
  small = {**raw, **tiny.DESIGN, "emoji": 20}
  for name in STAGES:
    run = {**raw[name], "steps": 4, "batch_size": 8, "validate_every": 4, "save_every": 2}
    run["optim"] = {**run["optim"], "warmup_steps": 1}
    run["sampling"] |= {"steps": 2, "guidance_scale": 2.0, "images_per_prompt": 1}
    small[name] = run
  # One program serves both of these trainings; it is compiled for 8 devices, most of the minutes.
  denoise, condition = (small[name] for name in emoji_base.DENOISING)
  small["denoise"] = {**denoise, **{name: condition[name] for name in ("data", "optim")}}
  return small


@pytest.mark.slow
def test_the_recipe_makes_a_base_and_goes_on_where_it_was(tmp_path):
  raw = shrink(cli.read_config(cli.BASE_CONFIG, []))
  folder = emoji_base.make_base(raw, tmp_path)
  base = base_lib.load_base(str(folder))
  card = (folder / "README.md").read_text(encoding="utf-8")
  assert "Twemoji" in card and "prompt match" in card and "4 steps for the autoencoder" in card
  # The scaling factor is that of the trained autoencoder: scaled latents have unit deviation.
  assert base.vae.config.scaling_factor != tiny.DESIGN["vae"]["scaling_factor"]
  weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
  again = emoji_base.make_base(raw, tmp_path)
  assert (again / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_hours_are_those_of_the_steps(tmp_path):
  with logs.MetricLog(tmp_path, 0) as log:
    log.write(0, {"validation/loss": 1.0})
    log.write(50, {"train/pairs_per_second": 2.0})
    log.write(150, {"train/pairs_per_second": 1.0})
  # 50 steps of 36 pairs at 2 pairs a second, 100 at 1.
  assert emoji_base.training_hours(tmp_path, 36) == pytest.approx((900 + 3600) / 3600)


@pytest.fixture(scope="module")
def shipped():
  return base_lib.load_base("emoji")


def test_the_shipped_base_is_small_and_attributed(shipped):
  files = [path for path in shipped.folder.rglob("*") if path.is_file()]
  assert sum(path.stat().st_size for path in files) <= MAX_BYTES
  assert "CC-BY 4.0" in (shipped.folder / "README.md").read_text(encoding="utf-8")
  assert shipped.resolution == 32


@pytest.mark.slow
def test_its_autoencoder_reconstructs(shipped):
  real = evaluate.real_images(emoji_lib.load_emoji(160)[:16], shipped.resolution)
  decoded = np.asarray(emoji_base.reconstruct(shipped, jnp.asarray(real)))
  assert np.sqrt(((decoded - real) ** 2).mean()) < 0.03


@pytest.mark.slow
def test_it_draws_what_it_is_asked_for(shipped):
  """A part of the measurement in its README: fewer prompts, so wider bounds."""
  raw = cli.read_config(cli.BASE_CONFIG, [])
  sampling = config_lib.from_dict({**raw["condition"], "base": "emoji"}).sampling
  emoji = emoji_lib.load_emoji(160)
  prompts = tuple(emoji_lib.shared_keywords(emoji))[::8]
  images = evaluate.sample_prompts(
    evaluate.make_sampler(shipped, sampling),
    shipped,
    shipped.params["unet"],
    prompts,
    2,
    seed=0,
    title="sampling",
  )
  real = evaluate.real_images(emoji, shipped.resolution)
  scores = measure.score(images, prompts, emoji, real)
  assert scores.match.mean() > 0.8
  assert scores.rmse.mean() < 0.06
