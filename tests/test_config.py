"""config.py and configs/*.py: what is read, what is overridden, and how bad input is refused."""

import copy
import dataclasses
import pathlib
import sys

import pytest

from dmpo_jax import cli, config, other_losses

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
DEMO = str(CONFIGS / "emoji_dmpo.py")
BASE = str(CONFIGS / "emoji_base.py")


@pytest.fixture(scope="module")
def demo():
  return cli.read_config(DEMO, [])


def replaced(raw, path, value):
  """A copy of nested dicts with one field set."""
  raw = copy.deepcopy(raw)
  *groups, leaf = path.split(".")
  group = raw
  for name in groups:
    group = group[name]
  group[leaf] = value
  return raw


def with_objective(raw, **fields):
  names = [field.name for field in dataclasses.fields(config.ObjectiveConfig)]
  return {**raw, "objective": {**dict.fromkeys(names), **fields}}


def refusal(function, *arguments):
  with pytest.raises(ValueError) as caught:
    function(*arguments)
  return str(caught.value)


def groups(value):
  """The dataclass and those within it."""
  yield value
  for field in dataclasses.fields(value):
    if dataclasses.is_dataclass(getattr(value, field.name)):
      yield from groups(getattr(value, field.name))


# File -> the groups in it that are runs; "" is the file itself.
SHIPPED = {
  "emoji_dmpo": ("",),
  "emoji_inpo": ("",),
  "emoji_seppo": ("",),
  "emoji_base": ("autoencoder", "denoise", "condition"),
  "emoji_dpo": ("",),
  "emoji_fpo": ("",),
  "emoji_ipo": ("",),
  "emoji_sdpo": ("",),
  "emoji_dmpo_sft": ("",),
  "emoji_sft": ("",),
  "emoji_mapo": ("",),
  "emoji_kto": ("",),
  "sd15_dmpo_pickapic": ("",),
  "sd15_dpo_pickapic": ("",),
  "sd15_dmpo_lora": ("",),
  "sdxl_dmpo_pickapic": ("",),
  "sdxl_dpo_pickapic": ("",),
  "instruct_pix2pix_dmpo": ("",),
}
RUNS = [(name, part) for name, parts in SHIPPED.items() for part in parts]


def shipped(name, part):
  raw = cli.read_config(str(CONFIGS / f"{name}.py"), [])
  return raw[part] if part else raw


@pytest.mark.parametrize("name, part", RUNS)
def test_shipped_files_are_valid(name, part):
  raw = shipped(name, part)
  read = config.from_dict(raw)
  assert dataclasses.asdict(read) == raw  # nothing is dropped, added or renamed
  for group in groups(read):
    with pytest.raises(dataclasses.FrozenInstanceError):
      setattr(group, dataclasses.fields(group)[0].name, None)


def test_every_shipped_run_is_covered():
  found = {}
  for path in CONFIGS.glob("*.py"):
    raw = cli.read_config(str(path), [])
    parts = {"": raw, **{name: part for name, part in raw.items() if isinstance(part, dict)}}
    found[path.stem] = {name for name, part in parts.items() if "objective" in part}
  assert found == {name: set(parts) for name, parts in SHIPPED.items()}


def test_shipped_files_are_what_their_docstrings_say():
  read = {
    part or name: config.from_dict(shipped(name, part))
    for name, part in RUNS
    if name.startswith("emoji")
  }
  demo, without = read["emoji_dmpo"], ("emoji_sft", "emoji_mapo")
  assert (demo.base, demo.objective.method) == ("emoji", "dmpo")
  for name, run in read.items():
    if name.startswith("emoji_"):
      assert dataclasses.replace(run, objective=demo.objective) == demo
      assert run.objective.needs_reference == (name not in without)
      assert run.objective.method in (name.removeprefix("emoji_"), "dmpo")
  for part in ("autoencoder", "denoise", "condition"):
    assert read[part].objective.method == ("autoencoder" if part == "autoencoder" else "denoise")
    assert not read[part].objective.needs_reference


