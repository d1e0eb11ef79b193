r"""Read a training recipe of another project, and write it as a train_config of this one.

    python tools/import_recipe.py lora.toml                    # kohya's sd-scripts (--config_file)
    python tools/import_recipe.py my_settings.json --output_path recipe.yaml    # the kohya_ss GUI, or OneTrainer
    python tools/import_recipe.py train.sh                     # a command of diffusers' or sd-scripts' scripts
    python tools/import_recipe.py some_lora.safetensors        # what sd-scripts wrote into a LoRA's header
    python train_text_to_image.py --train_config recipe.yaml

The content decides which it is. What a recipe leaves out gets the other project's default. Everything that has another
meaning here, or no counterpart, is printed and named in the YAML. Nothing of the file is run. docs/recipes.md has the
tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.files.outputs import claim_new  # noqa: E402
from ldm.files.paths import writing  # noqa: E402
from ldm.settings.declare import REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.recipes.read import read_recipe  # noqa: E402
from tools.recipes.written import settle, summary, write  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    file: list[str] = setting(REQUIRED, "the recipe", positional=True, path=True, length=1, group="settings")
    output_path: Path = setting(Path("recipe.yaml"), "the YAML to write, which must not exist yet", path=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tool."""
    settings = read_settings(Settings, argv, prog="tools/import_recipe.py", description=__doc__)
    with claim_new(settings.output_path, "--output_path"):
        recipe = read_recipe(settings.file[0])
        settle(recipe)
        with writing(settings.output_path):
            write(recipe, Path(settings.file[0]).name, settings.output_path)
    for line in summary(recipe):
        print(line)
    print(f"{settings.output_path}: for --train_config of train_text_to_image.py")


if __name__ == "__main__":
    run_script(main)
