"""Small real files of every source: parquet, JSON, CSV and tar with real JPEG, PNG, WebP bytes."""

import functools
import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dmpo_jax.data.emoji_choice import emoji as emoji_lib

# The types of the data card of yuvalkirstain/pickapic_v1.
PICKAPIC = pa.schema(
  [
    ("are_different", pa.bool_()),
    ("best_image_uid", pa.string()),
    ("caption", pa.string()),
    ("created_at", pa.timestamp("ns")),
    ("has_label", pa.bool_()),
    ("image_0_uid", pa.string()),
    ("image_0_url", pa.string()),
    ("image_1_uid", pa.string()),
    ("image_1_url", pa.string()),
    ("jpg_0", pa.binary()),
    ("jpg_1", pa.binary()),
    ("label_0", pa.float64()),
    ("label_1", pa.float64()),
    ("model_0", pa.string()),
    ("model_1", pa.string()),
    ("ranking_id", pa.int64()),
    ("user_id", pa.int64()),
    ("num_example_per_prompt", pa.int64()),
    ("__index_level_0__", pa.int64()),
  ]
)


@functools.cache
def picture(index: int, kind: str = "JPEG") -> bytes:
  """The drawing of the index-th most used emoji."""
  buffer = io.BytesIO()
  emoji_lib.draw(emoji_lib.load_emoji(160)[index % 160]).save(buffer, kind)
  return buffer.getvalue()


def noise(seed: int, side: int = 128) -> bytes:
  """A JPEG that no compression makes smaller, about 20 kB."""
  pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
  return buffer.getvalue()


def pickapic_row(index: int, label: float | None = 1.0, **changes) -> dict:
  """A row in which emoji 2 * index stands against the next; `label` is that of the first."""
  first, second = 2 * index, 2 * index + 1
  other = None if label is None else 1.0 - label
  row = dict.fromkeys(PICKAPIC.names) | {
    "are_different": True,
    "best_image_uid": f"uid-{first}" if label == 1 else f"uid-{second}",
    "caption": f"emoji {index}",
    "has_label": True,
    "image_0_uid": f"uid-{first}",
    "image_1_uid": f"uid-{second}",
    "jpg_0": picture(first),
    "jpg_1": picture(second),
    "label_0": label,
    "label_1": other,
  }
  return row | changes


def write_pickapic(path: pathlib.Path, rows: list[dict], **options) -> pathlib.Path:
  """A shard of the real schema."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows, PICKAPIC), path, **options)
  return path


def write_images(folder: pathlib.Path, *names: str) -> None:
  """Image files; the kind is that of the suffix, the drawing that of the position."""
  kinds = {".png": "PNG", ".webp": "WEBP"}
  for index, name in enumerate(names):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(index, kinds.get(path.suffix, "JPEG")))


def write_json(path: pathlib.Path, value: object) -> None:
  """One JSON value."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: pathlib.Path, lines: list[object]) -> None:
  """One JSON value a line; text is written as it is."""
  text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  path.write_text("".join(line + "\n" for line in text), encoding="utf-8")


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes]]) -> None:
  """Members in order."""
  with tarfile.open(path, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def write_own_pairs(folder: pathlib.Path, count: int, name: str = "all.jsonl", **fields) -> None:
  """`count` pairs with different captions, PNG against JPEG, in one list."""
  names = [f"images/{index}.{'jpg' if index % 2 else 'png'}" for index in range(2 * count)]
  write_images(folder, *names)
  lines = [
    {"caption": f"emoji {index}", "winner": names[2 * index], "loser": names[2 * index + 1]}
    | fields
    for index in range(count)
  ]
  write_jsonl(folder / name, lines)


def write_drawings(folder: pathlib.Path, count: int = 30, broken: int = 0) -> pathlib.Path:
  """A sound folder of own pairs, all PNG, in pairs.jsonl; `broken` winners are no pictures."""
  lines = []
  for index in range(count):
    names = {"winner": f"{2 * index}.png", "loser": f"{2 * index + 1}.png"}
    for offset, name in enumerate(names.values()):
      folder.mkdir(exist_ok=True)
      data = b"no picture" if index < broken and not offset else picture(2 * index + offset, "PNG")
      (folder / name).write_bytes(data)
    lines.append({"caption": f"drawing {index}", **names})
  write_jsonl(folder / "pairs.jsonl", lines)
  return folder
