"""kohya's sd-scripts (TOML of --config_file, or a command line) and the JSON of the kohya_ss GUI."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.settings.optimizer import LEAST_PRODIGY_RATE, OptimizerSettings
from ldm.settings.samples import SAMPLER_NAMES
from tools.recipes import kohya_tables as tables
from tools.recipes.kohya_network import split_arguments, write_network
from tools.recipes.recipe import (
    ANOTHER_MEANING,
    KEEPS_ALL,
    NO_COUNTERPART,
    NOT_NEEDED,
    OFF,
    Recipe,
    as_number,
    fit_layers,
    is_off,
    is_true,
    shown,
    whole,
    write_base_model,
    write_schedule,
)

SD_SCRIPTS, GUI = "sd-scripts", "kohya_ss"
# A file with one of these is a recipe of this project.
SIGNS = ("network_module", "network_dim", "network_alpha", "LoRA_type", "pretrained_model_name_or_path",
         "max_train_steps", "max_train_epochs", "train_data_dir", "optimizer_type", "unet_lr")  # fmt: skip

LEARNING_RATE = 2e-6  # where a recipe has none
# Optimizers by their names in lower case, with what is different here.
_FULL = "its state has 32 bits here"
OPTIMIZERS = {
    "adamw": ("adamw", ""),
    "adamw8bit": ("adamw", _FULL),
    "pagedadamw": ("adamw", "its state is not paged here"),
    "pagedadamw8bit": ("adamw", _FULL),
    "pagedadamw32bit": ("adamw", "its state is not paged here"),
    "lion": ("lion", ""),
    "lion8bit": ("lion", _FULL),
    "pagedlion8bit": ("lion", _FULL),
    "adafactor": ("adafactor", ""),
    "adamwschedulefree": ("adamwschedulefree", ""),
    "prodigy": ("prodigy", ""),
    **{
        f"dadapt{name}": ("prodigy", "Prodigy is the later form of D-Adaptation, and finds its rate as well")
        for name in ("ation", "adampreprint", "adagrad", "adam", "adan", "adanip", "lion", "sgd")
    },
}
PRECISIONS = {
    "no": ("fp32", ""),
    "fp16": ("fp16", ""),
    "bf16": ("auto", "fp16 on Ascend; on the CPU bf16 where its kernels multiply it, else fp32"),
}


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a TOML without its sections, as sd-scripts reads it. Raises UserError for a repetition."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        inner = value if isinstance(value, dict) else {name: value}
        for key, entry in inner.items():
            if key in values:
                raise UserError(f'"{shown("", key)}" is given twice, in two sections: keep one')
            values[key] = entry
    return values


def read(values: Mapping[str, Any], gui: bool = False) -> Recipe:
    """Return the recipe of sd-scripts' settings by their names. Raises UserError for a recipe of another model."""
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        other = tables.GUI_NAMES.get(name, name) if gui else name
        renamed[name if other in values or other in renamed else other] = value
    recipe = Recipe(GUI if gui else SD_SCRIPTS, renamed)
    if gui:
        _add_parameters(recipe)
    convert(recipe, gui)
    fit_layers(recipe)
    for number, entry in enumerate(recipe.named):  # under the names of the file
        theirs = next((name for name, other in tables.GUI_NAMES.items() if other == entry.theirs and name in values),
                      entry.theirs) if gui else entry.theirs  # fmt: skip
        recipe.named[number] = entry._replace(theirs=theirs)
    if gui:
        back = {other: name for name, other in tables.GUI_NAMES.items() if name in values}
        recipe.settings = {
            name: entry._replace(theirs=back.get(entry.theirs, entry.theirs)) for name, entry in recipe.settings.items()
        }
    return recipe.finish()


