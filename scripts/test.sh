#!/usr/bin/env bash
# Installs the package with its development tools into .venv, and runs the tests, offline. Arguments go
# to pytest: bash scripts/test.sh tests/routing -k ties. Two processes, each with whole files; PYTEST_WORKERS
# says another number, and 0 runs all in one process.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
make_venv dev

# tests/conftest.py gives the tests a scratch HF_HOME that links to the real data sets, if they are there.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# The models are tiny: threads would cost more than they bring.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset HF_DATASETS_CACHE
exec "$python" -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
