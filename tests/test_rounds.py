"""SePPO's rounds: which reference, what it drew, each thing once, and resume bit for bit."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import checkpoint, logs, rounds, sample, sharding, stages, tasks, train
from dmpo_jax.data import pipeline

# --- which reference ---


def test_the_reference_is_drawn_uniformly_from_the_last_checkpoints():
  keep, count = 3, 3000
  drawn = np.array([rounds.draw_reference(0, i, keep) for i in range(count)])
  ages = np.arange(count) - drawn
  assert drawn[0] == 0 and drawn[1] in (0, 1) and ages.min() == 0 and ages.max() == keep - 1
  shares = np.bincount(ages) / count
  # Four standard deviations of a share of 1/3 over 3000 draws.
  np.testing.assert_allclose(shares, 1 / keep, atol=4 * np.sqrt(2 / 9 / count))


def test_the_reference_is_a_function_of_seed_and_round():
  one, same, other = ([rounds.draw_reference(s, i, 7) for i in range(40)] for s in (5, 5, 6))
  assert one == same != other


def test_noise_is_a_function_of_seed_checkpoint_and_pair():
  def draw(seed, number, *places):
    return rounds.initial_noise(seed, number, places, (2, 3, 4))

  both = draw(0, 1, (0, 7), (0, 8))
  np.testing.assert_array_equal(both[1:], draw(0, 1, (0, 8)))
  for other in (draw(1, 1, (0, 7)), draw(0, 2, (0, 7)), draw(0, 1, (1, 7)), both[1:]):
    assert np.abs(both[:1] - other).min() > 0


# --- which pairs ---


@dataclasses.dataclass(frozen=True)
class Numbers:
  """A source of pairs that hold a number."""

  length: int
  first: int

  def __len__(self):
    return self.length

  def __getitem__(self, position):
    number = np.int32(self.first + position)
    return {"moments_w": number, "moments_l": number, "input_ids": np.zeros(3, np.int32)}


SOURCES = [
  Numbers(11, 0),
  pipeline.Mixture((Numbers(7, 0), Numbers(7, 100), Numbers(3, 200)), (1.0, 2.0, 1.0)),
]


@pytest.mark.parametrize("source", SOURCES, ids=["one", "mixture"])
def test_places_are_those_of_the_batches(source):
  settings = dict(seed=3, batch_size=4)
  more = dict(caption_dropout=0.5, empty_caption={"input_ids": np.ones(3, np.int32)})
  batches = pipeline.preference_batches(source, **settings, **more)
  for step, batch in zip(range(8), batches, strict=False):
    places = pipeline.batch_places(source, **settings, step=step)
    pairs = [pipeline.pair_at(source, place)["moments_w"] for place in places]
    np.testing.assert_array_equal(pairs, batch.moments_w)


# --- stored checkpoints ---


def params_of(value):
  return {"conv": {"kernel": np.full((3, 2), value, np.float32)}, "bias": np.ones(2, np.float32)}


def folders(run):
  return sorted(path.name for path in (run / rounds.FOLDER).iterdir())


def test_a_stored_checkpoint_comes_back_with_its_bits(tmp_path):
  rounds.save_reference(tmp_path, 4, jax.tree.map(jnp.asarray, params_of(0.1)))
  got = rounds.load_reference(tmp_path, 4, params_of(0.0))
  jax.tree.map(np.testing.assert_array_equal, got, params_of(0.1))
  with pytest.raises(ValueError, match="000005/params.safetensors: missing"):
    rounds.load_reference(tmp_path, 5, params_of(0.0))
  with pytest.raises(ValueError, match="has other parameters than the model"):
    rounds.load_reference(tmp_path, 4, {"bias": np.ones(2, np.float32)})


def test_a_flipped_bit_is_found(tmp_path):
  rounds.save_reference(tmp_path, 0, params_of(0.1))
  file = tmp_path / rounds.FOLDER / "000000" / rounds.PARAMS_FILE
  content = bytearray(file.read_bytes())
  content[-5] ^= 1
  file.write_bytes(content)
  with pytest.raises(checkpoint.Damaged, match="is damaged: checksum"):
    rounds.load_reference(tmp_path, 0, params_of(0.0))


def test_what_another_checkpoint_of_that_number_drew_is_removed_with_it(tmp_path):
  folder = tmp_path / rounds.FOLDER / "000001"
  rounds.save_reference(tmp_path, 1, params_of(0.1))
  rounds.Samples(folder, "x").save(0, [(0, 1)], np.ones((1, 2, 2, 4), np.float32))
  rounds.save_reference(tmp_path, 1, params_of(0.1))  # the same bits: a resumed run
  assert (0, 1) in rounds.Samples(folder, "x")
  rounds.save_reference(tmp_path, 1, params_of(0.2))
  assert len(rounds.Samples(folder, "x")) == 0
  got = rounds.load_reference(tmp_path, 1, params_of(0.0))
  assert np.asarray(got["conv"]["kernel"])[0, 0] == np.float32(0.2)


def test_only_what_no_round_can_draw_any_more_is_removed(tmp_path):
  for number in range(6):
    rounds.save_reference(tmp_path, number, params_of(number))
  rounds.remove_old(tmp_path, 29, every=10, keep=2)  # round 2 draws from 1 and 2
  assert folders(tmp_path) == [f"{number:06d}" for number in range(1, 6)]
  rounds.remove_old(tmp_path, 0, every=10, keep=2)
  assert len(folders(tmp_path)) == 5


# --- what they drew ---


def test_samples_are_found_again_by_pair(tmp_path):
  latents = np.arange(3 * 2 * 2 * 4, dtype=np.float32).reshape(3, 2, 2, 4)
  samples = rounds.Samples(tmp_path, "x")
  samples.save(20, [(0, 5), (1, 5)], latents[:2])
  samples.save(21, [(0, 6)], latents[2:])
  again = rounds.Samples(tmp_path, "x")
  assert len(again) == 3 and (1, 5) in again and (1, 6) not in again
  np.testing.assert_array_equal(again.read([(0, 6), (0, 5), (0, 6)]), latents[[2, 0, 2]])
  with pytest.raises(ValueError, match="samples-00000020.*: drawn by another checkpoint, or with"):
    rounds.Samples(tmp_path, "y")
  file = tmp_path / "samples-00000021.safetensors"
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  with pytest.raises(checkpoint.Damaged, match="samples-00000021.*latents is damaged"):
    rounds.Samples(tmp_path, "x").read([(0, 6)])


# --- runs ---

SETTINGS = {
  "objective.method": "seppo",
  "objective.alpha": None,
  "objective.labels": None,
  "objective.sft_weight": None,
  "objective.reference_every": 2,
  "objective.reference_keep": 2,
  "batch_size": 4,
  "steps": 6,
  "save_every": 1,
  "validate_every": 6,
  "data.flip": 0.0,
  "optim.learning_rate": 1e-3,
}


def prepare(base_folder, data, **more):
  config = tiny.config(base_folder, **SETTINGS | more)
  base = base_lib.load_base(config.base)
  return config, base, tasks.preference_task(config, base, stages.open_data(config, base, data))


def drawn_files(run):
  return {path: path.stat().st_mtime_ns for path in (run / rounds.FOLDER).rglob("samples-*")}


@pytest.fixture(scope="module")
def straight(tiny_base, tiny_data, tmp_path_factory):
  """Three rounds of two steps on two devices, without interruption."""
  out = tmp_path_factory.mktemp("seppo") / "run"
  config, base, task = prepare(tiny_base, tiny_data)
  train.train(config, task, out, devices=jax.devices()[:2])
  return out, config, base, task


@pytest.mark.slow
def test_a_run_begins_at_zero_and_leaves_one_record_a_step(straight):
  out, config, _, _ = straight
  records = logs.read(out)
  assert [record["step"] for record in records] == list(range(7))
  assert records[0]["validation/margin_abs_max"] == records[1]["train/margin_abs_max"] == 0.0
  assert records[1]["train/flipper"] == 1.0  # a tie
  assert records[1]["train/loss"] == pytest.approx(np.log(2), rel=1e-6)
  assert -1.0 <= records[2]["train/flipper"] <= 1.0 and records[2]["train/margin_abs_max"] > 0
  chosen = [rounds.draw_reference(config.seed, i, 2) for i in range(3)]
  drew = {path.parent.name for path in drawn_files(out)}
  assert drew == {f"{number:06d}" for number in chosen}


@pytest.mark.slow
def test_what_the_reference_drew_is_what_a_sampler_draws(straight):
  """The first pair of the first batch, drawn by the initial model alone, on one device."""
  out, config, base, task = straight
  place = task.rounds._places(0)[0]
  files = rounds.Samples(out / rounds.FOLDER / "000000", task.rounds._identity(base.params["unet"]))
  pair = pipeline.pair_at(task.rounds.source, place)
  ids = np.stack([pair["input_ids"], task.rounds.encoded.empty_caption["input_ids"]])
  denoiser = base.denoiser()
  both = denoiser.embed(base.text_params, jnp.asarray(ids))
  one, none = (jax.tree.map(lambda x, i=i: x[i : i + 1], both) for i in (0, 1))
  noise = rounds.initial_noise(config.seed, 0, [place], base.latent_shape)
  expected = sample.sample_latents(
    denoiser,
    base.params["unet"],
    jnp.asarray(noise),
    one,
    none,
    plan=sample.make_plan(base.schedule, config.sampling.steps),
    guidance_scale=config.sampling.guidance_scale,
  )
  np.testing.assert_allclose(files.read([place]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_batch_holds_what_was_drawn_in_place_of_the_loser(straight):
  _, _, _, task = straight
  source = task.rounds.source
  batch = pipeline.stack([source[0], source[1]])
  drawn = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
  key = jax.random.key(0)
  with_drawn = task.objective.draw(batch._replace(latents_l=drawn), key)
  real = task.objective.draw(batch, jax.random.key(0))
  np.testing.assert_array_equal(with_drawn.latents[:, 1], drawn)
  np.testing.assert_array_equal(with_drawn.latents[:, 0], real.latents[:, 0])


@pytest.mark.slow
def test_stopped_in_a_round_and_resumed_the_bits_are_the_same(straight, tmp_path):
  """Stopped after step 3, in the middle of round 1; nothing that was drawn is drawn again."""
  out, config, _, task = straight
  devices, run = jax.devices()[:2], tmp_path / "run"
  whole = task.rounds.batches
  ending = dataclasses.replace(
    task.rounds, batches=lambda start: itertools.islice(whole(start), max(0, 3 - start))
  )
  train.train(config, task._replace(rounds=ending), run, devices=devices)
  assert checkpoint.saved_steps(run / train.CHECKPOINTS)[-1] == 3
  before = drawn_files(run)
  train.train(config, task, run, devices=devices)
  after = drawn_files(run)
  assert before.items() <= after.items()
  sums = [checkpoint.read_metadata(r / train.CHECKPOINTS)["checksums"] for r in (run, out)]
  assert sums[0] == sums[1]
  files = [{str(p.relative_to(r)) for p in (r / rounds.FOLDER).rglob("*")} for r in (run, out)]
  assert files[0] == files[1]
  assert [record["step"] for record in logs.read(run)] == list(range(7))


@pytest.mark.slow
def test_sampling_may_not_change_on_the_way(straight):
  out, config, _, _ = straight
  train.claim_folder(out, dataclasses.replace(config, log_every=7))
  other = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, steps=3))
  with pytest.raises(ValueError, match="already holds another run: sampling.steps is 2 there"):
    train.claim_folder(out, other)


@pytest.mark.slow
def test_a_low_rank_checkpoint_is_its_delta_and_draws_with_it(
  straight, tiny_base, tiny_data, tmp_path
):
  """A delta of zero draws what the base draws, on one device what it did on two; another draws
  otherwise. The round is begun and not trained."""
  out, _, base, full = straight
  more = {"lora.rank": 2, "lora.alpha": 2.0, "lora.targets": "to_q"}
  config, _, task = prepare(tiny_base, tiny_data, **more)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  frozen = sharding.put_tree(task.frozen, sharding.replicated(mesh))
  places = task.rounds._places(0)
  moved = jax.tree.map(lambda x: x + np.float32(0.5), task.params)

  def begin(run, params):
    return task.rounds.begin(
      0, params, frozen, run, run / train.CHECKPOINTS, mesh, contextlib.nullcontext
    )

  begun, batches = begin(tmp_path / "zero", task.params)
  assert begun.reference is frozen.reference and len(list(batches)) == 2
  begun, batches = begin(tmp_path / "moved", moved)
  jax.tree.map(np.testing.assert_array_equal, begun.adapter.delta, moved)
  zero, other = (
    rounds.Samples(tmp_path / name / rounds.FOLDER / "000000", task.rounds._identity(params))
    for name, params in (("zero", task.params), ("moved", moved))
  )
  identity = full.rounds._identity(base.params["unet"])
  expected = rounds.Samples(out / rounds.FOLDER / "000000", identity).read(places)
  np.testing.assert_allclose(zero.read(places), expected, rtol=1e-4, atol=1e-4)
  assert np.abs(other.read(places) - expected).max() > 0.01
  np.testing.assert_array_equal(next(batches).latents_l, other.read(places))


def test_several_processes_are_refused(tiny_base, tiny_data, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="'seppo' expected one process, which stores .* got 2"):
    prepare(tiny_base, tiny_data)
