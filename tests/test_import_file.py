import json

import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import cli, export, import_file, safetensors_io

pytestmark = pytest.mark.slow  # a base of each kind is made and read several times


@pytest.fixture(scope="module", params=list(tiny.KINDS))
def single(request, tmp_path_factory):
  """A base of each kind as a folder and as a single file."""
  folder = tmp_path_factory.mktemp(request.param)
  base = base_lib.load_base(str(tiny.make_base(folder, kind=request.param, wide=True)))
  file = export.export_single_file(base, folder / "model.safetensors", trained={})
  return base, file


def import_again(single, out, **settings):
  base, file = single
  if base.schedule.prediction_type == "v_prediction":
    settings = {"prediction_type": "v_prediction"} | settings
  tokenizer = base.folder / "tokenizer"
  return import_file.import_checkpoint(file, out, tokenizer=tokenizer, resolution=8, **settings)


def test_folder_to_file_to_folder_keeps_every_tensor(single, tmp_path):
  base, _ = single
  folder = import_again(single, tmp_path / "model")
  assert base_lib.load_base(str(folder)).pipeline == base.pipeline
  for part in base.models:
    before, after = (safetensors_io.load_safetensors(each / part) for each in (base.folder, folder))
    assert set(before) == set(after)
    for name in before:
      assert before[name].tobytes() == after[name].tobytes(), name
  assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_are_padded_as_before(single, tmp_path):
  base, _ = single
  again = base_lib.load_base(str(import_again(single, tmp_path / "model")))
  captions = ["love", "a sad cat!"]
  ids = again.tokenizer(captions)
  if base.folder.parent.name.startswith("sd2"):  # the small one pads with its end token
    return
  np.testing.assert_array_equal(ids, base.tokenizer(captions))


def test_bad_input(single, tmp_path):
  base, file = single
  with pytest.raises(ValueError, match="vocab.json is missing; expected CLIP's"):
    import_file.import_checkpoint(file, tmp_path / "m", tokenizer=tmp_path)
  (tmp_path / "there").mkdir()
  with pytest.raises(ValueError, match="there exists; give another folder"):
    import_again(single, tmp_path / "there")
  truncated = tmp_path / "cut.safetensors"
  truncated.write_bytes(file.read_bytes()[:-8])
  with pytest.raises(ValueError, match="cut.safetensors: expected a whole safetensors file"):
    import_again((base, truncated), tmp_path / "m")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "there"]


def test_the_command(single, tmp_path, capsys):
  base, file = single
  arguments = ["--file", str(file), "--tokenizer", str(base.folder / "tokenizer")]
  if base.schedule.prediction_type == "v_prediction":
    assert cli.main(["import", *arguments, "--out", str(tmp_path / "m")]) == 2
    assert "prediction_type" in capsys.readouterr().err
    arguments += ["--prediction-type", "v_prediction"]
  assert cli.main(["import", *arguments, "--out", str(tmp_path / "m")]) == 0
  index = json.loads((tmp_path / "m" / "model_index.json").read_text())
  assert index["_class_name"] == base.pipeline
