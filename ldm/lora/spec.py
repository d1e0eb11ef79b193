"""Which layers get low-rank cells, and of what kind: from settings, or from a per-module file in lora_wrapper's form.

    trainable_model: 0            # 1: train the rest of the network too
    to_q: {r: 8, scale: 1, trainable_scale: 0, hard: 1}
    ff.net.*: {r: 4, alpha: 8, dropout: 0.1}
    middle_block.*.to_q: {r: 16}  # of several names that fit a layer the last one holds
    middle_block.*.to_out.0: {r: 0}  # none here

JSON (by the suffix .json) or YAML. A name is that of a layer or its last dotted parts; `*`, `?` and `[...]` stand for
characters, dots too.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.documents import read_json, read_yaml
from ldm.settings.read import nearest

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PROJECTIONS = ("proj_in", "proj_out")
RESIDUAL = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op", "conv")
TARGETS = {"attention": ATTENTION, "all": ATTENTION + FEED_FORWARD + PROJECTIONS + RESIDUAL}

TRAINABLE_MODEL = "trainable_model"
# Bounds: names in a configuration, characters of one; the size of an alpha or a scale, and its inverse.
MOST_NAMES, LONGEST_NAME, LARGEST = 4096, 200, 1e9


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is adapted.

    Attributes:
        rank: of the factors ("r" in a file); 0 leaves the layer as it is.
        alpha: the update is multiplied by alpha / rank; None stands for alpha = rank.
        scale: and by this.
        trainable_scale: train the scale as well.
        hard: of a 1x1 convolution: add the factors' product to the kernel and convolve once. Otherwise (soft) two
            convolutions go beside the layer's. Both compute the same. Dense layers have only one form.
        dropout: share of the layer's inputs that the update does not see in a training step.
    """

    rank: int = 4
    alpha: float | None = None
    scale: float = 1.0
    trainable_scale: bool = False
    hard: bool = False
    dropout: float = 0.0


@dataclass(frozen=True)
class LoRASpec:
    """What to inject.

    Attributes:
        rank, alpha, scale, dropout: as in LayerSpec, of every layer that `modules` does not say it of.
        unet, text_encoder: which networks.
        targets: one or several of "attention" (q, k, v and output projections), "all" (and feed-forward, projections
            around the transformers, residual blocks and resampling convolutions), and the last parts of layers' names.
        fp16: let the factors compute in fp16 where their layer does; they are stored in fp32 in any case.
        seed: of the initial values.
        modules: in the place of `targets`: layers' names (see above) -> LayerSpec, as `with_config` reads them.
        trainable_model: train what holds no LoRA too, of the networks chosen.
    """

    rank: int = 4
    alpha: float | None = None
    scale: float = 1.0
    unet: bool = True
    text_encoder: bool = False
    targets: str | tuple[str, ...] = "attention"
    fp16: bool = True
    seed: int = 0
    dropout: float = 0.0
    modules: Mapping[str, LayerSpec] = field(default_factory=dict)
    trainable_model: bool = False

    def with_config(self, config: str | Path | Mapping[str, Any]) -> LoRASpec:
        """This spec with a per-module configuration: the path of a JSON or YAML file, or its content.

        Raises UserError for a file that cannot be read, a setting that is not known, of a wrong type or out of range.
        """
        where = "the LoRA configuration" if isinstance(config, Mapping) else str(config)
        content = config if isinstance(config, Mapping) else _read(Path(config))
        if not isinstance(content, Mapping):
            raise UserError(f'{where} must hold entries such as "to_q": {{"r": 8}}, not a {type(content).__name__}')
        content = dict(content)
        whole = _flag(content.pop(TRAINABLE_MODEL, 0), f"{where}: {TRAINABLE_MODEL}")
        if not content:
            raise UserError(f'{where} names no layer: give entries such as "to_q": {{"r": 8}}')
        _check_names(content, where)
        modules = {str(name): self._layer(entry, f"{where}: {plain(name)}") for name, entry in content.items()}
        return replace(self, modules=modules, trainable_model=whole)

    def layer_specs(self) -> dict[str, LayerSpec]:
        """Name or pattern -> LayerSpec, checked; of several that fit a layer the last one holds. Raises UserError."""
        if not (self.unet or self.text_encoder):
            raise UserError("lora_ft_unet and lora_ft_text_encoder are both False: there is nothing to train, set one")
        if self.modules:
            _check_names(self.modules, "the LoRA configuration")
            for name, layer in self.modules.items():
                _check(layer, f'"{plain(name)}": ', least=0)
            return dict(self.modules)
        if isinstance(self.targets, str) and self.targets not in TARGETS:
            raise UserError(
                f"LoRA targets {plain(self.targets)!r}: choose one of {', '.join(TARGETS)}, or give layer names"
            )
        if not self.targets:
            raise UserError(f"lora_targets is empty: give {', '.join(TARGETS)}, or the last parts of layers' names")
        _check_names(self.targets, "lora_targets")
        layer = LayerSpec(self.rank, self.alpha, self.scale, dropout=self.dropout)
        _check(layer, "lora_")
        return {name: layer for entry in self.target_list() for name in TARGETS.get(entry, (entry,))}

    def target_list(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def _layer(self, entry: Any, where: str) -> LayerSpec:
        if not isinstance(entry, Mapping):
            raise UserError(f'{where}: {plain(repr(entry))} is no module\'s setting: write {{"r": 8}}')
        readers = {"r": _whole, "alpha": _number, "scale": _number, "trainable_scale": _flag, "hard": _flag,
                   "dropout": _number}  # fmt: skip
        for key in entry:
            if key not in readers:
                key = plain(key, 60)
                raise UserError(
                    f'{where}: unknown setting "{key}": did you mean "{nearest(key, list(readers))}"? '
                    f"({', '.join(readers)})"
                )
        given = {key: readers[key](value, f"{where}: {key}") for key, value in entry.items()}
        if "r" in given:
            given["rank"] = given.pop("r")
        layer = replace(LayerSpec(self.rank, self.alpha, self.scale, dropout=self.dropout), **given)
        _check(layer, f"{where}: ", least=0)
        return layer


def fits(pattern: str, name: str) -> bool:
    """Whether `pattern` is the name of a layer or its last dotted parts; `*`, `?` and `[...]` match characters."""
    return bool(_pattern(pattern).match(f".{name}"))


@lru_cache(maxsize=MOST_NAMES)
def _pattern(pattern: str) -> re.Pattern[str]:
    # Not fnmatchcase, which keeps fewer patterns than a model has layers. What `translate` makes of many `*` does not
    # go back over what an earlier one has matched, so its time grows with the name's length times their number.
    return re.compile(translate(f"*.{pattern}"))


def near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three ends of layers' names, or whole ones, that look like `pattern`."""
    parts = pattern.count(".") + 1
    ends = {".".join(name.split(".")[-length:]) for name in names for length in range(1, parts + 1)}
    return difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.5)


