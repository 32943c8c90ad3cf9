"""The report read back from its files as a browser would: what it says, what it must not do."""

import base64
import copy
import io
import math

import numpy as np
import page_reader
import pytest
from PIL import Image

from dmpo_jax import report

EVIL = """<script>alert(1)</script>"' onerror=x <b>& $\\frac{"""
LINKS = {
  "https://github.com/twitter/twemoji",
  "https://creativecommons.org/licenses/by/4.0/",
  "https://creativecommons.org/licenses/by-sa/4.0/",
  "https://hdl.handle.net/11356/1048",
}


def interval(mean, reach=0.05):
  return {"mean": mean, "low": mean - reach, "high": mean + reach}


def model(match, rmse, train, heldout):
  return {
    "prompt_match": interval(match, 0.01),
    "rmse": interval(rmse, 0.002),
    "use_rank_train": interval(train),
    "use_rank_heldout": interval(heldout),
  }


def make_summary():
  return {
    "method": "dmpo",
    "step0_margin_max": 0.0,
    "heldout_win_rate": interval(0.631),
    "seconds": {"prepare": 31.2, "train": 291.0},
    "reference": model(0.959, 0.018, 0.513, 0.541),
    "policy": model(0.942, 0.031, 0.664, 0.652),
    "samples": 1024,
    "device": "cpu",
    "versions": {"jax": "0.10.2"},
    "steps": 600,
    "beta": 1000.0,
    "alpha": 0.2,
    "learning_rate": 5e-5,
    "pairs": {"train": 1203, "validation": 190, "test": 210},
    "prompts": {"train": 120, "test": 66},
  }


def pictures(count, side=32, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def make_grid(caption="love", count=3):
  better = [1, 0, -1, 1, 1, 0, 0, 0, 0, 0][:count]
  return report.Grid(caption, "test", pictures(count), pictures(count, seed=1), better)


def make_shift(caption="love"):
  names = [f"emoji {k}" for k in range(8)]
  reference = [0.30, 0.20, 0.10, 0.10, 0.08, 0.08, 0.03, 0.01]
  policy = [0.60, 0.20, 0.05, 0.05, 0.03, 0.03, 0.02, 0.02]
  uses = [100, 900, 800, 700, 600, 500, 400, 1300]
  return report.PromptShift(caption, "test", names, pictures(8, 72), uses, reference, policy)


def make_metrics():
  rng = np.random.default_rng(0)
  metrics = []
  for step in range(0, 60, 2):
    record = {"step": step, "train/loss": 0.69 - step / 500, "train/margin": step / 60}
    record |= {"train/accuracy": 0.6, "train/winner_advantage": 1e-4 * rng.normal()}
    record |= {"train/loser_advantage": -1e-4, "train/dead_zone": 0.1, "train/grad_norm": 2.0}
    record |= {"train/learning_rate": 5e-5, "train/pairs_per_second": 42.4}
    if step % 20 == 0:
      record |= {"validation/margin": 0.1, "validation/accuracy": 0.6}
      record |= {"validation/winner_advantage": -2e-4, "validation/loser_advantage": -9e-4}
    metrics.append(record)
  return metrics


def write(folder, **changes):
  arguments = {
    "summary": make_summary(),
    "metrics": [],
    "grids": [],
    "shifts": [],
    "config": {},
    "command": "dmpo demo",
  }
  return report.write_report(folder, **(arguments | changes))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
  """A full report in which every string that may come from outside is an attack."""
  summary = make_summary() | {"device": EVIL, "versions": {EVIL: EVIL}, "pairs": {"train": 7}}
  summary["pairs"][EVIL] = 3
  summary["seconds"][EVIL] = 1.0
  curve = [model(0.9, 0.04, 0.6, 0.6) | {"label": EVIL, "split": EVIL}]
  shift = make_shift(EVIL)._replace(names=[EVIL] * 8, split=EVIL)
  return write(
    tmp_path_factory.mktemp("hostile") / "deep" / "folder",
    summary=summary,
    metrics=make_metrics(),
    grids=[make_grid(EVIL)._replace(split=EVIL), make_grid("love", 10)],
    shifts=[shift],
    config={"data": {EVIL: EVIL, "seed": 0}},
    command=EVIL,
    curve=curve,
  )


@pytest.fixture(scope="module")
def page(hostile):
  return page_reader.Reader(hostile.read_text(encoding="utf-8"))


def test_text_from_outside_stays_text(page):
  assert "script" not in page.tags
  assert not [name for _, name, _ in page.attributes if name.startswith("on")]
  # Tiles, grids, shift, its bars, verdicts: none from outside.
  assert page.tags.count("b") == 4 + 2 + 1 + 8 + 2
  # Two captions, two splits, six names of bars, device, version (2), pairs, stage, setting (2),
  # command, split of the curve.
  assert page.text.count("<script>alert(1)</script>") == 19


def test_page_is_self_contained(page, hostile):
  assert page.addresses()
  assert all(address.startswith("data:image/png;base64,") for address in page.addresses())
  assert {value for _, name, value in page.attributes if name == "href"} == LINKS
  assert not {"link", "script", "iframe", "object"} & set(page.tags)
  style = hostile.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
  assert "url(" not in style and "@import" not in style
  assert "prefers-color-scheme:dark" in style


def test_every_picture_decodes(page, hostile):
  for address in page.addresses():
    Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))).load()
  found = {}
  for path in hostile.parent.glob("*.png"):
    with Image.open(path) as image:
      image.load()
      found[path.name] = image.size
  expected = {
    "grids": (330 + 8 * 138 - 10 + 72, 2 * 266 + 40 + 72),
    "curves": (3 * 730 + 30, 3 * 500 + 30),
    "trade_off": (2 * 950 + 30, 660 + 60),
  }
  both = {f"{name}{theme}.png": expected[name] for name in expected for theme in ("", "_dark")}
  assert set(found) == set(both)
  for name, size in found.items():
    np.testing.assert_allclose(size, both[name], atol=4)  # matplotlib's versions round otherwise


