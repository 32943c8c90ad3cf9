"""`dmpo doctor data`: reads every pair of a source once and finds what would spoil a training run.

Of a pair nothing is kept but 64-bit hashes and counters (about half a gigabyte a million pairs);
of a few, texts and small pictures. What a finding means is told by `doctor_page`. Images that were
judged one by one are looked at likewise: their verdict is then what a leak gives away.
"""

import collections
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dmpo_jax import doctor_picture as picture_lib
from dmpo_jax.data import rows

Tokenize = Callable[[Sequence[str]], tuple[Any, int]]
Progress = Callable[[str, int], None]

SEVERITIES = ("error", "warning", "note")
_EXAMPLES, _SAMPLES = 5, 12
_LOOKS = 4096  # pictures whose facts are remembered; sources repeat a picture in nearby rows
_WORDS = 75  # more words than CLIP's 77 places less start and end cannot fit
# A leak: so many pairs differ, this share of all, and so many of those go one way.
_LEAK_PAIRS, _LEAK_REACH, _LEAK_SHARE = 20, 0.05, 0.95  # 19 of 20 by chance: 4e-5
_PROGRESS_ROWS = 256
# What tells one file name from the next: UUIDs, hashes, running numbers. A short number stays, it
# may be the side, as in `image_1` and `00042_1.png`.
_NAME_PART = re.compile(r"[0-9a-f-]{8,}|\d{3,}")
_SPOILED = ("broken-row", "unreadable-image", "oversized-image")
_HARMLESS = {"rotated-image", "16-bit-image"}  # nothing of it is left in the decoded picture
_LEAKS = ("side-leak", "format-leak", "size-leak")
_OF_JUDGED = {"pairs": "images", "held-out pairs": "held-out images"}


class Rule(NamedTuple):
  """How a kind of finding is judged.

  Attributes:
    severity: "error": would spoil training; "warning"; "note".
    of: what its share is a share of: rows, pairs, images, held-out pairs or images; "" for faults
      of the whole source.
    error_above: share from which on it is an error; None: never.
  """

  severity: str
  of: str
  error_above: float | None = None


# From `error_above` on the fault is no accident of single rows but a mistake in reading the source.
RULES = {
  "no-pairs": Rule("error", ""),
  "unreadable-shard": Rule("error", ""),
  "no-validation": Rule("warning", ""),
  "no-licence": Rule("warning", ""),
  "broken-row": Rule("warning", "rows"),
  "tie": Rule("note", "rows"),
  "left-out": Rule("note", "rows"),
  "unreadable-image": Rule("warning", "rows"),
  "oversized-image": Rule("warning", "rows"),
  "p-choice-range": Rule("error", "pairs"),
  "p-choice-half": Rule("error", "pairs"),
  "one-verdict": Rule("warning", ""),
  "mixed-verdict": Rule("warning", "pairs", 0.25),
  "same-verdict": Rule("note", "pairs"),
  "side-leak": Rule("warning", "pairs"),
  "format-leak": Rule("error", "pairs"),
  "size-leak": Rule("warning", "pairs"),
  "side-unchecked": Rule("note", "pairs"),
  "contradiction": Rule("warning", "pairs", 0.25),
  "duplicate-pair": Rule("warning", "pairs", 0.5),
  "same-image": Rule("warning", "pairs", 0.05),
  "size-mismatch": Rule("warning", "pairs"),
  "unlike-sides": Rule("warning", "pairs"),
  "empty-caption": Rule("warning", "pairs", 0.5),
  "same-caption": Rule("warning", "pairs"),
  "long-caption": Rule("warning", "pairs"),
  "prompt-overlap": Rule("warning", "held-out pairs"),
  "couple-overlap": Rule("warning", "held-out pairs"),
  "image-overlap": Rule("warning", "held-out images"),
  "blank-image": Rule("warning", "images", 0.05),
  "tiny-image": Rule("warning", "images", 0.05),
  "below-resolution": Rule("warning", "images"),
  "extreme-aspect": Rule("warning", "images"),
  "cmyk-image": Rule("warning", "images"),
  "animated-image": Rule("warning", "images"),
  "16-bit-image": Rule("note", "images"),
  "rotated-image": Rule("note", "images"),
  "transparent-image": Rule("note", "images"),
  "palette-image": Rule("note", "images"),
}


