"""The stages of `dmpo demo`, each also a command: prepare, train, evaluate, export, report.

A stage writes files and returns what the next one needs. `dmpo demo` skips a stage whose inputs
are those of the last time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import pathlib
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

import dmpo_jax
from dmpo_jax import base as base_lib
from dmpo_jax import (
  checkpoint,
  evaluate,
  export,
  logs,
  lora,
  lora_files,
  plan,
  profiling,
  reference_cache,
  report,
  sharding,
  tasks,
  train,
)
from dmpo_jax import config as config_lib
from dmpo_jax.data import (
  beam_encode,
  encode,
  encode_shard,
  geometry,
  images,
  mixture,
  rows,
  tfds_source,
)
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import emoji_choice_dataset_builder as emoji_choice
from dmpo_jax.data.emoji_choice import measure
from dmpo_jax.data.emoji_choice import pairs as pairs_lib
from dmpo_jax.data.sources import registry

# Pixels that the VAE encodes at once on one device: 8 pictures of 512 x 512. Only multiples of 8
# are taken, else one picture. The TPU compiler asks for 3.5 GiB of temporaries for 8 of 512 x 512,
# 1.5 GiB for one of 1024 x 1024, of the 15.75 of a v5e chip (float32, Stable Diffusion's VAE), and
# sets them at 7.7 and 51 ms each; 2 or 4 do not fill its tiles of 8: each takes as long as two.
PIXELS_PER_DEVICE = 2**21
PICTURES_PER_TILE = 8
PICTURES_PER_DEVICE = 64  # of small ones: more would only delay the first pairs of a shard
EMOJI = "emoji_choice/"
REPORT_PROMPTS = 8  # shown in the report's grids
EVALUATION_SEED = 1  # of the sampling noise; not the seed of the base's own measurement
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "grain", "numpy")
DATA_CARD = (
  "`{dataset}`: pairs of Twemoji drawings for one keyword, the more used one preferred. The "
  "preference is revealed choice, how often people sent a symbol in tweets (Emoji Sentiment "
  "Ranking 1.0), not a rating of a drawing. {train} pairs for training; couples of the validation "
  "and test splits occur in no training pair, under any prompt."
)
ATTRIBUTION = (
  "Drawings: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0 "
  "(https://creativecommons.org/licenses/by/4.0/). Keywords: emojilib, MIT. Choices: Emoji "
  "Sentiment Ranking 1.0 (Kralj Novak, Smailovic, Sluban, Mozetic, PLoS ONE 2015), CC BY-SA 4.0."
)


def versions() -> dict[str, str]:
  """Versions of Python and of the packages that numbers may depend on."""
  found = {"python": platform.python_version(), "dmpo_jax": dmpo_jax.__version__}
  return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def check_settings(config: config_lib.Config) -> None:
  """Refuses what would fail later: an unknown data set, a hyper-parameter out of its range.

  Raises:
    ValueError: names the field.
  """
  if config.data.mixture is None:
    check_dataset(config.data)
  else:
    mixture.parse_mixture(config.data.mixture)
  tasks.check_objective(config.objective)


def prepare(
  config: config_lib.Config,
  base: base_lib.Base,
  data_dir: pathlib.Path,
  beam: str | None = None,
) -> encode.Encoded:
  """Encodes the pairs with the base's VAE and tokenizer, goes on where it was, or reuses them.

  The emoji are built as a TFDS data set first; other sources are read where they lie. All devices
  of this machine share the work.

  Args:
    beam: options of an Apache Beam pipeline whose workers encode, see `beam_encode`; None: this
      process does.

  Raises:
    ValueError: an unknown data set, nothing of it where it should lie, too many broken rows,
      `data_dir` holds latents of another base or source or is no path, a worker failed, or this is
      one of several processes.
  """
  _check_place(data_dir)
  source = open_source(config, data_dir)
  folder = latents_folder(config, data_dir)
  fingerprint = base.data_fingerprint(config.data.prompt_embeds)
  if beam is not None:
    return beam_encode.encode_source(
      source,
      folder.absolute(),  # workers stand elsewhere
      make_recipe=WorkerRecipe(config, fingerprint),
      fingerprint=fingerprint,
      broken_limit=config.data.broken_limit,
      options=beam,
    )
  with logs.progress(_count_shards(source), 0, "encoding shards") as bar:
    started = time.monotonic()

    def progress(pairs, shards, _):
      bar.update(shards - bar.n)
      bar.set_postfix_str(f"{pairs} pairs, {pairs / (time.monotonic() - started):.0f} a second")

    return encode.encode_source(
      source,
      folder,
      **make_recipe(config, base)._asdict(),
      fingerprint=fingerprint,
      broken_limit=config.data.broken_limit,
      progress=progress,
    )


def _check_place(data_dir: pathlib.Path) -> None:
  if re.match(r"[a-z0-9]+:/", str(data_dir)):
    raise ValueError(
      f"--data: expected a path, got the address {data_dir}; mount the bucket (Cloud Storage FUSE) "
      "and give the folder where it is mounted"
    )
  if jax.process_count() > 1:
    raise ValueError(
      f"prepare: expected one process, got {jax.process_count()}, which would write the same files;"
      " run it once, on one machine or with --beam, before training starts on all"
    )


def make_recipe(config: config_lib.Config, base: base_lib.Base) -> encode_shard.Recipe:
  """How this process, with all of its devices, encodes the configuration's pairs."""
  return encode_shard.Recipe(
    encode_images=encoder(base),
    tokenize=base.tokenizer,
    geometry=geometry.Geometry(
      base.resolution,
      crop=config.data.crop,
      flip=config.data.flip,
      independent=config.data.independent,
      seed=config.seed,
      resize=config.data.resize,
    ),
    time_ids=len(base.encoders) > 1,
    batch_size=encode_batch(base.resolution, jax.local_device_count()),
    embed=embedder(base) if config.data.prompt_embeds else None,
  )


