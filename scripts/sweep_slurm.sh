#!/usr/bin/env bash
#SBATCH --job-name=lm-eval-bh
#SBATCH --array=1-4
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=08:00:00
#SBATCH --output=sweep-%A-%a.log
#
# A sweep as a job array: every job takes every n-th experiment and loads the model once.
#
#   sbatch scripts/sweep_slurm.sh --preset full --output-dir runs/olmoe
#   sbatch --array=1-16 scripts/sweep_slurm.sh --config sweep.yaml --output-dir runs/olmoe
#
# --output-dir must be on storage that all nodes see. Submit the same line again to run what is missing, for
# example after a time limit; then run: lm-eval-bh aggregate runs/olmoe
set -euo pipefail

: "${SLURM_ARRAY_TASK_ID:?Submit it as a job array: sbatch scripts/sweep_slurm.sh --preset full --output-dir runs/olmoe}"
# The ids of an array need not begin at one, but must have no gaps: --array=1-4 or 0-3, not 1,3.
if ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != SLURM_ARRAY_TASK_COUNT)); then
    echo "The array skips ids, so their experiments would not run: submit it with --array=1-N." >&2
    exit 2
fi
index=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))
exec lm-eval-bh sweep "$@" --shard "$index/$SLURM_ARRAY_TASK_COUNT"
