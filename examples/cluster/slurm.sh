#!/usr/bin/env bash
# One index by eight jobs of a SLURM array: each takes every eighth shard. Submit it with
#     MODEL=./my-model DATA=facts.jsonl INDEX=runs/facts sbatch slurm.sh
# A job that is killed or preempted is simply submitted again: finished shards are kept. When all have ended,
#     gradsketch verify "$INDEX"
# says whether every row is there.
#SBATCH --job-name=gradsketch
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail

exec gradsketch index "$INDEX" --model "$MODEL" --data "$DATA" \
	--worker "$SLURM_ARRAY_TASK_ID" "$SLURM_ARRAY_TASK_COUNT"
