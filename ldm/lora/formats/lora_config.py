"""PEFT's LoraConfig, the settings beside its factors: in a folder's adapter_config.json, and in diffusers' files.

The rank of a layer is `r` and its alpha is `lora_alpha`, unless a key of `rank_pattern` or `alpha_pattern` (a regular
expression for the end of the layer's name) gives another. The update is alpha / rank * B @ A, with `use_rslora`
alpha / sqrt(rank) * B @ A (Kalajdzievski 2023).
"""

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
from ldm.lora.updates import LoRALayer
from ldm.settings.declare import setting
from ldm.settings.read import read_mapping

TYPES = ("LORA", "LOHA", "LOKR")
# Settings with which the factors are not the update of the published base model.
UNSUPPORTED = {
    "use_qalora": "a QALoRA, which pools the inputs: not supported",
    "alora_invocation_tokens": "an activated LoRA, which acts only after certain words of a text: not supported",
    "layer_replication": "for a model with replicated layers: not supported",
    "modules_to_save": "saved with whole layers (modules_to_save), which are no low-rank pairs: not supported",
}
# Bounds for the patterns of a file: their number, the characters of a pattern, its repetitions ("{2,3}", multiplied,
# because `regex` expands them), and the seconds of CPU time for all comparisons together.
MAX_PATTERNS, MAX_PATTERN_LENGTH, MAX_REPETITIONS, MAX_SECONDS = 4096, 1000, 1000, 3.0
_REPETITION = re.compile(r"\{([0-9]{0,6})(?:,([0-9]{0,6}))?\}")
# Syntax that `regex` reads differently from `re`, which PEFT uses: approximate matches and named character classes.
_DIFFERENT_SYNTAX = re.compile(rf"(?!{_REPETITION.pattern})\{{|\[:")
MAX_NUMBER = 1e30
# Values of init_lora_weights with which the base model was changed as well.
MODIFIED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class _Numbers:
    """What the factors are multiplied by, with LoraConfig's own defaults."""

    r: Union[int, float] = setting(8, low=-MAX_NUMBER, high=MAX_NUMBER)
    lora_alpha: Union[int, float] = setting(8, low=-MAX_NUMBER, high=MAX_NUMBER)
    use_rslora: Optional[bool] = setting(None)
    rank_pattern: Optional[dict[str, Union[int, float]]] = setting(
        None, low=-MAX_NUMBER, high=MAX_NUMBER, length=(0, MAX_PATTERNS)
    )
    alpha_pattern: Optional[dict[str, Union[int, float]]] = setting(
        None, low=-MAX_NUMBER, high=MAX_NUMBER, length=(0, MAX_PATTERNS)
    )


