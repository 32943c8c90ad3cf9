"""The launchers against stubs of gcloud, kubectl, xpk, sbatch, srun and scontrol: what they run and
refuse, what they make of exit statuses, and that a dry run says the same."""

import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
# Everything else that a launcher calls; nothing of this machine's own gcloud or SLURM.
UTILITIES = """basename bash cat cksum cp cut date dirname env grep gzip head hostname install ls
mkdir mktemp mountpoint mv rm sed setsid sh sleep sort tail tar tee touch tr uname wc""".split()
NASTY = [
  '--config.base=/models/it\'s "my" base; $HOME `id` $(id) \\ * ~ & | < > #é',
  "--config.objective.beta=500",
  "--config.lora.targets=to_q to_k",
  "--config.data.path=",
]
TOKENS = {"HF_TOKEN": "hf-token-value-123", "WANDB_API_KEY": "wandb-key-value-456"}
NOT_FOUND = {"match": "describe", "err": "ERROR: NOT_FOUND: no such resource", "status": 1}
ACTIVE = {"match": "describe", "out": "ACTIVE"}

# Records its arguments; answers with the first answer left that matches, or at least succeeds. In
# bash, whose builtins are all it needs: it is called hundreds of times.
STUB = """#!/bin/bash
world={world}
words="${{0##*/}} $*"
printf '%s\\0' "${{0##*/}}" "$@" $'\\x1e' >>"$world/calls"
for answer in "$world"/answers/*/; do
  [ -d "$answer" ] || continue
  match=$(<"$answer/match") times=$(<"$answer/times")
  [[ $words == *"$match"* && $times != 0 ]] || continue
  echo $((times - 1)) >"$answer/times"
  printf '%s\\n' "$(<"$answer/out")"
  printf '%s\\n' "$(<"$answer/err")" >&2
  exit "$(<"$answer/status")"
done
"""
# Ends with the statuses of the file, one a call; the last one stays.
DMPO = """#!/bin/sh
echo "$@" >>{world}/trained
status=$(head -n 1 {world}/statuses 2>/dev/null || echo 0)
[ "$(wc -l <{world}/statuses 2>/dev/null || echo 1)" -le 1 ] || sed -i 1d {world}/statuses
exit "${{status:-0}}"
"""


@functools.cache
def checksum(text: str) -> str:
  return subprocess.run(["cksum"], input=text, capture_output=True, text=True).stdout.strip()


