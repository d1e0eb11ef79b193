"""OneTrainer's JSON, with its defaults. Names in sections are written with dots: `unet.train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ldm.errors import UserError
from ldm.settings.optimizer import OPTIONS
from ldm.settings.values import settings_of
from tools.recipes import onetrainer_tables as tables
from tools.recipes.onetrainer_method import numbers_of, write_dropout, write_method
from tools.recipes.recipe import (
    KEEPS_ALL,
    NO_COUNTERPART,
    NOT_NEEDED,
    OFF,
    Recipe,
    as_number,
    fit_layers,
    fit_prodigy,
    is_off,
    is_true,
    rounded,
    write_base_model,
)


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as names with dots. Lists of sections have numbers: `concepts.0.path`."""
    values: dict[str, Any] = {}
    for name, value in content.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict) and value and prefix.count(".") < tables.MAX_DEPTH:
            values.update(flat(value, f"{full}."))
        elif (
            prefix.count(".") < tables.MAX_DEPTH
            and isinstance(value, list)
            and value
            and all(isinstance(entry, dict) for entry in value)
        ):
            for number, entry in enumerate(value):
                values.update(flat(entry, f"{full}.{number}."))
        else:
            values[full] = value
    return values


def read(content: Mapping[str, Any]) -> Recipe:
    """Return the recipe of OneTrainer's JSON. Raises UserError for a recipe of another model or method."""
    values = flat(content)
    if "optimizer" in values:  # files before OneTrainer's version 1 have no section
        values["optimizer.optimizer"] = values.pop("optimizer")
    recipe = Recipe(tables.PROJECT, values)
    model = str(recipe.take("model_type", "STABLE_DIFFUSION_15"))
    if model not in tables.MODELS:
        raise UserError(
            f"model_type {model[:60]}: this project trains {', '.join(tables.MODELS)}, without inpainting models"
        )
    recipe.write("model_config", tables.MODELS[model], "model_type", model)
    write_method(recipe)
    _optimizer(recipe)
    _rate(recipe)
    _loss(recipe)
    write_dropout(recipe)
    _concepts(recipe)
    _samples(recipe)
    _saving(recipe)
    given = str(recipe.take("train_dtype", "FLOAT_16"))
    precision, note = tables.PRECISIONS.get(given, (given, ""))
    recipe.write("precision", precision, "train_dtype", given, note)
    old = recipe.take("gradient_checkpointing")
    if old is not None:
        recipe.write("gradient_checkpointing", is_true(old), "gradient_checkpointing", old)
    write_base_model(recipe, "base_model_name")
    recipe.take_rules(tables.RULES)
    for name, value in tables.DEFAULTS.items():
        if name.startswith("lora_") and not recipe.settings.get("use_lora", (False,))[0]:
            continue
        recipe.default(name, value)
    fit_prodigy(recipe)
    fit_layers(recipe)
    recipe.take_named(NO_COUNTERPART, tables.NO_COUNTERPART, tables.OFF_VALUES)
    recipe.take_named(NOT_NEEDED, tables.NOT_NEEDED, tables.OFF_VALUES)
    return recipe.finish()


def _batches(recipe: Recipe) -> int:
    """Return how many of OneTrainer's steps, which are batches, are one step of the optimizer."""
    return max(1, int(as_number(recipe.left.get("gradient_accumulation_steps") or 1, "gradient_accumulation_steps")))


