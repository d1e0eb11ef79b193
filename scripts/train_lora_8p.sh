#!/usr/bin/env bash
# Train a LoRA on the 8 cards of one host, data parallel. The batch size of the recipe is that of each card.
#
#   bash scripts/train_lora_8p.sh                                     # SD1.5 on pokemon
#   VERSION=2.1 bash scripts/train_lora_8p.sh                         # SD2.1 on Chinese art
#   PROCESSES=2 ASCEND_RT_VISIBLE_DEVICES=4,5 bash scripts/train_lora_8p.sh
#
# The first process prints; the output of all is in the folder LOGS. scripts/environment.sh explains the other variables.
#
#   PROCESSES         cards, each with a process
#   MASTER_PORT       port at which the processes find each other; another one for each run on a host
#   LOGS              folder for the output of each process

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

PROCESSES=${PROCESSES:-8}
exec msrun --worker_num "$PROCESSES" --local_worker_num "$PROCESSES" --master_port "${MASTER_PORT:-8118}" \
    --log_dir "${LOGS:-$OUTPUT_PATH-logs}" --join True \
    train_text_to_image.py --use_parallel True "${TRAINING[@]}" "$@"