def convert(recipe: Recipe, gui: bool = False) -> None:
    """Take all settings of sd-scripts that the tables know."""
    split_arguments(recipe)
    lora = write_network(recipe)
    _data(recipe, gui)
    _optimizer(recipe, lora)
    _length(recipe, gui)
    _saving(recipe)
    _samples(recipe, gui)
    _noise(recipe, gui)
    if gui and "seed" in recipe.left and is_off(recipe.left["seed"]):
        recipe.name(OFF, "seed", recipe.left.pop("seed"))
    write_base_model(recipe, "pretrained_model_name_or_path")
    given = recipe.take("mixed_precision", "no")
    precision, note = PRECISIONS.get(str(given), (given, ""))
    recipe.write("precision", precision, "mixed_precision", given, note)
    with_log = recipe.take("log_with")
    if with_log is not None:
        kept = ["csv", "html", "tensorboard"] if with_log in ("tensorboard", "all") else ["csv", "html"]
        note = "wandb is not written" if with_log in ("wandb", "all") else ""
        recipe.write("report_to", kept, "log_with", with_log, note)
    recipe.take_rules((*tables.SAME, *tables.RULES))
    recipe.default("train_batch_size", 1)
    if not gui and not str(recipe.settings.get("data_path", (".toml",))[0]).endswith(".toml"):
        text = "left out there: the default of sd-scripts. Remove this line to read .txt files as well"
        recipe.default("caption_extension", ".caption", text)
    recipe.take_named(NO_COUNTERPART, tables.NO_COUNTERPART, tables.OFF_VALUES)
    recipe.take_named(NOT_NEEDED, tables.NOT_NEEDED, tables.OFF_VALUES)


def _add_parameters(recipe: Recipe) -> None:
    """Read the GUI's further flags as settings."""
    text = recipe.take("additional_parameters")
    if text is None:
        return
    try:
        words = shlex.split(str(text))
    except ValueError:
        recipe.name(NO_COUNTERPART, "additional_parameters", text, "it is no list of flags")
        return
    recipe.name(NOT_NEEDED, "additional_parameters", text, "its flags are read as settings")
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            recipe.add(name, value if equals else True)
        elif name:
            recipe.add(name, word if recipe.left[name] is True else f"{recipe.left[name]} {word}")


def _data(recipe: Recipe, gui: bool) -> None:
    config, folder = recipe.take("dataset_config"), recipe.take("train_data_dir")
    if config is not None:
        recipe.write("data_path", config, "dataset_config")
        if folder is not None:
            recipe.name(NOT_NEEDED, "train_data_dir", folder, "dataset_config is read")
    elif folder is not None:
        recipe.write("data_path", folder, "train_data_dir")


