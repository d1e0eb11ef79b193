"""What the settings of OneTrainer's JSON are here, with its defaults. Names in sections are written with dots.

What several settings decide together is in `TOGETHER`, and done in onetrainer.py.
"""

from __future__ import annotations

from typing import Any

from tools.recipes.recipe import (
    UNET_ATTENTION,
    UNET_FEED_FORWARD,
    UNET_OTHERS,
    UNET_RESIDUAL,
    UNET_TRANSFORMER,
    Rule,
    as_number,
    square,
)

PROJECT = "OneTrainer"
MAX_DEPTH = 8  # of sections in sections
SIGNS = ("training_method", "model_type", "base_model_name", "learning_rate_scheduler", "output_model_destination")

MODELS = {
    "STABLE_DIFFUSION_15": "configs/v1-inference.yaml",
    "STABLE_DIFFUSION_20": "configs/v2-vpred-inference.yaml",
    "STABLE_DIFFUSION_20_BASE": "configs/v2-inference.yaml",
    "STABLE_DIFFUSION_21": "configs/v2-vpred-inference.yaml",
    "STABLE_DIFFUSION_21_BASE": "configs/v2-inference.yaml",
}
# A layer filter, or the preset that stands for one -> layers of the UNet. The text encoder's linear layers are all
# trained where it is trained.
FILTERS = {
    "": (*UNET_TRANSFORMER, *UNET_RESIDUAL, *UNET_OTHERS),
    "full": (*UNET_TRANSFORMER, *UNET_RESIDUAL, *UNET_OTHERS),
    "attentions": UNET_TRANSFORMER,
    "attn-mlp": UNET_TRANSFORMER,
    "attn1,attn2,ff": (*UNET_ATTENTION, *UNET_FEED_FORWARD),
    "attn": UNET_ATTENTION,
    "attn-only": UNET_ATTENTION,
}
SCHEDULERS = {
    "CONSTANT": ("constant", ""),
    "LINEAR": ("linear", ""),
    "COSINE": ("cosine", ""),
    "COSINE_WITH_HARD_RESTARTS": ("cosine_with_restarts", ""),
    "COSINE_WITH_RESTARTS": ("cosine_with_restarts", "there the rate also rises along a cosine, here it jumps back"),
}
OPTIMIZERS = {
    "ADAMW": ("adamw", ""),
    "ADAMW_8BIT": ("adamw", "its state has 32 bits here"),
    "ADAM": ("adamw", "the weight decay is not part of the gradient here"),
    "ADAM_8BIT": ("adamw", "its state has 32 bits, and the weight decay is not part of the gradient here"),
    "LION": ("lion", ""),
    "LION_8BIT": ("lion", "its state has 32 bits here"),
    "ADAFACTOR": ("adafactor", ""),
    "SCHEDULE_FREE_ADAMW": ("adamwschedulefree", ""),
    "PRODIGY": ("prodigy", ""),
}
PRECISIONS = {
    "FLOAT_16": ("fp16", ""),
    "FLOAT_32": ("fp32", ""),
    "TFLOAT_32": ("fp32", "there products are rounded to 10 bits"),
    "BFLOAT_16": ("auto", "fp16 on Ascend; on the CPU bf16 where its kernels multiply it, else fp32"),
}
SAVED_AS = {"SAFETENSORS": "safetensors", "KOHYA_LORA": "safetensors", "COMFY_LORA": "safetensors",
            "LEGACY_SAFETENSORS": "safetensors", "CKPT": "ckpt"}  # fmt: skip
SAVED_IN = {"FLOAT_32": "float", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}


def _timestep(share: Any) -> int:
    """Return the time step of a strength of the noise from 0 to 1."""
    return round(1000 * as_number(share, "noising_strength"))


