"""A command line of diffusers' training scripts, with the defaults of each script."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ldm.errors import UserError
from tools.recipes import kohya
from tools.recipes.recipe import (
    ANOTHER_MEANING,
    KEEPS_ALL,
    NO_COUNTERPART,
    NOT_NEEDED,
    OFF,
    TEXT_ATTENTION,
    UNET_ATTENTION,
    Recipe,
    Rule,
    Written,
    as_number,
    fit_prodigy,
    is_off,
    is_true,
    same,
    shown,
    whole,
    write_base_model,
    write_schedule,
)
from tools.recipes.shell import VARIABLE, Command

PROJECT = "diffusers"


class Script(NamedTuple):
    """What a script trains and its defaults that differ between the scripts."""

    lora: bool
    rate: float
    batch: int
    epochs: int
    sample_epochs: int  # validation_epochs
    dreambooth: bool = False
    token: bool = False  # textual inversion
    steps: int | None = None


SCRIPTS = {
    "train_text_to_image_lora.py": Script(True, 1e-4, 16, 100, 1),
    "train_text_to_image.py": Script(False, 1e-4, 16, 100, 5),
    "train_dreambooth_lora.py": Script(True, 5e-4, 4, 1, 50, dreambooth=True),
    "train_dreambooth.py": Script(False, 5e-6, 4, 1, 50, dreambooth=True),
    "textual_inversion.py": Script(False, 1e-4, 16, 100, 50, token=True, steps=5000),
}
KOHYA_SCRIPTS = ("train_network.py", "train_db.py", "fine_tune.py")

SAME = same(
    "gradient_accumulation_steps gradient_checkpointing random_flip snr_gamma train_batch_size noise_offset "
    "caption_column max_grad_norm placeholder_token initializer_token num_vectors learnable_property "
    "with_prior_preservation instance_prompt class_data_dir class_prompt num_class_images prior_loss_weight "
    "sample_batch_size"
)
RULES = (
    Rule("vae_path", "vae_ckpt_path"),
    Rule("pretrained_vae_model_name_or_path", "vae_ckpt_path"),
    Rule("train_data_dir", "data_path"),
    Rule("instance_data_dir", "data_path"),
    Rule("output_dir", "output_path"),
    Rule("resolution", "image_size"),
    Rule("rank", "lora_rank"),
    Rule("lora_alpha", "lora_alpha"),
    Rule("lora_dropout", "lora_dropout"),
    Rule("checkpointing_steps", "ckpt_save_interval"),
    Rule("checkpoints_total_limit", "ckpt_max_keep"),
    Rule("input_perturbation", "ip_noise_gamma"),
    Rule("proportion_empty_prompts", "caption_dropout"),
    Rule("repeats", "num_repeats"),
    Rule("pre_compute_text_embeddings", "cache_text"),
    Rule("lr_num_cycles", "lr_scheduler_num_cycles"),
    Rule("lr_power", "lr_scheduler_power"),
    Rule("use_ema", "use_ema"),
    Rule("seed", "seed", note="the same number draws other noise here than in PyTorch"),
)

TOGETHER = (
    (
        "(the script)",
        "use_lora lora_targets",
        "to_q, to_k, to_v and to_out.0; alpha = rank, as here. `down` begins otherwise there, which is named",
    ),
    ("pretrained_model_name_or_path", "pretrained_model_path", "a path, not a name on the Hub"),
    (
        "snr_gamma prediction_type",
        "min_snr_gamma",
        "with v_prediction older scripts add one to the SNR, and train_dreambooth.py to the weight, which is named",
    ),
    (
        "learnable_property",
        "learnable_property random_flip num_repeats",
        "textual_inversion.py has other templates, reads no captions, mirrors half of the images and repeats them 100 "
        "times",
    ),
    ("train_text_encoder", "lora_ft_text_encoder", "q, k, v and out"),
    ("learning_rate scale_lr", "start_learning_rate", "left out: that of the script; scale_lr multiplies it"),
    (
        "lr_scheduler lr_warmup_steps",
        "scheduler warmup_steps end_learning_rate",
        "the rate ends at 0 (polynomial: 1e-7); `constant` has no warm-up; others, left out, 500 steps",
    ),
    ("num_train_epochs max_train_steps", "epochs max_steps", "steps win; left out: that of the script"),
    ("adam_beta1 adam_beta2 adam_weight_decay adam_epsilon", "betas weight_decay optimizer_args", ""),
    ("use_8bit_adam optimizer", "optim", "the state has 32 bits here"),
    ("center_crop", "random_crop", "left out: a random crop. textual_inversion.py then squashes images to a square"),
    (
        "with_prior_preservation num_train_epochs",
        "gradient_accumulation_steps max_grad_norm",
        "a batch of N has N images of the instance and N of the class there, and N of both here: twice as many batches "
        "in a step, and half of max_grad_norm, because the loss there is a sum of two means",
    ),
    (
        "validation_prompt validation_prompts num_validation_images validation_epochs validation_steps",
        "sample_prompts sample_every_n_epochs sample_every_n_steps",
        "one prompt for each image, with seeds from 0 on; steps are for textual_inversion.py",
    ),
    ("mixed_precision", "precision", "of the script, else of accelerate; bf16 becomes auto"),
    ("report_to", "report_to", "tensorboard is written beside csv and html"),
)

NO_COUNTERPART_NAMES = {
    "save the data set of the Hub with datasets' save_to_disk, and give the folder as data_path (docs/data.md)":
        "dataset_name dataset_config_name",
    "make a smaller data set": "max_train_samples",
    "the prediction is that of model_config": "prediction_type",
    "a training state of accelerate cannot be read": "resume_from_checkpoint",
    "the images' file names are in a column of other meaning": "image_column",
    "files stay on this machine": "push_to_hub hub_model_id hub_token hub_private_repo",
    "the UNet has no class labels": "class_labels_conditioning",
    "captions are cut to 77 tokens": "tokenizer_max_length",
    "the text encoder has no mask": "text_encoder_use_attention_mask",
    "images are resized with one filter": "image_interpolation_mode interpolation_type",
    "there is no DREAM": "dream_training dream_detail_preservation",
    "LoRA's layers are chosen by lora_targets": "lora_layers",
}  # fmt: skip

NOT_NEEDED_NAMES = {
    "attention is computed in the best way of the device":
        "enable_xformers_memory_efficient_attention enable_npu_flash_attention allow_tf32 set_grads_to_none",
    "the folder has one revision": "revision variant non_ema_revision tokenizer_name cache_dir offload_ema foreach_ema",
    "images are loaded by num_workers threads": "dataloader_num_workers",
    "logs are in output_path": "logging_dir tracker_project_name tracker_name",
    "several devices: use_parallel with msrun (docs/parallel.md)": "local_rank",
    "class images are drawn in the precision of the training": "prior_generation_precision",
    "every checkpoint has the LoRA, or the model":
        "snapshot_steps save_steps save_as_full_pipeline skip_save_text_encoder",
    "samples are made of prompts": "validation_images validation_scheduler validation_steps",
}  # fmt: skip
OFF_VALUES = {"image_column": ("image",), "local_rank": (-1,)}


def read(command: Command) -> Recipe:
    """Return the recipe of a command. Raises UserError for a script of another model."""
    if command.script in KOHYA_SCRIPTS:
        recipe = kohya.read(command.flags)
        return _named(recipe, command)
    if command.script not in SCRIPTS:
        raise UserError(
            f"{command.script[:80]} is not known: this tool reads the commands of "
            f"{', '.join((*SCRIPTS, *KOHYA_SCRIPTS))}, which train Stable Diffusion 1.x and 2.x"
        )
    script = SCRIPTS[command.script]
    recipe = Recipe(PROJECT, command.flags)
    recipe.given.add("(script)")
    _network(recipe, script, command.script)
    _rate(recipe, script)
    _length(recipe, script)
    _optimizer(recipe)
    _samples(recipe, script)
    _images(recipe, script)
    precision = recipe.take("mixed_precision", command.launcher.get("mixed_precision"))
    if precision is not None:
        recipe.given.add("mixed_precision")
        value, note = kohya.PRECISIONS.get(str(precision), (precision, ""))
        recipe.write("precision", value, "mixed_precision", precision, note)
    report = recipe.take("report_to")
    if report is not None:
        kept = ["csv", "html", "tensorboard"] if report in ("tensorboard", "all") else ["csv", "html"]
        note = "" if report == "tensorboard" else "here csv, html and tensorboard"
        recipe.write("report_to", kept, "report_to", report, note)
    write_base_model(recipe, "pretrained_model_name_or_path")
    recipe.take_rules((*SAME, *RULES))
    fit_prodigy(recipe)
    recipe.default("image_size", 512)
    recipe.default("train_batch_size", script.batch)
    recipe.default("clip_grad", not script.token)  # textual_inversion.py clips no gradients
    recipe.default("ckpt_save_interval", 500)
    recipe.default("step_mode", True, "diffusers counts steps between checkpoints")
    recipe.default("ckpt_max_keep", KEEPS_ALL, "left out there: diffusers keeps all of them")
    if script.dreambooth and "with_prior_preservation" in recipe.settings:
        recipe.default("num_class_images", 100)
    if _value(recipe, "with_prior_preservation"):
        _pairs(recipe)
    _differences(recipe, script, command.script)
    recipe.take_named(NO_COUNTERPART, NO_COUNTERPART_NAMES, OFF_VALUES)
    recipe.take_named(NOT_NEEDED, NOT_NEEDED_NAMES, OFF_VALUES)
    return _named(recipe, command)


def _named(recipe: Recipe, command: Command) -> Recipe:
    """Name the words beside the script's own flags, and the variables, which are not replaced."""
    recipe.finish()
    for name, value in command.repeated:
        recipe.name(NOT_NEEDED, name, value, "it is given again later, and that counts")
    for word in command.others:
        recipe.name(NO_COUNTERPART, shown("", word), "", "the word belongs to no flag")
    for name, value in command.launcher.items():
        if name not in recipe.given or name != "mixed_precision":
            recipe.given.add(f"--{name}")
            recipe.name(NOT_NEEDED, f"--{name}", value, "a flag of the launcher: for several devices, use_parallel")
    used = set()
    for name, entry in list(recipe.settings.items()):
        for match in VARIABLE.finditer(" ".join(entry.value) if isinstance(entry.value, list) else str(entry.value)):
            variable = match.group(1) or match.group(2) or match.group()
            used.add(variable)
            given = command.variables.get(variable)
            what = f"set it to {shown(variable, given)}" if given is not None else "set it"
            path = recipe.known[name].rules["path"] and match.group(1)
            way = f"{what} before the training, or write its value" if path else "write its value"
            recipe.name(ANOTHER_MEANING, name, entry.value, f"the variable {variable} is kept as text: {way}")
            note = f"{recipe.settings[name].comment} the variable {variable}: {way}".strip()
            recipe.settings[name] = entry._replace(note=note, given=None)
    for variable, given in command.variables.items():
        if variable not in used:
            recipe.given.add(variable)
            recipe.name(NOT_NEEDED, variable, given, "a variable that no setting here has")
    return recipe


