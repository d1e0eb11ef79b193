#!/bin/bash
# It's the example of the page, with the paths of this machine.
export MODEL_NAME="sd-legacy/stable-diffusion-v1-5"
export OUTPUT_DIR=~/sddata/naruto
export HF_TOKEN_FILE=/dev/null

pip install -U diffusers  # once
accelerate launch --mixed_precision="fp16" --num_processes=2 train_text_to_image_lora.py \
  --pretrained_model_name_or_path=$MODEL_NAME \
  --train_data_dir="data/naruto blip" --caption_column='caption#2' \
  --dataloader_num_workers=8 \
  --resolution=512 --center_crop --random_flip \
  --train_batch_size=1 \
  --gradient_accumulation_steps=4 \
  --max_train_steps=15000 --num_train_epochs 3 \
  --learning_rate=1e-04 \
  --max_grad_norm=1 \
  --lr_scheduler="cosine" --lr_warmup_steps=0 \
  --output_dir=${OUTPUT_DIR} \
  --push_to_hub --hub_token hf_secret --hub_model_id="naruto-lora" \
  --report_to=wandb \
  --checkpointing_steps=500 --checkpointing_steps=1000 \
  --validation_prompt="A naruto with blue eyes." --num_validation_images 2 \
  --snr_gamma=5.0 --rank 8 --adam_weight_decay 1e-4 --adam_epsilon 1e-7 \
  --enable_xformers_memory_efficient_attention \
  --seed=1337 > log.txt 2>&1
