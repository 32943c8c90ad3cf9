"""comparison.py against sums by hand, scipy, and models of known difference."""

import numpy as np
import pytest
import scipy.stats

from dmpo_jax import comparison, evaluate
from dmpo_jax.data.emoji_choice import measure


@pytest.mark.parametrize("total", [1, 2, 7, 50, 3200])
def test_sign_test_is_scipys(total):
  for won in sorted({0, 1, total // 3, total // 2, total - 1, total}):
    expected = scipy.stats.binomtest(won, total).pvalue
    assert comparison.sign_test(won, total - won) == pytest.approx(expected, rel=1e-11)


def test_sign_test_at_its_ends():
  assert comparison.sign_test(1, 0) == 1.0  # 2 * 1/2
  assert comparison.sign_test(0, 10) == 2 / 1024
  assert comparison.sign_test(0, 3200) == 0.0  # 2^-3199 is no float; the sum does not overflow
  with pytest.raises(ValueError, match="at least 0, got -1 and 3"):
    comparison.sign_test(-1, 3)


def test_a_pair_by_hand():
  """Prompt 0 is won by 2 : 1, prompt 1 tied by win and loss, 2 lost; of prompt 3 nothing counts."""
  values = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.5, 0.5], [1.0, 1.0, 1.0]])
  counted = np.array([[True] * 3] * 3 + [[False] * 3])
  found = comparison.compare_pair(values, counted)
  assert found["win_rate"]["mean"] == pytest.approx((2 + 1.5 + 1.0) / 9)
  assert [found[f"prompts_{each}"] for each in ("won", "lost", "tied")] == [1, 1, 1]
  assert found["comparisons"] == 9 and found["sign_test"] == 1.0
  assert found["win_rate"] == evaluate.bootstrap(values, counted)._asdict()


def test_swapping_the_models_mirrors_everything():
  scores, others = np.random.default_rng(0).integers(0, 4, (2, 30, 5)).astype(float)
  one = comparison.compare_pair(comparison.wins(scores, others))
  two = comparison.compare_pair(comparison.wins(others, scores))
  low = comparison.compare_pair(comparison.wins(scores, others, higher=False))
  assert low == two
  assert one["win_rate"]["mean"] == pytest.approx(1 - two["win_rate"]["mean"])
  assert one["win_rate"]["low"] == pytest.approx(1 - two["win_rate"]["high"])
  assert (one["prompts_won"], one["sign_test"]) == (two["prompts_lost"], two["sign_test"])


def test_wins_by_use_are_those_of_the_emoji_measure():
  generator = np.random.default_rng(1)
  uses = generator.integers(0, 3, (2, 20, 4))
  blank = np.zeros((20, 4))
  one, two = (measure.Scores(blank.astype(int), blank, blank > 0, each, blank) for each in uses)
  expected = measure.compare(one, two)
  np.testing.assert_array_equal(comparison.wins(*map(np.float64, uses)), expected)


def test_the_interval_of_a_win_rate_covers_95_in_100():
  """Models that differ by nothing, prompts of their own spread: one half lies inside as stated."""
  generator = np.random.default_rng(0)
  inside = 0
  for _ in range(200):
    prompt = generator.standard_normal((60, 1))
    values = comparison.wins(prompt + generator.standard_normal((60, 4)), np.zeros((60, 4)))
    found = comparison.compare_pair(values)["win_rate"]
    inside += found["low"] <= 0.5 <= found["high"]
  assert 0.90 <= inside / 200 <= 0.985  # percentile bootstrap of 60 rows: about 94 %


def test_sets_and_overall():
  """A prompt of two sets counts once overall; a measure of one set alone has no overall."""
  scores = {"base": np.array([[0.0], [0.0], [0.0]]), "new": np.array([[1.0], [2.0], [6.0]])}
  whole = comparison.Measure("score", True, scores, (0, 1, 2))
  part = comparison.Measure("use", False, {m: v[:2] for m, v in scores.items()}, (0, 1))
  free = comparison.Measure("diversity", None, scores, (0, 1, 2))
  found = comparison.summarise_all([whole, part, free], {"a": [0, 1], "b": [1, 2]})
  assert [(each["measure"], each["set"]) for each in found] == [
    *(("score", name) for name in ("a", "b", "overall")),
    ("use", "a"),
    *(("diversity", name) for name in ("a", "b", "overall")),
  ]
  assert [each["means"]["new"]["mean"] for each in found[:3]] == [1.5, 4.0, 3.0]
  (pair,) = found[2]["pairs"]
  assert (pair["model"], pair["over"], pair["prompts_won"]) == ("new", "base", 3)
  assert found[3]["pairs"][0]["win_rate"]["mean"] == 0.0  # lower is better
  assert found[4]["pairs"] == [] and found[4]["better"] is None


def test_a_score_that_is_no_number_is_refused():
  scores = {"base": np.zeros((1, 2)), "new": np.array([[0.0, np.nan]])}
  with pytest.raises(ValueError, match="score of new: expected finite scores, got nan"):
    comparison.summarise(comparison.Measure("score", True, scores, (0,)), "a", [0])
