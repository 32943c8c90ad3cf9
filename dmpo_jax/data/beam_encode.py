"""`encode.encode_source` with shards encoded by the workers of an Apache Beam pipeline.

Needs the package apache-beam, which asks for older versions of protobuf and pyarrow than the rest:
give it an environment of its own. The folder and the pairs must be where all workers see them.
"""

import functools
import pathlib
import shlex
import threading
from collections.abc import Callable

from dmpo_jax.data import encode, encode_shard, rows

MakeRecipe = Callable[[], encode_shard.Recipe]

_LOCK = threading.Lock()  # a worker's threads share one recipe


def encode_source(
  source: rows.Source,
  folder: str | pathlib.Path,
  *,
  make_recipe: MakeRecipe,
  fingerprint: str,
  broken_limit: float = 0.01,
  options: str = "",
) -> encode.Encoded:
  """Encodes the shards that are missing side by side, then finishes the data set in this process.

  The files are those of `encode.encode_source`, which also goes on where this ended and the other
  way round.

  Args:
    make_recipe: gives the functions and settings of `encode.encode_source`; called once in every
      process that encodes. Workers get it pickled: a function of a module, or an instance of a
      frozen dataclass, so that copies of it are equal.
    options: of Beam's pipeline, as on a command line: "--runner=DirectRunner ..."; if empty, Beam's
      local runner in this process.

  The others are those of `encode.encode_source`.

  Raises:
    ValueError: apache-beam is not installed, the options are not options, a worker failed (finished
      shards are kept), and all that `encode.encode_source` raises.
  """
  pipeline = _make_pipeline(options)
  recipe = _recipe(make_recipe)
  jobs = encode.missing_shards(source, folder, recipe, fingerprint=fingerprint)
  if jobs:
    run = functools.partial(_encode, make_recipe=make_recipe, broken_limit=broken_limit)
    _run(pipeline, jobs, run)
  return encode.encode_source(
    source, folder, **recipe._asdict(), fingerprint=fingerprint, broken_limit=broken_limit
  )


def _make_pipeline(options: str):
  try:
    import apache_beam
    from apache_beam.options import pipeline_options
  except ImportError as error:
    raise ValueError(
      "beam: apache-beam is not installed; run `pip install 'dmpo_jax[beam]'` in an environment of"
      " its own, or prepare without --beam"
    ) from error
  flags = shlex.split(options)
  if flags and not flags[0].startswith("--"):
    raise ValueError(f"beam: expected options of Beam, --NAME=VALUE ..., got {options!r}")
  try:
    # Always a list: of None Beam would read this program's own command line.
    parsed = pipeline_options.PipelineOptions(flags)
    parsed.get_all_options()  # else some are looked at only when it runs; warns of unknown ones
    return apache_beam.Pipeline(options=parsed)
  except SystemExit as error:  # argparse has said what is wrong
    raise ValueError(f"beam: Beam refuses the options {options!r}") from error


def _run(pipeline, jobs: list[encode.Job], run: Callable[[encode.Job], int]) -> None:
  import apache_beam

  try:
    with pipeline:
      # Without the shuffle Beam would fuse the steps and give all shards to one worker.
      shards = pipeline | "list shards" >> apache_beam.Create(jobs) | apache_beam.Reshuffle()
      _ = shards | "encode shard" >> apache_beam.Map(run)
  except Exception as error:  # of many kinds; the worker's own is a part of the text
    raise ValueError(
      f"beam: a worker failed; finished shards are kept, run it again to go on: {error}"
    ) from error


def _encode(job: encode.Job, make_recipe: MakeRecipe, broken_limit: float) -> int:
  """The number of pairs; the rest is in the sidecar."""
  sidecar = encode_shard.encode_shard(
    job.shard, job.path, _recipe(make_recipe), settings=job.settings, broken_limit=broken_limit
  )
  return sidecar["pairs"]


def _recipe(make_recipe: MakeRecipe) -> encode_shard.Recipe:
  """One VAE per process, whatever number of shards and threads it has."""
  with _LOCK:
    return _cached_recipe(make_recipe)


@functools.lru_cache(maxsize=1)
def _cached_recipe(make_recipe: MakeRecipe) -> encode_shard.Recipe:
  return make_recipe()
