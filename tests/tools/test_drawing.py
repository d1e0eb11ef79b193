"""Images that a tool keeps are of one precision."""

from __future__ import annotations

import json

import pytest
from tqdm import tqdm

from ldm.diffusion.sampling import Sampling
from ldm.runtime.device import setup_runtime
from tools.eval.choosing.drawing import RECORD, Drawing


@pytest.fixture(autouse=True)
def fp32_afterwards(graph_mode):
    yield
    setup_runtime("CPU")


def test_images_of_fp32_are_drawn_again_in_bf16_and_the_other_way_round(tmp_path):
    drawing = Drawing(None, [], 1, Sampling("ddim", 2, 1.0), {"base": "x"})  # without prompts, nothing is drawn
    folder = tmp_path / "images"
    for precision, kept in (("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True), ("fp32", False)):
        setup_runtime("CPU", precision=precision)
        drawing.draw(folder, [], {"lora": None}, tqdm(disable=True))
        assert (folder / "00000.png").exists() == kept, precision
        record = json.loads((folder / RECORD).read_text())
        assert record.get("precision") == (None if precision == "fp32" else "bf16")  # as earlier versions had it
        (folder / "00000.png").touch()