@dataclasses.dataclass(frozen=True)
class WorkerRecipe:
  """`make_recipe` in another process, which reads the base anew.

  Attributes:
    fingerprint: of the base that is expected there.

  Raises:
    ValueError: when called: the worker's base is another, or is not to be found.
  """

  config: config_lib.Config
  fingerprint: str

  def __call__(self) -> encode_shard.Recipe:
    base = base_lib.load_base(self.config.base, parts=("vae",))
    found = base.data_fingerprint(self.config.data.prompt_embeds)
    if found != self.fingerprint:
      raise ValueError(
        f"base {self.config.base!r}: this worker has another than the process that started it "
        f"(fingerprint {found}, expected {self.fingerprint}); give a folder that all of them see"
      )
    return make_recipe(self.config, base)


def encode_batch(resolution: int, devices: int) -> int:
  """Pictures that the VAE encodes at once on `devices` devices; a multiple of them.

  Args:
    resolution: pixels on a side.

  >>> [encode_batch(pixels, 1) for pixels in (32, 256, 512, 768, 1024)]
  [64, 32, 8, 1, 1]
  >>> encode_batch(512, 3)
  24
  """
  tiles = PIXELS_PER_DEVICE // resolution**2 // PICTURES_PER_TILE
  return devices * max(1, min(PICTURES_PER_DEVICE, tiles * PICTURES_PER_TILE))


def encoder(base: base_lib.Base) -> encode_shard.EncodeImages:
  """Pictures [n, H, W, 3] -> moments, n a multiple of this process's devices, which share them."""
  mesh = sharding.make_mesh(devices=jax.local_devices())
  batches = sharding.batch_sharding(mesh)
  params = sharding.put_tree(base.part_params("vae"), sharding.replicated(mesh))
  encode_fn = jax.jit(base.encode, in_shardings=(None, batches), out_shardings=batches)
  return lambda batch: np.asarray(encode_fn(params, sharding.put_batch(batch, mesh)))


