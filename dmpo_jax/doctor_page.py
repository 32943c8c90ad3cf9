"""What `dmpo doctor data` found, told: a table for the terminal, JSON, and a page with pictures.

Captions, names and reasons come from strangers: everything is escaped where it enters the page, and
stripped of control characters where it enters the terminal.
"""

import base64
import json
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from dmpo_jax import doctor_data, report_page, report_style

_WIDTH = 100  # columns of the terminal
_VERDICTS = {True: "fit for training", False: "would spoil training"}


class Text(NamedTuple):
  """What a finding is called, what it does to training, and what to do."""

  title: str
  effect: str
  remedy: str


TEXTS = {
  "no-pairs": Text(
    "No pairs to train on",
    "There is no split `train`, or no row of it is a pair.",
    "Check the path and the names of the splits.",
  ),
  "unreadable-shard": Text(
    "File cannot be read",
    "All rows of the file are missing, and preparing the data stops there.",
    "Fetch the file again, or compare its columns with those the source expects.",
  ),
  "no-validation": Text(
    "No validation split",
    "Overfitting and a falling winner likelihood go unseen; no step can be chosen as the best.",
    "Hold out some prompts, with all of their images, as the split `validation`.",
  ),
  "no-licence": Text(
    "No licence stated",
    "It is unknown whether a model trained on this may be used or passed on.",
    "Ask the authors, and write the licence down where the source declares it.",
  ),
  "broken-row": Text(
    "Damaged row",
    "The row is left out. Many mean that files are damaged or columns are read wrongly.",
    "Fetch the files again; look at the rows named here.",
  ),
  "tie": Text(
    "Tie", "The row says nothing about which image is better and is left out.", "Nothing."
  ),
  "left-out": Text(
    "Row left out by a rule of the source", "It is not trained on.", "Check that the rule is meant."
  ),
  "unreadable-image": Text(
    "Unreadable or truncated image",
    "The pair cannot be encoded.",
    "Fetch the files again, or take these rows out.",
  ),
  "oversized-image": Text(
    "Image refused for its size",
    "Decoded or resized, it takes more memory than is safe; it may be a decompression bomb.",
    "Take the row out, or store the image smaller.",
  ),
  "p-choice-range": Text(
    "p_choice outside [0.5, 1]",
    "Below 0.5 the sides are swapped: the loser is trained on as the winner.",
    "Swap the images where it is below 0.5; check that it is a probability, not a count.",
  ),
  "p-choice-half": Text(
    "Every p_choice is 0.5",
    "No pair prefers either image, so there is nothing to learn.",
    "Check which column the choice is read from.",
  ),
  "one-verdict": Text(
    "Every image has the same verdict",
    "All are pushed one way, and the reference alone says how far.",
    "Add images of the other verdict; a few will do, with a larger lambda_d or lambda_u.",
  ),
  "mixed-verdict": Text(
    "Same image and caption, judged both ways",
    "Where people disagree the two cancel out; many mean that the verdict is read wrongly.",
    "Nothing where people did disagree; else look at the column of the verdict.",
  ),
  "same-verdict": Text(
    "Same image and caption, judged alike again", "It weighs more than others.", "Nothing."
  ),
  "side-leak": Text(
    "Winner always in the same column or file name",
    "Harmless where the authors put the winner there on purpose (HPDv3: path1). Otherwise the "
    "place is taken for the label, the pairs are noise, and whatever else the two places differ in "
    "is learned.",
    "Compare with the authors' description of the columns; never feed the place to a model.",
  ),
  "format-leak": Text(
    "File format gives the winner, or the verdict, away",
    "Winners and losers differ in their compression, which is easier to learn than the preference.",
    "Store both sides the same way, from the originals.",
  ),
  "size-leak": Text(
    "Image size gives the winner, or the verdict, away",
    "The model may learn sharpness from resizing instead of the preference.",
    "Resize both sides of a pair to the same size, or leave such pairs out.",
  ),
  "side-unchecked": Text(
    "Label leak by column: not checked",
    "The source does not say in which column or file the winner stood.",
    "Nothing; set `side` in the source to have it checked.",
  ),
  "contradiction": Text(
    "Same pair with the opposite choice",
    "The two cancel out and add noise to the gradient.",
    "Count the choices per pair and give the share as p_choice.",
  ),
  "duplicate-pair": Text(
    "Same pair again",
    "It weighs more than others and is learned by heart sooner.",
    "Keep one, or count the choices per pair and give the share as p_choice.",
  ),
  "same-image": Text(
    "Winner and loser are the same image",
    "Its margin is always 0: time is spent and nothing is learned.",
    "Take these rows out; many mean that one column is read twice.",
  ),
  "size-mismatch": Text(
    "Winner and loser of different size",
    "They are resized and cropped differently, so one may be sharper or show less.",
    "Resize both to the same size beforehand if the source allows it.",
  ),
  "unlike-sides": Text(
    "Winner and loser stored differently",
    "Compression, transparency or colours tell them apart, whatever they show.",
    "Store both sides the same way, from the originals.",
  ),
  "empty-caption": Text(
    "Empty caption",
    "The pair trains the unconditional model only, which guidance subtracts.",
    "Take these rows out; many mean that another column holds the captions.",
  ),
  "same-caption": Text(
    "One caption for most pairs",
    "The model hardly learns to follow prompts, and drifts for all of them alike.",
    "Check which column the captions are read from.",
  ),
  "long-caption": Text(
    "Caption too long",
    "What does not fit in the text encoder's 77 places is cut off, unseen by the model.",
    "Shorten the captions, or accept that their ends are ignored.",
  ),
  "prompt-overlap": Text(
    "Prompt stands in an earlier split, too",
    "Held-out numbers do not show how well unseen prompts are served.",
    "Split by prompt.",
  ),
  "couple-overlap": Text(
    "Couple of images stands in an earlier split, too",
    "Held-out accuracy and margins are too good: the comparison was trained on.",
    "Split by prompt or by couple.",
  ),
  "image-overlap": Text(
    "Image stands in an earlier split, too",
    "Held-out accuracy and margins are too good: the image was trained on.",
    "Split by prompt, with all of its images.",
  ),
  "blank-image": Text(
    "Image of a single colour",
    "Often what a safety filter leaves; as a winner it teaches to draw nothing.",
    "Take these rows out.",
  ),
  "tiny-image": Text(
    "Image under a quarter of the training resolution",
    "It is enlarged more than four times: the model learns to blur.",
    "Take these rows out; many mean that thumbnails are read.",
  ),
  "below-resolution": Text(
    "Image below the training resolution",
    "It is enlarged, and the model learns the blur.",
    "Train at a lower resolution, or leave these rows out.",
  ),
  "extreme-aspect": Text(
    "Long and narrow image",
    "The centre crop loses half of the picture or more, perhaps what was preferred.",
    "Crop these images yourself, or leave them out.",
  ),
  "cmyk-image": Text(
    "CMYK image",
    "It is converted without its colour profile, so its colours shift.",
    "Convert it to sRGB beforehand, with the profile.",
  ),
  "animated-image": Text(
    "Animated image",
    "Only the first frame is used, which people may not have judged.",
    "Store the frame that was judged, or leave the rows out.",
  ),
  "16-bit-image": Text("16-bit grey image", "The high byte is kept.", "Nothing."),
  "rotated-image": Text(
    "Image rotated by its EXIF", "It is turned as the tag says.", "Nothing, if the tag is right."
  ),
  "transparent-image": Text(
    "Transparent image", "It is laid on white.", "Nothing, if people saw it on white, too."
  ),
  "palette-image": Text("Palette image", "It is converted to RGB.", "Nothing."),
}


