"""OneTrainer's JSON, with its defaults. Names in sections are written with dots: `unet.train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ldm.errors import UserError
from ldm.settings.optimizer import OPTIONS
from ldm.settings.values import settings_of
from tools.recipes import onetrainer_tables as tables
from tools.recipes.recipe import (
    ANOTHER_MEANING,
    KEEPS_ALL,
    NO_COUNTERPART,
    NOT_NEEDED,
    OFF,
    TEXT_ENCODER,
    Recipe,
    Rule,
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
    _method(recipe)
    _optimizer(recipe)
    _rate(recipe)
    _loss(recipe)
    _dropout(recipe)
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


def _method(recipe: Recipe) -> None:
    """Write what is trained."""
    method = str(recipe.take("training_method", "FINE_TUNE"))
    if method not in ("LORA", "FINE_TUNE", "EMBEDDING"):
        raise UserError(f"training_method {method[:60]}: this project has LORA, FINE_TUNE and EMBEDDING")
    recipe.write("use_lora", method == "LORA", "training_method", method)
    peft = str(recipe.take("peft_type", "LORA"))
    _embedding(recipe, method)
    if method != "LORA":
        for name in [name for name in recipe.left if name.startswith(("lora_", "lokr_", "layer_filter"))]:
            recipe.name(NOT_NEEDED, name, recipe.left.pop(name), "no LoRA is trained")
        trained = recipe.take("text_encoder.train", True)
        if trained and method == "FINE_TUNE":
            recipe.name(NO_COUNTERPART, "text_encoder.train", trained, "the UNet alone is trained as a whole")
        recipe.take("unet.train")
        _drop_rate(recipe, "text_encoder.learning_rate")
        if method == "EMBEDDING":
            _drop_rate(recipe, "unet.learning_rate")
        return
    if peft != "LORA":
        note = "" if "algo" in recipe.known else "a plain LoRA is trained instead"
        recipe.write("algo", {"LOHA": "loha", "LOKR": "lokr"}.get(peft, peft), "peft_type", peft, note)
    for theirs, ours, kind in (
        ("lora_decompose", "dora_wd", "LORA"),
        ("lokr_weight_decompose", "dora_wd", "LOKR"),
        ("lokr_decompose_factor", "factor", "LOKR"),
        ("lokr_use_tucker", "use_tucker", "LOKR"),
    ):
        value = recipe.take(theirs)
        if value is None:
            continue
        if is_off(value) or str(value) == "-1":
            recipe.name(OFF, theirs, value)
        elif kind != peft:
            recipe.name(NOT_NEEDED, theirs, value, f"peft_type {peft} does not use it")
        else:
            recipe.write(ours, value, theirs)
    for name in [name for name in recipe.left if name.startswith("lokr_")]:
        value = recipe.left.pop(name)
        kind = NOT_NEEDED if peft != "LOKR" else NO_COUNTERPART
        recipe.name(OFF if is_off(value) else kind, name, value, f"peft_type {peft}: this project has no such option")
    unet, text = recipe.take("unet.train", True), recipe.take("text_encoder.train", True)
    recipe.write("lora_ft_unet", is_true(unet), "unet.train", unet)
    recipe.write("lora_ft_text_encoder", is_true(text), "text_encoder.train", text)
    if is_true(text):
        recipe.take_rules((Rule("text_encoder.learning_rate", "text_encoder_lr"),))
        after = recipe.left.get("text_encoder.stop_training_after")
        if after is None and as_number(recipe.left.get("epochs", 100), "epochs") > 30:
            reason = "left out there: the text encoder is trained for 30 epochs. Here it is trained to the end"
            recipe.name(ANOTHER_MEANING, "text_encoder.stop_training_after", 30, reason)
    else:
        _drop_rate(recipe, "text_encoder.learning_rate")
    if not is_true(unet):
        _drop_rate(recipe, "unet.learning_rate")
    filters, preset = recipe.take("layer_filter"), recipe.take("layer_filter_preset")
    key = "layer_filter" if filters is not None else "layer_filter_preset"
    given = str(filters if filters is not None else preset or "full")
    if filters is not None and preset is not None:
        recipe.name(NOT_NEEDED, "layer_filter_preset", preset, "layer_filter has its layers")
    layers = tables.FILTERS.get(given.replace(" ", ""))
    if layers is None:
        recipe.name(NO_COUNTERPART, key, given, "all layers are trained: choose by lora_targets or lora_config")
        layers = tables.FILTERS["full"]
    names = (*(layers if is_true(unet) else ()), *(TEXT_ENCODER if is_true(text) else ()))
    recipe.write("lora_targets", list(names), "layer_filter_preset" if layers is tables.FILTERS["full"] else key, given)


def _embedding(recipe: Recipe, method: str) -> None:
    """Write the token that is learned: that of EMBEDDING, or the only one beside a LoRA. Others are named."""
    numbers = [
        number
        for number in _numbers(recipe, "additional_embeddings")
        if is_true(recipe.left.get(f"additional_embeddings.{number}.train", True))
    ]
    prefix = "embedding."
    if method == "LORA" and len(numbers) == 1 and is_true(recipe.left.get("text_encoder.train_embedding", True)):
        prefix = f"additional_embeddings.{numbers[0]}."
    elif method != "EMBEDDING":
        if numbers:
            reason = (
                "text_encoder.train_embedding is off"
                if not is_true(recipe.left.get("text_encoder.train_embedding", True))
                else "one token can be learned beside a LoRA: there are several"
                if method == "LORA"
                else "no token is learned beside a whole UNet"
            )
            names = " ".join(f"additional_embeddings.{number}.*" for number in numbers)
            ordinary = {f"additional_embeddings.{number}.{name}": values
                        for number in numbers for name, values in tables.ORDINARY_TOKEN.items()}  # fmt: skip
            recipe.take_named(NO_COUNTERPART, {reason: names}, ordinary)
        unused = "embedding.* embedding embedding_learning_rate"
        recipe.take_named(NOT_NEEDED, {"no token is learned": unused})
        return
    recipe.take_rules(
        (
            Rule(f"{prefix}placeholder", "placeholder_token"),
            Rule(f"{prefix}initial_embedding_text", "initializer_token"),
        )
    )
    recipe.default("placeholder_token", "<embedding>")
    recipe.default("initializer_token", "*")
    vectors = recipe.take(f"{prefix}token_count")
    if vectors is not None:
        note = "vectors beyond the tokens of the text begin as * there; here its tokens are taken in turn"
        recipe.write("num_vectors", vectors, f"{prefix}token_count", vectors, note if str(vectors) != "1" else "")
    recipe.default("learnable_property", None, "OneTrainer leaves captions as they are")
    rate = recipe.take("embedding_learning_rate")
    if rate is not None and method == "EMBEDDING":
        recipe.write("start_learning_rate", rate, "embedding_learning_rate")
        _drop_rate(recipe, "learning_rate", "embedding_learning_rate is that of the token")
    elif rate is not None:
        recipe.write("ti_lr", rate, "embedding_learning_rate")
    ordinary = {f"{prefix}{name}": values for name, values in tables.ORDINARY_TOKEN.items()}
    recipe.take_named(NOT_NEEDED, {"it is a part of the GUI": f"{prefix}uuid"})
    recipe.take_named(NO_COUNTERPART, {"a token has no such setting": f"{prefix}*"}, ordinary)
    if prefix == "embedding.":
        return
    unused = [name for name in recipe.left if name.startswith("embedding.")]
    recipe.take_named(NOT_NEEDED, {"it is for the training method EMBEDDING": " ".join(unused)})


def _dropout(recipe: Recipe) -> None:
    value = recipe.take("dropout_probability")
    if value is None:
        return
    if not recipe.settings.get("use_lora", (False,))[0]:
        recipe.name(OFF if is_off(value) else NOT_NEEDED, "dropout_probability", value, "no LoRA is trained")
        return
    pair = "algo" not in recipe.settings
    there = "the outputs of the down matrix" if pair else "numbers of the factors or between them, not of the input"
    note = f"there it drops {there}; here the inputs of the layer"
    recipe.write("lora_dropout", value, "dropout_probability", value, "" if is_off(value) else note)


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


def _drop_rate(recipe: Recipe, name: str, reason: str = "that network is not trained") -> None:
    value = recipe.take(name)
    if value is not None:
        recipe.name(NOT_NEEDED, name, value, reason)


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


def _numbers(recipe: Recipe, section: str) -> list[int]:
    """Return the numbers of the entries of a list of sections."""
    words = (name.split(".") for name in recipe.left)
    return sorted({int(parts[1]) for parts in words if parts[0] == section and len(parts) > 2 and parts[1].isdecimal()})


def _concepts(recipe: Recipe) -> None:
    """Write the data set of a single concept, or name those of several."""
    numbers = _numbers(recipe, "concepts")
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
    numbers = _numbers(recipe, "samples")
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