@pytest.mark.parametrize(
  "name, method, beta, rate, optimizer",
  [
    ("sd15_dmpo_pickapic", "dmpo", 2000.0, 2.048e-5, "adamw"),
    ("sd15_dpo_pickapic", "dpo", 5000.0, 2.048e-5, "adamw"),
    ("sdxl_dmpo_pickapic", "dmpo", 6000.0, 2.048e-6, "adafactor"),
    ("sdxl_dpo_pickapic", "dpo", 5000.0, 2.048e-5, "adafactor"),
  ],
)
def test_reference_runs_have_the_published_constants(name, method, beta, rate, optimizer):
  read = config.from_dict(shipped(name, ""))
  assert (read.objective.method, read.objective.beta) == (method, beta)
  assert (read.optim.learning_rate, read.optim.name) == (rate, optimizer)
  assert (read.batch_size, read.steps, read.data.caption_dropout) == (2048, 2000, 0.2)
  assert (read.optim.weight_decay, read.optim.clip_norm, read.optim.ema_decay) == (0.01, 1.0, 0.0)
  assert read.objective.alpha == (0.01 if method == "dmpo" else None)


def test_a_configuration_leaves_the_search_path_as_it_was():
  before = list(sys.path)
  cli.read_config(str(CONFIGS / "sd15_dpo_pickapic.py"), [])
  assert sys.path == before


# --- overrides ---


@pytest.mark.parametrize(
  "override, path, value",
  [
    ("steps=40", "steps", 40),
    ("base=runs/mine=2", "base", "runs/mine=2"),
    ("optim.learning_rate=1e-5", "optim.learning_rate", 1e-5),
    ("optim.clip_norm=2", "optim.clip_norm", 2.0),
    ("objective.beta=500", "objective.beta", 500.0),
    ("sampling.steps=3", "sampling.steps", 3),
    ("data.dataset=emoji_choice/all", "data.dataset", "emoji_choice/all"),
    ("precision.compute=bfloat16", "precision.compute", "bfloat16"),
  ],
)
def test_an_override_sets_its_field_and_no_other(demo, override, path, value):
  raw = cli.read_config(DEMO, [f"--config.{override}"])
  assert raw == replaced(demo, path, value)
  group = config.from_dict(raw)
  for name in path.split("."):
    group = getattr(group, name)
  assert group == value and type(group) is type(value)


def test_overrides_are_those_of_the_caller_not_of_the_process(demo, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["pytest", f"--config={DEMO}", "--config.steps=7"])
  assert cli.read_config(DEMO, []) == demo
  assert cli.read_config(DEMO, ["--config.seed=3"]) == replaced(demo, "seed", 3)


def test_the_last_of_equal_overrides_counts(demo):
  path = "objective.alpha"
  for values, expected in ((("0.1", "0.2"), 0.2), (("0.1", "None"), None), (("None", "0.1"), 0.1)):
    raw = cli.read_config(DEMO, [f"--config.{path}={value}" for value in values])
    assert raw == replaced(demo, path, expected)


def test_overrides_reach_the_stages_of_the_base_recipe():
  raw = cli.read_config(BASE, ["--config.denoise.optim.ema_decay=0.5", "--config.emoji=736"])
  assert config.from_dict(raw["denoise"]).optim.ema_decay == 0.5
  assert raw["emoji"] == 736 and raw["autoencoder"]["optim"]["ema_decay"] == 0.0


def test_every_method_can_be_chosen_on_the_command_line():
  clear, hard = "--config.objective.alpha=None", "--config.objective.labels=None"
  beta = "--config.objective.beta=None"
  bare = [clear, hard, "--config.objective.sft_weight=None"]
  chosen = {
    "dpo": [clear, "--config.objective.label_smoothing=0.1"],
    "fpo": ["--config.objective.divergence=alpha", "--config.objective.order=0.5"],
    "ipo": [clear, hard, "--config.objective.loser_scaling=0.9"],
    "inpo": [
      *(*bare, "--config.objective.inversion=published"),
      "--config.objective.inversion_steps=10",
    ],
    "seppo": [
      *(*bare, "--config.objective.reference_every=30"),
      "--config.objective.reference_keep=7",
    ],
    "sft": [*bare, beta],
    "mapo": [*bare, beta, "--config.objective.beta_mapo=0.1", "--config.objective.snr_value=0.5"],
    "kto": [
      *bare,
      "--config.objective.lambda_d=1",
      "--config.objective.lambda_u=1",
      "--config.objective.utility=sigmoid",
    ],
    "denoise": [*bare, beta],
    "autoencoder": [*bare, beta, "--config.objective.kl_weight=1e-3"],
  }
  for method, overrides in chosen.items():
    raw = cli.read_config(DEMO, [f"--config.objective.method={method}", *overrides])
    assert config.from_dict(raw).objective.method == method
  assert set(chosen) | {"dmpo"} == set(config.METHODS)


