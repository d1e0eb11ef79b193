"""Which layers get LoRA, and with what rank and scale: from settings, or from a file with an entry for each module.

The file has the form of lora_wrapper, a project that injects LoRA into MindSpore models. It is JSON (by the suffix
.json) or YAML:

    trainable_model: 0            # 1: train the rest of the network too
    to_q: {r: 8, scale: 1, trainable_scale: 0, hard: 1}
    ff.net.*: {r: 4, alpha: 8, dropout: 0.1}
    middle_block.*.to_q: {r: 16}  # the last entry that matches a layer is used
    middle_block.*.to_out.0: {r: 0}  # no LoRA here

A name is that of a layer or its last dotted parts. `*`, `?` and `[...]` match characters, dots included.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

from ldm.errors import UserError, plain
from ldm.files.documents import read_json, read_yaml
from ldm.settings.declare import MAX_RANK, setting
from ldm.settings.read import check_values, read_mapping

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")
PROJECTIONS = ("proj_in", "proj_out")
RESIDUAL = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op", "conv")
TARGETS = {"attention": ATTENTION, "all": ATTENTION + FEED_FORWARD + PROJECTIONS + RESIDUAL}
ALGOS = ("lora", "loha", "lokr", "dora", "rslora")

# Bounds for a configuration: the number of names, the characters of a name, and the size of an alpha or a scale and of
# its inverse.
MAX_NAMES, LONGEST_NAME, LARGEST = 4096, 200, 1e9


@dataclass(frozen=True)
class LayerSpec:
    """How LoRA is added to one layer. The update of the weight is scale * alpha / rank * up @ down.

    Attributes:
        rank: The rank of the factors ("r" in a file). 0 adds no LoRA.
        alpha: None stands for alpha = rank.
        scale: A further factor.
        trainable_scale: Whether the scale is trained too.
        hard: Whether a 1x1 convolution adds the factors' product to its kernel and convolves once ("hard" in
            lora_wrapper). Otherwise two convolutions run beside the layer's. Both compute the same. Linear layers have
            one form only.
        dropout: The share of the layer's inputs that the update does not see in a training step.
        lr: The learning rate of the factors and the scale. None stands for that of the network.
        algo: The kind of update, one of ALGOS. "dora" is "lora" with `dora_wd`, "rslora" is "lora" with `rs_lora`.
        dora_wd: Whether the norms of the weight's rows are trained by themselves (DoRA).
        rs_lora: Whether alpha is divided by the root of the rank instead of the rank.
        factor: LoKr: into how many parts the channels are divided, see ldm.settings.model_size.factorization.
        use_tucker: Whether larger convolutions have a factor of their own for the kernel's pixels.
        rank_dropout: The probability that a rank is dropped in a training step, or an output of LoHa and LoKr.
        module_dropout: The probability that the layer's whole update is dropped in a training step.
    """

    rank: int = setting(4, key="r", low=0)
    alpha: Optional[float] = setting(None, low=1 / LARGEST, high=LARGEST)
    scale: float = setting(1.0, low=-LARGEST, high=LARGEST)
    trainable_scale: bool = setting(False, zero_one=True)
    hard: bool = setting(False, zero_one=True)
    dropout: float = setting(0.0, low=0, below=1)
    lr: Optional[float] = setting(None, above=0, high=100, shown=False)  # a resumed run may change it
    algo: str = setting("lora", choices=ALGOS)
    dora_wd: bool = setting(False, zero_one=True)
    rs_lora: bool = setting(False, zero_one=True)
    factor: int = setting(-1, low=-1, high=MAX_RANK)
    use_tucker: bool = setting(False, zero_one=True)
    rank_dropout: float = setting(0.0, low=0, below=1)
    module_dropout: float = setting(0.0, low=0, below=1)

    def __repr__(self) -> str:
        """Show the settings that were there from the beginning, and others that are not their defaults.

        A training state holds a hash of this, so that it must stay the same for the same layers.
        """
        always = ("rank", "alpha", "scale", "trainable_scale", "hard", "dropout")
        shown = [f for f in fields(self) if f.name in always or (f.repr and getattr(self, f.name) != f.default)]
        return f"LayerSpec({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def uses_dora(self) -> bool:
        return self.dora_wd or self.algo == "dora"

    @property
    def uses_rs_lora(self) -> bool:
        return self.rs_lora or self.algo == "rslora"


@dataclass(frozen=True)
class _ConfigFile:
    """What a configuration holds beside the modules."""

    trainable_model: bool = setting(False, zero_one=True)


@dataclass(frozen=True)
class LoRASpec:
    """What to inject.

    Attributes:
        rank, alpha, scale, dropout, algo, dora_wd, rs_lora, factor, use_tucker, rank_dropout, module_dropout: As in
            LayerSpec, for every layer where `modules` does not give them.
        unet, text_encoder: Which networks.
        targets: One or several of "attention" (q, k, v and output projections), "all" (also feed-forward, projections
            around the transformers, residual blocks and resampling convolutions), and the last parts of layers' names.
        fp16: Whether the factors compute in fp16 where their layer does. They are stored in fp32 in any case.
        seed: The seed of the initial values.
        modules: Layers' names -> LayerSpec, in place of `targets`, as `with_config` reads them.
        trainable_model: Whether the chosen networks' own parameters are trained too.
        conv_rank: The rank of convolutions that are larger than 1x1. It adds the residual blocks and the resampling
            to `targets`, as kohya's conv_dim does. None: they are like all others.
        conv_alpha: Their alpha. None stands for conv_rank.
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
    algo: str = "lora"
    dora_wd: bool = False
    rs_lora: bool = False
    factor: int = -1
    use_tucker: bool = False
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    conv_rank: int | None = None
    conv_alpha: float | None = None

    def with_config(self, config: str | Path | Mapping[str, Any]) -> LoRASpec:
        """Return this spec with the modules of a configuration.

        Args:
            config: The path of a JSON or YAML file, or its content. Its entries take what they leave out from this
                spec.

        Raises:
            UserError: The file cannot be read, or a setting is unknown, of a wrong type or out of range.
        """
        source = "the LoRA configuration" if isinstance(config, Mapping) else str(config)
        content = config if isinstance(config, Mapping) else _read(Path(config))
        if not isinstance(content, Mapping):
            raise UserError(f'{source} must hold entries such as "to_q": {{"r": 8}}, not a {type(content).__name__}')
        entries = {name: entry for name, entry in content.items() if name != "trainable_model"}
        if not entries:
            raise UserError(f'{source} names no layer: give entries such as "to_q": {{"r": 8}}')
        _check_names(entries, source)
        modules = {}
        for name, entry in entries.items():
            prefix = f"{plain(name)}."
            modules[str(name)] = replace(self._layer_spec(), **read_mapping(LayerSpec, entry, source, prefix))
            _check(modules[str(name)], f"{source}: {prefix}")
        return replace(self, modules=modules, **read_mapping(_ConfigFile, content, source, ignore_unknown=True))

    def learning_rate_of(self, layer: str) -> float | None:
        """Return the learning rate of a layer by its full name, None if the configuration gives it none."""
        rate = None
        for name, spec in self.modules.items():
            if fits(name, layer):
                rate = spec.lr
        return rate

    def layer_specs(self) -> dict[str, LayerSpec]:
        """Return name or pattern -> LayerSpec. The last one that matches a layer is used.

        Raises:
            UserError: A value is of a wrong type or out of range, or nothing is chosen.
        """
        if not (self.unet or self.text_encoder):
            raise UserError("lora_ft_unet and lora_ft_text_encoder are both False: there is nothing to train, set one")
        if self.modules:
            _check_names(self.modules, "the LoRA configuration")
            for name, layer in self.modules.items():
                _check(layer, f"{plain(name)}.")
            return dict(self.modules)
        if isinstance(self.targets, str) and self.targets not in TARGETS:
            raise UserError(
                f"LoRA targets {plain(self.targets)!r}: choose one of {', '.join(TARGETS)}, or give layer names"
            )
        if not self.targets:
            raise UserError(f"lora_targets is empty: give {', '.join(TARGETS)}, or the last parts of layers' names")
        _check_names(self.targets, "lora_targets")
        layer = self._layer_spec()
        _check(layer, "lora_")
        if layer.rank == 0:
            raise UserError("lora_rank: 0 is not allowed: at least 1 (4 is usual)")
        names = [name for entry in self.target_list() for name in TARGETS.get(entry, (entry,))]
        if self.conv_rank is not None:
            names += RESIDUAL
        return {name: layer for name in names}

    def target_list(self) -> tuple[str, ...]:
        """Return the targets as a tuple, even a single one."""
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def for_layer(self, layer: LayerSpec, kernel_size: int) -> LayerSpec:
        """Return the specification of a layer with the rank and alpha of its kernel size."""
        if self.conv_rank is None or kernel_size == 1 or self.modules:
            return layer
        return replace(layer, rank=self.conv_rank, alpha=self.conv_alpha)

    def _layer_spec(self) -> LayerSpec:
        return LayerSpec(
            self.rank, self.alpha, self.scale, dropout=self.dropout, algo=self.algo, dora_wd=self.dora_wd,
            rs_lora=self.rs_lora, factor=self.factor, use_tucker=self.use_tucker, rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
        )  # fmt: skip


