"""docs/methods.md says what the table of methods, the configurations and the plan say."""

import dataclasses
import functools
import pathlib
import re

import numpy as np
import pytest
import tiny

from dmpo_jax import cli, config, losses, plan

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = [
  [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
  for line in PAGE.splitlines()
  if re.match(r"\| `\w+` \| `emoji_", line)
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_is_true(row):
  method, file, _, fields, passes, reference = row
  read = tiny.config("emoji", path=f"configs/{file}.py")
  assert read.objective.method == method
  named = () if fields == "none" else tuple(fields.split(", "))
  assert named == tuple(f for f in config.METHODS[method] if f not in config.SAFEGUARDS)
  assert plan.minimum_forwards(read) == int(passes)
  assert read.objective.needs_reference == (reference == "yes")


def test_every_method_and_file_of_pairs_is_on_the_page():
  assert {row[0] for row in ROWS} == set(config.METHODS) - set(config.ON_IMAGES)
  for path in (ROOT / "configs").glob("emoji_*.py"):
    assert path.stem == "emoji_base" or f"`{path.stem}`" in PAGE


def test_the_method_that_is_added_works(tmp_path, monkeypatch):
  """The page's function has the slope that it says it has, and the page's file is a run."""
  function, file = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  names = {**vars(losses)}
  exec(function, names)
  loss = functools.partial(names["sigmoid_loss"], beta=2.0)  # kappa = 1
  u = np.linspace(-6, 6, 41, dtype=np.float32)
  zeros = np.zeros_like(u)
  value, parts = loss(*map(losses.jnp.asarray, (zeros, u, zeros, zeros)))
  np.testing.assert_allclose(value, 1 / (1 + np.exp(np.float64(u))), rtol=1e-5)
  slope = 1 / (2 + np.exp(np.float64(u)) + np.exp(-np.float64(u)))
  np.testing.assert_allclose(parts.gradient_weight, slope, rtol=1e-5)
  assert losses.peak_gradient_weight(loss) == pytest.approx(0.25)
  monkeypatch.setitem(config.METHODS, "sigmoid", ("beta", *config.SAFEGUARDS))
  path = tmp_path / "emoji_sigmoid.py"
  path.write_text(file)
  (tmp_path / "emoji_dmpo.py").write_text((ROOT / "configs" / "emoji_dmpo.py").read_text())
  read = config.from_dict(cli.read_config(str(path), []))
  assert dataclasses.asdict(read.objective)["method"] == "sigmoid"
