"""Imports only go down; the pure floors import nothing that does I/O; no cycles; data stay data."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "dmpo_jax"
LEVELS = {
  0: ["__init__", "config", "types", "credentials"],
  1: ["models", "divergences", "losses", "other_losses", "safeguards", "diffusion", "lora"],
  2: ["data", "scorers", "weights", "sharding", "optimizer"]
  + ["safetensors_io", "single_file", "single_file_configs", "lora_files", "hub"]
  + ["json_files", "paths", "prompt_sets"],
  3: [
    "train_step",
    "objectives",
    "other_objectives",
    "sample",
    "base",
    "checkpoint",
    "logs",
    "report",
    "figures",
  ]
  + ["program", "hlo", "alarms", "watch", "report_page", "report_table", "report_style"]
  + ["doctor_picture", "doctor_data", "doctor_page", "reading", "inversion"]
  + ["comparison_page", "vote_page"],
  4: ["tasks", "train", "evaluate", "export", "stages", "emoji_base", "import_file"]
  + ["compare", "compare_images", "compare_scores", "comparison", "votes"]
  + ["check_export", "doctor", "doctor_run", "plan", "reference_cache", "profiling", "rounds"],
  5: ["cli"],
}
LEVEL_OF = {room: level for level, rooms in LEVELS.items() for room in rooms}
PURE = [*LEVELS[0], *LEVELS[1], "train_step", "objectives", "sample", "sharding", "optimizer"]
PURE += ["other_objectives", "inversion"]
IMPURE = {"tensorflow", "tensorflow_datasets", "torch", "orbax", "absl", "ml_collections"}
# `dmpo export --check`, the one place that asks the judge; behind the extra "diffusers".
JUDGES = {"check_export": {"torch", "diffusers"}}
NOWHERE = {"tensorflow", "torch", "transformers", "diffusers", "pickle", "chex"}


def modules():
  for path in sorted(PACKAGE.rglob("*.py")):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    yield name.removesuffix("/__init__"), path


def imports(path):
  """Full names of all imports, also those inside functions."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name):
  return name.split("/")[0]


def internal(name):
  """`dmpo_jax.data.images.x` -> data; None for other packages."""
  parts = name.split(".")
  if parts[0] != "dmpo_jax":
    return None
  return parts[1] if len(parts) > 1 and parts[1] in LEVEL_OF else "__init__"


@pytest.mark.parametrize("name, path", list(modules()))
def test_imports_go_down(name, path):
  assert room(name) in LEVEL_OF, f"{name}: say on which floor it lives"
  for imported in imports(path):
    target = internal(imported)
    if target is not None:
      assert LEVEL_OF[target] <= LEVEL_OF[room(name)], f"{name} imports {imported}, a floor above"


@pytest.mark.parametrize("name, path", list(modules()))
def test_purity(name, path):
  forbidden = NOWHERE | (IMPURE if room(name) in PURE else set())
  for imported in imports(path):
    allowed = JUDGES.get(name, set())
    assert imported.split(".")[0] not in forbidden - allowed, f"{name} imports {imported}"


def test_no_cycles():
  graph = {}
  for name, path in modules():
    targets = {internal(imported) for imported in imports(path)} - {None, room(name)}
    graph.setdefault(room(name), set()).update(targets)
  done, active = set(), []

  def visit(node):
    assert node not in active, f"import cycle: {' -> '.join([*active, node])}"
    if node in done:
      return
    active.append(node)
    for target in sorted(graph.get(node, ())):
      visit(target)
    done.add(active.pop())

  for node in sorted(graph):
    visit(node)


# What turns data into code. A configuration file is Python by design, and is the user's own: the
# command line runs it by importlib, which is not listed here.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
UNSAFE_CALLS |= {"yaml.load", "yaml.unsafe_load", "tarfile.extractall", "tempfile.mktemp"}
UNSAFE_SETTINGS = {"allow_pickle", "trust_remote_code", "shell"}


def unsafe(text):
  """(line, what) of everything in a program that can turn data into code."""
  for node in ast.walk(ast.parse(text)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or ""]
      names += [f"{node.module}.{alias.name}" for alias in node.names]
    yield from (
      (node.lineno, name)
      for name in names
      if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS
    )
    if isinstance(node, ast.Call):
      if ast.unparse(node.func) in UNSAFE_CALLS:
        yield node.lineno, ast.unparse(node.func)
      for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in UNSAFE_SETTINGS and not off:
          yield node.lineno, keyword.arg


@pytest.mark.parametrize("folder", ["dmpo_jax", "configs", "benchmarks", "launch"])
def test_nothing_turns_data_into_code(folder):
  for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
    found = list(unsafe(path.read_text(encoding="utf-8")))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
  "text",
  [
    "import pickle",
    "import joblib.numpy_pickle as j",
    "from cloudpickle import loads",
    "from os import system",
    "def f():\n  import shelve",
    "np.load(file, allow_pickle=True)",
    "np.load(file, allow_pickle=flag)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "torch.load(file)",
    "eval(text)",
    "exec(text)",
    "os.system(command)",
    "subprocess.run(command, shell=True)",
  ],
)
def test_what_turns_data_into_code_is_seen(text):
  assert list(unsafe(text))
  assert not list(unsafe("np.load(file, allow_pickle=False)\nmodel.eval()\nre.compile('a')"))
