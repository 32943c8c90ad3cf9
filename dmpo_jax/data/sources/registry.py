"""Every source by its name."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from dmpo_jax import config
from dmpo_jax.data import rows
from dmpo_jax.data.sources import emoji, held_out, hpd, imagereward_db, pairs, pickapic


class Entry(NamedTuple):
  """How a source is opened.

  Attributes:
    open: (name, path, **options) -> source.
    path: what the path is, for messages; None if there is none to give.
    options: names of the options.
  """

  open: Callable[..., rows.Source]
  path: str | None
  options: tuple[str, ...] = ()


_SHARE = ("validation_share",)
_PICKAPIC = Entry(
  pickapic.open_pickapic, "a folder or gs://bucket/prefix with its parquet shards, train-*.parquet"
)

SOURCES = {
  "emoji_choice/top160": Entry(functools.partial(emoji.open_emoji, count=160), None),
  "emoji_choice/all": Entry(functools.partial(emoji.open_emoji, count=None), None),
  "hpdv2": Entry(hpd.open_hpdv2, "the folder with train.json or test.json", ("pairs_per_prompt",)),
  "hpdv3": Entry(hpd.open_hpdv3, "the folder with train.json or test.json", ("min_confidence",)),
  "imagereward_db": Entry(
    imagereward_db.open_imagereward_db, "the folder that holds images/", ("pairs_per_prompt",)
  ),
  config.JUDGED: Entry(pairs.open_judged, "a folder with *.jsonl or *.csv", _SHARE),
  "pairs": Entry(pairs.open_pairs, "a folder with *.jsonl, *.csv or *.tar", _SHARE),
  "pickapic_v1": _PICKAPIC,
  "pickapic_v2": _PICKAPIC,
}


def open_source(
  dataset: str,
  path: str | os.PathLike | None = None,
  *,
  validation_share: float | None = None,
  **options: object,
) -> rows.Source:
  """Opens a data set where it lies; nothing is downloaded, no row is read yet.

  Args:
    dataset: a name of `SOURCES`.
    path: its folder or bucket prefix; None for `emoji_choice`.
    validation_share: share of the training captions, [0, 1), that becomes the validation split of
      a source without one; None: what the source does by itself.
    **options: of that source.

  Raises:
    ValueError: no such source or option, or the path is missing or not what the source expects.
  """
  if dataset not in SOURCES:
    raise ValueError(f"dataset: expected one of {sorted(SOURCES)}, got {dataset!r}")
  entry = SOURCES[dataset]
  unknown = sorted(set(options) - set(entry.options))
  if unknown:
    raise ValueError(f"{dataset}: has no option {unknown[0]!r}; it has {list(entry.options)}")
  if entry.path is not None and not path:
    raise ValueError(f"{dataset}: path is missing; give {entry.path}")
  if validation_share is None:
    return entry.open(dataset, path, **options)
  if "validation_share" in entry.options:  # it looks at captions before it opens images
    return entry.open(dataset, path, validation_share=validation_share, **options)
  return held_out.hold_out(entry.open(dataset, path, **options), validation_share)
