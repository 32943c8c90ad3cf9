"""Every method on SD 1.5's and SDXL's topologies in small, all of the UNet or a low-rank delta.

The UNet is compiled once for all methods, and not within a step of each: that steps, runs and
exports are right as a whole is in test_topologies, test_rounds and test_inversion.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import test_topologies
import tiny

from dmpo_jax import base as base_lib
from dmpo_jax import inversion, lora, sharding, tasks, train
from dmpo_jax.data import pipeline

pytestmark = pytest.mark.slow  # some hundred operations are compiled for each kind

PAIRS = 4
RATES = {False: 0.002, True: 0.01}  # steps by their norm, of all and of a delta: margins near 0.1
BETA, ALPHA, SMOOTHING, SFT, MU = 300.0, 0.05, 0.1, 0.3, 0.9
WEIGHTS = (1.0, 0.7)  # KTO's
P_CHOICE = np.float32([0.8, 0.93, 0.97, 1.0])
SOFT = {"objective.labels": "soft"}


def invert(kind):
  return {"objective.inversion": kind, "objective.inversion_steps": 2}


# Name -> file, and what else is set; hyper-parameters are not the files' own, lest one be read that
# the configuration does not give.
CASES = {
  "dmpo": ("dmpo", {"objective.alpha": ALPHA, **SOFT}),
  "dpo": ("dpo", {"objective.label_smoothing": SMOOTHING, **SOFT}),
  "fpo": ("fpo", {"objective.alpha": ALPHA, **SOFT}),
  "ipo": ("ipo", {}),
  "inpo exact": ("inpo", invert("exact")),
  "inpo published": ("inpo", invert("published")),
  "sft": ("sft", {}),
  "seppo": ("seppo", {"objective.reference_every": 1, "sampling.steps": 1}),
  "mapo": ("mapo", {"objective.beta_mapo": 0.2, "objective.snr_value": 0.4}),
  "kto": ("kto", {"objective.lambda_d": WEIGHTS[0], "objective.lambda_u": WEIGHTS[1]}),
  "dmpo, sft_weight": ("dmpo", {"objective.alpha": ALPHA, "objective.sft_weight": SFT}),
  "dpo, loser_scaling": ("dpo", {"objective.loser_scaling": MU}),
}
WITHOUT = ("sft", "mapo")  # a reference
# Their gradient is not that of a smooth loss: a sign may turn, the loser's part is scaled.
NO_DESCENT = ("seppo", "dpo, loser_scaling")
# What test_inversion, and test_other_objectives in a run, show on all of an SD 1.
ELSEWHERE = [("sd1", "inpo exact"), ("sd1", "sft")]
# Each method fully on one kind and as a delta on the other; the next method the other way round.
PLAN = [
  (kind, name, (number + turn) % 2 == 1)
  for turn, kind in enumerate(("sd1", "sdxl"))
  for number, name in enumerate(CASES)
  if (kind, name) not in ELSEWHERE
]


class Compiled(base_lib.Base):
  """A base whose networks are compiled once, whatever is made of them."""

  @functools.cached_property
  def compiled(self):
    plain = super().denoiser()
    return plain._replace(unet=jax.jit(plain.unet), embed=jax.jit(plain.embed))

  def denoiser(self):
    return self.compiled


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
  """Kind -> folder of a base, the base, encoded pairs; each made once."""

  @functools.cache
  def make(kind):
    folder, _, encoded = test_topologies.prepare(tmp_path_factory.mktemp(kind), kind)
    # Nothing kept for the backward pass: policy and reference then run the same program.
    base = base_lib.load_base(str(folder), remat="full")
    fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    return folder, Compiled(**fields), encoded

  return make


def make_task(prepared, name, low_rank):
  base_folder, base, encoded = prepared
  file, more = CASES[name]
  more = {**more, **(test_topologies.LORA if low_rank else {})}
  if name not in WITHOUT:
    more["objective.beta"] = BETA
  path = f"configs/emoji_{file}.py"
  config = tiny.config(base_folder, path=path, batch_size=PAIRS, steps=2, **more)
  return config, tasks.preference_task(config, base, encoded)


def first_round(task, run):
  """SePPO's: its reference, and a batch with what that drew."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  frozen = sharding.put_tree(task.frozen, sharding.replicated(mesh))
  folders = (run, run / train.CHECKPOINTS)
  frozen, batches = task.rounds.begin(
    0, task.params, frozen, *folders, mesh, contextlib.nullcontext
  )
  return jax.tree.map(np.asarray, frozen), next(batches)


