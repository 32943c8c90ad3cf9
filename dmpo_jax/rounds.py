"""SePPO's rounds: a past checkpoint is the reference, and draws the second image of each pair.

Training goes in rounds of `objective.reference_every` updates (SePPO, arXiv 2410.05255; its "one
stored every 30 updates"). At the start of round i the policy is stored as checkpoint i, so that
checkpoint 0 is the initial model, and the reference of the round is drawn uniformly from the last
`objective.reference_keep` of checkpoints 0 to i: a function of (seed, i). That reference then draws
an image for the caption of every pair of the round, from noise that is a function of (seed,
checkpoint, pair). Both are files in the run folder:

    references/000002/params.safetensors            checkpoint 2, with the checksums of its leaves
    references/000002/samples-00000060.safetensors  what it drew for the batch of step 60

A file is there whole or not at all. So a run that was killed finds what it had, and goes on with
the same references, images and batches as one that was not.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dmpo_jax import base as base_lib
from dmpo_jax import (
  checkpoint,
  evaluate,
  logs,
  lora,
  objectives,
  safetensors_io,
  sample,
  sharding,
  train_step,
  types,
)
from dmpo_jax import config as config_lib
from dmpo_jax.data import encode, pipeline
from dmpo_jax.models import remat, shards

FOLDER = "references"
PARAMS_FILE = "params.safetensors"
SAMPLES = "samples-*.safetensors"
# Beside the seed, so that the two draw different numbers; any constants would do.
_REFERENCE_STREAM, _NOISE_STREAM = 1, 2

Place = tuple[int, int]  # number of the source of a mixture, position of the pair in it


def draw_reference(seed: int, round_number: int, keep: int) -> int:
  """Number of the checkpoint that is the reference of a round: uniform over the last `keep`.

  >>> [draw_reference(0, i, 3) for i in range(8)]  # of 0, 0..1, 0..2, 1..3, 2..4, ...
  [0, 1, 1, 1, 2, 5, 5, 7]
  """
  generator = np.random.default_rng((seed, _REFERENCE_STREAM, round_number))
  return int(generator.integers(max(0, round_number - keep + 1), round_number + 1))


def initial_noise(
  seed: int, number: int, places: Sequence[Place], shape: tuple[int, int, int]
) -> Float[np.ndarray, "n h w c"]:
  """N(0, I) for each pair, of which checkpoint `number` draws."""
  streams = ((seed, _NOISE_STREAM, number, *place) for place in places)
  return np.stack(
    [np.random.default_rng(each).standard_normal(shape, np.float32) for each in streams]
  )


# Checkpoints.


def save_reference(run: pathlib.Path, number: int, params: train_step.Params) -> None:
  """Stores a checkpoint; if another of this number is there, it and what it drew are replaced.

  There is one, of the same bits, where a run was resumed; of others, where it was on other devices.
  """
  folder = _folder(run, number)
  prints = json.dumps(checkpoint.fingerprint(params))
  file = folder / PARAMS_FILE
  if file.is_file() and safetensors_io.read_metadata(file).get("checksums") == prints:
    return
  for drawn in folder.glob(SAMPLES):  # first: a kill must not leave them beside other parameters
    drawn.unlink()
  safetensors_io.save_safetensors(
    file, checkpoint.flatten(params), dtype=None, metadata={"checksums": prints}
  )


def load_reference(run: pathlib.Path, number: int, like: train_step.Params) -> train_step.Params:
  """A stored checkpoint; its leaves are read when numpy asks for them.

  Args:
    like: a tree of the same structure.

  Raises:
    ValueError: there is none, or it is not what was stored.
  """
  file = _folder(run, number) / PARAMS_FILE
  if not file.is_file():
    raise ValueError(f"{file}: missing; a later round draws with it: bring it back, or start anew")
  stored = safetensors_io.load_safetensors(file)
  names = list(checkpoint.flatten(like))
  if set(names) != set(stored):
    raise ValueError(f"{file}: has other parameters than the model that is trained")
  leaves = [stored.entries[name] for name in names]
  params = jax.tree.unflatten(jax.tree.structure(like), leaves)
  saved = json.loads(safetensors_io.read_metadata(file)["checksums"])
  checkpoint.check_sums(saved, checkpoint.fingerprint(params), str(file))
  return params


def remove_old(run: pathlib.Path, first_step: int, every: int, keep: int) -> None:
  """Removes checkpoints that no round draws any more, with what they drew.

  Args:
    first_step: the earliest that the run can still be resumed from.
  """
  first = first_step // every - keep + 1
  for folder in sorted((run / FOLDER).glob("[0-9]" * 6)):
    if int(folder.name) < first:
      shutil.rmtree(folder)


def _folder(run: pathlib.Path, number: int) -> pathlib.Path:
  return run / FOLDER / f"{number:06d}"


# What they drew.


class Samples:
  """What one checkpoint drew: place of a pair -> its latents, in files that are read as needed.

  Args:
    folder: of the checkpoint.
    identity: all that the latents depend on beside the place.

  Raises:
    ValueError: a file is damaged, or holds latents of another identity.
  """

  def __init__(self, folder: pathlib.Path, identity: str):
    self._folder, self._identity = folder, identity
    self._where: dict[Place, tuple[pathlib.Path, int]] = {}
    for file in sorted(folder.glob(SAMPLES)):
      self._add(file)
    self._open = functools.cache(self._read)

  def __contains__(self, place: Place) -> bool:
    return place in self._where

  def __len__(self) -> int:
    return len(self._where)

  def _add(self, file: pathlib.Path) -> None:
    metadata = safetensors_io.read_metadata(file)
    if metadata.get("identity") != self._identity:
      raise ValueError(
        f"{file}: drawn by another checkpoint, or with other settings; delete it to draw anew"
      )
    for row, place in enumerate(json.loads(metadata["places"])):
      self._where[tuple(place)] = (file, row)

  def _read(self, file: pathlib.Path) -> Float[np.ndarray, "n h w c"]:
    latents = safetensors_io.load_safetensors(file)["latents"]
    saved = json.loads(safetensors_io.read_metadata(file)["checksums"])
    checkpoint.check_sums(saved, checkpoint.fingerprint({"latents": latents}), str(file))
    return latents

  def save(self, step: int, places: Sequence[Place], latents: np.ndarray) -> None:
    """Adds what was drawn for the batch of a step."""
    file = self._folder / f"samples-{step:08d}.safetensors"
    metadata = {
      "identity": self._identity,
      "places": json.dumps(places),
      "checksums": json.dumps(checkpoint.fingerprint({"latents": latents})),
    }
    safetensors_io.save_safetensors(file, {"latents": latents}, dtype=None, metadata=metadata)
    self._add(file)

  def read(self, places: Sequence[Place]) -> Float[np.ndarray, "n h w c"]:
    """The latents of these pairs; files once read are kept."""
    found = (self._where[place] for place in places)
    return np.stack([self._open(file)[row] for file, row in found])


# Sampling.

Draw = Callable[[objectives.Frozen, Any, Any, np.ndarray], np.ndarray]


def make_sampler(
  base: base_lib.Base, config: config_lib.Config, objective: train_step.Objective, mesh: Mesh
) -> Draw:
  """A function (frozen, on the mesh; pairs; pairs with the empty caption; noise) -> latents.

  It draws with `Frozen.reference` (and its adapter) as `config.sampling` says, for each pair's own
  caption. As it works in batches of one size it is compiled once.

  Raises:
    ValueError: a sampler or a number of steps that the base's schedule does not allow.
  """
  settings, denoiser = config.sampling, base.denoiser()
  plan = sample.make_plan(base.schedule, settings.steps, settings.sampler)
  largest = evaluate.images_per_device(base.latent_shape)
  size = mesh.size * min(largest, -(-config.batch_size // mesh.size))

  def generate(params, frozen, rows):
    del params
    pairs, empty, noise, keys = rows
    conditions, negative = (
      objectives.conditions_of(denoiser, frozen, objective.draw(each, jax.random.key(0)))
      for each in (pairs, empty)
    )
    if base.zero_negative:
      negative = sample.without_prompt(negative)
    params = frozen.reference
    if frozen.adapter is not None:
      params = lora.Adapted(params, frozen.adapter)
    params = objectives.cast_kernels(params, denoiser.dtype)
    return sample.sample_latents(
      denoiser,
      shards.gathered(params, later=remat.RUN_BLOCKS),
      noise,
      conditions,
      negative,
      plan=plan,
      guidance_scale=settings.guidance_scale,
      guidance_rescale=settings.guidance_rescale,
      image_guidance_scale=settings.image_guidance_scale if base.edits else None,
      key=jax.random.wrap_key_data(keys),
    )

  everywhere = sharding.replicated(mesh)
  step = jax.jit(
    lambda frozen, rows: sharding.map_rows(generate, None, frozen, rows), out_shardings=everywhere
  )

  def draw(frozen, pairs, empty, noise):
    whole = (pairs, empty, noise, evaluate.noise_keys(noise))
    drawn = []
    for part, own in evaluate.cut_rows(whole, len(noise), size):
      with jax.set_mesh(mesh):
        got = step(frozen, sharding.put_batch(part, mesh))
      drawn.append(np.asarray(got)[:own])
    return np.concatenate(drawn)

  return draw


# Rounds.


@dataclasses.dataclass
class Rounds:
  """What changes from round to round of a run.

  Attributes:
    every: updates of a round.
    keep: checkpoints that the reference is drawn from, at most.
    source: the pairs.
    objective: draws what the conditions are made of; its loss is not called.
    as_reference: a policy's parameters -> those of a reference, in its types.
    batches: start step -> batches, of which the losers are replaced.
  """

  config: config_lib.Config
  base: base_lib.Base
  source: Any
  encoded: encode.Encoded
  objective: train_step.Objective
  as_reference: Callable[[train_step.Params], train_step.Params]
  batches: Callable[[int], Iterator[types.PreferenceBatch]]

  def __post_init__(self):
    self.every = self.config.objective.reference_every
    self.keep = self.config.objective.reference_keep
    self._samplers: dict[Mesh, Draw] = {}

  def begin(
    self,
    step: int,
    params: train_step.Params,
    frozen: objectives.Frozen,
    run: pathlib.Path,
    checkpoints: pathlib.Path,
    mesh: Mesh,
    during: Callable[[], contextlib.AbstractContextManager],
  ) -> tuple[objectives.Frozen, Iterator[types.PreferenceBatch]]:
    """What is read from `step` on, the first of a round or where a run is resumed in one.

    Args:
      params: the policy at `step`; stored if a round begins with it.
      frozen: of the initial model, on the mesh.
      run: its folder.
      checkpoints: the run's own, which it can be resumed from.
      during: entered for each piece of work.

    Returns:
      The reference of the round, on the mesh; the batches from `step` to the round's end.

    Raises:
      ValueError: a stored checkpoint, or what it drew, is missing or damaged.
    """
    number = step // self.every
    if step % self.every == 0:
      with during():
        save_reference(run, number, params)
        remove_old(run, min(checkpoint.saved_steps(checkpoints), default=0), self.every, self.keep)
    chosen = draw_reference(self.config.seed, number, self.keep)
    with during():
      past = load_reference(run, chosen, params)
      frozen = self._place(past, frozen, mesh)
    first = number * self.every
    steps = range(first, min(first + self.every, self.config.steps))
    samples = Samples(_folder(run, chosen), self._identity(past))
    self._draw_missing(samples, chosen, steps, frozen, mesh, during)
    return frozen, self._batches(samples, range(step, steps.stop))

  def _place(self, past, frozen: objectives.Frozen, mesh: Mesh) -> objectives.Frozen:
    if frozen.adapter is not None:
      delta = sharding.put_tree(past, sharding.fsdp_shardings(past, mesh))
      return frozen._replace(adapter=frozen.adapter._replace(delta=delta))
    reference = self.as_reference(past)
    places = sharding.fsdp_shardings(reference, mesh)
    return frozen._replace(reference=sharding.put_tree(reference, places))

  def _identity(self, past: train_step.Params) -> str:
    """Of what this checkpoint draws for these pairs."""
    parts = (
      checkpoint.fingerprint(past),
      dataclasses.asdict(self.config.sampling),
      self.config.seed,
      self.config.precision.compute,
      self.encoded.metadata,
    )
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

  def _places(self, step: int) -> list[Place]:
    config = self.config
    return pipeline.batch_places(
      self.source, seed=config.seed, batch_size=config.batch_size, step=step
    )

  def _draw_missing(self, samples: Samples, number, steps, frozen, mesh, during) -> None:
    """Batch by batch in the order of the round, so that a pair is always drawn beside the same."""
    with logs.progress(len(steps), 0, f"drawing with checkpoint {number}") as bar:
      for step in steps:
        missing = list(dict.fromkeys(p for p in self._places(step) if p not in samples))
        if missing:
          with during():
            samples.save(step, missing, self._draw(number, missing, frozen, mesh))
        bar.update()

  def _draw(self, number: int, places: Sequence[Place], frozen, mesh: Mesh) -> np.ndarray:
    if mesh not in self._samplers:
      self._samplers[mesh] = make_sampler(self.base, self.config, self.objective, mesh)
    records = [dict(pipeline.pair_at(self.source, place)) for place in places]
    empty = [record | dict(self.encoded.empty_caption) for record in records]
    noise = initial_noise(self.config.seed, number, places, self.base.latent_shape)
    return self._samplers[mesh](frozen, pipeline.stack(records), pipeline.stack(empty), noise)

  def _batches(self, samples: Samples, steps: range) -> Iterator[types.PreferenceBatch]:
    for step, batch in zip(steps, self.batches(steps.start), strict=False):
      yield batch._replace(latents_l=samples.read(self._places(step)))
