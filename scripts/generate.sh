#!/usr/bin/env bash
# Generate images with the LoRA that a training script here wrote.
#
#   bash scripts/generate.sh --prompt "a drawing of a blue dragon"
#   VERSION=2.1 bash scripts/generate.sh --data_path datasets/chinese_art_blip/test/prompts.txt --scale 4.0
#
# scripts/environment.sh explains the other variables.
#
#   LORA              LoRA to apply; empty for none

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

LORA=${LORA-$OUTPUT_PATH/ckpt/lora.ckpt}
exec python text_to_image.py --version "$VERSION" --ckpt_path "$CHECKPOINT" ${LORA:+--lora_ckpt_path "$LORA"} \
    --output_path "$OUTPUT_PATH-images" --device_target "$DEVICE_TARGET" "$@"
