"""vote_page.py and votes.py: what a voter sees, what nobody sees, and what votes say."""

import collections
import json
import re
import shutil
import time

import browser
import numpy as np
import page_reader
import pytest
from PIL import Image

from dmpo_jax import compare, compare_images, comparison, vote_page, votes

MODELS = ("zebra-base", "yak-tuned", "xerus-tuned")
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit=1'>"
PROMPTS = (HOSTILE, "a \u2028 cat & <!-- dog", *(f"prompt number {i}" for i in range(10)))


@pytest.fixture
def store(tmp_path):
  """A comparison's folder with images of random pixels."""
  models = tuple(compare_images.Model(name, f"runs/{name}") for name in MODELS)
  sets = {"mine": tuple(range(len(PROMPTS)))}
  store = compare_images.Store(tmp_path / "out", models, PROMPTS, sets, 2)
  generator = np.random.default_rng(0)
  for model in range(len(models)):
    for prompt, number in store.pairs:
      path = store.path(model, prompt, number)
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
  return store


def read(store, name):
  return json.loads((store.folder / name).read_text())


def data_of(page):
  text = re.search(r'<script type="application/json" id="ballots">(.*?)</script>', page)[1]
  return json.loads(text)


def test_ballots_are_even_and_by_lot():
  """Each pair of models as often, no prompt twice for one, sides and numbers like a coin."""
  ballots = vote_page.choose_ballots(3, 400, 2, 1200, seed=0)
  pairs = collections.Counter(frozenset((each.left, each.right)) for each in ballots)
  assert set(pairs.values()) == {400}
  asked = {(each.prompt, frozenset((each.left, each.right))) for each in ballots}
  assert len(asked) == len(ballots) == 1200
  # Six standard deviations of 1,200 tosses are 104.
  assert abs(sum(each.left < each.right for each in ballots) - 600) < 104
  assert abs(sum(each.number for each in ballots) - 600) < 104
  few = vote_page.choose_ballots(3, 400, 2, 10, seed=0)
  counts = collections.Counter(frozenset((each.left, each.right)) for each in few)
  assert sorted(counts.values()) == [3, 3, 4]
  assert few == vote_page.choose_ballots(3, 400, 2, 10, seed=0)
  assert few != vote_page.choose_ballots(3, 400, 2, 10, seed=1)
  assert [each.prompt for each in few] != sorted(each.prompt for each in few)


def test_the_page_shows_the_right_images_and_names_nothing(store):
  path = votes.write_page(store, 20, seed=5)
  page, key = path.read_text(encoding="utf-8"), read(store, "key.json")
  data = data_of(page)
  assert len(data["ballots"]) == len(key["ballots"]) == 20
  for shown, kept in zip(data["ballots"], key["ballots"], strict=True):
    assert shown["prompt"] == PROMPTS[kept["prompt"]]
    for side in ("left", "right"):
      model = MODELS.index(kept[side])
      expected = store.path(model, kept["prompt"], kept["number"]).read_bytes()
      assert (path.parent / shown[side]).read_bytes() == expected
      assert re.fullmatch(r"images/[0-9a-f]{16}\.png", shown[side])
  other = {each.name for each in path.parent.glob("images/*")}
  given = [page, *(str(each.relative_to(path.parent)) for each in path.parent.rglob("*"))]
  for text in given:
    for secret in (*MODELS, "runs/", "seed"):
      assert secret not in text
  assert {each.name for each in path.parent.iterdir()} == {"vote.html", "images"}
  (store.folder / "key.json").unlink()
  shutil.rmtree(path.parent)
  votes.write_page(store, 20, seed=6)
  assert other.isdisjoint(each.name for each in path.parent.glob("images/*"))


def test_a_prompt_cannot_leave_its_text(store):
  page = votes.write_page(store, 36, seed=5).read_text(encoding="utf-8")
  assert HOSTILE in [each["prompt"] for each in data_of(page)["ballots"]]
  for part in ("<script>window", "<img src=x", "</script><", "<!--", "\u2028"):
    assert part not in page
  assert page.count("</script") == 2


def test_the_page_is_accessible_and_closed(store):
  page = votes.write_page(store, 5, seed=5).read_text(encoding="utf-8")
  reader = page_reader.Reader(page.replace("<noscript>", "").replace("</noscript>", ""))
  attributes = collections.defaultdict(list)
  for tag, name, value in reader.attributes:
    attributes[tag, name].append(value)
  assert attributes["img", "alt"] == ["left image", "right image"]
  assert attributes["html", "lang"] == ["en"] and attributes["progress", "aria-label"]
  assert "status" in attributes["span", "role"]
  assert reader.tags.count("script") == 2 and not attributes["script", "src"]
  (policy,) = [each for each in attributes["meta", "content"] if "default-src" in each]
  assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
  assert "http://" not in page and "https://" not in page
  assert "prefers-color-scheme:dark" in page and ":focus-visible" in page