def test_plots_follow_the_theme(page):
  # 9 curves and 2 trade-off plots, each with a dark twin; 1 + 2 strips of samples; 6 icons.
  assert page.tags.count("picture") == page.tags.count("source") == 11
  assert len(set(page.addresses())) == len(page.addresses()) == 22 + 3 + 6


def test_grid_section_counts_the_marks(page):
  assert "use more (4)" in page.text  # 1 of the grid of three, 3 of the grid of ten
  assert "use less (2)" in page.text
  assert "the other 7 are ties" in page.text


def test_full_configuration_versions_and_times_are_shown(page):
  for expected in ("data.seed", "31.2 s", "4 min 51 s", "42.4 pairs/s", "5e-05"):
    assert expected in page.text
  assert "Twemoji" in page.text and "CC-BY 4.0" in page.text
  assert "Emoji Sentiment Ranking 1.0" in page.text
  assert "not a rating of a drawing" in page.text


def test_curves_are_read_with_their_rules(page, tmp_path):
  said = (
    "Worse than the reference on the preferred images. Step 40: winner_advantage is −2.00e−04; "
  )
  assert f"{said}below 0 first in step 0; the margin is 0.1 nats." in page.text
  assert "Rule: winner_advantage of the last validation is below 0" in page.text
  blurred = "Evaluation: RMSE 0.031 is 1.7 times the reference's 0.018, and validation/margin 0.1"
  assert blurred in page.text
  summary = make_summary() | {"policy": model(0.942, 0.020, 0.664, 0.652)}
  records = [
    {"step": step, "validation/margin": 0.1 * step, "validation/winner_advantage": 1e-4}
    for step in range(10)
  ]
  config = {"optim": {"warmup_steps": 2}}
  written = write(tmp_path / "good", metrics=records, summary=summary, config=config)
  text = page_reader.Reader(written.read_text("utf-8")).text
  assert "Healthy. Step 9: validation/margin is 0.85 nats" in text and "Worse than" not in text
  config = {"optim": {"warmup_steps": 3}}  # one validation too few after it
  written = write(tmp_path / "few", metrics=records, summary=summary, config=config)
  assert (
    "Too early to tell. Step 9: 7 validations"
    in page_reader.Reader(written.read_text("utf-8")).text
  )


def test_bare_report(tmp_path):
  """No samples, no records, no sweep, nothing optional in the summary."""
  summary = make_summary()
  for field in ("seconds", "versions", "pairs", "prompts", "steps", "beta", "alpha", "device"):
    del summary[field]
  first = write(tmp_path / "first", summary=summary)
  page = page_reader.Reader(first.read_text("utf-8"))
  assert "No training records." in page.text
  assert "was fine-tuned on pairs of emoji" in page.text
  assert "Before and after" not in page.text and "Hollow points" not in page.text
  second = write(tmp_path / "second", summary=copy.deepcopy(summary))
  for path in first.parent.iterdir():
    assert path.read_bytes() == second.with_name(path.name).read_bytes()


def test_any_caption_can_be_written(tmp_path):
  page = write(tmp_path, grids=[make_grid("lone \ud800 surrogate")]).read_text("utf-8")
  assert "lone &#55296; surrogate" in page


