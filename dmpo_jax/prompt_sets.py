"""Prompts to compare models on: named sets, read from files as their authors publish them.

PartiPrompts.tsv (google-research/parti) is tab-separated with a header and no quoting: quotes in it
are the prompt's own. The HPSv2 benchmark (tgxs002/HPSv2) has a JSON list of texts for each of its
four styles. Captions of Pick-a-Pic are taken out of its table by whoever brings them.
"""

import csv
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dmpo_jax import json_files
from dmpo_jax.data.sources import json_list

FIELDS = ("prompt", "caption", "text")  # of an object, or of a table's header; any case
MOST_CHARACTERS = 10_000  # of one prompt; CLIP reads 77 tokens of it


class PromptSet(NamedTuple):
  """Prompts that are reported together.

  Attributes:
    name: of the set, in tables.
    prompts: each once, in the order of the file.
    repeats: prompts that the file has again. From the same noise they would give the same images.
  """

  name: str
  prompts: tuple[str, ...]
  repeats: int

  @property
  def digest(self) -> str:
    """Of the prompts and their order."""
    text = json.dumps(self.prompts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_sets(files: Sequence[pathlib.Path]) -> list[PromptSet]:
  """One set for each file, named as the file.

  Raises:
    ValueError: a file cannot be read as its suffix says, or two have one name.
  """
  sets = [read_set(pathlib.Path(file)) for file in files]
  check_names(sets)
  return sets


def check_names(sets: Sequence[PromptSet]) -> None:
  """Refuses two sets of one name, and `overall`, under which the sets are reported together."""
  names = [each.name for each in sets]
  for name in names:
    if names.count(name) > 1 or name == "overall":
      raise ValueError(
        f"--prompts: the name {name!r} is {'taken' if name == 'overall' else 'given twice'}; "
        "expected a name of its own for each set, which is that of its file: rename one"
      )


def read_set(path: pathlib.Path) -> PromptSet:
  """The prompts of a file; what they are is told by its suffix.

  .json: a list of texts, or of objects with a field of `FIELDS`. .jsonl: the same, one a line.
  .tsv: a header with one of `FIELDS`, no quoting. Any other: one prompt a line.

  Raises:
    ValueError: missing, not UTF-8, no such field, or no prompt at all; names file and entry.
  """
  if not path.is_file():
    raise ValueError(f"--prompts: {path} is not a file; expected one, or the word emoji")
  read = _READERS.get(path.suffix.lower(), _read_lines)
  found = [
    _check(text, f"{path}, {unit} {number}")
    for unit, number, entry in read(path)
    if (text := _text_of(entry, f"{path}, {unit} {number}")).strip()
  ]
  unique = tuple(dict.fromkeys(found))
  if not unique:
    raise ValueError(f"--prompts: {path} holds no prompt; expected one a line")
  return PromptSet(path.stem, unique, len(found) - len(unique))


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
  # Of the separators that str.splitlines knows only these end a line of a text file.
  lines = json_files.read_text(path).removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
  yield from (("line", number, line) for number, line in enumerate(lines, 1))


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
  for unit, number, line in _read_lines(path):
    if line.strip():
      try:
        yield unit, number, json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompts: {path}, {unit} {number}: not valid JSON ({error})") from error


def _read_json(path: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
  entries = enumerate(json_list.read_entries(path), 1)
  yield from (("entry", number, entry) for number, entry in entries)


def _read_tsv(path: pathlib.Path) -> Iterator[tuple[str, int, Any]]:
  lines = [line for *_, line in _read_lines(path)]
  header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
  for number, row in enumerate(rows, 2):
    if row:
      yield "line", number, dict(zip(header, row, strict=False))


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".tsv": _read_tsv}


def _text_of(entry: Any, where: str) -> str:
  if isinstance(entry, str):
    return entry
  if isinstance(entry, dict):
    for name, value in entry.items():
      if str(name).lower() in FIELDS and isinstance(value, str):
        return value
  got = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
  raise ValueError(
    f"--prompts: {where}: expected a text, or a field {' or '.join(FIELDS)} with one, got {got}"
  )


def _check(text: str, where: str) -> str:
  text = text.strip()
  if len(text) > MOST_CHARACTERS:
    raise ValueError(
      f"--prompts: {where}: {len(text)} characters; expected at most {MOST_CHARACTERS}"
    )
  # A lone surrogate is no text: nothing could write it again.
  return text.encode("utf-8", "replace").decode("utf-8")
