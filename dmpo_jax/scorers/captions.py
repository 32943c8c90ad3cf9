"""Captions as OpenCLIP's tokenizer cleans them before it splits them.

github.com/mlfoundations/open_clip, src/open_clip/tokenizer.py, basic_clean: the package ftfy with
its defaults, then HTML entities twice. ftfy's repair of text that was decoded wrongly, which
guesses, is left out.
"""

import html
import unicodedata

_LIGATURES = (
  0x0132,
  0x0133,
  *range(0x01C4, 0x01CD),
  *range(0x01F1, 0x01F4),
  *range(0xFB00, 0xFB07),
)
_WIDE = (0x3000, *range(0xFF01, 0xFFF0))
# Code points as in ftfy/chardata.py; a code point that becomes None is removed.
_CLEANED = {
  **dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'"),
  **dict.fromkeys(range(0x201C, 0x2020), '"'),
  **{i: unicodedata.normalize("NFKC", chr(i)) for i in (*_LIGATURES, *_WIDE)},
  0x0149: "'n",
  0xFB05: "\u017ft",  # NFKC would make the long s a round one
  **dict.fromkeys((*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F)),
  **dict.fromkeys((*range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))),
}


def clean(caption: str) -> str:
  """Straight quotes, letters in place of ligatures and wide forms, no controls, no entities.

  >>> clean("a dog\u2019s \u201cbest\u201d day &amp;amp; night")
  'a dog\\'s "best" day & night'
  """
  text = caption if "<" in caption else html.unescape(caption)  # ftfy's "auto": not in markup
  return html.unescape(html.unescape(text.translate(_CLEANED)))
