#!/usr/bin/env bash
# Trains on Cloud TPU VMs: asks for them as a queued resource, installs this checkout on every host,
# trains, watches, and asks again and goes on when they are preempted. Deletes them at the end.
# Usage: bash launch/tpu_vm.sh [--dry-run] --name NAME --project PROJECT --zone ZONE
#          --accelerator v4-N|v5litepod-N|v5p-N|v6e-N --data PLACE --out PLACE
#          [--config configs/FILE] [--config.FIELD=VALUE ...] [--slices 1] [--spot | --reserved]
#          [--copy-data] [--max-restarts 20] [--poll 60] [--keep] [--runtime VERSION]
#          [--service-account EMAIL] [--secret-env VARIABLE=SECRET ...] [--setup COMMAND]
#          [--network NAME] [--subnetwork NAME] [--internal-ip | --iap]
#   PLACE is gs://BUCKET/FOLDER, mounted on every host at /gcs/BUCKET, or an absolute path that
#   every host has (--setup can mount one). --copy-data copies the data to the hosts' disks first.
#   --secret-env HF_TOKEN=NAME: every host reads the secret NAME from Secret Manager, as the TPU's
#   service account; it never stands on a command line.
#   Stopped or lost, the same command watches on: the hosts go on by themselves.
#   Ends with 0 finished, 1 stopped for good, 2 bad input, 69 gcloud failed, 75 gave up restarting.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_launch.sh
. launch/_launch.sh

name='' project='' zone='' accelerator='' runtime='' slices=1 config='' data='' out=''
max_restarts=20 poll=60 service_account='' network='' subnetwork='' setup=''
dry_run='' spot='' reserved='' copy_data='' keep='' internal_ip='' iap=''
parse_options "--name --project --zone --accelerator --runtime --slices --config --data --out
  --max-restarts --poll --service-account --secret-env --setup --network --subnetwork" \
  "--dry-run --spot --reserved --copy-data --keep --internal-ip --iap" "$@"
DRY_RUN=$dry_run

# The runtime of an accelerator type: cloud.google.com/tpu/docs/runtimes. What is behind the dash
# counts TensorCores, two a chip, for v4 and v5p, and chips for the others.
check_accelerator() {
  local family=${1%-*} size=${1##*-}
  check_given --accelerator "$1" "for example v5litepod-16"
  case $1 in
    tpu7x-*) refuse "--accelerator: tpu7x is offered on GKE only; see launch/gke.sh" ;;
    v4-* | v5p-*)
      if ! [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || [ "$((size % 8))" -ne 0 ]; then
        refuse "--accelerator: expected $family-N, N a multiple of 8, got '$1'"
      fi
      ;;
    v5litepod-* | v6e-*)
      case $size in
        1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;;
        *) refuse "--accelerator: expected $family-N, N of 1 4 8 16 32 64 128 256, got '$1'" ;;
      esac
      ;;
    *) refuse "--accelerator: unknown type '$1'; expected v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
  case $family in
    v4) default_runtime=tpu-ubuntu2204-base ;;
    v5litepod) default_runtime=v2-alpha-tpuv5-lite ;;
    v5p) default_runtime=v2-alpha-tpuv5 ;;
    v6e) default_runtime=v2-alpha-tpuv6e ;;
  esac
}

# packed_config FILE CALLER: the configuration's path in what is packed below. A file of elsewhere
# would be missing on the hosts.
packed_config() {
  local place folder
  for place in "$2/$1" "$1"; do
    folder=$(cd "$(dirname "$place")" 2>/dev/null && pwd) || continue
    case $folder/ in
      "$PWD/configs/"*)
        if [ -f "$place" ]; then
          echo "${folder#"$PWD/"}/$(basename "$place")"
          return
        fi
        ;;
    esac
  done
  refuse "--config: $1 is not a file in $PWD/configs, which is what the hosts get"
}

