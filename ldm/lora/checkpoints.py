"""A LoRA and a base model's checkpoint on disk: merged into it, embedded beside its weights, and split from it again.

Everything happens in the checkpoint's own names, of whatever family (ldm.weights.names), one array at a time. Arrays
that a LoRA does not touch stay as they are, bit for bit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable

import numpy as np

from ldm.errors import UserError
from ldm.files.atomic import atomic_folder, temporary_folder
from ldm.files.inputs import is_folder
from ldm.files.paths import check_free, writing
from ldm.lora.formats import mindone
from ldm.lora.formats.factors import check_pair, read_factors, read_number
from ldm.lora.lora import LoRA, LoRALayer
from ldm.lora.merge import match_shapes
from ldm.settings.model import model_metadata
from ldm.weights.architecture import yaml_beside
from ldm.weights.arrays import Checkpoint
from ldm.weights.checkpoint import open_checkpoint, write_checkpoint
from ldm.weights.convert import convert
from ldm.weights.diffusers_folder.reader import STEMS, DiffusersFolder
from ldm.weights.names import KeyMap, component_of, source_shape

# The parts of a layer's LoRA as EmbeddedArrays and mindone name them.
_OWN_PART = r"lora_down\.weight|lora_up\.weight|alpha"
# As lora_wrapper names them, where A is down. The last two are the factors of its soft convolutions.
_WRAPPER_PART = r"lora_A|lora_B|lora_scale|lora_A\.weight|lora_B\.weight"
_PART = re.compile(rf"(.+)\.({_OWN_PART}|{_WRAPPER_PART})$")
_LORA_SETTINGS = ("lora_rank", "lora_alpha", "lora_scale")  # entries for the whole file
_INNER_LAYERS = ("base_layer", "linear", "conv")  # where lora_wrapper and mindone put a wrapped layer's own parameters
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".index.json")


class RenamedArrays(Checkpoint):
    """Some arrays of a checkpoint under other names, with its path and metadata.

    Args:
        checkpoint: The checkpoint.
        names: New name -> name in the checkpoint. None for all names as they are.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str] | None = None):
        self.path, self.format, self.metadata = checkpoint.path, checkpoint.format, checkpoint.metadata
        self._checkpoint = checkpoint
        self._names = {name: name for name in checkpoint} if names is None else dict(names)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        return self._checkpoint.spec(self._names[name])

    def __getitem__(self, name: str) -> np.ndarray:
        return self._checkpoint[self._names[name]]

    def release(self, name: str) -> None:
        """Free the memory that reading `name` took."""
        self._checkpoint.release(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class MergedArrays(RenamedArrays):
    """A base model's arrays with the updates of a LoRA added, each summed in fp32 and cast to the array's type once.

    An array whose update is zero stays as it is, bit for bit.

    Args:
        base: The base model's checkpoint.
        key_map: Its key map.
        lora: The LoRA to add.
        strength: How much of it.

    Raises:
        UserError: A layer of the LoRA has no array of its shape, or (when an array is read) a sum is outside the range
            of the array's type.
    """

    def __init__(self, base: Checkpoint, key_map: KeyMap, lora: LoRA, strength: float = 1.0):
        super().__init__(base)
        _check_fits(base, key_map, lora)
        self._strength = strength
        self._layers: dict[str, list[tuple[LoRALayer, int, int]]] = {}
        for name, layer in lora.layers.items():
            source = key_map.sources[f"{name}.weight"]
            self._layers.setdefault(source.name, []).append((layer, source.part, source.parts))

    def __getitem__(self, name: str) -> np.ndarray:
        array = super().__getitem__(name)
        merged = None
        for layer, part, parts in self._layers.get(name, ()):
            update = layer.update(self._strength)
            if update.any():
                merged = array.astype(np.float32) if merged is None else merged
                rows = array.shape[0] // parts
                block = merged[part * rows : (part + 1) * rows]
                block += update.reshape(block.shape)
        if merged is None:
            return array
        with np.errstate(over="ignore"):  # checked below
            merged = merged.astype(array.dtype)
        if not np.isfinite(merged).all():
            raise UserError(f"{name} with the LoRA is outside the range of {array.dtype}: lower the strength")
        return merged


class EmbeddedArrays(RenamedArrays):
    """A base model's arrays, followed by the factors of a LoRA in fp32.

    They are `<layer>.lora_down.weight`, `<layer>.lora_up.weight` and `<layer>.alpha`.

    Args:
        base: The base model's checkpoint.
        key_map: Its key map.
        lora: The LoRA to put beside the weights.

    Raises:
        UserError: A layer of the LoRA has no array of its shape.
    """

    def __init__(self, base: Checkpoint, key_map: KeyMap, lora: LoRA):
        super().__init__(base)
        _check_fits(base, key_map, lora)
        self._factors: dict[str, np.ndarray] = {}
        for name, layer in lora.layers.items():
            self._factors[f"{name}.lora_down.weight"] = layer.down.astype(np.float32)
            self._factors[f"{name}.lora_up.weight"] = layer.up.astype(np.float32)
            self._factors[f"{name}.alpha"] = np.array(layer.alpha, np.float32)

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        factor = self._factors.get(name)
        return super().spec(name) if factor is None else (factor.dtype, factor.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._factors[name] if name in self._factors else super().__getitem__(name)

    def release(self, name: str) -> None:
        """Free the memory that reading `name` took."""
        if name not in self._factors:
            super().release(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._factors

    def __len__(self) -> int:
        return len(self._names) + len(self._factors)


def split_embedded(checkpoint: Checkpoint) -> tuple[Checkpoint, LoRA | None]:
    """Split a base model's checkpoint from the LoRA beside its weights.

    The LoRA may be written by EmbeddedArrays, in mindone's network with LoRA, or in lora_wrapper's embedded checkpoints
    except for its soft convolutions, which no single kernel equals. The base model's parameters get their own names.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The base model's arrays, and the LoRA or None.

    Raises:
        UserError: Half of a pair is missing, factors do not go together, or there is a soft convolution.
    """
    parts = {name: match for name in checkpoint if (match := _PART.match(name)) and component_of(name) != "other"}
    modules = {match.group(1) for match in parts.values()}
    if not modules:
        return checkpoint, None
    own_names = {
        f"{module}.{inner}.{parameter}": f"{module}.{parameter}"
        for module in modules
        for inner in _INNER_LAYERS
        for parameter in ("weight", "bias")
    }
    lora_names = [name for name in checkpoint if name in parts or name in _LORA_SETTINGS]
    base_names = {own_names.get(name, name): name for name in checkpoint if name not in {*lora_names}}
    if any(match.group(2).startswith(("lora_down", "lora_up")) for match in parts.values()):
        lora = mindone.read(RenamedArrays(checkpoint, {name: name for name in lora_names}))
    else:
        layers = {module: _wrapper_layer(checkpoint, module) for module in sorted(modules)}
        lora = LoRA(layers, model_metadata(checkpoint.metadata))
    return RenamedArrays(checkpoint, base_names), lora


def write_base_model(path: Path, arrays: Checkpoint, base: Checkpoint) -> None:
    """Write arrays under the names of a base model's checkpoint in the form of that checkpoint.

    That is a single file, or a diffusers folder with everything else that is in the original one. A model YAML beside
    the original is copied.

    Args:
        path: The file or folder to write.
        arrays: The arrays.
        base: The original checkpoint.

    Raises:
        UserError: The file or folder cannot be written.
    """
    if isinstance(base, DiffusersFolder):
        _write_folder(path, arrays, base)
    else:
        write_checkpoint(path, arrays, base.metadata)
    model_yaml, target = yaml_beside(base.path), yaml_beside(path)
    if model_yaml.is_file() and not target.exists():
        shutil.copyfile(model_yaml, target)


def write_fp16_file(path: Path, arrays: Checkpoint, base: Checkpoint) -> None:
    """Write arrays under the names of a base model's checkpoint as a single fp16 file.

    A .safetensors gets the published names, a .ckpt mindone's. Raises UserError as ldm.weights.convert.convert.
    """
    with temporary_folder(path) as folder:
        merged = folder / ("merged" if isinstance(base, DiffusersFolder) else "merged.safetensors")
        write_base_model(merged, arrays, base)
        convert(merged, path, dtype="fp16")


@contextmanager
def open_as_single_file(path: Path, target: Path) -> Iterator[Checkpoint]:
    """Open a base model's checkpoint. A diffusers folder is first converted to a temporary file beside `target`."""
    if not is_folder(path):
        yield open_checkpoint(path)
        return
    with temporary_folder(target) as folder:
        file = folder / "single.safetensors"
        convert(path, file, format="own")
        yield open_checkpoint(file)


def _check_fits(base: Checkpoint, key_map: KeyMap, lora: LoRA) -> None:
    shapes = {name: source_shape(base.shape(source.name), source) for name, source in key_map.sources.items()}
    match_shapes(shapes, lora).require("the LoRA")
    metadata = model_metadata(base.metadata)
    for key, text in lora.metadata.items():
        if metadata.get(key, text) != text:
            raise UserError(f"the LoRA was made for a model whose {key} is {text}, {base.path} has {metadata[key]}")


def _wrapper_layer(checkpoint: Checkpoint, module: str) -> LoRALayer:
    """Read a layer that lora_wrapper wrote."""
    if f"{module}.lora_A.weight" in checkpoint or f"{module}.lora_B.weight" in checkpoint:
        raise UserError(
            f"{checkpoint.path}: {module} is a soft convolution of lora_wrapper, two kernels in a row: no LoRA file "
            "and no single kernel can hold it"
        )
    factors = ("lora_A", "lora_B")
    check_pair(checkpoint.path, module, [name for name in factors if f"{module}.{name}" in checkpoint], factors)
    layer = read_factors(checkpoint, module, f"{module}.lora_A", f"{module}.lora_B")
    if f"{module}.lora_scale" not in checkpoint:
        return layer
    return replace(layer, alpha=read_number(checkpoint, module, f"{module}.lora_scale") * layer.rank)


def _write_folder(path: Path, arrays: Checkpoint, base: DiffusersFolder) -> None:
    check_free(path, empty_folder=True)
    with writing(path), atomic_folder(path) as folder:
        shutil.copytree(base.path, folder, ignore=_ignore_weights(base), dirs_exist_ok=True)
        for component, place in base.folders.items():
            prefix = f"{component}/"
            names = {name[len(prefix) :]: name for name in arrays if name.startswith(prefix)}
            file = folder / place.relative_to(base.path) / f"{STEMS[component][0]}.safetensors"
            write_checkpoint(file, RenamedArrays(arrays, names), {"format": "pt"})


def _ignore_weights(base: DiffusersFolder) -> Callable[[str, list[str]], list[str]]:
    """Return a filter for copytree that leaves out the weights, which are written anew."""
    folders = {str(folder) for folder in base.folders.values()}
    return lambda folder, names: [name for name in names if folder in folders and name.endswith(_WEIGHT_SUFFIXES)]
