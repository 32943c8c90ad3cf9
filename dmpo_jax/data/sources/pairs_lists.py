"""A user's own pairs, or other rows, as a JSONL or CSV list beside the images."""

import csv
import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from dmpo_jax.data import rows
from dmpo_jax.data.sources import faults, files, held_out

_END = (b"", False)

Fields = Mapping[str, object]


class Columns(NamedTuple):
  """What a list has.

  Attributes:
    required: fields that every line has.
    optional: others that are read.
    form: (folder, fields, where) -> row; raises `faults.Fault`. Of a module, for other processes.
  """

  required: tuple[str, ...]
  optional: tuple[str, ...]
  form: Callable[[pathlib.Path, Fields, str], rows.Row]


class _Line(NamedTuple):
  """A line's number, from 1, and its fields, or why it has none."""

  number: int
  fields: Fields
  fault: str | None = None


@dataclasses.dataclass(frozen=True)
class ListShard:
  """One list in `folder`; `part` of it, or all if None."""

  name: str
  folder: str
  part: held_out.Part | None
  columns: Columns

  def read(self) -> Iterator[rows.Row]:
    """Rows in the order of the file, by the number of their line, from 1.

    Damaged lines are told once, by the training part. No pair has a side: users do name files by
    who won (`winners/1.jpg`), and no model sees the names.

    Raises:
      ValueError: the file is missing, no UTF-8, or a CSV without the columns.
    """
    path = pathlib.Path(self.folder, self.name)
    is_csv = path.suffix.lower() == ".csv"
    lines = _csv_lines(path, self.columns) if is_csv else _json_lines(path)
    try:
      for line in lines:
        if self.part is None or self.part.holds(line.fields.get("caption")):
          where = f"{self.name}, line {line.number}"
          yield faults.row_or_dropped(where, functools.partial(self._form, path, line, where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
      raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from error

  def _form(self, path: pathlib.Path, line: _Line, where: str) -> rows.Row:
    if line.fault is not None:
      raise faults.Fault(line.fault)
    missing = [field for field in self.columns.required if line.fields.get(field) is None]
    if missing:
      raise faults.Fault(f"{missing[0]} is missing")
    return self.columns.form(path.parent, line.fields, where)


def _json_lines(path: pathlib.Path) -> Iterator[_Line]:
  with path.open("rb") as stream:
    for number, (line, too_long) in enumerate(iter(lambda: files.read_line(stream), _END), 1):
      if too_long:
        yield _Line(number, {}, "line is too long")
        continue
      if not line.strip():
        continue
      try:
        fields = json.loads(line.decode("utf-8-sig"))
      except (ValueError, RecursionError):
        yield _Line(number, {}, "not JSON")
        continue
      if isinstance(fields, dict):
        yield _Line(number, fields)
      else:
        yield _Line(number, {}, "not a JSON object")


def _csv_lines(path: pathlib.Path, columns: Columns) -> Iterator[_Line]:
  with path.open(encoding="utf-8-sig", newline="") as stream:
    reader = csv.DictReader(_texts(stream))
    found = list(reader.fieldnames or ())
    missing = [field for field in columns.required if field not in found]
    if missing:
      raise ValueError(
        f"{path}: lacks the columns {missing}; found {found}; expected {list(columns.required)}"
        f" and, if need be, {list(columns.optional)} in the first line"
      )
    for fields in reader:
      wrong = None in fields or None in fields.values()  # how csv marks too many and too few
      # An empty cell is what CSV has for "not there".
      present = {name: cell for name, cell in fields.items() if name and cell}
      yield _Line(reader.line_num, present, "wrong number of cells" if wrong else None)


def _texts(stream: io.TextIOBase) -> Iterator[str]:
  """Lines; one that is too long ends the reading, as quotes may go over several lines."""
  for line in iter(lambda: stream.readline(files.MOST_LINE + 1), ""):
    if len(line) > files.MOST_LINE:
      raise csv.Error(f"a line has more than {files.MOST_LINE} characters")
    yield line


def _form_pair(folder: pathlib.Path, fields: Fields, where: str) -> rows.Pair:
  caption, p_choice = faults.check_caption(fields["caption"]), check_choice(fields.get("p_choice"))
  winner, loser, source = fields["winner"], fields["loser"], fields.get("source")
  if winner == loser:
    raise faults.Fault("winner is the loser")
  image_w, image_l = files.read_image(folder, winner), files.read_image(folder, loser)
  image_source = None if source is None else files.read_image(folder, source)
  couple = files.couple(winner, loser)
  return rows.Pair(caption, image_w, image_l, p_choice, couple, where, image_source)


PAIRS = Columns(("caption", "winner", "loser"), ("source", "p_choice"), _form_pair)
"""Of a list of pairs."""


def _form_judged(folder: pathlib.Path, fields: Fields, where: str) -> rows.Judged:
  caption, desirable = faults.check_caption(fields["caption"]), check_verdict(fields["desirable"])
  name, source = fields["image"], fields.get("source")
  image = files.read_image(folder, name)
  image_source = None if source is None else files.read_image(folder, source)
  return rows.Judged(caption, image, desirable, str(name), where, image_source)


JUDGED = Columns(("caption", "image", "desirable"), ("source",), _form_judged)
"""Of a list of single images, each judged by itself."""


def check_verdict(value: object) -> bool:
  """Whether the image is called desirable: true or false, 1 or 0, or these words in a CSV.

  >>> check_verdict(True), check_verdict("False"), check_verdict("1")
  (True, False, True)

  Raises:
    Fault: it is something else.
  """
  verdict = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
  if verdict is None or isinstance(value, float):
    raise faults.Fault("desirable is neither true nor false")
  return verdict


def check_choice(value: object) -> float:
  """Probability that people choose the winner; 1 if the row has none.

  A value below 0.5 says that the loser is the winner. Which of the two the user meant is not to be
  known, so that the row is refused rather than turned round.

  >>> check_choice(None), check_choice("0.75"), check_choice(1)
  (1.0, 0.75, 1.0)

  Raises:
    Fault: it is no number or not in [0.5, 1].
  """
  if value is None:
    return 1.0
  try:
    number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
  except (TypeError, ValueError, OverflowError):  # OverflowError: a whole number of 400 digits
    number = math.nan
  if math.isnan(number):
    raise faults.Fault("p_choice is no number")
  if number < 0.5:
    raise faults.Fault("p_choice is below 0.5")
  if number > 1:
    raise faults.Fault("p_choice is above 1")
  return number
