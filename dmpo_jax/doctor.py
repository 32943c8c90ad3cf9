"""`dmpo doctor`: reads what a run would be built on and says what would spoil it."""

import os
import pathlib
import sys

import tqdm

from dmpo_jax import base as base_lib
from dmpo_jax import doctor_data, doctor_page
from dmpo_jax.data.sources import registry


def check_data(
  dataset: str,
  path: str | os.PathLike | None,
  base: base_lib.Base,
  out: pathlib.Path,
  *,
  limit: int | None = None,
) -> bool:
  """Looks at all pairs of a data set, prints a table and writes doctor.html and doctor.json.

  Args:
    dataset: one of `registry.SOURCES`.
    path: where it lies.
    base: the model to train: its resolution and its tokenizer are those of the checks.
    limit: rows to look at of each split; None: all.

  Returns:
    Whether nothing was found that would spoil training.

  Raises:
    ValueError: no such data set, or nothing of it where it should lie.
  """
  source = registry.open_source(dataset, path)
  with tqdm.tqdm(unit=" rows", desc="looking at pairs", file=sys.stderr) as bar:
    seen: dict[str, int] = {}

    def progress(split: str, count: int) -> None:
      bar.update(count - seen.get(split, 0))
      seen[split] = count

    diagnosis = doctor_data.diagnose(
      source,
      resolution=base.resolution,
      tokenize=base.tokenizer.encode,
      limit=limit,
      progress=progress,
    )
  print(doctor_page.show(diagnosis))
  print(f"page: {doctor_page.write(diagnosis, out)}")
  return diagnosis.ok
