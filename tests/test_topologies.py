"""SD 1, SD 2, SDXL and InstructPix2Pix in small, end to end: encode, train, export, diffusers."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import cli, optimizer, stages, tasks, train, train_step
from dmpo_jax.data import encode, geometry, tfds_source
from dmpo_jax.data.emoji_choice import emoji as emoji_lib

pytestmark = [
  pytest.mark.slow,  # every test compiles a step or a sampler
  pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse"),
]
PAIRS = 24
LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.targets": "to_q to_k to_v to_out.0"}


class EditPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Emoji in pairs; the source image is the winner's left half beside the loser's right half."""

  VERSION = tfds.core.Version("1.0.0")
  name = "edit_pairs"

  def __init__(self, edits, **kwargs):
    self._edits = edits
    super().__init__(file_format="array_record", **kwargs)

  def _info(self):
    features = {
      "caption": tfds.features.Text(),
      "image_w": tfds.features.Image(),
      "image_l": tfds.features.Image(),
      "p_choice": np.float32,
      "couple": tfds.features.Text(),
    }
    if self._edits:
      features["image_source"] = tfds.features.Image()
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(0), "validation": self._generate_examples(PAIRS)}

  def _generate_examples(self, start):
    drawings = [np.asarray(emoji_lib.draw(each)) for each in emoji_lib.load_emoji(3 * PAIRS)]
    for position in range(start, start + PAIRS):
      winner, loser = drawings[position], drawings[position + 1]
      half = winner.shape[1] // 2
      values = {
        "caption": f"emoji number {position}",
        "image_w": png(winner),
        "image_l": png(loser),
        "p_choice": 1.0,
        "couple": str(position),
      }
      if self._edits:
        values["image_source"] = png(np.concatenate([winner[:, :half], loser[:, half:]], axis=1))
      yield position, values


def png(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  buffer.seek(0)
  return buffer


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def prepared(request, tmp_path_factory):
  return prepare(tmp_path_factory.mktemp(request.param), request.param)


def prepare(folder, kind):
  """Folder of a base of a kind, the base, and pairs encoded by it."""
  base_folder = tiny.make_base(folder, kind=kind)
  base = base_lib.load_base(str(base_folder), remat="layers")
  tfds.disable_progress_bar()
  builder = EditPairs(base.edits, data_dir=folder / "raw")
  builder.download_and_prepare()
  encoded = encode.encode_source(
    tfds_source.source_of_builder(builder),
    folder / "latents",
    encode_images=stages.encoder(base),
    tokenize=base.tokenizer,
    geometry=geometry.Geometry(base.resolution, crop="random", flip=0.5),
    fingerprint=base.data_fingerprint(),
    batch_size=8,
    time_ids=len(base.encoders) > 1,
  )
  return base_folder, base, encoded


def make_task(prepared, **more):
  base_folder, base, encoded = prepared
  config = tiny.config(base_folder, steps=3, batch_size=8, save_every=3, **more)
  return config, tasks.preference_task(config, base, encoded)


def export_and_check(run, out, *arguments):
  command = ["export", "--run", str(run), "--out", str(out), "--check", *arguments]
  assert cli.main(command) == 0
  return out


def test_full_training_and_export(prepared, tmp_path, capsys):
  config, task = make_task(prepared)
  params = train.train(config, task, tmp_path / "run", jax.devices()[:1])
  first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
  assert first["validation/margin_abs_max"] == 0.0
  changed = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), params, task.params)
  assert all(jax.tree.leaves(changed))
  export_and_check(tmp_path / "run", tmp_path / "model")
  assert "diffusers opens it" in capsys.readouterr().out
  export_and_check(tmp_path / "run", tmp_path / "one.safetensors", "--layout", "single-file")
  half = export_and_check(tmp_path / "run", tmp_path / "half", "--dtype", "float16")
  assert base_lib.load_base(str(half)).pipeline == prepared[1].pipeline


def only(prepared, *kinds):
  """Skips the kinds that would show nothing that these do not."""
  kind = next(each for each in tiny.KINDS if prepared[0].parent.name.startswith(each))
  if kind not in kinds:
    pytest.skip(f"shown by {', '.join(kinds)}")


