"""The console commands of an installation: each runs a script, as `python <script>` does."""

from __future__ import annotations

import runpy
from collections.abc import Callable

from ldm.files.paths import ROOT


def _command(script: str) -> Callable[[], None]:
    def run_script() -> None:
        # The script's `__main__` part listens to signals before it imports what takes seconds, and sets the exit code.
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run_script


train_text_to_image = _command("train_text_to_image.py")
text_to_image = _command("text_to_image.py")
check_device = _command("tools/check_device.py")
eval_fid = _command("tools/eval/eval_fid.py")
eval_clip_score = _command("tools/eval/eval_clip_score.py")
choose_checkpoint = _command("tools/eval/choose_checkpoint.py")
compare_diffusers = _command("tools/eval/compare_diffusers.py")
convert_weights = _command("tools/model_conversion/convert_weights.py")
convert_lora = _command("tools/lora/convert_lora.py")
lora_add = _command("tools/lora/lora_add.py")
extract_lora = _command("tools/lora/extract_lora.py")
resize_lora = _command("tools/lora/resize_lora.py")
lora_doctor = _command("tools/lora/doctor.py")
cvtckpt = _command("tools/lora/cvtckpt.py")
lora_verify = _command("tools/lora/verify.py")
inspect_data = _command("tools/data/inspect_data.py")
compare_runs = _command("tools/compare_runs.py")
import_recipe = _command("tools/import_recipe.py")
studio = _command("tools/studio.py")
