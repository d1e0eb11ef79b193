"""Sums and smaller ranks as PEFT makes them (add_weighted_adapter, "cat" and "svd"): dense layers and convolutions."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="PEFT is not installed: requirements-parity.txt")

from ldm.lora.algebra import resize, weighted_sum  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.updates import LoRALayer  # noqa: E402

RANKS, ALPHAS = (2, 5), (3.0, 5.0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(12, 10)
        self.conv = torch.nn.Conv2d(4, 9, 3)
        self.point = torch.nn.Conv2d(6, 8, 1)


@pytest.fixture(scope="module")
def adapters():
    """(PEFT's model with adapters "0" and "1" of random values, their loras)."""
    torch.manual_seed(0)
    targets = ["dense", "conv", "point"]
    configs = [peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets) for rank, alpha in zip(RANKS, ALPHAS)]
    model = peft.get_peft_model(Net(), configs[0], adapter_name="0")
    model.add_adapter("1", configs[1])
    loras = []
    for name in ("0", "1"):
        layers = {}
        for target in targets:
            module = getattr(model.base_model.model, target)
            for factor in (module.lora_A[name], module.lora_B[name]):
                torch.nn.init.normal_(factor.weight)
            down, up = (factor.weight.detach().numpy().copy() for factor in (module.lora_A[name], module.lora_B[name]))
            layers[target] = LoRALayer(down, up, ALPHAS[int(name)])
        loras.append(LoRA(layers))
    return model, loras


def assert_same(model, adapter, lora):
    for target, layer in lora.layers.items():
        theirs = getattr(model.base_model.model, target).get_delta_weight(adapter).detach().numpy()
        ours = layer.update()
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=target)


def test_an_update_is_pefts(adapters):
    model, loras = adapters
    for name, lora in zip("01", loras):
        assert_same(model, name, lora)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (0.5, -1.5)])
def test_the_weighted_sum_is_pefts_cat(adapters, weights):
    model, loras = adapters
    name = f"cat{weights}".replace(".", "_")
    model.add_weighted_adapter(["0", "1"], list(weights), name, combination_type="cat")
    result = weighted_sum(list(zip(loras, weights)))
    assert result.ranks() == [7]
    assert_same(model, name, result)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_down_to_a_rank_it_is_pefts_svd(adapters, rank):
    model, loras = adapters
    model.add_weighted_adapter(["0", "1"], [0.7, 0.4], f"svd{rank}", combination_type="svd", svd_rank=rank)
    result, _ = resize(weighted_sum(list(zip(loras, (0.7, 0.4)))), rank=rank)
    assert_same(model, f"svd{rank}", result)
