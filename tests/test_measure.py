"""What an evaluation reports: scores of images, intervals, and the noise behind both models."""

import pathlib

import numpy as np
import pytest

from dmpo_jax import evaluate
from dmpo_jax.data.emoji_choice import emoji as emoji_lib
from dmpo_jax.data.emoji_choice import measure
from dmpo_jax.data.emoji_choice import pairs as pairs_lib

USES = {"a": 50, "b": 30, "c": 30, "d": 10, "e": 7, "f": 100}
KEYWORDS = {
  "a": ("warm", "red"),
  "b": ("warm", "blue"),
  "c": ("warm",),
  "d": ("warm", "blue"),
  "e": ("blue",),
  "f": ("lonely",),
}


@pytest.fixture(scope="module")
def emoji():
  return tuple(
    emoji_lib.Emoji(name, name, KEYWORDS[name], uses, pathlib.Path("unused"))
    for name, uses in USES.items()
  )


@pytest.fixture(scope="module")
def real():
  """Six drawings, each a shade."""
  shades = np.linspace(-1, 1, 6, dtype=np.float32)
  return np.broadcast_to(shades[:, None, None, None], (6, 2, 2, 3))


def pictures(real, rows, offset=0.0):
  """[p, s, ...] images that are the named drawings."""
  positions = [[list(USES).index(name) for name in row] for row in rows]
  return real[np.array(positions)] + np.float32(offset)


# --- nearest ---


def test_nearest_is_that_of_a_search_in_float64():
  generator = np.random.default_rng(0)
  images = generator.uniform(-1, 1, (40, 5, 4, 3)).astype(np.float32)
  real = generator.uniform(-1, 1, (25, 5, 4, 3)).astype(np.float32)
  nearest, rmse = measure.find_nearest(images, real)
  for i, image in enumerate(images):
    found = [np.sqrt(np.mean((np.float64(image) - np.float64(each)) ** 2)) for each in real]
    assert nearest[i] == np.argmin(found)
    assert rmse[i] == pytest.approx(min(found), rel=1e-14)


def test_a_drawing_itself_is_at_distance_zero(emoji):
  """Exactly, where |a|^2 - 2 a.b + |b|^2 alone would leave a rounding; on real drawings."""
  drawings = evaluate.real_images(emoji_lib.load_emoji(20), 16)
  assert drawings.dtype == np.float32 and drawings.shape == (20, 16, 16, 3)
  nearest, rmse = measure.find_nearest(drawings, drawings)
  assert nearest.tolist() == list(range(20)) and (rmse == 0).all()
  noisy = drawings + np.random.default_rng(1).normal(0, 0.1, drawings.shape).astype(np.float32)
  nearest, rmse = measure.find_nearest(noisy, drawings)
  assert nearest.tolist() == list(range(20))
  np.testing.assert_allclose(rmse, 0.1, rtol=0.15)  # 768 values: 3 % is one standard error


# --- scores ---


def test_ranks_by_hand():
  """warm: a 50, b 30, c 30, d 10 -> places 3, 1.5, 1.5, 0 of 3."""
  ranks = measure.normalised_ranks(np.array([50, 30, 30, 10]))
  np.testing.assert_allclose(ranks, [1.0, 0.5, 0.5, 0.0])
  assert measure.normalised_ranks(np.array([7, 7, 7])).tolist() == [0.5, 0.5, 0.5]
  assert measure.normalised_ranks(np.array([1, 2])).tolist() == [0.0, 1.0]
  shuffled = np.random.default_rng(2).permutation(24)
  np.testing.assert_allclose(measure.normalised_ranks(shuffled), shuffled / 23)


def test_scores_by_hand(emoji, real):
  rows = [["a", "b", "d", "e"], ["b", "d", "e", "a"]]
  scores = measure.score(pictures(real, rows, 0.1), ("warm", "blue"), emoji, real)
  assert scores.nearest.tolist() == [[0, 1, 3, 4], [1, 3, 4, 0]]
  assert scores.match.tolist() == [[True, True, True, False], [True, True, True, False]]
  assert scores.uses.tolist() == [[50, 30, 10, 0], [30, 10, 7, 0]]
  # warm: a 50, b = c 30, d 10; blue: b 30, d 10, e 7.
  np.testing.assert_allclose(scores.use_rank, [[1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]])
  np.testing.assert_allclose(scores.rmse, 0.1, rtol=1e-6)


