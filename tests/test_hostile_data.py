"""Data sets that were made to do harm: pictures, lists, tars and tables, as for models."""

import io
import json
import struct
import tarfile
import warnings
import zlib

import hostile
import pair_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from dmpo_jax import base as base_lib
from dmpo_jax import cli, stages
from dmpo_jax.data import images, rows
from dmpo_jax.data.sources import registry

# Pictures.


def chunk(kind, content):
  checksum = struct.pack(">I", zlib.crc32(kind + content))
  return struct.pack(">I", len(content)) + kind + content + checksum


def bomb(kind):
  """A small file that claims to be a picture of as many pixels as its format allows."""
  if kind == "PNG":
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + data + chunk(b"IEND", b"")
  buffer = io.BytesIO()
  if kind == "animated WEBP":
    more = [Image.new("RGB", (8, 8), "red")]
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", save_all=True, append_images=more)
  else:
    Image.new("RGB", (8, 8)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
  data = bytearray(buffer.getvalue())
  if kind == "JPEG":
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
  elif kind == "WEBP":  # a byte, then 14 bits for each side, less 1
    start = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[start : start + 4], "little") >> 28 << 28
    data[start : start + 4] = (bits | 16_382 | 16_382 << 14).to_bytes(4, "little")
  else:
    start = data.index(b"VP8X") + 12
    data[start : start + 6] = (16_382).to_bytes(3, "little") * 2
  return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "animated WEBP"])
def test_a_picture_of_absurd_size_is_refused_before_memory_is_taken(tmp_path, kind):
  (tmp_path / "x").write_bytes(bomb(kind))
  call = f"images.decode(pathlib.Path({str(tmp_path / 'x')!r}).read_bytes())"
  imports = "from dmpo_jax.data import images; Image.new('RGB', (8, 8)).save(io.BytesIO(), 'WEBP')"
  text, size = hostile.measure(imports, call)
  assert "pixels" in text and size < 32 << 20


def test_a_picture_above_the_limit_is_an_error_and_no_warning_alone():
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's, between its limit and twice that
    with pytest.raises(ValueError, match="10000x9000 pixels; expected at most 89478485 in all"):
      images.decode(pair_files_png(10_000, 9_000))
    assert images.decode(pair_files_png(900, 900)).size == (900, 900)


def pair_files_png(width, height):
  buffer = io.BytesIO()
  Image.new("1", (width, height)).save(buffer, "PNG")
  return buffer.getvalue()