class Example(NamedTuple):
  """A row to look at.

  Attributes:
    where: file and row.
    detail: what is the matter with it.
    caption: its beginning.
    image_w: small JPEG of the winner; None where it cannot be read or plays no part.
    image_l: small JPEG of the loser.
    verdict: of a judged image, which then is `image_w`.
  """

  where: str
  detail: str = ""
  caption: str = ""
  image_w: bytes | None = None
  image_l: bytes | None = None
  verdict: str = ""


class Finding(NamedTuple):
  """One kind of fault, and how often it was met.

  Attributes:
    code: a key of `RULES`, and of `doctor_page.TEXTS`, which says what it does and what helps.
    severity: of `SEVERITIES`.
    count: how many of `of`.
    share: count over all of them, [0, 1]; 1 for a fault of the whole source.
    of: as in `Rule`.
    examples: the first few.
  """

  code: str
  severity: str
  count: int
  share: float
  of: str
  examples: tuple[Example, ...]


class Diagnosis(NamedTuple):
  """What `diagnose` found.

  Attributes:
    name: of the source.
    licence: of the source.
    homepage: of the source.
    fingerprint: of the source.
    resolution: the training resolution it was judged for, pixels.
    limit: rows read of each split at most; None: all.
    rows: split -> rows read.
    pairs: split -> pairs among them.
    dropped: reason -> rows that are no pair.
    findings: errors first.
    samples: pairs drawn at random.
    judged: whether they are images that were judged one by one, and no pairs.
  """

  name: str
  licence: str | None
  homepage: str
  fingerprint: str
  resolution: int
  limit: int | None
  rows: dict[str, int]
  pairs: dict[str, int]
  dropped: dict[str, int]
  findings: tuple[Finding, ...]
  samples: tuple[Example, ...]
  judged: bool = False

  @property
  def ok(self) -> bool:
    """Whether nothing was found that would spoil training."""
    return not self.count("error")

  def count(self, severity: str) -> int:
    """Number of findings of a severity."""
    return sum(finding.severity == severity for finding in self.findings)


def diagnose(
  source: rows.Source,
  *,
  resolution: int,
  tokenize: Tokenize | None = None,
  limit: int | None = None,
  broken_limit: float = 0.01,
  progress: Progress | None = None,
) -> Diagnosis:
  """Reads all pairs once, in this process, and reports what is wrong with them.

  Args:
    source: the data set.
    resolution: short side that pictures are resized to for training, pixels, at least 1.
    tokenize: captions -> (ids, how many of the captions had to be cut), as
      `tokenizer.ClipTokenizer.encode`; None: words are counted.
    limit: rows to read of each split, at least 1; None: all.
    broken_limit: share of damaged rows and rows with unreadable pictures, [0, 1], above which they
      are an error.
    progress: called now and then as progress(name of the split, rows read of it).

  Returns:
    The findings, worst first.

  Raises:
    ValueError: a setting is out of range.
  """
  if resolution < 1 or (limit is not None and limit < 1) or not 0 <= broken_limit <= 1:
    raise ValueError(
      "diagnose: expected resolution and limit of at least 1 and broken_limit in [0, 1], got"
      f" resolution {resolution}, limit {limit}, broken_limit {broken_limit}"
    )
  scan = _Scan(resolution, tokenize)
  # The first split read is what the others may overlap with, so it has to be the training set.
  for split in sorted(source.splits, key=lambda name: name != "train"):
    _read(scan, split, itertools.islice(_rows(scan, source.splits[split]), limit), progress)
  _judge_source(scan, source)
  return Diagnosis(
    name=source.name,
    licence=source.licence,
    homepage=source.homepage,
    fingerprint=source.fingerprint,
    resolution=resolution,
    limit=limit,
    rows=scan.rows,
    pairs=scan.pairs,
    dropped=dict(scan.dropped.most_common()),
    findings=_findings(scan, broken_limit),
    samples=tuple(scan.samples),
    judged=scan.judged,
  )


def _rows(scan: "_Scan", shards: Sequence[rows.Shard]) -> Iterator[rows.Row]:
  for shard in shards:
    try:
      yield from shard.read()
    except ValueError as error:  # of this file; the others may still tell something
      scan.add(
        "unreadable-shard", Example(picture_lib.clip(shard.name), picture_lib.clip(str(error)))
      )


