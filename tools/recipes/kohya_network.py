"""The network of a recipe of sd-scripts: its architecture, which layers are trained, and by what kind of update."""

from __future__ import annotations

from typing import Any

from ldm.errors import UserError
from tools.recipes import kohya_tables as tables
from tools.recipes.recipe import (
    ANOTHER_MEANING,
    NO_COUNTERPART,
    NOT_IN_VERSION,
    NOT_NEEDED,
    OFF,
    TEXT_ATTENTION,
    TEXT_ENCODER,
    UNET_ATTENTION,
    UNET_OTHERS,
    UNET_RESIDUAL,
    UNET_TRANSFORMER,
    Recipe,
    Rule,
    Written,
    as_number,
    is_empty,
    is_off,
    is_true,
    whole,
)

# What LyCORIS calls its presets -> layers of the UNet and of the text encoder.
PRESETS = {
    "full": ((*UNET_TRANSFORMER, *UNET_RESIDUAL, *UNET_OTHERS), TEXT_ENCODER),
    "full-lin": ((*UNET_TRANSFORMER, "emb_layers.1", "skip_connection", "time_embed.0", "time_embed.2"), TEXT_ENCODER),
    "attn-mlp": (UNET_TRANSFORMER, TEXT_ENCODER),
    "attn-only": (UNET_ATTENTION, TEXT_ATTENTION),
    "unet-transformer-only": (UNET_TRANSFORMER, ()),
    "unet-only": ((*UNET_TRANSFORMER, *UNET_RESIDUAL, *UNET_OTHERS), ()),
    "unet-convblock-only": ((*UNET_RESIDUAL, "input_blocks.0.0", "out.2"), ()),
}
MODELS = {
    (False, False): "configs/v1-inference.yaml",
    (True, False): "configs/v2-inference.yaml",
    (True, True): "configs/v2-vpred-inference.yaml",
}


def split_arguments(recipe: Recipe) -> None:
    """Make settings of their own of network_args, which are name=value."""
    given = recipe.take("network_args")
    if given is None:
        return
    if isinstance(given, dict):
        pairs = [(str(name), value) for name, value in given.items()]
    else:
        words = given.split() if isinstance(given, str) else given if isinstance(given, list) else [given]
        pairs = [tuple(str(word).split("=", 1)) if "=" in str(word) else (str(word), "") for word in words]
    for name, value in pairs:
        recipe.add(f"network_args.{name}", value)


def _argument(recipe: Recipe, name: str) -> tuple[str, Any]:
    """Return the full name and the value of an option of the network. It is taken; None if it is left out."""
    for full in (f"network_args.{name}", name):
        if full in recipe.left:
            return full, recipe.take(full)
    return name, None


def write_network(recipe: Recipe) -> bool:
    """Write the architecture, and which layers are trained. Returns whether a LoRA is trained."""
    kind = str(recipe.take("LoRA_type", ""))
    if recipe.is_on("sdxl") or kind.startswith(("Flux", "SD3", "Lumina", "Chroma")) or recipe.is_on("flux1_checkbox"):
        raise UserError("the recipe is for SDXL, SD3 or Flux, and this project trains Stable Diffusion 1.x and 2.x")
    recipe.take_named(NOT_NEEDED, {"the model is no SDXL": "sdxl"})
    v2, velocity = recipe.is_on("v2"), recipe.is_on("v_parameterization")
    given = [name for name in ("v2", "v_parameterization") if name in recipe.left]
    for name in given:
        value = recipe.left.pop(name)
        recipe.name(NOT_NEEDED if is_true(value) else OFF, name, value, "model_config says so")
    if (v2, velocity) in MODELS:
        recipe.write("model_config", MODELS[v2, velocity], "v2, v_parameterization", f"{v2}, {velocity}")
    else:
        recipe.name(NO_COUNTERPART, "v_parameterization", True, "no SD 1.x model here predicts velocity")

    module = str(recipe.take("network_module", ""))
    lora = bool(module or kind or not is_off(recipe.left.get("network_dim")))
    recipe.write("use_lora", lora, "network_module" if module or not kind else "LoRA_type", module or kind)
    if not lora:
        reason = "sd-scripts' fine-tuning may train the text encoder too; here the UNet alone is trained"
        recipe.name(ANOTHER_MEANING, "network_module", "", reason)
        for name in ("network_alpha", "network_dropout", "network_dim"):
            if name in recipe.left:
                recipe.name(NOT_NEEDED, name, recipe.left.pop(name), "no LoRA is trained")
        return False
    lycoris = module.startswith("lycoris") or kind.startswith("LyCORIS")
    algo = _layers(recipe, module, kind, lycoris)
    recipe.take_rules((Rule("network_dim", "lora_rank"),))
    alpha = recipe.take("network_alpha")
    if alpha is not None:
        recipe.write("lora_alpha", None if is_off(alpha) else alpha, "network_alpha", alpha)
    recipe.default("lora_alpha", 1.0)
    _dropout(recipe, algo, lycoris)
    bypass = lycoris and is_true(recipe.left.get("network_args.bypass_mode"))
    for rule in tables.NETWORK_ARGS:
        full, value = _argument(recipe, rule.theirs)
        if value is None:
            continue
        if is_off(value) or str(value) == "-1":
            recipe.name(OFF, full, value)
        elif not lycoris and rule.theirs in tables.OF_LYCORIS:
            recipe.name(NOT_NEEDED, full, value, "LyCORIS alone reads it, and another network is trained")
        elif rule.theirs == "loraplus_lr_ratio" and algo in tables.PRODUCTS:
            recipe.name(NOT_NEEDED, full, value, f"LyCORIS has it for lora_up alone: with {algo} it does nothing there")
        elif rule.ours == "use_tucker" and "use_tucker" in recipe.settings:
            recipe.name(NOT_NEEDED, full, value, "use_tucker is on")
        else:
            recipe.write(rule.ours, value, full, value, _difference(rule.theirs, algo, lycoris, bypass))
    for full in [name for name in recipe.left if name.startswith("network_args.")]:
        value = recipe.left.pop(full)
        name, reasons = full.partition(".")[2], tables.NO_COUNTERPART.items()
        known = (reason for reason, names in reasons if name in names.split())
        reason = next(known, "this project has no such option of networks")
        recipe.name(OFF if is_off(value) else NO_COUNTERPART, full, value, reason)
    return True


