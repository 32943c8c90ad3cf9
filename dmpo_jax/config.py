"""Frozen dataclasses of a run, and every check that needs no device.

A file in `configs/` gives an ml_collections ConfigDict; `from_dict` turns it into a `Config` once,
at the edge. No field has a default: a config file says everything.
"""

import dataclasses
import math
import types as python_types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dmpo_jax import credentials

SAFEGUARDS = ("sft_weight", "loser_scaling")  # of every loss of the margin

METHODS = {  # method -> the objective's fields that it reads; with beta, it has a reference
  "dmpo": ("beta", "alpha", "labels", *SAFEGUARDS),
  "dpo": ("beta", "label_smoothing", "labels", *SAFEGUARDS),
  "fpo": ("beta", "alpha", "divergence", "order", "labels", *SAFEGUARDS),
  "ipo": ("beta", *SAFEGUARDS),
  "inpo": ("beta", "inversion", "inversion_steps"),
  "seppo": ("beta", "reference_every", "reference_keep"),
  "sft": (),
  "mapo": ("beta_mapo", "snr_value"),
  "kto": ("beta", "lambda_d", "lambda_u", "utility"),
  "denoise": (),
  "autoencoder": ("kl_weight",),
}
OPTIONAL = ("order", "loser_scaling")  # may be None even where the method reads them
OWN_LATENTS = ("inpo", "seppo")  # methods that make latents of their own as they train
ON_IMAGES = ("denoise", "autoencoder")  # the methods that do not train on pairs
ON_JUDGED = ("kto",)  # those that train on images judged one by one
JUDGED = "judged"  # the data set of such images
UTILITIES = ("sigmoid", "loss_averse", "risk_seeking")
REMAT = ("full", "blocks", "layers")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  """What is minimised. Fields that the method does not read must be None.

  Attributes:
    labels: hard, every pair's label as sure as alpha (or label_smoothing) allows; or soft, no surer
      than the data's p_choice.
    sft_weight: of the winner's own error, in units of |dL/du|; 0: off. See `safeguards.add_sft`.
    loser_scaling: mu of `safeguards.loser_scale`, [0, 1]; None: off.
    beta_mapo, snr_value: of `other_losses.mapo_loss`.
    lambda_d, lambda_u, utility: of `other_losses.kto_loss`.
    inversion, inversion_steps: how clean latents are inverted, exact or published, and in how many
      steps; see `inversion.make_inversion`.
    reference_every, reference_keep: updates from one stored checkpoint to the next, and of how many
      of the last the reference is drawn; see `rounds`.
  """

  method: str
  beta: float | None
  alpha: float | None
  label_smoothing: float | None
  divergence: str | None
  order: float | None
  kl_weight: float | None
  labels: str | None
  sft_weight: float | None
  loser_scaling: float | None
  beta_mapo: float | None
  snr_value: float | None
  lambda_d: float | None
  lambda_u: float | None
  utility: str | None
  inversion: str | None
  inversion_steps: int | None
  reference_every: int | None
  reference_keep: int | None

  def __post_init__(self):
    _check_choice("objective.method", self.method, METHODS)
    reads = METHODS[self.method]
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name == "method":
        continue
      if field.name in reads and value is None and field.name not in OPTIONAL:
        raise ValueError(
          f"objective.{field.name}: method {self.method!r} needs it; expected a value, got None"
        )
      if field.name not in reads and value is not None:
        raise ValueError(
          f"objective.{field.name}: method {self.method!r} does not read it; expected None, "
          f"got {value!r}"
        )
    if self.labels is not None:
      _check_choice("objective.labels", self.labels, ("hard", "soft"))
    if self.utility is not None:
      _check_choice("objective.utility", self.utility, UTILITIES)
    if self.inversion is not None:
      _check_choice("objective.inversion", self.inversion, ("exact", "published"))
    numbers = "beta kl_weight beta_mapo snr_value lambda_d lambda_u inversion_steps".split()
    for name in (*numbers, "reference_every", "reference_keep"):
      if getattr(self, name) is not None:
        _check_positive(f"objective.{name}", getattr(self, name))
    weight, scaling = self.sft_weight, self.loser_scaling
    if weight is not None and not (weight >= 0 and math.isfinite(weight)):
      raise ValueError(f"objective.sft_weight: expected >= 0 and finite (0: off), got {weight}")
    if scaling is not None and not 0 <= scaling <= 1:
      raise ValueError(f"objective.loser_scaling: expected [0, 1] or None (off), got {scaling}")

  @property
  def needs_reference(self) -> bool:
    return "beta" in METHODS[self.method]

  @property
  def images_of_pair(self) -> int:
    """Images of a pair that go through the UNet."""
    return 1 if self.method == "sft" else 2


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Attributes:
  dataset: of `data.sources.registry`: emoji_choice/top160, pairs, pickapic_v2, ...; judged for
    images judged one by one, also where `mixture` mixes such.
  path: the folder or bucket where it lies; None for emoji_choice, which comes with packages.
  mixture: encoded data sets to train on in place of `dataset` alone, with their weights:
    "pickapic_v2=4 hpdv3=1"; see `data.mixture`.
  validation_share: share of the captions, [0, 1), that is held out of training with all their
    pairs, for data sets that come without a validation split.
  resize: filter of the short side's resizing, bilinear (as Diffusion-DPO) or lanczos.
  crop: center, or random along the long side.
  flip: probability in [0, 1] that a pair is mirrored, winner and loser together.
  independent: crops and mirrors winner and loser apart, as the published code of Diffusion-DPO
    does; only for a comparison with it.
  prompt_embeds: whether `dmpo prepare` runs the text encoders too and stores their output, so that
    training needs none of them.
  reference_draws: settled draws of timestep and noise for each pair, whose reference errors
    `dmpo cache` computes once; 0: drawn anew every time, and the reference computed in every step.
  broken_limit: share of broken rows, [0, 1], above which `dmpo prepare` stops.
  workers: processes that read ahead on each host; 0: threads of the training process.
  caption_dropout: probability in [0, 1) that a pair is trained on with the empty caption.
  timestep_power: density of the training timesteps is proportional to t^(power - 1); 1: uniform.
  """

  dataset: str
  path: str | None
  mixture: str | None
  validation_share: float
  resize: str
  crop: str
  flip: float
  independent: bool
  prompt_embeds: bool
  reference_draws: int
  broken_limit: float
  workers: int
  caption_dropout: float
  timestep_power: float

  def __post_init__(self):
    _check_choice("data.resize", self.resize, ("bilinear", "lanczos"))
    _check_choice("data.crop", self.crop, ("center", "random"))
    for name in ("flip", "broken_limit"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"data.{name}: expected [0, 1], got {getattr(self, name)}")
    for name in ("validation_share", "caption_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"data.{name}: expected [0, 1), got {getattr(self, name)}")
    _check_positive("data.timestep_power", self.timestep_power)
    if self.reference_draws < 0:
      raise ValueError(f"data.reference_draws: expected at least 0, got {self.reference_draws}")
    if self.reference_draws and self.mixture is not None:
      raise ValueError("data.reference_draws: is for one data set; data.mixture must be None")
    if self.workers < 0:
      raise ValueError(f"data.workers: expected at least 0, got {self.workers}")

  @property
  def judged(self) -> bool:
    """Whether examples are images that were judged one by one, and no pairs."""
    return self.dataset == JUDGED


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """Attributes:
  learning_rate: peak.
  schedule: after the warm-up: constant, linear (to 0) or cosine (to 0).
  b1, b2, eps: of AdamW; Adafactor does not read them.
  clip_norm: largest global norm of the gradient.
  ema_decay: 0 keeps no average; else the averaged parameters are evaluated and exported.
  """

  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  ema_decay: float

  def __post_init__(self):
    _check_choice("optim.name", self.name, ("adamw", "adafactor"))
    _check_choice("optim.schedule", self.schedule, ("constant", "linear", "cosine"))
    _check_positive("optim.learning_rate", self.learning_rate)
    _check_positive("optim.clip_norm", self.clip_norm)
    _check_positive("optim.eps", self.eps)
    if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
      raise ValueError(f"optim.weight_decay: expected >= 0 and finite, got {self.weight_decay}")
    if self.warmup_steps < 0:
      raise ValueError(f"optim.warmup_steps: expected >= 0, got {self.warmup_steps}")
    for name in ("b1", "b2", "ema_decay"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"optim.{name}: expected [0, 1), got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adaptation of the UNet in place of training all of it.

  Attributes:
    rank: 0 trains all parameters; alpha and targets must then be None.
    alpha: the delta is scaled by alpha / rank.
    targets: module names with spaces between, matched from the end: "to_q to_k to_v to_out.0".
  """

  rank: int
  alpha: float | None
  targets: str | None

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"lora.rank: expected at least 0 (0 trains all of it), got {self.rank}")
    for name in ("alpha", "targets"):
      value = getattr(self, name)
      if self.rank > 0 and not value:
        raise ValueError(f"lora.{name}: rank {self.rank} needs it; expected a value, got {value!r}")
      if self.rank == 0 and value is not None:
        raise ValueError(
          f"lora.{name}: rank 0 trains all parameters and does not read it; expected None, got "
          f"{value!r}"
        )
    if self.rank > 0:
      _check_positive("lora.alpha", self.alpha)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
  """Attributes:
  compute: type of activations; parameters, errors and losses are float32 always.
  reference: type in which the frozen reference's kernels are stored.
  """

  compute: str
  reference: str

  def __post_init__(self):
    _check_choice("precision.compute", self.compute, DTYPES)
    _check_choice("precision.reference", self.reference, DTYPES)
    if self.reference == "bfloat16" and self.compute == "float32":
      raise ValueError(
        "precision.reference: bfloat16 with precision.compute=float32 would make the margins of "
        "step 0 differ from zero; expected float32, or set precision.compute=bfloat16"
      )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How images are made.

  Attributes:
    sampler: see `sample.SAMPLERS`; None: the one that the base's scheduler_config.json names.
    guidance_rescale: share of the guided prediction's deviation that is set back to the
      conditional one's, [0, 1] (Lin et al., arXiv 2305.08891, section 3.4).
    image_guidance_scale: of edits (Brooks et al., arXiv 2211.09800, eq. 3); others do not read it.
  """

  sampler: str | None
  steps: int
  guidance_scale: float
  guidance_rescale: float
  image_guidance_scale: float | None
  images_per_prompt: int

  def __post_init__(self):
    if not 0 <= self.guidance_rescale <= 1:
      raise ValueError(f"sampling.guidance_rescale: expected [0, 1], got {self.guidance_rescale}")
    if self.image_guidance_scale is not None:
      _check_positive("sampling.image_guidance_scale", self.image_guidance_scale)
    _check_positive("sampling.steps", self.steps)
    _check_positive("sampling.images_per_prompt", self.images_per_prompt)
    if not (self.guidance_scale >= 1 and math.isfinite(self.guidance_scale)):
      raise ValueError(
        f"sampling.guidance_scale: expected >= 1 (1 switches guidance off) and finite, "
        f"got {self.guidance_scale}"
      )


@dataclasses.dataclass(frozen=True)
class Config:
  """One run.

  Attributes:
    base: a diffusers folder, or `emoji` for the one that is shipped.
    batch_size: examples (pairs) per update over all devices and accumulation parts.
    accumulation: parts of the batch that are run one after the other.
    fsdp: devices over which parameters are split; the others hold copies and split the batch.
    remat: what the backward pass computes again: full, the whole forward pass; blocks, all within
      the UNet's blocks; layers, only what is between its convolutions and projections.
    log_every, validate_every, save_every: in steps.
    keep: checkpoints that are kept, the best one beside them.
  """

  base: str
  seed: int
  steps: int
  batch_size: int
  accumulation: int
  fsdp: int
  remat: str
  log_every: int
  validate_every: int
  save_every: int
  keep: int
  objective: ObjectiveConfig
  data: DataConfig
  optim: OptimConfig
  lora: LoraConfig
  precision: PrecisionConfig
  sampling: SamplingConfig

  def __post_init__(self):
    for name in (
      "steps batch_size accumulation fsdp log_every validate_every save_every keep"
    ).split():
      _check_positive(name, getattr(self, name))
    _check_choice("remat", self.remat, REMAT)
    if self.data.reference_draws and not self.objective.needs_reference:
      raise ValueError(
        f"data.reference_draws: method {self.objective.method!r} has no reference; expected 0, got "
        f"{self.data.reference_draws}"
      )
    if self.seed < 0:
      raise ValueError(f"seed: expected >= 0, got {self.seed}")
    if self.data.reference_draws and self.objective.method in OWN_LATENTS:
      raise ValueError(
        f"data.reference_draws: method {self.objective.method!r} makes latents as it trains, of "
        f"which no errors can be known beforehand; expected 0, got {self.data.reference_draws}"
      )
    if self.optim.warmup_steps >= self.steps:
      raise ValueError(
        f"optim.warmup_steps: expected fewer than steps={self.steps}, got {self.optim.warmup_steps}"
      )


def from_dict(raw: Mapping[str, Any]) -> Config:
  """Checks names, types and ranges of all fields.

  Raises:
    ValueError: unknown or missing field, wrong type or value; the field is named with its path.
  """
  return _read(Config, raw, "")


def differences(
  theirs: Mapping[str, Any], ours: Mapping[str, Any], *, free: Sequence[str] = (), prefix: str = ""
) -> Iterator[str]:
  """What differs between two nested mappings, field by field with its path.

  Args:
    free: paths that may differ.

  >>> list(differences({"a": {"b": 1}, "c": 0}, {"a": {"b": 2}, "c": 3}, free=["c"]))
  ['a.b is 1 there and 2 here']
  """
  for name in {**theirs, **ours}:
    path, there, here = prefix + name, theirs.get(name), ours.get(name)
    if path in free or there == here:
      continue
    if isinstance(there, dict) and isinstance(here, dict):
      yield from differences(there, here, free=free, prefix=path + ".")
    else:
      yield f"{path} is {there!r} there and {here!r} here"


def _read(cls: type, raw: Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(raw) - set(hints))
  if unknown:
    raise ValueError(f"config: unknown field {prefix}{unknown[0]}; known: {', '.join(hints)}")
  missing = sorted(set(hints) - set(raw))
  if missing:
    raise ValueError(f"config: missing field {prefix}{missing[0]}")
  values = {}
  for name, hint in hints.items():
    if dataclasses.is_dataclass(hint):
      if not isinstance(raw[name], Mapping) and not hasattr(raw[name], "items"):
        raise ValueError(f"config: {prefix}{name}: expected a group of fields, got {raw[name]!r}")
      values[name] = _read(hint, raw[name], f"{prefix}{name}.")
    else:
      values[name] = _check_type(prefix + name, raw[name], hint)
  return cls(**values)


def _check_type(path: str, value: Any, hint: Any) -> Any:
  allowed = typing.get_args(hint) if isinstance(hint, python_types.UnionType) else (hint,)
  if isinstance(value, str):
    credentials.refuse_secret(value, f"config: {path}")
  if value is None and python_types.NoneType in allowed:
    return None
  if float in allowed and type(value) is int:
    return float(value)
  if type(value) not in allowed:
    names = " or ".join(each.__name__ for each in allowed)
    raise ValueError(f"config: {path}: expected {names}, got {value!r}")
  return value


def _check_choice(name: str, value: str, choices) -> None:
  if value not in choices:
    raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: float | int) -> None:
  if not (value > 0 and math.isfinite(value)):
    raise ValueError(f"{name}: expected > 0 and finite, got {value}")
