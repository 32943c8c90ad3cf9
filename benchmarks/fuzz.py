"""Damaged and hostile files for every reader of files that come from elsewhere.

    python benchmarks/fuzz.py                            # 100,000 inputs for each reader
    python benchmarks/fuzz.py --inputs 2000 --readers image lora
    python benchmarks/fuzz.py --readers csv --first 4711 --inputs 1    # one of them again
    python benchmarks/fuzz.py --guided        # by coverage; needs `pip install atheris`
    python benchmarks/fuzz.py --readers csv --data 00ff    # an input of those again

Each input is a valid one, changed in a few places: as a structure (names and values of JSON, cells,
tensors' names and shapes) or as bytes. It is a function of the seed, the reader and its number. A
reader may refuse it with ValueError, which all of them document, or drop it as a broken row; any
other exception, a crash or an input that takes longer than a minute fails. Each reader has a
process of its own, whose peak of memory over that after a valid input is printed beside the longest
time of one input (of the processor, so that others on the machine do not count); beyond
`MOST_MEMORY` and `MOST_SECONDS` they fail too. The exit status is 1 if anything failed.

With `--guided`, atheris (libFuzzer) makes the choices: the same changes are drawn from bytes that
it varies, and it keeps those bytes that reach branches of `dmpo_jax` that none reached before.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import inspect
import io
import json
import math
import mmap
import os
import pathlib
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import (
  diffusion,
  json_files,
  lora,
  lora_files,
  safetensors_io,
  single_file,
  single_file_configs,
)
from dmpo_jax.data import images, rows, tokenizer
from dmpo_jax.data.sources import registry
from dmpo_jax.models import clip, clip_model, unet, vae
from dmpo_jax.scorers import bert_tokenizer, clip_scorers, preprocess

INPUTS = 100_000
HANG_SECONDS = 60
MOST_SECONDS = 10.0  # a picture of as many pixels as are allowed takes about one
MOST_MEMORY = 1 << 30  # bytes; likewise
SHOWN = 5  # failures of a reader
STARTS = 100  # inputs from which a guided run sets out
INTEGERS = (0, 1, -1, 2, 7, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1)
PATHS = ("..", "../../etc/passwd", "/etc/passwd", "C:\\x")
TEXTS = ("", " ", "\0", *PATHS, "a" * 5000, "\x1b[2J", "\ufb00", "\udc80")
NUMBERS = (0.0, -0.5, 0.5, 1e308, 1e-308, float("nan"), float("inf"), 10**400, -(10**30))


class Reader(NamedTuple):
  """What is fuzzed.

  Attributes:
    valid: an input that must be read without an error.
    change: -> a damaged one.
    read: raises ValueError, or returns.
  """

  valid: Any
  change: Callable[[random.Random], Any]
  read: Callable[[Any], None]


def main() -> int:
  """Runs the readers, or in a process of its own one of them; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--inputs", type=int, default=INPUTS, help="for each reader")
  parser.add_argument("--first", type=int, default=0, help="number of the first one")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
  parser.add_argument("--guided", action="store_true", help="by coverage, with atheris")
  parser.add_argument("--data", type=bytes.fromhex, help="of a guided input that failed, in hex")
  parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.guided and importlib.util.find_spec("atheris") is None:
    parser.error("--guided: atheris is not installed; `pip install atheris` (Linux)")
  if options.data is not None:
    if len(options.readers) != 1:
      parser.error(f"--data: expected one of --readers, got {len(options.readers)}")
    with tempfile.TemporaryDirectory() as folder:
      reader = READERS[options.readers[0]](pathlib.Path(folder))
      reader.read(reader.change(GuidedDice(options.data)))
    return 0
  if options.alone:
    return run_alone(options.readers[0], options)
  print("| reader | inputs | read | refused | failed | longest, s | memory, MiB | inputs/s |")
  print("|---|---|---|---|---|---|---|---|", flush=True)
  return max([run_apart(name, options) for name in options.readers])


