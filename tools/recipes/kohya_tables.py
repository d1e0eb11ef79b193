"""What the settings of kohya's sd-scripts, and of the kohya_ss GUI around it, are here.

Their names and defaults are those of sd-scripts 0.10. What several settings decide together is in `TOGETHER`, and done
in kohya.py.
"""

from __future__ import annotations

from tools.recipes.recipe import Rule, same, square

# Settings with the same name and meaning. Some are not in every version of this project; they are then named.
SAME = same(
    # data and captions
    "caption_extension shuffle_caption caption_separator keep_tokens keep_tokens_separator secondary_separator "
    "enable_wildcard caption_prefix caption_suffix caption_dropout_rate caption_dropout_every_n_epochs "
    "caption_tag_dropout_rate token_warmup_min token_warmup_step flip_aug random_crop "
    "enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale "
    "masked_loss conditioning_data_dir alpha_mask prior_loss_weight cache_latents "
    # loss and noise
    "loss_type huber_schedule huber_c huber_scale min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss "
    "debiased_estimation_loss noise_offset adaptive_noise_scale multires_noise_iterations multires_noise_discount "
    "ip_noise_gamma zero_terminal_snr min_timestep max_timestep "
    # rates and length
    "train_batch_size gradient_accumulation_steps gradient_checkpointing scale_weight_norms "
    "lr_scheduler_num_cycles lr_scheduler_power "
    # validation and images while training
    "validation_split validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps "
    "sample_every_n_steps sample_every_n_epochs sample_at_first "
    # the LoRA's file
    "output_name save_model_as save_precision no_metadata training_comment metadata_title metadata_author "
    "metadata_description metadata_license metadata_tags metadata_usage_hint metadata_trigger_phrase "
    "metadata_thumbnail"
)

RULES = (
    Rule("vae", "vae_ckpt_path"),
    Rule("output_dir", "output_path"),
    Rule("network_weights", "lora_init_path"),
    Rule("resolution", "image_size", square),
    Rule("dataset_repeats", "num_repeats"),
    Rule("cache_text_encoder_outputs", "cache_text"),
    Rule("seed", "seed", note="the same number draws other noise here than in PyTorch"),
)

# Settings that are read together, for docs/recipes.md: their names, ours, and what is done.
TOGETHER = (
    (
        "network_module network_args LoRA_type LyCORIS_preset algo dora_wd",
        "use_lora lora_targets algo",
        "`networks.lora` trains attention, feed-forward and projections of the UNet's transformers, and attention and "
        "MLP of the text encoder. `conv_dim` and `lycoris.kohya` add the residual blocks and the resampling",
    ),
    ("network_dim", "lora_rank", "left out: 4"),
    (
        "network_dropout dropout",
        "lora_dropout",
        "there outputs of the down matrix are dropped, of LyCORIS those of the update, here inputs of the layer. "
        "`dropout` is LyCORIS's, and wins",
    ),
    (
        "rank_dropout rs_lora loraplus_lr_ratio",
        "rank_dropout rs_lora loraplus_lr_ratio",
        "what differs is named: the dropout of `networks.lora` is drawn for each image and lifts what is kept; LyCORIS "
        "leaves out outputs, has LoRA+ for `lora_up` alone, and scales a whole LoKr",
    ),
    ("network_alpha", "lora_alpha", "left out: 1; 0 stands for network_dim"),
    (
        "conv_dim conv_alpha",
        "conv_dim conv_alpha",
        "of the 3x3 convolutions; written where they differ from those of the other layers",
    ),
    (
        "network_train_unet_only network_train_text_encoder_only",
        "lora_ft_unet lora_ft_text_encoder",
        "left out: both are trained. A rate of 0 trains nothing",
    ),
    ("learning_rate unet_lr text_encoder_lr", "start_learning_rate unet_lr text_encoder_lr", "left out: 2e-6"),
    (
        "optimizer_type optimizer optimizer_args use_8bit_adam use_lion_optimizer",
        "optim optimizer_args",
        "optimizers with a state in 8 bits, and paged ones, are their full ones. D-Adaptation is Prodigy. Adafactor "
        "has scale_parameter and relative_step unless they are off. Others are named, and AdamW is used",
    ),
    (
        "lr_scheduler lr_warmup_steps lr_warmup lr_scheduler_min_lr_ratio",
        "scheduler warmup_steps end_learning_rate",
        "the rate ends at 0 (polynomial: 1e-7), `constant` has no warm-up; lr_warmup is in per cent",
    ),
    (
        "max_train_epochs max_train_steps epoch",
        "epochs max_steps",
        "epochs win; left out: 1,600 steps. epoch counts in the GUI alone",
    ),
    ("max_grad_norm", "clip_grad max_grad_norm", "left out: 1; 0 turns it off"),
    (
        "save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_steps",
        "ckpt_save_interval step_mode ckpt_max_keep",
        "epochs win; a number of last epochs or steps becomes a number of checkpoints",
    ),
    ("mixed_precision", "precision", "left out: fp32; bf16 becomes auto"),
    ("pretrained_model_name_or_path", "pretrained_model_path", "a path, not a name on the Hub"),
    ("v2 v_parameterization", "model_config", "the three architectures"),
    ("train_data_dir dataset_config", "data_path", "dataset_config wins"),
    ("sample_prompts sample_sampler", "sample_prompts sample_sampler", "the GUI's text is a list of prompts"),
    ("log_with", "report_to", "tensorboard is written beside csv and html"),
    ("additional_parameters", "", "of the GUI: its flags are read as further settings"),
)

# The names of the GUI -> those of sd-scripts.
GUI_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "lora_network_weights": "network_weights",
    "LoRA_network_weights": "network_weights",
}