def test_a_page_is_written_again_as_it_was_or_refused(store):
  first = votes.write_page(store, 6)
  page, key = first.read_bytes(), read(store, "key.json")
  first.unlink()
  assert votes.write_page(store, 6).read_bytes() == page and read(store, "key.json") == key
  with pytest.raises(ValueError, match="is of a page with 6 pairs, expected 7; delete it"):
    votes.write_page(store, 7)
  (store.folder / "key.json").unlink()
  votes.write_page(store, 1000)
  again = read(store, "key.json")
  assert len(again["ballots"]) == 3 * len(PROMPTS) and again["page"] != key["page"]


def write_votes(store, name, choose, voter="0" * 16, **change):
  """Votes as the page exports them; `choose` tells the choice from a ballot of the key."""
  key = read(store, "key.json")
  listed = [{"ballot": i, "choice": choose(each)} for i, each in enumerate(key["ballots"])]
  content = {"format": 1, "page": key["page"], "voter": voter, "votes": listed, **change}
  path = store.folder.parent / name
  path.write_text(json.dumps(content))
  return path


def prefer(model):
  """Whoever votes for a model wherever it is shown, and sees no difference elsewhere."""
  return lambda each: next((s for s in ("left", "right") if each[s] == model), "tie")


def test_votes_are_joined_with_the_key(store):
  votes.write_page(store, 36, seed=1)
  assert votes.summarise(store.folder, MODELS) is None
  first = write_votes(store, "a.json", prefer(MODELS[1]))
  votes.add(store.folder, [first])
  found = votes.summarise(store.folder, MODELS)
  rates = {(each["model"], each["over"]): each for each in found["pairs"]}
  assert (found["voters"], found["votes"]) == (1, 36)
  won, tied, lost = (
    rates[pair] for pair in ((MODELS[1], MODELS[0]), (MODELS[2], MODELS[0]), (MODELS[2], MODELS[1]))
  )
  assert (won["win_rate"]["mean"], won["prompts_won"], won["prompts_lost"]) == (1.0, 12, 0)
  assert won["sign_test"] == pytest.approx(2 / 2**12)
  assert (lost["win_rate"]["mean"], lost["prompts_lost"]) == (0.0, 12)
  assert (tied["win_rate"]["mean"], tied["prompts_tied"], tied["sign_test"]) == (0.5, 12, 1.0)


def test_several_voters_are_one_row_a_prompt(store):
  """Of three voters two prefer one model: two thirds of the votes, all prompts won."""
  votes.write_page(store, 36, seed=1)
  ids = [str(i) * 16 for i in range(3)]
  choices = [prefer(MODELS[1]), prefer(MODELS[1]), prefer(MODELS[0])]
  files = [
    write_votes(store, f"{voter}.json", choose, voter)
    for voter, choose in zip(ids, choices, strict=True)
  ]
  votes.add(store.folder, files)
  found = votes.summarise(store.folder, MODELS)
  pair = found["pairs"][0]
  assert (found["voters"], found["votes"], pair["comparisons"]) == (3, 108, 36)
  assert pair["win_rate"]["mean"] == pytest.approx(2 / 3)
  assert (pair["prompts_won"], pair["prompts_lost"]) == (12, 0)
  # A voter who sends a later file has still one voice.
  votes.add(store.folder, [write_votes(store, "later.json", prefer(MODELS[1]), ids[2])])
  again = votes.summarise(store.folder, MODELS)
  assert again["voters"] == 3 and again["pairs"][0]["win_rate"]["mean"] == 1.0


@pytest.mark.parametrize(
  "change, message",
  [
    ({"page": "0" * 16}, "page is '0+', expected '.*': votes of the page of this folder"),
    ({"format": 2}, "format is 2, expected 1"),
    ({"voter": "../../etc"}, "voter: expected 16 hexadecimal digits"),
    ({"votes": {}}, "votes: expected a list, got dict"),
    ({"votes": [{"ballot": 6, "choice": "left"}]}, "expected a ballot from 0 to 5"),
    ({"votes": [{"ballot": True, "choice": "left"}]}, "expected a ballot from 0 to 5"),
    ({"votes": [{"ballot": 0, "choice": "up"}]}, "a choice of left, right, tie"),
    ({"votes": [{"ballot": 0, "choice": []}]}, "a choice of left, right, tie"),
    ({"votes": [{"ballot": 0, "choice": "tie"}] * 2}, "each once"),
    ({"votes": [3]}, "a vote 3; expected a ballot"),
  ],
)
def test_votes_that_are_none_are_refused(store, change, message):
  votes.write_page(store, 6, seed=1)
  good = write_votes(store, "good.json", prefer(MODELS[0]), "1" * 16)
  bad = write_votes(store, "bad.json", prefer(MODELS[0]), **change)
  with pytest.raises(ValueError, match=message):
    votes.add(store.folder, [good, bad])
  assert votes.summarise(store.folder, MODELS) is None