def run_apart(name: str, options: argparse.Namespace) -> int:
  """Runs one reader in its own process; a crash is told with the number of the input."""
  with tempfile.TemporaryDirectory(dir=shared_memory()) as folder:
    arguments = ["--inputs", options.inputs, "--first", options.first, "--seed", options.seed]
    arguments += ["--guided"] if options.guided else []
    command = [sys.executable, __file__, "--alone", "--readers", name, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": folder, "JAX_PLATFORMS": "cpu"})
    if done.returncode not in (0, 1):
      number = int.from_bytes(pathlib.Path(folder, "number").read_bytes(), "little")
      print(f"| {name} | crashed with status {done.returncode} at input {number} |", flush=True)
    return min(abs(done.returncode), 1)


class Tally:
  """Reads inputs and keeps what is said of them.

  Attributes:
    done: number of inputs.
  """

  def __init__(self, name: str, reader: Reader):
    reader.read(reader.valid)
    signal.signal(signal.SIGALRM, give_up)
    self.done = 0
    self._name, self._reader = name, reader
    self._read = self._refused = 0
    self._failures: list[tuple[str, str]] = []
    self._longest = (0.0, "")
    self._began, self._before = time.perf_counter(), peak_memory()

  def add(self, changed: Any, title: str) -> None:
    """Reads one; `title` is how to make it again."""
    start = time.process_time()
    signal.alarm(HANG_SECONDS)
    try:
      self._reader.read(changed)
      self._read += 1
    except ValueError:
      self._refused += 1
    except BaseException as error:  # Rust's panics are no Exception
      if isinstance(error, KeyboardInterrupt):
        raise
      self._failures.append((title, traceback.format_exc(limit=-4)))
    signal.alarm(0)
    self._longest = max(self._longest, (time.process_time() - start, title))
    self.done += 1

  def report(self) -> int:
    """Prints the row of the table, and to stderr what failed; the exit status."""
    memory = peak_memory() - self._before
    rate = self.done / (time.perf_counter() - self._began)
    counts = f"{self.done:,} | {self._read:,} | {self._refused:,} | {len(self._failures)}"
    costs = f"{self._longest[0]:.3f} | {memory / 2**20:.0f} | {rate:,.0f}"
    print(f"| {self._name} | {counts} | {costs} |", flush=True)
    for title, text in self._failures[:SHOWN]:
      print(f"{self._name}, {title}: {text}", file=sys.stderr)
    slow = self._longest[0] > MOST_SECONDS
    if slow:
      print(f"{self._name}, {self._longest[1]}: took {self._longest[0]:.1f} s", file=sys.stderr)
    sys.stderr.flush()
    return int(bool(self._failures) or slow or memory > MOST_MEMORY)


def run_alone(name: str, options: argparse.Namespace) -> int:
  """Prints the row of the table, and to stderr what failed."""
  warnings.simplefilter("ignore")
  folder = pathlib.Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
  reader = READERS[name](folder)
  with note_number(folder.parent / "number") as note:
    if options.guided:
      run_guided(name, reader, options, note)
    tally = Tally(name, reader)
    for number in range(options.first, options.first + options.inputs):
      note(number)
      tally.add(make_input(name, reader, options.seed, number), f"input {number}")
  return tally.report()


def run_guided(name: str, reader: Reader, options: argparse.Namespace, note: Callable) -> NoReturn:
  """As the loop of `run_alone`, with inputs of which atheris draws the bytes."""
  import atheris

  for module in [m for name, m in sys.modules.items() if name.startswith("dmpo_jax")]:
    for function in functions_of(module):
      atheris.instrument_func(function)
  tally = Tally(name, reader)

  def one(data: bytes) -> None:
    note(tally.done)
    tally.add(reader.change(GuidedDice(data)), f"--data {data.hex()}")
    if tally.done == options.inputs:
      status = tally.report()
      sys.stdout.flush()
      os._exit(status)  # libFuzzer has no other end that keeps the status

  corpus = pathlib.Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR")))
  dice = random.Random(f"{options.seed} {name}")
  write(corpus, {str(number): dice.randbytes(256) for number in range(STARTS)})
  seed = options.seed + 1  # 0 would be drawn by the clock
  flags = [f"-seed={seed}", "-timeout=0", "-rss_limit_mb=0", "-max_len=1024", "-verbosity=0"]
  atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
  atheris.Fuzz()
  raise AssertionError("libFuzzer came back")


def functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
  """Functions and methods that are written in a module."""
  for value in vars(module).values():
    members = [value, *vars(value).values()] if isinstance(value, type) else [value]
    for member in members:
      for field in ("__func__", "fget", "func"):  # of class methods, properties, cached ones
        member = getattr(member, field, member)
      member = inspect.unwrap(member)
      if isinstance(member, types.FunctionType) and member.__module__ == module.__name__:
        yield member


class GuidedDice(random.Random):
  """Draws from given bytes as long as there are any, then by chance that depends on them."""

  def __init__(self, data: bytes):
    super().__init__(data)
    self._data, self._at = data, 0

  def random(self) -> float:
    """In [0, 1), of two bytes: the changes ask for no finer shares."""
    return self.getrandbits(16) / 2**16

  def getrandbits(self, k: int) -> int:
    size = (k + 7) // 8
    drawn = self._data[self._at : self._at + size]
    self._at += size
    if len(drawn) < size:
      return super().getrandbits(k)
    return int.from_bytes(drawn, "little") & ((1 << k) - 1)


def make_input(name: str, reader: Reader, seed: int, number: int) -> Any:
  """The damaged input of this number."""
  return reader.change(random.Random(f"{seed} {name} {number}"))


def give_up(number, frame):
  raise TimeoutError(f"took longer than {HANG_SECONDS} s")


@contextlib.contextmanager
def note_number(path: pathlib.Path) -> Iterator[Callable[[int], None]]:
  """Keeps a number where a parent finds it even after a crash."""
  path.write_bytes(bytes(8))
  with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as page:
    yield functools.partial(struct.pack_into, "<Q", page, 0)


def shared_memory() -> str | None:
  """A folder that is in memory, where there is one: writing to it is what takes time."""
  return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def peak_memory() -> int:
  """Bytes; of this process since it began."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) * 1024


# Changes.


def change_bytes(dice: random.Random, data: bytes) -> bytes:
  """A few bits, bytes, numbers or pieces are others."""
  for _ in range(dice.choice((1, 1, 2, 4, 8))):
    place = dice.randrange(len(data) + 1)
    end = place + dice.choice((1, 2, 4, 8, 100))
    kind = dice.randrange(7)
    if kind == 0 and data:
      place = dice.randrange(len(data))
      changed = bytes([data[place] ^ 1 << dice.randrange(8)])
      data = data[:place] + changed + data[place + 1 :]
    elif kind == 1:
      data = data[:place] + dice.randbytes(end - place) + data[end:]
    elif kind == 2:
      data = data[:place] + data[end:]
    elif kind == 3:
      data = data[:place] + data[place:end] * dice.choice((2, 3, 50)) + data[end:]
    elif kind == 4:
      data = data[:place]
    elif kind == 5:
      width, order = dice.choice((1, 2, 4, 8)), dice.choice(("little", "big"))
      value = dice.choice(INTEGERS) % 2 ** (8 * width)
      data = data[:place] + value.to_bytes(width, order) + data[place + width :]
    else:
      other = dice.randrange(len(data) + 1)
      data = data[:place] + data[other:end] + data[place:]
  return data


def change_value(dice: random.Random, value: Any) -> Any:
  """One value of a JSON tree, or one name in it, is another."""
  if isinstance(value, dict) and value and dice.random() < 0.9:
    name = dice.choice(list(value))
    kind = dice.random()
    if kind < 0.1:
      return {each: item for each, item in value.items() if each != name}
    if kind < 0.2:
      other = dice.choice([*value, *TEXTS, name.upper(), name + "x"])
      return {(other if each == name else each): item for each, item in value.items()}
    return value | {name: change_value(dice, value[name])}
  if isinstance(value, list) and value and dice.random() < 0.8:
    place = dice.randrange(len(value))
    kind = dice.random()
    if kind < 0.1:
      return value[:place] + value[place + 1 :]
    if kind < 0.2:
      return value[:place] + [value[place]] * dice.choice((2, 40)) + value[place:]
    return [*value[:place], change_value(dice, value[place]), *value[place + 1 :]]
  if isinstance(value, str) and dice.random() < 0.3:
    return change_text(dice, value)
  if isinstance(value, int) and dice.random() < 0.3:
    return value + dice.choice((-1, 1, 8, 2**20))
  scalars = (None, True, False, *INTEGERS, *NUMBERS, *TEXTS)
  return dice.choice((dice.choice(scalars), [value], [value, value], {"a": value}, [], {}))


def change_text(dice: random.Random, text: str) -> str:
  """A piece is left out, doubled or another."""
  place = dice.randrange(len(text) + 1)
  end = place + dice.choice((1, 3, 10))
  other = dice.choice(("", text[place:end] * 2, str(dice.choice(INTEGERS)), dice.choice(TEXTS)))
  return text[:place] + other + text[end:]


def change_json(dice: random.Random, value: Any) -> bytes:
  """A changed tree as text, now and then with changed bytes, or nested deep."""
  if dice.random() < 0.001:
    return dice.choice((b"[", b'{"a":')) * 100_000
  for _ in range(dice.choice((1, 1, 2, 3))):
    value = change_value(dice, value)
  text = json.dumps(value, ensure_ascii=dice.random() < 0.8)
  if dice.random() < 0.02:
    text = text.replace("{", '{"a": 1, "a": 2, ', 1)
  data = text.encode("utf-8", "surrogatepass")
  return change_bytes(dice, data) if dice.random() < 0.2 else data


def one_of(dice: random.Random, files: Mapping[str, Any], change: Callable) -> dict[str, Any]:
  """`files` with one of them changed."""
  name = dice.choice(list(files))
  return {**files, name: change(dice, files[name])}


def write(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
  for name, data in files.items():
    (folder / name).write_bytes(data)


# Readers.


def safetensors_file(header: Any, data: bytes, length: int | None = None) -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  return struct.pack("<Q", length % 2**64) + text + data


def read_safetensors(folder: pathlib.Path) -> Reader:
  header = {
    "__metadata__": {"format": "pt", "more": "text"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "d": {"dtype": "U8", "shape": [0, 5], "data_offsets": [40, 40]},
  }
  data = bytes(range(40))
  valid = safetensors_file(header, data)

  def change(dice):
    kind = dice.random()
    if kind < 0.3:
      return change_bytes(dice, valid)
    length = dice.choice((*INTEGERS, 10 * 2**30)) if kind < 0.35 else None
    return safetensors_file(change_json(dice, header), data, length)

  def read(content):
    file = folder / "x.safetensors"
    file.write_bytes(content)
    safetensors_io.read_metadata(file)
    tensors = safetensors_io.load_safetensors(file)
    for name in tensors:
      if tensors[name].shape != tensors.entries[name].shape:
        raise AssertionError(f"{name}: another shape than announced")

  return Reader(valid, change, read)


def read_index(folder: pathlib.Path) -> Reader:
  for name in "ab":
    file = folder / f"{name}.safetensors"
    file.write_bytes(safetensors.numpy.save({name: np.zeros(2, np.float32)}))
  index = {
    "metadata": {"total_size": 16},
    "weight_map": {"a": "a.safetensors", "b": "b.safetensors"},
  }

  def read(content):
    write(folder, {"model.safetensors.index.json": content})
    tensors = safetensors_io.load_safetensors(folder)
    for name in tensors:
      tensors[name]

  valid = json.dumps(index).encode()
  return Reader(valid, lambda dice: change_json(dice, index), read)


def read_scheduler(folder: pathlib.Path) -> Reader:
  valid = json_files.read_object(shipped("scheduler/scheduler_config.json"))

  def read(content):
    write(folder, {"x.json": content})
    config = diffusion.read_config(base_lib.read_json(folder / "x.json"))
    diffusion.alphas_cumprod(config)

  return Reader(json.dumps(valid).encode(), lambda dice: change_json(dice, valid), read)


def read_models(folder: pathlib.Path) -> Reader:
  parts = {"unet": unet.read_config, "vae": vae.read_config, "text_encoder": clip.read_config}
  valid = {part: json_files.read_object(shipped(f"{part}/config.json")) for part in parts}

  def change(dice):
    return one_of(dice, {part: json.dumps(raw).encode() for part, raw in valid.items()}, again)

  def again(dice, data):
    return change_json(dice, json.loads(data))

  def read(contents):
    write(folder, contents)
    for part, read_config in parts.items():
      read_config(base_lib.read_json(folder / part), part)

  return Reader({part: json.dumps(raw).encode() for part, raw in valid.items()}, change, read)


def picture(kind: str, side: int = 8) -> bytes:
  buffer = io.BytesIO()
  pixels = np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


PAIR = {"caption": "a cat", "winner": "a.png", "loser": "b/b.jpg", "p_choice": 0.75}
OTHERS = [
  {"caption": "two dogs", "winner": "b/b.jpg", "loser": "a.png", "source": "a.png"},
  {"caption": "", "winner": "a.png", "loser": "a.png"},
]


def read_rows(dataset: str, folder: pathlib.Path, name: str, content: bytes) -> None:
  """Reads all rows of a folder with one list, and checks what the rows promise."""
  write(folder, {name: content})
  source = registry.open_source(dataset, folder)
  for shards in source.splits.values():
    for shard in shards:
      for row in shard.read():
        if isinstance(row, rows.Pair):
          row.caption.encode()
          if not 0.5 <= row.p_choice <= 1:
            raise AssertionError(f"{row.where}: p_choice is {row.p_choice}")
        row.where.encode()


def with_images(folder: pathlib.Path) -> pathlib.Path:
  (folder / "b").mkdir()
  write(folder, {"a.png": picture("PNG"), "b/b.jpg": picture("JPEG")})
  return folder


def read_jsonl(folder: pathlib.Path) -> Reader:
  def change(dice):
    lines = [change_json(dice, PAIR), *(json.dumps(each).encode() for each in OTHERS)]
    dice.shuffle(lines)
    return b"\n".join(lines)

  read = functools.partial(read_rows, "pairs", with_images(folder), "all.jsonl")
  return Reader(json.dumps(PAIR).encode(), change, read)


def read_csv(folder: pathlib.Path) -> Reader:
  names = ["caption", "winner", "loser", "source", "p_choice"]
  table = [names] + [[str(each.get(name, "")) for name in names] for each in (PAIR, *OTHERS)]

  def to_bytes(cells):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([map(str, row) for row in cells])
    return buffer.getvalue().encode("utf-8", "surrogatepass")

  def change(dice):
    cells = change_value(dice, table)
    is_table = isinstance(cells, list) and all(isinstance(row, list) for row in cells)
    data = to_bytes(cells if is_table else table)
    return change_bytes(dice, data) if dice.random() < 0.5 or not is_table else data

  read = functools.partial(read_rows, "pairs", with_images(folder), "all.csv")
  return Reader(to_bytes(table), change, read)


def read_tar(folder: pathlib.Path) -> Reader:
  members = {
    "1.winner.png": picture("PNG"),
    "1.loser.jpg": picture("JPEG"),
    "1.json": json.dumps(PAIR).encode(),
    "2.winner.png": picture("PNG"),
    "2.loser.webp": picture("WEBP"),
    "2.txt": b"a dog",
  }

  def to_bytes(files, kind=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
      for name, data in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()

  def change(dice):
    kind = dice.random()
    if kind < 0.2:
      return to_bytes(one_of(dice, members, change_bytes))
    if kind < 0.4:
      name = dice.choice(list(members))
      other = change_text(dice, name)
      files = {(other if each == name else each): data for each, data in members.items()}
      return to_bytes(files, dice.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)))
    data = bytearray(to_bytes(members, dice.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))))
    if kind < 0.7:  # a header whose sum is right says something else
      start = 512 * dice.choice([i for i in range(len(data) // 512) if b"ustar" in block(data, i)])
      place = start + dice.choice((0, 100, 124, 125, 128, 135, 156, 157, 257, 345, 483))
      data[place] = dice.choice((0, 0x31, 0x80, 0xFF, *b"LKxgSV12357\n"))
      data[start + 148 : start + 156] = b" " * 8
      data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
      return bytes(data)
    return change_bytes(dice, bytes(data))

  def block(data, number):
    return data[512 * number : 512 * number + 512]

  read = functools.partial(read_rows, "pairs", folder, "all.tar")
  return Reader(to_bytes(members), change, read)


def read_lists(folder: pathlib.Path) -> Reader:
  images_there = {"path1": "a.png", "path2": "b/b.jpg"}
  entries = {
    "hpdv2": {"prompt": "a", "image_path": ["a.png", "b/b.jpg"], "human_preference": [1, 0]},
    "hpdv3": {"prompt": "a", **images_there, "confidence": 0.9, "choice_dist": [3, 1]},
    "imagereward_db": {"image_path": "a.png", "prompt_id": "1", "prompt": "a", "rank": 1},
  }
  with_images(folder)
  place = {"hpdv2": "train.json", "hpdv3": "train.json"}
  place["imagereward_db"] = "images/train/train_1/train_1.json"
  (folder / place["imagereward_db"]).parent.mkdir(parents=True)

  def change(dice):
    dataset = dice.choice(list(entries))
    two = [entries[dataset], entries[dataset] | {"image_path": "b/b.jpg", "rank": 2}]
    return dataset, change_json(dice, two if dataset == "imagereward_db" else two[:1])

  def read(content):
    dataset, data = content
    read_rows(dataset, folder, place[dataset], data)

  return Reader(("hpdv3", json.dumps([entries["hpdv3"]]).encode()), change, read)


def read_parquet(folder: pathlib.Path) -> Reader:
  row = {
    "caption": "a cat",
    "jpg_0": picture("PNG"),
    "jpg_1": picture("JPEG"),
    "label_0": 1.0,
    "label_1": 0.0,
    "has_label": True,
    "image_0_uid": "a",
    "image_1_uid": "b",
  }
  buffers = []
  for options in ({}, {"compression": "zstd"}, {"use_dictionary": False}):
    buffers.append(io.BytesIO())
    pq.write_table(pa.Table.from_pylist([row] * 3), buffers[-1], **options)
  valid = [buffer.getvalue() for buffer in buffers]

  def change(dice):
    data = dice.choice(valid)
    if dice.random() < 0.5:
      return change_bytes(dice, data)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    return data[:-footer] + change_bytes(dice, data[-footer:-8]) + data[-8:]

  read = functools.partial(read_rows, "pickapic_v2", folder, "train-0.parquet")
  return Reader(valid[0], change, read)


def zeros(shape: tuple[int, ...]) -> safetensors_io.Tensor:
  return safetensors_io.Tensor(
    shape, np.dtype(np.float32), lambda: np.broadcast_to(np.float32(0), shape)
  )


def change_shapes(dice: random.Random, shapes: Mapping[str, tuple]) -> dict[str, tuple[int, ...]]:
  """A few tensors are left out, are called otherwise or have other shapes."""
  shapes = dict(shapes)
  for _ in range(dice.choice((1, 1, 2, 5))):
    name = dice.choice(list(shapes))
    kind = dice.random()
    if kind < 0.25:
      del shapes[name]
    elif kind < 0.75:
      parts = name.split(".")
      place = dice.randrange(len(parts))
      other = dice.choice((str(dice.choice(INTEGERS)), change_text(dice, parts[place])))
      shapes[".".join([*parts[:place], other, *parts[place + 1 :]])] = shapes[name]
      if dice.random() < 0.5:
        shapes.pop(name)
    else:
      shape = shapes[name]
      others = (shape[1:], (*shape, 1), (0, *shape), shape[::-1], (2**62,), ())
      shapes[name] = dice.choice(others)
    if not shapes:
      break
  return shapes


def read_single_file(folder: pathlib.Path) -> Reader:
  parts = {}
  for part in ("unet", "vae", "text_encoder"):
    entries = safetensors_io.load_safetensors(shipped(part)).entries
    parts[part] = {name: zeros(tensor.shape) for name, tensor in entries.items()}
  tensors = {part: safetensors_io.Tensors(entries) for part, entries in parts.items()}
  joined = single_file.join_checkpoint(tensors, "sd1").entries
  valid = {name: tensor.shape for name, tensor in joined.items()}
  first = "model.diffusion_model.input_blocks.0.0.weight"
  valid[first] = (valid[first][0], 4, 3, 3)  # as in Stable Diffusion; the shipped base has 16

  def read(shapes):
    entries = {name: zeros(shape) for name, shape in shapes.items()}
    checkpoint = safetensors_io.Tensors(entries)
    kind = single_file.detect_kind(checkpoint)
    single_file_configs.configs_of(kind, checkpoint, prediction_type="epsilon")  # splits it too

  return Reader(valid, lambda dice: change_shapes(dice, valid), read)


def read_lora(folder: pathlib.Path) -> Reader:
  base = base_lib.load_architecture("emoji", compute="float32", kernel="cpu", remat="full")
  kernels = lora.find_kernels(base.shapes["unet"])
  chosen = [name for name in kernels if name.endswith(("attn1.to_q", "conv1"))][:4]
  metadata = {"r": 2, "lora_alpha": 3.0, "alpha_pattern": {chosen[0]: 4.0}, "use_dora": False}
  metadata = {f"unet.{name}": value for name, value in metadata.items()}
  shapes: dict[str, tuple[int, ...]] = {}
  for number, module in enumerate(chosen):
    *space, width, features = kernels[module].shape
    stem, halves = f"unet.{module}", (".lora_A.weight", ".lora_B.weight")
    if number % 2:
      stem = "lora_unet_" + module.replace(".", "_")
      halves = (".lora_down.weight", ".lora_up.weight")
      shapes[f"{stem}.alpha"] = ()
    shapes[stem + halves[0]] = (2, width, *space)
    shapes[stem + halves[1]] = (features, 2, *(1 for _ in space))

  def to_bytes(shapes, text):
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    return safetensors.numpy.save(arrays, {lora_files.METADATA_KEY: text})

  def change(dice):
    text = json.dumps(metadata)
    if dice.random() < 0.5:
      text = change_json(dice, metadata).decode("utf-8", "replace")
      return to_bytes(shapes, text)
    changed = change_shapes(dice, shapes)
    small = {
      name.encode(errors="replace").decode(): shape
      for name, shape in changed.items()
      if max((0, *shape)) < 2**62 and math.prod(shape) < 10**6
    }
    return to_bytes(small, text)

  def read(content):
    write(folder, {"x.safetensors": content})
    lora_files.read_lora(folder / "x.safetensors", kernels).folded()

  return Reader(to_bytes(shapes, json.dumps(metadata)), change, read)


def read_tokenizer(folder: pathlib.Path) -> Reader:
  with contextlib.redirect_stderr(io.StringIO()):
    tokenizer.train_tokenizer(["a cat", "the cat sat on the mat"] * 3, 524, folder)
  names = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
  valid = {name: (folder / name).read_bytes() for name in names}
  valid["tokenizer.json"] = (folder / "tokenizer.json").read_bytes()

  def change_file(dice, data):
    if not data.startswith(b"{") or dice.random() < 0.3:
      return change_bytes(dice, data)
    return change_json(dice, json.loads(data))

  def change(dice):
    files = dict(valid)
    if dice.random() < 0.7:
      del files["tokenizer.json"]
    return one_of(dice, files, change_file)

  def read(files):
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write(folder, files)
    tokenizer.load_tokenizer(folder)(["a cat on the mat", ""])

  return Reader(valid, change, read)


def read_scorer(folder: pathlib.Path) -> Reader:
  shared = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
  shared |= {"num_hidden_layers": 1, "projection_dim": 4, "hidden_act": "gelu", "top_k": 50}
  config = {
    "model_type": "clip",
    "projection_dim": 4,
    "text_config": shared | {"vocab_size": 20, "eos_token_id": 2, "id2label": {"0": "a"}},
    "text_config_dict": None,
    "vision_config": shared | {"image_size": 28, "patch_size": 14},
  }
  processor = {"size": {"shortest_edge": 28}, "resample": 3, "image_mean": list(preprocess.MEAN)}
  processor |= {"crop_size": {"height": 28, "width": 28}, "do_resize": True}
  valid = {
    "config.json": json.dumps(config).encode(),
    "preprocessor_config.json": json.dumps(processor).encode(),
    "vocab.txt": "\n".join([*bert_tokenizer.SPECIAL, "a", "cat", "##s", "中", ""]).encode(),
  }

  def change_file(dice, data):
    if data.startswith(b"{"):
      return change_json(dice, json.loads(data))
    return change_bytes(dice, data)

  def read(files):
    write(folder, files)
    config = clip_model.read_config(json_files.read_object(folder / "config.json"))
    clip_scorers.check_preprocessor(folder / "preprocessor_config.json", config.vision.image_size)
    bert_tokenizer.load_tokenizer(folder / "vocab.txt")(["a cat on the mat", ""])

  return Reader(valid, lambda dice: one_of(dice, valid, change_file), read)


def read_image(folder: pathlib.Path) -> Reader:
  kinds = [kind for kind in ("PNG", "JPEG", "WEBP") for _ in range(4)]
  kinds += ["GIF", "BMP", "TIFF", "AVIF"]
  valid = [picture(kind) for kind in kinds]

  def read(content):
    images.decode(content)

  return Reader(valid[0], lambda dice: change_bytes(dice, dice.choice(valid)), read)


def shipped(name: str) -> pathlib.Path:
  return base_lib.resolve("emoji") / name


READERS: dict[str, Callable[[pathlib.Path], Reader]] = {
  "safetensors": read_safetensors,
  "index": read_index,
  "scheduler": read_scheduler,
  "models": read_models,
  "jsonl": read_jsonl,
  "csv": read_csv,
  "tar": read_tar,
  "lists": read_lists,
  "parquet": read_parquet,
  "single_file": read_single_file,
  "lora": read_lora,
  "tokenizer": read_tokenizer,
  "scorer": read_scorer,
  "image": read_image,
}


if __name__ == "__main__":
  sys.exit(main())