def merged(frozen, delta):
  """The UNet's parameters with a delta, or those that are all trained."""
  if frozen.adapter is None:
    return delta
  return lora.merge(frozen.reference, frozen.adapter._replace(delta=delta))


def images_of(base, frozen, examples):
  """Latents, noise, timesteps and conditions, a row for each image with its own caption."""
  count = examples.latents.shape[1]

  def each(x, single):
    x = np.asarray(x)
    return x.repeat(count, axis=0) if x.ndim == single else x.reshape(-1, *x.shape[2:])

  ids, times = (
    None if x is None else np.asarray(x).repeat(count, axis=0)
    for x in (examples.input_ids, examples.time_ids)
  )
  conditions = base.denoiser().embed(frozen.text_encoders, ids, times)
  noising = examples.noising
  return each(examples.latents, 4), each(noising.noise, 4), each(noising.timesteps, 1), conditions


def noise_of(base, frozen, params, examples, invert):
  """In each image: what was drawn, or what the policy's inversion finds."""
  latents, noise, timesteps, conditions = images_of(base, frozen, examples)
  if invert is None:
    return noise
  keys = examples.inversion_keys.reshape(len(latents), -1)
  return invert(params, jnp.asarray(latents), jnp.asarray(timesteps), conditions, keys)


def residuals(base, frozen, params, examples, noise):
  """[B, k, h, w, c] in float64 but for the network."""
  latents, _, timesteps, conditions = images_of(base, frozen, examples)
  noise, denoiser = np.float64(noise), base.denoiser()
  level = np.float64(denoiser.alphas_cumprod)[timesteps].reshape(-1, 1, 1, 1)
  noisy = np.float32(np.sqrt(level) * latents + np.sqrt(1 - level) * noise)
  output = denoiser.unet(params, noisy, timesteps, conditions)
  return (np.float64(output) - noise).reshape(examples.latents.shape)


def expected_loss(name, err, ref_err):
  """Of each pair, by the oracles."""
  if name == "sft":
    return err[:, 0]
  if name == "mapo":
    return oracles.mapo(*err.T, beta_mapo=0.2, snr_value=0.4)[0]
  if name == "kto":
    desirable = np.array([[True, False]] * len(err))
    settings = {"kappa": BETA / 2, "weights": WEIGHTS, "utility": "sigmoid"}
    return oracles.kto(err, ref_err, desirable, **settings)[0].mean(axis=1)
  if name == "seppo":
    return oracles.seppo(*err.T, *ref_err.T, beta=BETA)[2]
  u = oracles.margin(*err.T, *ref_err.T, beta=BETA)
  if name == "ipo":
    return oracles.ipo(u, tau=1.0)
  if name == "dmpo, sft_weight":
    return oracles.dmpo(u, ALPHA) + SFT * BETA / 2 * (err - ref_err)[:, 0]
  if name not in ("dmpo", "dpo", "fpo"):
    return oracles.dpo(u, 0.0)
  masses = np.maximum(SMOOTHING if name == "dpo" else ALPHA, 1 - np.float64(P_CHOICE))
  more = (oracles.GENERATORS["js"],) if name == "fpo" else ()
  return np.array([getattr(oracles, name)(*pair, *more) for pair in zip(u, masses, strict=True)])


