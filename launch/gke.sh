#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet: one pod a host, a slice a Job. The JobSet
# starts all pods anew when one is preempted or killed, and not when a restart would be in vain.
# Usage: bash launch/gke.sh [--dry-run] --name NAME --image IMAGE --data PLACE --out PLACE
#          --accelerator v4-N|v5litepod-N|v5p-N|v6e-N|tpu7x-N [--slices 1] [--spot]
#          [--config FILE] [--config.FIELD=VALUE ...] [--max-restarts 20] [--replace]
#          [--context NAME] [--namespace NAME] [--service-account NAME] [--secret NAME]
#          [--xpk CLUSTER --project PROJECT --zone ZONE]
#   PLACE is gs://BUCKET/FOLDER, mounted in the pods at /gcs/BUCKET (Cloud Storage FUSE CSI driver),
#   or an absolute path in the image.
#   --secret NAME: a Kubernetes secret whose keys become environment variables (HF_TOKEN); its
#   values are on no command line. --replace deletes a JobSet of the same name first.
#   --xpk CLUSTER hands the job to xpk instead of kubectl; PLACE is then a path that `xpk storage
#   attach --auto-mount` provides.
#   Ends with 0 submitted, 2 bad input, 69 kubectl or xpk failed. The training itself: kubectl.

# shellcheck disable=SC2034  # the template names variables
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_launch.sh
. launch/_launch.sh

name='' image='' accelerator='' slices=1 config='' data='' out='' max_restarts=20
context='' namespace='' service_account='' secret='' xpk='' project='' zone=''
dry_run='' spot='' replace=''
parse_options "--name --image --accelerator --slices --config --data --out --max-restarts
  --context --namespace --service-account --secret --xpk --project --zone" \
  "--dry-run --spot --replace" "$@"
DRY_RUN=$dry_run

# find_slice TYPE: GKE's name of a TPU type, its topology, hosts and chips a host. What is behind
# the dash counts TensorCores, two a chip, for v4, v5p and tpu7x, chips for the others, as in xpk.
find_slice() {
  local family=${1%-*} chips=${1##*-} cubic=
  check_given --accelerator "$1" "for example v5litepod-16"
  case $family in
    v4) gke_type=tpu-v4-podslice cubic=1 ;;
    v5p) gke_type=tpu-v5p-slice cubic=1 ;;
    tpu7x) gke_type=tpu7x cubic=1 ;;
    v5litepod) gke_type=tpu-v5-lite-podslice ;;
    v6e) gke_type=tpu-v6e-slice ;;
    *)
      refuse "--accelerator: unknown type '$1'; expected v4-N, v5litepod-N, v5p-N, v6e-N or" \
        "tpu7x-N"
      ;;
  esac
  [ -z "$cubic" ] || case $chips in
    8) topology=2x2x1 ;; 16) topology=2x2x2 ;; 32) topology=2x2x4 ;; 64) topology=2x4x4 ;;
    128) topology=4x4x4 ;; 256) topology=4x4x8 ;; 512) topology=4x8x8 ;; 1024) topology=8x8x8 ;;
    2048) topology=8x8x16 ;; 4096) topology=8x16x16 ;;
    *) refuse "--accelerator: expected $family-N, N of 8 16 32 64 ... 4096, got '$1'" ;;
  esac
  [ -n "$cubic" ] || case $chips in
    1) topology=1x1 ;; 4) topology=2x2 ;; 8) topology=2x4 ;; 16) topology=4x4 ;;
    32) topology=4x8 ;; 64) topology=8x8 ;; 128) topology=8x16 ;; 256) topology=16x16 ;;
    *) refuse "--accelerator: expected $family-N, N of 1 4 8 16 32 64 128 256, got '$1'" ;;
  esac
  chips=$((chips / (cubic + 1)))
  chips_per_host=$((chips < 4 ? chips : 4)) hosts=$(((chips + 3) / 4))
}

check_given --name "$name" "a name for the job"
check_name --name "$name" 40
check_given --image "$image" "a container image with dmpo_jax; docs/launch_gke.md builds one"
[[ $image =~ ^[a-z0-9][A-Za-z0-9._:/@-]*$ ]] || refuse "--image: '$image' is no image"
find_slice "$accelerator"
check_number --slices "$slices" 1
[ "$slices" -eq 1 ] || [ "$hosts" -gt 1 ] ||
  refuse "--slices: GKE joins slices of several hosts only, and $accelerator has one"
