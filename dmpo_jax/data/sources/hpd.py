"""Human Preference Datasets v2 and v3: a JSON list of comparisons beside a folder of images.

HPDv2 (huggingface.co/datasets/ymhao/HPDv2, arXiv 2306.09341). By its data card, `train.json` lists
{prompt, file_path: two names, human_preference: 1 for the preferred of the two}, and `test.json`
{prompt, image_path: names, rank: averaged over the annotators, raw_annotations}. Programs that read
the files find `image_path` in `train.json` too, so both names are read; and the images, once
`train.tar.gz` and `test.tar.gz` are unpacked, in `train/` and `test/`. That the lowest rank is the
best is not on the card: it is what those programs take it to be. A handful of the images are said
to be damaged. Not verified on the files themselves.

HPDv3 (huggingface.co/datasets/MizzenAI/HPDv3, arXiv 2508.03789). By the README of MizzenAI/HPSv3,
`train.json` and `test.json` list {prompt, path1, path2, model1, model2} and, but for the test split
and the parts from Midjourney and HPDv2, confidence and choice_dist, the votes. **The preferred
image is always path1**: a model that is shown (path1, path2) learns the position. Here the roles
are kept by name (image_w, image_l), and the side of every pair is "path1", so that checks see it;
whoever feeds a scorer with these pairs must shuffle them.
p_choice is the larger share of the votes, as the authors' soft labels have it, 1 where there are no
votes. Not verified on the files themselves.
"""

import dataclasses
import functools
import math
import os
import pathlib
import posixpath
from collections.abc import Iterator, Sequence

from dmpo_jax.data import rows
from dmpo_jax.data.sources import faults, files, json_list, ranking

_LISTS = {"train": "train.json", "test": "test.json"}


def open_hpdv2(
  dataset: str, path: str | os.PathLike, *, pairs_per_prompt: int | None = None
) -> rows.Source:
  """The folder with train.json and/or test.json; images in train/ and test/, else beside the lists.

  Several ranked images give pairs as `ranking.read_pairs` says.

  Raises:
    ValueError: the folder or both lists are missing, or the option is out of range.
  """
  ranking.check_limit(dataset, pairs_per_prompt)
  folder = files.local_folder(dataset, path)
  shards = {
    split: [
      HpdV2Shard(name, str(folder), split if (folder / split).is_dir() else "", pairs_per_prompt)
    ]
    for split, name in _present(dataset, folder).items()
  }
  return rows.Source(
    name=dataset,
    splits=shards,
    licence="Apache-2.0",
    homepage="https://huggingface.co/datasets/ymhao/HPDv2",
    fingerprint=_fingerprint(dataset, folder, pairs_per_prompt=pairs_per_prompt),
  )


def open_hpdv3(
  dataset: str, path: str | os.PathLike, *, min_confidence: float = 0.0
) -> rows.Source:
  """The folder with train.json and/or test.json, in which `images/` is unpacked.

  Args:
    dataset: the name of the source.
    path: the folder.
    min_confidence: rows of a lower confidence are left out, [0, 1]; rows without one stay. The
      authors train their scorer with 0.95.

  Raises:
    ValueError: the folder or both lists are missing, or the option is out of range.
  """
  if not 0 <= min_confidence <= 1:
    raise ValueError(f"{dataset}: min_confidence: expected 0 to 1, got {min_confidence}")
  folder = files.local_folder(dataset, path)
  return rows.Source(
    name=dataset,
    splits={
      split: [HpdV3Shard(name, str(folder), min_confidence)]
      for split, name in _present(dataset, folder).items()
    },
    licence="MIT",
    homepage="https://huggingface.co/datasets/MizzenAI/HPDv3",
    fingerprint=_fingerprint(dataset, folder, min_confidence=min_confidence),
  )


def _present(dataset: str, folder: pathlib.Path) -> dict[str, str]:
  present = {split: name for split, name in _LISTS.items() if (folder / name).is_file()}
  if not present:
    raise ValueError(f"{dataset}: {folder}: expected train.json or test.json, found neither")
  return present


