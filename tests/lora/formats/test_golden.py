"""Files that diffusers, PEFT and cloneofsimo's lora have written change the base as those projects say they do."""

from pathlib import Path

import numpy as np
import pytest

from ldm.lora.formats import DETECTORS, detect_format, lora_files, read_lora
from ldm.weights.checkpoint import open_checkpoint
from tests.named_weights import named_input, relative_error

GOLDEN = Path(__file__).parents[2] / "golden" / "lora"
FILES = {
    "diffusers": ("diffusers", "diffusers", 11),
    "peft": ("peft", "peft", 11),
    "kohya": ("kohya.safetensors", "kohya", 11),
    "older": ("older.safetensors", "diffusers-newer", 5),
    "cloneofsimo": ("cloneofsimo.pt", "cloneofsimo-pt", 71),
}


@pytest.mark.parametrize("kind", FILES)
def test_exactly_one_format_knows_it(kind):
    name, format, _ = FILES[kind]
    assert detect_format(GOLDEN / name) == format
    for file in lora_files(GOLDEN / name):
        keys = list(open_checkpoint(file))
        assert [name for detect in DETECTORS if (name := detect(keys))] == [format]


@pytest.mark.parametrize("kind", FILES)
def test_the_updates_are_those_of_its_maker(tiny_config, kind):
    name, _, count = FILES[kind]
    lora = read_lora(GOLDEN / name, tiny_config)
    with np.load(GOLDEN / "updates.npz", allow_pickle=False) as stored:
        wanted = {key.partition(" ")[2]: stored[key] for key in stored if key.startswith(f"{kind} ")}
    assert lora.layers.keys() == wanted.keys() and len(wanted) == count
    for layer, projection in wanted.items():
        rows = lora.layers[layer].update()
        rows = rows.reshape(len(rows), -1)
        found = rows @ named_input(layer, rows.shape[1:])
        limit = 5e-3 if kind == "cloneofsimo" else 1e-5  # that one is in half precision
        assert relative_error(found, projection) < limit, layer