def embedder(base: base_lib.Base) -> encode_shard.Embed:
  """Ids of at most `CAPTION_BATCH` captions -> embeddings; this process's devices share the work.

  The text encoders compute in float32, whatever training computes in: what is stored serves both.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices())
  batches = sharding.batch_sharding(mesh)
  exact = {name: base.models[name].clone(dtype=jnp.float32) for name in base.encoders}
  base = dataclasses.replace(base, models=base.models | exact)
  params = {name: base.part_params(name) for name in base.encoders}
  params = jax.device_put(params, sharding.replicated(mesh))
  size = -(-encode_shard.CAPTION_BATCH // mesh.size) * mesh.size

  @functools.partial(jax.jit, in_shardings=(None, batches), out_shardings=batches)
  def embed(params, ids):
    conditions = base.embed(params, ids)
    fields = {"prompt_embeds": conditions.prompt_embeds}
    if conditions.added is not None:
      fields["text_embeds"] = conditions.added.text_embeds
    return fields

  def run(ids):
    batch = np.resize(ids, (size, *ids.shape[1:]))  # repeats to fill
    fields = embed(params, sharding.put_batch(batch, mesh))
    return {name: np.asarray(value)[: len(ids)] for name, value in fields.items()}

  return run


def open_source(config: config_lib.Config, data_dir: pathlib.Path) -> rows.Source:
  """The pairs of the configuration's data set.

  Raises:
    ValueError: an unknown data set, or nothing of it where it should lie.
  """
  if config.data.mixture is not None:
    raise ValueError("data.mixture: is of sets that are prepared; prepare each of them by itself")
  check_dataset(config.data)
  if not config.data.dataset.startswith(EMOJI):
    return registry.open_source(
      config.data.dataset, config.data.path, validation_share=config.data.validation_share
    )
  tfds.disable_progress_bar()
  builder = emoji_choice.Builder(
    data_dir=data_dir / "tfds", config=config.data.dataset.removeprefix(EMOJI)
  )
  with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads; there are none
    builder.download_and_prepare()
  return tfds_source.source_of_builder(builder)


def check_dataset(config: config_lib.DataConfig) -> None:
  """Raises ValueError if nothing is known of the data set, or it needs a path and has none."""
  if config.dataset not in registry.SOURCES:
    raise ValueError(
      f"data.dataset: expected one of {', '.join(registry.SOURCES)}, got {config.dataset!r}"
    )
  packaged = registry.SOURCES[config.dataset].path is None
  if (config.path is None) != packaged:
    expected = "None: it comes with installed packages" if packaged else "the folder where it lies"
    raise ValueError(f"data.path: expected {expected}, for {config.dataset}, got {config.path!r}")


def _count_shards(source: rows.Source) -> int:
  return sum(len(shards) for shards in source.splits.values())


def latents_folder(config: config_lib.Config, data_dir: pathlib.Path) -> pathlib.Path:
  return data_dir / "latents" / config.data.dataset.replace("/", "-")


def open_data(
  config: config_lib.Config, base: base_lib.Base, data_dir: pathlib.Path
) -> encode.Encoded:
  """The encoded pairs that `prepare` left in `data_dir`, or the mixture of several such sets.

  With `data.reference_draws`, those draws of each pair and what the reference makes of them.
  """
  fingerprint = base.data_fingerprint(config.data.prompt_embeds)
  if config.data.mixture is not None:
    encoded = mixture.open_mixture(
      config.data.mixture, data_dir / "latents", fingerprint=fingerprint
    )
  else:
    encoded = encode.open_encoded(latents_folder(config, data_dir), fingerprint=fingerprint)
  if config.data.reference_draws:
    splits = reference_cache.load(config, base, encoded, latents_folder(config, data_dir))
    encoded = dataclasses.replace(encoded, splits={**encoded.splits, **splits})
  return encoded


def cache_reference(
  config: config_lib.Config,
  base: base_lib.Base,
  data_dir: pathlib.Path,
  devices: Sequence[jax.Device] | None = None,
) -> pathlib.Path:
  """The reference's errors for the encoded pairs that `prepare` left in `data_dir`.

  Args:
    devices: see `reference_cache.build`.
  """
  without = dataclasses.replace(config, data=dataclasses.replace(config.data, reference_draws=0))
  encoded = open_data(without, base, data_dir)
  return reference_cache.build(config, base, encoded, latents_folder(config, data_dir), devices)


def train_policy(
  config: config_lib.Config,
  base: base_lib.Base,
  encoded: encode.Encoded,
  out: pathlib.Path,
  profile: profiling.Steps | None = None,
) -> None:
  """Preference optimisation in the run folder `out`; goes on where an earlier call ended.

  Args:
    profile: steps to write a trace of.
  """
  task = tasks.preference_task(config, base, encoded)
  task = task._replace(flops=functools.partial(plan.minimum_flops, config, base))
  train.train(config, task, out, profile=profile)


def evaluate_policy(
  config: config_lib.Config,
  base: base_lib.Base,
  run: pathlib.Path,
  out: pathlib.Path,
  *,
  split: str,
) -> dict[str, Any]:
  """Compares the trained policy with its reference; writes `evaluation.json` and the images.

  The prompts are those of the held-out couples. A comparison (same prompt, same noise) says
  something about held-out couples if the two models drew the two emoji of one, or if one of them
  alone drew something that shows the prompt; see `measure.decided_on`.

  Args:
    split: whose couples are held out: test, or validation while settings are chosen.

  Returns:
    What was written: intervals over prompts, for both models and for the comparison.
  """
  policy = load_policy(base, run)
  emoji = emoji_of(config)
  pairs = pairs_lib.split_pairs(pairs_lib.form_pairs(emoji))
  prompts = sorted({pair.caption for pair in pairs[split]})
  comparison = evaluate.compare_emoji(
    base, policy, prompts, emoji, config.sampling, seed=EVALUATION_SEED
  )
  scores = {"reference": comparison.reference, "policy": comparison.policy}
  wins = measure.compare(comparison.policy, comparison.reference)
  decided = {
    name: measure.decided_on(comparison.policy, comparison.reference, emoji, pairs[name])
    for name in ("train", split)
  }
  result = {
    "split": split,
    "heldout_win_rate": evaluate.bootstrap(wins, decided[split])._asdict(),
    "heldout_comparisons": int(decided[split].sum()),
    "train_win_rate": evaluate.bootstrap(wins, decided["train"])._asdict(),
    "overall_win_rate": evaluate.bootstrap(wins)._asdict(),
    **{
      model: _summarise(each, prompts, emoji, pairs["train"], pairs[split])
      for model, each in scores.items()
    },
    "samples": int(wins.size),
    "evaluated_prompts": len(prompts),
  }
  out.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(
    out / "samples.npz",
    prompts=np.array(prompts),
    reference=images.to_uint8(comparison.reference_images),
    policy=images.to_uint8(comparison.policy_images),
    reference_nearest=comparison.reference.nearest,
    policy_nearest=comparison.policy.nearest,
    wins=wins,
    decided=decided[split],
  )
  write_json(out / "evaluation.json", result)
  return base_lib.read_json(out / "evaluation.json")


def load_adapter(base: base_lib.Base, run: pathlib.Path) -> lora.Adapter | None:
  """The low-rank delta that a run trained; None if it trained all parameters."""
  config = train.read_run(run)
  adapter = tasks.initial_adapter(config.lora, base.shapes["unet"], config.seed)
  if adapter is None:
    return None
  return adapter._replace(delta=train.load_trained(run, adapter.delta))


def load_policy(base: base_lib.Base, run: pathlib.Path) -> Any:
  """The UNet parameters that a run trained, its low-rank delta merged if it trained one."""
  adapter = load_adapter(base, run)
  if adapter is None:
    return train.load_trained(run, base.shapes["unet"])
  return lora.merge(base.params["unet"], adapter)


def emoji_of(config: config_lib.Config) -> tuple[emoji_lib.Emoji, ...]:
  """The emoji that take part in the configuration's data set.

  Raises:
    ValueError: it is not made of emoji, so that their measures say nothing.
  """
  if not config.data.dataset.startswith(EMOJI):
    raise ValueError(
      f"data.dataset: {config.data.dataset} cannot be measured yet: expected {EMOJI}...; look at "
      "what the policy draws with `dmpo sample --run`"
    )
  name = config.data.dataset.split("/")[1]
  counts = {each.name: each.count for each in emoji_choice.Builder.BUILDER_CONFIGS}
  return emoji_lib.load_emoji(counts[name])


def _summarise(scores: measure.Scores, prompts, emoji, train_pairs, heldout_pairs):
  parts = evaluate.summarise(scores)
  for name, pairs in (("use_rank_train", train_pairs), ("use_rank_heldout", heldout_pairs)):
    ranks = measure.rank_among(scores, prompts, emoji, pairs)
    parts[name] = evaluate.bootstrap(ranks, ~np.isnan(ranks))
  return {name: interval._asdict() for name, interval in parts.items()}


def export_policy(
  base: base_lib.Base,
  run: pathlib.Path,
  folder: pathlib.Path,
  *,
  metrics: Mapping[str, Any],
  data: str,
  dtype: str,
  replace: bool,
) -> pathlib.Path:
  """Writes the policy as a folder in diffusers' layout, with a model card."""
  config = train.read_run(run)
  card = export.model_card(
    base=config.base,
    config=dataclasses.asdict(config),
    data=data,
    metrics=metrics,
    versions=versions(),
    licence="cc-by-4.0",
    attribution=ATTRIBUTION,
  )
  trained = {"unet": load_policy(base, run)}
  return export.export_folder(
    base, folder, trained=trained, dtype=dtype, card=card, replace=replace
  )


