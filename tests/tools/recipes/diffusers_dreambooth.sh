accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path=models/sd15 \
  --instance_data_dir=dog --output_dir=trained \
  --train_text_encoder --use_8bit_adam \
  --with_prior_preservation --class_data_dir=class_dog --class_prompt="a photo of dog" \
  --instance_prompt="a photo of sks dog" --lr_scheduler=constant --scale_lr --mixed_precision bf16
