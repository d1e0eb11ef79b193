"""A LoRA and a base checkpoint on disk: folded in, put beside, taken out again, and found as the difference of two.

Everything happens in the checkpoint's own names, whatever family they are of (ldm.weights.names), one array at a time:
what a LoRA does not touch stays as it is, bit for bit.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files.atomic import atomic_folder, temporary_folder
from ldm.files.inputs import is_folder
from ldm.files.paths import check_free, writing
from ldm.lora.algebra import Truncation, decompose
from ldm.lora.formats import mindone, pairs
from ldm.lora.lora import LoRA, LoRALayer
from ldm.lora.merge import match_shapes
from ldm.lora.spec import TARGETS, fits
from ldm.settings.model import model_metadata
from ldm.weights.architecture import yaml_beside
from ldm.weights.arrays import Arrays, Checkpoint
from ldm.weights.base_model import map_base_model, open_base_model
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from ldm.weights.diffusers_folder.reader import STEMS, DiffusersFolder
from ldm.weights.names import LABELS, CanonicalArrays, KeyMap, component_of, same_up_to_1x1, source_shape

# Ours and mindone's names for the parts of a layer's LoRA, then lora_wrapper's (A is down) and its soft convolutions'.
_OURS = r"lora_down\.weight|lora_up\.weight|alpha"
_WRAPPER = r"lora_A|lora_B|lora_scale|lora_A\.weight|lora_B\.weight"
_PART = re.compile(rf"(.+)\.({_OURS}|{_WRAPPER})$")
_WRAPPED = ("base_layer", "linear", "conv")  # where lora_wrapper and mindone move a wrapped layer's own parameters
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".index.json")


class View(Arrays):
    """Some arrays of another mapping, under names of one's own; `metadata` and `path` are the other's."""

    def __init__(self, arrays: Arrays, names: Mapping[str, str]):
        self.path, self.metadata = arrays.path, arrays.metadata
        self._arrays, self._names = arrays, dict(names)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        return self._arrays.spec(self._names[name])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[self._names[name]]

    def release(self, name: str) -> None:
        self._arrays.release(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Merged(View):
    """A base's arrays with a LoRA's updates added, scale * (alpha / rank) * up @ down: summed in fp32 and cast to the
    array's type, once for each array. A layer whose update is nothing keeps its array, bit for bit.

    Raises UserError where a layer of the LoRA has no array of its shape in the base, and for an array that does not
    hold the sum (fp16).
    """

    def __init__(self, base: Arrays, key_map: KeyMap, state: LoRA, scale: float = 1.0):
        super().__init__(base, {name: name for name in base})
        _check_fits(base, key_map, state)
        self._scale = scale
        self._layers: dict[str, list[tuple[LoRALayer, int, int]]] = {}
        for name, layer in state.layers.items():
            source = key_map.sources[f"{name}.weight"]
            self._layers.setdefault(source.name, []).append((layer, source.part, source.parts))

    def __getitem__(self, name: str) -> np.ndarray:
        array = super().__getitem__(name)
        merged = None
        for layer, part, parts in self._layers.get(name, ()):
            update = layer.update(self._scale)
            if update.any():
                merged = array.astype(np.float32) if merged is None else merged
                rows = array.shape[0] // parts
                block = merged[part * rows : (part + 1) * rows]
                block += update.reshape(block.shape)
        if merged is None:
            return array
        with np.errstate(over="ignore"):  # judged here, by name
            merged = merged.astype(array.dtype)
        if not np.isfinite(merged).all():
            raise UserError(f"{name} with the LoRA is beyond {array.dtype}'s range: lower its weight")
        return merged


class Embedded(View):
    """A base's arrays, and after them a LoRA's factors as `<layer>.lora_down.weight`, `<layer>.lora_up.weight` and
    `<layer>.alpha`, in fp32. Raises UserError where the LoRA does not fit the base.
    """

    def __init__(self, base: Arrays, key_map: KeyMap, state: LoRA):
        super().__init__(base, {name: name for name in base})
        _check_fits(base, key_map, state)
        self._factors: dict[str, np.ndarray] = {}
        for name, layer in state.layers.items():
            self._factors[f"{name}.lora_down.weight"] = layer.down.astype(np.float32)
            self._factors[f"{name}.lora_up.weight"] = layer.up.astype(np.float32)
            self._factors[f"{name}.alpha"] = np.array(layer.alpha, np.float32)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        factor = self._factors.get(name)
        return super().spec(name) if factor is None else (factor.dtype, factor.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._factors[name] if name in self._factors else super().__getitem__(name)

    def release(self, name: str) -> None:
        if name not in self._factors:
            super().release(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._factors

    def __len__(self) -> int:
        return len(self._names) + len(self._factors)


def split_embedded(checkpoint: Arrays) -> tuple[Arrays, LoRA | None]:
    """(the base's arrays, the LoRA that lies beside them); None where there is none.

    Understood are what Embedded gives, mindone's network with LoRA in it, and lora_wrapper's embedded checkpoints but
    for its soft convolutions, which no single kernel equals. The base's parameters get their own names back.

    Raises UserError for half a pair, factors that do not go together, and lora_wrapper's soft convolutions.
    """
    parts = {name: found for name in checkpoint if (found := _PART.match(name)) and component_of(name) != "other"}
    modules = {found.group(1) for found in parts.values()}
    if not modules:
        return checkpoint, None
    wrapped = {
        f"{module}.{inner}.{kind}": f"{module}.{kind}"
        for module in modules for inner in _WRAPPED for kind in ("weight", "bias")
    }  # fmt: skip
    settings = ("lora_rank", "lora_alpha", "lora_scale")
    base = {wrapped.get(name, name): name for name in checkpoint if name not in parts and name not in settings}
    kinds = Counter(found.group(2).split(".")[0] for found in parts.values())
    if kinds["lora_down"] or kinds["lora_up"]:
        names = [name for name in checkpoint if name in parts or name in settings]
        return View(checkpoint, base), mindone.read(View(checkpoint, {name: name for name in names}))
    return View(checkpoint, base), LoRA(
        {module: _wrapper_layer(checkpoint, module) for module in sorted(modules)}, model_metadata(checkpoint.metadata)
    )


def _wrapper_layer(checkpoint: Arrays, module: str) -> LoRALayer:
    path = checkpoint.path
    if f"{module}.lora_A.weight" in checkpoint or f"{module}.lora_B.weight" in checkpoint:
        raise UserError(
            f"{path}: {module} is a soft convolution of lora_wrapper, two kernels in a row: no LoRA file and no single "
            "kernel can hold it"
        )
    for half in ("lora_A", "lora_B"):
        if f"{module}.{half}" not in checkpoint:
            raise UserError(f"{path}: {module} lacks its {half}, half of a pair: the file is damaged")
    layer = pairs.read_factors(checkpoint, module, f"{module}.lora_A", f"{module}.lora_B")
    if f"{module}.lora_scale" not in checkpoint:
        return layer
    return replace(layer, alpha=pairs.read_number(checkpoint, module, f"{module}.lora_scale") * layer.rank)


def _check_fits(base: Arrays, key_map: KeyMap, state: LoRA) -> None:
    shapes = {name: source_shape(base.shape(source.name), source) for name, source in key_map.sources.items()}
    match_shapes(shapes, state).require("the LoRA")
    known = model_metadata(base.metadata)
    for key, text in state.metadata.items():
        if known.get(key, text) != text:
            raise UserError(f"the LoRA was made for a model whose {key} is {text}, {base.path} says {known[key]}")


def write_base(path: Path, arrays: Arrays, base: Arrays) -> None:
    """Write `arrays`, which have the names of `base`, in the form of `base`: a single file by the suffix of `path`, or
    a diffusers folder with everything else that `base` has in it; and the model YAML where one lies beside `base`.
    Raises UserError where that cannot be.
    """
    if isinstance(base, DiffusersFolder):
        _write_folder(path, arrays, base)
    else:
        write_checkpoint(path, arrays, base.metadata)
    settings, target = yaml_beside(base.path), yaml_beside(path)
    if settings.is_file() and not target.exists():
        shutil.copyfile(settings, target)


def _write_folder(path: Path, arrays: Arrays, base: DiffusersFolder) -> None:
    check_free(path, empty_folder=True)
    with writing(path), atomic_folder(path) as folder:
        shutil.copytree(base.path, folder, ignore=_weights_of(base), dirs_exist_ok=True)
        for component, place in base.folders.items():
            prefix = f"{component}/"
            names = {name[len(prefix) :]: name for name in arrays if name.startswith(prefix)}
            file = folder / place.relative_to(base.path) / f"{STEMS[component][0]}.safetensors"
            write_checkpoint(file, View(arrays, names), {"format": "pt"})


def _weights_of(base: DiffusersFolder):
    """For copytree: what is not to be copied, since the weights that are written stand in its place."""
    places = {str(place) for place in base.folders.values()}
    return lambda folder, names: [name for name in names if folder in places and name.endswith(_WEIGHT_SUFFIXES)]


def write_published(path: Path, arrays: Arrays, base: Arrays) -> None:
    """Write `arrays`, which have the names of `base`, as a single file in fp16: .safetensors in the published names,
    .ckpt in mindone's. Raises UserError as ldm.weights.convert.convert.
    """
    with temporary_folder(path) as folder:
        merged = folder / ("merged" if isinstance(base, DiffusersFolder) else "merged.safetensors")
        write_base(merged, arrays, base)
        convert(merged, path, dtype="fp16")


@contextmanager
def as_single_file(path: Path, target: Path) -> Iterator[Checkpoint]:
    """Open a base checkpoint. A diffusers folder is first written as one file beside `target`, removed at the end."""
    if not is_folder(path):
        yield open_checkpoint(path)
        return
    with temporary_folder(target) as folder:
        file = folder / "single.safetensors"
        convert(path, file, form="own")
        yield open_checkpoint(file)


@dataclass
class Extraction:
    """A LoRA between two checkpoints. left_out: component -> (arrays that differ and can or shall hold no LoRA, their
    squared distance); truncation: see ldm.lora.algebra.
    """

    state: LoRA
    truncation: Truncation
    left_out: dict[str, tuple[int, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(self.truncation)]
        whole = sum(row[2] for row in self.truncation.layers.values()) + sum(row[1] for row in self.left_out.values())
        for component, (count, squares) in self.left_out.items():
            share = squares / whole
            lines.append(
                f"left out: {count} other arrays of the {LABELS[component]} that differ (norms, biases, layers that "
                f"hold no LoRA), {share:.2%} of the squared distance"
            )
        return "\n".join(lines)


def extract_lora(
    base_path: str | os.PathLike,
    tuned_path: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] = ("all",),
    components: Sequence[str] = ("unet", "text_encoder"),
) -> Extraction:
    """The LoRA that makes of one checkpoint the other, by the SVD of the difference of each layer's weights, in fp32.

    Args:
        base_path, tuned_path: any form of base checkpoint, not of the same one.
        rank, energy: see ldm.lora.algebra.resize.
        targets: groups ("attention", "all"), last parts of layers' names, or patterns (ldm.lora.spec).
        components: of which networks.

    Raises UserError for checkpoints that cannot be read or are of different models, a target that matches nothing, and
    two that are the same.
    """
    sides = []
    for path in (base_path, tuned_path):
        checkpoint = open_base_model(path)
        sides.append(CanonicalArrays(checkpoint, map_base_model(checkpoint)))
    base, tuned = sides
    names = [name for name in base if component_of(name) in components and name in tuned]
    missing = [name for name in {*base} ^ {*tuned} if component_of(name) in components]
    if not names or missing:
        raise UserError(
            f"{base_path} and {tuned_path} are not of one model: {len(missing)} arrays are in one alone, such as "
            f"{min(missing, default='all')}"
        )
    for name in names:
        if not same_up_to_1x1(base.shape(name), tuned.shape(name)):
            raise UserError(
                f"{base_path} and {tuned_path} are not of one model: {name} is {base.shape(name)} and "
                f"{tuned.shape(name)}"
            )
    patterns = [pattern for entry in targets for pattern in TARGETS.get(entry, (entry,))]
    layers = {
        name: name[: -len(".weight")]
        for name in names
        if name.endswith(".weight")
        and len(base.shape(name)) in (2, 4)
        and any(fits(pattern, name[: -len(".weight")]) for pattern in patterns)
    }
    for entry in targets:
        if entry not in TARGETS and not any(fits(entry, layer) for layer in layers.values()):
            raise UserError(f'the target "{entry}" matches no layer: give {" or ".join(TARGETS)}, or ends of names')
    left_out: dict[str, tuple[int, float]] = {}

    def updates() -> Iterator[tuple[str, np.ndarray]]:
        for name in tqdm(names, desc="decomposing", unit="array"):
            before = np.array(base[name], np.float32)
            delta = np.array(tuned[name], np.float32).reshape(before.shape) - before
            base.release(name)
            tuned.release(name)
            if name in layers:
                yield layers[name], delta
            elif delta.any():
                count, squares = left_out.get(component_of(name), (0, 0.0))
                left_out[component_of(name)] = (count + 1, squares + float(np.sum(np.square(delta, dtype=np.float64))))

    state, truncation = decompose(updates(), rank, energy)
    if not state.layers:
        raise UserError(f"{base_path} and {tuned_path} differ in none of the layers: there is no LoRA between them")
    state.metadata.update(model_metadata(open_base_model(tuned_path).metadata))
    return Extraction(state, truncation, left_out)