def export_run(
  run: pathlib.Path,
  out: pathlib.Path,
  *,
  layout: str,
  evaluation: pathlib.Path | None,
  dtype: str,
  replace: bool,
) -> pathlib.Path:
  """`dmpo export`: a run folder alone says all that is needed; an evaluation fills the card.

  Args:
    layout: folder, single-file, lora (peft's style) or lora-kohya.

  Raises:
    ValueError: no run, no checkpoint, `out` exists, or a LoRA file is asked of a run without one.
  """
  config = train.read_run(run)
  # The base's UNet is needed only where a low-rank delta is merged into it.
  parts = ("unet",) if config.lora.rank > 0 and layout in ("folder", "single-file") else ()
  base = base_lib.load_base(config.base, parts=parts)
  if layout == "folder":
    metrics = card_metrics(base_lib.read_json(evaluation)) if evaluation else {}
    metrics["steps"] = checkpoint.read_metadata(run / train.CHECKPOINTS)["step"]
    return export_policy(
      base,
      run,
      out,
      metrics=metrics,
      data=f"`{config.data.dataset}`",
      dtype=dtype,
      replace=replace,
    )
  if evaluation is not None:
    raise ValueError(f"--evaluation fills the model card of a folder; layout {layout} has none")
  if layout == "single-file":
    trained = {"unet": load_policy(base, run)}
    return export.export_single_file(base, out, trained=trained, dtype=dtype, replace=replace)
  adapter = load_adapter(base, run)
  if adapter is None:
    raise ValueError(
      f"{run} trained all parameters (lora.rank 0): there is no low-rank delta; expected "
      "--layout folder or single-file"
    )
  style = "peft" if layout == "lora" else "kohya"
  return export.export_lora(adapter, out, style=style, dtype=dtype, replace=replace)