class LoraConfig:
    """The settings of one network's factors.

    Args:
        settings: PEFT's arguments.
        where: Name of their file in errors.

    Raises:
        UserError: The settings are not those of a plain LoRA, or make no sense.
    """

    def __init__(self, settings: Mapping[str, Any], where: str):
        self.where = where
        kind = str(settings.get("peft_type") or "LORA").upper()
        if kind not in TYPES:
            raise UserError(f"{where}: peft_type is {plain(kind, 40)}: only {', '.join(TYPES)} can be read")
        if kind != "LORA":  # the other types call it `alpha`
            settings = {**settings, "lora_alpha": settings.get("alpha", 8)}
        for key, what in UNSUPPORTED.items():
            if settings.get(key):
                raise UserError(f"{where}: {key} is set: it is {what}")
        init = str(settings.get("init_lora_weights")).lower()
        if init.startswith(MODIFIED_BASE):
            raise UserError(
                f"{where}: init_lora_weights is {plain(init, 40)}: it belongs to a base model that was changed with "
                "it. Let PEFT write it for the published one (path_initial_model_for_weight_conversion)"
            )
        self._numbers = _Numbers(**read_mapping(_Numbers, settings, where, ignore_unknown=True))
        self._seconds_left = MAX_SECONDS
        self._patterns = {key: self._compile(key) for key in ("rank_pattern", "alpha_pattern")}

    def alpha(self, module: str, rank: int | None) -> float:
        """Return the alpha of a layer in this project's formula.

        Args:
            module: The layer's name in diffusers or transformers.
            rank: The rank of its factors, None for a LoKr of two whole ones. Its alpha is its scale: alpha / r.

        Raises:
            UserError: The settings give the layer another rank.
        """
        expected = self._value_for("rank_pattern", module, self._numbers.r)
        if rank is None:
            return self._value_for("alpha_pattern", module, self._numbers.lora_alpha) / (expected or 1)
        if expected != rank:
            raise UserError(f"{self.where}: the rank of {module} is {expected:g}, but its factors have {rank}")
        alpha = self._value_for("alpha_pattern", module, self._numbers.lora_alpha)
        return alpha * math.sqrt(rank) if self._numbers.use_rslora else alpha

    @property
    def scale(self) -> float:
        """Alpha / r without the patterns."""
        return self._numbers.lora_alpha / self._numbers.r if self._numbers.r else 1.0

    def _compile(self, key: str) -> list[tuple[Any, float]]:
        """Return (compiled pattern, number) for each pattern of a setting."""
        compiled = []
        start = time.process_time()
        for pattern, value in (getattr(self._numbers, key) or {}).items():
            if time.process_time() - start > self._seconds_left:
                raise self._too_long(key, pattern)
            try:
                compiled.append((_compile(pattern), value))
            except ValueError as error:
                raise UserError(f"{self.where}: {plain(pattern, 60)!r} in {key} {error}") from None
        self._seconds_left -= time.process_time() - start
        return compiled

    def _too_long(self, key: str, pattern: str) -> UserError:
        return UserError(
            f"{self.where}: {key} takes more than {MAX_SECONDS:g} s to compare with the layers' names, "
            f"now at {plain(pattern, 60)!r}: name the layers, without repetitions"
        )

    def _value_for(self, key: str, module: str, default: float) -> float:
        """Return the number of the first pattern that matches a layer. All comparisons take at most MAX_SECONDS."""
        # transformers 4 has `text_model.` before the names of a text encoder, and so may a pattern.
        names = (f"text_model.{module}", module)
        start = time.process_time()
        for pattern, value in self._patterns[key]:
            left = self._seconds_left - (time.process_time() - start)
            try:
                if left <= 0:
                    raise TimeoutError
                if any(pattern.match(name, timeout=left) for name in names):
                    default = value
                    break
            except TimeoutError:
                raise self._too_long(key, pattern.pattern[len(r"(.*\.)?(") : -len(")$")]) from None
        self._seconds_left -= time.process_time() - start
        return default


def settings_of(layers: Mapping[str, LoRALayer], modules: Iterable[Module], use_dora: bool = False) -> dict[str, Any]:
    """Return PEFT's arguments for one network's layers, with as few patterns as possible.

    Names are without `text_model.`, which transformers 5 does not have. They match names that have it as well.

    Args:
        layers: Module.path -> layer.
        modules: All modules of that network.
        use_dora: Whether all layers have magnitudes beside the factors.

    Raises:
        UserError: An alpha is larger than LoraConfig reads.
    """
    ranks = {path: layer.rank for path, layer in layers.items()}
    # PEFT writes an integral alpha as an int.
    alphas = {path: int(layer.alpha) if layer.alpha % 1 == 0 else layer.alpha for path, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    settings = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(list(layers), [module.path for module in modules]),
        "rank_pattern": {path: value for path, value in ranks.items() if value != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "use_dora": use_dora,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    LoraConfig(settings, "the LoRA")  # so that every file that is written can be read
    return settings


def _compile(pattern: str) -> Any:
    """Compile a pattern, which matches the end of a name as in PEFT.

    `re` checks that it is a regular expression. `regex` compares, because it stops after a given time.

    Raises:
        ValueError: It is too long, too expensive, or no regular expression.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"has {len(pattern):,} characters, at most {MAX_PATTERN_LENGTH:,} are read: name the layers")
    if math.prod(int(count) for pair in _REPETITION.findall(pattern) for count in pair if count) > MAX_REPETITIONS:
        raise ValueError(f"repeats more than {MAX_REPETITIONS:,} times: name the layers")
    if _DIFFERENT_SYNTAX.search(pattern):
        raise ValueError("holds a bracket that no layer's name has: name the layers")
    whole = rf"(.*\.)?({pattern})$"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that may change its meaning in future
            re.compile(whole)
            return regex.compile(whole, regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression ({plain(error, 80)})") from None


def _targets(paths: Sequence[str], all_paths: Sequence[str]) -> list[str]:
    """Return names that match exactly `paths`. A name matches itself and what ends with it after a dot."""
    targets = []
    for path in paths:
        short = re.sub(r"^.*\.(?=[a-z_0-9]*[a-z])", "", path)  # the last part, with a number after it: to_out.0
        matched = {other for other in all_paths if f".{other}".endswith(f".{short}")}
        targets.append(short if matched <= set(paths) else path)
    return sorted(set(targets))