def _optimizer(recipe: Recipe, lora: bool) -> None:
    key, given = "optimizer_type", recipe.take("optimizer_type")
    for name, kind in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        value = recipe.take(name)
        if value is not None and is_true(value) and given is None:
            key, given = name, kind
        elif value is not None:
            recipe.name(OFF, name, value)
    name = str(given or "AdamW").lower().rpartition(".")[2]
    optim, note = OPTIMIZERS.get(name, ("adamw", ""))
    if name not in OPTIMIZERS:
        recipe.name(NO_COUNTERPART, key, given, "AdamW is used instead: choose a rate that suits it")
        recipe.default("optim", optim)
    else:
        recipe.write("optim", optim, key, given or "AdamW", note)
    arguments = recipe.take("optimizer_args")
    words = arguments if isinstance(arguments, list) else str(arguments).split() if arguments is not None else []
    kept = []
    for word in words:
        try:
            OptimizerSettings(optim=optim, optimizer_args=[str(word)]).optimizer_options()
            kept.append(str(word))
        except UserError as error:
            recipe.name(NO_COUNTERPART, "optimizer_args", word, f"refused here: {error}")
    relative = False
    if optim == "adafactor":  # sd-scripts' and transformers' defaults
        names = {word.partition("=")[0] for word in kept}
        relative = "relative_step" not in names or any("relative_step" in word and "True" in word for word in kept)
        kept += [f"{option}=True" for option in ("relative_step", "scale_parameter") if option not in names]
    if kept and arguments is not None:
        recipe.write("optimizer_args", kept, "optimizer_args", arguments)
    elif kept:
        recipe.default("optimizer_args", kept)
    rate = _rates(recipe, optim, relative, lora)
    if relative and recipe.left.get("lr_scheduler") not in (None, "constant"):
        recipe.name(NOT_NEEDED, "lr_scheduler", recipe.left.pop("lr_scheduler"), "relative_step makes the rate")
    percent = recipe.take("lr_warmup")
    if percent is not None:
        if is_off(recipe.left.get("lr_warmup_steps")) and not is_off(percent):
            share = as_number(percent, "lr_warmup") / 100
            if str(recipe.left.get("lr_scheduler", "constant")) == "constant":
                recipe.name(NOT_NEEDED, "lr_warmup", percent, "a constant rate ignores the warm-up there")
            else:
                recipe.write("warmup_steps", share, "lr_warmup", percent, "per cent of all steps; here a share below 1")
        else:
            recipe.name(OFF if is_off(percent) else NOT_NEEDED, "lr_warmup", percent, "lr_warmup_steps is given")
        if is_off(recipe.left.get("lr_warmup_steps")) and "lr_warmup_steps" in recipe.left:
            recipe.name(OFF, "lr_warmup_steps", recipe.left.pop("lr_warmup_steps"))
    write_schedule(recipe, "lr_scheduler", "lr_warmup_steps", rate)
    norm = recipe.take("max_grad_norm")
    if norm is not None and is_off(norm):
        recipe.write("clip_grad", False, "max_grad_norm", norm)
    else:
        if norm is not None:
            recipe.write("max_grad_norm", norm, "max_grad_norm")
            recipe.write("clip_grad", True, "max_grad_norm", norm)
        recipe.default("clip_grad", True)


def _rates(recipe: Recipe, optim: str, relative: bool, lora: bool) -> float:
    """Write the learning rates and return that of most parameters."""
    rates = {}
    for name in ("learning_rate", "unet_lr", "text_encoder_lr"):
        value = recipe.take(name)
        if isinstance(value, list):
            if len(value) > 1:
                recipe.name(ANOTHER_MEANING, name, value, "the first is used: this project has one text encoder")
            value = value[0] if value else None
        if value is not None:
            try:
                rates[name] = whole(as_number(value, name))
            except UserError as error:
                recipe.name(NO_COUNTERPART, name, value, f"refused here: {error}")
    main = rates.get("learning_rate", LEARNING_RATE)
    if optim == "prodigy" or relative:
        reason = "prodigy finds one rate for all" if optim == "prodigy" else "relative_step makes the rate"
        used = "unet_lr" if optim == "prodigy" and "unet_lr" in rates else "learning_rate"
        for name in ("unet_lr", "text_encoder_lr"):
            if name in rates and name != used:
                recipe.name(NOT_NEEDED, name, rates[name], reason)
        if used == "unet_lr" and "learning_rate" in rates:
            recipe.name(NOT_NEEDED, "learning_rate", rates["learning_rate"], "unet_lr is used")
        main = rates.get(used, main)
        if optim == "prodigy" and main < LEAST_PRODIGY_RATE:
            recipe.write("start_learning_rate", 1, used, main, "Prodigy multiplies its own rate by it: 1 is meant")
            return 1.0
        recipe.write("start_learning_rate", main, used)
        return main
    if "learning_rate" in rates:
        recipe.write("start_learning_rate", main, "learning_rate")
    else:
        recipe.default("start_learning_rate", LEARNING_RATE)
    for name in ("unet_lr", "text_encoder_lr"):
        if name not in rates:
            continue
        if name == "text_encoder_lr" and not lora:
            recipe.name(NO_COUNTERPART, name, rates[name], "the text encoder is trained by a LoRA alone")
        else:
            recipe.write(name, rates[name], name)
    return main