def test_images_off_the_prompt_score_nothing_however_popular(emoji, real):
  scores = measure.score(pictures(real, [["f", "e", "a"]]), ("warm",), emoji, real)
  assert scores.match.tolist() == [[False, False, True]]
  assert scores.uses.tolist() == [[0, 0, 50]]
  assert scores.use_rank.tolist() == [[0.0, 0.0, 1.0]]


def test_prompts_that_no_two_emoji_carry_are_refused(emoji, real):
  images = pictures(real, [["a"]])
  for prompt in ("lonely", "red", "unheard of"):
    with pytest.raises(ValueError) as caught:
      measure.score(images, (prompt,), emoji, real)
    assert str(caught.value) == (
      f"prompt {prompt!r}: expected a keyword that 2 to 24 of the 6 emoji carry"
    )


def test_comparison_by_hand_and_its_mirror(emoji, real):
  rows = {
    #            win  lose  tie: b = c  off loses  off wins nothing over off
    "policy": [["a", "d", "b", "f", "e"]],
    "reference": [["b", "a", "c", "d", "f"]],
  }
  scored = {
    name: measure.score(pictures(real, each), ("warm",), emoji, real) for name, each in rows.items()
  }
  wins = measure.compare(scored["policy"], scored["reference"])
  assert wins.tolist() == [[1.0, 0.0, 0.5, 0.0, 0.5]]
  np.testing.assert_array_equal(measure.compare(scored["reference"], scored["policy"]), 1 - wins)
  assert (measure.compare(scored["policy"], scored["policy"]) == 0.5).all()


def test_rank_among_pairs_and_decided_comparisons_by_hand(emoji, real):
  """Against a slow reading of the definitions, one image at a time."""
  prompts = ("warm", "blue")
  names = [each.character for each in emoji]
  pairs = pairs_lib.form_pairs(emoji)
  assert {pair.caption for pair in pairs} & set(prompts), "the fixture forms no pairs"
  draws = [names, names[::-1]]
  scores = measure.score(pictures(real, draws), prompts, emoji, real)
  other = measure.score(pictures(real, [names[1:] + names[:1]] * 2), prompts, emoji, real)
  ranks = measure.rank_among(scores, prompts, emoji, pairs)
  decided = measure.decided_on(scores, other, emoji, pairs)
  for i, prompt in enumerate(prompts):
    for j in range(len(names)):
      mine, theirs = (emoji[each.nearest[i, j]] for each in (scores, other))
      met = [p for p in pairs if p.caption == prompt and mine in (p.winner, p.loser)]
      if prompt not in mine.keywords:
        assert ranks[i, j] == 0.0
      elif not met:
        assert np.isnan(ranks[i, j])
      else:
        assert ranks[i, j] == np.mean([p.winner == mine for p in met])
      shown = [prompt in each.keywords for each in (mine, theirs)]
      couple = any({p.winner, p.loser} == {mine, theirs} for p in pairs)
      assert decided[i, j] == (shown[0] != shown[1] or (all(shown) and couple))


def test_only_counted_values_enter_the_interval():
  values = np.array([[1.0, 0.0], [1.0, 0.25], [0.5, 0.5]])
  counted = np.array([[True, False], [True, True], [False, False]])
  assert evaluate.bootstrap(values, counted).mean == pytest.approx(2.25 / 3)
  assert np.isnan(evaluate.bootstrap(values, np.zeros_like(counted)).mean)
  with_nan = np.where(counted, values, np.nan)
  assert evaluate.bootstrap(with_nan, counted) == evaluate.bootstrap(values, counted)


