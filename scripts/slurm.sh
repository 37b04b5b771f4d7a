#!/bin/bash
# A run under Slurm, one process a GPU. Submit it from the repository, on a file system that all nodes share:
#
#   sbatch --nodes=4 scripts/slurm.sh --config configs/gta5_eva02.py --workdir runs/gta5 --config.mesh.fsdp=8
#
# The processes find each other by Slurm's variables; docs/how-to/clusters.md says more. Submitted several times with --dependency=singleton,
# each job goes on where the one before was stopped, and those after the run's end print its results.
#SBATCH --job-name=jaxdg
#SBATCH --nodes=2
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is up all tasks get SIGTERM: the run saves and exits 0.
#SBATCH --signal=TERM@120

# No --gpus-per-task and no --gpu-bind: jax picks a task's GPU among all of its node. A task that fails ends the others at once.
exec srun --kill-on-bad-exit=1 --label python -u -m jaxdg.train --config.data.workers=10 "$@"
