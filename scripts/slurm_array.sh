#!/bin/bash
# The runs of a study as independent jobs, each on one machine with all of its devices. How many there are, and their numbers, says --list:
#
#     study="pretraining --config configs/gta5_eva02.py --workdir runs/pretraining"
#     python -m jaxdg.studies.$study --list
#     sbatch --array=0-19 scripts/slurm_array.sh $study
#     python -m jaxdg.studies.$study --collect          # at any time: study.json of what is finished
#
# Activate the environment before, or in this file. A job that is preempted or out of time saves, is queued again and goes on.
#SBATCH --job-name=jaxdg-study
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
set -euo pipefail

python -m "jaxdg.studies.$1" "${@:2}" --run "$SLURM_ARRAY_TASK_ID" &
trap 'kill -TERM $!; wait $!; scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"; exit' TERM
wait $!
