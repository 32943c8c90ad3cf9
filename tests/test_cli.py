"""The command: what it refuses, with which words, and that it then has touched nothing."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pair_files
import pytest
import safetensors.numpy
import tiny

from dmpo_jax import cli


def fail(capsys, *arguments):
  assert cli.main([str(each) for each in arguments]) == 2
  return capsys.readouterr().err


@pytest.fixture
def broken(tiny_base, tmp_path):
  """A copy of the tiny base, to be damaged."""
  return shutil.copytree(tiny_base, tmp_path / "broken")


def test_help_names_every_command(capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main(["--help"])
  assert stop.value.code == 0
  shown = capsys.readouterr().out
  for command in "demo prepare train sample evaluate export import doctor base".split():
    assert command in shown


def test_runs_as_a_module():
  result = subprocess.run(
    [sys.executable, "-m", "dmpo_jax.cli", "train", "--help"], capture_output=True, text=True
  )
  assert result.returncode == 0 and "--data" in result.stdout


@pytest.mark.parametrize(
  "override, message",
  [
    ("--config.optim.lr=1", "lr"),
    ("--config.steps=many", "many"),
    ("--config.objective.alpha=0.7", "alpha"),
    ("--config.objective.alpha=0.5", "alpha"),
    ("--config.objective.beta=-1.0", "objective.beta: expected > 0 and finite, got -1.0"),
    ("--config.objective.method=ppo", "expected one of dmpo, dpo, fpo, ipo"),
    ("--config.objective.label_smoothing=0.1", "method 'dmpo' does not read it"),
    ("--config.precision.reference=bfloat16", "would make the margins of step 0 differ"),
    ("--config.data.dataset=pickapic", "expected one of emoji_choice/top160"),
    ("--config.steps", "expected --config.FIELD=VALUE"),
  ],
)
def test_bad_settings(capsys, tiny_base, tmp_path, override, message):
  out = tmp_path / "out"
  error = fail(capsys, "demo", "--out", out, f"--config.base={tiny_base}", override)
  assert message in error and error.startswith("dmpo demo: error: ")
  assert not (out / "data").exists() and not (out / "train" / "checkpoints").exists()


def test_missing_configuration(capsys, tmp_path):
  error = fail(capsys, "demo", "--out", tmp_path / "o", "--config", "configs/none.py")
  assert "configuration 'configs/none.py': no such file; expected for example configs/" in error


def test_batch_not_divisible_by_devices(capsys, tiny_base, tiny_data, tmp_path):
  settings = tiny.overrides(tiny_base, batch_size=12)
  error = fail(capsys, "train", "--data", tiny_data, "--out", tmp_path / "o", *settings)
  assert "batch_size: 12 cannot be split over 8 device(s)" in error
  assert "8 or 16" in error and not (tmp_path / "o").exists()


def test_data_that_is_not_prepared(capsys, tiny_base, tmp_path):
  settings = tiny.overrides(tiny_base)
  error = fail(capsys, "train", "--data", tmp_path / "d", "--out", tmp_path / "o", *settings)
  assert "no encoded data set there; run `dmpo prepare`" in error


def test_truncated_data(capsys, tiny_base, tiny_data, tmp_path):
  data = shutil.copytree(tiny_data, tmp_path / "d")
  (file,) = (data / "latents").glob("*/*train*array_record*")
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  settings = tiny.overrides(tiny_base)
  error = fail(capsys, "train", "--data", data, "--out", tmp_path / "o", *settings)
  assert file.name in error


@pytest.mark.slow
def test_data_of_another_base(capsys, tiny_data, tmp_path):
  settings = tiny.overrides(tiny.make_base(tmp_path / "other", seed=1))
  error = fail(capsys, "train", "--data", tiny_data, "--out", tmp_path / "o", *settings)
  assert "made with another VAE or tokenizer" in error


def test_base_that_is_no_folder(capsys, tmp_path):
  error = fail(capsys, "sample", "--model", tmp_path, "--prompt", "x", "--out", tmp_path / "o")
  assert "model_index.json does not exist; expected a folder in diffusers' layout" in error


@pytest.mark.parametrize(
  "name",
  [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
  ],
)
def test_base_without_a_file(capsys, broken, tmp_path, name):
  (broken / name).unlink()
  (broken / "tokenizer" / "tokenizer.json").unlink()
  error = fail(capsys, "sample", "--model", broken, "--prompt", "x", "--out", tmp_path / "o")
  assert name.split("/")[0] in error and name.split("/")[1].split(".")[0] in error


def test_base_with_a_misshapen_tensor(capsys, broken, tmp_path):
  file = broken / "unet" / "diffusion_pytorch_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["conv_in.weight"] = np.zeros((8, 4, 1, 1), np.float32)
  safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
  error = fail(capsys, "sample", "--model", broken, "--prompt", "x", "--out", tmp_path / "o")
  assert "'conv_in.weight' has shape (8, 4, 1, 1), expected (8, 4, 3, 3)" in error


def test_base_with_an_unimplemented_field(capsys, broken, tmp_path):
  path = broken / "unet" / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "class_embed_type": "timestep"}))
  error = fail(capsys, "sample", "--model", broken, "--prompt", "x", "--out", tmp_path / "o")
  assert "field 'class_embed_type' is 'timestep', which is not implemented" in error


@pytest.mark.slow
def test_sample_writes_a_grid_and_single_images(capsys, tiny_base, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("love\n\nsad\n")
  out = tmp_path / "images"
  arguments = ["sample", "--model", tiny_base, "--prompts", prompts, "--prompt", "dog"]
  arguments += ["--out", out, *tiny.overrides(tiny_base, **{"sampling.images_per_prompt": 2})]
  assert cli.main([str(each) for each in arguments]) == 0
  names = sorted(path.name for path in out.glob("*_*.png"))
  assert names == [f"{i:04d}_{j:02d}.png" for i in range(3) for j in range(2)]
  assert (out / "grid.png").exists()
  assert (out / "prompts.txt").read_text().splitlines() == ["0000 dog", "0001 love", "0002 sad"]
  before = (out / "grid.png").read_bytes()
  assert "already holds images; give another --out" in fail(capsys, *arguments)
  assert (out / "grid.png").read_bytes() == before


@pytest.mark.slow
def test_sample_depends_on_the_seed_alone(tiny_base, tmp_path):
  grids = []
  for name, seed in (("a", 3), ("b", 3), ("c", 4)):
    arguments = ["sample", "--model", tiny_base, "--prompt", "love", "--seed", seed]
    arguments += ["--out", tmp_path / name, *tiny.overrides(tiny_base)]
    assert cli.main([str(each) for each in arguments]) == 0
    grids.append((tmp_path / name / "grid.png").read_bytes())
  assert grids[0] == grids[1] != grids[2]


def test_sample_needs_prompts(capsys, tiny_base, tmp_path):
  error = fail(capsys, "sample", "--model", tiny_base, "--out", tmp_path / "o")
  assert "no prompts; give --prompt TEXT or --prompts FILE" in error


@pytest.mark.slow
def test_long_caption_is_truncated_with_a_counted_warning(tiny_base, tmp_path):
  arguments = ["sample", "--model", tiny_base, "--prompt", "love " * 100, "--prompt", "sad"]
  arguments += ["--out", tmp_path / "o", *tiny.overrides(tiny_base)]
  with pytest.warns(UserWarning, match="1 .*77"):
    assert cli.main([str(each) for each in arguments]) == 0


def test_export_of_no_run(capsys, tmp_path):
  error = fail(capsys, "export", "--run", tmp_path, "--out", tmp_path / "o")
  assert "no run.json; expected the folder of a training run" in error


@pytest.mark.slow
def test_doctor_of_sound_pairs(capsys, tmp_path):
  folder = pair_files.write_drawings(tmp_path / "own")
  arguments = ["doctor", "data", "pairs", "--path", str(folder), "--out", str(tmp_path / "out")]
  assert cli.main(arguments) == 0, capsys.readouterr().err
  assert json.loads((tmp_path / "out" / "doctor.json").read_text())
  page = (tmp_path / "out" / "doctor.html").read_text(encoding="utf-8")
  assert "drawing" in page and "page: " in capsys.readouterr().out


@pytest.mark.slow
def test_doctor_of_broken_pairs_fails(capsys, tmp_path):
  folder = pair_files.write_drawings(tmp_path / "own", broken=5)
  arguments = ["doctor", "data", "pairs", "--path", str(folder), "--out", str(tmp_path / "out")]
  assert cli.main(arguments) == 1
  assert "broken-row" in capsys.readouterr().out


@pytest.mark.slow
def test_doctor_of_nothing(capsys, tmp_path):
  out = tmp_path / "out"
  assert "pickapic_v2" in fail(capsys, "doctor", "data", "none", "--out", out)
  assert "path" in fail(capsys, "doctor", "data", "pairs", "--out", out)
