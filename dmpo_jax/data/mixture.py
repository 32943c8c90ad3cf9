"""Several encoded data sets as one to train on."""

import dataclasses
import pathlib
import shlex
from typing import Any

import numpy as np

from dmpo_jax.data import encode, pipeline

SPLITS = ("train", "validation")


def parse_mixture(text: str) -> dict[str, float]:
  """Names and weights of a mixture.

  Args:
    text: NAME=WEIGHT, with spaces between; a name with spaces is quoted.

  Raises:
    ValueError: not of that form, a name twice, or a weight that is not positive.

  >>> parse_mixture("pickapic_v2=4 hpdv3=1")
  {'pickapic_v2': 4.0, 'hpdv3': 1.0}
  """
  expected = 'data.mixture: expected NAME=WEIGHT NAME=WEIGHT ..., e.g. "pickapic_v2=4 hpdv3=1"'
  weights: dict[str, float] = {}
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"{expected}; got {text!r} ({error})") from error
  for word in words:
    name, equals, weight = word.rpartition("=")
    try:
      value = float(weight)
    except ValueError:
      value = 0.0
    if not equals or not name or not 0 < value < float("inf"):
      raise ValueError(f"{expected}, with weights > 0; got {word!r}")
    if name in weights:
      raise ValueError(f"{expected}; {name} is there twice")
    weights[name] = value
  if not weights:
    raise ValueError(f"{expected}; got {text!r}")
  return weights


def open_mixture(text: str, folder: pathlib.Path, *, fingerprint: str) -> encode.Encoded:
  """Opens encoded data sets and mixes their training and their validation pairs.

  Args:
    text: see `parse_mixture`; a name is that of a folder in `folder`, or a path.
    folder: where `dmpo prepare` writes encoded data sets.
    fingerprint: see `encode.open_encoded`.

  Returns:
    A data set whose splits are mixtures; its metadata say what was mixed.

  Raises:
    ValueError: the text is not a mixture, a data set is missing or was made otherwise than the
      first, or one has no training pairs.
  """
  weights = parse_mixture(text)
  opened = {}
  for name in weights:
    path = folder / name
    opened[name] = encode.open_encoded(
      path if path.is_dir() else pathlib.Path(name), fingerprint=fingerprint
    )
    if not len(opened[name].splits.get("train", ())):
      raise ValueError(f"data.mixture: {name} has no training pairs")
  _check_alike(opened)
  splits, counts = {}, {}
  for split in SPLITS:
    having = [name for name, each in opened.items() if len(each.splits.get(split, ()))]
    counts[split] = sum(len(opened[name].splits[split]) for name in having)
    if having:
      splits[split] = pipeline.Mixture(
        tuple(opened[name].splits[split] for name in having),
        tuple(weights[name] for name in having),
      )
  first = next(iter(opened.values()))
  mixed = {name: {"weight": weights[name], **each.metadata} for name, each in opened.items()}
  metadata = {"counts": counts, "mixture": mixed, "empty_ids": first.metadata["empty_ids"]}
  return dataclasses.replace(first, splits=splits, metadata=metadata)


def _check_alike(opened: dict[str, encode.Encoded]) -> None:
  """Refuses pairs that cannot be in one batch."""
  shapes = {name: _shapes(each.splits["train"][0]) for name, each in opened.items()}
  first = next(iter(shapes))
  for name, found in shapes.items():
    if found != shapes[first]:
      raise ValueError(
        f"data.mixture: pairs of {name} have the arrays {found}, those of {first} have"
        f" {shapes[first]}; prepare them with the same settings"
      )


def _shapes(pair: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: each.shape for name, each in pair.items() if isinstance(each, np.ndarray)}