def _check_names(names: Iterable[Any], where: str) -> None:
    """Raise UserError for more names than a model has layers, or longer ones."""
    names = list(names)
    if len(names) > MOST_NAMES:
        raise UserError(f"{where} holds {len(names):,} names, at most {MOST_NAMES:,} are read: use * for several")
    long = next((name for name in map(str, names) if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise UserError(
            f'{where}: the name "{plain(long, 60)}" has {len(long):,} characters, at most {LONGEST_NAME} '
            "are read: give the last parts of a layer's name, such as to_q"
        )


def _check(layer: LayerSpec, where: str, least: int = 1) -> None:
    """`where` comes before the setting's name in an error."""
    rank = layer.rank
    name = "r" if where != "lora_" else "rank"
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < least:
        raise UserError(f"{where}{name} is {plain(rank, 40)}: it must be a whole number, {least} or more (4 is usual)")
    for setting, value in (("alpha", layer.alpha), ("scale", layer.scale), ("dropout", layer.dropout)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{where}{setting} is {value}: it must be a finite number")
    for setting, value in (("alpha", layer.alpha), ("scale", layer.scale)):
        if value and not 1 / LARGEST <= abs(value) <= LARGEST:
            raise UserError(
                f"{where}{setting} is {value:g}: it must be between {1 / LARGEST:g} and {LARGEST:g} (1 is usual)"
            )
    if layer.alpha is not None and layer.alpha <= 0:
        raise UserError(f"{where}alpha is {layer.alpha}: it must be above 0 (leave it out for alpha = rank)")
    if not 0 <= layer.dropout < 1:
        raise UserError(f"{where}dropout is {layer.dropout}: it must be at least 0 and below 1")
    if layer.hard and layer.dropout:
        raise UserError(
            f"{where}hard and dropout do not go together: a hard update is part of the kernel, its inputs are the "
            "layer's own; set hard 0"
        )


def _read(path: Path) -> Any:
    way = "give the path of a JSON or YAML file"
    return read_json(path, way=way) if path.suffix == ".json" else read_yaml(path, way=way)


def _flag(value: Any, where: str) -> bool:
    if value not in (0, 1):  # False and True are equal to these
        raise UserError(f"{where}: {plain(repr(value))} is neither 0 nor 1")
    return bool(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: {plain(repr(value))} is not a whole number")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}: {plain(repr(value))} is not a number")
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
