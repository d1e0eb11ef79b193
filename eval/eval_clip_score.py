"""The published path of tools/eval/eval_clip_score.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.runtime.script import run, start  # noqa: E402

if __name__ == "__main__":
    start()

from tools.eval.eval_clip_score import main  # noqa: E402

if __name__ == "__main__":
    run(main)
