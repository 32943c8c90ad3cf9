"""`stages.prepare`: what it encodes with, on which devices, and what it refuses."""

import dataclasses
import hashlib
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys

import jax
import numpy as np
import pair_files
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import cli, stages
from dmpo_jax.data import images

FREE = {"data.dataset": "pairs", "data.resize": "bilinear"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
  """A folder of 12 pairs; long pictures, so that there is room to crop."""
  folder = tmp_path_factory.mktemp("own")
  generator = np.random.default_rng(0)
  lines = []
  for number in range(12):
    names = {"winner": f"{number}a.png", "loser": f"{number}b.png"}
    for name in names.values():
      pixels = generator.integers(0, 256, (12, 40, 3), np.uint8)
      (folder / name).write_bytes(images.encode_png(images.Image.fromarray(pixels)))
    lines.append({"caption": f"a picture {number % 5}", **names})
  pair_files.write_jsonl(folder / "train.jsonl", lines)
  return folder


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def kind(request, tmp_path_factory):
  return tiny.make_base(tmp_path_factory.mktemp(request.param), kind=request.param)


def settings(own, **more):
  return {**FREE, "data.path": own, **more}


def prepare(base_folder, own, data, **more):
  config = tiny.config(base_folder, **settings(own, **more))
  return stages.prepare(config, base_lib.load_base(config.base, parts=("vae",)), data)


def digests(folder):
  """File -> digest, of all files in a folder and below."""
  files = (path for path in sorted(folder.rglob("*")) if path.is_file())
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
  }


@pytest.mark.parametrize(
  ("resolution", "devices", "expected"),
  [(8, 1, 64), (32, 8, 512), (181, 1, 64), (182, 1, 56), (512, 4, 32), (513, 4, 4), (4096, 3, 3)],
)
def test_a_batch_is_64_pictures_or_a_multiple_of_8_or_one_a_device(resolution, devices, expected):
  assert stages.encode_batch(resolution, devices) == expected