class World:
  """A checkout, a machine with stubs, and what was called."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.checkout, self.bin = folder, folder / "my checkout", folder / "bin"
    shutil.copytree(ROOT / "launch", self.checkout / "launch")
    (self.checkout / "configs").mkdir()
    for name in ("a.py", "emoji_dmpo.py"):
      (self.checkout / "configs" / name).touch()
    (self.checkout / "dmpo_jax").mkdir()
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.py"):
      (self.checkout / name).write_text(name)
    (folder / "data").mkdir()
    self.bin.mkdir()
    for name in UTILITIES:
      (self.bin / name).symlink_to(shutil.which(name))
    for name in ("gcloud", "kubectl", "xpk", "sbatch", "srun", "scontrol"):
      self.stub(name, STUB)
    # As make_venv leaves it, for every extra.
    self.stub("dmpo", DMPO, self.checkout / ".venv" / "bin")
    stamp = "".join(f"{extra} {checksum('setup.py')}\n" for extra in ("", "[cuda]", "[tpu]"))
    (self.checkout / ".venv" / ".dmpo_installed").write_text(stamp)

  def stub(self, name, text, folder=None):
    path = (folder or self.bin) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable, world=shlex.quote(str(self.folder))))
    path.chmod(0o755)
    return path

  def answer(self, *answers):
    """What the stubs say: match, out, err, status, times (1; below 0: for ever)."""
    shutil.rmtree(self.folder / "answers", ignore_errors=True)
    usual = {"out": "", "err": "", "status": 0, "times": 1}
    for number, each in enumerate(answers):
      folder = self.folder / "answers" / f"{number:02}"
      folder.mkdir(parents=True)
      for name, value in {**usual, **each}.items():
        (folder / name).write_text(str(value))

  def statuses(self, *statuses):
    (self.folder / "statuses").write_text("".join(f"{each}\n" for each in statuses))

  def environment(self, extra=None):
    own = {"PATH": str(self.bin), "HOME": str(self.folder), "LC_ALL": "C.UTF-8"}
    return {**own, **TOKENS, **(extra or {})}

  def bash(self, script, cwd=None, env=None):
    return subprocess.run(
      ["bash", "-c", script],
      cwd=cwd or self.folder,
      env=self.environment(env),
      capture_output=True,
      text=True,
      timeout=60,
    )

  def launch(self, script, *arguments, env=None):
    return self.bash(
      f"bash {shlex.join([f'{self.checkout}/launch/{script}', *arguments])}", env=env
    )

  def calls(self):
    """What was called since the last time, in order."""
    path = self.folder / "calls"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return [call.split("\0")[:-1] for call in text.split("\x1e\0")[:-1]]

  def trained(self):
    path = self.folder / "trained"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def world(tmp_path):
  return World(tmp_path)


TPU = (
  "--name demo --project my-project --zone us-west4-a --accelerator v5litepod-16 "
  "--data gs://bucket/data --out gs://bucket/runs/a --poll 0"
).split()
GKE = (
  "--name demo --image pkg.dev/p/dmpo:1 --accelerator v5litepod-16 --data gs://bucket/data "
  "--out gs://bucket/runs/a"
).split()
XPK = (
  "--name demo --image pkg.dev/p/dmpo:1 --accelerator v6e-16 --data /gcs/data --out /gcs/runs/a "
  "--xpk cluster --project my-project --zone us-west4"
).split()
LOCAL = ["--data", "data", "--out", "runs/my run"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
CASES = {
  "tpu_vm": ("tpu_vm.sh", TPU, {}),
  "tpu_vm, all options": (
    "tpu_vm.sh",
    [*TPU, *"--slices 2 --spot --copy-data --keep --runtime v9 --service-account a@b.c".split()]
    + "--secret-env HF_TOKEN=hf --network n --subnetwork s --iap --config configs/a.py".split()
    + ["--setup", "sudo mount 10.0.0.2:/share '/mnt/my share'"],
    {},
  ),
  "gke": ("gke.sh", GKE, {}),
  "gke, all options": (
    "gke.sh",
    [*GKE, *"--slices 2 --spot --replace --context c --namespace n --service-account s".split()]
    + "--secret hf --max-restarts 3 --config configs/a.py".split(),
    {},
  ),
  "xpk": ("gke.sh", XPK, {}),
  "slurm": ("slurm.sbatch", LOCAL, {}),
  "slurm, all options": (
    "slurm.sbatch",
    [*LOCAL, *"--nodes 2 --gpus-per-node 4 --time 4:00:00 --partition p --account a".split()]
    + ["--name", "n", "--sbatch=--constraint=a b", "--sbatch=--mem=0", "--config", "configs/a.py"],
    {},
  ),
  "slurm, in the job": ("slurm.sbatch", LOCAL, JOB),
  "local": ("local.sh", LOCAL, {}),
}
FINISHED_TPU = [
  NOT_FOUND,
  ACTIVE,
  {"match": "_host.sh status", "out": "dmpo-status h exited 0", "times": -1},
]


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_runs_nothing_and_prints_what_the_run_runs(world, case):
  script, arguments, env = CASES[case]
  if "in the job" in case:
    env = {**env, "SLURM_SUBMIT_DIR": str(world.checkout)}
  arguments = [*arguments, *NASTY]
  before = sorted(world.folder.rglob("*"))

  dry = world.launch(script, "--dry-run", *arguments, env=env)
  assert dry.returncode == 0, dry.stderr
  assert dry.stderr == "" and sorted(world.folder.rglob("*")) == before

  answers = [*FINISHED_TPU, {"match": "api-resources", "out": "jobsets.jobset.x-k8s.io"}]
  world.answer(*answers)
  result = world.launch(script, *arguments, env=env)
  ran, trained = world.calls(), world.trained()
  assert ran or trained, result.stderr

  # Pasted into a shell, the dry run does the same.
  world.answer(*answers)
  (world.folder / "trained").unlink(missing_ok=True)
  pasted = world.bash(dry.stdout, env=env)
  assert world.calls() == ran and world.trained() == trained, pasted.stderr
  lines = [line for line in dry.stdout.splitlines() if line and not line.startswith("#")]
  if script != "gke.sh":
    assert len(shlex.split(lines[-1])) > 3  # one command a line


@pytest.mark.parametrize("case", CASES)
def test_no_token_is_shown_or_handed_over(world, case):
  script, arguments, env = CASES[case]
  if "in the job" in case:
    env = {**env, "SLURM_SUBMIT_DIR": str(world.checkout)}
  world.answer(*FINISHED_TPU, {"match": "api-resources", "out": "jobsets"})
  result = world.launch(script, *arguments, env=env)
  shown = result.stdout + result.stderr + json.dumps(world.calls()) + "".join(world.trained())
  for path in (world.checkout / "build").rglob("*.yaml"):
    shown += path.read_text()
  for value in TOKENS.values():
    assert value not in shown

  # Nor is it taken as an argument, and the refusal does not repeat it.
  (world.folder / "trained").unlink(missing_ok=True)
  for secret in (TOKENS["HF_TOKEN"], "hf_" + "a1" * 17, "s3://key:secret@bucket/a"):
    result = world.launch(script, *arguments, f"--config.base={secret}", env=env)
    assert result.returncode == 2 and "to hand secrets over" in result.stderr
    assert secret not in result.stdout + result.stderr
  assert world.calls() == [] and world.trained() == []


def test_no_launcher_prints_its_commands_or_its_environment():
  for path in sorted((ROOT / "launch").iterdir()):
    for number, line in enumerate(path.read_text().splitlines(), 1):
      code = re.sub(r"(^|\s)#.*", "", line).strip()
      shown = re.search(r"set -\w*x|xtrace|printenv|^(env|export -p|declare -x)$", code)
      assert not shown, f"{path.name}, line {number}: {line}"


@pytest.mark.parametrize(
  "script, arguments, message",
  [
    ("tpu_vm.sh", ["--accelerator", "v5e-16"], "unknown type 'v5e-16'; expected v4-N, v5litepod-N"),
    ("tpu_vm.sh", ["--accelerator", "v5litepod-12"], "N of 1 4 8 16 32 64 128 256"),
    ("tpu_vm.sh", ["--accelerator", "v5p-12"], "N a multiple of 8"),
    ("tpu_vm.sh", ["--accelerator", "tpu7x-8"], "GKE only; see launch/gke.sh"),
    ("tpu_vm.sh", ["--project="], "--project: expected a value"),
    ("tpu_vm.sh", ["--project", "My Project"], "is no project id"),
    ("tpu_vm.sh", ["--zone", "us-west4"], "is no zone, as us-west4-a is"),
    ("tpu_vm.sh", ["--name", "Demo_1"], "at most 50 of a-z, 0-9 and -"),
    ("tpu_vm.sh", ["--out", "runs/a"], "expected gs://BUCKET/FOLDER or an absolute path"),
    ("tpu_vm.sh", ["--out", "gs://bucket"], "expected gs://BUCKET/FOLDER, got gs://bucket"),
    ("tpu_vm.sh", ["--out", "gs://bucket/../other"], "'..' in gs://bucket/../other"),
    ("tpu_vm.sh", ["--data", "/data", "--copy-data"], "--copy-data: expected --data gs://"),
    ("tpu_vm.sh", ["--config", "elsewhere.py"], "is not a file in"),
    ("tpu_vm.sh", ["--slices", "0"], "--slices: expected a number of at least 1, got '0'"),
    ("tpu_vm.sh", ["--max-restarts", "many"], "--max-restarts: expected a number"),
    ("tpu_vm.sh", ["--spot", "--reserved"], "give one of them"),
    ("tpu_vm.sh", ["--spot=yes"], "--spot takes no value"),
    ("tpu_vm.sh", ["--secret-env", "HF_TOKEN=a b"], "expected VARIABLE=NAME"),
    ("tpu_vm.sh", ["--acelerator", "v4-8"], "unknown option --acelerator; known: --name"),
    ("tpu_vm.sh", ["again"], "again: expected an option"),
    ("tpu_vm.sh", ["--config.steps"], "expected --config.FIELD=VALUE"),
    ("tpu_vm.sh", ["--config.base=a\nb"], "line break"),
    ("tpu_vm.sh", ["--name"], "--name: expected a value"),
    ("gke.sh", ["--accelerator", "v5litepod-12"], "N of 1 4 8 16"),
    ("gke.sh", ["--accelerator", "h100"], "unknown type 'h100'"),
    ("gke.sh", ["--accelerator", "v5litepod-4", "--slices", "2"], "several hosts only"),
    ("gke.sh", ["--image", "Not An Image"], "is no image"),
    ("gke.sh", ["--secret", "HF TOKEN"], "the name of a Kubernetes secret"),
    ("gke.sh", ["--project", "p"], "go with --xpk"),
    ("gke.sh", ["--xpk", "c", "--project", "p", "--zone", "z"], "xpk storage attach"),
    ("slurm.sbatch", ["--data", "gs://bucket/data"], "expected folders that all nodes see"),
    ("slurm.sbatch", ["--data", "nowhere"], "nowhere is not a folder; run `dmpo prepare`"),
    ("slurm.sbatch", ["--nodes", "-1"], "--nodes: expected a number of at least 1"),
    ("local.sh", ["--data", "nowhere"], "nowhere is not a folder; run `dmpo prepare`"),
    ("local.sh", ["--max-restarts", "1.5"], "--max-restarts: expected a number"),
  ],
)
def test_bad_arguments_are_refused_before_anything_runs(world, script, arguments, message):
  good = {"tpu_vm.sh": TPU, "gke.sh": GKE}.get(script, LOCAL)
  result = world.launch(script, *good, *arguments)
  assert result.returncode == 2 and message in result.stderr
  assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
  assert world.calls() == [] and world.trained() == []
  assert not (world.checkout / "build").exists()


@pytest.mark.parametrize("case", ["tpu_vm", "gke", "xpk", "slurm", "local"])
def test_what_is_missing_is_named(world, case):
  script, arguments, _ = CASES[case]
  for i in range(0, len(arguments), 2):
    option = arguments[i]
    if option in ("--poll", "--xpk") or (case == "xpk" and option == "--image"):
      continue
    result = world.launch(script, *arguments[:i], *arguments[i + 2 :])
    assert result.returncode == 2 and f"{option} is missing: " in result.stderr
  assert world.calls() == [] and world.trained() == []


@pytest.mark.parametrize(
  "case, tool, where",
  [
    ("tpu_vm", "gcloud", "cloud.google.com/sdk"),
    ("gke", "kubectl", "kubernetes.io/docs"),
    ("xpk", "xpk", "pip install xpk"),
    ("slurm", "sbatch", "login nodes"),
  ],
)
def test_a_missing_tool_is_named_with_where_to_get_it(world, case, tool, where):
  script, arguments, env = CASES[case]
  (world.bin / tool).unlink()
  result = world.launch(script, *arguments, env=env)
  assert result.returncode == 2
  assert f"{tool} is not on PATH; get it: " in result.stderr and where in result.stderr
  assert world.launch(script, "--dry-run", *arguments, env=env).returncode == 0
  assert world.calls() == []


@pytest.mark.parametrize(
  "case, match",
  [
    ("tpu_vm", "describe"),
    ("tpu_vm", "create"),
    ("gke", "api-resources"),
    ("gke", "create"),
    ("gke, all options", "delete"),
    ("xpk", "workload create"),
    ("slurm", "sbatch"),
  ],
)
def test_where_a_tool_fails_the_script_stops_and_says_so(world, case, match):
  script, arguments, env = CASES[case]
  world.answer(
    {"match": match, "err": "PERMISSION_DENIED: not you", "status": 3, "times": -1},
    {"match": "api-resources", "out": "jobsets"},
    NOT_FOUND,
  )
  result = world.launch(script, *arguments, env=env)
  assert result.returncode == 69
  assert "PERMISSION_DENIED: not you" in result.stderr and match in result.stderr
  assert match in " ".join(world.calls()[-1])  # and nothing after it


def test_help(world):
  for script in ("tpu_vm.sh", "gke.sh", "slurm.sbatch", "local.sh"):
    result = world.launch(script, "--help")
    assert result.returncode == 0 and "Usage: bash launch/" + script in result.stdout
    assert "#" not in result.stdout and "set -euo" not in result.stdout


def test_quoting(world):
  words = [*NASTY, "", "~", "a'b'", "'", '"', "plain", "--a=b", "\\", "x\\'y"]
  script = f". launch/_launch.sh; quote {shlex.join(words)}"
  quoted = world.bash(script, cwd=world.checkout).stdout
  assert quoted.count("\n") == 1 and shlex.split(quoted) == words
  assert world.bash(f"printf '%s\\0' {quoted}").stdout.split("\0")[:-1] == words


@pytest.mark.parametrize(
  "statuses, expected",
  [
    ("0 0", 0),
    ("1 1", 1),
    ("0 1", 1),
    ("2 134", 2),
    ("75 2", 2),
    ("75 75", 75),
    ("0 75", 75),
    ("1 75", 75),
    ("1 137", 75),
    ("134", 75),
    ("", 75),
  ],
)
def test_what_the_hosts_say_together(world, statuses, expected):
  result = world.bash(f". launch/_launch.sh; decide {statuses}", cwd=world.checkout)
  assert result.stdout == f"{expected}\n"


def host_status(*hosts):
  return "\n".join(f"dmpo-status host-{i} {how}" for i, how in enumerate(hosts))


def verbs(calls):
  """create, delete, scp, and the actions on hosts."""
  found = []
  for call in calls:
    action = re.search(r"_host\.sh (\w+)", call[-1])
    found.append(action[1] if action else call[4])
  return found


UP = "scp setup start".split()


def test_tpu_vm_goes_on_after_a_preemption(world):
  world.answer(
    NOT_FOUND,
    {"match": "describe", "out": "WAITING_FOR_RESOURCES"},
    {"match": "describe", "out": "PROVISIONING"},
    ACTIVE,
    {"match": "status", "out": host_status("running: training (dmpo): 10/250 (4 %)")},
    {"match": "status", "err": "the node is PREEMPTED", "status": 255},
    {"match": "describe", "out": "SUSPENDING", "times": 3},
    {"match": "describe", "out": "SUSPENDED"},
    NOT_FOUND,
    ACTIVE,
    {"match": "status", "out": host_status("exited 0", "exited 0"), "times": -1},
  )
  result = world.launch("tpu_vm.sh", *TPU, *NASTY)
  assert result.returncode == 0, result.stderr
  calls = world.calls()
  assert [each for each in verbs(calls) if each != "describe"] == [
    *("create", *UP, "status", "status"),
    *("delete", "create", *UP, "status", "status", "delete"),
  ]
  starts = [call[-1] for call in calls if "_host.sh start" in call[-1]]
  assert starts[0] == starts[1]  # the same command again
  assert "training (dmpo): 10/250" in result.stderr
  assert "demo is SUSPENDED; asks anew (restart 1 of 20)" in result.stderr


@pytest.mark.parametrize(
  "hosts, status, message",
  [
    (["exited 1", "exited 1"], 1, "a restart would repeat"),
    (["exited 134", "exited 2"], 2, "bad input"),
  ],
)
def test_tpu_vm_stops_where_a_restart_would_be_in_vain(world, hosts, status, message):
  world.answer(
    NOT_FOUND,
    ACTIVE,
    {"match": "status", "out": host_status(*hosts), "times": -1},
    {"match": "_host.sh log", "out": "host-1: loss not finite in step 3"},
  )
  result = world.launch("tpu_vm.sh", *TPU)
  assert result.returncode == status and message in result.stderr
  assert "loss not finite in step 3" in result.stderr
  assert verbs(world.calls())[-2:] == ["log", "delete"]


def test_tpu_vm_gives_up_after_so_many_restarts(world):
  world.answer(
    {**ACTIVE, "times": -1},
    {"match": "status", "out": host_status("exited 75", "exited 75"), "times": -1},
  )
  result = world.launch("tpu_vm.sh", *TPU, "--max-restarts", "2", "--keep")
  assert result.returncode == 75 and "gave up after 2 restarts" in result.stderr
  assert "stays and costs money; delete it: gcloud compute tpus" in result.stderr
  found = verbs(world.calls())
  assert found.count("start") == 3 and found.count("stop") == 2
  assert "create" not in found and "delete" not in found  # it was there, and is kept


def test_tpu_vm_waits_for_hosts_that_notice_late(world):
  world.answer(
    {**ACTIVE, "times": -1},
    {"match": "status", "out": host_status("exited 0")},
    {"match": "status", "out": host_status("exited 0", "running")},
    {"match": "status", "out": host_status("exited 0", "exited 0")},
  )
  assert world.launch("tpu_vm.sh", *TPU).returncode == 0


@pytest.mark.parametrize("step", ["scp", "setup", "start"])
def test_tpu_vm_stops_where_the_hosts_cannot_be_set_up(world, step):
  match = "queued-resources scp" if step == "scp" else f"_host.sh {step}"
  world.answer({**ACTIVE, "times": -1}, {"match": match, "err": "E: no", "status": 1, "times": -1})
  result = world.launch("tpu_vm.sh", *TPU)
  assert result.returncode == 69 and "E: no" in result.stderr
  assert "failed three times; demo stays and costs money" in result.stderr
  assert "ssh-add" in result.stderr
  found = verbs(world.calls())
  assert found.count(step) == 3 and "delete" not in found


def test_tpu_vm_goes_on_when_preempted_while_it_installs(world):
  world.answer(
    ACTIVE,
    {"match": "_host.sh setup", "err": "connection lost", "status": 255},
    {"match": "describe", "out": "SUSPENDED", "times": 3},
    NOT_FOUND,
    {**ACTIVE, "times": -1},
    {"match": "status", "out": host_status("exited 0"), "times": -1},
  )
  result = world.launch("tpu_vm.sh", *TPU)
  assert result.returncode == 0, result.stderr
  found = [each for each in verbs(world.calls()) if each != "describe"]
  assert found[:5] == ["scp", "setup", "delete", "create", "scp"]


def test_tpu_vm_does_not_ask_again_for_what_somebody_deleted(world):
  world.answer(ACTIVE, {"match": "status", "err": "no", "status": 1}, {**NOT_FOUND, "times": -1})
  result = world.launch("tpu_vm.sh", *TPU)
  assert result.returncode == 69 and "somebody has deleted it" in result.stderr
  assert "create" not in verbs(world.calls())

  world.answer(NOT_FOUND, NOT_FOUND)
  result = world.launch("tpu_vm.sh", *TPU)
  assert result.returncode == 69 and "somebody has deleted it" in result.stderr
  assert verbs(world.calls()) == ["describe", "create", "describe"]


@pytest.mark.parametrize(
  "accelerator, runtime",
  [
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-8", "v2-alpha-tpuv6e"),
  ],
)
def test_tpu_vm_runtimes(world, accelerator, runtime):
  result = world.launch("tpu_vm.sh", "--dry-run", *TPU, "--accelerator", accelerator)
  (create,) = [line for line in result.stdout.splitlines() if "queued-resources create" in line]
  assert {f"--accelerator-type={accelerator}", f"--runtime-version={runtime}"} <= set(
    create.split()
  )
  assert "--node-id=demo" in create and "--spot" not in create


REMOTE = """#!{python} -IS
# gcloud, with two hosts: their home folders.
import os, pathlib, shutil, subprocess, sys
world, arguments = pathlib.Path(sys.argv[0]).parent.parent, sys.argv[1:]
if arguments[0] == "secrets":
  assert arguments[4:] == ["--project=my-project", "--secret=hf"], arguments
  print("the secret's value")