def _value(recipe: Recipe, name: str) -> Any:
    """Return the value of a setting so far, with the default here where it is not written."""
    return recipe.settings[name].value if name in recipe.settings else recipe.known[name].default


def _images(recipe: Recipe, script: Script) -> None:
    """Write how images are cut. textual_inversion.py mirrors half of them and cuts none, but with center_crop."""
    crop = recipe.take("center_crop")
    if crop is not None and is_true(crop):
        recipe.write("random_crop", False, "center_crop", crop)
        return
    if not script.token:
        recipe.default("random_crop", True, "no center_crop there: the crop is random")
        return
    reason = "left out there: images are squashed to a square; here the middle is cut out. Square images are the same"
    recipe.name(ANOTHER_MEANING, "center_crop", "False" if crop is None else crop, reason)


def _pairs(recipe: Recipe) -> None:
    """Let a step have as many images as there, where each batch of N has N of the instance and N of the class."""
    for name, change, note in (
        (
            "gradient_accumulation_steps",
            lambda number: 2 * number,
            "twice as many batches in a step: there each has so many images of the instance, and as many of the class",
        ),
        (
            "max_grad_norm",
            lambda norm: norm / 2,
            "half: the loss there is the sum of two means, here the mean of all, and so are the gradients",
        ),
    ):
        if name == "max_grad_norm" and not _value(recipe, "clip_grad"):
            continue
        entry = recipe.settings.get(name)
        given = _value(recipe, name)
        theirs = entry.theirs if entry is not None and entry.theirs else "with_prior_preservation"
        recipe.settings[name] = Written(change(given), theirs, note, given)
        recipe.name(ANOTHER_MEANING, theirs, given, f"{name} {change(given):g}: {note}")
    if "epochs" in recipe.settings:
        reason = (
            "an epoch there has as many steps as the larger of the two sets asks for; here it has each image of the "
            "instance once, and as many of the class: set num_repeats, or max_steps"
        )
        recipe.name(
            ANOTHER_MEANING, recipe.settings["epochs"].theirs or "num_train_epochs", _value(recipe, "epochs"), reason
        )