def show(diagnosis: doctor_data.Diagnosis) -> str:
  """The findings as a table for the terminal, with what to do and one example of each."""
  lines = [_summary(diagnosis), ""]
  lines.append(
    f"{'':8}{'count':>10} {'share':>7}  finding" if diagnosis.findings else "no findings"
  )
  for finding in diagnosis.findings:
    text = TEXTS[finding.code]
    number = f"{finding.count:>10,} {_share(finding):>7}"
    lines.append(f"{finding.severity:8}{number}  {text.title} [{finding.code}]")
    if finding.severity != "note":
      lines += indented(f"{text.effect} {text.remedy}")
      lines += indented(f"e.g. {_line(finding.examples[0])}") if finding.examples else []
  lines += ["", f"{diagnosis.name}: {_VERDICTS[diagnosis.ok]}"]
  return "\n".join(printable(line) for line in lines)


def to_json(diagnosis: doctor_data.Diagnosis) -> dict[str, Any]:
  """All that was found but the pictures, as plain types."""
  content = diagnosis._asdict() | {"ok": diagnosis.ok}
  content["findings"] = [
    each._asdict() | TEXTS[each.code]._asdict() | {"examples": _plain(each.examples)}
    for each in diagnosis.findings
  ]
  return content | {"samples": _plain(diagnosis.samples)}