def sample_images(
  raw: Mapping[str, Any],
  *,
  model: str | None,
  run: pathlib.Path | None,
  lora_file: pathlib.Path | None,
  prompts: Sequence[str],
  negative_prompt: str | None,
  image: pathlib.Path | None,
  seed: int,
  out: pathlib.Path,
) -> pathlib.Path:
  """`dmpo sample`: grid.png, a row per prompt, and the single images, named by prompt and number.

  Raises:
    ValueError: both `model` and `run` are given, `out` holds images already, the base edits images
      and there is none, or the LoRA file does not fit.
  """
  if model is not None and run is not None:
    raise ValueError("--model and --run: give one of them")
  if (out / "grid.png").exists():
    raise ValueError(f"{out} already holds images; give another --out")
  config = train.read_run(run) if run is not None else config_lib.from_dict(raw)
  sampling = config_lib.from_dict(raw).sampling
  base = base_lib.load_base(model or config.base, compute=config.precision.compute)
  unet_params = base.params["unet"] if run is None else load_policy(base, run)
  if lora_file is not None:
    unet_params = lora.merge(unet_params, read_adapter(lora_file, base))
  pictures = images.to_uint8(
    evaluate.sample_prompts(
      evaluate.make_sampler(base, sampling, negative_prompt=negative_prompt),
      base,
      unet_params,
      list(prompts),
      sampling.images_per_prompt,
      seed=seed,
      title="sampling",
      sources=read_sources(image, base, len(prompts)),
    )
  )
  out.mkdir(parents=True, exist_ok=True)
  for i, row in enumerate(pictures):
    for j, picture in enumerate(row):
      Image.fromarray(picture).save(out / f"{i:04d}_{j:02d}.png")
  (out / "prompts.txt").write_text("".join(f"{i:04d} {p}\n" for i, p in enumerate(prompts)))
  Image.fromarray(images.tile(pictures)).save(out / "grid.png")
  return out / "grid.png"