def _differences(recipe: Recipe, script: Script, name: str) -> None:
    """Name what is different without a setting that says so."""
    if script.lora:
        rank = int(_value(recipe, "lora_rank"))
        # The standard deviations: 1 / rank there (PEFT's "gaussian"), 1 / sqrt(3 n) of n inputs here.
        least, most = (math.sqrt(3 * inputs) / rank for inputs in (320, 1280))
        if least > 1:
            effect = f"{least:.2g} to {most:.2g} times smaller here at rank {rank}: early steps move the weights less"
        elif most < 1:
            effect = f"{1 / most:.2g} to {1 / least:.2g} times larger here at rank {rank}: they move the weights more"
        else:
            effect = f"about as large at rank {rank}"
        reason = f"the down matrices begin as N(0, 1 / rank^2) there and as U(+-1 / sqrt(inputs)) here, {effect}"
        recipe.name(ANOTHER_MEANING, "(script)", name, reason)
    if script.token:
        recipe.default("random_flip", True, "textual_inversion.py mirrors half of the images")
        recipe.default("num_repeats", 100)
        reason = (
            "the templates are other texts than here, and captions are never read there; here captions with the token "
            "stay as they are, and others become templates: remove caption files"
        )
        recipe.name(ANOTHER_MEANING, "learnable_property", _value(recipe, "learnable_property"), reason)
    velocity = str(recipe.left.get("prediction_type", "")) == "v_prediction"
    if velocity and "min_snr_gamma" in recipe.settings:
        reason = (
            "with velocity older scripts of diffusers add one to the SNR before the minimum, and train_dreambooth.py "
            "to the weight; here it is min(SNR, gamma) / (SNR + 1), as in sd-scripts and newer scripts"
        )
        recipe.name(ANOTHER_MEANING, "snr_gamma", _value(recipe, "min_snr_gamma"), reason)