@pytest.mark.parametrize(
  "override, text",
  [
    ("--config.optim.lr=1", "--config.optim.lr: unknown field 'lr' in optim; known: b1, b2, clip"),
    ("--config.sed=1", "--config.sed: unknown field 'sed'; known: accumulation, base, batch_size"),
    ("--config.sed=None", "--config.sed: unknown field 'sed'; known:"),
    ("--config.optm.b1=None", "--config.optm.b1: unknown field 'optm'; known:"),
    ("--config.steps.x=1", "--config.steps.x: unknown field 'x' in steps; it is not a group"),
    ("--config.steps", "--config.steps: expected --config.FIELD=VALUE"),
    ("--config.steps=1.5", "flag --config.steps=1.5: invalid literal for int()"),
    ("--config.seed=true", "flag --config.seed=true: invalid literal for int()"),
    ("--config.objective.beta=", "flag --config.objective.beta=: could not convert string"),
    ("--config.optim=3", "flag --config.optim=3: Failed to parse '3' as a ConfigDict"),
  ],
)
def test_bad_overrides_are_named(override, text):
  assert text in refusal(cli.read_config, DEMO, [override])


def test_none_is_refused_where_a_value_is_needed():
  for field, kind in (("steps", "int"), ("optim.eps", "float"), ("data.dataset", "str")):
    raw = cli.read_config(DEMO, [f"--config.{field}=None"])
    assert refusal(config.from_dict, raw) == f"config: {field}: expected {kind}, got None"


def test_a_missing_file_is_named():
  assert refusal(cli.read_config, "configs/none.py", []) == (
    "configuration 'configs/none.py': no such file; expected for example configs/emoji_dmpo.py"
  )


# --- names and types ---


def test_unknown_and_missing_fields_are_named(demo):
  text = refusal(config.from_dict, {**demo, "learning_rate": 1.0})
  assert text.startswith(
    "config: unknown field learning_rate; known: base, seed, steps, batch_size"
  )
  text = refusal(config.from_dict, replaced(demo, "optim.lr", 1.0))
  assert text.startswith("config: unknown field optim.lr; known: name, learning_rate, schedule")
  for path in ("keep", "sampling.steps", "objective.order", "precision"):
    raw = copy.deepcopy(demo)
    *names, leaf = path.split(".")
    group = raw
    for name in names:
      group = group[name]
    del group[leaf]
    assert refusal(config.from_dict, raw) == f"config: missing field {path}"


@pytest.mark.parametrize(
  "path, value, expected",
  [
    ("steps", 10.0, "int, got 10.0"),
    ("steps", True, "int, got True"),
    ("seed", "0", "int, got '0'"),
    ("base", 3, "str, got 3"),
    ("optim.learning_rate", "1e-4", "float, got '1e-4'"),
    ("optim.learning_rate", False, "float, got False"),
    ("optim.ema_decay", None, "float, got None"),
    ("objective.beta", "1", "float or NoneType, got '1'"),
    ("objective.divergence", 1, "str or NoneType, got 1"),
    ("data", 3, "a group of fields, got 3"),
    ("sampling", None, "a group of fields, got None"),
  ],
)
def test_wrong_types_are_named(demo, path, value, expected):
  text = refusal(config.from_dict, replaced(demo, path, value))
  assert text == f"config: {path}: expected {expected}"


def test_whole_numbers_may_stand_for_floats(demo):
  read = config.from_dict(replaced(demo, "objective.beta", 2000))
  assert read.objective.beta == 2000.0 and type(read.objective.beta) is float