def write(diagnosis: doctor_data.Diagnosis, folder: pathlib.Path) -> pathlib.Path:
  """Writes doctor.json and doctor.html, which needs no other file.

  Args:
    diagnosis: what `doctor_data.diagnose` found.
    folder: made if it is missing; earlier files of these names are replaced.

  Returns:
    The path of the page.

  Raises:
    ValueError: `folder` is a file.
  """
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder}: is a file; expected a folder for doctor.json and doctor.html")
  folder.mkdir(parents=True, exist_ok=True)
  content = json.dumps(to_json(diagnosis), indent=2, ensure_ascii=False)
  (folder / "doctor.json").write_text(content + "\n", encoding="utf-8")
  page = folder / "doctor.html"
  page.write_text(html(diagnosis), encoding="utf-8")
  return page


def html(diagnosis: doctor_data.Diagnosis) -> str:
  """The page: verdict, table of findings, the pairs they are about, pairs drawn at random."""
  sheets = [
    _sheet(TEXTS[finding.code].title, f"{finding.severity}: {finding.code}", finding.examples)
    for finding in diagnosis.findings
    if finding.severity != "note"
  ]
  titles = "Pairs drawn at random", "winner left, loser right"
  if diagnosis.judged:
    titles = "Images drawn at random", "each with its verdict"
  samples = _sheet(*titles, diagnosis.samples)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    # A second lock, should anything of a caption ever get past the escaping.
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
    f"<title>{report_page.text(diagnosis.name)}: data</title>\n"
    f"<style>\n{report_style.style_sheet()}{_RULES}</style>\n</head>\n<body>\n<main>\n"
    f"{_head(diagnosis)}\n{_table(diagnosis)}\n{''.join(sheets)}{samples}"
    "</main>\n</body>\n</html>\n"
  )


def _head(diagnosis: doctor_data.Diagnosis) -> str:
  text = report_page.text
  tiles = {
    _unit(diagnosis): sum(diagnosis.pairs.values()),
    "rows left out": sum(diagnosis.dropped.values()),
    "errors": diagnosis.count("error"),
    "warnings": diagnosis.count("warning"),
  }
  boxes = "".join(
    f'<div class="tile"><b>{count:,}</b><span>{name}</span></div>' for name, count in tiles.items()
  )
  facts = {
    _unit(diagnosis): ", ".join(f"{count:,} {split}" for split, count in diagnosis.pairs.items()),
    "left out": ", ".join(f"{count:,} {why}" for why, count in diagnosis.dropped.items()),
    "licence": diagnosis.licence,
    "from": diagnosis.homepage,
    "training resolution": f"{diagnosis.resolution} pixels",
    "read": f"first {diagnosis.limit:,} rows of each split" if diagnosis.limit else "all rows",
    "fingerprint": diagnosis.fingerprint,
  }
  shown = "".join(
    f"<div><dt>{name}</dt><dd>{text(value or 'none')}</dd></div>" for name, value in facts.items()
  )
  return (
    f"<h1>{text(diagnosis.name)}: {_VERDICTS[diagnosis.ok]}</h1>\n"
    f'<div class="tiles">{boxes}</div>\n<dl class="facts">{shown}</dl>'
  )


def _table(diagnosis: doctor_data.Diagnosis) -> str:
  if not diagnosis.findings:
    return "<section>\n<h2>Findings</h2>\n<p>None.</p>\n</section>"
  heads = "".join(
    f"<th>{name}</th>" for name in ("Finding", "Count", "Share", "What it does", "What to do")
  )
  rows = "".join(_row(finding) for finding in diagnosis.findings)
  return (
    '<section>\n<h2>Findings</h2>\n<div class="scroll"><table class="findings">'
    f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>\n</section>"
  )


