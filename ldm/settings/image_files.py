"""The settings of the files that generation writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.settings.declare import setting


@dataclass
class ImageFileSettings:
    """Where the images are written."""

    output_path: str = setting(
        "output",
        "folder for samples/ and grid.png; those of an earlier run are kept as samples.old1 and so on",
        group="output",
        path=True,
    )
    skip_save: bool = setting(False, "write no PNGs")
    skip_grid: bool = setting(False, "write no grid")
    save_latents: Optional[str] = setting(
        None,
        "write the final latents to this .npy, and the starting latents to the same name with .init.npy",
        path=True,
    )
