"""The cells of a comparison: the settings of a run, with a value of each axis in place of its own."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, replace

from ldm.errors import UserError, plain
from ldm.generation.comparison_sheet import Axis, ComparisonSheet
from ldm.generation.plan import GenerationPlan, plan_generation
from ldm.settings.axes import REPLACED, SettingAxis, parse_axis
from ldm.settings.generate import GenerateSettings
from ldm.settings.sampling import SAMPLER_FLAGS
from ldm.settings.values import settings_of

MAX_CELLS = 1000
LONGEST_LABEL = 40  # characters of a value in a file name

# The settings that cannot be compared: those of the files that are written and of the program, and those that make
# other numbers of images.
_NOT_COMPARED = (
    "data_path", "negative_data_path", "generate_config", "init_latents", "n_iter", "n_samples", "use_lora",
    "lora_rank", "grid_x", "grid_y", "device_target", "mode", "ms_mode", "jit_level", "precision",
    "enable_flash_attention", "vae_tiling", "vae_tile_size", "full_batches", *SAMPLER_FLAGS,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A part of a run: images that are made with the same settings.

    Attributes:
        settings: Those of the cell.
        plan: Theirs.
        column: Its place on the sheet.
        row: The same.
        label: What distinguishes its images, for their file names. "" without a comparison.
    """

    settings: GenerateSettings
    plan: GenerationPlan
    column: int = 0
    row: int = 0
    label: str = ""

    @property
    def model_key(self) -> Hashable:
        """What is equal for cells that one base model makes."""
        plan = self.plan
        files = plan.checkpoint, plan.unet_checkpoint, plan.vae_checkpoint, plan.config.path, self.settings.ckpt_ema
        return files, tuple((file.path, tuple(e.token for e in file.embeddings)) for file in plan.embeddings)

    @property
    def prompt_settings(self) -> tuple[str, bool, int | None]:
        """How its prompts are read: syntax, support_long_prompts and clip_skip, as Pipeline.configure_prompts takes."""
        return self.settings.prompt_syntax, self.settings.support_long_prompts, self.settings.clip_skip


def plan_cells(settings: GenerateSettings) -> list[Cell]:
    """Plan a run: one cell, or those of the comparison that grid_x and grid_y describe, row by row.

    Raises:
        UserError: As plan_generation, for each cell, and for an axis that cannot be compared.
    """
    columns, rows = _axes(settings)
    if columns is None and rows is None:
        return [Cell(settings, plan_generation(settings))]
    cells = []
    for row in range(len(rows.values) if rows else 1):
        for column in range(len(columns.values) if columns else 1):
            changed = replace(settings, grid_x=None, grid_y=None)
            places = [(axis, place) for axis, place in ((columns, column), (rows, row)) if axis is not None]
            labels = [f"{axis.name}={axis.labels[place]}" for axis, place in places]
            try:
                for axis, place in places:
                    changed = _with_value(changed, axis, place)
                for axis, _ in places:
                    _check_effect(changed, axis)
                cells.append(Cell(changed, plan_generation(changed), column, row, file_name_part(labels)))
            except UserError as error:
                raise UserError(f"comparison, {plain(', '.join(labels), 100)}: {error}") from None
    if any(len(cell.plan.prompts) != 1 for cell in cells):
        raise UserError(
            "a comparison (grid_x, grid_y) has one image in each place: leave out data_path, n_samples and n_iter; "
            "several prompts or seeds are an axis, such as --grid_y seed=1,2,3"
        )
    return cells


def sheet_of(settings: GenerateSettings, cells: list[Cell]) -> ComparisonSheet | None:
    """Return the empty sheet of a comparison, None without one."""
    columns, rows = _axes(settings)
    if columns is None and rows is None:
        return None
    sizes = [cell.plan.final_size(0) for cell in cells]
    largest = max(width for _, width in sizes), max(height for height, _ in sizes)
    axes = [None if axis is None else Axis(axis.name, axis.labels) for axis in (columns, rows)]
    return ComparisonSheet(axes[0], axes[1], largest, settings.prompt)


def file_name_part(labels: list[str]) -> str:
    """Return labels as a part of a file name: "lora_scale=0.5_seed=1"."""
    return "_".join(re.sub(r"[^\w.=+-]+", "-", label)[:LONGEST_LABEL] for label in labels)


def _axes(settings: GenerateSettings) -> tuple[SettingAxis | None, SettingAxis | None]:
    known = settings_of(GenerateSettings)
    allowed = [name for name, s in known.items() if s.rules["resume"] is None and name not in _NOT_COMPARED]
    columns, rows = (
        None if text is None else parse_axis(text, flag, known, allowed)
        for flag, text in (("grid_x", settings.grid_x), ("grid_y", settings.grid_y))
    )
    if columns and rows:
        if columns.name == rows.name:
            raise UserError(f"grid_x and grid_y both are {columns.name}: give one of them another setting")
        if len(columns.values) * len(rows.values) > MAX_CELLS:
            raise UserError(
                f"grid_x and grid_y have {len(columns.values)} x {len(rows.values)} values, at most {MAX_CELLS:,} "
                "images are compared: leave some out"
            )
    return columns, rows


def _with_value(settings: GenerateSettings, axis: SettingAxis, place: int) -> GenerateSettings:
    """Return the settings with a value of the axis. Another sampler takes the place of the run's."""
    if axis.name == REPLACED:
        searched = axis.values[0]
        if searched not in settings.prompt:
            raise UserError(f"{REPLACED}: the prompt does not hold {plain(searched, 60)}: {plain(settings.prompt)}")
        return replace(settings, prompt=settings.prompt.replace(searched, axis.values[place]))
    flags = {name: False for name in SAMPLER_FLAGS if axis.name == "sampler"}
    return replace(settings, **{**flags, axis.name: axis.values[place]})


def _check_effect(settings: GenerateSettings, axis: SettingAxis) -> None:
    """Raise UserError if the compared setting has no effect without another one."""
    setting = settings_of(GenerateSettings).get(axis.name)
    needed = None if setting is None else setting.rules["needs"]
    if needed is not None and getattr(settings, needed) in (None, False, [], ""):
        raise UserError(f"{axis.name} is compared without {needed}, and has no effect: add --{needed}")