def test_votes_come_into_the_table(store):
  """`dmpo evaluate --votes`, on a comparison without scores."""
  folder = store.folder
  described = [{**model._asdict(), "weights": "0"} for model in store.models]
  result = {
    "models": described,
    "baseline": MODELS[0],
    "sampling": {"images_per_prompt": 2},
    "prompt_sets": {"mine": {}},
    "scorers": {},
    "results": comparison.summarise_all([], store.sets),
    **{"seed": 1, "compute": "float32", "devices": "1 x cpu"},
  }
  compare_images.write_json(folder / "comparison.json", result | {"votes": None})
  compare_images.write_json(folder / "prompts.json", {"prompts": PROMPTS, "sets": store.sets})
  votes.write_page(store, 36, seed=1)
  found = compare.add_votes(folder, [write_votes(store, "a.json", prefer(MODELS[1]))])
  assert found["votes"]["pairs"][0]["win_rate"]["mean"] == 1.0
  assert found == read(store, "comparison.json")
  shown = compare.show(found, folder)
  assert "people: 36 votes by one voter, who saw no names" in shown
  assert re.search(r"yak-tuned +zebra-base +1.000 \[1.000, 1.000\] +12 · 0 · 0 +< 0.001 +12", shown)
  page = (folder / "comparison.html").read_text(encoding="utf-8")
  assert "36 votes" in page_reader.Reader(page).text


@pytest.mark.slow
@pytest.mark.skipif(browser.find() is None, reason="no Chromium on PATH")
def test_in_a_browser(store, tmp_path):
  """Votes by keyboard, undo, reload, SIGKILL, export: all kept, and nothing foreign runs."""
  page_path = votes.write_page(store, 5, seed=3)
  address, profile = page_path.as_uri(), tmp_path / "profile"
  downloads = tmp_path / "downloads"
  downloads.mkdir()
  prompts = [each["prompt"] for each in data_of(page_path.read_text(encoding="utf-8"))["ballots"]]

  def ready(page, number):
    page.wait(f"document.body && document.body.dataset.ready === '{number}'")
    assert page.evaluate("document.getElementById('prompt').textContent") == prompts[number]
    assert page.evaluate("document.getElementById('count').textContent") == (
      f"Pair {number + 1} of 5"
    )

  def reload(page):
    page.evaluate("delete document.body.dataset.ready")
    page.call("Page.reload")

  with browser.open_page(address, profile, kill=True) as page:
    ready(page, 0)
    page.press("ArrowUp")
    page.press("ArrowLeft", modifiers=1)  # Alt: the browser's own way back
    ready(page, 0)
    for number, key in enumerate(("ArrowLeft", "ArrowDown", "ArrowRight"), 1):
      page.press(key)
      ready(page, number)
    reload(page)
    ready(page, 3)
    page.press("u")
    ready(page, 2)
    reload(page)
    ready(page, 2)
    page.press("ArrowDown")
    ready(page, 3)
  with browser.open_page(address, profile) as page:
    ready(page, 3)
    page.press("u")
    ready(page, 2)
    page.call(
      "Browser.setDownloadBehavior", session=False, behavior="allow", downloadPath=str(downloads)
    )
    page.press("ArrowLeft")
    ready(page, 3)
    page.evaluate("document.getElementById('right').click()")
    ready(page, 4)
    page.press("ArrowRight")
    page.wait("!document.getElementById('thanks').hidden")
    page.press("ArrowRight")  # there is nothing left to vote on
    page.evaluate("document.getElementById('export').click()")
    end = time.monotonic() + 30
    while not list(downloads.glob("votes-*.json")) and time.monotonic() < end:
      time.sleep(0.05)
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 2
  (file,) = downloads.glob("votes-*.json")
  found = votes.read_votes(file, read(store, "key.json"))
  choices = ["left", "tie", "left", "right", "right"]
  assert [each["choice"] for each in found["votes"]] == choices
  assert [each["ballot"] for each in found["votes"]] == list(range(5))
