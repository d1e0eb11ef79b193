r"""Show what a training would see of a data set: figures, and a sheet of its images with their captions.

    python tools/data/inspect_data.py --data_path datasets/emoji_fluent_hc
    python tools/data/inspect_data.py --train_config configs/train/train_config_lora_v1.yaml --data_path photos \
        --enable_bucket True

It takes the flags and the YAML file of train_text_to_image.py, reads the data with the same code, and needs no base
model and no device. It writes into --output_path:

    contact_sheet_1.png, ...    images as they are cropped, with their captions: the worst crops and captions that are
                                cut first, then others, evenly from all rows
    inspect_data.json           what is printed, for programs

The output_path in the YAML file is that of the training, and nothing is written there. Settings that have nothing to do
with data are accepted and have no effect. docs/data.md explains the layouts of data sets and the settings.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from tqdm import tqdm  # noqa: E402

from ldm.data.upright import parse_color  # noqa: E402
from ldm.errors import UserError, plain  # noqa: E402
from ldm.files.inputs import is_folder, is_there  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.files.paths import under_root  # noqa: E402
from ldm.metrics.report import write_json  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.data import (  # noqa: E402
    BucketSettings,
    CaptionSettings,
    ImageSettings,
    MaskSettings,
    PriorSettings,
)
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.read import read_settings, split_flags  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from ldm.training.checks import image_size  # noqa: E402
from ldm.weights.architecture import detect_model_config  # noqa: E402
from tools.data.contact_sheet import COLUMNS, ROWS, choose_rows, draw_page  # noqa: E402
from tools.data.inspection import Inspection  # noqa: E402
from tools.data.report import printed  # noqa: E402

DEFAULT_MODEL = "configs/v1-inference.yaml"
PAGE = COLUMNS * ROWS
# The settings of training that this tool uses besides those of the data, for -h.
USED = ("train_config", "data_path", "model_config", "pretrained_model_path")
USED_FOR_STEPS = ("epochs", "max_steps", "train_batch_size", "gradient_accumulation_steps", "seed")


@dataclass
class OwnSettings:
    """The settings of this tool."""

    output_path: str = setting(
        "output/inspect_data", "folder for the contact sheet and inspect_data.json", group="this tool", path=True
    )
    sheet_images: int = setting(48, "images on the contact sheet; 0: no sheet", low=0, high=10_000)


def explained() -> type:
    """Return the settings that `-h` lists: this tool's own and those of training that it uses."""
    data = [
        field.name
        for base in (ImageSettings, CaptionSettings, BucketSettings, MaskSettings, PriorSettings)
        for field in dataclasses.fields(base)
    ]
    fields: list[Any] = []
    for cls, names in ((OwnSettings, None), (TrainSettings, (*USED, *data, *USED_FOR_STEPS))):
        hints, of_name = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
        fields += [(name, hints[name], of_name[name]) for name in names or of_name]
    return dataclasses.make_dataclass("Explained", fields)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    given = sys.argv[1:] if argv is None else list(argv)
    if "-h" in given or "--help" in given:
        read_settings(explained(), ["-h"], yaml_flag="train_config", description=__doc__)
    own_flags, flags = split_flags(OwnSettings, given)
    own = read_settings(OwnSettings, own_flags)
    settings = read_settings(TrainSettings, flags, yaml_flag="train_config")
    if settings.output_path == TrainSettings.output_path:  # the training's, where its class images may be
        settings.output_path = own.output_path
    set_up_logging("WARNING")
    config, model = choose_model(settings)
    check(settings, own, config)
    with claim_folder(own.output_path, "--output_path"):
        inspect(settings, own, config, model)


def choose_model(settings: TrainSettings) -> tuple[ModelConfig, str]:
    """Return the model's configuration, and what the report says of where it comes from."""
    if settings.model_config is not None:
        return load_model_config(under_root(settings.model_config)), plain(settings.model_config)
    base = settings.pretrained_model_path
    if base is not None and is_there(base, "pretrained_model_path"):
        config = detect_model_config(base, way_out="add --model_config")
        return config, f"{plain(config.path)}, that of {plain(base)}"
    config = load_model_config(under_root(DEFAULT_MODEL))
    return config, f"{DEFAULT_MODEL}, as neither model_config nor a base model is given"


def check(settings: TrainSettings, own: OwnSettings, config: ModelConfig) -> None:
    """Check the settings against each other. Raises UserError."""
    if settings.data_path is None:
        raise UserError("--data_path is missing: give a data set, on the command line or in the YAML of --train_config")
    image_size(settings, config)
    parse_color("alpha_color", settings.alpha_color)
    if is_there(settings.data_path, "data_path") and is_folder(settings.data_path, "data_path"):
        data, output = os.path.realpath(settings.data_path), os.path.realpath(own.output_path)
        if f"{output}/".startswith(f"{data}/"):
            raise UserError(
                f"--output_path {plain(own.output_path)} is in data_path: the contact sheet would become a part of the "
                "data set; give another folder"
            )


def inspect(settings: TrainSettings, own: OwnSettings, config: ModelConfig, model: str) -> None:
    """Print the report and write its files."""
    output = Path(own.output_path)
    describe_progress(lambda: "before the report was written")
    inspection = Inspection(settings, config, model, output / "cache" / "images.json")
    sections = inspection.sections()
    print(printed(sections), flush=True)

    choices = choose_rows(inspection.measured.cropped, [cut.row for cut in inspection.captions.cut], own.sheet_images)
    pages = [choices[start : start + PAGE] for start in range(0, len(choices), PAGE)]
    for number, page in enumerate(tqdm(pages, desc="drawing the contact sheet", unit="page", delay=1, leave=False), 1):
        header = f"{plain(settings.data_path)}: page {number} of {len(pages)}, {len(choices)} of {len(inspection.data)}"
        cells = [inspection.cell(choice) for choice in page]
        draw_page(cells, f"{header} images{notes(settings, inspection)}", output / sheet_name(number))
    number = len(pages) + 1
    while (old := output / sheet_name(number)).is_file():  # of an earlier report, which had more
        old.unlink()
        number += 1

    data = inspection.data
    sheet = [
        {
            "page": place // PAGE + 1, "name": inspection.name(choice.row), "caption": inspection.caption(choice.row),
            "size": list(data.buckets.size(choice.row)), "cropped": float(inspection.measured.cropped[choice.row]),
            "why": choice.why,
        }
        for place, choice in enumerate(choices)
    ]  # fmt: skip
    report = {section.title.replace(" ", "_"): section.figures for section in sections if section.figures}
    write_json(output / "inspect_data.json", {**report, "sheet": sheet})
    names = [sheet_name(number) for number in range(1, len(pages) + 1)]
    print(f"\nwritten to {plain(output)}: {', '.join([*names, 'inspect_data.json'])}")


def notes(settings: TrainSettings, inspection: Inspection) -> str:
    """Return what the header of a page says of images and captions that change from step to step."""
    texts = []
    if settings.random_crop or settings.random_flip:
        texts.append("crops are those of the middle, not mirrored")
    if not inspection.data.has_one_caption:
        texts.append("captions change from step to step: one draw is shown")
    if inspection.data.masks is not None:
        texts.append("red is not trained (mask)")
    return "".join(f"; {text}" for text in texts)


def sheet_name(number: int) -> str:
    """Return the name of a page of the contact sheet, from 1."""
    return f"contact_sheet_{number}.png"


if __name__ == "__main__":
    run_script(main)
