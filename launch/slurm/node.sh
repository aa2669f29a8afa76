#!/usr/bin/env bash
# One node's share of a phase, started once on every node by train.sbatch: `node.sh launch/phaseN.py [argument …]`.
set -euo pipefail

: "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}" "${MASTER_PORT:=29500}"
: "${MASTER_ADDR:?is the first node, which train.sbatch sets}"
# How long the launcher waits for its ranks to save, in seconds, after it was asked to end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

launcher=
# The launcher has no handler for USR1 and would die of it, so it is told to ignore it, and its ranks, which save and
# end, get the signal from here.
# shellcheck disable=SC2329 # a trap calls it
tell_the_ranks() {
  local children
  children=$(cat /proc/"$launcher"/task/*/children 2>/dev/null) || true
  # shellcheck disable=SC2086 # one word each
  [ -z "$children" ] || kill -USR1 $children 2>/dev/null || true
}

trap '' USR1
accelerate launch --config_file "${ACCELERATE_CONFIG:-launch/accelerate/nodes.yaml}" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS_PER_NODE))" \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@" &
launcher=$!
trap tell_the_ranks USR1 TERM

# `wait` also ends when a trap has run; asked once more, it gives the child's own status.
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done
wait "$launcher"
