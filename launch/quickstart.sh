#!/usr/bin/env bash
# Main job on a fresh machine: makes .venv, installs the package, runs the demo in runs/demo.
# Usage: bash launch/quickstart.sh [--dry-run] [--config.FIELD=VALUE ...]
#   EXTRAS=tpu or EXTRAS=cuda installs jax for that hardware; OUT=folder changes where it writes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_venv.sh
. launch/_venv.sh

DRY_RUN=
if [ "${1:-}" = "--dry-run" ]; then
  DRY_RUN=1
  shift
fi
make_venv "${EXTRAS:+[$EXTRAS]}"
command=(.venv/bin/dmpo demo --out "${OUT:-runs/demo}" "$@")
if [ -n "$DRY_RUN" ]; then
  echo "would run: ${command[*]}"
  exit
fi
exec "${command[@]}"
