#!/usr/bin/env bash
# sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh .venv/bin/python MaxText/train.py CONFIG.yml run_name=first
# One process per node; JAX finds them by Slurm's own variables. The tree and base_output_directory must be shared.
#SBATCH --job-name=pythonlm
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail

(($#)) || { echo "usage: sbatch [options] $0 COMMAND [ARGUMENT ...]" >&2; exit 2; }
echo "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on ${SLURM_JOB_NUM_NODES:-?} node(s)"

# --signal: 300 s before the time limit training is asked to save. --wait: when one process has ended, the others have
# as long to end by themselves.
srun --label --wait=300 "$@"
code=$?
# srun's code is the highest of all: 128 + n where a process was ended by signal n, as when memory runs out, and where
# the others, who have lost it, abort.
if ((code == 75)); then
  why="interrupted and saved"
elif ((code > 128)); then
  why="ended by signal $((code - 128))"
else
  exit $code
fi
if ((${SLURM_RESTART_COUNT:-0} < 100)); then
  echo "$why: queued again"
  scontrol requeue "$SLURM_JOB_ID"
else
  echo "$why, for the 101st time: not queued again; sbatch with the same command goes on"
fi
exit $code
