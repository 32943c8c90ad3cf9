"""The command `dmpo`: demo, prepare, train, sample, evaluate, export, import, doctor, base.

Every field of a configuration can be set on the command line: `--config.optim.learning_rate=1e-5`.
"""

import argparse
import importlib.resources
import importlib.util
import os
import pathlib
import shlex
import sys
import warnings
from collections.abc import Sequence

DEFAULT_CONFIG = "configs/emoji_dmpo.py"
BASE_CONFIG = "configs/emoji_base.py"
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: schedulers can be told to restart on it


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0, 1 (training stopped, or a check that found
  something), 2 (bad input) or 75 (told to stop and saved, no other process was found, or one of
  several found a checkpoint damaged: the same command again goes on)."""
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    _refuse_secrets(argv)
  except ValueError as error:
    print(f"dmpo: error: {error}", file=sys.stderr)
    return 2
  overrides = [each for each in argv if each.startswith("--config.")]
  options = make_parser().parse_args([each for each in argv if each not in overrides])
  _set_up()
  from dmpo_jax import checkpoint, train  # heavy; only after the arguments are known to be good

  try:
    return options.handler(options, overrides, "dmpo " + shlex.join(argv)) or 0
  except (train.Preempted, ConnectionError) as error:
    print(f"dmpo {options.command}: {error}", file=sys.stderr)
    return AGAIN
  except checkpoint.PutAside as error:
    print(f"dmpo {options.command}: {error}", file=sys.stderr)
    _leave_others(AGAIN)
    return AGAIN
  except (ValueError, OSError) as error:  # OSError: a full disk, for instance
    print(f"dmpo {options.command}: error: {error}", file=sys.stderr)
    _leave_others(2)
    return 2
  except train.TrainingStopped as error:
    print(f"dmpo {options.command}: training stopped: {error}", file=sys.stderr)
    _leave_others(1)
    return 1


def _refuse_secrets(argv: Sequence[str]) -> None:
  """Before an argument is parsed: the parser repeats what it does not know."""
  from dmpo_jax import credentials

  for number, argument in enumerate(argv, 1):
    credentials.refuse_secret(argument, f"argument {number}")


def make_parser() -> argparse.ArgumentParser:
  """The parser of all commands."""
  parser = argparse.ArgumentParser(
    prog="dmpo",
    description="Align text-to-image diffusion models with human preferences, in JAX.",
    epilog="Any field of the configuration: --config.FIELD=VALUE, e.g. --config.objective.beta=500",
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def add(name, run, help, config=DEFAULT_CONFIG):
    command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    command.add_argument("--config", default=config, help=f"configuration file ({config})")
    command.set_defaults(handler=run)
    return command

  def folder(command, name, help, required=True):
    command.add_argument(name, type=pathlib.Path, required=required, help=help)

  demo = add("demo", run_demo, "prepare, train, evaluate, export and report, end to end")
  folder(demo, "--out", "folder for everything; run again to go on")

  prepare = add("prepare", run_prepare, "build the TFDS pairs and encode them to latents")
  folder(prepare, "--data", "folder for the data sets")
  prepare.add_argument(
    "--beam",
    metavar="OPTIONS",
    help="encode with Apache Beam; its options as one text, after '=': --beam='--runner=...', or "
    "--beam= for its local runner (extra: beam)",
  )

  cache = add("cache", run_cache, "compute the reference's errors once; run again to go on")
  folder(cache, "--data", "folder that `dmpo prepare` filled")

  train = add("train", run_train, "preference optimisation; run again to resume")
  folder(train, "--data", "folder that `dmpo prepare` filled")
  folder(train, "--out", "folder of the run")
  train.add_argument(
    "--distributed",
    action="store_true",
    help="one of several processes that train together (Cloud TPU, GKE, SLURM; elsewhere set"
    " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)",
  )
  train.add_argument(
    "--profile",
    metavar="FIRST:LAST",
    help="write a trace of these steps (or of one: --profile 10) for TensorBoard's profile plugin;"
    " the first step of a call compiles",
  )

  sample = add("sample", run_sample, "images from a base folder, an export or a run")
  sample.add_argument("--model", help="folder in diffusers' layout (default: the config's base)")
  folder(sample, "--run", "folder of a training run, in place of --model", required=False)
  folder(sample, "--lora", "LoRA file (.safetensors) to add to the model", required=False)
  sample.add_argument("--prompt", action="append", default=[], help="may be repeated")
  folder(sample, "--prompts", "file with one prompt a line", required=False)
  sample.add_argument("--negative-prompt", help="for guidance (default: what the model has for it)")
  folder(sample, "--image", "picture to edit, for a model that edits", required=False)
  sample.add_argument("--seed", type=int, default=0)
  folder(sample, "--out", "folder for grid.png and the single images")

  evaluate = add("evaluate", run_evaluate, "compare models: which is better, and by how much")
  evaluate.add_argument(
    "models",
    nargs="*",
    metavar="[NAME=]MODEL",
    help="two or more: run folders, diffusers folders, hub ids, emoji; the first is the baseline",
  )
  folder(evaluate, "--run", "in place of models: a run, against its own reference", required=False)
  folder(evaluate, "--out", "folder for what is found; run again to go on")
  evaluate.add_argument("--split", choices=("validation", "test"), default="test", help="of emoji")
  evaluate.add_argument(
    "--prompts",
    action="append",
    default=[],
    metavar="FILE",
    help="a set of prompts (.txt, .json, .jsonl, .tsv), or the word emoji; may be repeated",
  )
  evaluate.add_argument(
    "--scorer", action="append", default=[], metavar="NAME=PATH", help="may be repeated"
  )
  evaluate.add_argument("--seed", type=int, help="of the noise (default: 1)")
  evaluate.add_argument(
    "--vote-pairs", type=int, help="pairs of images on the page for people (default: 60; 0: none)"
  )
  evaluate.add_argument(
    "--votes",
    action="append",
    type=pathlib.Path,
    default=[],
    metavar="FILE",
    help="in place of models: votes that came back, to join with the comparison in --out",
  )

  export = add("export", run_export, "write a trained run as a diffusers folder, file or LoRA")
  folder(export, "--run", "folder of the training run")
  folder(export, "--out", "the folder, or the .safetensors file, to write")
  export.add_argument(
    "--layout",
    choices=("folder", "single-file", "lora", "lora-kohya"),
    default="folder",
    help="diffusers folder; one file in the original layout; the low-rank delta alone",
  )
  export.add_argument(
    "--check", action="store_true", help="load it in diffusers and compare (extra: diffusers)"
  )
  folder(export, "--evaluation", "evaluation.json, for the model card", required=False)
  export.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
  export.add_argument("--replace", action="store_true", help="write an earlier export anew")

  importer = add("import", run_import, "make a diffusers folder of a single-file checkpoint")
  folder(importer, "--file", "the .safetensors file")
  folder(importer, "--tokenizer", "folder with vocab.json and merges.txt of CLIP")
  importer.add_argument(
    "--prediction-type",
    choices=("epsilon", "v_prediction"),
    help="of Stable Diffusion 2.x, whose file does not say: epsilon for 2.x-base, else v",
  )
  folder(importer, "--out", "the folder to write")

  help = "look for what would spoil training, or has spoilt it"
  doctor = commands.add_parser("doctor", help=help, description=help, allow_abbrev=False)
  doctor.set_defaults(handler=run_doctor)
  subjects = doctor.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

  help = "pairs as they lie on disk, before training is paid for"
  pairs = subjects.add_parser("data", help=help, description=help, allow_abbrev=False)
  pairs.add_argument("--config", default=DEFAULT_CONFIG, help="configuration file")
  pairs.add_argument("dataset", help="e.g. pairs, pickapic_v2, hpdv2, hpdv3, imagereward_db")
  pairs.add_argument("--path", help="folder of the data set, or gs://bucket/folder (Pick-a-Pic)")
  pairs.add_argument("--limit", type=int, help="rows of each split to look at (default: all)")
  folder(pairs, "--out", "folder for doctor.html and doctor.json")

  help = "the folder of a run, running or not; nothing is computed or written there"
  run = subjects.add_parser("run", help=help, description=help, allow_abbrev=False)
  run.add_argument("folder", type=pathlib.Path, help="--out of `dmpo train`")
  run.add_argument(
    "--verify", action="store_true", help="read all checkpoints and compare their checksums"
  )
  folder(run, "--out", "JSON file for the findings", required=False)

  plan = add("plan", run_plan, "what a TPU slice would make of the step: compiled here, not run")
  plan.add_argument("--topology", required=True, help="e.g. v5e:16x16, v4:2x2x2, 7x:2x2x1")
  plan.add_argument("--slices", type=int, default=1, help="of that shape (default: 1)")
  plan.add_argument(
    "--effort",
    choices=("quick", "full"),
    default="quick",
    help="of the compiler: minutes, or the half hour and more that the real run would take here",
  )
  plan.add_argument("--search", action="store_true", help="try pairs a chip, remat and mesh")
  plan.add_argument("--calibrate", action="store_true", help="how true the compiler's counters are")
  folder(plan, "--out", "JSON file for the figures", required=False)

  base = add("base", run_base, "train the shipped base from scratch (hours)", BASE_CONFIG)
  folder(base, "--out", "folder for the recipe's runs and the base")
  return parser


def find_config(name: str) -> pathlib.Path:
  """A configuration file: a path, or one of those that come with the package.

  Raises:
    ValueError: there is none.
  """
  package = pathlib.Path(str(importlib.resources.files("dmpo_jax")))
  places = [
    pathlib.Path(name),
    package.parent / name,  # a checkout
    package / "configs" / pathlib.Path(name).name,  # an installed wheel
  ]
  for place in places:
    if place.is_file():
      return place
  raise ValueError(f"configuration {name!r}: no such file; expected for example {DEFAULT_CONFIG}")


def read_config(name: str, overrides: Sequence[str]) -> dict:
  """The ConfigDict of a file with `--config.x=y` applied, as nested dicts; y may be None.

  Raises:
    ValueError: no such file, unknown field, or a value of the wrong type.
  """
  path = find_config(name)
  raw, last = _parse_config(path, []), {}
  for each in overrides:
    field, equals, value = each.removeprefix("--config.").partition("=")
    if not equals:
      raise ValueError(f"{each}: expected --config.FIELD=VALUE")
    _find_group(raw, field)
    last[field] = value
  # Flags of numbers cannot be None, but a change of method must be able to clear a field.
  cleared = [field for field, value in last.items() if value == "None"]
  raw = _parse_config(path, [f"--config.{f}={v}" for f, v in last.items() if f not in cleared])
  for field in cleared:
    _find_group(raw, field)[field.split(".")[-1]] = None
  return raw


def _parse_config(path: pathlib.Path, overrides: Sequence[str]) -> dict:
  from absl import flags
  from ml_collections import config_flags

  spec = importlib.util.spec_from_file_location("dmpo_jax_run_config", path)
  module = importlib.util.module_from_spec(spec)
  before = list(sys.path)
  sys.path.append(str(path.parent))  # a configuration may build on one that lies beside it
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path[:] = before
  arguments, values = ["dmpo", *overrides], flags.FlagValues()
  try:
    # Fields become flags as they are found in sys_argv; by default that is this process's own.
    config_flags.DEFINE_config_dict(
      "config", module.get_config(), flag_values=values, sys_argv=arguments
    )
    values(arguments)
  except (AttributeError, KeyError, TypeError, flags.Error) as error:
    raise ValueError(f"configuration {path}: {error}") from error
  return values["config"].value.to_dict()


def _find_group(raw: dict, field: str) -> dict:
  """The dict that holds a field, given by its path with dots."""
  group, names = raw, field.split(".")
  for i, name in enumerate(names):
    if not isinstance(group, dict) or name not in group:
      known = f"known: {', '.join(group)}" if isinstance(group, dict) else "it is not a group"
      within = f" in {'.'.join(names[:i])}" if i else ""
      raise ValueError(f"--config.{field}: unknown field {name!r}{within}; {known}")
    parent, group = group, group[name]
  return parent


def _load(options, overrides):
  from dmpo_jax import base as base_lib
  from dmpo_jax import config as config_lib
  from dmpo_jax import stages

  config = config_lib.from_dict(read_config(options.config, overrides))
  stages.check_settings(config)
  return config, base_lib.load_base(
    config.base, compute=config.precision.compute, remat=config.remat, lazy=True
  )


def run_demo(options, overrides, command) -> None:
  """`dmpo demo`."""
  from dmpo_jax import config as config_lib
  from dmpo_jax import report, stages

  config = config_lib.from_dict(read_config(options.config, overrides))
  summary = stages.demo(config, options.out, command)
  print(f"\n{report.result_table(summary)}\nreport: {options.out / 'report.html'}")


def run_prepare(options, overrides, command) -> None:
  """`dmpo prepare`."""
  del command
  from dmpo_jax import base as base_lib
  from dmpo_jax import config as config_lib
  from dmpo_jax import stages

  config = config_lib.from_dict(read_config(options.config, overrides))
  stages.check_settings(config)
  base = base_lib.load_base(config.base, parts=("vae",))  # the text encoders are read if need be
  encoded = stages.prepare(config, base, options.data, options.beam)
  desirable = encoded.metadata.get("desirable")
  of_them = "" if desirable is None else f", of them desirable {desirable}"
  what = "pairs" if desirable is None else "judged images"
  print(f"{what}: {encoded.metadata['counts']}{of_them}, in {options.data}")


def run_cache(options, overrides, command) -> None:
  """`dmpo cache`."""
  del command
  from dmpo_jax import stages

  config, base = _load(options, overrides)
  print(f"errors of the reference: {stages.cache_reference(config, base, options.data)}")


def run_train(options, overrides, command) -> None:
  """`dmpo train`."""
  del command
  from dmpo_jax import config as config_lib
  from dmpo_jax import profiling

  steps = None
  if options.profile is not None:
    total = config_lib.from_dict(read_config(options.config, overrides)).steps
    steps = profiling.read_steps(options.profile, total)
  if options.distributed:
    _join_processes()
  from dmpo_jax import stages

  config, base = _load(options, overrides)
  encoded = stages.open_data(config, base, options.data)
  stages.train_policy(config, base, encoded, options.out, steps)


def run_sample(options, overrides, command) -> None:
  """`dmpo sample`."""
  del command
  from dmpo_jax import stages

  prompts = list(options.prompt)
  if options.prompts is not None:
    if not options.prompts.is_file():
      raise ValueError(f"--prompts: {options.prompts} is not a file")
    lines = options.prompts.read_text(encoding="utf-8").splitlines()
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise ValueError("no prompts; give --prompt TEXT or --prompts FILE")
  raw = read_config(options.config, overrides)
  path = stages.sample_images(
    raw,
    model=options.model,
    run=options.run,
    prompts=prompts,
    lora_file=options.lora,
    negative_prompt=options.negative_prompt,
    image=options.image,
    seed=options.seed,
    out=options.out,
  )
  print(f"images: {path}")


def run_evaluate(options, overrides, command) -> None:
  """`dmpo evaluate`."""
  del command
  if sum(map(bool, (options.models, options.run, options.votes))) != 1:
    raise ValueError(
      "evaluate: expected two or more models, or --run, or --votes: one of the three"
    )
  for name in ("prompts", "scorer", "seed", "vote_pairs"):
    if not options.models and getattr(options, name) not in (None, []):
      other = "--run" if options.run else "--votes"
      raise ValueError(f"--{name.replace('_', '-')}: is for models to compare, not for {other}")
  if options.models or options.votes:
    _compare_models(options, overrides)
    return
  from dmpo_jax import stages

  config, base = _load(options, overrides)
  result = stages.evaluate_policy(config, base, options.run, options.out, split=options.split)
  print(stages.show_evaluation(result))


def _compare_models(options, overrides) -> None:
  from dmpo_jax import compare, compare_images, compare_scores
  from dmpo_jax import config as config_lib

  if options.votes:
    if overrides:
      raise ValueError(f"--votes takes what is in --out; {overrides[0]} has no effect")
    print(compare.show(compare.add_votes(options.out, options.votes), options.out))
    return
  scorers, load_scorer = compare_scores.read_scorers(options.scorer), None
  if scorers:
    from dmpo_jax.scorers import registry

    for source in scorers:  # before anything is drawn
      registry.check_scorer(*source)
    load_scorer = registry.load_scorer
  config = config_lib.from_dict(read_config(options.config, overrides))
  result = compare.compare(
    config,
    compare_images.read_models(options.models),
    compare.read_prompts(options.prompts, config, options.split),
    options.out,
    seed=compare.SEED if options.seed is None else options.seed,
    scorers=scorers,
    load_scorer=load_scorer,
    ballots=compare.BALLOTS if options.vote_pairs is None else options.vote_pairs,
  )
  print(compare.show(result, options.out))


def run_export(options, overrides, command) -> None:
  """`dmpo export`."""
  del command
  from dmpo_jax import check_export, stages

  if overrides:
    raise ValueError(f"export takes the configuration of --run; {overrides[0]} has no effect")
  if options.check:
    check_export.check_installed()
  path = stages.export_run(
    options.run,
    options.out,
    layout=options.layout,
    evaluation=options.evaluation,
    dtype=options.dtype,
    replace=options.replace,
  )
  print(f"model: {path}")
  if options.check:
    print(check_export.check_run(options.run, path, options.layout))


def run_import(options, overrides, command) -> None:
  """`dmpo import`."""
  del command
  from dmpo_jax import import_file

  if overrides:
    raise ValueError(f"import reads no configuration; {overrides[0]} has no effect")
  folder = import_file.import_checkpoint(
    options.file, options.out, tokenizer=options.tokenizer, prediction_type=options.prediction_type
  )
  print(f"model: {folder}")


def run_doctor(options, overrides, command) -> int:
  """`dmpo doctor`: 1 if something would spoil training, or has."""
  del command
  if options.subject == "run":
    if overrides:
      raise ValueError(f"doctor run reads the run's configuration; {overrides[0]} has no effect")
    os.environ["JAX_PLATFORMS"] = "cpu"  # the run may have the accelerator to itself
    from dmpo_jax import doctor

    return 0 if doctor.check_run(options.folder, options.out, verify=options.verify) else 1
  from dmpo_jax import base as base_lib
  from dmpo_jax import config as config_lib
  from dmpo_jax import doctor

  config = config_lib.from_dict(read_config(options.config, overrides))
  base = base_lib.load_base(config.base, parts=())
  ok = doctor.check_data(options.dataset, options.path, base, options.out, limit=options.limit)
  return 0 if ok else 1


def run_plan(options, overrides, command) -> None:
  """`dmpo plan`."""
  del command
  os.environ["JAX_PLATFORMS"] = "cpu"  # a TPU that is here is not asked
  from dmpo_jax import config as config_lib
  from dmpo_jax import plan, stages

  topology = plan.read_topology(options.topology, options.slices)
  if options.calibrate:
    rows = plan.calibrate(topology)
    print(plan.show_calibration(topology, rows))
    if options.out is not None:
      stages.write_json(options.out, {"topology": str(topology), "calibration": rows})
    return
  config = config_lib.from_dict(read_config(options.config, overrides))
  cache = cache_folder() / "plans"
  if options.search:
    plans = plan.search(config, topology, effort=options.effort, cache=cache)
    print(f"\n{plan.show_ranking(plans)}\n")
  else:
    plans = [plan.make_plan(config, topology, effort=options.effort, cache=cache)]
  print(plan.show(plans[0]))
  if options.out is not None:
    stages.write_json(options.out, {"plans": [each.to_dict() for each in plans]})
    print(f"figures: {options.out}")


def run_base(options, overrides, command) -> None:
  """`dmpo base`."""
  del command
  from dmpo_jax import emoji_base

  print(f"base: {emoji_base.make_base(read_config(options.config, overrides), options.out)}")


def _join_processes() -> None:
  """Waits for the other processes of a run.

  Raises:
    ValueError: where they are is neither set nor found.
    ConnectionError: they did not answer in five minutes.
  """
  import jax

  settings = {}
  for name, variable in (
    ("num_processes", "JAX_NUM_PROCESSES"),
    ("process_id", "JAX_PROCESS_ID"),
  ):
    if variable in os.environ:
      if not os.environ[variable].isdecimal():
        raise ValueError(f"{variable}: expected a whole number, got {os.environ[variable]!r}")
      settings[name] = int(os.environ[variable])
  address = os.environ.get("JAX_COORDINATOR_ADDRESS", "found by jax")
  try:
    jax.distributed.initialize(**settings)
  except ValueError as error:
    raise ValueError(
      f"--distributed: no cluster was found ({error}); set JAX_COORDINATOR_ADDRESS=host:port,"
      " JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from error
  except RuntimeError as error:
    raise ConnectionError(
      f"--distributed: process {settings.get('process_id', '')} could not join (coordinator"
      f" {address}): {error}; check that process 0 runs, that its port is open to this host and"
      " that all processes were started with the same number of processes"
    ) from error


def _leave_others(status: int) -> None:
  """Ends a process that failed among several at once; an orderly end would wait for the others."""
  import jax

  if jax.distributed.is_initialized() and jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def cache_folder() -> pathlib.Path:
  """Where compiled programs and figures are kept between runs."""
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
  return cache / "dmpo_jax"


def _set_up() -> None:
  """Process-wide settings of the command, before jax is used."""
  # Compiled programs are kept between runs, as long as the user has not chosen a place himself.
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  warnings.formatwarning = lambda message, *_: f"warning: {message}\n"


if __name__ == "__main__":
  sys.exit(main())
