"""Weights of a base model, read again from its files after it was loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ldm.errors import UserError, plain
from ldm.files.inputs import file_status, is_folder
from ldm.weights.arrays import Arrays
from ldm.weights.base_model import map_base_model, open_base_model, open_component
from ldm.weights.diffusers_folder.reader import DiffusersFolder
from ldm.weights.names import CanonicalArrays, component_of

ReadWeight = Callable[[str], np.ndarray]


class BaseWeights:
    """Reads weights of UNet and text encoder again from the files that a model was loaded from.

    A model that holds its weights in fp16, or with LoRAs added, gets its fp32 weights back so, without a copy of them
    in memory. Make it before the model is loaded: it remembers the size and the date of the files.

    Args:
        checkpoint: The base model, a file or a diffusers folder.
        unet: A checkpoint whose UNet replaces that of the base model.
        ema: Whether the moving averages of the UNet's weights were loaded.

    Raises:
        UserError: A file cannot be read.
    """

    def __init__(self, checkpoint: str | Path, unet: str | Path | None = None, ema: bool = False):
        self._checkpoint, self._unet, self._ema = checkpoint, unet, ema
        self._loaded = self._files()

    def open(self, shapes: Mapping[str, tuple[int, ...]]) -> ReadWeight:
        """Open the files and return a function that reads the fp32 weight of a canonical name.

        Args:
            shapes: Canonical names of the weights that may be asked for, with their shapes in the model.

        Raises:
            UserError: A file is not there any more or has changed.
        """
        files = self._files()
        changed = [path for path in {**self._loaded, **files} if files.get(path) != self._loaded.get(path)]
        if changed:
            raise UserError(
                f"{plain(changed[0])} has changed since the model was loaded, and the weights without a LoRA are read "
                "from it: load the base model again"
            )
        opened: dict[str, Arrays] = {}
        for component in {component_of(name) for name in shapes}:
            if component == "unet" and self._unet is not None:
                checkpoint, ema = open_component(self._unet, "unet"), False
            else:
                checkpoint, ema = open_base_model(self._checkpoint), self._ema
            opened[component] = CanonicalArrays(checkpoint, map_base_model(checkpoint, ema), shapes)

        def read(name: str) -> np.ndarray:
            arrays = opened[component_of(name)]
            weight = np.array(arrays[name], np.float32, order="C")
            arrays.release(name)
            return weight

        return read

    def _files(self) -> dict[Path, tuple[int, int] | None]:
        """Return the files of the weights with size and time of modification, None for a file that is missing."""
        paths: list[Path] = []
        for path in (self._checkpoint, self._unet):
            if path is None:
                continue
            folder = open_base_model(path) if is_folder(path) else None
            paths += folder.files if isinstance(folder, DiffusersFolder) else [Path(path)]
        status = {path: file_status(path) for path in paths}
        return {path: (s.st_size, s.st_mtime_ns) if s is not None else None for path, s in status.items()}