# --- ranges ---

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
  "path, value, expected",
  [
    *[
      (name, 0, "> 0 and finite, got 0")
      for name in (
        "steps batch_size accumulation fsdp log_every validate_every save_every keep"
      ).split()
    ],
    ("steps", -1, "> 0 and finite, got -1"),
    ("seed", -1, ">= 0, got -1"),
    ("objective.beta", 0.0, "> 0 and finite, got 0.0"),
    ("objective.beta", NAN, "> 0 and finite, got nan"),
    ("objective.beta", INF, "> 0 and finite, got inf"),
    ("objective.method", "ppo", f"one of {', '.join(config.METHODS)}, got 'ppo'"),
    ("data.caption_dropout", 1.0, "[0, 1), got 1.0"),
    ("data.caption_dropout", -0.1, "[0, 1), got -0.1"),
    ("data.caption_dropout", NAN, "[0, 1), got nan"),
    ("data.validation_share", 1.0, "[0, 1), got 1.0"),
    ("data.validation_share", -0.1, "[0, 1), got -0.1"),
    ("data.workers", -1, "at least 0, got -1"),
    ("data.reference_draws", -1, "at least 0, got -1"),
    ("remat", "all", "one of full, blocks, layers, got 'all'"),
    ("data.timestep_power", 0.0, "> 0 and finite, got 0.0"),
    ("data.timestep_power", INF, "> 0 and finite, got inf"),
    ("optim.name", "sgd", "one of adamw, adafactor, got 'sgd'"),
    ("optim.schedule", "step", "one of constant, linear, cosine, got 'step'"),
    ("optim.learning_rate", 0.0, "> 0 and finite, got 0.0"),
    ("optim.learning_rate", NAN, "> 0 and finite, got nan"),
    ("optim.clip_norm", -1.0, "> 0 and finite, got -1.0"),
    ("optim.clip_norm", INF, "> 0 and finite, got inf"),
    ("optim.eps", 0.0, "> 0 and finite, got 0.0"),
    ("optim.weight_decay", -0.01, ">= 0 and finite, got -0.01"),
    ("optim.weight_decay", NAN, ">= 0 and finite, got nan"),
    ("optim.b1", 1.0, "[0, 1), got 1.0"),
    ("optim.b2", NAN, "[0, 1), got nan"),
    ("optim.ema_decay", 1.0, "[0, 1), got 1.0"),
    ("optim.warmup_steps", -1, ">= 0, got -1"),
    ("optim.warmup_steps", 250, "fewer than steps=250, got 250"),
    ("precision.compute", "float16", "one of float32, bfloat16, got 'float16'"),
    ("precision.reference", "int8", "one of float32, bfloat16, got 'int8'"),
    ("sampling.steps", 0, "> 0 and finite, got 0"),
    ("sampling.images_per_prompt", 0, "> 0 and finite, got 0"),
    *[
      ("sampling.guidance_scale", value, f">= 1 (1 switches guidance off) and finite, got {value}")
      for value in (0.5, NAN, INF)
    ],
  ],
)
def test_values_out_of_range_are_named(demo, path, value, expected):
  text = refusal(config.from_dict, replaced(demo, path, value))
  assert text == f"{path}: expected {expected}"


@pytest.mark.parametrize(
  "path, value",
  [
    ("seed", 0),
    ("data.caption_dropout", 0.0),
    ("data.validation_share", 0.0),
    ("optim.warmup_steps", 0),
    ("optim.warmup_steps", 249),
    ("optim.b1", 0.0),
    ("optim.weight_decay", 0.0),
    ("sampling.guidance_scale", 1.0),
  ],
)
def test_values_at_the_edge_of_the_range_are_taken(demo, path, value):
  config.from_dict(replaced(demo, path, value))


def test_settled_draws_of_a_mixture_are_refused(demo):
  raw = replaced(replaced(demo, "data.mixture", "a=1 b=1"), "data.reference_draws", 2)
  assert "data.reference_draws: is for one data set" in refusal(config.from_dict, raw)


def test_a_coarser_reference_than_the_policy_is_refused(demo):
  raw = replaced(demo, "precision.reference", "bfloat16")
  assert refusal(config.from_dict, raw) == (
    "precision.reference: bfloat16 with precision.compute=float32 would make the margins of "
    "step 0 differ from zero; expected float32, or set precision.compute=bfloat16"
  )
  config.from_dict(replaced(raw, "precision.compute", "bfloat16"))


# --- fields of the objective ---

VALUES = {
  "beta": 100.0,
  "alpha": 0.01,
  "label_smoothing": 0.1,
  "divergence": "js",
  "order": 0.5,
  "kl_weight": 1e-3,
  "labels": "soft",
  "sft_weight": 0.5,
  "loser_scaling": 0.9,
  "beta_mapo": 0.1,
  "snr_value": 0.5,
  "lambda_d": 1.0,
  "lambda_u": 2.0,
  "utility": "loss_averse",
  "inversion": "exact",
  "inversion_steps": 10,
  "reference_every": 30,
  "reference_keep": 7,
}


def test_the_table_of_methods_knows_every_field():
  names = {field.name for field in dataclasses.fields(config.ObjectiveConfig)}
  assert set(VALUES) == names - {"method"}
  assert {field for reads in config.METHODS.values() for field in reads} == set(VALUES)


