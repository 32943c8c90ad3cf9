import itertools

import numpy as np
import pytest

from dmpo_jax.scorers import diversity


def random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def vendi_by_kernel(x):
  """exp of the entropy of the eigenvalues of K / n, from the definition."""
  unit = x / np.sqrt((x * x).sum(1, keepdims=True))
  eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(x))
  return np.exp(-sum(value * np.log(value) for value in eigenvalues if value > 1e-12))


@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 4), (7, 7), (6, 50)])
def test_vendi_score_equals_its_definition(shape):
  x = random(*shape)
  assert diversity.vendi_score(x) == pytest.approx(vendi_by_kernel(x), rel=1e-9)
  assert diversity.vendi_score(x.astype(np.float32)) == pytest.approx(vendi_by_kernel(x), rel=1e-5)


def test_vendi_score_counts_different_images():
  n = 5
  assert diversity.vendi_score(np.tile(random(1, 8), (n, 1))) == pytest.approx(1)
  orthogonal = np.linalg.qr(random(8, 8))[0][:n]
  assert diversity.vendi_score(orthogonal) == pytest.approx(n)
  # Each image thrice: as many different ones; lengths do not count, nor does the order.
  assert diversity.vendi_score(np.tile(orthogonal, (3, 1))) == pytest.approx(n)
  scaled = random(n, 1) ** 2 * orthogonal[::-1]
  assert diversity.vendi_score(scaled) == pytest.approx(n)
  # By hand: K has eigenvalues 1 + c and 1 - c for two images of cosine c = 0.6.
  two = np.array([[1.0, 0.0], [0.6, 0.8]])
  expected = 0.8**-0.8 * 0.2**-0.2
  assert diversity.vendi_score(two) == pytest.approx(expected)


def test_mean_pairwise_distance_equals_the_sum_over_pairs():
  x = random(9, 5)
  pairs = list(itertools.combinations(x, 2))
  expected = sum(np.sqrt(((a - b) ** 2).sum()) for a, b in pairs) / len(pairs)
  assert diversity.mean_pairwise_distance(x) == pytest.approx(expected, rel=1e-12)
  assert diversity.mean_pairwise_distance(x[::-1]) == pytest.approx(expected, rel=1e-12)
  assert diversity.mean_pairwise_distance(np.eye(6)) == pytest.approx(np.sqrt(2))
  near = np.array([[1e4, 1.0], [1e4, 1.0 + 1e-7]])  # lost by products of the rows
  assert diversity.mean_pairwise_distance(near) == pytest.approx(1e-7, rel=1e-6)
  assert diversity.mean_pairwise_distance(np.tile(x[:1], (4, 1))) == 0


@pytest.mark.parametrize(
  ("function", "x", "message"),
  [
    (diversity.vendi_score, np.zeros((0, 3)), r"shape \(0, 3\); expected \[n, d\] with n of at l"),
    (diversity.vendi_score, np.array([[1.0], [0.0]]), r"embeddings\[1\] is zero"),
    (diversity.vendi_score, np.array([[1.0], [np.inf]]), r"embeddings\[1\] is not finite"),
    (diversity.mean_pairwise_distance, np.ones((1, 3)), "n of at least 2"),
    (diversity.mean_pairwise_distance, np.array([[np.nan], [0.0]]), r"embeddings\[0\] is not fin"),
  ],
)
def test_embeddings_are_refused(function, x, message):
  with pytest.raises(ValueError, match=message):
    function(x)
