"""PEFT's LoraConfig, the settings beside its factors: in a folder's adapter_config.json, and in diffusers' files.

The rank of a layer is `r`, its alpha `lora_alpha`, unless a key of `rank_pattern` or `alpha_pattern` (a regular
expression for the end of its name) says otherwise. The update is alpha / rank * B @ A, with `use_rslora`
alpha / sqrt(rank) * B @ A (Kalajdzievski 2023).
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import regex

from ldm.errors import UserError, plain
from ldm.lora.formats.modules import Module
from ldm.lora.lora import LoRALayer
from ldm.settings.declare import setting
from ldm.settings.read import read_mapping

# Settings with which the factors are not what is added to the published base.
REFUSED = {
    "use_dora": "a DoRA: it scales whole columns beside the low-rank pairs, which is not supported",
    "use_qalora": "a QALoRA, which pools the inputs: not supported",
    "alora_invocation_tokens": "an activated LoRA, which acts from some words of a text on: not supported",
    "layer_replication": "for a model with replicated layers: not supported",
    "modules_to_save": "saved with whole layers (modules_to_save), which are no low-rank pairs: not supported",
}
# Bounds for the patterns of a file: how many, characters of one, repetitions within one ("{2,3}", multiplied), which
# `regex` writes out, and seconds of computing for all together: its own clock is that too.
MOST_PATTERNS, LONGEST_PATTERN, MOST_REPETITIONS, MOST_SECONDS = 4096, 1000, 1000, 3.0
_REPETITION = re.compile(r"\{([0-9]{0,6})(?:,([0-9]{0,6}))?\}")
# What `regex` reads otherwise than `re` does, with which PEFT compares: approximate matches and classes by name.
_READ_OTHERWISE = re.compile(rf"(?!{_REPETITION.pattern})\{{|\[:")
MOST_NUMBER = 1e30
MODIFIED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class _Numbers:
    """What the factors are multiplied by, with LoraConfig's own defaults."""

    r: Union[int, float] = setting(8, low=-MOST_NUMBER, high=MOST_NUMBER)
    lora_alpha: Union[int, float] = setting(8, low=-MOST_NUMBER, high=MOST_NUMBER)
    use_rslora: Optional[bool] = setting(None)
    rank_pattern: Optional[dict[str, Union[int, float]]] = setting(
        None, low=-MOST_NUMBER, high=MOST_NUMBER, length=(0, MOST_PATTERNS)
    )
    alpha_pattern: Optional[dict[str, Union[int, float]]] = setting(
        None, low=-MOST_NUMBER, high=MOST_NUMBER, length=(0, MOST_PATTERNS)
    )


class Adapter:
    """The settings of one network's factors. Raises UserError for what is no plain LoRA, and for nonsense."""

    def __init__(self, settings: Mapping[str, Any], where: str):
        self.where = where
        kind = settings.get("peft_type") or "LORA"
        if str(kind).upper() != "LORA":
            raise UserError(f"{where}: peft_type is {plain(kind, 40)}: only LORA is a pair of low-rank factors")
        for key, what in REFUSED.items():
            if settings.get(key):
                raise UserError(f"{where}: {key} is set: it is {what}")
        start = str(settings.get("init_lora_weights")).lower()
        if start.startswith(MODIFIED_BASE):
            raise UserError(
                f"{where}: init_lora_weights is {plain(start, 40)}: it belongs to a base that was changed with it; let "
                "PEFT write it for the published base (path_initial_model_for_weight_conversion)"
            )
        numbers = _Numbers(**read_mapping(_Numbers, settings, where, ignore_unknown=True))
        self.r, self.lora_alpha, self.use_rslora = numbers.r, numbers.lora_alpha, bool(numbers.use_rslora)
        self.rank_pattern, self.alpha_pattern = numbers.rank_pattern or {}, numbers.alpha_pattern or {}
        self.target_modules = settings.get("target_modules")
        self._seconds = MOST_SECONDS
        self._ranks, self._alphas = (self._compiled(key) for key in ("rank_pattern", "alpha_pattern"))

    def alpha(self, module: str, rank: int) -> float:
        """The alpha of a layer by this project's formula. Raises UserError if its factors have another rank."""
        said = self._of("rank_pattern", self._ranks, module, self.r)
        if said != rank:
            raise UserError(f"{self.where}: the rank of {module} is {said:g}, but its factors have {rank}")
        alpha = self._of("alpha_pattern", self._alphas, module, self.lora_alpha)
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

    def _compiled(self, key: str) -> list[tuple[Any, float]]:
        """The patterns of a setting as PEFT compares them, for the end of a layer's name, each with its number.

        `re` says whether they are regular expressions; `regex` compares, which stops after a time that is given.
        """
        compiled = []
        start = time.process_time()
        for pattern, value in getattr(self, key).items():
            if len(pattern) > LONGEST_PATTERN:
                raise UserError(
                    f"{self.where}: {plain(pattern, 60)!r} in {key} has {len(pattern):,} characters, at "
                    f"most {LONGEST_PATTERN:,} are read: name the layers"
                )
            repetitions = math.prod(int(count) for pair in _REPETITION.findall(pattern) for count in pair if count)
            if repetitions > MOST_REPETITIONS:
                raise UserError(
                    f"{self.where}: {plain(pattern, 60)!r} in {key} repeats more than "
                    f"{MOST_REPETITIONS:,} times: name the layers"
                )
            if _READ_OTHERWISE.search(pattern):
                raise UserError(
                    f"{self.where}: {plain(pattern, 60)!r} in {key} holds a bracket that no layer's name "
                    "has: name the layers"
                )
            if time.process_time() - start > self._seconds:
                raise self._too_long(key, pattern)
            whole = rf"(.*\.)?({pattern})$"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of forms that may mean something else one day
                    re.compile(whole)
                    compiled.append((regex.compile(whole, regex.VERSION0), value))
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise UserError(
                    f"{self.where}: {plain(pattern, 60)!r} in {key} is no regular expression ({plain(error, 80)})"
                ) from None
        self._seconds -= time.process_time() - start
        return compiled

    def _too_long(self, key: str, pattern: str) -> UserError:
        return UserError(
            f"{self.where}: {key} takes more than {MOST_SECONDS:g} s to compare with the layers' names, "
            f"now at {plain(pattern, 60)!r}: name the layers, without repetitions"
        )

    def _of(self, key: str, patterns: Sequence[tuple[Any, float]], module: str, default: float) -> float:
        """What the first pattern that fits a layer says; of all comparisons, MOST_SECONDS together."""
        # transformers 4 has `text_model.` before the names of a text encoder, and a pattern may have it.
        names = (f"text_model.{module}", module)
        start = time.process_time()
        for pattern, value in patterns:
            left = self._seconds - (time.process_time() - start)
            try:
                if left <= 0:
                    raise TimeoutError
                if any(pattern.match(name, timeout=left) for name in names):
                    default = value
                    break
            except TimeoutError:
                raise self._too_long(key, pattern.pattern[len(r"(.*\.)?(") : -len(")$")]) from None
        self._seconds -= time.process_time() - start
        return default


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
