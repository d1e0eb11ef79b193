"""Keys of whole checkpoints that have no use here and do no harm: what training, merging and other programs leave."""

from __future__ import annotations

import re

from ldm.weights.names.tables import Ignored

# Pattern of a whole key -> what it is. They hold for every family of names; a key that is not here and has no place is
# unknown, and the checkpoint is refused.
_TABLE = {
    # OpenCLIP's own (cond_stage_model.model.) stand in ldm.weights.names.compvis: published files keep them.
    r"cond_stage_model\.(transformer\.)?(text_model\.)?(logit_scale|text_projection(\.weight|\.bias)?)":
        "text projection and scale of CLIP",
    r"text_encoder/(logit_scale|text_projection\.(weight|bias))": "text projection and scale of CLIP",
    r"(cond_stage_model\.(transformer\.)?|text_encoder/)(vision_model|visual_projection)\..+": "image tower of CLIP",
    r"(cond_stage_model\.transformer\.|text_encoder/).*embeddings\.position_ids": "position numbers",
    r"(first_stage_model\.|cond_stage_model\.|vae/)?model_ema\..+": "EMA copy",
    r"(first_stage_model\.|vae/)?loss\.(logvar|discriminator\.|perceptual_loss\.).*": "losses of the VAE's training",
    r"(model\.)?(denoiser|model_sampling)\.\w+|(log_)?sigmas|logvar|lvlb_weights|scale_factor": "noise schedule",
    r"embedding_manager\..+": "a textual inversion's own words, which are not used",
    r"global_step|epoch|iteration|num_updates|pytorch-lightning_version|ema_decay|learning_rate|loss_scale|scale_sense":
        "counters of training",
    r"(beta[12]_power|epoch_num|step_num|current_iterator_step|last_overflow_iterator_step)": "counters of training",
    r"(optimizer|optimizers|optimizer_states|lr_schedulers|callbacks|loops|hyper_parameters)\..+": "training state",
    r"(moment[12]|moments|adam_[mv]|accum)\..+": "training state",
    r"(checkpoint_merge|sd_merge|modelspec|ss)[_.].*": "notes of other programs",
}  # fmt: skip
_PATTERNS = [(re.compile(pattern), reason) for pattern, reason in _TABLE.items()]


def find_unused(name: str) -> Ignored | None:
    """What a key without use is; None for one that is unknown or has a place."""
    return next((Ignored(reason) for pattern, reason in _PATTERNS if pattern.fullmatch(name)), None)
