"""PEFT's LoraConfig, the settings beside its factors: in a folder's adapter_config.json, and in diffusers' files.

The rank of a layer is `r`, its alpha `lora_alpha`, unless a key of `rank_pattern` or `alpha_pattern` (a regular
expression for the end of its name) says otherwise. The update is alpha / rank * B @ A, with `use_rslora`
alpha / sqrt(rank) * B @ A (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.lora.formats.modules import Module
from ldm.lora.state import LoRALayer

R, LORA_ALPHA = 8, 8  # LoraConfig's own defaults
# Settings with which the factors are not what is added to the published base.
REFUSED = {
    "use_dora": "a DoRA: it scales whole columns beside the low-rank pairs, which is not supported",
    "use_qalora": "a QALoRA, which pools the inputs: not supported",
    "alora_invocation_tokens": "an activated LoRA, which acts from some words of a text on: not supported",
    "layer_replication": "for a model with replicated layers: not supported",
    "modules_to_save": "saved with whole layers (modules_to_save), which are no low-rank pairs: not supported",
}
MODIFIED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Adapter:
    """The settings of one network's factors. Raises UserError for what is no plain LoRA, and for nonsense."""

    def __init__(self, settings: Mapping[str, Any], where: str):
        self.where = where
        kind = settings.get("peft_type") or "LORA"
        if str(kind).upper() != "LORA":
            raise UserError(f"{where}: peft_type is {kind}: only LORA is a pair of low-rank factors")
        for key, what in REFUSED.items():
            if settings.get(key):
                raise UserError(f"{where}: {key} is set: it is {what}")
        start = str(settings.get("init_lora_weights")).lower()
        if start.startswith(MODIFIED_BASE):
            raise UserError(
                f"{where}: init_lora_weights is {start}: it belongs to a base that was changed with it; let PEFT write "
                "it for the published base (path_initial_model_for_weight_conversion)"
            )
        self.r = self._number(settings, "r", R)
        self.lora_alpha = self._number(settings, "lora_alpha", LORA_ALPHA)
        self.use_rslora = bool(settings.get("use_rslora"))
        self.target_modules = settings.get("target_modules")
        self.rank_pattern = self._pattern(settings, "rank_pattern")
        self.alpha_pattern = self._pattern(settings, "alpha_pattern")

    def alpha(self, module: str, rank: int) -> float:
        """The alpha of a layer by this project's formula. Raises UserError if its factors have another rank."""
        said = self._of(self.rank_pattern, module, self.r)
        if said != rank:
            raise UserError(f"{self.where}: the rank of {module} is {said:g}, but its factors have {rank}")
        alpha = self._of(self.alpha_pattern, module, self.lora_alpha)
        return alpha * math.sqrt(rank) if self.use_rslora else alpha

    def arguments(self) -> dict[str, Any]:
        """The arguments of LoraConfig that say it all."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
        }

    def _number(self, settings: Mapping[str, Any], key: str, default: float) -> float:
        value = settings.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise UserError(f"{self.where}: {key} is {str(value)[:40]!r}; it must be a finite number")
        return value

    def _pattern(self, settings: Mapping[str, Any], key: str) -> dict[str, float]:
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{self.where}: {key} is {pattern!r}; it must be a mapping from layers to numbers")
        for name in pattern:
            try:
                re.compile(name)
            except re.error as error:
                raise UserError(f"{self.where}: {name!r} in {key} is no regular expression ({error})") from error
        return {name: self._number(pattern, name, 0) for name in pattern}

    @staticmethod
    def _of(pattern: Mapping[str, float], module: str, default: float) -> float:
        # transformers 4 has `text_model.` before the names of a text encoder, and a pattern may have it.
        names = (f"text_model.{module}", module)
        found = (value for key, value in pattern.items() if any(re.match(rf"(.*\.)?({key})$", name) for name in names))
        return next(found, default)


def adapter_of(layers: Mapping[str, LoRALayer], modules: Iterable[Module]) -> Adapter:
    """The settings for one network's layers (by the path of the module), as short as they can be said.

    modules: all of that network. Names are without `text_model.`, which transformers 5 does not have: being ends of
    names, they match with it as well.
    """
    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: whole(layer.alpha) for path, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(list(layers), [module.path for module in modules]),
        "rank_pattern": {path: value for path, value in ranks.items() if value != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }
    return Adapter(settings, "the LoRA")


def whole(number: float) -> float:
    """`number` as an int where it is one, which is how PEFT writes it."""
    return int(number) if number == int(number) else number


def _targets(paths: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Names whose matches (a name itself, or what ends with it after a dot) are `paths` exactly."""
    targets = []
    for path in paths:
        short = re.sub(r"^.*\.(?=[a-z_0-9]*[a-z])", "", path)  # its last part, with the number after it: to_out.0
        matched = {other for other in everything if f".{other}".endswith(f".{short}")}
        targets.append(short if matched <= set(paths) else path)
    return sorted(set(targets))
