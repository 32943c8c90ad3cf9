"""The page on which people choose between two images without knowing whose they are.

A static file that works from a folder on disk: pictures lie beside it under names that say nothing,
which model drew which stands in key.json, which is not given to voters. Prompts are text of
strangers: they enter as JSON and are shown as text, and the page's policy lets no other script run
and nothing be sent.
"""

import base64
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dmpo_jax import report_style

PIXELATED = 128  # pixels on a side below which a picture is enlarged without smoothing


class Ballot(NamedTuple):
  """One choice: images number `number` of a prompt by two models, given by their positions."""

  prompt: int
  number: int
  left: int
  right: int


def choose_ballots(
  models: int, prompts: int, per_prompt: int, count: int, seed: int
) -> list[Ballot]:
  """Up to `count` ballots, as many of each pair of models as can be, in random order.

  Prompts are drawn anew for each pair of models, none twice for the same pair; image number and
  sides by a fair lot.
  """
  generator = np.random.default_rng(seed)
  pairs = list(itertools.combinations(range(models), 2))
  orders = [generator.permutation(prompts) for _ in pairs]
  chosen = [
    (pair, int(order[rank]))
    for rank in range(prompts)
    for pair, order in zip(pairs, orders, strict=True)
  ][:count]
  ballots = []
  for place in generator.permutation(len(chosen)):
    pair, prompt = chosen[place]
    left, right = pair[:: 1 if generator.integers(2) else -1]
    ballots.append(Ballot(prompt, int(generator.integers(per_prompt)), left, right))
  return ballots


def token(seed: int, *parts: object) -> str:
  """A name that says nothing to those who do not know the seed."""
  text = json.dumps([seed, *map(str, parts)])
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def html(
  page: str, prompts: Sequence[str], pictures: Sequence[tuple[str, str]], *, side: int
) -> str:
  """The page.

  Args:
    page: its name, under which votes are kept and by which they find their key.
    prompts: of the ballots, in order.
    pictures: addresses of the left and the right image of each ballot.
    side: pixels on a side of the pictures.
  """
  ballots = [
    {"prompt": prompt, "left": left, "right": right}
    for prompt, (left, right) in zip(prompts, pictures, strict=True)
  ]
  data = as_script({"page": page, "ballots": ballots})
  script, style = _asset("vote.js"), f"{report_style.variables()}\n{_asset('vote.css')}"
  policy = (
    f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
    "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
  )
  small = ' class="small"' if side < PIXELATED else ""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    f"<title>Which image is better?</title>\n<style>{style}</style>\n</head>\n<body>\n"
    + _BODY.format(total=len(ballots), small=small)
    + f'<script type="application/json" id="ballots">{data}</script>\n'
    f"<script>{script}</script>\n</body>\n</html>\n"
  )


def as_script(value: object) -> str:
  """JSON that no text in it can end early, whatever a browser makes of `<!--` and `</script>`.

  >>> as_script("</script>")
  '"\\\\u003c/script\\\\u003e"'
  """
  text = json.dumps(value)  # ASCII alone: also U+2028 and lone surrogates are escaped
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


def _asset(name: str) -> str:
  return (importlib.resources.files("dmpo_jax") / "assets" / "vote" / name).read_text("utf-8")


_BODY = """<main>
<div id="question">
<h1 id="asked">Which image do you prefer for this prompt?</h1>
<p id="prompt"></p>
</div>
<p id="missing" class="alarm" role="alert" hidden>An image of this pair cannot be shown. Keep the
folder “images” beside this page, and reload.</p>
<div id="pair" role="group" aria-labelledby="asked"{small}>
<button type="button" id="left"><img id="left-image" alt="left image">Left is better
<kbd aria-hidden="true">←</kbd></button>
<button type="button" id="right"><img id="right-image" alt="right image">Right is better
<kbd aria-hidden="true">→</kbd></button>
</div>
<p id="thanks" hidden>Thank you. Now export your votes and send the file to whoever asked you.</p>
<div class="row">
<button type="button" id="tie">No difference <kbd aria-hidden="true">↓</kbd></button>
<button type="button" id="undo" disabled>Undo <kbd aria-hidden="true">u</kbd></button>
<button type="button" id="export" disabled>Export votes</button>
</div>
<div class="row">
<progress id="progress" max="{total}" value="0" aria-label="pairs done"></progress>
<span id="count" class="end" role="status"></span>
</div>
<p class="note">Keys: ← left is better, → right is better, ↓ no difference, u undoes the last vote.
Votes stay in this browser, also when the page is closed; nothing is sent.</p>
<p id="trouble" class="note alarm" role="alert" hidden>This browser does not let the page keep
votes: export them before you close it.</p>
<noscript><p class="alarm">This page needs JavaScript.</p></noscript>
</main>
"""
