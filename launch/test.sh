#!/usr/bin/env bash
# All checks on a fresh machine: makes .venv with the test extra, runs lint, doctests and the suite.
# Usage: bash launch/test.sh [--dry-run] [pytest arguments, e.g. -m "not slow" or -k losses]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_venv.sh
. launch/_venv.sh

DRY_RUN=
if [ "${1:-}" = "--dry-run" ]; then
  DRY_RUN=1
  shift
fi
make_venv "[test]"
run() {
  if [ -n "$DRY_RUN" ]; then echo "would run: $*"; else "$@"; fi
}
run .venv/bin/ruff check .
run .venv/bin/ruff format --check .
run .venv/bin/shellcheck -x launch/*.sh launch/slurm.sbatch .ci/run
# No network, and no warnings about it: everything the tests need is installed or in the tree.
export HF_HUB_OFFLINE=1 JAX_PLATFORMS=cpu
run .venv/bin/python -m pytest "$@"