elif arguments[3] == "describe":
  print("ACTIVE")
elif arguments[3] in ("scp", "ssh"):
  hosts = ["host-0", "host-1"] if "--worker=all" in arguments else ["host-0"]
  status = 0
  for number, host in enumerate(hosts):
    home = world / host
    home.mkdir(exist_ok=True)
    if arguments[3] == "scp":
      shutil.copy(arguments[4], home)
      continue
    environment = {{**os.environ, "HOME": str(home), "HOST": str(number)}}
    environment.pop("HF_TOKEN", None)
    command = arguments[-1].removeprefix("--command=")
    result = subprocess.run(["bash", "-c", command], cwd=home, env=environment)
    status = status or result.returncode
  sys.exit(status)
"""
PYTHON3 = """#!/bin/sh
# python3 -m venv FOLDER, python -m pip install: as far as they are needed.
case $2 in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp {world}/host_dmpo "$3/bin/dmpo" ;;
esac
"""
HOST_DMPO = """#!/bin/sh
echo "host $HOST, secret $HF_TOKEN" >>{world}/trained
printf '%s\\n' "$@" >>{world}/trained
trap 'echo told to stop; exit 75' TERM
echo training: 10/250
while [ ! -e {world}/end ]; do sleep 0.05; done
"""


@pytest.mark.slow
def test_the_hosts_of_a_tpu(world):
  """install, start, status, stop and the second start, with everything but gcloud real."""
  world.stub("gcloud", REMOTE)
  world.stub("host_dmpo", HOST_DMPO, world.folder)
  world.stub("python3", PYTHON3)
  world.stub("sudo", STUB)
  world.stub("gcsfuse", STUB)
  arguments = [*TPU, "--secret-env", "HF_TOKEN=hf", "--keep", *NASTY]
  dry = world.launch("tpu_vm.sh", "--dry-run", *arguments).stdout
  pack, *_ = (line for line in dry.splitlines() if line.startswith("tar"))
  copy, install, start, status = (line for line in dry.splitlines() if "--node=all" in line)
  everything = "\n".join(["set -e", f"cd '{world.checkout}'", "mkdir -p build/launch", pack, copy])
  result = world.bash(f"{everything}\n{install}\n{start}\n{status}")
  try:
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" running") == 2
    mounts = [call for call in world.calls() if call[0] == "gcsfuse"]
    assert mounts == [["gcsfuse", "--implicit-dirs", "bucket", "/gcs/bucket"]] * 2

    deadline = time.monotonic() + 10
    while len(world.trained()) < 20 and time.monotonic() < deadline:
      time.sleep(0.02)
    train = ["train", "--distributed", "--data", "/gcs/bucket/data", "--out", "/gcs/bucket/runs/a"]
    trained = world.trained()
    assert sorted(trained[0::11]) == [f"host {i}, secret the secret's value" for i in (0, 1)]
    assert trained[1:11] == trained[12:22] == [*train, *NASTY]

    # An archive of an earlier time does not pass for the new one.
    assert world.bash(install).returncode != 0

    # Again: nothing is installed or started beside what goes on; another run is refused.
    result = world.bash(f"{everything}\n{install}\n{start}")
    assert result.stdout.count("nothing is installed") == 2
    assert result.stdout.count("the run goes on already") == 2
    result = world.bash(f"cd '{world.checkout}'\n{start.replace('runs/a', 'runs/b')}")
    assert result.returncode == 2 and "another run goes on here" in result.stderr
    result = world.bash(status)
    assert result.stdout.count(" running: training: 10/250") == 2

    # The watcher, called again, finds the run, and waits for its end.
    (world.folder / "end").touch()
    result = world.launch("tpu_vm.sh", *arguments)
    assert result.returncode == 0, result.stderr

    (world.folder / "end").unlink()
    assert "started: " in world.bash(start).stdout
    stop = status.replace("_host.sh status", "_host.sh stop")
    assert world.bash(stop).returncode == 0
    assert world.bash(status).stdout.count(" exited 75") == 2
    log = world.bash(status.replace("_host.sh status", "_host.sh log"))
    assert log.stdout.count(": told to stop") == 2

    # Killed without a word, for instance with the whole host.
    world.bash(start)
    for host in ("host-0", "host-1"):
      process = (world.folder / host / ".dmpo_run" / "process").read_text().split()[0]
      os.killpg(int(process), signal.SIGKILL)
    assert world.bash(status).stdout.count(" exited 137") == 2
  finally:
    (world.folder / "end").touch()


def manifest(world, *arguments):
  world.answer({"match": "api-resources", "out": "jobsets.jobset.x-k8s.io"})
  result = world.launch("gke.sh", *GKE, *arguments)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load((world.checkout / "build" / "launch" / "demo.yaml").read_text())


def as_kubernetes_reads(word):
  """$$ is $, and $(NAME) the value of a variable."""
  return re.sub(r"\$(\$|\(.*?\))", lambda found: "$" if found[1] == "$" else "VALUE", word)


def test_gke_manifest(world):
  jobset = manifest(world, *NASTY)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 20
  assert policy["rules"] == [
    {"name": "inVain", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  (group,) = jobset["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  assert (group["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
  assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
  disrupted, in_vain = job["podFailurePolicy"]["rules"]
  assert disrupted == {
    "action": "Count",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
  }
  exit_codes = {"containerName": "train", "operator": "In", "values": [1, 2]}
  assert in_vain == {"action": "FailJob", "onExitCodes": exit_codes}
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # or Kubernetes refuses a podFailurePolicy
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  (container,) = pod["containers"]
  assert container["name"] == "train" and container["resources"]["limits"] == {"google.com/tpu": 4}
  assert [as_kubernetes_reads(word) for word in container["command"]] == [
    *"dmpo train --distributed --data /gcs/bucket/data --out /gcs/bucket/runs/a".split(),
    *NASTY,
  ]
  assert container["volumeMounts"] == [{"name": "bucket-1", "mountPath": "/gcs/bucket"}]
  (volume,) = pod["volumes"]
  assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert "envFrom" not in container and "serviceAccountName" not in pod


def test_gke_manifest_with_options(world):
  options = "--spot --secret hf --service-account trainer --slices 3 --data gs://other/d".split()
  jobset = manifest(world, *options)
  (group,) = jobset["spec"]["replicatedJobs"]
  pod = group["template"]["spec"]["template"]["spec"]
  assert group["replicas"] == 3 and pod["serviceAccountName"] == "trainer"
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert len(pod["tolerations"]) == 2 and len(pod["volumes"]) == 2
  (container,) = pod["containers"]
  assert container["envFrom"] == [{"secretRef": {"name": "hf"}}]
  paths = [mount["mountPath"] for mount in container["volumeMounts"]]
  assert paths == ["/gcs/bucket", "/gcs/other"]


def test_gke_manifest_without_buckets(world):
  jobset = manifest(world, "--data", "/data", "--out", "/runs/a")
  template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert "metadata" not in template and "volumes" not in template["spec"]


@pytest.mark.parametrize(
  "accelerator, kind, topology, hosts, chips",
  [
    ("v4-16", "tpu-v4-podslice", "2x2x2", 2, 4),
    ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4),
    ("v5litepod-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
    ("v6e-8", "tpu-v6e-slice", "2x4", 2, 4),
    ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4),
    ("tpu7x-128", "tpu7x", "4x4x4", 16, 4),
  ],
)
def test_gke_slices(world, accelerator, kind, topology, hosts, chips):
  job = manifest(world, "--accelerator", accelerator)["spec"]["replicatedJobs"][0]["template"][
    "spec"
  ]
  pod = job["template"]["spec"]
  assert list(pod["nodeSelector"].values()) == [kind, topology]
  assert job["parallelism"] == job["completions"] == hosts
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_gke_without_jobset(world):
  result = world.launch("gke.sh", *GKE)
  assert result.returncode == 2 and "the cluster does not know JobSet" in result.stderr
  assert [call[1] for call in world.calls()] == ["api-resources"]


def test_xpk_restarts_on_75(world):
  assert world.launch("gke.sh", *XPK, *NASTY).returncode == 0
  ((tool, *arguments),) = world.calls()
  assert tool == "xpk" and arguments[:2] == ["workload", "create"]
  assert {"--restart-on-exit-codes=75", "--tpu-type=v6e-16", "--max-restarts=20"} <= set(arguments)
  (command,) = [each for each in arguments if each.startswith("--command=")]
  assert shlex.split(command.removeprefix("--command="))[1:] == [
    *"dmpo train --distributed --data /gcs/data --out /gcs/runs/a".split(),
    *NASTY,
  ]


# srun, as far as it goes: every task runs the command after its own flags.
SRUN = """#!/bin/bash
world={world}
while [[ $1 == --* ]]; do shift; done
[ -z "$CANCELLED" ] || kill -TERM "$PPID"
code=0
for rank in $(seq 0 $((${{LIVING:-$SLURM_NTASKS}} - 1))); do
  SLURM_PROCID=$rank "$@"
  status=$?
  [ "$status" -le "$code" ] || code=$status
