"""Faults sown into real drawings, each found by its code and counted; a clean set is silent."""

import dataclasses
import io
import json
import pickle
import tracemalloc
import zlib

import numpy as np
import page_reader
import pytest
from PIL import Image

from dmpo_jax import doctor_data, doctor_page, doctor_picture
from dmpo_jax.data import images, rows
from dmpo_jax.data.emoji_choice import emoji as emoji_lib

EVIL = """<script>alert(1)</script>"' onerror=x <b>& \x1b[2J"""
PAIRS, HELD_OUT = 24, 8


@dataclasses.dataclass(frozen=True)
class Listed:
  """A shard that holds its rows; fails after them if told to."""

  name: str
  content: tuple
  error: str = ""

  def read(self):
    yield from self.content
    if self.error:
      raise ValueError(self.error)


@dataclasses.dataclass(frozen=True)
class Noise:
  """A shard of pairs made as they are read."""

  name: str
  count: int

  def read(self):
    for position in range(self.count):
      generator = np.random.default_rng(position)
      winner, loser = (store(noise(generator, 96)) for _ in range(2))
      yield rows.Pair(f"caption {position}", winner, loser, 1.0, str(position), str(position))


def store(picture, kind="PNG", **options):
  buffer = io.BytesIO()
  picture.save(buffer, kind, **options)
  return buffer.getvalue()


def noise(generator, side):
  return Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8))


def drawing(data):
  return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture(scope="module")
def clean():
  """{split: pairs} of 64 emoji, none used twice."""
  emoji = emoji_lib.load_emoji(2 * (PAIRS + HELD_OUT))
  pictures = [images.encode_png(emoji_lib.draw(each)) for each in emoji]
  pairs = [
    rows.Pair(
      f"{emoji[k].name} rather than {emoji[k + 1].name}",
      pictures[k],
      pictures[k + 1],
      1.0,
      f"couple {k}",
      f"clean.parquet, row {k}",
      side=f"image_{k // 2 % 2}",
    )
    for k in range(0, len(emoji), 2)
  ]
  return {"train": pairs[:PAIRS], "validation": pairs[PAIRS:]}


def source(splits, licence="CC-BY 4.0", name="drawings"):
  shards = {split: [Listed(f"{split}.parquet", tuple(found))] for split, found in splits.items()}
  return rows.Source(name, shards, licence, "https://example.org", "f00d")


def diagnose(splits, *, licence="CC-BY 4.0", **settings):
  return doctor_data.diagnose(source(splits, licence), **({"resolution": 64} | settings))


def counts(diagnosis):
  return {finding.code: finding.count for finding in diagnosis.findings}


def change(clean, *positions, **fields):
  """The clean set with these fields of these training pairs changed; functions get the pair."""
  train = list(clean["train"])
  for k in positions:
    new = {name: each(train[k]) if callable(each) else each for name, each in fields.items()}
    train[k] = train[k]._replace(**new)
  return clean | {"train": train}


def add(clean, *extra):
  return clean | {"train": [*clean["train"], *extra]}


def swap(pair):
  return pair._replace(image_w=pair.image_l, image_l=pair.image_w)


def test_a_clean_set_is_silent(clean):
  diagnosis = diagnose(clean)
  assert diagnosis.findings == () and diagnosis.ok
  assert diagnosis.rows == diagnosis.pairs == {"train": PAIRS, "validation": HELD_OUT}
  assert diagnosis.dropped == {} and len(diagnosis.samples) == 12
  shown = doctor_page.show(diagnosis)
  assert "no findings" in shown and "fit for training" in shown


def test_sources_that_do_not_tell_the_side_get_a_note(clean):
  bare = {split: [pair._replace(side=None) for pair in found] for split, found in clean.items()}
  diagnosis = diagnose(bare)
  assert counts(diagnosis) == {"side-unchecked": 32} and diagnosis.findings[0].severity == "note"
  assert diagnosis.ok and "not checked" in doctor_page.show(diagnosis)


