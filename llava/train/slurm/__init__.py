"""Slurm: a training on all nodes of a job, and scripts for ``sbatch``."""
