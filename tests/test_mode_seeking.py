"""The figures of docs/mode_seeking.md: the program that makes them, against NumPy in float64."""

import importlib.util
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mode_seeking.md"
GENERATORS = oracles.GENERATORS | {"alpha": oracles.alpha_generator(0.5)}


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def program():
  specification = importlib.util.spec_from_file_location(
    "mode_seeking", ROOT / "benchmarks" / "mode_seeking.py"
  )
  module = importlib.util.module_from_spec(specification)
  sys.modules["mode_seeking"] = module
  specification.loader.exec_module(module)
  return module


def table(head):
  """Rows of the page's table whose first line starts with `head`."""
  lines = PAGE.read_text(encoding="utf-8").splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
  rows = []
  for line in lines[start:]:
    if not line.startswith("|"):
      return rows
    rows.append([cell.strip() for cell in line.strip("|").split("|")])
  return rows


def numbers(cell):
  return [float(each) for each in re.findall(r"-?\d+\.\d+", cell)]


@pytest.mark.parametrize("name", GENERATORS)
def test_weights_and_curvatures_are_those_of_the_generators(program, name):
  divergence = program.DIVERGENCES[name]
  if divergence.weight is None:  # total variation has a kink at 1 and is straight elsewhere
    assert name == "tv"
    return
  r = np.array([0.1, 0.5, 1.0, 3.0, 20.0])
  f, step = GENERATORS[name], 1e-3 * r
  second = (f(r + step) - 2 * f(r) + f(r - step)) / step**2
  np.testing.assert_allclose(divergence.weight(r), r * second, rtol=1e-4)
  assert divergence.weight(np.array(1.0)) == pytest.approx(divergence.curvature)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rkl", "fkl", "js"])
def test_scores_give_the_gradient_of_the_density(program, name):
  mean, factor = jnp.array([0.3, -0.2]), jnp.array([[0.9, 0.0], [0.2, 0.7]])
  expected = jax.grad(program.objective_2d(name), argnums=(0, 1))(mean, factor)
  found = program.score_gradient(name, mean, factor)
  for ours, theirs in zip(found, (expected[0], jnp.tril(expected[1])), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_score_of_the_target_is_the_gradient_of_its_density(program):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)) * 2)
  expected = jax.vmap(jax.grad(lambda x: program.log_target_2d(x[None])[0]))(x)
  np.testing.assert_allclose(program.target_score(x), expected, rtol=1e-9)


@pytest.mark.slow
def test_the_direction_of_reinforcement_learning(program):
  """Property 12: exact, it is that of reverse KL; sampled, only in the limit."""
  found = program.rl_directions((2, 128), draws=2**14)
  np.testing.assert_allclose(found.reverse, found.rl, atol=1e-15)
  assert np.linalg.norm(found.rl) > 0.05
  assert program.cosine(found.forward, found.rl) < 0.96
  two, many = (each[0] for each in found.sampled.values())
  assert program.cosine(two, found.rl) < 0.6  # two samples: another direction
  assert np.linalg.norm(many - found.rl) < 0.1 * np.linalg.norm(found.rl)
  # J itself, in NumPy, by central differences.
  rng = np.random.default_rng(3)
  law = oracles.softmax(0.5 * rng.normal(size=9))
  logits, reward = np.log(law) + rng.normal(size=9) / 0.5, 1.5 * rng.normal(size=9)

  def minus_j(logits):
    p = oracles.softmax(0.5 * np.log(oracles.softmax(logits)) + 0.5 * np.log(law))
    return oracles.kl(p, law) - p @ reward

  steps = 1e-5 * np.eye(9)
  gradient = [(minus_j(logits + e) - minus_j(logits - e)) / 2e-5 for e in steps]
  np.testing.assert_allclose(found.rl, gradient, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmpo, soft labels", "dmpo, hard labels", "dpo", "ipo", "js"])
def test_pairs_are_the_mean_over_all_pairs(program, monkeypatch, name):
  x = np.linspace(-6, 6, 13)
  monkeypatch.setattr(program, "PAIR_X", x)
  mean, sd, m, s = 0.7, 1.3, *program.REFERENCE

  def normal(x, mean, sd):
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / sd

  target = 0.65 * normal(x, 3, 0.6) + 0.35 * normal(x, -3, 0.6)
  reference, policy = normal(x, m, s), normal(x, mean, sd)
  reward, log_ratio = np.log(target / reference), np.log(policy / reference)
  u, gap = log_ratio[:, None] - log_ratio, reward[:, None] - reward
  choice = 1 / (1 + np.exp(-gap))
  law = np.outer(reference, reference) / reference.sum() ** 2
  # Soft labels: the divergence from people's law of choice. Hard ones: the mean over what they
  # choose of the loss that trusts it.
  floor = np.clip(choice, 1e-9, 1 - 1e-9)
  labels = np.stack([floor, 1 - floor], axis=-1)
  values = {
    "dmpo, soft labels": oracles.kl(oracles.preference(u), labels),
    "js": oracles.f_divergence(oracles.preference(u), labels, oracles.GENERATORS["js"]),
    "dmpo, hard labels": choice * oracles.dmpo(u, 0.01) + (1 - choice) * oracles.dmpo(-u, 0.01),
    "dpo": choice * oracles.dpo(u, 0.0) + (1 - choice) * oracles.dpo(-u, 0.0),
    "ipo": choice * (u - 0.5) ** 2 + (1 - choice) * (-u - 0.5) ** 2,
  }[name]
  objective = program.pair_objective(*program.pair_losses()[name])
  found = objective(jnp.array([mean, math.log(sd)]))
  assert float(found) == pytest.approx(float((law * values).sum()), rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rkl", "fkl", "js"])
def test_the_page_says_what_the_program_finds(program, name):
  """Property 13, and where descent ends from the page's two starts."""
  divergence = program.DIVERGENCES[name]
  (row,) = [row for row in table("divergence") if row[0] == divergence.title]
  objective = program.exact_objective(name)
  for start, cell in zip(program.STARTS, row[3:], strict=True):
    end = program.descend(objective, start, curvature=divergence.curvature)[-1]
    np.testing.assert_allclose(end, numbers(cell), atol=0.011)
  mean, sd = numbers(row[2])
  near = [(mean + a, math.log(sd) + b) for a in (-0.1, 0, 0.1) for b in (-0.1, 0, 0.1)]
  values = jax.lax.map(objective, jnp.array(near))
  assert int(values.argmin()) == 4
  low = min(objective(jnp.array([m, math.log(s)])) for m, s in ((3.0, 0.6), (0.9, 2.92)))
  assert float(values.min()) <= float(low) + 1e-4