def fits(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the name of a layer or its last dotted parts."""
    return bool(_pattern(pattern).match(f".{name}"))


@lru_cache(maxsize=MAX_NAMES)
def _pattern(pattern: str) -> re.Pattern[str]:
    # fnmatchcase would keep fewer compiled patterns than a model has layers. The expression that `translate` makes of
    # several `*` does not backtrack into an earlier one, so the time grows with their number times the name's length.
    return re.compile(translate(f"*.{pattern}"))


def near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return up to three names, or ends of names, that are similar to `pattern`."""
    parts = pattern.count(".") + 1
    ends = {".".join(name.split(".")[-length:]) for name in names for length in range(1, parts + 1)}
    return difflib.get_close_matches(pattern, sorted(ends), n=3, cutoff=0.5)


def _check_names(names: Iterable[Any], where: str) -> None:
    """Raise UserError for more names than a model has layers, or longer ones."""
    names = list(names)
    if len(names) > MAX_NAMES:
        raise UserError(f"{where} holds {len(names):,} names, at most {MAX_NAMES:,} are read: use * for several")
    long = next((name for name in map(str, names) if len(name) > LONGEST_NAME), None)
    if long is not None:
        raise UserError(
            f'{where}: the name "{plain(long, 60)}" has {len(long):,} characters, at most {LONGEST_NAME} '
            "are read: give the last parts of a layer's name, such as to_q"
        )


def _check(layer: LayerSpec, prefix: str) -> None:
    """Raise UserError for a value that is not allowed. `prefix` stands before its name."""
    check_values(layer, prefix)
    if 0 < abs(layer.scale) < 1 / LARGEST:
        raise UserError(f"{prefix}scale: {layer.scale:g} is not allowed: 0, or at least {1 / LARGEST:g} (1 is usual)")
    if layer.hard and layer.dropout:
        raise UserError(
            f"{prefix}hard and dropout do not go together: a hard update is part of the kernel, so its inputs are the "
            "layer's own; set hard to 0"
        )
    if layer.factor == 0:
        raise UserError(f"{prefix}factor: 0 is not allowed: at least 1, or -1")
    if layer.factor != -1 and layer.algo != "lokr":
        raise UserError(f"{prefix}factor is for algo lokr, here it is {layer.algo}: leave it out")
    if layer.algo in ("loha", "lokr"):
        for name in ("trainable_scale", "hard"):
            if getattr(layer, name):
                raise UserError(f"{prefix}{name} is for pairs of factors, not for algo {layer.algo}: set it to 0")
    if layer.hard and layer.use_tucker:
        raise UserError(f"{prefix}hard is for 1x1 convolutions, use_tucker for larger ones: leave one of them out")


def _read(path: Path) -> Any:
    way = "give the path of a JSON or YAML file"
    return read_json(path, way=way) if path.suffix == ".json" else read_yaml(path, way=way)