def _length(recipe: Recipe, gui: bool) -> None:
    epochs, steps, gui_epochs = (recipe.take(name) for name in ("max_train_epochs", "max_train_steps", "epoch"))
    used = ""
    for name, value, ours, counts in (
        ("max_train_epochs", epochs, "epochs", True),
        ("max_train_steps", steps, "max_steps", True),
        ("epoch", gui_epochs, "epochs", gui),
    ):
        if value is None:
            continue
        if not counts:
            recipe.name(NOT_NEEDED, name, value, "sd-scripts does not read it")
        elif is_off(value):
            recipe.name(OFF, name, value)
        elif used:
            recipe.name(NOT_NEEDED, name, value, f"{used} wins")
        elif recipe.write(ours, value, name):
            used = name
    if not used:
        recipe.default("max_steps", 1600)


def _saving(recipe: Recipe) -> None:
    every: dict[str, float] = {}
    for unit in ("epochs", "steps"):
        name = f"save_every_n_{unit}"
        value = recipe.take(name)
        if value is None:
            continue
        if is_off(value):
            recipe.name(OFF, name, value)
        elif every:
            recipe.name(
                NO_COUNTERPART, name, value, "checkpoints are counted in epochs or steps: save_every_n_epochs is used"
            )
        elif recipe.write("ckpt_save_interval", value, name):
            recipe.write("step_mode", unit == "steps", name, value)
            every[unit] = as_number(value, name)
    for unit in ("epochs", "steps"):
        name = f"save_last_n_{unit}"
        value = recipe.take(name)
        if value is None:
            continue
        if is_off(value):
            recipe.name(OFF, name, value)
        elif unit in every:
            kept = max(1, int(as_number(value, name) // every[unit]))
            recipe.write("ckpt_max_keep", kept, name, value, f"here a number of checkpoints: {kept}")
        else:
            recipe.name(NOT_NEEDED, name, value, f"checkpoints are not counted in {unit}")
    if every:
        recipe.default("ckpt_max_keep", KEEPS_ALL, f"left out there: {recipe.project} keeps all of them")


def _samples(recipe: Recipe, gui: bool) -> None:
    prompts, sampler = recipe.take("sample_prompts"), recipe.take("sample_sampler")
    if prompts is None:
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
            if name in recipe.left:
                value = recipe.left.pop(name)
                recipe.name(OFF if is_off(value) else NOT_NEEDED, name, value, "there are no sample_prompts")
        if sampler is not None:
            recipe.name(NOT_NEEDED, "sample_sampler", sampler, "there are no sample_prompts")
        return
    if gui and isinstance(prompts, str) and not re.search(r"\.(txt|json|toml)$", prompts.strip()):
        lines = [line.strip() for line in prompts.splitlines() if line.strip() and not line.strip().startswith("#")]
        recipe.write("sample_prompts", lines, "sample_prompts", prompts)
    else:
        recipe.write("sample_prompts", prompts, "sample_prompts")
    if sampler is not None and str(sampler) not in SAMPLER_NAMES:
        recipe.name(NO_COUNTERPART, "sample_sampler", sampler, "dpm_solver_pp draws instead")
    elif sampler is not None:
        recipe.write("sample_sampler", sampler, "sample_sampler")
    else:
        recipe.default("sample_sampler", "ddim")
    if "sample_at_first" not in recipe.left:
        recipe.default("sample_at_first", False)


def _noise(recipe: Recipe, gui: bool) -> None:
    """Leave the noise out that the GUI does not use: noise_offset_type says which of the two kinds it does."""
    if not gui:
        return
    kind = recipe.left.get("noise_offset_type", "Original")
    unused = (
        ("noise_offset", "adaptive_noise_scale", "noise_offset_random_strength")
        if kind == "Multires"
        else ("multires_noise_iterations", "multires_noise_discount")
    )
    for name in unused:
        if name in recipe.left:
            value = recipe.left.pop(name)
            recipe.name(OFF if is_off(value) else NOT_NEEDED, name, value, f"noise_offset_type {kind} does not use it")