RULES = (
    Rule("vae.model_name", "vae_ckpt_path"),
    Rule("workspace_dir", "output_path"),
    Rule("lora_model_name", "lora_init_path"),
    Rule("resolution", "image_size", square),
    Rule("lora_rank", "lora_rank"),
    Rule("lora_alpha", "lora_alpha"),
    Rule("unet.learning_rate", "unet_lr"),
    Rule("unet.gradient_checkpointing", "gradient_checkpointing"),
    Rule("text_encoder.dropout_probability", "caption_dropout"),
    Rule("epochs", "epochs"),
    Rule("batch_size", "train_batch_size"),
    Rule("gradient_accumulation_steps", "gradient_accumulation_steps"),
    Rule("learning_rate", "start_learning_rate"),
    Rule("image_caching", "cache_latents"),
    Rule("latent_caching", "cache_latents"),
    Rule("text_caching", "cache_text"),
    Rule("only_cache", "cache_only"),
    Rule("offset_noise_weight", "noise_offset"),
    Rule("perturbation_noise_weight", "ip_noise_gamma"),
    Rule("rescale_noise_scheduler_to_zero_terminal_snr", "zero_terminal_snr"),
    Rule("min_noising_strength", "min_timestep", _timestep),
    Rule("max_noising_strength", "max_timestep", _timestep),
    Rule("normalize_masked_area_loss", "normalize_masked_area_loss"),
    Rule("aspect_ratio_bucketing", "enable_bucket", note="the shapes of the buckets are sd-scripts', not OneTrainer's"),
    Rule("ema_decay", "ema_decay"),
    Rule("output_model_format", "save_model_as", lambda value: SAVED_AS.get(str(value), value)),
    Rule("output_dtype", "save_precision", lambda value: SAVED_IN.get(str(value), value)),
)
# Of a single concept.
CONCEPT_RULES = (
    Rule("path", "data_path"),
    Rule("image.enable_random_flip", "random_flip"),
    Rule("text.enable_tag_shuffling", "shuffle_caption"),
    Rule("text.tag_delimiter", "caption_separator"),
)
# Defaults that are not those here.
DEFAULTS = {
    "lora_rank": 16,
    "lora_alpha": 1.0,
    "start_learning_rate": 3e-6,
    "epochs": 100,
    "train_batch_size": 1,
    "image_size": 512,
    "gradient_checkpointing": True,
    "enable_bucket": True,
    "precision": "fp16",
}

TOGETHER = (
    ("base_model_name", "pretrained_model_path", "a path, not a name on the Hub"),
    ("model_type", "model_config", "SD 1.5, 2.0 and 2.1; others are an error"),
    ("training_method peft_type lora_decompose lokr_*", "use_lora algo dora_wd factor", "LORA, FINE_TUNE or EMBEDDING"),
    (
        "unet.train text_encoder.train text_encoder.learning_rate",
        "lora_ft_unet lora_ft_text_encoder text_encoder_lr",
        "left out: both are trained",
    ),
    ("layer_filter layer_filter_preset", "lora_targets", "all layers, attn-mlp, attn-only"),
    (
        "learning_rate_scheduler learning_rate_cycles learning_rate_min_factor",
        "scheduler lr_scheduler_num_cycles end_learning_rate",
        "the warm-up goes with all of them, as here",
    ),
    ("optimizer.*", "optim betas weight_decay optimizer_args", "left out: the optimizer's own, which are those here"),
    ("loss_weight_fn loss_weight_strength", "min_snr_gamma debiased_estimation_loss", "others are named"),
    ("mse_strength mae_strength", "loss_type", "one of them alone"),
    ("clip_grad_norm", "clip_grad max_grad_norm", "left out: 1"),
    ("ema", "use_ema", "OFF, or on"),
    (
        "masked_training unmasked_weight",
        "masked_loss unmasked_weight",
        "the masks must be given as conditioning_data_dir",
    ),
    ("train_dtype", "precision", "left out: fp16; bf16 becomes auto"),
    ("concepts.*", "data_path num_repeats random_flip ...", "one concept; several need a dataset_config"),
    ("samples.* sample_after sample_after_unit", "sample_prompts sample_every_n_...", "by steps or epochs"),
    ("save_every save_every_unit", "ckpt_save_interval step_mode", "by steps or epochs"),
    (
        "learning_rate_warmup_steps save_every sample_after gradient_accumulation_steps",
        "warmup_steps ckpt_save_interval sample_every_n_steps",
        "steps are batches there: divided by gradient_accumulation_steps. Warm-up left out: 200",
    ),
    (
        "embedding.* additional_embeddings.*",
        "placeholder_token initializer_token num_vectors",
        "`embedding` of EMBEDDING, or the only additional embedding beside a LoRA (pivotal tuning). More are named",
    ),
    (
        "embedding_learning_rate",
        "ti_lr start_learning_rate",
        "the rate of the token: the only one with EMBEDDING, ti_lr beside a LoRA",
    ),
    ("dropout_probability", "lora_dropout", "there outputs of the down matrix are dropped, here inputs of the layer"),
    ("output_model_destination", "output_name", "the name of the file"),
)

