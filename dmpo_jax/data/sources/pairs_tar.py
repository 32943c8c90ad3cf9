"""A user's own pairs as tar files in the manner of WebDataset, read as a stream."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator

from dmpo_jax.data import rows
from dmpo_jax.data.sources import faults, files, held_out, pairs_lists

_KINDS = {"txt": "txt", "json": "json"} | {
  f"{role}.{suffix}": role
  for role in ("winner", "loser", "source")
  for suffix in ("jpg", "jpeg", "png", "webp")
}
_TWICE = "twice"
_BLOCK = 512  # bytes; tar's unit
_MOST_TEXT = 1 << 20  # bytes of KEY.txt or KEY.json


@dataclasses.dataclass(frozen=True)
class TarShard:
  """One tar in `folder`; `part` of it, or all if None.

  Members of a pair stand next to each other and share a key, the name up to the first dot:
  KEY.winner.jpg, KEY.loser.png, KEY.source.webp (optional), and KEY.txt with the caption or
  KEY.json with caption and, if need be, p_choice. Others are passed over.
  """

  name: str
  folder: str
  part: held_out.Part | None

  def read(self) -> Iterator[rows.Pair | rows.Dropped]:
    """Pairs in the order of the file, by their key.

    Damaged groups are told once, by the training part.

    Raises:
      ValueError: the file is missing, no tar or cut short.
    """
    for key, members in self._groups():
      where = f"{self.name}, key {files.printable(key)}"
      caption, p_choice, fault = _text_of(members)
      if self.part is None or self.part.holds(caption):
        yield faults.row_or_dropped(
          where, functools.partial(_form_pair, members, caption, p_choice, fault, where)
        )

  def _groups(self) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, what it is -> bytes) of members that stand together."""
    key, members = None, {}
    for name, data in self._members():
      its_key, kind = _split_name(name)
      if members and key != its_key:
        yield key, members
        members = {}
      key = its_key
      if kind in members:
        members[_TWICE] = b""
      members[kind] = data
    if members:
      yield key, members

  def _members(self) -> Iterator[tuple[str, bytes]]:
    path = pathlib.Path(self.folder, self.name)
    try:
      with tarfile.open(path, "r|") as tar:
        for member in tar:
          # Links and devices have no bytes of their own: the pair lacks that member.
          if member.isfile() and _split_name(member.name)[1] is not None:
            is_text = _split_name(member.name)[1] in ("txt", "json")
            if member.size > (_MOST_TEXT if is_text else files.MOST_IMAGE):
              raise ValueError(f"member {files.printable(member.name)} has {member.size} bytes")
            yield member.name, tar.extractfile(member).read()
          tar.members = []  # tarfile keeps all it has seen
        end = tar.offset
      _check_end(path, end)
    # RecursionError: a thousand headers, each of which says that another one follows.
    except (OSError, tarfile.TarError, ValueError, RecursionError) as error:
      raise ValueError(
        f"{path}: missing, no plain tar, or damaged ({error}); copy or pack the file again"
      ) from error


def _split_name(name: str) -> tuple[str, str | None]:
  """(key, kind) of a member; the kind is None if it is none of ours.

  >>> _split_name("a/0001.Winner.jpg"), _split_name("a/0001.txt"), _split_name("a/0001.cls")
  (('a/0001', 'winner'), ('a/0001', 'txt'), ('a/0001', None))
  """
  folder, base = posixpath.split(name)
  stem, _, suffixes = base.partition(".")
  return posixpath.join(folder, stem), _KINDS.get(suffixes.lower())


def _check_end(path: pathlib.Path, offset: int) -> None:
  """tarfile takes damage between two members for the end; the true end is a block of zeros."""
  with path.open("rb") as stream:
    stream.seek(offset)
    if stream.read(_BLOCK) != bytes(_BLOCK):
      raise ValueError(f"no tar from byte {offset} on, where the next member should begin")


def _text_of(members: dict[str, bytes]) -> tuple[object, object, str | None]:
  """(caption, p_choice, fault); the caption of a KEY.txt goes before that of a KEY.json."""
  fields, caption = {}, None
  try:
    if "txt" in members:
      caption = members["txt"].decode("utf-8-sig").strip()
    if "json" in members:
      fields = json.loads(members["json"].decode("utf-8-sig"))
  except UnicodeDecodeError:
    return None, None, "caption is not UTF-8"
  except (ValueError, RecursionError):
    return caption, None, "not JSON"
  if not isinstance(fields, dict):
    return caption, None, "not a JSON object"
  return fields.get("caption") if caption is None else caption, fields.get("p_choice"), None


def _form_pair(
  members: dict[str, bytes], caption: object, p_choice: object, fault: str | None, where: str
) -> rows.Pair:
  if fault is not None:
    raise faults.Fault(fault)
  if _TWICE in members:
    raise faults.Fault("member given twice")
  for role in ("winner", "loser"):
    if role not in members:
      raise faults.Fault(f"{role} is missing")
  images = [faults.check_image(members[role]) for role in ("winner", "loser")]
  source = faults.check_image(members["source"]) if "source" in members else None
  # The name of a member says which pair it is of, not which image it is: hence its bytes.
  couple = "-".join(sorted(hashlib.sha256(image).hexdigest()[:16] for image in images))
  return rows.Pair(
    faults.check_caption(caption),
    *images,
    pairs_lists.check_choice(p_choice),
    couple,
    where,
    source,
  )