@pytest.mark.parametrize(
  "kind, name, low_rank",
  PLAN,
  ids=[f"{kind}-{name}-{'delta' if low_rank else 'full'}" for kind, name, low_rank in PLAN],
)
def test_a_method_trains(prepare, kind, name, low_rank, tmp_path):
  """Two steps of descent: what is reported is the oracle's of errors that are formed apart."""
  _, base, encoded = prepare(kind)
  config, task = make_task(prepare(kind), name, low_rank)
  frozen, objective = task.frozen, task.objective
  batch = pipeline.load_split(encoded.splits["train"], PAIRS)
  if name == "seppo":
    frozen, batch = first_round(task, tmp_path)
  examples = objective.draw(
    jax.tree.map(jnp.asarray, batch._replace(p_choice=P_CHOICE)), jax.random.key(3)
  )

  def step(params):
    def mean_loss(params):
      values, metrics = objective.loss(params, frozen, examples)
      return values.mean(), (values, metrics)

    gradients, (values, metrics) = jax.grad(mean_loss, has_aux=True)(params)
    assert all(np.all(np.isfinite(value)) for value in (values, *metrics.values()))
    gradients = jax.tree.map(np.asarray, gradients)
    rate = np.float32(RATES[low_rank]) / np.sqrt(
      sum(np.sum(g**2) for g in jax.tree.leaves(gradients))
    )
    return jax.tree.map(lambda p, g: p - rate * g, params, gradients), gradients, values, metrics

  moved, gradients, first, start = step(task.params)
  _, more, second, after = step(moved)
  # The second: a delta's first factors get no gradient while the others are zero.
  used = jax.tree.map(lambda a, b: np.any(a) or np.any(b), gradients, more)
  assert all(jax.tree.leaves(used))
  if name not in NO_DESCENT:
    assert second.mean() < first.mean()

  if name in WITHOUT:
    assert not set(start) & {"winner_advantage", "loser_advantage"}
  else:
    assert not np.any(start["margin"]) and not np.any(start["winner_advantage"])
    assert np.all(start["accuracy"] == 0.5) and not np.any(start["dead_zone"])
    zeros = np.zeros((PAIRS, 2))
    np.testing.assert_allclose(first, expected_loss(name, zeros, zeros), rtol=1e-6)
    assert np.abs(after["margin"]).max() > 0.05

  inversion_of = None
  if config.objective.inversion is not None:
    settings = {"kind": config.objective.inversion, "steps": config.objective.inversion_steps}
    inversion_of = inversion.make_inversion(base.denoiser(), base.schedule, **settings)
  policy = merged(frozen, moved)
  noise = noise_of(base, frozen, policy, examples, inversion_of)
  left = residuals(base, frozen, policy, examples, noise)
  err, ref_err = np.square(left).mean(axis=(2, 3, 4)), None
  if name not in WITHOUT:
    reference = frozen.reference  # a new delta changes nothing
    ref_err = np.square(residuals(base, frozen, reference, examples, noise)).mean(axis=(2, 3, 4))
  # Errors near 1, each with a rounding of a few 2^-24 for other sums; kappa is 150, MaPO's 200.
  np.testing.assert_allclose(second, expected_loss(name, err, ref_err), atol=3e-4)
  np.testing.assert_allclose(after["denoising_loss"], err.mean(axis=1), rtol=1e-5)
  if name == "dpo, loser_scaling":
    scales = [oracles.loser_scale(*pair, MU) for pair in left]
    np.testing.assert_allclose(after["loser_scale"], scales, rtol=1e-4)
    assert max(scales) < 1


def test_winner_and_loser_stay_what_they_are(prepare):
  """The first image is the batch's winner, drawn here from posteriors without width; and what
  SePPO's reference drew stands in the loser's place."""
  _, base, encoded = prepare("sdxl")
  batch = pipeline.load_split(encoded.splits["train"], PAIRS)
  batch = jax.tree.map(np.array, batch)
  means = []
  for moments in (batch.moments_w, batch.moments_l):
    mean, logvar = np.split(moments, 2, axis=-1)
    logvar[:] = -30.0
    means.append(base.vae.config.scaling_factor * np.float32(mean))
  assert np.abs(means[0] - means[1]).max() > 0.1
  drawn = np.ones_like(means[0])
  for name in CASES:
    _, task = make_task(prepare("sdxl"), name, low_rank=False)
    given = batch._replace(latents_l=drawn) if name == "seppo" else batch
    latents = task.objective.draw(given, jax.random.key(3)).latents
    expected = [means[0], drawn if name == "seppo" else means[1]][: latents.shape[1]]
    assert latents.shape[1] == (1 if name == "sft" else 2)
    # exp(-15) of standard normal numbers.
    np.testing.assert_allclose(latents, np.stack(expected, axis=1), atol=1e-5)