def _read(
  scan: "_Scan",
  split: str,
  found: Iterator[rows.Row],
  progress: Progress | None,
) -> None:
  scan.start(split)
  for row in found:
    scan.read(row)
    if progress and scan.rows[split] % _PROGRESS_ROWS == 0:
      progress(split, scan.rows[split])
  if progress:
    progress(split, scan.rows[split])


def _judge_source(scan: "_Scan", source: rows.Source) -> None:
  found = ", ".join(source.splits) or "none"
  if not scan.pairs.get("train"):
    scan.add("no-pairs", Example(picture_lib.clip(source.name), f"splits: {found}"))
  if not scan.pairs.get("validation"):
    scan.add("no-validation", Example(picture_lib.clip(source.name), f"splits: {found}"))
  if not (source.licence or "").strip():
    scan.counts["no-licence"] = 1


def _findings(scan: "_Scan", broken_limit: float) -> tuple[Finding, ...]:
  scan.conclude()
  whole = scan.totals()
  spoiled = sum(scan.counts[code] for code in _SPOILED)
  findings = []
  for code, rule in RULES.items():
    count = scan.counts[code]
    if count:
      share = count / whole[rule.of] if rule.of else 1.0
      severity = rule.severity
      if rule.error_above is not None and share > rule.error_above:
        severity = "error"
      if code in _SPOILED and spoiled > broken_limit * whole["rows"]:
        severity = "error"
      examples = tuple(scan.examples[code])
      of = _OF_JUDGED.get(rule.of, rule.of) if scan.judged else rule.of
      findings.append(Finding(code, severity, count, share, of, examples))
  return tuple(sorted(findings, key=lambda each: SEVERITIES.index(each.severity)))


