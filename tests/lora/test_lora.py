"""The LoRA in memory: the update of a layer, the parts for each network, and strengths."""

import numpy as np
import pytest

from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.lora.strength import Strength
from ldm.lora.updates import LoRALayer
from tests.lora.helpers import TEXT, normal


class TestLayer:
    def test_update_is_the_scaled_product(self):
        down, up = normal(2, 7), normal(5, 2)
        wanted = 0.5 * 3.0 / 2 * up.astype(np.float64) @ down
        np.testing.assert_allclose(LoRALayer(down, up, 3.0).update(0.5), wanted, rtol=1e-5, atol=1e-6)

    def test_a_convolutions_update_is_a_kernel(self):
        down, up = normal(2, 4, 3, 3), normal(5, 2, 1, 1)
        wanted = np.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
        np.testing.assert_allclose(LoRALayer(down, up, 2.0).update(), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "down, up",
        [((2, 7), (5, 3)), ((2,), (5, 2)), ((2, 7), (5, 2, 3, 3)), ((2, 7, 3), (5, 2)), ((0,), (0,)), ((0, 7), (5, 0))],
    )
    def test_no_pair_of_factors(self, down, up):
        with pytest.raises(ValueError):
            LoRALayer(np.zeros(down), np.zeros(up), 1.0)


class TestLoRA:
    def test_parts(self, small_net):
        inject_lora(small_net, LoRASpec(rank=2, text_encoder=True))
        lora = get_lora(small_net)
        unet, text = lora.only("unet"), lora.only("text_encoder")
        assert len(unet.layers) == 8 and list(text.layers) == [f"{TEXT}q_proj"]
        assert len(unet.layers) + len(text.layers) == len(lora.layers)
        assert not unet.only("text_encoder").layers and not text.only("unet").layers
        assert "UNet: 8 layers, text encoder: 1 layers; rank 2; alpha 2" in str(lora)


class TestStrength:
    @pytest.mark.parametrize("numbers, strength", [((), (0.5, 0.5)), ((0.7,), (0.7, 0.7)), ((0.7, 0.3), (0.7, 0.3))])
    def test_numbers_after_a_path(self, numbers, strength):
        assert Strength.from_numbers(numbers, default=0.5) == Strength(*strength)
