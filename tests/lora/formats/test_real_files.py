"""LoRA files as people have published them, where they are at hand (../shared/lora, ../shared/lora_more)."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import DETECTORS, detect_format, lora_files, read_lora, write_lora
from ldm.lora.formats.modules import fitting_bases, known_bases
from ldm.lora.merge import match_shapes
from ldm.lora.products import LoKr
from ldm.weights.checkpoint import open_checkpoint

FOLDER = Path(__file__).parents[4] / "shared" / "lora"
MORE = FOLDER.with_name("lora_more")
SD1 = known_bases()[0]
# file: (format, layers of the UNet, of the text encoder, rank, alpha, layers that are all zero)
FILES = {
    "cloneofsimo_analog_svd_rank4.safetensors": ("cloneofsimo", 144, 48, 4, 4.0, 0),
    "cloneofsimo_lora_disney.safetensors": ("cloneofsimo", 144, 48, 1, 1.0, 0),
    "diffusers-old-attnprocs_catundchat.safetensors": ("diffusers-oldest", 128, 0, 4, 4.0, 0),
    "peft-text_encoder-sd15_hansjohn819.safetensors": ("peft", 0, 24, 8, 8.0, 0),
    "peft-unet_hyper07.safetensors": ("peft", 128, 0, 4, 16.0, 32),
}


def needs(folder):
    return pytest.mark.skipif(not folder.is_dir(), reason=f"the published LoRA files are not at hand ({folder.name})")


def at_hand(name, folder):
    """The path to read; PEFT's files as the folder that they were published as."""
    if FILES[name][0] != "peft":
        return FOLDER / name
    shutil.copy(FOLDER / name, folder / "adapter_model.safetensors")
    shutil.copy(FOLDER / name.replace(".safetensors", ".adapter_config.json"), folder / "adapter_config.json")
    return folder


@needs(MORE)
class TestMore:
    def test_a_text_encoder_by_the_class_of_newer_transformers(self):
        lora = read_lora(MORE / "cloneofsimo-rank1-fp16_TedLee109.safetensors")
        assert len(lora.only("unet").layers) == 144 and len(lora.only("text_encoder").layers) == 48
        assert lora.ranks() == [1] and fitting_bases(lora, known_bases()) == [SD1]
        assert {name: vectors.shape for name, vectors in lora.embeddings.items()} == {
            "<s1>": (1, 768),
            "<s2>": (1, 768),
        }

    @pytest.mark.parametrize("factor", [4, 8])
    def test_lycoris(self, tmp_path, factor):
        lora = read_lora(MORE / f"lycoris-lokr{factor}_KohakuBlueleaf.safetensors")
        assert len(lora.only("unet").layers) == 278 and len(lora.only("text_encoder").layers) == 72
        assert lora.ranks() == [factor] and {type(layer) for layer in lora.layers.values()} == {LoKr}
        assert fitting_bases(lora, known_bases()) == [SD1] and match_shapes(SD1.shapes, lora).ok
        write_lora(tmp_path / "lora.safetensors", lora, "kohya")
        again = read_lora(tmp_path / "lora.safetensors")
        for name, layer in lora.layers.items():
            assert again.layers[name].alpha == layer.alpha
            for part, array in layer.factors.items():
                np.testing.assert_array_equal(array, again.layers[name].factors[part])

    def test_a_learned_token(self):
        with pytest.raises(UserError, match="a textual-inversion embedding, neither"):
            read_lora(MORE / "textual-inversion_fastai.bin")


@needs(FOLDER)
@pytest.mark.parametrize("name", FILES)
class TestPublished:
    def test_is_read_whole(self, tmp_path, name):
        path = at_hand(name, tmp_path)
        kind, unet, text, rank, alpha, zeros = FILES[name]
        assert detect_format(path) == kind
        lora = read_lora(path)
        assert len(lora.only("unet").layers) == unet and len(lora.only("text_encoder").layers) == text
        assert lora.ranks() == [rank] and {layer.alpha for layer in lora.layers.values()} == {alpha}
        assert match_shapes(SD1.shapes, lora).ok and len(lora.zero_layers()) == zeros
        if unet:
            assert fitting_bases(lora, known_bases()) == [SD1]
        assert list(lora.embeddings) == (["<s1>", "<s2>"] if "disney" in name else [])

    def test_its_keys_are_those_of_one_format(self, tmp_path, name):
        for file in lora_files(at_hand(name, tmp_path)):
            keys = list(open_checkpoint(file))
            assert [format for detect in DETECTORS if (format := detect(keys))] == [FILES[name][0]]

    def test_goes_through_kohyas_format_bit_for_bit(self, tmp_path, name):
        lora = read_lora(at_hand(name, tmp_path))
        write_lora(tmp_path / "kohya.safetensors", lora, "kohya")
        back = read_lora(tmp_path / "kohya.safetensors")
        assert back.layers.keys() == lora.layers.keys()
        for key, layer in lora.layers.items():
            other = back.layers[key]
            np.testing.assert_array_equal(layer.up, other.up)
            np.testing.assert_array_equal(layer.down, other.down)
            assert layer.alpha == other.alpha