check_given --name "$name" "a name for the queued resource and its TPUs"
check_name --name "$name" 50
check_given --project "$project" "the id of your Google Cloud project"
[[ $project =~ ^[a-z][a-z0-9.:-]*[a-z0-9]$ ]] || refuse "--project: '$project' is no project id"
check_given --zone "$zone" "for example us-west4-a; cloud.google.com/tpu/docs/regions-zones"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || refuse "--zone: '$zone' is no zone, as us-west4-a is"
check_accelerator "$accelerator"
check_number --slices "$slices" 1
check_number --max-restarts "$max_restarts" 0
check_number --poll "$poll" 0
check_place --data "$data"
check_place --out "$out"
[ -z "$spot" ] || [ -z "$reserved" ] || refuse "--spot and --reserved: give one of them"
[ -z "$internal_ip" ] || [ -z "$iap" ] || refuse "--internal-ip and --iap: give one of them"
case $copy_data$data in
  1/*) refuse "--copy-data: expected --data gs://BUCKET/FOLDER, got $data" ;;
esac
for pair in ${secret_env[@]+"${secret_env[@]}"}; do
  [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]+$ ]] ||
    refuse "--secret-env: expected VARIABLE=NAME, the name of a secret in Secret Manager"
done
[ -z "$config" ] || config=$(packed_config "$config" "$caller")
need gcloud "https://cloud.google.com/sdk/docs/install"
need tar "your system's packages"

where=(--project="$project" --zone="$zone" --quiet)
through=()
[ -z "$internal_ip" ] || through=(--internal-ip)
[ -z "$iap" ] || through=(--tunnel-through-iap)
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}"
  "--format=value(state.state)")
delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force)
create=(gcloud compute tpus queued-resources create "$name" "${where[@]}"
  --accelerator-type="$accelerator" --runtime-version="${runtime:-$default_runtime}")
if [ "$slices" -eq 1 ]; then
  create+=(--node-id="$name")
else
  create+=(--node-count="$slices" --node-prefix="$name")
fi
[ -z "$spot" ] || create+=(--spot)
[ -z "$reserved" ] || create+=(--reserved)
[ -z "$internal_ip$iap" ] || create+=(--internal-ips)
[ -z "$network" ] || create+=(--network="$network")
[ -z "$subnetwork" ] || create+=(--subnetwork="$subnetwork")
if [ -n "$service_account" ]; then
  create+=(--service-account="$service_account"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
fi

archive=build/launch/$name.tar.gz
pack=(tar -czf "$archive" --exclude=__pycache__
  README.md LICENSE pyproject.toml setup.py configs dmpo_jax launch)
copy=(gcloud compute tpus queued-resources scp "$archive" "$name:" "${where[@]}"
  ${through[@]+"${through[@]}"} --node=all --worker=all)

data_path=$(host_path "$data")
# The archive is removed: gcloud's scp ends with 0 where it could not reach a host, and an old one
# must not pass for the new one.
unpack="mkdir -p dmpo && tar -xzf $name.tar.gz -C dmpo && rm $name.tar.gz"
setup_host="EXTRAS=tpu bash dmpo/launch/_host.sh setup"
for bucket in $(buckets_of "$data" "$out"); do setup_host+=" --bucket $bucket"; done
if [ -n "$copy_data" ]; then
  data_path=/gcs-copy/${data#gs://} data_path=${data_path%/}
  setup_host+=" --copy $(quote "${data%/}" "$data_path")"
fi
install="$unpack${setup:+ && { $setup; \}} && $setup_host"
start="cd dmpo && bash launch/_host.sh start"
for pair in ${secret_env[@]+"${secret_env[@]}"}; do
  start+=" --secret-env ${pair%%=*}=$project/${pair#*=}"
done
start+=" -- $(quote .venv/bin/dmpo train --distributed ${config:+--config "$config"} \
  --data "$data_path" --out "$(host_path "$out")" ${overrides[@]+"${overrides[@]}"})"

# on_hosts NODE WORKER COMMAND. The commands return at once: gcloud serves at most 64 hosts at a
# time, and runs a command again whose connection broke: none of them may be the training itself.
on_hosts() {
  attempt gcloud compute tpus queued-resources ssh "$name" "${where[@]}" \
    ${through[@]+"${through[@]}"} --node="$1" --worker="$2" --command="$3" </dev/null
}
act() { echo "bash dmpo/launch/_host.sh $1"; }

# ask_state ASSUMED: sets state, to ASSUMED in a dry run. Once gcloud has answered, it may fail now
# and then: a run takes days.
answered='' answer=''
ask_state() {
  local errors failures=0
  if [ -n "$DRY_RUN" ]; then
    quote "${describe[@]}"
    state=$1
    return
  fi
  while :; do
    errors=$(mktemp)
    if state=$("${describe[@]}" 2>"$errors"); then
      rm -f "$errors"
      break
    fi
    answer=$(cat "$errors")
    rm -f "$errors"
    case $answer in
      *NOT_FOUND*) state=ABSENT && break ;;
    esac
    failures=$((failures + 1))
    if [ -z "$answered" ] || [ "$failures" -ge 10 ]; then
      say "$answer"
      tool_failed "gcloud does not say how $name stands: $(quote "${describe[@]}")"
    fi
    sleep "$poll"
  done
  answered=1
}

restarts=0
count_restart() {
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "gave up after $max_restarts restarts: $1"
    finish "$AGAIN"
  fi
  restarts=$((restarts + 1))
  say "$1 (restart $restarts of $max_restarts)"
}

ensure_active() {
  local shown='' created=
  ask_state ABSENT
  while :; do
    [ -n "$DRY_RUN" ] || [ "$state" = "$shown" ] || say "$name: $state"
    shown=$state
    case $state in
      ACTIVE) return ;;
      ABSENT)
        [ -z "$created" ] || tool_failed "$name is gone; somebody has deleted it"
        run "${create[@]}"
        created=1
        remark "until the state is ACTIVE, every $poll s:"
        ;;
      FAILED | SUSPENDED)
        count_restart "$name is $state; asks anew"
        run "${delete[@]}"
        created=
        ;;
      *) sleep "$poll" ;;
    esac
    ask_state ACTIVE
  done
}

# Status 1 if the hosts are gone meanwhile; stops if they are there and it fails again and again.
install_and_start() {
  local left=3 step
  while [ "$left" -gt 0 ]; do
    left=$((left - 1))
    step=copying
    if attempt "${copy[@]}"; then
      step=installing
      if on_hosts all all "$install"; then
        step=starting
        if on_hosts all all "$start"; then return; fi
      fi
    fi
    say "$step failed on a host, see above"
    sleep "$poll"
    ask_state ACTIVE
    [ "$state" = ACTIVE ] || return 1
  done
  say "where there are several hosts, gcloud wants: ssh-add ~/.ssh/google_compute_engine"
  tool_failed "$step failed three times; $name stays and costs money: $(quote "${delete[@]}")"
}

# watch: until the first host's run has ended, then what all say together. Sets outcome.
watch() {
  local line silent=0 left=10 shown=
  remark "until it does not say 'running', every $poll s:"
  while :; do
    if line=$(on_hosts 0 0 "$(act status)"); then
      silent=0
      [ -z "$DRY_RUN" ] || echo "$line"
      line=$(grep -o 'dmpo-status .*' <<<"$line" | head -n 1 || true)
      case $line in
        *" running"*)
          [ "$line" = "$shown" ] || say "${line#dmpo-status }"
          shown=$line
          sleep "$poll"
          continue
          ;;
      esac
      break
    fi
    silent=$((silent + 1))
    ask_state ACTIVE
    if [ "$state" != ACTIVE ] || [ "$silent" -ge 10 ]; then
      outcome=$AGAIN
      return
    fi
    sleep "$poll"
  done
  while :; do # a host whose peers have ended notices it in the next two minutes
    lines=$(on_hosts all all "$(act status)" || true)
    if [ -n "$DRY_RUN" ]; then
      echo "$lines"
      outcome=$FINISHED
      return
    fi
    left=$((left - 1))
    [[ $lines == *dmpo-status*" running"* ]] && [ "$left" -gt 0 ] || break
    sleep "$poll"
  done
  # A host that runs on, or does not know of a run, counts as killed.
  # shellcheck disable=SC2046  # the statuses are words
  outcome=$(decide $(grep -oE 'dmpo-status [^ ]+ (exited [0-9]+|running|none)' <<<"$lines" |
    sed -E 's/^.* (exited )?//; s/running|none/137/'))
}

finish() {
  local status=$1
  [ -n "$DRY_RUN" ] || say "$(explain "$status")"
  if [ "$status" -eq "$STOPPED" ] || [ "$status" -eq "$BAD_INPUT" ]; then
    on_hosts all all "$(act log)" >&2 || true
  fi
  if [ -n "$keep" ]; then
    [ -n "$DRY_RUN" ] || say "$name stays and costs money; delete it: $(quote "${delete[@]}")"
  else
    remark "at the end; --keep leaves it out:"
    attempt "${delete[@]}" ||
      say "could not delete $name, which costs money: $(quote "${delete[@]}")"
  fi
  exit "$status"
}

trap 'say "no longer watched: $name goes on and costs money. The same command watches again; or
delete it: $(quote "${delete[@]}")"; exit 130' INT TERM

[ -z "$DRY_RUN" ] || quote cd "$PWD"
run mkdir -p build/launch
run "${pack[@]}"
while :; do
  ensure_active
  outcome=$AGAIN
  if install_and_start; then watch; fi
  [ "$outcome" -eq "$AGAIN" ] || finish "$outcome"
  sleep "$poll" # a preemption is known to the hosts before it shows in the state
  ask_state ACTIVE
  case $state in
    ABSENT) tool_failed "$name is gone; somebody has deleted it" ;;
    ACTIVE)
      count_restart "the run has ended before its time, and $name is still there"
      on_hosts all all "$(act stop)" >/dev/null || run "${delete[@]}"
      ;;
  esac
done