def test_low_rank_training_and_export(prepared, tmp_path):
  only(prepared, "sd1", "sdxl")
  config, task = make_task(prepared, **LORA)
  delta = train.train(config, task, tmp_path / "run", jax.devices()[:1])
  assert set(delta) == set(task.frozen.adapter.delta)
  assert all(np.any(np.asarray(pair["up"]) != 0) for pair in delta.values())
  first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
  assert first["validation/margin_abs_max"] == 0.0
  # The LoRA file gives in diffusers what the merged weights give here.
  export_and_check(tmp_path / "run", tmp_path / "peft.safetensors", "--layout", "lora")
  export_and_check(tmp_path / "run", tmp_path / "kohya.safetensors", "--layout", "lora-kohya")
  merged = export_and_check(tmp_path / "run", tmp_path / "merged")
  # And the same images here: from the merged folder, and from the base with the file.
  drawn = [
    sample(tmp_path / name, prepared, *arguments)
    for name, arguments in {
      "a": ["--model", merged],
      "b": ["--model", prepared[0], "--lora", tmp_path / "peft.safetensors"],
      "c": ["--run", tmp_path / "run"],
    }.items()
  ]
  for other in drawn[1:]:  # one grey level: the sums of merging are rounded otherwise
    assert np.abs(drawn[0].astype(int) - other).max() <= 1


def sample(out, prepared, *arguments):
  more = []
  if prepared[1].edits:
    drawing = out.with_suffix(".png")
    emoji_lib.draw(emoji_lib.load_emoji(1)[0]).save(drawing)
    more = ["--image", str(drawing), "--config.sampling.image_guidance_scale=1.5"]
  overrides = tiny.overrides(prepared[0])
  command = ["sample", *map(str, arguments), "--prompt", "love", "--out", str(out), *more]
  assert cli.main([*command, *overrides]) == 0
  return np.asarray(Image.open(out / "grid.png"))


def test_margins_of_a_new_delta_are_exactly_zero_in_bfloat16(prepared):
  only(prepared, "sdxl")
  base_folder, _, encoded = prepared
  settings = {"precision.compute": "bfloat16", "precision.reference": "bfloat16", **LORA}
  config = tiny.config(base_folder, **settings)
  base = base_lib.load_base(config.base, compute="bfloat16", remat=config.remat)
  task = tasks.preference_task(config, base, encoded)
  examples = jax.jit(task.objective.draw)(task.validation, jax.random.key(0))
  loss = jax.jit(task.objective.loss)
  _, metrics = loss(task.params, task.frozen, examples)
  assert np.all(np.asarray(metrics["margin"]) == 0.0)
  moved = jax.tree.map(lambda x: x + 0.1, task.params)
  _, metrics = loss(moved, task.frozen, examples)
  assert np.abs(metrics["margin"]).max() > 1e-3


def test_low_rank_training_holds_one_copy_of_the_base(prepared):
  """Bytes of the compiled step's arguments, against those of full training."""
  only(prepared, "sdxl")
  compiled = {}
  for name, more in {"full": {}, "lora": LORA}.items():
    config, task = make_task(prepared, **more)
    chain = optimizer.make_optimizer(config.optim, config.steps)
    state = jax.eval_shape(lambda p, c=chain: train_step.init_state(p, c), task.params)
    step = jax.jit(
      lambda state, frozen, batch, key, task=task, chain=chain: train_step.train_step(
        state, frozen, batch, key, objective=task.objective, optimizer=chain
      ),
      donate_argnums=0,
    )
    lowered = step.lower(state, task.frozen, task.validation, jax.random.key(0))
    compiled[name] = lowered.compile().memory_analysis()
  unet = sum(4 * leaf.size for leaf in jax.tree.leaves(prepared[1].shapes["unet"]))
  full, low = (compiled[name].argument_size_in_bytes for name in ("full", "lora"))
  # Full: reference, policy and two moments. Low rank: the base once; the deltas are small.
  assert 2.5 * unet < full - low <= 3 * unet


def test_source_images_are_asked_for_where_they_belong(prepared):
  base_folder, base, encoded = prepared
  config = tiny.config(base_folder)
  records = [encoded.splits["train"][i] | {"couple": b"", "caption": b""} for i in range(PAIRS)]
  if base.edits:
    for record in records:
      del record["source_moments"]
    message = "its pairs have no source images; expected some, as the base .* edits images"
  else:
    records = [record | {"source_moments": record["moments_w"]} for record in records]
    message = "expected none, as the base .* does not edit images"
  other = dataclasses.replace(encoded, splits={"train": encode.Pairs(records, "changed")})
  with pytest.raises(ValueError, match=message):
    tasks.preference_task(config, base, other)