@pytest.mark.parametrize(
  ("rate", "expected"),
  [
    (0.631, "On couples held out from training, the policy’s emoji wins 63.1 % of comparisons"),
    (0.520, "No effect on held-out couples is certain: the policy’s emoji wins 52.0 % of"),
    (0.400, "It got worse: on held-out couples the policy’s emoji wins only 40.0 % of"),
    (math.nan, "No win rate could be measured on held-out couples."),
    (None, "No win rate could be measured on held-out couples."),
  ],
)
def test_outcome_is_said_plainly(rate, expected):
  found = {"mean": None, "low": None, "high": None} if rate is None else interval(rate)
  opening = report._opening(make_summary() | {"heldout_win_rate": found})
  assert expected in page_reader.Reader(opening).text


def test_opening_names_the_price():
  text = page_reader.Reader(report._opening(make_summary())).text
  assert "for 600 steps on 1,203 pairs of emoji" in text
  assert "(95 % interval 58.1 to 68.1; 50 % is no change)" in text
  assert "prompt match went from 0.959 to 0.942" in text
  assert "(RMSE) from 0.018 to 0.031." in text


def test_shift_sums_the_rest_and_owns_up_to_what_is_missing():
  shift = make_shift()
  text = page_reader.Reader(report._shift(shift)).text
  # Six bars, by use; the two emoji drawn least are summed; the rest of 1 is off the prompt.
  order = [text.index(f"emoji {k}") for k in (1, 2, 3, 4, 5, 0)]
  assert order == sorted(order)
  assert "emoji 6" not in text and "emoji 7" not in text
  assert "2 more with this keyword4 %4 %" in text
  assert "emoji without this keyword10 %0 %" in text
  whole = shift._replace(reference_share=[0.125] * 8, policy_share=[0.125] * 8)
  assert "without this keyword" not in page_reader.Reader(report._shift(whole)).text


def test_result_table_of_the_page(page):
  assert "prompt match (higher is better)0.959 0.949 – 0.9690.942 0.932 – 0.952−0.017" in page.text
  assert "RMSE (lower is better)0.018 0.016 – 0.0200.031 0.029 – 0.033+0.013" in page.text
  assert "RMSE: 0 to 0.05" in page.text
  assert ("u", "style", "left:63.1%") in page.attributes, "the win rate's dot"
  assert ("u", "style", "left:62.0%") in page.attributes, "the policy's RMSE, 0.031 of 0.05"


def test_result_table_for_a_terminal():
  summary = make_summary() | {"heldout_win_rate": {"mean": math.nan, "low": None, "high": None}}
  assert report.result_table(make_summary()) == "\n".join(
    [
      "                    reference             policy",
      "------------------  --------------------  --------------------",
      "prompt match        0.959 [0.949, 0.969]  0.942 [0.932, 0.952]",
      "RMSE                0.018 [0.016, 0.020]  0.031 [0.029, 0.033]",
      "use rank, train     0.513 [0.463, 0.563]  0.664 [0.614, 0.714]",
      "use rank, held-out  0.541 [0.491, 0.591]  0.652 [0.602, 0.702]",
      "win rate, held-out  0.5 by definition     0.631 [0.581, 0.681]",
      "1,024 samples per model; [95 % bootstrap interval over prompts]",
    ]
  )
  assert report.result_table(summary).isascii()
  assert "n/a [n/a, n/a]" in report.result_table(summary)


def broken_summary(path, value=None):
  summary = make_summary()
  *parents, last = path.split(".")
  inner = summary
  for parent in parents:
    inner = inner[parent]
  if value is None:
    del inner[last]
  else:
    inner[last] = value
  return {"summary": summary}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (broken_summary("policy.rmse"), "summary: the field policy.rmse is missing"),
    (broken_summary("reference"), "summary: the field reference.prompt_match is missing"),
    (broken_summary("heldout_win_rate", 0.6), "heldout_win_rate: expected mean, low and high, got"),
    (
      {"grids": [make_grid()._replace(better=[1])]},
      "grid of prompt 'love': expected as many reference samples as policy samples and marks, at "
      "least 1, got 3, 3, 1",
    ),
    (
      {"grids": [report.Grid("none", "test", pictures(0), pictures(0), [])]},
      "grid of prompt 'none': .* at least 1, got 0, 0, 0",
    ),
    (
      {"shifts": [make_shift()._replace(uses=[1])]},
      r"shift of prompt 'love': expected names, icons, uses and both shares of one length, got "
      r"\[8, 8, 1, 8, 8\]",
    ),
    (
      {"curve": [{"label": "beta 500", "rmse": interval(0.1)}]},
      r"curve\[0\]: expected the field 'prompt_match', got \['label', 'rmse'\]",
    ),
  ],
)
def test_bad_input_is_refused_before_a_file_is_written(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    write(tmp_path / "report", **changes)
  assert not (tmp_path / "report").exists()
