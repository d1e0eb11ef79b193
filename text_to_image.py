"""Generate images for prompts: python text_to_image.py --prompt "a cat" (-h lists every setting)."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":  # before the imports that take seconds
    start_script()

from ldm.generation.from_image import complete_from_image  # noqa: E402
from ldm.generation.generate import generate  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.runtime.parallel import first_process_prints  # noqa: E402
from ldm.settings.generate import GenerateSettings  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


@first_process_prints()
def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings from the command line and generate the images."""
    settings = read_settings(
        GenerateSettings,
        argv,
        yaml_flag="generate_config",
        prog="text_to_image.py",
        description="Generate images for prompts with Stable Diffusion, with or without LoRAs.",
        complete=complete_from_image,
    )
    set_up_logging(settings.log_level, prefix=False)
    generate(settings)


if __name__ == "__main__":
    run_script(main)
