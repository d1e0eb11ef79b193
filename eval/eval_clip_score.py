"""The published path of tools/eval/eval_clip_score.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from tools.eval.eval_clip_score import main  # noqa: E402

if __name__ == "__main__":
    run_script(main)
