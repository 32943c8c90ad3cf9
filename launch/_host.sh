#!/usr/bin/env bash
# Runs on the hosts of a job, never on yours: the other side of tpu_vm.sh and slurm.sbatch.
#   setup [--bucket NAME] [--copy gs://BUCKET/FOLDER PATH]   mounts, copies, installs (EXTRAS=tpu)
#   start [--secret-env VARIABLE=PROJECT/SECRET] -- COMMAND  in the background; once only
#   status                                                   one line: host, and how the run stands
#   log | stop                                               its last lines; ends it
#   task FOLDER -- COMMAND                                   in the foreground; writes FOLDER/RANK
# Every one may be repeated: what is done already is left as it is.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/_launch.sh
. "$checkout/launch/_launch.sh"
# shellcheck source=launch/_venv.sh
. "$checkout/launch/_venv.sh"

state=$HOME/.dmpo_run # process, status, command, log

# Whether the run goes on. The boot is part of its name: after one, its process id is another's.
alive() {
  local id boot
  [ -f "$state/process" ] && [ ! -f "$state/status" ] || return 1
  read -r id boot <"$state/process"
  [ "$boot" = "$(boot_id)" ] && grep -q '^State:[[:space:]][^ZX]' "/proc/$id/status" 2>/dev/null
}
boot_id() { cat /proc/sys/kernel/random/boot_id; }

# gcsfuse from Google's package source, as its documentation has it for Debian and Ubuntu.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc source
  command -v gcsfuse >/dev/null && return
  source="deb [signed-by=$key] https://packages.cloud.google.com/apt"
  source+=" gcsfuse-$(lsb_release -cs) main"
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "$source" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  # A fresh machine updates itself and holds the lock for a while.
  sudo apt-get -o DPkg::Lock::Timeout=300 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=300 -qq install -y fuse gcsfuse >/dev/null
}

mount_bucket() {
  local folder=/gcs/$1
  mountpoint -q "$folder" && return
  install_gcsfuse
  sudo install -d -o "$(id -un)" "$folder"
  gcsfuse --implicit-dirs "$1" "$folder"
}

# TPU images have Python 3.10, and we need 3.11: uv brings one without touching the system's.
ensure_python() {
  (find_python) >/dev/null 2>&1 && return
  python3 -m pip install --quiet --user uv
  python3 -m uv python install --quiet 3.12
  PYTHON=$(python3 -m uv python find 3.12)
  export PYTHON
}

host_setup() {
  if alive; then
    echo "a run goes on here: nothing is installed"
    return
  fi
  while [ $# -gt 0 ]; do
    case $1 in
      --bucket) mount_bucket "$2" && shift 2 ;;
      --copy)
        sudo install -d -o "$(id -un)" "$3"
        gcloud storage rsync --recursive --quiet "$2" "$3"
        shift 3
        ;;
      *) refuse "setup: $1: unknown" ;;
    esac
  done
  cd "$checkout"
  ensure_python
  make_venv "${EXTRAS:+[$EXTRAS]}"
}

host_start() {
  local pair name value secrets=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    [ "$1" = --secret-env ] || refuse "start: $1: unknown"
    secrets+=("$2") && shift 2
  done
  shift
  mkdir -p "$state"
  if alive; then
    [ "$(cat "$state/command")" = "$(quote "$@")" ] ||
      refuse "another run goes on here: $(cat "$state/command"); stop it first"
    echo "the run goes on already"
    return
  fi
  for pair in ${secrets[@]+"${secrets[@]}"}; do
    name=${pair#*=}
    value=$(gcloud secrets versions access latest --project="${name%/*}" --secret="${name#*/}") ||
      tool_failed "the secret $name cannot be read; may this host's service account?"
    export "${pair%%=*}=$value"
  done
  rm -f "$state/status"
  quote "$@" >"$state/command"
  cd "$checkout"
  setsid bash launch/_host.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
  echo "$! $(boot_id)" >"$state/process"
  echo "started: $(cat "$state/command")"
}

# The command gets the signal too, saves and ends by itself; its status must still be written.
supervise() {
  local status=0
  trap : TERM
  "$@" || status=$?
  echo "$status" >"$state/status.new"
  mv "$state/status.new" "$state/status"
}

host_status() {
  local how=none last=
  if [ -f "$state/status" ]; then
    how="exited $(cat "$state/status")"
  elif alive; then
    how=running
    last=$(tail -n 1 "$state/log" | tr -d '\r')
  elif [ -f "$state/process" ]; then
    how="exited 137" # killed, or the host has started anew: nobody wrote a status
  fi
  echo "dmpo-status $(hostname) $how${last:+: $last}"
}

host_log() {
  [ ! -f "$state/log" ] || tail -n 30 "$state/log" | sed "s/^/$(hostname): /"
}

host_stop() {
  local id left=750
  alive || return 0
  read -r id _ <"$state/process"
  kill -TERM -- "-$id" 2>/dev/null || true
  while alive && [ "$left" -gt 0 ]; do
    sleep 0.2
    left=$((left - 1))
  done
  ! alive || kill -KILL -- "-$id" 2>/dev/null || true
}

# For srun, which gives one status for all tasks, and the highest at that.
host_task() {
  local folder=$1 status=0
  shift 2
  trap : TERM
  "$@" || status=$?
  echo "$status" >"$folder/${SLURM_PROCID:-0}"
  exit "$status"
}

action=${1:-}
[ $# -eq 0 ] || shift
case $action in
  setup) host_setup "$@" ;;
  start) host_start "$@" ;;
  supervise) supervise "$@" ;;
  status) host_status ;;
  log) host_log ;;
  stop) host_stop ;;
  task) host_task "$@" ;;
  *) refuse "$action: expected setup, start, status, log, stop or task" ;;
esac
