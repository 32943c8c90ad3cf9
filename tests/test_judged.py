"""Images that were judged one by one, from the disk to a trained model (Diffusion-KTO)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pair_files
import pytest
import test_other_objectives
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import cli, doctor_data, doctor_page, plan, sharding, stages, tasks, types
from dmpo_jax.data import pipeline, rows
from dmpo_jax.data.preference_pairs import preference_pairs_dataset_builder
from dmpo_jax.data.sources import registry

LINE = {"caption": "p", "image": "a.jpg", "desirable": True}
A, B, C = (pair_files.picture(*each) for each in ((0,), (1, "PNG"), (2, "WEBP")))
KTO = "configs/emoji_kto.py"


def read(folder, split="train", **options):
  source = registry.open_source("judged", folder, **({"validation_share": 0.0} | options))
  return [row for shard in source.splits[split] for row in shard.read()]


def one(folder, line):
  """What a list of this line alone gives, beside a.jpg, b.png and c.webp."""
  pair_files.write_images(folder, "a.jpg", "b.png", "c.webp")
  pair_files.write_jsonl(folder / "all.jsonl", [line])
  (row,) = read(folder)
  return row


def write_judged(folder, count, desirable=lambda index: index % 3 > 0):
  """`count` drawings as PNG, each with a caption and a verdict of its own."""
  folder.mkdir(exist_ok=True)
  lines = []
  for index in range(count):
    (folder / f"{index}.png").write_bytes(pair_files.picture(index, "PNG"))
    verdict = bool(desirable(index))
    lines.append({"caption": f"drawing {index}", "image": f"{index}.png", "desirable": verdict})
  pair_files.write_jsonl(folder / "judged.jsonl", lines)
  return folder


# The source.


def test_a_line_is_a_judged_image(tmp_path):
  assert one(tmp_path, LINE) == rows.Judged("p", A, True, "a.jpg", "all.jsonl, line 1")
  edited = one(tmp_path, LINE | {"image": "b.png", "desirable": 0, "source": "c.webp"})
  assert edited[1:3] == (B, False) and edited.image_source == C


def test_csv_is_read_alike(tmp_path):
  pair_files.write_images(tmp_path, "a.jpg", "b.png")
  text = "image,desirable,caption\na.jpg,True,p\nb.png,0,q\nb.png,,q\nb.png,maybe,q\n"
  (tmp_path / "all.csv").write_text(text)
  good, bad, *dropped = read(tmp_path)
  assert good[:3] == ("p", A, True) and bad[:3] == ("q", B, False)
  assert dropped == [
    rows.Dropped("desirable is missing", "all.csv, line 4", True),
    rows.Dropped("desirable is neither true nor false", "all.csv, line 5", True),
  ]


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"desirable": 0.7}, "desirable is neither true nor false"),
    ({"desirable": 1.0}, "desirable is neither true nor false"),
    ({"desirable": None}, "desirable is missing"),
    ({"desirable": [True]}, "desirable is neither true nor false"),
    ({"image": None}, "image is missing"),
    ({"image": "../a.jpg"}, "path leaves the folder"),
    ({"caption": " "}, "caption is empty"),
  ],
)
def test_broken_lines(tmp_path, change, reason):
  row = one(tmp_path, LINE | change)
  assert isinstance(row, rows.Dropped) and row.broken and row.reason == reason


def test_captions_are_held_out_and_tars_are_no_lists(tmp_path):
  write_judged(tmp_path, 40)
  parts = [read(tmp_path, split, validation_share=0.3) for split in ("train", "validation")]
  captions = [{row.caption for row in part} for part in parts]
  assert all(captions) and not captions[0] & captions[1] and sum(map(len, captions)) == 40
  (tmp_path / "judged.jsonl").unlink()
  pair_files.write_tar(tmp_path / "train.tar", [])
  with pytest.raises(ValueError, match=r"\*.jsonl or \*.csv \(caption, image, desirable\), found"):
    read(tmp_path)
  source = registry.open_source("judged", write_judged(tmp_path / "other", 2))
  with pytest.raises(ValueError, match="judged one by one; expected pairs"):
    preference_pairs_dataset_builder.Builder(source, data_dir=tmp_path / "tfds")


# The doctor.


def diagnose(folder, **settings):
  source = registry.open_source("judged", folder, validation_share=0.25)
  return doctor_data.diagnose(source, **({"resolution": 64} | settings))


def codes(diagnosis):
  found = {finding.code: finding.count for finding in diagnosis.findings}
  return {code: count for code, count in found.items() if code != "no-licence"}


def test_the_doctor_looks_at_each_image(tmp_path):
  diagnosis = diagnose(write_judged(tmp_path, 60))
  assert codes(diagnosis) == {} and diagnosis.ok and diagnosis.judged
  assert sum(diagnosis.pairs.values()) == 60
  assert "60 judged images (" in doctor_page.show(diagnosis)
  page = doctor_page.html(diagnosis)
  assert page.count('alt="desirable"') + page.count('alt="undesirable"') == 12
  assert "winner" not in page.partition("Images drawn at random")[2]


def test_the_doctor_tells_contradictions_and_what_gives_the_verdict_away(tmp_path):
  lines = (write_judged(tmp_path, 60) / "judged.jsonl").read_text().splitlines()
  turned = json.loads(lines[0]) | {"desirable": not json.loads(lines[0])["desirable"]}
  pair_files.write_jsonl(tmp_path / "judged.jsonl", [*lines, json.dumps(turned), lines[1]])
  assert codes(diagnose(tmp_path)) == {"mixed-verdict": 1, "same-verdict": 1}
  for index in range(60):  # the good ones are JPEG, in spite of their names
    if index % 3:
      (tmp_path / f"{index}.png").write_bytes(pair_files.picture(index))
  pair_files.write_jsonl(tmp_path / "judged.jsonl", lines)
  diagnosis = diagnose(tmp_path)
  assert codes(diagnosis) == {"format-leak": 60} and not diagnosis.ok
  assert diagnosis.findings[0].of == "images" and diagnosis.findings[0].share == 1.0
  assert codes(diagnose(write_judged(tmp_path / "good", 30, lambda _: True))) == {"one-verdict": 1}


# Training.


def judged_of(batch):
  """The images of a batch of pairs, one by one: winner, loser, winner, ..."""
  moments = np.stack([batch.moments_w, batch.moments_l], axis=1).reshape(-1, 2, 2, 6)
  labels = jnp.array([True, False] * len(batch.moments_w))
  return types.JudgedBatch(moments, np.repeat(batch.input_ids, 2, axis=0), labels)


@pytest.mark.slow
def test_the_loss_of_pairs_is_that_of_their_images():
  """Same draws, same baseline: only what is a row differs."""
  _, objective, params, frozen, batch = test_other_objectives.problem("kto", moved=0.003)
  _, (values, metrics) = test_other_objectives.evaluate(objective, params, frozen, batch)
  examples, (single, single_metrics) = test_other_objectives.evaluate(
    objective, params, frozen, judged_of(batch)
  )
  assert examples.latents.shape == (16, 1, 2, 2, 3) and examples.noising.timesteps.shape == (16,)
  # Sums over pairs of rows in float32, of terms near 1.
  np.testing.assert_allclose(single.reshape(-1, 2).mean(axis=1), values, rtol=1e-6)
  assert set(single_metrics) == set(metrics)
  for name, column in metrics.items():
    # Advantages of errors near 4 differ by 2^-22 of them, times kappa = 500 in the margin.
    scale = 500 if name in ("margin", "baseline") else 1
    atol = scale * 4 * 2**-22
    np.testing.assert_allclose(single_metrics[name].mean(), column.mean(), rtol=1e-5, atol=atol)


def test_verdicts_turned_round_turn_the_loss_round():
  _, objective, params, frozen, batch = test_other_objectives.problem("kto", moved=0.003)
  batch = judged_of(batch)
  turned = batch._replace(desirable=~batch.desirable)
  _, (values, metrics) = test_other_objectives.evaluate(objective, params, frozen, batch)
  _, (others, other) = test_other_objectives.evaluate(objective, params, frozen, turned)
  # The sigmoid utility of v and of -v sum up to 1.
  np.testing.assert_allclose(values + others, np.ones(16), rtol=1e-6)
  assert np.abs(values - others).max() > 0.01
  for name, counterpart in (("winner", "loser"), ("loser", "winner")):
    mean = metrics[f"{name}_advantage"].mean()
    np.testing.assert_allclose(other[f"{counterpart}_advantage"].mean(), mean, rtol=1e-6)


@pytest.mark.slow
def test_advantages_are_means_over_the_images_of_one_verdict_on_all_devices():
  """15 desirable images and one that is not, by one device and by four; none is 0, not NaN."""
  _, objective, params, frozen, batch = test_other_objectives.problem("kto", moved=0.003)
  batch = judged_of(batch)._replace(desirable=jnp.arange(16) != 5)
  examples, (_, metrics) = test_other_objectives.evaluate(objective, params, frozen, batch)
  _, (_, all_good) = test_other_objectives.evaluate(
    objective, params, frozen, batch._replace(desirable=jnp.ones(16, bool))
  )
  assert not np.any(all_good["loser_advantage"])
  row = all_good["winner_advantage"]  # then every image's own
  np.testing.assert_allclose(metrics["loser_advantage"].mean(), row[5], rtol=1e-6)
  np.testing.assert_allclose(
    metrics["winner_advantage"].mean(), np.delete(row, 5).mean(), rtol=1e-5
  )
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:4])
  placed = jax.device_put(examples, sharding.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    _, spread = jax.jit(lambda each: sharding.map_rows(objective.loss, params, frozen, each))(
      placed
    )
  for name in ("winner_advantage", "loser_advantage", "margin"):
    # Of four errors, each rounded to 2^-22 by sums in another order; kappa = 500 in the margin.
    atol = (500 if name == "margin" else 1) * 4 * metrics["denoising_loss"].max() * 2**-22
    np.testing.assert_allclose(spread[name].mean(), metrics[name].mean(), rtol=1e-4, atol=atol)


def test_counts_are_those_of_one_image():
  config = tiny.config("emoji", path=KTO, **{"data.dataset": "judged", "data.path": "x"})
  assert plan.minimum_forwards(config) == 4
  batch = plan.abstract_batch(config, base_lib.load_base("emoji", parts=()))
  assert isinstance(batch, types.JudgedBatch)
  assert batch.desirable.shape == (config.batch_size,) and batch.desirable.dtype == bool


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:step .*the policy denoises the preferred images worse")
def test_from_a_folder_to_a_trained_model(tiny_base, tmp_path, capsys):
  """Prepared, trained, gone on with; with the errors of the reference stored, too."""
  own = write_judged(tmp_path / "own", 60)
  more = {"batch_size": 8, "data.dataset": "judged", "data.path": own, "data.resize": "bilinear"}
  more["data.validation_share"] = 0.2
  settings = [f"--config={KTO}", *tiny.overrides(tiny_base, **more)]
  data = ["--data", str(tmp_path / "data")]
  assert cli.main(["prepare", *data, *settings]) == 0, capsys.readouterr().err
  shown = capsys.readouterr().out
  assert "judged images: {'train': " in shown and "of them desirable {'train': " in shown
  config = tiny.config(tiny_base, path=KTO, **more)
  base = base_lib.load_base(config.base)
  encoded = stages.open_data(config, base, tmp_path / "data")
  split = encoded.splits["train"]
  records = [split[position] for position in range(len(split))]
  verdicts = {record["caption"]: bool(record["desirable"]) for record in records}
  assert all(verdict == (int(name.split()[1]) % 3 > 0) for name, verdict in verdicts.items())
  assert encoded.metadata["desirable"]["train"] == sum(verdicts.values())
  assert set(records[0]) == {"moments", "desirable", "input_ids", "couple", "caption"}
  assert cli.main(["train", *data, "--out", str(tmp_path / "run"), *settings]) == 0
  first, *_, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
  assert first["validation/margin_abs_max"] == 0.0
  assert first["validation/loss"] == pytest.approx(0.5, rel=1e-6)
  assert last["validation/margin"] != 0.0
  stored = [*settings, "--config.data.reference_draws=2"]
  assert cli.main(["cache", *data, *stored]) == 0, capsys.readouterr().err
  config = tiny.config(tiny_base, path=KTO, **more, **{"data.reference_draws": 2})
  task = tasks.preference_task(config, base, stages.open_data(config, base, tmp_path / "data"))
  batch = next(task.batches(0))
  assert batch.reference_errors.shape == (8, 1) and task.frozen.reference is None
  examples = task.objective.draw(batch, jax.random.key(0))
  _, metrics = jax.jit(task.objective.loss)(task.params, task.frozen, examples)
  # Errors near 1, of another program: 2^-22 of them, times kappa = 500.
  np.testing.assert_allclose(metrics["margin"], np.zeros(8), atol=500 * 2**-22)


@pytest.mark.slow
def test_other_methods_and_names_are_refused(tiny_base, tmp_path):
  own = write_judged(tmp_path / "own", 24)
  more = {"batch_size": 8, "data.dataset": "judged", "data.path": own, "data.resize": "bilinear"}
  config = tiny.config(tiny_base, path=KTO, **more)
  base = base_lib.load_base(config.base)
  encoded = stages.prepare(config, base, tmp_path / "data")
  assert pipeline.are_judged(encoded.splits["train"])
  dpo = tiny.config(tiny_base, path="configs/emoji_dpo.py", **more)
  with pytest.raises(ValueError, match="objective.method: 'dpo' needs pairs.*expected kto"):
    tasks.preference_task(dpo, base, encoded)
  mixed = {"data.dataset": "pairs", "data.mixture": "judged=1"}
  named = tiny.config(tiny_base, path=KTO, **{**more, **mixed})
  opened = stages.open_data(named, base, tmp_path / "data")
  with pytest.raises(ValueError, match="data.dataset: 'pairs', but judged=1 are images that"):
    tasks.preference_task(named, base, opened)