def _network(recipe: Recipe, script: Script, name: str) -> None:
    recipe.write("use_lora", script.lora, "(script)", name)
    text = recipe.take("train_text_encoder", False)
    if script.lora:
        names = (*UNET_ATTENTION, *(TEXT_ATTENTION if is_true(text) else ()))
        recipe.write("lora_targets", list(names), "(script)", name)
        recipe.write("lora_ft_text_encoder", is_true(text), "train_text_encoder", text)
    elif is_true(text):
        recipe.name(NO_COUNTERPART, "train_text_encoder", text, "the UNet alone is trained as a whole")
    else:
        recipe.name(OFF, "train_text_encoder", text)


def _rate(recipe: Recipe, script: Script) -> None:
    given = recipe.take("learning_rate")
    try:
        rate = as_number(script.rate if given is None else given, "learning_rate")
    except UserError as error:
        recipe.name(NO_COUNTERPART, "learning_rate", given, f"refused here: {error}")
        rate, given = script.rate, None
    scaled = recipe.take("scale_lr", False)
    factor = 1
    if is_true(scaled):
        for name, default in (("gradient_accumulation_steps", 1), ("train_batch_size", script.batch)):
            factor *= int(as_number(recipe.left.get(name, default), name))
        reason = f"the rate is multiplied by {factor}, the images of a step on one device"
        recipe.name(ANOTHER_MEANING, "scale_lr", scaled, reason)
    else:
        recipe.name(OFF, "scale_lr", scaled)
    if given is None:
        recipe.default("start_learning_rate", whole(rate * factor))
    else:
        recipe.write("start_learning_rate", whole(rate * factor), "learning_rate", given)
    decays = str(recipe.left.get("lr_scheduler", "constant")) != "constant"
    write_schedule(recipe, "lr_scheduler", "lr_warmup_steps", rate * factor)
    if decays:
        recipe.default("warmup_steps", 500)