# Options of the networks, as network_args or as settings of the GUI -> here.
NETWORK_ARGS = same("factor use_tucker dora_wd rs_lora rank_dropout module_dropout loraplus_lr_ratio") + (
    Rule("use_cp", "use_tucker"),
    Rule("use_conv_cp", "use_tucker"),
)
OF_LYCORIS = ("factor", "use_tucker", "use_cp", "use_conv_cp", "dora_wd", "rs_lora")  # networks.lora reads none
PRODUCTS = ("loha", "lokr")  # kinds without up and down matrices

NO_COUNTERPART = {
    "blocks have no ranks and rates of their own, unless a lora_config gives them (docs/lora_toolbox.md)":
        "block_dims block_alphas conv_block_dims conv_block_alphas conv_dims conv_alphas down_lr_weight mid_lr_weight "
        "up_lr_weight block_lr_zero_threshold block_lr",
    "an option of LyCORIS that this project does not have":
        "decompose_both use_scalar rescaled constrain constraint block_size disable_conv_cp bypass_mode train_norm "
        "train_on_input unit wd_on_output full_matrix unbalanced_factorization rank_dropout_scale",
    "up matrices of the UNet and the text encoder have one ratio: give loraplus_lr_ratio":
        "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
    "give the rank of that file as lora_rank": "dim_from_weights",
    "merge it into the base model with tools/lora/lora_add.py, and train from that":
        "base_weights base_weights_multiplier",
    "the text encoder is used up to its last layer (SD 1.x) or its last but one (SD 2.x)": "clip_skip",
    "captions are cut to 77 tokens": "max_token_length",
    "captions have no weights": "weighted_captions",
    "colours are not changed": "color_aug",
    "images are cropped in the middle or at random": "face_crop_aug_range",
    "the strength of the noise is the same in every step":
        "noise_offset_random_strength ip_noise_gamma_random_strength",
    "parameters, gradients and the optimizer stay in fp32": "full_fp16 full_bf16 fp8_base fp8_base_unet",
    "the text encoder is trained to the end": "stop_text_encoder_training",
    "class images are subsets with is_reg = true in a dataset_config, or with_prior_preservation (docs/dreambooth.md)":
        "reg_data_dir",
    "name it as metadata_file of a subset in a dataset_config (docs/data.md)": "in_json",
    "a training state of accelerate cannot be read": "resume resume_from_huggingface",
    "the schedule has no such options": "lr_scheduler_type lr_scheduler_args lr_scheduler_timescale lr_decay_steps",
    "a run begins at its first step": "initial_epoch initial_step skip_until_initial_step",
    "files stay on this machine":
        "huggingface_* async_upload save_state_to_huggingface",
    "report_to has csv, html and tensorboard":
        "wandb_api_key wandb_run_name use_wandb log_tracker_name log_tracker_config log_prefix",
    "code of other projects is not loaded": "dataset_class",
    "tools/data/inspect_data.py shows the data": "debug_dataset",
    "checkpoints are written every ckpt_save_interval epochs or steps": "save_n_epoch_ratio",
    "masks are in conditioning_data_dir or the alpha channel": "mask_loss_weight",
}  # fmt: skip

NOT_NEEDED = {
    "attention is computed in the best way of the device": "xformers sdpa mem_eff_attn attn_mode split_attn",
    "every run compiles its graph": "torch_compile dynamo_*",
    "memory is kept low where it costs no time": "lowram highvram lowvram cpu_offload_checkpointing vae_batch_size",
    "images are loaded by num_workers threads": "max_data_loader_n_workers persistent_data_loader_workers",
    "latents and text embeddings are kept on disk":
        "cache_latents_to_disk cache_text_encoder_outputs_to_disk cache_info skip_cache_check",
    "the VAE computes in fp32": "no_half_vae",
    "every checkpoint has a training state":
        "save_state save_state_on_train_end save_last_n_epochs_state save_last_n_steps_state",
    "logs are in output_path": "logging_dir log_config",
    "the tokenizer is part of this project": "tokenizer_cache_dir no_token_padding",
    "several devices: use_parallel with msrun (docs/parallel.md)":
        "num_processes num_machines num_cpu_threads_per_process gpu_ids multi_gpu main_process_port "
        "extra_accelerate_launch_args ddp_* deepspeed zero_stage offload_*",
    "it is for SDXL, SD3, Flux or other models":
        "sdxl_* sd3_* flux1_* flux_* lumina_* ae clip_l clip_g t5xxl* discrete_flow_shift guidance_scale "
        "model_prediction_type timestep_sampling sigmoid_scale split_mode split_qkv train_blocks "
        "logit_mean logit_std mode_scale weighting_scheme blocks_to_swap* double_blocks_to_swap single_blocks_to_swap "
        "text_encoder_batch_size disable_mmap_load_safetensors fused_backward_pass fused_optimizer_groups "
        "apply_t5_attn_mask in_dims img_attn_dim img_mlp_dim img_mod_dim single_dim single_mod_dim txt_attn_dim "
        "txt_mlp_dim txt_mod_dim mem_eff_save cpu_offload_checkpointing save_clip save_t5xxl t5xxl_* "
        "caption_tokens_max",
    "it is a switch of the GUI":
        "model_list save_as_bool use_safetensors noise_offset_type config_file output_config save_model_as_bool "
        "gui_version full_path stop_training",
}  # fmt: skip

# Values by which a setting without a counterpart asks for nothing.
OFF_VALUES = {
    "clip_skip": (1,),
    "max_token_length": (75,),
    "unit": (1,),
    "train_on_input": (True,),
    "base_weights_multiplier": (1.0, 1),
    "dynamo_backend": ("no",),
    "block_lr_zero_threshold": ("0.0",),
}
