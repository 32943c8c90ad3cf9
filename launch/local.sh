#!/usr/bin/env bash
# Trains on one machine, on all its accelerators; starts again where it was told to stop.
# Usage: bash launch/local.sh [--dry-run] --data FOLDER --out FOLDER [--config FILE]
#          [--max-restarts 20] [--config.FIELD=VALUE ...]
#   EXTRAS=tpu or EXTRAS=cuda installs jax for that hardware. Secrets (HF_TOKEN) are inherited from
#   the environment. Ctrl-C and SIGTERM save and stop; the same command goes on.
#   Ends with 0 finished, 1 stopped for good, 2 bad input, 75 stopped before its end.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/_launch.sh
. "$checkout/launch/_launch.sh"
# shellcheck source=launch/_venv.sh
. "$checkout/launch/_venv.sh"

config='' data='' out='' max_restarts=20 dry_run=
parse_options "--config --data --out --max-restarts" "--dry-run" "$@"
DRY_RUN=$dry_run
check_given --data "$data" "the folder that \`dmpo prepare\` filled"
check_given --out "$out" "the folder of the run"
check_number --max-restarts "$max_restarts" 0
[ -n "$DRY_RUN" ] || [ -d "$data" ] || refuse "--data: $data is not a folder; run \`dmpo prepare\`"

extras=${EXTRAS:+[$EXTRAS]}
if [ -n "$DRY_RUN" ]; then
  (cd "$checkout" && make_venv "$extras") | sed 's/^/# /'
else
  (cd "$checkout" && make_venv "$extras")
fi
command=("$checkout/.venv/bin/dmpo" train ${config:+--config "$config"} --data "$data" --out "$out"
  ${overrides[@]+"${overrides[@]}"})

if [ -n "$DRY_RUN" ]; then
  run "${command[@]}"
  remark "again, at most $max_restarts times, as long as it ends with $AGAIN"
  exit
fi

child='' signals=0
trap 'signals=$((signals + 1)); [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
restarts=0
while :; do
  # In the background, so that the trap runs at once and the command has the time to save.
  "${command[@]}" &
  child=$!
  while :; do
    before=$signals status=0
    wait "$child" || status=$?
    [ "$signals" -ne "$before" ] || break # else a signal broke the wait off, and not the end
  done
  if [ "$status" -ne "$AGAIN" ] || [ "$signals" -gt 0 ]; then break; fi
  if [ "$restarts" -ge "$max_restarts" ]; then
    say "gave up after $max_restarts restarts"
    break
  fi
  restarts=$((restarts + 1))
  say "stopped and saved; goes on (restart $restarts of $max_restarts)"
done
[ "$status" -eq "$FINISHED" ] || say "$(explain "$status")"
exit "$status"