def _dropout(recipe: Recipe, algo: str, lycoris: bool) -> None:
    """Write the dropout. Of LyCORIS's it is one of network_args, or sd-scripts gives it that of the network."""
    name, value = _argument(recipe, "dropout") if lycoris else ("", None)
    common = recipe.take("network_dropout")
    if value is None:
        name, value = "network_dropout", common
    elif common is not None:
        recipe.name(OFF if is_off(common) else NOT_NEEDED, "network_dropout", common, f"{name} wins")
    if value is None:
        return
    note = "there it drops the outputs of the down matrix, here the inputs of the layer"
    if lycoris:
        note = "there it drops outputs of the update, and in bypass_mode alone; here inputs of the layer"
        if algo in tables.PRODUCTS:
            note = f"LyCORIS says that it is not implemented for {algo}; {note}"
    recipe.write("lora_dropout", value, name, value, "" if is_off(value) else note)


def _difference(name: str, algo: str, lycoris: bool, bypass: bool) -> str:
    """Return what an option of the network does there and not here, or "" where it is the same."""
    if name == "rank_dropout" and not lycoris:
        return (
            "there each image drops ranks of its own, and what is kept is multiplied by 1 / (1 - p); here all images "
            "of a step drop the same ranks, and nothing is multiplied"
        )
    if name == "rank_dropout" and algo not in tables.PRODUCTS and not bypass:
        return "there outputs of the update are left out, as ranks are in bypass_mode alone; here ranks"
    if name == "rs_lora" and algo == "lokr":
        return "there a LoKr of two whole factors is multiplied by the root of the rank, here by 1"
    return ""


def _layers(recipe: Recipe, module: str, kind: str, lycoris: bool) -> str:
    """Write the layers and the kind of their updates, which is returned."""
    name, algo = _argument(recipe, "algo")
    if algo is None and "/" in kind:
        name, algo = "LoRA_type", kind.partition("/")[2]
    algo = str(algo or "lora").lower()
    if not lycoris:
        if algo != "lora":
            recipe.name(NOT_NEEDED, name, algo, "LyCORIS alone reads it, and another network is trained")
        algo = "lora"
    elif algo not in ("lora", "locon"):
        plain_lora = "a plain LoRA is trained instead" if "algo" not in recipe.known else ""
        if not recipe.write("algo", algo, name, algo, plain_lora):
            algo = "lora"
    elif name != "algo":
        recipe.name(NOT_NEEDED, name, algo, "it is what lora_targets with convolutions train")
    if not lycoris and (module not in ("", "networks.lora") or kind not in ("", "Standard", "Kohya LoCon")):
        what = ("network_module", module) if module not in ("", "networks.lora") else ("LoRA_type", kind)
        recipe.name(NO_COUNTERPART, *what, "a plain LoRA is trained instead")
    preset_name, preset = _argument(recipe, "preset")
    gui_preset = recipe.take("LyCORIS_preset")
    if preset is None:
        preset_name, preset = "LyCORIS_preset", gui_preset
    conv_name, conv = _argument(recipe, "conv_dim")
    alpha_name, conv_alpha = _argument(recipe, "conv_alpha")
    unused = bool(kind) and not lycoris and kind != "Kohya LoCon"
    if unused:
        for full, value in ((conv_name, conv), (alpha_name, conv_alpha), (preset_name, preset)):
            if value is not None:
                recipe.name(NOT_NEEDED, full, value, f"LoRA_type {kind} does not use it")
        conv = preset = None
    unet, text = PRESETS["attn-mlp"]
    if lycoris:
        if preset is not None and preset not in PRESETS:
            recipe.name(NO_COUNTERPART, preset_name, preset, "the preset full is used instead")
        unet, text = PRESETS.get(str(preset), PRESETS["full"])
    elif not is_off(conv):
        unet = (*UNET_TRANSFORMER, *UNET_RESIDUAL)
    _parts(recipe, unet, text, "network_module" if module else "LoRA_type" if kind else "network_dim")
    if lycoris and preset is not None and preset in PRESETS:
        recipe.name(NOT_NEEDED, preset_name, preset, "lora_targets names its layers")
    if not unused:
        _convolutions(recipe, "op" in unet, lycoris, (conv_name, conv), (alpha_name, conv_alpha))
    return algo