def _write_steps(recipe: Recipe, ours: str, theirs: str, value: Any, unit: str = "") -> None:
    """Write a number of OneTrainer's steps as one of the optimizer's, at least 1."""
    batches = _batches(recipe)
    note = f"batches there: {batches} of them, gradient_accumulation_steps, are a step here" if batches > 1 else ""
    try:
        steps = max(1, int(as_number(value, theirs)) // batches) if batches > 1 else value
    except UserError as error:
        recipe.name(NO_COUNTERPART, theirs, value, f"refused here: {error}")
        return
    recipe.write(ours, steps, theirs, f"{value}{unit}", note)


def _warmup(recipe: Recipe) -> None:
    """Write the warm-up: batches above 1, a share of all steps up to 1."""
    given = recipe.take("learning_rate_warmup_steps")
    batches = _batches(recipe)
    if given is None:
        note = "left out there: 200 batches" if batches > 1 else ""
        recipe.default("warmup_steps", 200 // batches, note)
        return
    try:
        number = as_number(given, "learning_rate_warmup_steps")
    except UserError as error:
        recipe.name(NO_COUNTERPART, "learning_rate_warmup_steps", given, f"refused here: {error}")
        return
    if number == 1:
        reason = "1 is a share there, all steps; here it would be one step: there is no warm-up"
        recipe.name(NO_COUNTERPART, "learning_rate_warmup_steps", given, reason)
    elif number < 1 or batches == 1:
        recipe.write("warmup_steps", given, "learning_rate_warmup_steps")
    else:
        _write_steps(recipe, "warmup_steps", "learning_rate_warmup_steps", given)


def _optimizer(recipe: Recipe) -> None:
    given = str(recipe.take("optimizer.optimizer", "ADAMW"))
    if given in tables.OPTIMIZERS:
        recipe.write("optim", tables.OPTIMIZERS[given][0], "optimizer.optimizer", given, tables.OPTIMIZERS[given][1])
    else:
        recipe.name(NO_COUNTERPART, "optimizer.optimizer", given, "AdamW is used instead: choose a rate that suits it")
        return
    optim = tables.OPTIMIZERS[given][0]
    options = settings_of(OPTIONS[optim])
    pairs = [recipe.take(f"optimizer.beta{number}") for number in (1, 2)]
    if optim != "adafactor" and None not in pairs:
        recipe.write("betas", pairs, "optimizer.beta1 optimizer.beta2")
    elif optim != "adafactor":
        for number, value in enumerate(pairs):
            if value is not None:
                recipe.name(NO_COUNTERPART, f"optimizer.beta{number + 1}", value, "give both as betas")
    words = [] if pairs[0] is None or optim != "adafactor" else [f"beta1={pairs[0]}"]
    decay = recipe.take("optimizer.weight_decay")
    if decay is not None:
        recipe.write("weight_decay", decay, "optimizer.weight_decay")
    if optim == "adafactor":
        pairs = [recipe.take("optimizer.eps", 1e-30), recipe.take("optimizer.eps2", 1e-3)]
        words += [f"eps={pairs[0]},{pairs[1]}"] if pairs != [1e-30, 1e-3] else []
    for name, option in options.items():
        value = recipe.take(f"optimizer.{name}")
        if value is None or name in ("betas", "weight_decay"):
            continue
        if value == option.default or str(value) in ("inf", "Infinity"):
            recipe.name(OFF, f"optimizer.{name}", value)
        else:
            words.append(f"{name}={value}")
            recipe.name(NOT_NEEDED, f"optimizer.{name}", value, "it is one of optimizer_args")
    if words:
        recipe.write("optimizer_args", words, " ".join(name for name in recipe.given if name.startswith("optimizer.")))


def _rate(recipe: Recipe) -> None:
    _warmup(recipe)
    given = str(recipe.take("learning_rate_scheduler", "CONSTANT"))
    name, note = tables.SCHEDULERS.get(given, ("constant", ""))
    if given in tables.SCHEDULERS:
        recipe.write("scheduler", name, "learning_rate_scheduler", given, note)
    else:
        recipe.name(NO_COUNTERPART, "learning_rate_scheduler", given, "a constant rate is used instead")
    factor = recipe.take("learning_rate_min_factor", 0.0)
    token = recipe.settings.get("start_learning_rate")  # that of a token alone
    rate = as_number(
        token.value if token else recipe.left.get("learning_rate", tables.DEFAULTS["start_learning_rate"]),
        "learning_rate",
    )
    if name != "constant":
        end = rounded(rate * as_number(factor, "learning_rate_min_factor"))
        recipe.write("end_learning_rate", end, "learning_rate_min_factor", factor)
    else:
        recipe.name(OFF, "learning_rate_min_factor", factor)
    cycles = recipe.take("learning_rate_cycles")
    if cycles is not None and name == "cosine_with_restarts":
        recipe.write("lr_scheduler_num_cycles", cycles, "learning_rate_cycles")
    elif cycles is not None:
        recipe.name(NOT_NEEDED, "learning_rate_cycles", cycles, "the schedule has no cycles")
    absent = object()
    norm = recipe.left.pop("clip_grad_norm", absent)
    if norm is not absent and is_off(norm):
        recipe.write("clip_grad", False, "clip_grad_norm", norm)
        return
    if norm is not absent:
        recipe.write("max_grad_norm", norm, "clip_grad_norm")
    recipe.default("clip_grad", True)


def _loss(recipe: Recipe) -> None:
    weight, strength = recipe.take("loss_weight_fn", "CONSTANT"), recipe.take("loss_weight_strength", 5.0)
    if weight == "MIN_SNR_GAMMA":
        recipe.write("min_snr_gamma", strength, "loss_weight_strength")
        recipe.name(NOT_NEEDED, "loss_weight_fn", weight, "min_snr_gamma says so")
    else:
        recipe.name(OFF, "loss_weight_strength", strength)
        if weight == "DEBIASED_ESTIMATION":
            recipe.write("debiased_estimation_loss", True, "loss_weight_fn", weight)
        else:
            recipe.name(
                OFF if weight == "CONSTANT" else NO_COUNTERPART, "loss_weight_fn", weight, "no such weights here"
            )
    squared, absolute = recipe.take("mse_strength", 1.0), recipe.take("mae_strength", 0.0)
    if is_off(squared) and not is_off(absolute):
        recipe.write("loss_type", "l1", "mae_strength", absolute)
        recipe.name(OFF, "mse_strength", squared)
    else:
        recipe.name(
            OFF if str(squared) in ("1", "1.0") else NO_COUNTERPART, "mse_strength", squared, "the loss counts once"
        )
        recipe.name(OFF if is_off(absolute) else NO_COUNTERPART, "mae_strength", absolute, "l2 alone is used")
    ema = recipe.take("ema", "OFF")
    recipe.write("use_ema", ema != "OFF", "ema", ema)
    if ema == "OFF":
        for name in ("ema_decay", "ema_update_step_interval"):
            if name in recipe.left:
                recipe.name(OFF, name, recipe.left.pop(name))
    else:
        recipe.default("ema_decay", 0.999)
    masked, least = recipe.take("masked_training", False), recipe.take("unmasked_weight")
    if is_true(masked):
        note = "give the files *-masklabel.png, under the names of their images, as conditioning_data_dir"
        recipe.write("masked_loss", True, "masked_training", masked, note)
        if least is not None:
            recipe.write("unmasked_weight", least, "unmasked_weight")
        recipe.default("unmasked_weight", 0.1)
        return
    recipe.name(OFF, "masked_training", masked)
    for name, value in (("unmasked_weight", least), *((name, recipe.take(name)) for name in
                        ("unmasked_probability", "normalize_masked_area_loss"))):  # fmt: skip
        if value is not None:
            recipe.name(OFF, name, value)


def _concepts(recipe: Recipe) -> None:
    """Write the data set of a single concept, or name those of several."""
    numbers = numbers_of(recipe, "concepts")
    used = [number for number in numbers if is_true(recipe.left.get(f"concepts.{number}.enabled", True))]
    for number in numbers:
        if used == [number]:
            prefix = f"concepts.{number}."
            recipe.take_rules(rule._replace(theirs=prefix + rule.theirs) for rule in tables.CONCEPT_RULES)
            recipe.default("random_flip", True)
            repeats = recipe.take(f"{prefix}balancing", recipe.take(f"{prefix}repeats"))
            if repeats is not None:
                recipe.write("num_repeats", repeats, f"{prefix}balancing")
            kept = recipe.take(f"{prefix}text.keep_tags_count", 1)
            if recipe.settings.get("shuffle_caption", (False,))[0]:
                recipe.write("keep_tokens", kept, f"{prefix}text.keep_tags_count")
            else:
                recipe.name(OFF, f"{prefix}text.keep_tags_count", kept)
            if recipe.left.get(f"{prefix}text.prompt_source") == "sample":
                recipe.name(NOT_NEEDED, f"{prefix}text.prompt_source", recipe.left.pop(f"{prefix}text.prompt_source"),
                            "captions are the text files of the images")  # fmt: skip
        reason = (
            "a concept is a folder with caption files, and has no such setting"
            if used == [number]
            else "the concept is not enabled"
            if number not in used
            else "of several concepts, make subsets of a dataset_config (docs/data.md)"
        )
        ordinary = {f"concepts.{number}.{name}": values for name, values in tables.ORDINARY.items()}
        recipe.take_named(NO_COUNTERPART if number in used else NOT_NEEDED, {reason: f"concepts.{number}.*"}, ordinary)
    if not numbers and "concepts" in recipe.left:
        recipe.take("concepts")


def _samples(recipe: Recipe) -> None:
    """Write the prompts of the samples with sd-scripts' flags, and how often they are drawn."""
    flags = (("negative_prompt", "n"), ("width", "w"), ("height", "h"), ("seed", "d"), ("cfg_scale", "l"),
             ("diffusion_steps", "s"))  # fmt: skip
    numbers = numbers_of(recipe, "samples")
    lines, keys = [], []
    for number in numbers:
        prefix = f"samples.{number}."
        if not is_true(recipe.left.get(f"{prefix}enabled", True)) or f"{prefix}prompt" not in recipe.left:
            recipe.take_named(NOT_NEEDED, {"the sample is not enabled": f"{prefix}*"})
            continue
        line = [" ".join(str(recipe.take(f"{prefix}prompt", "")).split())]
        for name, flag in flags:
            value = recipe.take(f"{prefix}{name}")
            if value is not None:
                line.append(f"--{flag} {' '.join(str(value).split())}")
                recipe.name(NOT_NEEDED, f"{prefix}{name}", value, "it is a part of sample_prompts")
        lines.append(" ".join(line))
        keys.append(f"{prefix}prompt")
        recipe.take_named(NO_COUNTERPART, {"a sample has no such setting": f"{prefix}*"},
                          {f"{prefix}enabled": (True,)})  # fmt: skip
    every, unit = recipe.take("sample_after"), recipe.take("sample_after_unit", "MINUTE")
    if not lines:
        recipe.take("samples")
        for name, value in (("sample_after", every), ("sample_after_unit", unit)):
            if value is not None:
                recipe.name(NOT_NEEDED, name, value, "there are no samples")
        return
    recipe.write("sample_prompts", lines, " ".join(keys))
    setting = {"STEP": "sample_every_n_steps", "EPOCH": "sample_every_n_epochs"}.get(str(unit))
    if setting and every is not None:
        if unit == "STEP":
            _write_steps(recipe, setting, "sample_after", every, " STEP")
        else:
            recipe.write(setting, every, "sample_after", f"{every} {unit}")
        recipe.name(NOT_NEEDED, "sample_after_unit", unit, f"{setting} says so")
    else:
        for name, value in (("sample_after", every), ("sample_after_unit", unit)):
            if value is not None:
                recipe.name(NO_COUNTERPART, name, value, "samples are drawn by steps or epochs")


def _saving(recipe: Recipe) -> None:
    every, unit = recipe.take("save_every", recipe.take("save_after", 0)), recipe.take("save_every_unit", "NEVER")
    if unit in ("STEP", "EPOCH") and not is_off(every):
        if unit == "STEP":
            _write_steps(recipe, "ckpt_save_interval", "save_every", every)
        else:
            recipe.write("ckpt_save_interval", every, "save_every")
        recipe.write("step_mode", unit == "STEP", "save_every_unit", unit)
        recipe.default("ckpt_max_keep", KEEPS_ALL, "left out there: OneTrainer keeps all of them")
    else:
        kind = OFF if unit == "NEVER" or is_off(every) else NO_COUNTERPART
        for name, value in (("save_every", every), ("save_every_unit", unit)):
            recipe.name(kind, name, value, "checkpoints are counted in steps or epochs")
    target = recipe.take("output_model_destination")
    if target is not None:
        path = PureWindowsPath(str(target)) if "\\" in str(target) else PurePosixPath(str(target))
        recipe.write("output_name", path.stem, "output_model_destination", target)