def wide(pair):
  return store(drawing(pair.image_w).resize((150, 70)))


def transparent(pair):
  picture = drawing(pair.image_w)
  picture.putalpha(128)
  return store(picture)


def rotated(pair):
  exif = Image.Exif()
  exif[0x0112] = 6
  return store(drawing(pair.image_w), exif=exif)


def animated(pair):
  frames = [drawing(pair.image_l), drawing(pair.image_w)]
  return store(frames[0], save_all=True, append_images=frames[1:])


def deep(pair):
  return store(Image.fromarray(np.asarray(drawing(pair.image_w)).astype(np.uint16)[..., 0] * 257))


def floats(pair):
  return store(drawing(pair.image_w).convert("F"), "TIFF")


def cmyk(pair):
  return store(drawing(pair.image_w).convert("CMYK"), "JPEG")


def palette(pair):
  return store(drawing(pair.image_w).quantize(256))


def scaled(side):
  def both(pair):
    return store(drawing(pair.image_w).resize((side, side)))

  return both


def again(pair):
  """Other bytes, same pixels."""
  return store(drawing(pair.image_l), compress_level=0)


BLANK = store(Image.new("RGB", (72, 72), "black"))
STRIP = store(Image.new("RGB", (30_000, 1)))  # 64 pixels high, it would have 123 million
ONE_SIDED = {"unlike-sides": 1}
# Fields of training pair 5 -> the codes that must be found, with their counts, and no others.
FAULTS = {
  "same file": ({"image_w": lambda pair: pair.image_l}, {"same-image": 1}),
  "same pixels": ({"image_w": again}, {"same-image": 1}),
  "blank": ({"image_w": BLANK}, {"blank-image": 1}),
  "text for an image": ({"image_w": b"<html>404</html>"}, {"unreadable-image": 1}),
  "a program": (
    {"image_w": lambda pair: store(drawing(pair.image_w), "EPS")},
    {"unreadable-image": 1},
  ),
  "no bytes": ({"image_l": b""}, {"unreadable-image": 1}),
  "truncated": ({"image_l": lambda pair: pair.image_l[:-600]}, {"unreadable-image": 1}),
  "both truncated": (
    {"image_w": lambda pair: pair.image_w[:99], "image_l": b"x"},
    {"unreadable-image": 1},
  ),
  "sizes": ({"image_w": scaled(80)}, {"size-mismatch": 1}),
  "below": ({"image_w": scaled(60)}, {"size-mismatch": 1, "below-resolution": 1}),
  "tiny": ({"image_w": scaled(15)}, {"size-mismatch": 1, "tiny-image": 1}),
  "aspect": ({"image_w": wide}, {"size-mismatch": 1, "extreme-aspect": 1}),
  "transparent": ({"image_w": transparent}, ONE_SIDED | {"transparent-image": 1}),
  "palette": ({"image_w": palette}, ONE_SIDED | {"palette-image": 1}),
  "rotated": ({"image_w": rotated}, {"rotated-image": 1}),
  "animated": ({"image_w": animated}, ONE_SIDED | {"animated-image": 1, "same-image": 1}),
  "16 bit": ({"image_w": deep}, {"16-bit-image": 1}),
  "cmyk": ({"image_w": cmyk}, ONE_SIDED | {"cmyk-image": 1}),
  "32 bit": ({"image_w": floats}, {"unreadable-image": 1}),
  "strip": ({"image_w": STRIP}, {"oversized-image": 1}),
  "no words": ({"caption": " \n"}, {"empty-caption": 1}),
  "many words": ({"caption": "many " * 76}, {"long-caption": 1}),
  "p below": ({"p_choice": 0.4}, {"p-choice-range": 1}),
  "p above": ({"p_choice": 7.0}, {"p-choice-range": 1}),
  "p of nothing": ({"p_choice": float("nan")}, {"p-choice-range": 1}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_one_pair(clean, fault):
  fields, expected = FAULTS[fault]
  diagnosis = diagnose(change(clean, 5, **fields))
  assert counts(diagnosis) == expected
  for finding in diagnosis.findings:
    (example,) = finding.examples
    assert example.where == "clean.parquet, row 10"
    whole = {"rows": 32, "pairs": 32, "images": 64}[finding.of]
    assert finding.share == finding.count / whole


def test_both_sides_alike_are_not_called_unlike(clean):
  both = {"image_w": cmyk, "image_l": lambda pair: cmyk(swap(pair))}
  assert counts(diagnose(change(clean, 1, 2, 3, **both))) == {"cmyk-image": 6}


def test_duplicates_and_contradictions(clean):
  pair = clean["train"][3]
  assert counts(diagnose(add(clean, pair, pair))) == {"duplicate-pair": 2}
  assert counts(diagnose(add(clean, swap(pair)))) == {"contradiction": 1}
  assert counts(diagnose(add(clean, pair._replace(caption="another question")))) == {}


def test_many_contradictions_are_an_error(clean):
  few = diagnose(add(clean, *map(swap, clean["train"][:2])))
  many = diagnose(add(clean, *map(swap, clean["train"][:16])))
  assert few.ok and not many.ok and counts(many) == {"contradiction": 16}


def test_overlap_between_splits(clean):
  held_out = clean["validation"][0]

  def also(**fields):
    spare = clean["train"][0]
    wanted = {"caption": "a new one", "couple": "new"} | fields
    return counts(diagnose(add(clean, spare._replace(**wanted))))

  assert also() == {}
  assert also(caption=held_out.caption) == {"prompt-overlap": 1}
  assert also(couple=held_out.couple) == {"couple-overlap": 1}
  assert also(image_w=held_out.image_l) == {"image-overlap": 1}


def test_overlap_is_a_share_of_the_held_out_whatever_the_order(clean):
  held_out = clean["validation"][:2]
  splits = {"validation": clean["validation"], "train": [*clean["train"], *held_out]}
  found = {finding.code: finding for finding in diagnose(splits).findings}
  assert found["prompt-overlap"].share == found["image-overlap"].share == 2 / HELD_OUT
  assert found["image-overlap"].count == 4


def test_ties_and_rows_left_out(clean):
  dropped = [rows.Dropped("tie", "row 1", False)] * 3 + [rows.Dropped("no votes", "row 2", False)]
  diagnosis = diagnose(add(clean, *dropped))
  assert counts(diagnosis) == {"tie": 3, "left-out": 1} and diagnosis.ok
  assert diagnosis.dropped == {"tie": 3, "no votes": 1}
  assert diagnosis.rows["train"] == PAIRS + 4 and diagnosis.pairs["train"] == PAIRS


def test_damaged_rows_and_pictures_count_together_against_the_limit(clean):
  damaged = add(change(clean, 0, image_w=b"?"), rows.Dropped("image is missing", "row 9", True))
  for limit, severity in ((2 / 33, "warning"), (1.9 / 33, "error")):
    diagnosis = diagnose(damaged, broken_limit=limit)
    assert counts(diagnosis) == {"broken-row": 1, "unreadable-image": 1}
    assert {finding.severity for finding in diagnosis.findings} == {severity}
    assert diagnosis.ok == (severity == "warning")


def test_bombs_are_refused_before_they_take_memory(clean, monkeypatch):
  picture = bytearray(clean["train"][0].image_w)
  picture[16:24] = (30_000).to_bytes(4) * 2  # IHDR's sides: 2.7 GB as RGB
  picture[29:33] = zlib.crc32(picture[12:29]).to_bytes(4)
  # Without its last bytes, it would be found truncated if it were decoded.
  found = doctor_picture.look(bytes(picture[:-600]), 64)
  assert [code for code, _ in found.faults] == ["oversized-image"]
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 72 * 72 - 1)  # Pillow itself only warns of these
  assert counts(diagnose(clean)) == {"oversized-image": 32}
  assert not diagnose(clean).ok


def test_every_choice_is_even(clean):
  even = {split: [pair._replace(p_choice=0.5) for pair in found] for split, found in clean.items()}
  diagnosis = diagnose(even)
  assert counts(diagnosis) == {"p-choice-half": 32} and not diagnosis.ok
  assert counts(diagnose(change(clean, *range(PAIRS), p_choice=0.5))) == {}


@pytest.mark.parametrize("side", ["image_0", "out/0a1b-2c3d4e/{}_best.png"])
def test_the_winner_always_stands_in_the_same_place(clean, side):
  def stand(found):
    return [pair._replace(side=side.format(1000 + k)) for k, pair in enumerate(found)]

  diagnosis = diagnose({split: stand(found) for split, found in clean.items()})
  assert counts(diagnosis) == {"side-leak": 32} and diagnosis.count("warning") == 1
  assert diagnosis.findings[0].examples[0].detail in ("image_0", "out/#/#_best.png")


def test_format_and_size_that_give_the_winner_away(clean):
  def jpeg(pair):
    return store(drawing(pair.image_l), "JPEG")

  found = counts(diagnose(change(clean, *range(PAIRS), image_l=jpeg)))
  assert found == {"format-leak": PAIRS, "unlike-sides": PAIRS}
  found = counts(diagnose(change(clean, *range(PAIRS), image_w=scaled(90))))
  assert found == {"size-leak": PAIRS, "size-mismatch": PAIRS}
  found = counts(diagnose(change(clean, *range(19), image_l=jpeg)))
  assert found == {"unlike-sides": 19}  # too few to tell from chance
  mixed = change(clean, *range(12), image_w=scaled(90))
  mixed = change(mixed, *range(12, PAIRS), image_w=scaled(66))
  assert counts(diagnose(mixed)) == {"size-mismatch": PAIRS}


def test_captions_that_are_all_the_same(clean):
  same = {split: [pair._replace(caption="x") for pair in found] for split, found in clean.items()}
  assert counts(diagnose(same)) == {"same-caption": 32, "prompt-overlap": HELD_OUT}
  assert counts(diagnose(change(clean, *range(16), caption="x"))) == {}
  assert counts(diagnose(change(clean, *range(17), caption="x"))) == {"same-caption": 17}


def test_words_are_counted_without_a_tokenizer(clean):
  assert counts(diagnose(change(clean, 0, caption="many " * 75))) == {}


def test_the_tokenizer_decides_what_is_too_long(clean):
  def tokenize(captions):
    return None, sum("rather" not in caption for caption in captions)

  diagnosis = diagnose(change(clean, 1, 2, caption=lambda pair: pair.where), tokenize=tokenize)
  assert counts(diagnosis) == {"long-caption": 2}


def test_faults_of_the_whole_source(clean):
  diagnosis = diagnose({"test": clean["validation"]}, licence=None)
  assert counts(diagnosis) == {"no-pairs": 1, "no-validation": 1, "no-licence": 1}
  assert [finding.severity for finding in diagnosis.findings] == ["error", "warning", "warning"]
  assert counts(diagnose(clean, licence=" ")) == {"no-licence": 1}
  assert not diagnose({}).ok


def test_a_damaged_file_does_not_hide_the_others(clean):
  broken = Listed("a.parquet", tuple(clean["train"][:2]), "a.parquet: no column `caption_0`")
  whole = Listed("b.parquet", tuple(clean["train"][2:]))
  splits = {"train": [broken, whole], "validation": [Listed("v", tuple(clean["validation"]))]}
  diagnosis = doctor_data.diagnose(source({})._replace(splits=splits), resolution=64)
  assert counts(diagnosis) == {"unreadable-shard": 1} and not diagnosis.ok
  assert diagnosis.pairs["train"] == PAIRS
  assert diagnosis.findings[0].examples[0].detail == "a.parquet: no column `caption_0`"


def test_limit_and_progress(clean):
  seen = []
  diagnosis = diagnose(clean, limit=5, progress=lambda *news: seen.append(news))
  assert diagnosis.rows == {"train": 5, "validation": 5} and diagnosis.limit == 5
  assert seen == [("train", 5), ("validation", 5)]
  assert "first 5 rows of each split" in doctor_page.show(diagnosis)


@pytest.mark.parametrize("setting", [{"resolution": 0}, {"limit": 0}, {"broken_limit": 1.5}])
def test_settings_out_of_range(clean, setting):
  (value,) = setting.values()
  with pytest.raises(ValueError, match=rf"diagnose: expected.*{value}"):
    diagnose(clean, **setting)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures():
  noisy = rows.Source("noise", {"train": [Noise("n", 200)]}, "MIT", "", "")
  doctor_data.diagnose(noisy._replace(splits={"train": [Noise("n", 20)]}), resolution=64)
  tracemalloc.start()
  diagnosis = doctor_data.diagnose(noisy, resolution=64)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert diagnosis.pairs == {"train": 200}  # 11 MB of PNG
  assert peak < 2.5e6
  assert sum(len(finding.examples) for finding in diagnosis.findings) <= 10


def test_shards_of_a_test_can_be_pickled(clean):
  shard = Listed("a", tuple(clean["train"][:1]))
  assert pickle.loads(pickle.dumps(shard)) == shard and isinstance(shard, rows.Shard)


def test_every_rule_has_a_text():
  assert list(doctor_page.TEXTS) == list(doctor_data.RULES)
  assert {rule.severity for rule in doctor_data.RULES.values()} == set(doctor_data.SEVERITIES)


@pytest.fixture
def hostile(clean):
  """A diagnosis in which every text that comes from outside is an attack."""
  fields = {"caption": EVIL + "x" * 9999, "where": EVIL, "couple": EVIL, "side": EVIL}
  splits = change(clean, 1, 2, **fields, p_choice=3.0, image_l=b"junk")
  splits = add(splits, rows.Dropped(EVIL, EVIL, True), clean["validation"][0]._replace(**fields))
  evil = source(splits | {EVIL: [clean["train"][1]._replace(caption="half \ud800")]}, EVIL, EVIL)
  return doctor_data.diagnose(evil._replace(homepage=EVIL, fingerprint=EVIL), resolution=64)


def test_the_page_escapes_what_strangers_wrote(hostile, tmp_path):
  page = doctor_page.write(hostile, tmp_path / "deep" / "folder")
  content = page.read_text(encoding="utf-8")
  reader = page_reader.Reader(content)
  assert not {"script", "b<", "object", "iframe"} & set(reader.tags)
  assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
  addresses = [value for _, name, value in reader.attributes if name in ("src", "href")]
  assert addresses and all(each.startswith("data:image/jpeg;base64,") for each in addresses)
  assert "<script" not in content and "alert(1)" in "".join(reader.words)
  assert "prefers-color-scheme:dark" in content and len(content) < 1_000_000
  assert "x" * 400 not in content


def test_the_terminal_gets_no_control_characters(hostile):
  shown = doctor_page.show(hostile)
  assert "\x1b" not in shown and "[p-choice-range]" in shown
  assert f"{EVIL[:9]}" in shown and "would spoil training" in shown


def test_json_holds_all_findings(hostile, tmp_path):
  doctor_page.write(hostile, tmp_path)
  content = json.loads((tmp_path / "doctor.json").read_text(encoding="utf-8"))
  assert content["ok"] is False and content["pairs"]["train"] == PAIRS + 1
  found = {finding["code"]: finding for finding in content["findings"]}
  assert list(found) == [finding.code for finding in hostile.findings]
  broken = found["unreadable-image"]
  assert broken["count"] == 2 and broken["severity"] == "error" and broken["examples"]
  assert broken["effect"] and broken["remedy"] and broken["title"]
  assert broken["examples"][0]["where"] == EVIL


def test_the_folder_is_a_file(hostile, tmp_path):
  path = tmp_path / "file"
  path.write_text("")
  with pytest.raises(ValueError, match="is a file"):
    doctor_page.write(hostile, path)
