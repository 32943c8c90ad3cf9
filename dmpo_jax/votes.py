"""Votes of people on a comparison's images: the page that asks for them, and what they say.

vote/vote.html, vote/images/    for voters; hand on the folder `vote` and nothing else
key.json                        which model drew which image; not for voters
votes/VOTER.json                what came back, once it was joined
"""

import pathlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmpo_jax import base as base_lib
from dmpo_jax import compare_images, comparison, json_files, vote_page

FORMAT = 1  # of votes and key
KEY = "key.json"
_CHOICES = {"left": 1.0, "right": 0.0, "tie": 0.5}  # of the left model
_VOTER = re.compile(r"[0-9a-f]{16}")


def write_page(store: compare_images.Store, count: int, seed: int | None = None) -> pathlib.Path:
  """Writes the page and its key; a page that is there already is written again as it was.

  Args:
    count: of ballots, see `vote_page.choose_ballots`.
    seed: decides prompts, order and sides; None draws one that nobody can guess. It is kept in the
      key.

  Raises:
    ValueError: there is a page with another number of ballots, on which people may have voted.
  """
  key_path = store.folder / KEY
  models, prompts = len(store.models), len(store.prompts)
  count = min(count, prompts * models * (models - 1) // 2)
  if key_path.is_file():
    key = base_lib.read_json(key_path)
    if len(key["ballots"]) != count:
      raise ValueError(
        f"{key_path}: is of a page with {len(key['ballots'])} pairs, expected {count}; delete it "
        "to make a new page, on which votes of the old one do not count"
      )
    seed = key["seed"]
  elif seed is None:
    seed = secrets.randbits(64)
  ballots = vote_page.choose_ballots(models, prompts, store.per_prompt, count, seed)
  key = {"format": FORMAT, "page": vote_page.token(seed, "page"), "seed": seed}
  key["ballots"] = [_with_names(store, each) for each in ballots]
  compare_images.write_json(key_path, key)
  return _write_folder(store, key, ballots)


def _with_names(store: compare_images.Store, ballot: vote_page.Ballot) -> dict[str, Any]:
  names = {side: store.models[getattr(ballot, side)].name for side in ("left", "right")}
  return {**ballot._asdict(), **names}


def _write_folder(
  store: compare_images.Store, key: Mapping[str, Any], ballots: Sequence[vote_page.Ballot]
) -> pathlib.Path:
  folder = store.folder / "vote"
  (folder / "images").mkdir(parents=True, exist_ok=True)
  pictures = []
  for i, ballot in enumerate(ballots):
    addresses = []
    for side, model in (("left", ballot.left), ("right", ballot.right)):
      address = f"images/{vote_page.token(key['seed'], i, side)}.png"
      data = store.path(model, ballot.prompt, ballot.number).read_bytes()
      compare_images.write_bytes(folder / address, data)
      addresses.append(address)
    pictures.append(tuple(addresses))
  prompts = [store.prompts[ballot.prompt] for ballot in ballots]
  side = len(store.read(0, 0, 0))
  page = vote_page.html(key["page"], prompts, pictures, side=side)
  compare_images.write_bytes(folder / "vote.html", page.encode())
  return folder / "vote.html"


def add(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> None:
  """Keeps votes that came back; a voter's later file takes the place of an earlier one.

  Raises:
    ValueError: a file holds no votes, or votes of another page; none is kept then.
  """
  key = _read_key(folder)
  found = [read_votes(file, key) for file in files]
  (folder / "votes").mkdir(exist_ok=True)
  for votes in found:
    compare_images.write_json(folder / "votes" / f"{votes['voter']}.json", votes)


def _read_key(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / KEY
  if not path.is_file():
    raise ValueError(f"--votes: {path} is missing; expected in --out the folder of a comparison")
  return base_lib.read_json(path)


def read_votes(path: pathlib.Path, key: Mapping[str, Any]) -> dict[str, Any]:
  """What the page exported.

  Raises:
    ValueError: it is no such file, or of another page; says what was expected.
  """
  votes = json_files.read_object(path)
  expected = {"format": FORMAT, "page": key["page"]}
  for name, value in expected.items():
    if votes.get(name) != value:
      raise ValueError(
        f"{path}: {name} is {votes.get(name)!r}, expected {value!r}: votes of the page of "
        "this folder"
      )
  if not isinstance(votes.get("voter"), str) or not _VOTER.fullmatch(votes["voter"]):
    raise ValueError(f"{path}: voter: expected 16 hexadecimal digits, got {votes.get('voter')!r}")
  if not isinstance(votes.get("votes"), list):
    raise ValueError(f"{path}: votes: expected a list, got {type(votes.get('votes')).__name__}")
  seen = set()
  for each in votes["votes"]:
    ballot = each.get("ballot") if isinstance(each, dict) else None
    known = type(ballot) is int and 0 <= ballot < len(key["ballots"]) and ballot not in seen
    if not known or each.get("choice") not in list(_CHOICES):
      raise ValueError(
        f"{path}: a vote {each!r}; expected a ballot from 0 to {len(key['ballots']) - 1}, each "
        f"once, and a choice of {', '.join(_CHOICES)}"
      )
    seen.add(ballot)
  chosen = [{name: each[name] for name in ("ballot", "choice")} for each in votes["votes"]]
  return {**expected, "voter": votes["voter"], "votes": chosen}


def summarise(folder: pathlib.Path, models: Sequence[str]) -> dict[str, Any] | None:
  """`votes` of comparison.json; None if nobody's were joined.

  Votes on one prompt, of several people or images, are one row: intervals and the test are over
  prompts.
  """
  files = sorted((folder / "votes").glob("*.json"))
  if not files:
    return None
  key = _read_key(folder)
  by_pair: dict[tuple[str, str], dict[int, list[float]]] = {}
  total = 0
  for file in files:
    for vote in read_votes(file, key)["votes"]:
      ballot = key["ballots"][vote["ballot"]]
      value = _CHOICES[vote["choice"]]
      pair = ballot["left"], ballot["right"]
      if models.index(pair[0]) < models.index(pair[1]):
        pair, value = pair[::-1], 1.0 - value
      by_pair.setdefault(pair, {}).setdefault(ballot["prompt"], []).append(value)
      total += 1
  pairs = [
    {"model": pair[0], "over": pair[1], **_compare(by_pair[pair])}
    for pair in comparison.pairs_of(models)
    if pair in by_pair
  ]
  return {"voters": len(files), "votes": total, "pairs": pairs}


def _compare(by_prompt: Mapping[int, Sequence[float]]) -> dict[str, Any]:
  rows = [by_prompt[prompt] for prompt in sorted(by_prompt)]
  values = np.zeros((len(rows), max(map(len, rows))))
  counted = np.zeros(values.shape, bool)
  for i, row in enumerate(rows):
    values[i, : len(row)], counted[i, : len(row)] = row, True
  return comparison.compare_pair(values, counted)