class _Scan:
  """Hashes, counters and examples of the rows read so far."""

  def __init__(self, resolution: int, tokenize: Tokenize | None):
    self._resolution, self._tokenize = resolution, tokenize
    self.rows: dict[str, int] = {}
    self.pairs: dict[str, int] = {}
    self.dropped: collections.Counter[str] = collections.Counter()
    self.counts: collections.Counter[str] = collections.Counter()
    self.examples: dict[str, list[Example]] = collections.defaultdict(list)
    self.samples: list[Example] = []
    self._random = random.Random(0)
    self._looks: dict[int, picture_lib.Look] = {}
    # Hash -> bits: of the splits that hold it; of a pair, the sides that won.
    self._seen: dict[str, dict[int, int]] = collections.defaultdict(dict)
    self._captions: collections.Counter[int] = collections.Counter()
    self._commonest: tuple[int, Example] | None = None
    self._halves = 0
    self._leaks: dict[str, collections.Counter[str]] = {c: collections.Counter() for c in _LEAKS}
    self.judged = False
    # Leak -> kind -> how many judged images are undesirable and desirable.
    self._verdicts: dict[str, dict[str, list[int]]] = {"format-leak": {}, "size-leak": {}}

  def start(self, split: str) -> None:
    """Counts what follows to `split`."""
    self._split, self._bit = split, 1 << len(self.rows)
    self.rows[split] = self.pairs[split] = 0

  def add(self, code: str, example: Example) -> None:
    """Counts a fault, and keeps the example if there are few."""
    self.counts[code] += 1
    if len(self.examples[code]) < _EXAMPLES:
      self.examples[code].append(example)

  def read(self, row: rows.Row) -> None:
    """Takes in one row."""
    self.rows[self._split] += 1
    if isinstance(row, rows.Dropped):
      self.dropped[row.reason] += 1
      other = "tie" if re.search(r"\bties?\b", row.reason.lower()) else "left-out"
      code = "broken-row" if row.broken else other
      self.add(code, Example(picture_lib.clip(row.where), picture_lib.clip(row.reason)))
      return
    self.pairs[self._split] += 1
    faults = [*self._caption_faults(row)]
    if isinstance(row, rows.Judged):
      self.judged = True
      faults += self._judged_faults(row)
    else:
      faults += [*self._choice_faults(row), *self._picture_faults(row)]
    shown = any(len(self.examples[code]) < _EXAMPLES for code, _ in faults)
    example = _show(row) if shown else Example("")
    for code, detail in faults:
      self.add(code, example._replace(detail=detail))
    self._sample(row)

  def totals(self) -> Mapping[str, int]:
    """What shares are shares of."""
    pairs = sum(self.pairs.values())
    held_out = pairs - next(iter(self.pairs.values()), 0)
    images = 1 if self.judged else 2
    whole = {"rows": sum(self.rows.values()), "pairs": pairs, "images": images * pairs}
    return whole | {"held-out pairs": held_out, "held-out images": images * held_out}

  def conclude(self) -> None:
    """Adds what only shows in the whole; leaks were counted as suspicions until here."""
    pairs = self.totals()["pairs"]
    if self._commonest and pairs >= _LEAK_PAIRS and 2 * self._commonest[0] > pairs:
      self.counts["same-caption"], example = self._commonest
      self.examples["same-caption"] = [example]
    self.counts["p-choice-half"] = self._halves if self._halves == pairs else 0
    for code, winners in self._leaks.items():
      self.counts[code] = 0
      if winners.total() >= max(_LEAK_PAIRS, _LEAK_REACH * pairs):
        (_, count), *_ = winners.most_common(1)
        self.counts[code] = count if count >= _LEAK_SHARE * winners.total() else 0
    if self.judged:
      for code, kinds in self._verdicts.items():
        self.counts[code] = _told_by(kinds)
      verdicts = [
        sum(column) for column in zip(*self._verdicts["format-leak"].values(), strict=True)
      ]
      self.counts["one-verdict"] = int(0 in verdicts)

  def _caption_faults(self, pair: rows.Pair | rows.Judged) -> Iterator[picture_lib.Fault]:
    caption = picture_lib.hash_bytes(pair.caption)
    yield from self._overlap("prompt-overlap", caption)
    self._captions[caption] += 1
    if not self._commonest or self._captions[caption] > self._commonest[0]:
      self._commonest = (
        self._captions[caption],
        Example(picture_lib.clip(pair.where), "", picture_lib.clip(pair.caption)),
      )
    if not pair.caption.strip():
      yield "empty-caption", ""
    words = len(pair.caption.split())
    if self._tokenize([pair.caption])[1] if self._tokenize else words > _WORDS:
      yield "long-caption", f"{words} words"

  def _choice_faults(self, pair: rows.Pair) -> Iterator[picture_lib.Fault]:
    yield from self._overlap("couple-overlap", picture_lib.hash_bytes(pair.couple), pair.couple)
    if not 0.5 <= pair.p_choice <= 1:
      yield "p-choice-range", f"p_choice is {pair.p_choice}"
    self._halves += pair.p_choice == 0.5
    if pair.side is None:
      yield "side-unchecked", ""
    else:
      yield self._suspect("side-leak", _NAME_PART.sub("#", picture_lib.clip(pair.side)))

  def _judged_faults(self, row: rows.Judged) -> Iterator[picture_lib.Fault]:
    key = picture_lib.hash_bytes(row.image)
    yield from self._overlap("image-overlap", key)
    before = self._met_before(f"{key} {row.caption}", 1 + row.desirable)
    if before:
      yield ("same-verdict" if before == 1 + row.desirable else "mixed-verdict"), ""
    found = self._look(key, row.image)
    yield from found.faults
    if found.pixels is None:
      return
    yield from ((code, "") for code in found.traits)
    kinds = {"format-leak": found.format, "size-leak": "{} x {}".format(*found.size)}
    for code, kind in kinds.items():
      known = self._verdicts[code]
      kind = kind if kind in known or len(known) < _LOOKS else ""  # sizes may be without end
      known.setdefault(kind, [0, 0])[row.desirable] += 1

  def _picture_faults(self, pair: rows.Pair) -> Iterator[picture_lib.Fault]:
    keys = [picture_lib.hash_bytes(data) for data in (pair.image_w, pair.image_l)]
    for key, side in zip(keys, ("winner", "loser"), strict=True):
      yield from self._overlap("image-overlap", key, side)
    yield from self._repeats(pair, keys)
    winner, loser = (
      self._look(key, data) for key, data in zip(keys, (pair.image_w, pair.image_l), strict=True)
    )
    if winner.pixels is None or loser.pixels is None:
      side, broken = ("winner", winner) if winner.pixels is None else ("loser", loser)
      yield from ((code, f"{side}: {detail}") for code, detail in broken.faults)
      return
    for side, each in (("winner", winner), ("loser", loser)):
      yield from ((code, f"{side}: {detail}") for code, detail in each.faults)
      yield from ((code, side) for code in each.traits)
    if winner.pixels == loser.pixels and winner.size == loser.size:
      yield "same-image", "same file" if keys[0] == keys[1] else "same pixels in other files"
    yield from self._differences(winner, loser)

  def _differences(
    self, winner: picture_lib.Look, loser: picture_lib.Look
  ) -> Iterator[picture_lib.Fault]:
    """What tells the winner's file from the loser's, whatever they show."""
    if winner.size != loser.size:
      yield "size-mismatch", "winner {} x {}, loser {} x {}".format(*winner.size, *loser.size)
      more = math.prod(winner.size) - math.prod(loser.size)
      kind = "same area" if not more else "larger" if more > 0 else "smaller"
      yield self._suspect("size-leak", f"the winner is {kind}")
    if winner.format != loser.format:
      yield self._suspect("format-leak", f"winner {winner.format}, loser {loser.format}")
    one_sided = sorted((winner.traits ^ loser.traits) - _HARMLESS)
    if one_sided or winner.format != loser.format:
      only = f", one side only: {', '.join(one_sided)}" if one_sided else ""
      yield "unlike-sides", f"winner {winner.format}, loser {loser.format}{only}"

  def _suspect(self, code: str, winner: str) -> picture_lib.Fault:
    kinds = self._leaks[code]
    # A file name without a pattern must not fill the memory.
    kinds[winner if winner in kinds or len(kinds) < _LOOKS else ""] += 1
    return code, winner

  def _repeats(self, pair: rows.Pair, keys: list[int]) -> Iterator[picture_lib.Fault]:
    if keys[0] == keys[1]:
      return
    side = 1 if keys[0] < keys[1] else 2
    before = self._met_before(f"{min(keys)} {max(keys)} {pair.caption}", side)
    if before:
      yield ("duplicate-pair" if before & side else "contradiction"), ""

  def _met_before(self, text: str, choice: int) -> int:
    """The choices, 1 and 2 as bits, with which the same was met; notes this one."""
    seen, key = self._seen["pair"], picture_lib.hash_bytes(text)
    before = seen.get(key, 0)
    seen[key] = before | choice
    return before

  def _overlap(self, code: str, key: int, detail: str = "") -> Iterator[picture_lib.Fault]:
    splits = self._seen[code].get(key, 0)
    self._seen[code][key] = splits | self._bit
    if splits & (self._bit - 1):
      yield code, picture_lib.clip(detail)

  def _look(self, key: int, data: bytes) -> picture_lib.Look:
    if key not in self._looks:
      if len(self._looks) >= _LOOKS:
        self._looks = {}
      self._looks[key] = picture_lib.look(data, self._resolution)
    return self._looks[key]

  def _sample(self, pair: rows.Pair | rows.Judged) -> None:
    """Each pair is among the samples with the same probability (reservoir sampling)."""
    place = self._random.randrange(sum(self.pairs.values()))
    if len(self.samples) < _SAMPLES:
      self.samples.append(_show(pair))
    elif place < _SAMPLES:
      self.samples[place] = _show(pair)


def _told_by(kinds: Mapping[str, Sequence[int]]) -> int:
  """How many verdicts the kind of file gives away; 0 if it gives away few, or all are alike."""
  known = [verdicts for verdicts in kinds.values() if sum(verdicts) >= _LEAK_PAIRS]
  right, total = sum(map(max, known)), sum(map(sum, known))
  commonest = max(map(sum, zip(*known, strict=True)), default=0)
  return right if commonest < _LEAK_SHARE * total <= right else 0


def _show(pair: rows.Pair | rows.Judged) -> Example:
  if isinstance(pair, rows.Judged):
    verdict = "desirable" if pair.desirable else "undesirable"
    caption, picture = picture_lib.clip(pair.caption), picture_lib.thumbnail(pair.image)
    return Example(picture_lib.clip(pair.where), "", caption, picture, verdict=verdict)
  pictures = picture_lib.thumbnail(pair.image_w), picture_lib.thumbnail(pair.image_l)
  return Example(picture_lib.clip(pair.where), "", picture_lib.clip(pair.caption), *pictures)
