# shellcheck shell=bash
# Sourced by the scripts beside it. make_venv EXTRAS: a virtual environment in .venv with this
# checkout installed; does nothing when setup.py has not changed since.

die() { echo "error: $*" >&2; exit 1; }

# Prints the first Python >= 3.11 that can make virtual environments.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    command -v "$candidate" >/dev/null 2>&1 || continue
    "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    echo "$candidate"
    return
  done
  die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3 bash $0"
}

make_venv() {
  local extras=$1 stamp=.venv/.dmpo_installed wanted python
  wanted="$extras $(cksum <setup.py)"
  if [ -f "$stamp" ] && grep -qxF -- "$wanted" "$stamp"; then return; fi
  if [ -n "${DRY_RUN:-}" ]; then
    echo "would make .venv and run: pip install -e '.$extras'"
    return
  fi
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "making .venv with $python"
    "$python" -m venv .venv || die "$python cannot make a virtual environment (python3-venv?)"
  fi
  echo "installing dmpo_jax$extras and what it needs"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extras" ||
    die "pip install failed; the messages above say why"
  echo "$wanted" >>"$stamp"
}
