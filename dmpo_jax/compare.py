"""`dmpo evaluate A B [C ...]`: images, scores, the table, the page, and the page for people.

    comparison.json     all numbers; docs/evaluation.md has the schema
    comparison.html     the same for people, with images side by side

What else lies in the folder: `compare_images`, `compare_scores`, `votes`.
"""

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dmpo_jax import base as base_lib
from dmpo_jax import (
  compare_images,
  compare_scores,
  comparison,
  comparison_page,
  prompt_sets,
  stages,
  votes,
)
from dmpo_jax import config as config_lib
from dmpo_jax.data.emoji_choice import pairs as pairs_lib
from dmpo_jax.scorers import batches

EMOJI = "emoji"  # the set that comes with the package
RESULT = "comparison.json"
SEED = stages.EVALUATION_SEED
BALLOTS = 60  # a quarter of an hour for one person
SHOWN_PROMPTS = 24  # on the page, in all sets together


def read_prompts(
  names: Sequence[str], config: config_lib.Config, split: str
) -> list[prompt_sets.PromptSet]:
  """The sets that were asked for: files, or `emoji` for the prompts of the emoji's split.

  Raises:
    ValueError: none was asked for, a file cannot be read, two sets have one name.
  """
  if not names:
    raise ValueError("--prompts: expected a file with prompts, or the word emoji; may be repeated")
  sets = []
  for name in names:
    if name == EMOJI:
      emoji = stages.emoji_of(config)
      pairs = pairs_lib.split_pairs(pairs_lib.form_pairs(emoji))[split]
      prompts = tuple(sorted({pair.caption for pair in pairs}))
      sets.append(prompt_sets.PromptSet(EMOJI, prompts, 0))
    else:
      sets.append(prompt_sets.read_set(pathlib.Path(name)))
      if sets[-1].name == EMOJI:
        raise ValueError(f"--prompts {name}: the name emoji is that of the built-in set; rename it")
  prompt_sets.check_names(sets)
  return sets


def compare(
  config: config_lib.Config,
  models: Sequence[compare_images.Model],
  sets: Sequence[prompt_sets.PromptSet],
  out: pathlib.Path,
  *,
  seed: int,
  scorers: Sequence[compare_scores.Source] = (),
  load_scorer: Callable[[str, pathlib.Path], batches.Scorer] | None = None,
  ballots: int = 0,
) -> dict[str, Any]:
  """Compares models on the same prompts and noise; goes on where an earlier call ended.

  Args:
    seed: of the noise.
    load_scorer: (name, path) -> scorer; needed if there are `scorers`.
    ballots: pairs on the page for people; 0 makes none.

  Returns:
    What comparison.json holds.

  Raises:
    ValueError: models, prompts and folder do not fit; a score is not finite.
  """
  if ballots < 0:
    raise ValueError(f"--vote-pairs: expected at least 0, got {ballots}")
  store = compare_images.open_store(out, models, sets, config.sampling.images_per_prompt)
  bases = compare_images.load_bases(models, config.precision.compute)
  manifest = compare_images.draw_images(store, bases, config, sets, seed=seed)
  measures = [compare_scores.score_by(store, source, load_scorer) for source in scorers]
  if EMOJI in store.sets:
    emoji, resolution = stages.emoji_of(config), len(store.read(0, 0, 0))
    measures += compare_scores.score_emoji(store, store.sets[EMOJI], emoji, resolution)
  diversity = compare_scores.score_diversity(store, bases[models[0].base])
  measures += [] if diversity is None else [diversity]
  if ballots:
    votes.write_page(store, ballots)
  result = {
    **manifest,
    "models": list(manifest["models"].values()),
    "scorers": {source.name: str(source.path) for source in scorers},
    "results": comparison.summarise_all(measures, store.sets),
  }
  return _write(store, result)


def add_votes(out: pathlib.Path, files: Sequence[pathlib.Path]) -> dict[str, Any]:
  """Joins votes of people with a comparison that was made before, and writes its table again.

  Raises:
    ValueError: there is no comparison in `out`, or the votes are not of its page.
  """
  if not (out / RESULT).is_file():
    raise ValueError(f"--votes: {out / RESULT} is missing; expected in --out a finished comparison")
  votes.add(out, files)
  result = base_lib.read_json(out / RESULT)
  asked = base_lib.read_json(out / compare_images.PROMPTS)
  store = compare_images.Store(
    out,
    tuple(compare_images.Model(each["name"], each["source"]) for each in result["models"]),
    tuple(asked["prompts"]),
    {name: tuple(members) for name, members in asked["sets"].items()},
    result["sampling"]["images_per_prompt"],
  )
  return _write(store, result)


def _write(store: compare_images.Store, result: dict[str, Any]) -> dict[str, Any]:
  names = [model.name for model in store.models]
  result = {**result, "votes": votes.summarise(store.folder, names)}
  page = comparison_page.html(result, list(choose_samples(store)))
  # A lone surrogate in a name has no UTF-8: it becomes a character reference.
  data = page.encode("utf-8", "xmlcharrefreplace")
  compare_images.write_bytes(store.folder / "comparison.html", data)
  compare_images.write_json(store.folder / RESULT, result)
  return result


def choose_samples(store: compare_images.Store):
  """The prompts on the page: as many of each set, by a digest of their letters."""

  def order(prompt: int) -> bytes:
    return hashlib.blake2b(store.prompts[prompt].encode(), digest_size=8).digest()

  each = -(-SHOWN_PROMPTS // len(store.sets))
  for name, members in store.sets.items():
    for prompt in sorted(members, key=order)[:each]:
      rows = [store.read_prompt(model, prompt) for model in range(len(store.models))]
      yield comparison_page.Samples(store.prompts[prompt], name, rows)


def show(result: Mapping[str, Any], out: pathlib.Path) -> str:
  """The lines that `dmpo evaluate` prints."""
  lines = [comparison_page.show(result), "", f"page: {out / 'comparison.html'}"]
  if (out / "vote" / "vote.html").is_file():
    lines.append(f"for people: {out / 'vote'} (not {votes.KEY}, which names the models)")
  return "\n".join(lines)
