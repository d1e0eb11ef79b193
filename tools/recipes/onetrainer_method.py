"""What a recipe of OneTrainer trains: a LoRA and its layers, the UNet as a whole, or a token."""

from __future__ import annotations

from ldm.errors import UserError
from tools.recipes import onetrainer_tables as tables
from tools.recipes.recipe import (
    ANOTHER_MEANING,
    NO_COUNTERPART,
    NOT_NEEDED,
    OFF,
    TEXT_ENCODER,
    Recipe,
    Rule,
    as_number,
    is_off,
    is_true,
)


def write_method(recipe: Recipe) -> None:
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
        drop_rate(recipe, "text_encoder.learning_rate")
        if method == "EMBEDDING":
            drop_rate(recipe, "unet.learning_rate")
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
        drop_rate(recipe, "text_encoder.learning_rate")
    if not is_true(unet):
        drop_rate(recipe, "unet.learning_rate")
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
        for number in numbers_of(recipe, "additional_embeddings")
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
        drop_rate(recipe, "learning_rate", "embedding_learning_rate is that of the token")
    elif rate is not None:
        recipe.write("ti_lr", rate, "embedding_learning_rate")
    ordinary = {f"{prefix}{name}": values for name, values in tables.ORDINARY_TOKEN.items()}
    recipe.take_named(NOT_NEEDED, {"it is a part of the GUI": f"{prefix}uuid"})
    recipe.take_named(NO_COUNTERPART, {"a token has no such setting": f"{prefix}*"}, ordinary)
    if prefix == "embedding.":
        return
    unused = [name for name in recipe.left if name.startswith("embedding.")]
    recipe.take_named(NOT_NEEDED, {"it is for the training method EMBEDDING": " ".join(unused)})


def write_dropout(recipe: Recipe) -> None:
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


def drop_rate(recipe: Recipe, name: str, reason: str = "that network is not trained") -> None:
    value = recipe.take(name)
    if value is not None:
        recipe.name(NOT_NEEDED, name, value, reason)


def numbers_of(recipe: Recipe, section: str) -> list[int]:
    """Return the numbers of the entries of a list of sections."""
    words = (name.split(".") for name in recipe.left)
    return sorted({int(parts[1]) for parts in words if parts[0] == section and len(parts) > 2 and parts[1].isdecimal()})