def _convolutions(recipe: Recipe, trained: bool, lycoris: bool, dim: tuple[str, Any], alpha: tuple[str, Any]) -> None:
    """Write the rank and the alpha of the 3x3 convolutions, or name them.

    Left out, LyCORIS has those of the other layers, and networks.lora no such convolutions, or an alpha of 1.
    """
    given = [pair for pair in (dim, alpha) if pair[1] is not None]
    if not trained:
        for name, value in given:
            recipe.name(OFF if is_off(value) else NOT_NEEDED, name, value, "no 3x3 convolutions are trained")
        return
    ranks = as_number(recipe.left.get("network_dim") or 4, "network_dim")
    alphas = as_number(recipe.left.get("network_alpha") or 1, "network_alpha")
    of_rank = ranks if is_off(dim[1]) else as_number(dim[1], dim[0])
    of_alpha = (alphas if lycoris else 1.0) if is_off(alpha[1]) else as_number(alpha[1], alpha[0])
    if (of_rank, of_alpha) == (ranks, alphas):
        for name, value in given:
            recipe.name(NOT_NEEDED, name, value, "it is that of the other layers")
    elif "conv_dim" in recipe.known:
        recipe.write("conv_dim", whole(of_rank), dim[0])
        if not is_off(alpha[1]):
            recipe.write("conv_alpha", whole(of_alpha), alpha[0])
        else:  # always, as it would be conv_dim here
            if alpha[1] is not None:
                recipe.name(OFF, alpha[0], alpha[1])
            left_out = f"left out there: that of {'the other layers' if lycoris else recipe.project}"
            recipe.settings["conv_alpha"] = Written(float(of_alpha), "", left_out)
    else:
        reason = f"there the 3x3 convolutions have rank {of_rank:g} and alpha {of_alpha:g}, here those of all layers"
        for name, value in given:
            recipe.name(NOT_IN_VERSION, name, value, reason)


def _parts(recipe: Recipe, unet: tuple[str, ...], text: tuple[str, ...], key: str) -> None:
    """Write which networks are trained, and their layers."""
    rates = {name: recipe.left.get(name) for name in ("unet_lr", "text_encoder_lr")}
    no_unet = recipe.is_on("network_train_text_encoder_only") or (
        not is_empty(rates["unet_lr"]) and is_off(rates["unet_lr"])
    )
    no_text = recipe.is_on("network_train_unet_only") or (
        not is_empty(rates["text_encoder_lr"]) and _first_is_off(rates["text_encoder_lr"])
    )
    if no_unet and no_text:  # the GUI then has learning_rate alone
        no_unet = no_text = False
        reason = "zero rates of both networks stand for learning_rate"
        for name in ("unet_lr", "text_encoder_lr"):
            if name in recipe.left:
                recipe.name(OFF, name, recipe.left.pop(name), reason)
    no_text = no_text or not text
    for name, ours in (
        ("network_train_unet_only", "lora_ft_text_encoder"),
        ("network_train_text_encoder_only", "lora_ft_unet"),
    ):
        value = recipe.take(name)
        if value is not None:
            if is_off(value):
                recipe.name(OFF, name, value)
            else:
                recipe.write(ours, False, name, value)
    if no_unet:
        recipe.default("lora_ft_unet", False, "unet_lr is 0 there")
    if no_text:
        recipe.settings.pop("lora_ft_text_encoder", None)
        recipe.write("lora_ft_text_encoder", False, "network_train_unet_only text_encoder_lr")
    else:
        recipe.default("lora_ft_text_encoder", True)
    for name, off in (("unet_lr", no_unet), ("text_encoder_lr", no_text)):
        if off and name in recipe.left:
            value = recipe.left.pop(name)
            recipe.name(OFF if _first_is_off(value) else NOT_NEEDED, name, value, "that network is not trained")
    names = (*(() if no_unet else unet), *(() if no_text else text))
    recipe.write("lora_targets", list(names), key, "its layers")


def _first_is_off(value: Any) -> bool:
    return is_off(value[0]) if isinstance(value, list) and value else is_off(value)