check_number --max-restarts "$max_restarts" 0
check_place --data "$data"
check_place --out "$out"
[ -z "$namespace" ] || check_name --namespace "$namespace" 63
[ -z "$secret" ] || [[ $secret =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] ||
  refuse "--secret: expected the name of a Kubernetes secret"
[ -z "$service_account" ] || [[ $service_account =~ ^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$ ]] ||
  refuse "--service-account: expected the name of a Kubernetes service account"

command=(dmpo train --distributed ${config:+--config "$config"} --data "$(host_path "$data")"
  --out "$(host_path "$out")" ${overrides[@]+"${overrides[@]}"})

if [ -n "$xpk" ]; then
  check_given --project "$project" "xpk wants the project of the cluster"
  check_given --zone "$zone" "xpk wants the zone or region of the cluster"
  case $data$out in *gs://*) refuse "--xpk: expected paths for --data and --out, of buckets that \
\`xpk storage attach --auto-mount=true\` mounts; docs/launch_gke.md" ;; esac
  [ -z "$spot$replace$context$namespace$service_account$secret" ] ||
    refuse "--xpk: leave out --spot, --replace, --context, --namespace, --service-account, --secret"
  need xpk "pip install xpk, in an environment of its own"
  # exec: the signal that a pod gets has to reach the training itself.
  run xpk workload create --cluster="$xpk" --project="$project" --zone="$zone" --workload="$name" \
    --tpu-type="$accelerator" --num-slices="$slices" --docker-image="$image" \
    --max-restarts="$max_restarts" --restart-on-exit-codes="$AGAIN" \
    --termination-grace-period-seconds=120 --command="exec $(quote "${command[@]}")"
  exit
fi
[ -z "$project$zone" ] || refuse "--project and --zone go with --xpk; kubectl has its context"

# A string of JSON, which YAML takes as it is. Kubernetes would put variables in place of $(...).
json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$/\$\$}"
}
json_list() {
  local word list=
  for word; do list+="${list:+, }$(json "$word")"; done
  echo "[$list]"
}

# The template with this job's values; no value is read again for @words@ of its own.
manifest() {
  local line ready word
  local bucket_1='' bucket_2='' command_list
  { read -r bucket_1 && read -r bucket_2; } < <(buckets_of "$data" "$out") || true
  command_list=$(json_list "${command[@]}")
  while IFS= read -r line; do
    [[ ! $line =~ ^\ *# ]] || continue
    if [[ $line =~ ^(.*[^ ])\ +#\?\ ([a-z_0-9]+)$ ]]; then
      line=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
      [ -n "${!word}" ] || continue
    fi
    ready=
    while [[ $line =~ ^([^@]*)@([a-z_0-9]+)@(.*)$ ]]; do
      line=${BASH_REMATCH[3]} word=${BASH_REMATCH[2]} ready+=${BASH_REMATCH[1]}
      ready+=${!word}
    done
    printf '%s\n' "$ready$line"
  done <launch/gke_jobset.yaml
}

need kubectl "https://kubernetes.io/docs/tasks/tools, or gcloud components install kubectl"
kubectl=(kubectl ${context:+--context="$context"} ${namespace:+--namespace="$namespace"})
file=build/launch/$name.yaml
if [ -n "$DRY_RUN" ]; then
  quote cd "$PWD"
  quote mkdir -p build/launch
  printf '%s\n%s\n%s\n' "cat >$file <<'END_OF_JOBSET'" "$(manifest)" END_OF_JOBSET
  remark "must name jobsets:"
fi
find=("${kubectl[@]}" api-resources --api-group=jobset.x-k8s.io --output=name)
found=$(run "${find[@]}") || exit "$TOOL_FAILED"
if [ -n "$DRY_RUN" ]; then
  echo "$found"
elif [[ $found != *jobsets* ]]; then
  refuse "the cluster does not know JobSet; docs/launch_gke.md says how to install it"
else
  mkdir -p build/launch
  manifest >"$file"
fi
[ -z "$replace" ] || run "${kubectl[@]}" delete jobset "$name" --ignore-not-found --wait
run "${kubectl[@]}" create --filename="$file"
if [ -z "$DRY_RUN" ]; then
  say "submitted. How it stands:  $(quote "${kubectl[@]}" get jobset "$name")"
  first=jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0
  first+=,batch.kubernetes.io/job-completion-index=0
  say "What it says:  $(quote "${kubectl[@]}" logs --follow --selector="$first")"
fi