@pytest.mark.parametrize("method", config.METHODS)
def test_a_method_takes_exactly_the_fields_that_it_reads(demo, method):
  needed = {name: VALUES[name] for name in config.METHODS[method]}
  read = config.from_dict(with_objective(demo, method=method, **needed))
  assert read.objective == config.ObjectiveConfig(
    method=method, **{**dict.fromkeys(VALUES), **needed}
  )
  assert read.objective.needs_reference == ("beta" in config.METHODS[method])
  assert read.objective.images_of_pair == (1 if method == "sft" else 2)
  for name in set(VALUES) - set(needed):
    raw = with_objective(demo, method=method, **needed, **{name: VALUES[name]})
    assert refusal(config.from_dict, raw) == (
      f"objective.{name}: method {method!r} does not read it; expected None, got {VALUES[name]!r}"
    )
  for name in set(needed) - set(config.OPTIONAL):
    raw = with_objective(demo, method=method, **{**needed, name: None})
    assert refusal(config.from_dict, raw) == (
      f"objective.{name}: method {method!r} needs it; expected a value, got None"
    )


def test_only_some_divergences_have_an_order(demo):
  fields = dict(beta=100.0, alpha=0.01, divergence="js", labels="hard", sft_weight=0.0)
  assert config.from_dict(with_objective(demo, method="fpo", **fields)).objective.order is None


def test_kl_weight_must_be_positive(demo):
  raw = with_objective(demo, method="autoencoder", kl_weight=-1.0)
  assert refusal(config.from_dict, raw) == "objective.kl_weight: expected > 0 and finite, got -1.0"


@pytest.mark.parametrize(
  "field, value, expected",
  [
    ("sft_weight", -0.1, ">= 0 and finite (0: off), got -0.1"),
    ("sft_weight", float("inf"), ">= 0 and finite (0: off), got inf"),
    ("loser_scaling", 1.1, "[0, 1] or None (off), got 1.1"),
    ("loser_scaling", float("nan"), "[0, 1] or None (off), got nan"),
    ("beta_mapo", 0.0, "> 0 and finite, got 0.0"),
    ("snr_value", -1.0, "> 0 and finite, got -1.0"),
    ("lambda_d", 0.0, "> 0 and finite, got 0.0"),
    ("lambda_u", float("inf"), "> 0 and finite, got inf"),
    ("utility", "fair", "one of sigmoid, loss_averse, risk_seeking, got 'fair'"),
  ],
)
def test_settings_of_methods_out_of_range_are_named(demo, field, value, expected):
  method = next(name for name, reads in config.METHODS.items() if field in reads)
  fields = {name: VALUES[name] for name in config.METHODS[method]} | {field: value}
  raw = with_objective(demo, method=method, **fields)
  assert refusal(config.from_dict, raw) == f"objective.{field}: expected {expected}"


def test_utilities_are_those_of_the_loss():
  assert config.UTILITIES == other_losses.UTILITIES


@pytest.mark.parametrize("method", ["sft", "mapo"])
def test_settled_draws_without_a_reference_are_refused(demo, method):
  fields = {name: VALUES[name] for name in config.METHODS[method]}
  raw = replaced(with_objective(demo, method=method, **fields), "data.reference_draws", 2)
  assert refusal(config.from_dict, raw) == (
    f"data.reference_draws: method {method!r} has no reference; expected 0, got 2"
  )


def test_labels_are_hard_or_soft(demo):
  fields = dict(beta=100.0, alpha=0.01, labels="certain", sft_weight=0.0)
  raw = with_objective(demo, method="dmpo", **fields)
  assert refusal(config.from_dict, raw) == (
    "objective.labels: expected one of hard, soft, got 'certain'"
  )


@pytest.mark.parametrize(
  "field, value, text",
  [
    ("inversion", "fast", "objective.inversion: expected one of exact, published, got 'fast'"),
    ("inversion_steps", 0, "objective.inversion_steps: expected > 0 and finite, got 0"),
  ],
)
def test_settings_of_the_inversion_are_checked(demo, field, value, text):
  fields = {"beta": 100.0, "inversion": "exact", "inversion_steps": 10} | {field: value}
  assert refusal(config.from_dict, with_objective(demo, method="inpo", **fields)) == text


def test_errors_of_latents_that_training_makes_cannot_be_known_beforehand(demo):
  fields = dict(beta=100.0, inversion="exact", inversion_steps=10)
  raw = replaced(with_objective(demo, method="inpo", **fields), "data.reference_draws", 4)
  assert refusal(config.from_dict, raw).startswith(
    "data.reference_draws: method 'inpo' makes latents as it trains"
  )