def _row(finding: doctor_data.Finding) -> str:
  text = TEXTS[finding.code]
  of = f"of {finding.of}" if finding.of else ""
  return (
    f'<tr><th class="{finding.severity}"><i>{finding.severity}</i> {report_page.text(text.title)}'
    f"<small>{finding.code}</small></th><td>{finding.count:,}</td><td>{_share(finding)} "
    f"<small>{of}</small></td><td>{report_page.text(text.effect)}</td>"
    f"<td>{report_page.text(text.remedy)}</td></tr>\n"
  )


def _sheet(title: str, note: str, examples: Sequence[doctor_data.Example]) -> str:
  if not examples:
    return ""
  figures = "".join(_figure(example) for example in examples)
  return (
    f'<section>\n<h2>{report_page.text(title)}</h2>\n<p class="note">{report_page.text(note)}</p>\n'
    f'<div class="pairs">{figures}</div>\n</section>\n'
  )


def _figure(example: doctor_data.Example) -> str:
  pictures = ""
  if example.verdict:
    picture = _picture(example.verdict, example.image_w)
    pictures = f'<div class="both">{picture}<div>{example.verdict}</div></div>'
  elif example.image_w or example.image_l:
    sides = (("winner", example.image_w), ("loser", example.image_l))
    pictures = f'<div class="both">{"".join(_picture(*side) for side in sides)}</div>'
  words = report_page.text(example.caption)
  detail = f"<em>{report_page.text(example.detail)}</em>" if example.detail else ""
  return (
    f"<figure>{pictures}<figcaption>{words}{detail}"
    f"<small>{report_page.text(example.where)}</small></figcaption></figure>\n"
  )


def _picture(side: str, data: bytes | None) -> str:
  if data is None:
    return f"<div>{side}: cannot be shown</div>"
  uri = "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
  return f'<img src="{uri}" alt="{side}">'


def _unit(diagnosis: doctor_data.Diagnosis) -> str:
  return "judged images" if diagnosis.judged else "pairs"


def _summary(diagnosis: doctor_data.Diagnosis) -> str:
  splits = ", ".join(f"{count:,} {split}" for split, count in diagnosis.pairs.items())
  read = f"first {diagnosis.limit:,} rows of each split" if diagnosis.limit else "all rows"
  total = f"{sum(diagnosis.pairs.values()):,} {_unit(diagnosis)}"
  return f"{diagnosis.name}: {total} ({splits}); read: {read}"


def _share(finding: doctor_data.Finding) -> str:
  return f"{finding.share:.1%}" if finding.of else ""


def _line(example: doctor_data.Example) -> str:
  return ": ".join(part for part in (example.where, example.detail or example.caption) if part)


def indented(words: str) -> list[str]:
  """Lines below a finding, in the column of its title."""
  return textwrap.wrap(words, _WIDTH, initial_indent=" " * 28, subsequent_indent=" " * 28)


def printable(line: str) -> str:
  """Without the codes by which a stranger's text could move a terminal's cursor.

  >>> printable("a\\x1b[2Jb")
  'a\\ufffd[2Jb'
  """
  return "".join(each if each.isprintable() else "\ufffd" for each in line)


def _plain(examples: Sequence[doctor_data.Example]) -> list[dict[str, str]]:
  return [{"where": e.where, "detail": e.detail, "caption": e.caption} for e in examples]


_RULES = """
table.findings th,table.findings td{text-align:left;vertical-align:top;white-space:normal;
  line-height:1.45}
table.findings td:nth-child(2),table.findings td:nth-child(3){white-space:nowrap}
table.findings small{display:block;margin:0;font-weight:400}
tbody th i{font-style:normal;font-weight:600}
th.error i{color:var(--worse)}th.warning i{color:var(--validation)}th.note i{color:var(--muted)}
th.note{color:inherit}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
  gap:30px 28px;margin-top:20px}
.both{display:grid;grid-template-columns:1fr 1fr;gap:6px;margin-bottom:8px}
.both>*{width:100%;aspect-ratio:1;object-fit:contain;background:var(--raised);
  border:1px solid var(--line);border-radius:5px}
.both>div{display:grid;place-items:center;padding:8px;text-align:center;font-size:.8rem;
  color:var(--muted)}
figcaption{font-size:.9rem;line-height:1.4;overflow-wrap:anywhere}
figcaption em,figcaption small{display:block;font-style:normal;margin-top:3px}
figcaption em{color:var(--worse)}figcaption small{color:var(--muted);font-size:.78rem}
"""