def read_adapter(file: pathlib.Path, base: base_lib.Base) -> lora.Adapter:
  """A LoRA file as a delta on the base's UNet; each module's alpha / rank is folded into `up`."""
  found = lora_files.read_lora(file, lora.find_kernels(base.shapes["unet"]))
  return lora.Adapter(found.folded(), np.float32(1.0))


def read_sources(file: pathlib.Path | None, base: base_lib.Base, count: int) -> np.ndarray | None:
  """The image to edit, once for each of `count` prompts, [count, H, W, 3] in [-1, 1].

  Raises:
    ValueError: the base edits and there is no image, or it does not and there is one.
  """
  if (file is not None) != base.edits:
    raise ValueError(
      "--image: this model edits an image; name one"
      if base.edits
      else "--image: this model does not edit images"
    )
  if file is None:
    return None
  try:
    pixels = images.square_array(images.decode(file.read_bytes()), base.resolution)
  except (OSError, ValueError) as error:
    raise ValueError(f"--image: {file} is not a readable picture ({error})") from error
  return np.stack([pixels] * count)


def show_evaluation(result: Mapping[str, Any]) -> str:
  """The lines that `dmpo evaluate` prints."""
  rows = [f"split {result['split']}, {result['samples']} images per model"]
  for name in ("heldout_win_rate", "train_win_rate", "overall_win_rate"):
    rows.append(f"{name:24s} {_plain(result[name])}")
  for name, policy in result["policy"].items():
    rows.append(f"{name:24s} {_plain(result['reference'][name])} -> {_plain(policy)}")
  return "\n".join(rows)


def _plain(interval: Mapping[str, float]) -> str:
  if interval["mean"] is None:
    return "n/a"
  return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def card_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
  """The rows of a model card from an evaluation."""
  rows = {"win rate over the reference, held-out couples": result["heldout_win_rate"]}
  for model in ("policy", "reference"):
    for name in ("prompt_match", "rmse", "use_rank_heldout"):
      rows[f"{name.replace('_', ' ')}, {model}"] = result[model][name]
  return rows


def write_report(
  config: config_lib.Config,
  run: pathlib.Path,
  evaluation: pathlib.Path,
  out: pathlib.Path,
  *,
  summary: Mapping[str, Any],
  command: str,
) -> pathlib.Path:
  """The HTML report of a run from its metrics and the samples of its evaluation."""
  samples = np.load(evaluation / "samples.npz", allow_pickle=False)
  emoji = emoji_of(config)
  prompts, wins = samples["prompts"], samples["wins"]
  # The prompts on which most was decided about held-out couples, for better or worse.
  change = samples["decided"].sum(axis=1)
  order = sorted(range(len(prompts)), key=lambda i: (-change[i], prompts[i]))[:REPORT_PROMPTS]
  grids = [
    report.Grid(
      str(prompts[i]),
      "held-out couples",
      samples["reference"][i],
      samples["policy"][i],
      [int(each) for each in np.sign(wins[i] - 0.5)],
    )
    for i in order
  ]
  shifts = [_shift(samples, i, emoji, config) for i in order]
  return report.write_report(
    out,
    summary=dict(summary),
    metrics=logs.read(run),
    grids=grids,
    shifts=shifts,
    config=dataclasses.asdict(config),
    command=command,
  )


def _shift(samples, i: int, emoji: Sequence[emoji_lib.Emoji], config) -> report.PromptShift:
  prompt = str(samples["prompts"][i])
  positions = np.array(emoji_lib.shared_keywords(tuple(emoji))[prompt])
  shares = {
    model: (samples[f"{model}_nearest"][i][None, :] == positions[:, None]).mean(axis=1)
    for model in ("reference", "policy")
  }
  drawings = [np.asarray(emoji_lib.draw(emoji[position])) for position in positions]
  return report.PromptShift(
    prompt,
    "held-out couples",
    [emoji[position].name for position in positions],
    np.stack(drawings),
    [emoji[position].uses for position in positions],
    shares["reference"].tolist(),
    shares["policy"].tolist(),
  )


