"""Fine-tune Stable Diffusion on captioned images, with LoRA or the whole UNet. -h lists the settings.

python train_text_to_image.py --train_config configs/train/train_config_lora_v1.yaml \
        --data_path <folder with img_txt.csv> --output_path output/lora --pretrained_model_path <checkpoint>
"""

from __future__ import annotations

import sys

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":  # before numpy, which starts threads
    start_script()

from ldm.runtime.parallel import first_process_prints  # noqa: E402


@first_process_prints()
def main() -> None:
    from ldm.settings.read import read_settings
    from ldm.settings.train import TrainSettings
    from ldm.training.checks import check_settings

    settings = read_settings(
        TrainSettings, sys.argv[1:], yaml_flag="train_config", prog="train_text_to_image.py",
        description="Fine-tune Stable Diffusion on captioned images, with LoRA (use_lora) or the whole UNet.",
    )  # fmt: skip
    check_settings(settings)
    if settings.estimate:
        from ldm.training.estimate import print_estimate

        print_estimate(settings)
        return
    # MindSpore takes seconds to import, so wrong settings are reported before.
    from ldm.training.trainer import train

    train(settings)


if __name__ == "__main__":
    run_script(main)
