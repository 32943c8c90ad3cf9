"""compare.py and its images and scores: the same noise for all, a table that can be redone."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import page_reader
import pytest
import tiny
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import cli, compare, compare_images, compare_scores, evaluate, prompt_sets, stages
from dmpo_jax.data import images
from dmpo_jax.data.emoji_choice import measure

HOSTILE = '<script>alert(1)</script> "love" & </b>'
MINE = (HOSTILE, "a cat", "love")


def brightness(name, path):
  """A scorer as `load_scorer` gives it."""
  assert name == "bright" and path.read_bytes() == b"weights"
  return lambda pictures, captions: pictures.reshape(len(captions), -1).mean(1, dtype=np.float32)


@pytest.fixture(scope="module")
def other_base(tmp_path_factory):
  return tiny.make_base(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def asked(tiny_base, other_base, tmp_path_factory):
  """What is compared: a model, another, and the first once more, on two sets."""
  folder = tmp_path_factory.mktemp("asked")
  (folder / "mine.txt").write_text("\n".join(MINE), encoding="utf-8")
  (folder / "weights.bin").write_bytes(b"weights")
  config = tiny.config(tiny_base, **{"sampling.images_per_prompt": 2})
  models = [f"first={tiny_base}", f"second={other_base}", f"again={tiny_base}"]
  return {
    "config": config,
    "models": compare_images.read_models(models),
    "sets": compare.read_prompts(["emoji", str(folder / "mine.txt")], config, "validation"),
    "seed": 1,
    "scorers": compare_scores.read_scorers([f"bright={folder / 'weights.bin'}"]),
    "load_scorer": brightness,
    "ballots": 6,
  }


@pytest.fixture(scope="module")
def done(asked, tmp_path_factory):
  out = tmp_path_factory.mktemp("comparison") / "out"
  return out, compare.compare(**asked, out=out)


def read_rows(out, name):
  lines = (out / "scores" / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines[1:]]


def results_of(result, measure, name):
  (found,) = [e for e in result["results"] if (e["measure"], e["set"]) == (measure, name)]
  return found


def open_store(out, asked):
  return compare_images.open_store(out, asked["models"], asked["sets"], 2)


def test_models_are_named_and_two_at_least():
  read = compare_images.read_models
  assert [each.name for each in read(["emoji", "a=b=c", "runs/x=y", "./x"])] == [
    *("emoji", "a", "runs/x=y", "./x")
  ]
  for texts in (["emoji"], ["a=x", "a=y"], ["x", "x"]):
    with pytest.raises(ValueError, match="expected two or more, each with a name of its own"):
      read(texts)


@pytest.mark.parametrize(
  "text, message",
  [
    ("pickscore", "expected NAME=PATH"),
    ("a/b=.", "expected NAME=PATH"),
    ("diversity=.", "the name diversity is taken"),
    ("x=none", "none does not exist"),
  ],
)
def test_scorers_are_named_and_there(text, message):
  with pytest.raises(ValueError, match=message):
    compare_scores.read_scorers([text])


def test_mean_distance_is_that_of_the_formula():
  latents = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
  pairs = [(i, j) for i in range(5) for j in range(i)]
  expected = np.mean([np.linalg.norm(np.float64(latents[i] - latents[j])) for i, j in pairs])
  assert compare_scores.mean_distance(latents) == pytest.approx(expected / np.sqrt(7), rel=1e-6)
  many = np.random.default_rng(1).standard_normal((8, 20_000))
  assert compare_scores.mean_distance(3 * many) == pytest.approx(3 * np.sqrt(2), rel=0.01)
  assert compare_scores.mean_distance(np.ones((3, 4))) == 0.0


@pytest.mark.slow
def test_all_models_start_from_the_noise_of_prompt_and_number(asked, done, tiny_base):
  """What `sample_prompts` draws, in a batch of another order, as good as to the byte; the second
  model's images are as good as never the first's."""
  out, _ = done
  store = open_store(out, asked)
  prompts = list(reversed(store.prompts))
  base = base_lib.load_base(str(tiny_base))
  sampler = evaluate.make_sampler(base, asked["config"].sampling)
  drawn = evaluate.sample_prompts(
    sampler, base, base.params["unet"], prompts, 2, seed=1, title="sampling"
  )
  stored, other = (
    np.stack([store.read_prompt(model, store.prompts.index(each)) for each in prompts])
    for model in (0, 1)
  )
  apart = np.abs(stored.astype(int) - images.to_uint8(drawn).astype(int))
  assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
  assert (stored == other).mean() < 0.1


@pytest.mark.slow
def test_a_model_against_itself_is_a_tie(asked, done):
  out, result = done
  store = open_store(out, asked)
  for prompt, number in store.pairs:
    one, two = (store.path(model, prompt, number).read_bytes() for model in (0, 2))
    assert one == two
  for each in result["results"]:
    for pair in each["pairs"]:
      if (pair["model"], pair["over"]) == ("again", "first"):
        assert pair["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
        assert pair["sign_test"] == 1.0 and pair["prompts_tied"] == each["prompts"]


@pytest.mark.slow
def test_the_table_can_be_recomputed_from_the_files(asked, done):
  out, result = done
  assert result == json.loads((out / "comparison.json").read_text())
  asked_prompts = json.loads((out / "prompts.json").read_text())
  rows = read_rows(out, "bright")
  for name, members in asked_prompts["sets"].items():
    scores = {
      model: np.array(
        [[r["bright"] for r in rows if (r["model"], r["prompt"]) == (model, p)] for p in members]
      )
      for model in ("first", "second", "again")
    }
    found = results_of(result, "bright", name)
    assert found["means"]["second"]["mean"] == pytest.approx(scores["second"].mean())
    pair = found["pairs"][0]
    won = (scores["second"] > scores["first"]) + 0.5 * (scores["second"] == scores["first"])
    assert pair["win_rate"]["mean"] == pytest.approx(won.mean())
    assert pair["prompts_won"] == (won.mean(axis=1) > 0.5).sum()
  store = open_store(out, asked)
  values = {(r["model"], r["prompt"], r["number"]): r["bright"] for r in rows}
  assert len(values) == 3 * 2 * len(store.prompts)
  assert values["second", 3, 1] == pytest.approx(store.read(1, 3, 1).mean(), rel=1e-6)
  # "love" is of both sets, and counts once in all.
  assert results_of(result, "bright", "overall")["prompts"] == len(store.prompts)
  assert len(store.prompts) < sum(len(each.prompts) for each in asked["sets"])


@pytest.mark.slow
def test_emoji_are_measured_as_before(asked, done):
  out, result = done
  store = open_store(out, asked)
  members = store.sets["emoji"]
  emoji = stages.emoji_of(asked["config"])
  pictures = np.stack([store.read_prompt(1, prompt) for prompt in members])
  words = [store.prompts[prompt] for prompt in members]
  real = evaluate.real_images(emoji, 8)
  scores = measure.score(images.to_float(pictures), words, emoji, real)
  for name, key in (("prompt match", "prompt_match"), ("RMSE", "rmse"), ("use rank", "use_rank")):
    interval = evaluate.summarise(scores)[key]
    assert results_of(result, name, "emoji")["means"]["second"]["mean"] == pytest.approx(
      interval.mean
    )
  assert results_of(result, "RMSE", "emoji")["better"] == "lower"
  assert not [e for e in result["results"] if e["measure"] == "uses" and e["set"] != "emoji"]


@pytest.mark.slow
def test_diversity_is_of_the_baselines_latents(asked, done, tiny_base):
  out, result = done
  store = open_store(out, asked)
  base = base_lib.load_base(str(tiny_base), parts=("vae",))
  encode = jax.jit(base.encode)
  for row in read_rows(out, "diversity")[:: len(store.prompts) - 1]:
    model = [each.name for each in store.models].index(row["model"])
    moments = encode(base.params["vae"], images.to_float(store.read_prompt(model, row["prompt"])))
    one, two = np.float64(moments[..., :4]) * base.vae.config.scaling_factor
    assert row["diversity"] == pytest.approx(np.sqrt(np.mean((one - two) ** 2)), rel=1e-4)
  assert results_of(result, "diversity", "mine")["pairs"] == []


@pytest.mark.slow
def test_the_page_and_the_text(done):
  out, result = done
  page = (out / "comparison.html").read_text(encoding="utf-8")
  reader = page_reader.Reader(page)
  assert "script" not in reader.tags and HOSTILE in reader.text
  assert all(address.startswith("data:image/png;base64,") for address in reader.addresses())
  assert "first" in reader.text and "bright (higher is better)" in reader.text
  shown = compare.show(result, out)
  assert "mine: 3 prompts, 2 images each" in shown and "overall: " in shown
  assert str(out / "comparison.html") in shown and "not key.json" in shown


def contents(out):
  return {
    path.relative_to(out).as_posix(): path.read_bytes()
    for path in sorted(out.rglob("*"))
    if path.is_file()
  }


def refuse(name, path):
  raise AssertionError(f"{name} was loaded again from {path}")


@pytest.mark.slow
def test_what_is_missing_is_made_again_and_nothing_else(asked, done, tmp_path):
  """An image is gone, scores are cut within a line, the table is away: the same bytes come back."""
  out = shutil.copytree(done[0], tmp_path / "out")
  before = contents(out)
  kept = out / "images" / "0" / "00000_00.png"
  stamp = kept.stat().st_mtime_ns
  (out / "images" / "1" / "00040_01.png").unlink()
  (out / "comparison.json").unlink()
  for name, size in (("bright", 5_000), ("diversity", 700), ("emoji", 10)):
    os.truncate(out / "scores" / f"{name}.jsonl", size)
  compare.compare(**asked, out=out)
  assert contents(out) == before
  assert kept.stat().st_mtime_ns == stamp
  compare.compare(**asked | {"load_scorer": refuse}, out=out)
  assert contents(out) == before


@pytest.mark.slow
def test_another_setting_is_refused_by_name(asked, done):
  """As the command meets it: all that differs is named, and the folder stays as it is."""
  out, _ = done
  before = contents(out)
  first, second, again = asked["models"]
  changed = tiny.config(asked["config"].base, **{"sampling.sampler": "euler"})
  sets = [compare.read_prompts(["emoji"], changed, "test")[0]]
  models = [first, second._replace(source=first.source), again]
  with pytest.raises(ValueError) as error:
    compare.compare(
      **asked | {"config": changed, "models": models, "sets": sets, "seed": 2}, out=out
    )
  assert "comparison with another setting" in str(error.value)
  for difference in (
    r"models.second.weights is '\w+' there and '\w+' here",
    "sampling.sampler is 'ddim' there and 'euler' here",
    "sampling.images_per_prompt is 2 there and 1 here",
    "seed is 1 there and 2 here",
    "prompt_sets.emoji.prompts is 49 there and 87 here",
    "prompt_sets.mine is {.*} there and None here",
  ):
    assert re.search(difference, str(error.value)), difference
  assert contents(out) == before


@pytest.mark.slow
def test_each_setting_is_in_the_manifest(done, tmp_path):
  """One field changed at a time; models may have moved, but not changed places."""
  manifest = json.loads((done[0] / "manifest.json").read_text())
  compare_images.claim(tmp_path / "new", manifest)
  moved = {name: each | {"source": "x"} for name, each in manifest["models"].items()}
  compare_images.claim(tmp_path / "new", manifest | {"models": moved})
  other = {"compute": "bfloat16", "devices": "1 x cpu", "baseline": "again", "format": 2}
  for name, value in other.items():
    with pytest.raises(ValueError, match=f"{name} is .* there and {value!r} here"):
      compare_images.claim(tmp_path / "new", manifest | {name: value})
  turned = dict(reversed(manifest["models"].items()))
  with pytest.raises(ValueError, match="the order of models is first, second, again there"):
    compare_images.claim(tmp_path / "new", manifest | {"models": turned})


@pytest.mark.slow
def test_scores_of_other_weights_are_refused(asked, done, tmp_path):
  weights = tmp_path / "weights.bin"
  weights.write_bytes(b"others")
  store, source = open_store(done[0], asked), compare_scores.Source("bright", weights)
  with pytest.raises(ValueError, match="bright.jsonl: scores of .* give the scorer another name"):
    compare_scores.score_by(store, source, refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
  "scores, message",
  [
    (lambda pictures, _: np.full(len(pictures), np.nan, np.float32), "new: got nan for image 0 of"),
    (lambda pictures, _: np.zeros((len(pictures), 1)), r"expected 32 scores, got \(32, 1\)"),
  ],
)
def test_a_scorer_that_gives_nonsense_is_refused(asked, done, scores, message):
  store = open_store(done[0], asked)
  source = compare_scores.Source("new", asked["scorers"][0].path)
  with pytest.raises(ValueError, match=message):
    compare_scores.score_by(store, source, lambda *_: scores)
  (store.folder / "scores" / "new.jsonl").unlink()


def test_models_that_do_not_fit_are_refused(tiny_base, tmp_path):
  config = tiny.config(tiny_base)
  base = base_lib.load_base(str(tiny_base), lazy=True)
  sets = [prompt_sets.PromptSet("a", ("a cat",), 0)]
  models = compare_images.read_models([f"a={tiny_base}", "b=other"])
  store = compare_images.open_store(tmp_path / "out", models, sets, 1)
  for change, message in (
    (
      {"sample_size": 8},
      r"model b: latents \(8, 8, 4\) of images of 16 pixels; expected \(4, 4, 4\)",
    ),
    ({"in_channels": 8}, "model b: edits images; expected one that draws from a prompt"),
  ):
    unet = base.unet.clone(config=dataclasses.replace(base.unet.config, **change))
    other = dataclasses.replace(base, models=base.models | {"unet": unet})
    with pytest.raises(ValueError, match=message):
      bases = {str(tiny_base): base, "other": other}
      compare_images.draw_images(store, bases, config, sets, seed=0)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "expected two or more models, or --run, or --votes"),
    (["a", "b", "--run", "c"], "one of the three"),
    (["--run", "a", "--prompts", "emoji"], "--prompts: is for models to compare"),
    (["--run", "a", "--seed", "0"], "--seed: is for models to compare, not for --run"),
    (["--votes", "v", "--scorer", "x=."], "--scorer: is for models to compare, not for --votes"),
    (["a"], "models: expected two or more"),
    (["a", "b"], "--prompts: expected a file with prompts, or the word emoji"),
    (["a", "b", "--prompts", "none.txt"], "none.txt is not a file"),
    (["a", "b", "--prompts", "emoji", "--scorer", "x"], "expected NAME=PATH"),
    (
      ["a", "b", "--prompts", "emoji", "--scorer", "x=."],
      "scorer 'x' is not known; expected one of pickscore",
    ),
    (
      ["a", "b", "--prompts", "emoji", "--scorer", "pickscore=configs"],
      "scorer pickscore: configs has no config.json",
    ),
    (["a", "b", "--prompts", "emoji", "--vote-pairs", "-1"], "--vote-pairs: expected at least 0"),
    (["a", "b", "--prompts", "emoji"], "base 'a': a/model_index.json does not exist"),
    (["--votes", "v.json"], "comparison.json is missing; expected in --out a finished comparison"),
  ],
)
def test_the_command_refuses(capsys, tmp_path, arguments, message):
  assert cli.main(["evaluate", *arguments, "--out", str(tmp_path / "o")]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / "precious.txt").write_text("x")
  with pytest.raises(ValueError, match="holds something else; expected a new folder"):
    compare_images.claim(tmp_path, {"models": {}})
  assert os.listdir(tmp_path) == ["precious.txt"]


def test_a_damaged_image_is_named(tmp_path):
  store = compare_images.Store(tmp_path, (), ("a",), {}, 1)
  store.path(0, 0, 0).parent.mkdir(parents=True)
  store.path(0, 0, 0).write_bytes(b"\x89PNG")
  with pytest.raises(ValueError, match=r"00000_00.png: not a readable picture .* delete it"):
    store.read(0, 0, 0)
  Image.new("RGB", (3, 2)).save(store.path(0, 0, 0))
  assert store.read(0, 0, 0).shape == (2, 3, 3)


@pytest.mark.slow
def test_killed_and_run_again_the_table_is_the_same(tiny_base, other_base, tmp_path):
  """SIGKILL while the second model draws; the table, the page and all scores are the same bytes."""
  prompts = tmp_path / "many.txt"
  prompts.write_text("\n".join(f"{a} {b}" for a, b in itertools.product("abcdefghij", repeat=2)))
  arguments = ["evaluate", str(tiny_base), str(other_base), "--prompts", str(prompts)]
  arguments += ["--vote-pairs", "0", "--out"]
  settings = tiny.overrides(tiny_base, **{"sampling.images_per_prompt": 12})
  whole, killed, second = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed/images/1"
  environment = {
    **os.environ,
    "PYTHONPATH": str(pathlib.Path(compare.__file__).parent.parent),
    "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
  }
  command = [sys.executable, "-m", "dmpo_jax.cli", *arguments, str(killed), *settings]
  with (tmp_path / "stderr.txt").open("w") as errors:
    process = subprocess.Popen(command, env=environment, stderr=errors)
  while not (second.is_dir() and len(os.listdir(second)) > 600):
    assert process.poll() is None, (tmp_path / "stderr.txt").read_text()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert 600 <= len(list(second.glob("*.png"))) < 1200  # of batches of 512
  assert not (killed / "comparison.json").exists()
  for out in (killed, whole):
    assert cli.main([*arguments, str(out), *settings]) == 0
  assert contents(killed) == contents(whole)