done
exit "$code"
"""


def run_job(world, *statuses, env=None, arguments=()):
  world.stub("srun", SRUN)
  (world.bin / "seq").symlink_to(shutil.which("seq"))
  world.statuses(*statuses)
  env = {**JOB, "SLURM_SUBMIT_DIR": str(world.checkout), **(env or {})}
  return world.launch("slurm.sbatch", *LOCAL, *arguments, *NASTY, env=env)


@pytest.mark.parametrize(
  "statuses, status, requeued",
  [((0, 0), 0, False), ((75, 75), 75, True), ((1, 1), 1, False), ((2, 134), 2, False)]
  + [((75, 134), 75, True)],
)
def test_slurm_requeues_what_can_go_on(world, statuses, status, requeued):
  result = run_job(world, *statuses)
  assert result.returncode == status, result.stderr
  assert world.calls() == ([["scontrol", "requeue", "7"]] if requeued else [])
  assert len(world.trained()) == 2
  folder = world.folder / "runs" / "my run" / "slurm" / "7.0"
  assert [(folder / rank).read_text() for rank in "01"] == [f"{each}\n" for each in statuses]


def test_slurm_does_not_requeue_a_cancelled_job(world):
  assert run_job(world, 75, env={"CANCELLED": "1"}).returncode == 75
  assert world.calls() == []


def test_slurm_counts_a_task_that_said_nothing_as_killed(world):
  result = run_job(world, 1, env={"LIVING": "1"})
  assert result.returncode == 75 and world.calls() == [["scontrol", "requeue", "7"]]


def test_slurm_gives_up_after_so_many_restarts(world):
  env, arguments = {"SLURM_RESTART_COUNT": "3"}, ["--max-restarts", "3"]
  result = run_job(world, 75, env=env, arguments=arguments)
  assert result.returncode == 75 and "gave up after 3 restarts" in result.stderr
  assert world.calls() == []


def test_slurm_tells_a_failed_srun_from_a_failed_run(world):
  world.answer({"match": "srun", "err": "srun: error: no such partition", "status": 1})
  env = {**JOB, "SLURM_SUBMIT_DIR": str(world.checkout)}
  result = world.launch("slurm.sbatch", *LOCAL, env=env)
  assert result.returncode == 69 and "no task has run; srun ended with 1" in result.stderr
  assert [call[0] for call in world.calls()] == ["srun"]


def test_slurm_directives():
  lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
  directives = [line for line in lines if line.startswith("#SBATCH")]
  assert lines[1 : 1 + len(directives)] == directives  # sbatch stops looking at the first command
  assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@120"} <= set(directives)


def test_slurm_outside_a_checkout(world):
  result = world.launch("slurm.sbatch", *LOCAL, env={**JOB, "SLURM_SUBMIT_DIR": str(world.folder)})
  assert result.returncode == 2 and "no checkout in" in result.stderr


def test_local_goes_on_until_it_is_finished(world):
  world.statuses(75, 75, 0)
  result = world.launch("local.sh", *LOCAL, *NASTY)
  assert result.returncode == 0 and "(restart 2 of 20)" in result.stderr
  trained = world.trained()
  assert len(trained) == 3 and len(set(trained)) == 1
  assert trained[0] == " ".join(["train", *LOCAL, *NASTY])


@pytest.mark.parametrize("status", [1, 2, 134])
def test_local_does_not_repeat_what_would_fail_again(world, status):
  world.statuses(status)
  assert world.launch("local.sh", *LOCAL).returncode == status
  assert len(world.trained()) == 1


def test_local_gives_up_after_so_many_restarts(world):
  world.statuses(75)
  result = world.launch("local.sh", *LOCAL, "--max-restarts", "2")
  assert result.returncode == 75 and "gave up after 2 restarts" in result.stderr
  assert len(world.trained()) == 3


def test_local_told_to_stop_lets_the_run_save_and_does_not_start_it_again(world):
  world.stub("dmpo", HOST_DMPO, world.checkout / ".venv" / "bin")
  process = subprocess.Popen(
    ["bash", str(world.checkout / "launch" / "local.sh"), *LOCAL],
    cwd=world.folder,
    env=world.environment(),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "training: 10/250\n"
  process.send_signal(signal.SIGTERM)
  shown, _ = process.communicate(timeout=20)
  assert process.returncode == 75 and shown == "told to stop\n"


PAGES = sorted((ROOT / "docs").glob("launch_*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_the_pages(world, page):
  """Every call of a launcher in the documentation is one that the launcher takes."""
  blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
  text = "\n".join(blocks).replace("\\\n", " ")
  settings = re.findall(r"^[A-Z_]+=\S+$", text, re.M)
  calls = re.findall(r"^(?:[A-Z]+=\S+ )?bash launch/.*$", text, re.M)
  assert calls and PAGES
  for call in calls:
    call = re.sub(r"(launch/\S+)", r"\1 --dry-run", call, count=1)
    script = "\n".join(["set -u", *settings, call])
    result = world.bash(script, cwd=world.checkout)
    assert result.returncode == 0, f"{call}: {result.stderr}"


def test_shellcheck():
  """Of what launch/test.sh does not look at."""
  command = [pathlib.Path(sys.executable).parent / "shellcheck", "-x", "launch/slurm.sbatch"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
