#!/usr/bin/env bash
# Installs the package with its development tools into .venv, and runs the tests, offline. Arguments go
# to pytest: bash scripts/test.sh tests/routing -k ties. PYTEST_WORKERS sets the number of processes, each
# of which takes whole files, the slowest first (tests/conftest.py); the default is 2, and 0 runs everything in one
# process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv dev

# tests/conftest.py gives the tests a scratch HF_HOME, with links to the real data sets if there are any.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: threads cost more than they save.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset HF_DATASETS_CACHE
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