def test_summary_takes_scores_as_they_are(emoji, real):
  scores = measure.score(pictures(real, [["a", "e"], ["b", "e"]]), ("warm", "blue"), emoji, real)
  summary = evaluate.summarise(scores)
  assert {name: each.mean for name, each in summary.items()} == {
    "prompt_match": 0.75,
    "rmse": 0.0,
    "use_rank": 0.5,  # warm (1 + 0) / 2, blue (1 + 0) / 2
  }
  assert (summary["prompt_match"].low, summary["prompt_match"].high) == (0.5, 1.0)


# --- intervals ---


def test_interval_is_the_normal_approximation_for_many_rows():
  values = np.random.default_rng(3).normal(2.0, 3.0, (1000, 1))
  mean, low, high = evaluate.bootstrap(values)
  error = values.std() / 1000**0.5
  assert mean == pytest.approx(values.mean(), rel=1e-12)
  # The 2.5 % quantile of 2000 draws has a standard error of 0.06 of the mean's: three of these.
  assert abs(low - (mean - 1.96 * error)) < 0.18 * error
  assert abs(high - (mean + 1.96 * error)) < 0.18 * error


def test_interval_covers_the_truth_about_as_often_as_it_says():
  generator, hits, trials = np.random.default_rng(4), 0, 200
  for seed in range(trials):
    prompts = generator.beta(2, 2, (40, 1))
    wins = (generator.random((40, 4)) < prompts).astype(np.float64)
    interval = evaluate.bootstrap(wins, seed=seed)
    hits += interval.low <= 0.5 <= interval.high
  # 95 %, a little less with 40 rows; standard error of 200 trials 1.6 %.
  assert 0.89 < hits / trials < 0.99


def test_rows_are_resampled_and_not_images():
  """Copies of an image say nothing new."""
  rows = np.random.default_rng(5).random((12, 1))
  assert evaluate.bootstrap(rows.repeat(50, axis=1)) == pytest.approx(evaluate.bootstrap(rows))
  # Images that differ within rows only leave no doubt about the mean of rows.
  assert evaluate.bootstrap(np.tile([[0.0, 1.0]], (12, 1))) == (0.5, 0.5, 0.5)


def test_interval_is_a_function_of_values_and_seed():
  rows = np.random.default_rng(6).random((12, 3))
  assert evaluate.bootstrap(rows) == evaluate.bootstrap(rows.copy(), seed=0)
  assert evaluate.bootstrap(rows)[1:] != evaluate.bootstrap(rows, seed=1)[1:]
  assert evaluate.bootstrap(rows).mean == evaluate.bootstrap(rows, seed=1).mean


# --- noise ---

SHAPE = (4, 4, 3)


def test_noise_depends_on_seed_prompt_and_number_only():
  full = evaluate.initial_noise(["cat", "dog", "sun"], 5, SHAPE, 7)
  assert full.shape == (3, 5, *SHAPE) and full.dtype == np.float32
  np.testing.assert_array_equal(
    evaluate.initial_noise(["sun", "cat"], 2, SHAPE, 7), full[[2, 0], :2]
  )
  for other in (
    evaluate.initial_noise(["cat", "dog", "sun"], 5, SHAPE, 8),
    evaluate.initial_noise(["cat ", "Dog", "s\u00fcn"], 5, SHAPE, 7),
  ):
    assert (other != full).mean() > 0.99
  flat = full.reshape(15, -1)
  assert len(np.unique(flat, axis=0)) == 15


def test_noise_is_standard_normal_and_independent():
  prompts = [f"prompt {i}" for i in range(40)]
  flat = evaluate.initial_noise(prompts, 8, SHAPE, 0).reshape(320, -1).astype(np.float64)
  count = flat.size
  assert abs(flat.mean()) < 4 / count**0.5
  assert abs(flat.var() - 1) < 4 * (2 / count) ** 0.5
  between = np.corrcoef(flat)[np.triu_indices(320, 1)]
  assert abs(between.mean()) < 4 / (len(between) * flat.shape[1]) ** 0.5
  assert abs(between).max() < 0.85
