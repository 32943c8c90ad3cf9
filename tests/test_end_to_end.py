"""`dmpo demo` as a user runs it, in a process of its own, shrunk to seconds."""

import json
import os
import subprocess
import sys
import time

import diffusers
import pytest
import tiny

from dmpo_jax import cli, logs

pytestmark = pytest.mark.slow


def run(*arguments):
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "dmpo_jax.cli", *map(str, arguments)]
  result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
  assert result.returncode == 0, result.stderr
  return result


@pytest.fixture(scope="module")
def demo(tiny_base, tmp_path_factory):
  out = tmp_path_factory.mktemp("runs") / "demo"
  settings = tiny.overrides(tiny_base)
  return out, settings, run("demo", "--out", out, *settings)


def test_everything_is_there(demo):
  out, _, result = demo
  for stage in ("[1/5] prepare", "[2/5] train", "[3/5] evaluate", "[4/5] export", "[5/5] report"):
    assert stage in result.stdout
  assert "win rate" in result.stdout and str(out / "report.html") in result.stdout
  assert "tensorflow" not in result.stderr.lower()
  page = (out / "report.html").read_text(encoding="utf-8")
  assert "<html" in page and "data:image/png;base64" in page
  assert (out / "grids.png").exists() and (out / "curves.png").exists()


def test_summary(demo):
  out, _, _ = demo
  summary = json.loads((out / "summary.json").read_text())
  assert summary["step0_margin_max"] == 0.0
  for interval in (
    summary["heldout_win_rate"],
    *(
      summary[model][name]
      for model in ("reference", "policy")
      for name in ("prompt_match", "rmse", "use_rank_train", "use_rank_heldout")
    ),
  ):
    if interval["mean"] is not None:  # random weights may draw nothing that decides
      assert interval["low"] <= interval["mean"] <= interval["high"]
  assert summary["reference"]["rmse"]["mean"] > 0
  assert (summary["heldout_comparisons"] == 0) == (summary["heldout_win_rate"]["mean"] is None)
  assert {"prepare", "train", "evaluate", "export"} <= set(summary["seconds"])
  assert summary["samples"] > 0 and "cpu" in summary["device"].lower()
  assert {"python", "jax", "flax", "optax", "dmpo_jax"} <= set(summary["versions"])


def test_the_same_command_again_is_fast_and_changes_nothing(demo):
  out, settings, _ = demo
  files = [out / "summary.json", out / "report.html", out / "train" / logs.METRICS_FILE]
  files += sorted((out / "model").rglob("*.safetensors"))
  before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
  started = time.monotonic()
  result = run("demo", "--out", out, *settings)
  seconds = time.monotonic() - started
  assert result.stdout.count("done before") == 5
  assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
  # Nothing is compiled, trained or drawn; imports alone take some seconds on a busy machine.
  assert seconds < 60


def test_another_configuration_in_the_same_folder_is_refused(demo, capsys):
  out, settings, _ = demo
  before = (out / "summary.json").read_bytes()
  arguments = ["demo", "--out", out, *settings, "--config.objective.beta=10.0"]
  assert cli.main([str(each) for each in arguments]) == 2
  assert "already holds another run" in capsys.readouterr().err
  assert (out / "summary.json").read_bytes() == before


def test_the_exported_model_is_opened_by_diffusers(demo):
  out, _, _ = demo
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(out / "model"))
  pipeline.set_progress_bar_config(disable=True)
  image = pipeline("love", height=8, width=8, num_inference_steps=2).images[0]
  assert image.size == (8, 8)
  card = (out / "model" / "README.md").read_text(encoding="utf-8")
  assert "win rate over the reference" in card and "CC-BY 4.0" in card


def test_the_stages_one_by_one(demo, tiny_base, tmp_path):
  """prepare, train, evaluate, export and sample as commands give what the demo gave."""
  out, settings, _ = demo
  data, trained, model = tmp_path / "data", tmp_path / "train", tmp_path / "model"
  run("prepare", "--data", data, *settings)
  run("train", "--data", data, "--out", trained, *settings)
  run("evaluate", "--run", trained, "--out", tmp_path / "eval", *settings)
  evaluation = tmp_path / "eval" / "evaluation.json"
  run("export", "--run", trained, "--out", model, "--evaluation", evaluation)
  name = "unet/diffusion_pytorch_model.safetensors"
  assert (model / name).read_bytes() == (out / "model" / name).read_bytes()
  mine, theirs = (
    json.loads(path.read_text()) for path in (evaluation, out / "evaluation" / "evaluation.json")
  )
  assert mine == theirs
  run("sample", "--run", trained, "--prompt", "love", "--out", tmp_path / "images", *settings)
  assert (tmp_path / "images" / "grid.png").exists()


def test_a_run_and_its_export_beside_the_reference(demo, tiny_base, tmp_path, capsys):
  """`dmpo evaluate A B C`: the same noise and measure as the run's own evaluation."""
  out, settings, _ = demo
  models = [f"reference={tiny_base}", f"policy={out / 'train'}", f"export={out / 'model'}"]
  arguments = ["evaluate", *models, "--prompts", "emoji", "--out", tmp_path / "three", *settings]
  assert cli.main([str(each) for each in arguments]) == 0
  assert "export" in capsys.readouterr().out
  result = json.loads((tmp_path / "three" / "comparison.json").read_text())
  by_use, match = (
    next(each for each in result["results"] if each["measure"] == name)
    for name in ("uses", "prompt match")
  )
  rates = {(each["model"], each["over"]): each["win_rate"] for each in by_use["pairs"]}
  assert rates["export", "policy"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
  evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
  assert rates["policy", "reference"] == pytest.approx(evaluation["overall_win_rate"])
  for model in ("reference", "policy"):
    assert match["means"][model] == pytest.approx(evaluation[model]["prompt_match"])
