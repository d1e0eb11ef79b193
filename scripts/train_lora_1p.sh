#!/usr/bin/env bash
# Train a LoRA on one card: both published recipes, by VERSION.
#
#   bash scripts/train_lora_1p.sh                                     # SD1.5 on pokemon, card 0
#   VERSION=2.1 DEVICE_ID=3 bash scripts/train_lora_1p.sh             # SD2.1 on Chinese art, card 3
#   VERSION=nano DEVICE_TARGET=CPU bash scripts/train_lora_1p.sh      # the small model, without a card
#
# scripts/environment.sh explains the variables.

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec python train_text_to_image.py "${TRAINING[@]}" "$@"
