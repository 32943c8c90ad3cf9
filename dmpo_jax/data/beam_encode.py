"""`encode.encode_source` with shards encoded by the workers of an Apache Beam pipeline.

Needs the package apache-beam, which asks for an older protobuf than the rest: give it an
environment of its own. The folder must be one that all workers see.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from dmpo_jax.data import encode, encode_shard, rows
from dmpo_jax.data import geometry as geometry_lib

MakeFunctions = Callable[[], tuple[encode_shard.EncodeImages, encode_shard.Tokenize]]


def encode_source(
  source: rows.Source,
  folder: str | pathlib.Path,
  *,
  make_functions: MakeFunctions,
  geometry: geometry_lib.Geometry,
  fingerprint: str,
  batch_size: int,
  time_ids: bool = False,
  broken_limit: float = 0.01,
  options: Any = None,
) -> encode.Encoded:
  """Encodes the shards that are missing side by side, then finishes the data set in this process.

  The files are those of `encode.encode_source`, which also goes on where this ended and the other
  way round.

  Args:
    make_functions: gives encode_images and tokenize; called once in every process that encodes, so
      it must be a function that workers can import.
    options: apache_beam.options.pipeline_options.PipelineOptions; Beam's local runner if None.

  The others are those of `encode.encode_source`.

  Raises:
    ValueError: apache-beam is not installed, and all that `encode.encode_source` raises.
    Exception: Beam's own, when a worker fails; finished shards are kept.
  """
  try:
    import apache_beam
  except ImportError as error:
    raise ValueError(
      "beam_encode: apache-beam is not installed; run `pip install apache-beam` in an environment"
      " of its own, or use encode.encode_source"
    ) from error
  make_recipe = functools.partial(
    _make_recipe, make_functions, geometry=geometry, time_ids=time_ids, batch_size=batch_size
  )
  jobs = encode.missing_shards(source, folder, make_recipe(), fingerprint=fingerprint)
  if jobs:
    run = functools.partial(_encode, make_recipe=make_recipe, broken_limit=broken_limit)
    with apache_beam.Pipeline(options=options) as pipeline:
      # Without the shuffle Beam would fuse the steps and give all shards to one worker.
      _ = pipeline | apache_beam.Create(jobs) | apache_beam.Reshuffle() | apache_beam.Map(run)
  return encode.encode_source(
    source,
    folder,
    **make_recipe()._asdict(),
    fingerprint=fingerprint,
    broken_limit=broken_limit,
  )


def _make_recipe(make_functions: MakeFunctions, **settings: Any) -> encode_shard.Recipe:
  encode_images, tokenize = _functions(make_functions)
  return encode_shard.Recipe(encode_images, tokenize, **settings)


@functools.lru_cache(maxsize=1)
def _functions(
  make_functions: MakeFunctions,
) -> tuple[encode_shard.EncodeImages, encode_shard.Tokenize]:
  """One VAE per process, whatever number of shards it gets."""
  return make_functions()


def _encode(
  job: encode.Job, make_recipe: Callable[[], encode_shard.Recipe], broken_limit: float
) -> int:
  """The number of pairs; the rest is in the sidecar."""
  sidecar = encode_shard.encode_shard(
    job.shard, job.path, make_recipe(), settings=job.settings, broken_limit=broken_limit
  )
  return sidecar["pairs"]