@pytest.mark.slow
def test_a_picture_to_edit_is_read_as_those_of_data_sets_are(tmp_path):
  """Pillow alone would open an EPS with Ghostscript, which runs the program that it holds."""
  base = base_lib.load_base(str(tiny.make_base(tmp_path / "base", kind="pix2pix")), parts=())
  drawing = tmp_path / "x.png"
  drawing.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
  with pytest.raises(ValueError, match="--image: .*x.png is not a readable picture .not one of"):
    stages.read_sources(drawing, base, 2)
  drawing.write_bytes(bomb("PNG"))
  with pytest.raises(ValueError, match="--image: .*x.png is not a readable picture .Image size"):
    stages.read_sources(drawing, base, 2)
  drawing.write_bytes(pair_files.picture(1, "PNG"))
  assert stages.read_sources(drawing, base, 2).shape == (2, 8, 8, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_prepare_counts_bombs_and_goes_on(tiny_base, tmp_path, capsys):
  folder = pair_files.write_drawings(tmp_path / "own", 60)
  for number, kind in enumerate(("PNG", "JPEG", "WEBP")):
    (folder / f"{2 * number}.png").write_bytes(bomb(kind))
  settings = {"batch_size": 8, "data.dataset": "pairs", "data.path": folder}
  settings |= {"data.resize": "bilinear", "data.broken_limit": 0.01}
  arguments = ["prepare", "--data", str(tmp_path / "data")]
  assert cli.main([*arguments, *tiny.overrides(tiny_base, **settings)]) == 2
  error = capsys.readouterr().err
  assert "pairs.jsonl, line 1, image_w: Image size (10000000000 pixels) exceeds limit" in error
  settings["data.broken_limit"] = 0.1
  assert cli.main([*arguments, *tiny.overrides(tiny_base, **settings)]) == 0
  metadata = json.loads(next((tmp_path / "data").rglob("metadata.json")).read_text())
  assert metadata["broken"] == 3


def test_an_image_file_of_absurd_size_is_not_read(tmp_path):
  folder = tmp_path / "own"
  pair_files.write_images(folder, "a.jpg")
  hostile.sparse(folder / "b.png", 10 * hostile.GIB, pair_files.picture(1, "PNG"))
  pair_files.write_jsonl(
    folder / "all.jsonl", [{"caption": "p", "winner": "a.jpg", "loser": "b.png"}]
  )
  (row,) = read_pairs(folder)
  assert row == rows.Dropped("image is too large", "all.jsonl, line 1", True)


# Lists, tars and tables.


def read_pairs(folder, dataset="pairs", **options):
  source = registry.open_source(dataset, folder, **options)
  return [row for shards in source.splits.values() for shard in shards for row in shard.read()]


READ = "from dmpo_jax.data.sources import registry"


def reading(dataset, folder):
  shards = f"registry.open_source({dataset!r}, {str(folder)!r}).splits['train']"
  return f"[row[:2] for shard in {shards} for row in shard.read()]"


def test_a_line_that_does_not_end_is_passed_over(tmp_path):
  sound = {"caption": "p", "winner": "a.jpg", "loser": "b.png"}
  folder = tmp_path / "own"
  pair_files.write_images(folder, "a.jpg", "b.png")
  with (folder / "all.jsonl").open("wb") as file:
    file.write(b'{"caption": "')
    for _ in range(200):
      file.write(b"x" * (1 << 20))
    file.write(b'"}\n' + json.dumps(sound).encode())
  long, pair = read_pairs(folder, validation_share=0.0)
  assert long == rows.Dropped("line is too long", "all.jsonl, line 1", True)
  assert pair.where == "all.jsonl, line 2"
  text, size = hostile.measure(READ, reading("pairs", folder))
  assert "line is too long" in text and size < 64 << 20


def test_a_csv_line_that_does_not_end_is_refused(tmp_path):
  path = hostile.sparse(tmp_path / "all.csv", hostile.GIB, b"caption,winner,loser\nx")
  text, size = hostile.measure(READ, reading("pairs", tmp_path))
  assert text.startswith(f"{path}: cannot be read as UTF-8 text: a line has more than 1048576")
  assert size < 64 << 20


def test_lists_of_other_data_sets_that_are_nested_deep_are_named(tmp_path):
  (tmp_path / "train.json").write_text("[" * 100_000)
  for dataset in ("hpdv2", "hpdv3"):
    with pytest.raises(ValueError, match="train.json: expected a JSON list; damaged or missing"):
      read_pairs(tmp_path, dataset)


def test_votes_whose_sum_is_no_number_are_damaged(tmp_path):
  pair_files.write_images(tmp_path, "a.jpg", "b.png")
  entry = {"prompt": "p", "path1": "a.jpg", "path2": "b.png", "choice_dist": [1e308, 1.1e308]}
  (tmp_path / "train.json").write_text(json.dumps([entry]))
  (row,) = read_pairs(tmp_path, "hpdv3")
  assert row.reason == "choice_dist is damaged"


def test_a_tar_member_that_grows_is_refused_before_memory_is_taken(tmp_path):
  with tarfile.open(tmp_path / "all.tar", "w", format=tarfile.PAX_FORMAT) as tar:
    info = tarfile.TarInfo("k.winner.jpg")
    # A sparse member in GNU's PAX format: 512 bytes in the file, 300 GiB when it is read.
    info.pax_headers = {
      "GNU.sparse.size": str(300 * hostile.GIB),
      "GNU.sparse.numblocks": "1",
      "GNU.sparse.map": "0,512",
    }
    info.size = 512
    tar.addfile(info, io.BytesIO(b"\xff\xd8\xff" + bytes(509)))
  text, size = hostile.measure(READ, reading("pairs", tmp_path))
  assert f"member k.winner.jpg has {300 * hostile.GIB} bytes" in text and size < 64 << 20


def test_a_text_in_a_tar_is_short(tmp_path):
  pair_files.write_tar(tmp_path / "all.tar", [("k.txt", b"x" * (2 << 20))])
  with pytest.raises(ValueError, match=r"all.tar: .*member k.txt has 2097152 bytes"):
    read_pairs(tmp_path)


def test_headers_of_a_tar_that_announce_each_other_are_refused(tmp_path):
  info = tarfile.TarInfo("././@LongLink")
  info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
  block = info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
  (tmp_path / "all.tar").write_bytes(block * 5000)
  with pytest.raises(ValueError, match="all.tar: missing, no plain tar, or damaged .*recursion"):
    read_pairs(tmp_path)


@pytest.mark.parametrize("size", [-512, -(1 << 40)])
def test_a_tar_member_of_negative_size_ends_the_reading(tmp_path, size):
  info = tarfile.TarInfo("k.winner.jpg")
  header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
  header[124:136] = (size % 2**96).to_bytes(12, "big")
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  (tmp_path / "all.tar").write_bytes(bytes(header) + bytes(2048))
  with pytest.raises(ValueError, match="all.tar: missing, no plain tar, or damaged"):
    read_pairs(tmp_path)


def test_names_that_a_terminal_would_obey_are_spelled_out(tmp_path):
  pair_files.write_tar(tmp_path / "all.tar", [("\x1b[2Jk.txt", b"p"), ("\udcff.txt", b"p")])
  first, second = read_pairs(tmp_path, validation_share=0.0)
  assert first.where == "all.tar, key \\x1b[2Jk" and second.where == "all.tar, key \\udcff"


def table(count, **columns):
  row = pair_files.pickapic_row(0) | columns
  return pa.Table.from_pylist([row] * count, pair_files.PICKAPIC)


@pytest.mark.slow
def test_a_parquet_file_that_grows_is_refused_before_memory_is_taken(tmp_path):
  path = tmp_path / "train-00000-of-00001.parquet"
  pq.write_table(table(1, jpg_0=bytes(300 << 20)), path, compression="zstd", use_dictionary=False)
  assert path.stat().st_size < 1 << 20
  text, size = hostile.measure(READ, reading("pickapic_v2", tmp_path))
  assert "bytes are said to be in a file of" in text and "expected at most 100 times" in text
  assert size < 64 << 20


@pytest.mark.parametrize("kept", [0, 3, 12, 0.5, 0.9, -1, -4, -9])
def test_a_parquet_file_without_its_end_is_named(tmp_path, kept):
  path = tmp_path / "train-00000-of-00001.parquet"
  pq.write_table(table(20), path)
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
  with pytest.raises(ValueError, match="train-00000-of-00001.parquet: missing or damaged"):
    read_pairs(tmp_path, "pickapic_v2")


def test_a_parquet_footer_longer_than_the_file_is_named(tmp_path):
  path = tmp_path / "train-00000-of-00001.parquet"
  pq.write_table(table(2), path)
  path.write_bytes(path.read_bytes()[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1")
  text, size = hostile.measure(READ, reading("pickapic_v2", tmp_path))
  assert "missing or damaged" in text and size < 64 << 20