def test_the_demo_is_encoded_as_before(tiny_data):
  """A device gets 64 small pictures at once, of one emoji shard; nothing new is in the files."""
  assert stages.encode_batch(32, 1) == 64
  started = json.loads(next(tiny_data.rglob("started.json")).read_text())
  assert set(started) == {
    *("fingerprint", "source", "source_id", "resolution", "geometry", "time_ids", "shards")
  }
  assert not list(tiny_data.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_recipe_is_for_all_devices_of_this_process(tiny_base, own):
  config = tiny.config(tiny_base, **settings(own))
  recipe = stages.make_recipe(config, base_lib.load_base(config.base))
  assert recipe.batch_size == 64 * jax.local_device_count() == 512
  assert recipe.embed is None and not recipe.time_ids
  pictures = np.random.default_rng(0).uniform(-1, 1, (512, 8, 8, 3)).astype(np.float32)
  base = base_lib.load_base(config.base)
  expected = jax.jit(base.encode)(base.params["vae"], pictures[-3:])
  # 1e-5: float32 sums of another batch.
  np.testing.assert_allclose(recipe.encode_images(pictures)[-3:], expected, atol=1e-5)


@pytest.mark.slow
def test_crops_may_be_drawn_apart(tiny_base, own, tmp_path):
  """`data.independent` leaves the winner where it was and crops the loser by a draw of its own."""
  free = {"data.crop": "random"}
  together = prepare(tiny_base, own, tmp_path / "a", **free)
  apart = prepare(tiny_base, own, tmp_path / "b", **free, **{"data.independent": True})
  assert apart.metadata["geometry"] == together.metadata["geometry"] | {"independent": True}
  same = {
    side: [
      np.array_equal(a[f"moments_{side}"], b[f"moments_{side}"])
      for a, b in zip(together.splits["train"], apart.splits["train"], strict=True)
    ]
    for side in ("w", "l")
  }
  assert all(same["w"]) and sum(same["l"]) < len(same["l"]) / 2
  with pytest.raises(ValueError, match=r"made with another geometry \(there .*independent': Fal"):
    prepare(tiny_base, own, tmp_path / "a", **free, **{"data.independent": True})


@pytest.mark.slow
def test_stored_embeddings_are_those_of_the_text_encoders(kind, own, tmp_path):
  encoded = prepare(kind, own, tmp_path, **{"data.prompt_embeds": True})
  base = base_lib.load_base(str(kind))
  records = [encoded.splits["train"][i] for i in range(len(encoded.splits["train"]))]
  assert encoded.metadata["prompt_embeds"] and len(records) > 5
  ids = base.tokenizer([record["caption"] for record in records] + [""])
  expected = jax.jit(base.embed)(base.text_params, ids)
  wanted = {"prompt_embeds": expected.prompt_embeds}
  if expected.added is not None:
    wanted["text_embeds"] = expected.added.text_embeds
  found = [*records, encoded.empty_caption]
  for name, value in wanted.items():
    stored = np.stack([each[name] for each in found])
    assert stored.dtype == np.float16
    # Half a float16 step of values up to 4, and float32 sums of another batch.
    np.testing.assert_allclose(stored, value, atol=2e-3, rtol=5e-4)
  assert set(encoded.empty_caption) == {"input_ids", *wanted}
  np.testing.assert_array_equal(np.stack([each["input_ids"] for each in found]), ids)
  assert ("text_embeds" in records[0]) == (len(base.encoders) == 2)


@pytest.mark.slow
def test_embeddings_do_not_depend_on_how_training_computes(tiny_base, own, tmp_path):
  first = prepare(tiny_base, own, tmp_path / "a", **{"data.prompt_embeds": True})
  more = {"data.prompt_embeds": True, "precision.compute": "bfloat16"}
  config = tiny.config(tiny_base, **settings(own, **more))
  base = base_lib.load_base(config.base, compute="bfloat16")
  second = stages.prepare(config, base, tmp_path / "b")
  assert digests(tmp_path / "a") == digests(tmp_path / "b")
  assert first.metadata == second.metadata
  opened = stages.open_data(config, base, tmp_path / "b")
  assert opened.metadata == second.metadata


@pytest.mark.slow
def test_the_fingerprint_with_embeddings_is_of_the_text_encoders_too(tiny_base, own, tmp_path):
  base = base_lib.load_base(str(tiny_base))
  parts = dict(base.params)
  parts["text_encoder"] = jax.tree.map(lambda x: x + 1e-3, parts["text_encoder"])
  other = dataclasses.replace(base, params=parts)
  assert base.data_fingerprint() == other.data_fingerprint()
  assert base.data_fingerprint(text_encoders=True) != other.data_fingerprint(text_encoders=True)
  assert base.data_fingerprint() != base.data_fingerprint(text_encoders=True)
  # Parameters that were not asked for are read for it.
  few = base_lib.load_base(str(tiny_base), parts=("unet",))
  assert few.data_fingerprint(text_encoders=True) == base.data_fingerprint(text_encoders=True)
  assert few.data_fingerprint() == base.data_fingerprint() and set(few.params) == {"unet"}
  # What was embedded by one base is refused by the other; what was only tokenized is not.
  for wanted in (True, False):
    config = tiny.config(tiny_base, **settings(own, **{"data.prompt_embeds": wanted}))
    stages.prepare(config, base, tmp_path / str(wanted))
    assert stages.open_data(config, base, tmp_path / str(wanted)).empty_caption
    if wanted:
      with pytest.raises(ValueError, match=r"made with another VAE or tokenizer .*there True\)"):
        stages.open_data(config, other, tmp_path / str(wanted))
    else:
      stages.open_data(config, other, tmp_path / str(wanted))


@pytest.mark.slow
def test_data_with_and_without_embeddings_are_not_mistaken(tiny_base, own, tmp_path, capsys):
  plain = tiny.overrides(tiny_base, **settings(own, batch_size=8))
  embeds = [*plain, "--config.data.prompt_embeds=True"]
  assert cli.main(["prepare", "--data", str(tmp_path), *plain]) == 0, capsys.readouterr().err
  assert cli.main(["prepare", "--data", str(tmp_path), *embeds]) == 2
  assert "prompt_embeds (there False, wanted True)" in capsys.readouterr().err
  command = ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
  assert cli.main([*command, *embeds]) == 2
  assert "or with another data.prompt_embeds (there False)" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["gs://bucket/data", "s3://bucket/data"])