NO_COUNTERPART = {
    "the concepts are in another file: give --data_path": "concept_file_name",
    "the prompts are in another file: give --sample_prompts": "sample_definition_file_name",
    "time steps are drawn evenly from min_timestep to max_timestep":
        "timestep_distribution noising_weight noising_bias timestep_shift dynamic_timestep_shifting",
    "the loss has no such part": "log_cosh_strength huber_strength huber_delta vb_loss_strength",
    "the noise has no such form": "generalized_offset_noise cep_gamma",
    "the prediction is that of model_config": "force_v_prediction force_epsilon_prediction",
    "set the rate that results": "learning_rate_scaler",
    "the schedule is one of this project's": "custom_learning_rate_scheduler scheduler_params",
    "both networks are trained to the end":
        "unet.stop_training_after unet.stop_training_after_unit text_encoder.stop_training_after "
        "text_encoder.stop_training_after_unit",
    "the text encoder is used up to its last layer (SD 1.x) or its last but one (SD 2.x)": "text_encoder_layer_skip",
    "vectors may grow": "preserve_embedding_norm",
    "one token is learned: alone, or beside a LoRA": "additional_embeddings* embedding*",
    "the token is learned in every step": "text_encoder.train_embedding",
    "every mask counts in every step": "unmasked_probability",
    "images of the base model are given as class images (docs/dreambooth.md)": "masked_prior_preservation_weight",
    "the averages are updated in every step": "ema_update_step_interval",
    "convolutions pad with zeros": "force_circular_padding",
    "an option of LoRA that this project does not have":
        "lora_decompose_norm_epsilon lora_decompose_output_axis oft_* dora_oft bundle_additional_embeddings",
}  # fmt: skip

NOT_NEEDED = {
    "attention is computed in the best way of the device": "attention_mechanism",
    "every run compiles its graph": "compile",
    "the device has one type to compute in":
        "fallback_train_dtype enable_autocast_cache *.weight_dtype *_weight_dtype weight_dtype",
    "it is for other models or several GPUs":
        "prior.* transformer.* unconditional_transformer.* text_encoder_2* text_encoder_3* text_encoder_4* "
        "effnet_encoder.* decoder* quantization.* frames sample_video_format sample_audio_format multi_gpu "
        "device_indexes gradient_reduce_* fused_gradient_reduce async_gradient_* text_encoder_sequence_length "
        "custom_conditioning_image unet.attention_mask text_encoder.attention_mask *.guidance_scale",
    "memory is kept low where it costs no time":
        "*.offload_fraction *.activation_offloading async_offloading layer_offload_fraction enable_*_offloading "
        "temp_device train_device text_encoder.gradient_checkpointing vae.*",
    "images are loaded by num_workers threads": "caching_threads dataloader_threads prefetch_next_batch",
    "caches are under output_path and checked": "cache_dir clear_cache_before_training",
    "report.html and metrics.csv are written":
        "tensorboard* debug_mode debug_dir samples_to_tensorboard sample_image_format non_ema_sampling",
    "every checkpoint has a training state":
        "backup_* rolling_backup* continue_last_backup prevent_overwrites include_train_config save_skip_first "
        "save_filename_prefix",
    "validation is by validation_split or validation_data_path": "validation validate_after validate_after_unit",
    "it is of another optimizer": "optimizer.* optimizer_defaults.* optimizer_defaults",
    "it is a part of the GUI": "__version secrets.* cloud.* sample_skip_first *.include *.model_name *.uuid uuid",
    "the scaler follows the precision": "loss_scaler",
}  # fmt: skip

OFF_VALUES = {
    "timestep_distribution": ("UNIFORM",),
    "timestep_shift": (1.0, 1),
    "vb_loss_strength": (1.0, 1),
    "huber_delta": (1.0, 1),
    "learning_rate_scaler": ("NONE",),
    "unet.stop_training_after_unit": ("NEVER", "EPOCH"),
    "text_encoder.stop_training_after_unit": ("NEVER", "EPOCH"),
    "text_encoder.train_embedding": (True,),
    "text_encoder.guidance_scale": (1.0,),
    "loss_scaler": ("NONE",),
    "lora_decompose_norm_epsilon": (True,),
    "bundle_additional_embeddings": (True,),
}
# Values of a concept that ask for nothing.
ORDINARY = {
    "enabled": (True,),
    "balancing_strategy": ("REPEATS",),
    "image_variations": (1,),
    "text_variations": (1,),
    "loss_weight": (1.0, 1),
    "image.resolution_override": ("512",),
    "text.tag_dropout_mode": ("FULL",),
    "text.tag_dropout_special_tags_mode": ("NONE",),
    "text.caps_randomize_mode": ("capslock, title, first, random",),
}
# Values of an embedding that ask for nothing.
ORDINARY_TOKEN = {"train": (True,), "stop_training_after_unit": ("NEVER",)}