def _fingerprint(dataset: str, folder: pathlib.Path, **options: object) -> str:
  """Of the lists alone: to look at a million images takes minutes on a network disk."""
  return files.fingerprint(
    dataset, files.sizes(folder, _present(dataset, folder).values()), **options
  )


@dataclasses.dataclass(frozen=True)
class HpdV2Shard:
  """One list of HPDv2; `images` is the folder of its images under `folder`, or empty."""

  name: str
  folder: str
  images: str
  pairs_per_prompt: int | None

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    """Pairs in the order of the list, entries counted from 0.

    Raises:
      ValueError: the list is missing, no list, or cut short.
    """
    folder = pathlib.Path(self.folder)
    read_image = functools.partial(files.read_image, folder)
    for number, entry in enumerate(json_list.read_entries(folder / self.name)):
      where = f"{self.name}, entry {number}"
      try:
        ranked = self._ranking_of(entry)
      except faults.Fault as fault:
        yield rows.Dropped(fault.reason, where, fault.broken)
        continue
      yield from ranking.read_pairs(
        ranked, where, read_image, pairs_per_prompt=self.pairs_per_prompt
      )

  def _ranking_of(self, entry: object) -> ranking.Ranking:
    fields = _object(entry)
    caption = faults.check_caption(fields.get("prompt"))
    names = fields.get("image_path", fields.get("file_path"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise faults.Fault("image_path is no list")
    if "rank" in fields:
      ranks = fields["rank"]
    else:
      ranks = _ranks_of_choice(fields.get("human_preference"))
    if not faults.are_numbers(ranks) or len(ranks) != len(names) or len(names) < 2:
      raise faults.Fault("not one rank per image")
    # With the folder: the same name is another image in another split.
    names = tuple(posixpath.join(self.images, name) for name in names)
    return ranking.Ranking(caption, names, tuple(ranks))


def _ranks_of_choice(preference: object) -> Sequence[float]:
  """1 for the preferred of two -> 0 for the best of two."""
  if not faults.are_numbers(preference) or sorted(preference) not in ([0, 1], [0.5, 0.5]):
    raise faults.Fault("preference names no winner")
  return [1.0 - each for each in preference]


@dataclasses.dataclass(frozen=True)
class HpdV3Shard:
  """One list of HPDv3."""

  name: str
  folder: str
  min_confidence: float

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    """Pairs in the order of the list, entries counted from 0.

    Raises:
      ValueError: the list is missing, no list, or cut short.
    """
    folder = pathlib.Path(self.folder)
    for number, entry in enumerate(json_list.read_entries(folder / self.name)):
      where = f"{self.name}, entry {number}"
      yield faults.row_or_dropped(where, functools.partial(self._form_pair, folder, entry, where))

  def _form_pair(self, folder: pathlib.Path, entry: object, where: str) -> rows.Pair:
    fields = _object(entry)
    confidence = fields.get("confidence")
    if faults.are_numbers([confidence]) and confidence < self.min_confidence:
      raise faults.Fault("low confidence", broken=False)
    p_choice = _share_of_votes(fields.get("choice_dist"))
    caption = faults.check_caption(fields.get("prompt"))
    winner, loser = fields.get("path1"), fields.get("path2")
    image_w, image_l = files.read_image(folder, winner), files.read_image(folder, loser)
    if winner == loser:
      raise faults.Fault("winner is the loser")
    couple = files.couple(winner, loser)
    return rows.Pair(caption, image_w, image_l, p_choice, couple, where, side="path1")


def _share_of_votes(votes: object) -> float:
  if votes is None:
    return 1.0
  if (
    not faults.are_numbers(votes)
    or len(votes) != 2
    or min(votes) < 0
    or not 0 < sum(votes) < math.inf
  ):
    raise faults.Fault("choice_dist is damaged")
  if votes[0] == votes[1]:
    raise faults.Fault("tie", broken=False)
  return max(votes) / sum(votes)


def _object(entry: object) -> dict:
  if not isinstance(entry, dict):
    raise faults.Fault("entry is no object")
  return entry
