"""Keys that training, merging and other programs leave in checkpoints, and that are not used."""

from __future__ import annotations

import re

from ldm.weights.names.tables import Ignored

# Pattern of a whole key -> what it is, for all families of names. A checkpoint with a key that is neither here nor
# in the table of its family is refused. OpenCLIP's own keys (cond_stage_model.model.) are in compvis.py, since
# published files keep them.
_TABLE = {
    r"cond_stage_model\.(transformer\.)?(text_model\.)?(logit_scale|text_projection(\.weight|\.bias)?)":
        "text projection and scale of CLIP",
    r"text_encoder/(logit_scale|text_projection\.(weight|bias))": "text projection and scale of CLIP",
    r"(cond_stage_model\.(transformer\.)?|text_encoder/)(vision_model|visual_projection)\..+": "image tower of CLIP",
    r"(cond_stage_model\.transformer\.|text_encoder/).*embeddings\.position_ids": "position numbers",
    r"(first_stage_model\.|cond_stage_model\.|vae/)?model_ema\..+": "EMA copy",
    r"(first_stage_model\.|vae/)?loss\.(logvar|discriminator\.|perceptual_loss\.).*": "losses of the VAE's training",
    r"(model\.)?(denoiser|model_sampling)\.\w+|(log_)?sigmas|logvar|lvlb_weights|scale_factor": "noise schedule",
    r"embedding_manager\..+": "tokens of a textual inversion, which are not used",
    r"global_step|epoch|iteration|num_updates|pytorch-lightning_version|ema_decay|learning_rate|loss_scale|scale_sense":
        "counters of training",
    r"(beta[12]_power|epoch_num|step_num|current_iterator_step|last_overflow_iterator_step)": "counters of training",
    r"(optimizer|optimizers|optimizer_states|lr_schedulers|callbacks|loops|hyper_parameters)\..+": "training state",
    r"(moment[12]|moments|adam_[mv]|accum)\..+": "training state",
    r"(checkpoint_merge|sd_merge|modelspec|ss)[_.].*": "notes of other programs",
}  # fmt: skip
_PATTERNS = [(re.compile(pattern), Ignored(reason)) for pattern, reason in _TABLE.items()]


def find_unused(key: str) -> Ignored | None:
    """Return why `key` is not used. None if it has to be in the table of its family."""
    return next((ignored for pattern, ignored in _PATTERNS if pattern.fullmatch(key)), None)
