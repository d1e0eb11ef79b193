"""Reading the formats whose keys name a layer and one of its arrays: kohya's, diffusers' and PEFT's.

A format says how a key is parsed and how it names the layers of a base model. Reading then finds the base model that
has all the names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from ldm.errors import UserError, plain
from ldm.lora.formats.factors import read_embeddings, reshape_layer, without_extras
from ldm.lora.formats.modules import BaseModules, Module, known_bases
from ldm.lora.formats.parts import LayerUpdates, read_updates, shapes_of
from ldm.lora.lora import LoRA
from ldm.lora.updates import Full, LayerUpdate
from ldm.weights.checkpoint import Checkpoint
from ldm.weights.recognise import sdxl_lora

# A key -> (the format's name of the layer, the part as in ldm.lora.formats.parts), or None for any other key.
Parse = Callable[[str], Optional[tuple[str, str]]]
# A base model -> its modules by the format's names.
Table = Callable[[BaseModules], Mapping[str, Module]]
# (the format's name of a layer, its rank or None) -> the alpha of a layer without an array for it.
Alpha = Callable[[str, Optional[int]], Optional[float]]
# The format's name of a layer -> part -> key.
Keys = Mapping[str, Mapping[str, str]]

# PEFT's names of the two factors: A is down and B is up. The name of an adapter may stand before `weight`.
PEFT_FACTOR = r"lora_([AB])(?:\.(?!weight)[^.]+)?\.weight"
FACTOR_OF_LETTER = {"A": "down", "B": "up"}
# PEFT's name of DoRA's magnitude, after which the name of an adapter and `weight` may stand.
MAGNITUDE = r"lora_(magnitude)_vector(?:\.\w+)*"


def read_keyed(
    checkpoint: Checkpoint,
    parse: Parse,
    table: Table,
    base: BaseModules | None,
    alpha: Alpha = lambda layer, rank: rank,
) -> LoRA:
    """Read the layers of an opened file.

    Args:
        checkpoint: The file.
        parse: How the format's keys are parsed.
        table: How the format names the modules of a base model.
        base: The base model that the LoRA is for. None for the known one that has all the names and shapes.
        alpha: The alpha of layers for which the file has no array.

    Returns:
        The LoRA without metadata.

    Raises:
        UserError: Keys or layers are unknown, half of a pair is missing, factors do not go together, or (without
            `base`) the shapes are those of no known base model.
    """
    path = checkpoint.path
    keys = _keys_by_layer(checkpoint, parse)
    tables = _complete_tables(checkpoint, keys, table, base)
    shapes = {name: shapes_of(checkpoint, name, parts) for name, parts in keys.items()}
    modules = tables[base] if base else _best_table(checkpoint, keys, shapes, tables)
    layers: dict[str, LayerUpdate] = {}
    biases: dict[str, Full] = {}
    sources: dict[str, str] = {}
    for name, parts in keys.items():
        module = modules[name]
        first = next(iter(parts.values()))
        if module.name in sources:  # under two of its names
            raise UserError(f"{path}: {_duplicate(sources[module.name], first)}")
        update, bias = shapes[name]
        if "mid" in parts and update is not None and not update.fits(module.shape):
            raise UserError(
                f"{path}: {name} is {update.shape}, in the model {module.shape}: it was made for another model"
            )
        update, bias = read_updates(checkpoint, name, parts, alpha(name, None if update is None else update.rank))
        if update is not None:
            layers[module.name] = reshape_layer(update, module.shape)
        if bias is not None:
            biases[module.name] = bias
        sources[module.name] = first
    return LoRA(layers, {}, read_embeddings(checkpoint), biases)


def _keys_by_layer(checkpoint: Checkpoint, parse: Parse) -> Keys:
    keys: dict[str, dict[str, str]] = {}
    unknown = []
    for key in checkpoint:
        parsed = parse(key)
        if parsed is None:
            unknown.append(key)
            continue
        name, factor = parsed
        if factor in keys.setdefault(name, {}):
            raise UserError(f"{checkpoint.path}: {_duplicate(keys[name][factor], key)}")
        keys[name][factor] = key
    unknown = without_extras(unknown)
    if unknown:
        raise UserError(
            f"{checkpoint.path}: {len(unknown)} of its {len(checkpoint)} keys belong to nothing in a LoRA, such as "
            f"{plain(unknown[0])}: is the file damaged, or of another kind?"
        )
    return keys


def _complete_tables(
    checkpoint: Checkpoint, keys: Keys, table: Table, base: BaseModules | None
) -> dict[BaseModules, Mapping[str, Module]]:
    """Return the tables that have every layer of `keys`, by base model. Raises UserError if there are none."""
    tables = {candidate: table(candidate) for candidate in ((base,) if base else known_bases())}
    complete = {candidate: modules for candidate, modules in tables.items() if keys.keys() <= modules.keys()}
    if complete:
        return complete
    _refuse_sdxl(checkpoint, keys)
    path = checkpoint.path
    fitting = next((other.label for other in known_bases() if keys.keys() <= table(other).keys()), "another model")
    best, modules = max(tables.items(), key=lambda item: len(keys.keys() & item[1].keys()))
    missing = [name for name in keys if name not in modules]
    if len(missing) == len(keys):
        labels = " or ".join(candidate.label for candidate in tables)
        raise UserError(
            f"{path}: none of its {len(keys)} layers is one of {labels}, such as {plain(missing[0])}: it was made for "
            f"{fitting}"
        )
    raise UserError(
        f"{path}: {len(missing)} of its {len(keys)} layers belong to nothing in {best.label}, such as "
        f"{plain(missing[0])}: it was made for {fitting}"
    )


def _best_table(
    checkpoint: Checkpoint,
    keys: Keys,
    shapes: Mapping[str, LayerUpdates],
    tables: Mapping[BaseModules, Mapping[str, Module]],
) -> Mapping[str, Module]:
    """Return the table whose modules have the shapes of the layers, best with as many axes. UserError if none has."""
    reasons = []
    best, best_score = None, 0
    for base, modules in tables.items():
        misfits = {name: misfit for name in shapes if (misfit := _misfit(shapes[name], modules[name], base))}
        # A layer with as many axes as in the model counts for more.
        score = sum(1 + (update is None or update.shape == modules[name].shape) for name, (update, _) in shapes.items())
        if misfits:
            reasons.append("{} {}".format(*next(iter(misfits.items()))))
        elif score > best_score:
            best, best_score = modules, score
    if best is None:
        _refuse_sdxl(checkpoint, keys, shapes)
        raise UserError(
            f"{checkpoint.path} fits no known base model: {'; '.join(reasons)}. Name its model YAML, or take another "
            "file"
        )
    return best


def _misfit(updates: LayerUpdates, module: Module, base: BaseModules) -> str:
    """Say in a few words why a layer's updates do not fit a module, "" if they do."""
    update, bias = updates
    if update is not None and not update.fits(module.shape):
        return f"is {update.misfit(module.shape)}, in {base.label} {module.shape}"
    wanted = base.shapes.get(f"{module.name}.bias")
    if bias is not None and bias.shape != wanted:
        return f"has a bias of {bias.shape}, in {base.label} " + (
            "it has none" if wanted is None else f"it is {wanted}"
        )
    return ""


def _refuse_sdxl(checkpoint: Checkpoint, keys: Keys, updates: Mapping[str, LayerUpdates] | None = None) -> None:
    """Raise UserError if a layer shows that the LoRA is for SDXL."""
    shapes = {name: checkpoint.shape(parts["down"]) if "down" in parts else () for name, parts in keys.items()}
    shapes.update({name: update.shape for name, (update, _) in (updates or {}).items() if update is not None})
    sdxl = sdxl_lora(shapes)
    if sdxl:
        raise UserError(f"{checkpoint.path} is {sdxl}")


def _duplicate(key: str, other: str) -> str:
    return f"{plain(key)} and {plain(other)} stand for the same layer: take one of them out"
