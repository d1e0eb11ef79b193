#!/usr/bin/env bash
# Train a LoRA on two hosts with 8 cards each, data parallel. Call it on both, with the same MASTER_ADDR:
#
#   MASTER_ADDR=10.0.0.1 NODE_RANK=0 bash scripts/train_lora_2hosts.sh      # on the host with this address
#   MASTER_ADDR=10.0.0.1 NODE_RANK=1 bash scripts/train_lora_2hosts.sh      # on the other
#
# docs/parallel.md tries it out on the CPU of one machine: VERSION=nano DEVICE_TARGET=CPU PROCESSES=2.
#
# Both hosts need the project, the data and the base model under the same paths. The first process, on host 0, writes the
# checkpoints. scripts/environment.sh explains the other variables.
#
#   MASTER_ADDR       address of host 0, which the other host can reach
#   NODE_RANK         number of this host: 0 or 1
#   HOSTS             number of hosts
#   PROCESSES         cards of each host, each with a process
#   MASTER_PORT       port of host 0 at which the processes find each other; it must be open
#   CLUSTER_TIMEOUT   seconds within which all processes must have started
#   LOGS              folder for the output of each process of this host
#   HCCL_IF_IP, HCCL_SOCKET_IFNAME   HCCL: address or name of this host's network card, if it takes a wrong one

if [ -z "${MASTER_ADDR:-}" ] || [ -z "${NODE_RANK:-}" ]; then
    echo "error: set MASTER_ADDR to the address of host 0, and NODE_RANK to this host's number, 0 or 1" >&2
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

HOSTS=${HOSTS:-2}
PROCESSES=${PROCESSES:-8}
exec msrun --worker_num "$((HOSTS * PROCESSES))" --local_worker_num "$PROCESSES" --node_rank "$NODE_RANK" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-8118}" --cluster_time_out "${CLUSTER_TIMEOUT:-600}" \
    --log_dir "${LOGS:-$OUTPUT_PATH-logs-host$NODE_RANK}" --join True \
    train_text_to_image.py --use_parallel True "${TRAINING[@]}" "$@"