def test_an_address_is_no_path(tiny_base, own, tmp_path, capsys, monkeypatch, place):
  monkeypatch.chdir(tmp_path)
  command = ["prepare", "--data", place, *tiny.overrides(tiny_base, **settings(own))]
  assert cli.main(command) == 2
  assert "--data: expected a path, got the address" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_beam_is_asked_for_where_it_is_not_installed(tiny_base, own, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  overrides = tiny.overrides(tiny_base, **settings(own))
  assert cli.main(["prepare", "--data", str(tmp_path / "data"), "--beam=", *overrides]) == 2
  assert "apache-beam is not installed; run `pip install 'dmpo_jax[beam]'`" in (
    capsys.readouterr().err
  )
  assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_a_worker_makes_the_same_recipe_or_none(tiny_base, own):
  more = {"data.prompt_embeds": True, "data.flip": 0.5}
  config = tiny.config(tiny_base, **settings(own, **more))
  base = base_lib.load_base(config.base, parts=("vae",))
  maker = stages.WorkerRecipe(config, base.data_fingerprint(text_encoders=True))
  copy = pickle.loads(pickle.dumps(maker))  # as Beam sends it
  assert copy == maker and hash(copy) == hash(maker)
  there, here = copy(), stages.make_recipe(config, base)
  assert there.geometry == here.geometry and there.batch_size == here.batch_size
  ids = base.tokenizer(["love"])
  np.testing.assert_array_equal(there.embed(ids)["prompt_embeds"], here.embed(ids)["prompt_embeds"])
  wrong = stages.WorkerRecipe(config, base.data_fingerprint())
  with pytest.raises(ValueError, match="this worker has another than the process that started"):
    wrong()


def run_python(code, *arguments, **environment):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parent,
    env={**os.environ, **environment},
  )


PREPARE = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import tiny
from dmpo_jax import base, stages

config = tiny.config(sys.argv[2], **{
  "data.dataset": "pairs", "data.resize": "bilinear", "data.path": sys.argv[3],
  "data.prompt_embeds": True,
})
loaded = base.load_base(config.base)
print(stages.make_recipe(config, loaded).batch_size)
import pathlib
stages.prepare(config, loaded, pathlib.Path(sys.argv[4]))
"""


@pytest.mark.slow
def test_three_devices_share_the_work(tiny_base, own, tmp_path):
  """A number of devices that divides neither 64 pictures nor 64 captions."""
  children = {
    count: run_python(PREPARE, count, tiny_base, own, tmp_path / str(count)) for count in (1, 3)
  }
  for count, child in children.items():
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    assert output == f"{64 * count}\n"
  config = tiny.config(tiny_base, **settings(own, **{"data.prompt_embeds": True}))
  base = base_lib.load_base(config.base)
  one, three = (stages.open_data(config, base, tmp_path / str(count)) for count in children)
  assert one.metadata["counts"] == three.metadata["counts"]
  for pair, other in zip(one.splits["train"], three.splits["train"], strict=True):
    assert pair["couple"] == other["couple"]
    for name in ("moments_w", "moments_l", "prompt_embeds"):
      # A float16 step: float32 sums of another batch may round the other way.
      np.testing.assert_allclose(pair[name], other[name], rtol=1e-3, atol=1e-4)


TWO = """
import sys
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
import pathlib
import tiny
from dmpo_jax import base, stages

config = tiny.config(sys.argv[3])
try:
  stages.prepare(config, base.load_base(config.base), pathlib.Path(sys.argv[4]))
except ValueError as error:
  print(error)
"""


@pytest.mark.slow
def test_one_of_several_processes_is_refused(tiny_base, tmp_path):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  children = [run_python(TWO, port, i, tiny_base, tmp_path / "data") for i in range(2)]
  for child in children:
    output, errors = child.communicate()
    assert child.returncode == 0, errors
    assert output.startswith("prepare: expected one process, got 2")
  assert not (tmp_path / "data").exists()