def _length(recipe: Recipe, script: Script) -> None:
    steps, epochs = recipe.take("max_train_steps", script.steps), recipe.take("num_train_epochs")
    if steps is not None:
        recipe.write("max_steps", steps, "max_train_steps")
        if epochs is not None:
            recipe.name(NOT_NEEDED, "num_train_epochs", epochs, "max_train_steps wins")
    elif epochs is not None:
        recipe.write("epochs", epochs, "num_train_epochs")
    else:
        recipe.default("epochs", script.epochs)


def _optimizer(recipe: Recipe) -> None:
    eight = recipe.take("use_8bit_adam")
    name = recipe.take("optimizer")
    if name is not None and str(name).lower() == "prodigy":
        recipe.write("optim", "prodigy", "optimizer", name, "diffusers corrects its bias and has a decay of 1e-4")
    elif name is not None and str(name).lower() != "adamw":
        recipe.name(NO_COUNTERPART, "optimizer", name, "AdamW is used instead: choose a rate that suits it")
    elif name is not None:
        recipe.write("optim", "adamw", "optimizer", name)
    if eight is not None and is_true(eight):
        recipe.write("optim", "adamw", "use_8bit_adam", eight, "its state has 32 bits here")
    elif eight is not None:
        recipe.name(OFF, "use_8bit_adam", eight)
    first, second = recipe.take("adam_beta1"), recipe.take("adam_beta2")
    if first is not None or second is not None:
        recipe.write("betas", [first or 0.9, second or 0.999], "adam_beta1 adam_beta2")
    decay, epsilon = recipe.take("adam_weight_decay"), recipe.take("adam_epsilon")
    if decay is not None:
        recipe.write("weight_decay", decay, "adam_weight_decay")
    if epsilon is not None:
        if str(epsilon) in ("1e-08", "1e-8"):
            recipe.name(OFF, "adam_epsilon", epsilon)
        else:
            recipe.write("optimizer_args", [f"eps={epsilon}"], "adam_epsilon", epsilon)
    norm = recipe.left.get("max_grad_norm")
    if norm is not None and is_off(norm):
        recipe.write("clip_grad", False, "max_grad_norm", recipe.take("max_grad_norm"))


def _samples(recipe: Recipe, script: Script) -> None:
    key = "validation_prompts" if "validation_prompts" in recipe.left else "validation_prompt"
    prompts, epochs = recipe.take(key), recipe.take("validation_epochs")
    count = recipe.take("num_validation_images")
    if prompts is None:
        for name, value in (("num_validation_images", count), ("validation_epochs", epochs)):
            if value is not None:
                recipe.name(NOT_NEEDED, name, value, "there is no validation_prompt")
        return
    texts = prompts if isinstance(prompts, list) else [prompts]
    if key == "validation_prompt":
        images = min(100, max(1, int(as_number(4 if count is None else count, "num_validation_images"))))
        texts = [f"{' '.join(texts)} --d {seed}" for seed in range(images)]
        if count is not None:
            recipe.name(NOT_NEEDED, "num_validation_images", count, "sample_prompts has so many lines")
    recipe.write("sample_prompts", texts, key, prompts)
    recipe.default("sample_at_first", False)
    steps = recipe.take("validation_steps", 100) if script.token and epochs is None else None
    if steps is not None:
        recipe.write("sample_every_n_steps", steps, "validation_steps")
    elif epochs is not None:
        recipe.write("sample_every_n_epochs", epochs, "validation_epochs")
    else:
        recipe.default("sample_every_n_epochs", script.sample_epochs)
