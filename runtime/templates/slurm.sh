#!/usr/bin/env bash
# Train on several nodes under Slurm: one torchrun per node, one rank per GPU.
#
#   sbatch --nodes 4 slurm.sh config.yaml
#
# `parallel.data * parallel.context` in the configuration must be nodes * GPUs per node. Checkpoints, data and model
# must lie where all nodes see them. When a node fails the job is queued again and goes on from the newest complete
# checkpoint; restarts within a job (max_restarts) are for one node only.
#SBATCH --job-name sparsering
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail

config=${1:?usage: sbatch slurm.sh config.yaml}
gpus=${SLURM_GPUS_ON_NODE:-8}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Refuse a wrong configuration, plan, model or data folder before any node works.
sparsering train "$config" --dry-run

export PYTHONSAFEPATH=1 TORCH_CPP_LOG_LEVEL=ERROR OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m sparsering.runtime.train "$config"
