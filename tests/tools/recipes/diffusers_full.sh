!python train_text_to_image.py --pretrained_model_name_or_path=models/sd21 --dataset_name=lambdalabs/pokemon-blip-captions --use_ema --input_perturbation=0.1 --lr_scheduler=polynomial