def summarise_run(
  config: config_lib.Config,
  encoded: encode.Encoded,
  run: pathlib.Path,
  result: Mapping[str, Any],
  seconds: Mapping[str, float],
) -> dict[str, Any]:
  """The content of summary.json."""
  first = logs.read(run)[0]
  counts = encoded.metadata["counts"]
  device = jax.devices()[0]
  return {
    "method": config.objective.method,
    # Without a reference the margin of step 0 is that of the images, and says nothing.
    "step0_margin_max": first["validation/margin_abs_max"]
    if config.objective.needs_reference
    else None,
    **result,
    "seconds": {name: round(value, 1) for name, value in seconds.items()},
    "device": f"{jax.device_count()} x {device.device_kind}",
    "versions": versions(),
    "steps": config.steps,
    "beta": config.objective.beta,
    "alpha": config.objective.alpha,
    "learning_rate": config.optim.learning_rate,
    "pairs": dict(counts),
  }


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON file in one go, the old one or the new one. NaN, not measured, becomes null."""

  def clean(value):
    if isinstance(value, Mapping):
      return {name: clean(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(json.dumps(clean(content), indent=2) + "\n", encoding="utf-8")
  temporary.replace(path)


class Ledger:
  """Which stages of a demo are done, with which inputs, in how many seconds: `stages.json`."""

  def __init__(self, out: pathlib.Path):
    self._path = out / "stages.json"
    self._done = json.loads(self._path.read_text()) if self._path.exists() else {}

  @property
  def seconds(self) -> dict[str, float]:
    return {name: record["seconds"] for name, record in self._done.items()}

  def is_done(self, name: str, inputs: str, output: pathlib.Path) -> bool:
    """Whether the stage ran with these inputs and its output is still there."""
    return self._done.get(name, {}).get("inputs") == inputs and output.exists()

  def run(self, name: str, inputs: str, action: Callable[[], Any]) -> Any:
    """Runs a stage and records it. Seconds of interrupted calls of the same inputs add up."""
    started = time.monotonic()
    before = self._done.get(name, {})
    earlier = before.get("seconds", 0.0) if before.get("inputs") == inputs else 0.0
    result = action()
    self._done[name] = {"inputs": inputs, "seconds": earlier + time.monotonic() - started}
    write_json(self._path, self._done)
    return result


def digest(*parts: Any) -> str:
  """A short hash of JSON values."""
  text = json.dumps(parts, sort_keys=True, default=str)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def demo(config: config_lib.Config, out: pathlib.Path, command: str) -> dict[str, Any]:
  """prepare -> train -> evaluate -> export -> report in the folder `out`.

  Returns:
    The summary, also written to summary.json.

  Raises:
    ValueError: `out` holds another run, or any stage refuses its input.
  """
  check_settings(config)
  run, evaluation, model = out / "train", out / "evaluation", out / "model"
  train.claim_folder(run, config)
  ledger = Ledger(out)
  base = base_lib.load_base(config.base, compute=config.precision.compute, remat=config.remat)
  inputs = digest(
    dataclasses.asdict(config), dmpo_jax.__version__, checkpoint.fingerprint(base.params)
  )

  def stage(number: int, name: str, output: pathlib.Path, action: Callable[[], Any]) -> None:
    skip = ledger.is_done(name, inputs, output)
    print(f"[{number}/5] {name}" + (": done before" if skip else ""), flush=True)
    if not skip:
      ledger.run(name, inputs, action)

  stage(
    1, "prepare", latents_folder(config, out / "data"), lambda: prepare(config, base, out / "data")
  )
  encoded = open_data(config, base, out / "data")
  stage(2, "train", run / train.CHECKPOINTS, lambda: train_policy(config, base, encoded, run))
  stage(
    3,
    "evaluate",
    evaluation / "evaluation.json",
    lambda: evaluate_policy(config, base, run, evaluation, split="test"),
  )
  result = base_lib.read_json(evaluation / "evaluation.json")
  data = DATA_CARD.format(dataset=config.data.dataset, **encoded.metadata["counts"])
  stage(
    4,
    "export",
    model / "model_index.json",
    lambda: export_policy(
      base, run, model, metrics=card_metrics(result), data=data, dtype="float32", replace=True
    ),
  )

  def write():
    summary = summarise_run(config, encoded, run, result, ledger.seconds)
    write_report(config, run, evaluation, out, summary=summary, command=command)
    write_json(out / "summary.json", summary)

  stage(5, "report", out / "report.html", write)
  return base_lib.read_json(out / "summary.json")
