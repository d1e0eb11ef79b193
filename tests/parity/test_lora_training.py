"""Training layers against LyCORIS's and PEFT's: the same factors and inputs give the same outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="PEFT is not installed: requirements-parity.txt")
lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed: requirements-parity.txt")

from lycoris.functional import factorization as their_factorization  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402

from ldm.lora.new_cells import new_lora_cell  # noqa: E402
from ldm.lora.spec import LayerSpec, LoRASpec  # noqa: E402
from ldm.models.layers import Conv2d, Linear  # noqa: E402
from ldm.settings.model_size import factorization  # noqa: E402

MODULES = {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}
RANDOM = np.random.RandomState(0)
# name -> (layer, settings)
CASES = {
    "loha, linear": ("linear", LayerSpec(2, 3.0, algo="loha")),
    "loha, linear of a large rank": ("linear", LayerSpec(5, 3.0, algo="loha", rs_lora=True)),
    "loha, 3x3": ("3x3", LayerSpec(2, algo="loha")),
    "loha, 3x3, tucker": ("3x3", LayerSpec(2, algo="loha", use_tucker=True)),
    "loha, 1x1": ("1x1", LayerSpec(5, 2.0, algo="loha", use_tucker=True)),
    "lokr, linear": ("linear", LayerSpec(1, 3.0, algo="lokr", rs_lora=True)),
    "lokr, linear, whole": ("linear", LayerSpec(8, 3.0, algo="lokr")),
    "lokr, linear, factor": ("linear", LayerSpec(1, 3.0, algo="lokr", factor=2)),
    "lokr, 3x3": ("3x3", LayerSpec(1, 3.0, algo="lokr")),
    "lokr, 3x3, tucker": ("3x3", LayerSpec(1, algo="lokr", use_tucker=True)),
    "lokr, 3x3, whole": ("3x3", LayerSpec(9, 3.0, algo="lokr")),
    "lokr, 1x1": ("1x1", LayerSpec(1, 3.0, algo="lokr")),
    "lora, linear": ("linear", LayerSpec(3, 6.0, rs_lora=True)),
    "lora, 3x3, tucker": ("3x3", LayerSpec(3, 6.0, use_tucker=True)),
}
DORA = ("linear", "3x3", "1x1")


def base_layer(kind):
    """A layer here and in PyTorch with the same values, and an input."""
    if kind == "linear":
        ours, theirs, x = Linear(12, 18), torch.nn.Linear(12, 18), RANDOM.standard_normal((2, 5, 12))
    else:
        k = int(kind[0])
        stride, padding = (2, 1) if k == 3 else (1, 0)
        ours = Conv2d(8, 12, k, stride, padding)
        theirs, x = torch.nn.Conv2d(8, 12, k, stride, padding), RANDOM.standard_normal((2, 8, 6, 6))
    for name in ("weight", "bias"):
        getattr(theirs, name).data = torch.from_numpy(getattr(ours, name).asnumpy().copy())
        getattr(theirs, name).requires_grad_(False)
    ours.weight.name, ours.bias.name = "layer.weight", "layer.bias"
    return ours, theirs, x.astype(np.float32)


def new_cell(base, spec):
    """A LoRA layer none of whose factors is zero."""
    cell = new_lora_cell(base, "layer", spec, LoRASpec(), None)
    for parameter in cell.parts().values():
        if not parameter.asnumpy().any():
            parameter.set_data(Tensor(RANDOM.standard_normal(parameter.shape).astype(np.float32)))
    return cell


class Gradients(nn.Cell):
    """(x, gradient of the output) -> output, gradients of x and of the factors."""

    def __init__(self, cell):
        super().__init__(auto_prefix=False)
        self.cell, self.weights = cell, ms.ParameterTuple(list(cell.parts().values()))
        self.grad = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, x, dy):
        return self.cell(x), self.grad(self.cell, self.weights)(x, dy)


def assert_same(found, expected, what):
    scale = np.abs(expected).max()
    assert scale > 0, what
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=1e-6 * scale, err_msg=what)


def compare(cell, module, theirs, x):
    """Compare outputs and all gradients. `theirs`: part -> PyTorch's parameter."""
    ms.set_context(mode=ms.GRAPH_MODE)
    tensor = torch.from_numpy(x).requires_grad_(True)
    y = module(tensor)
    dy = RANDOM.standard_normal(tuple(y.shape)).astype(np.float32)
    y.backward(torch.from_numpy(dy))
    output, ((dx,), gradients) = Gradients(cell)(Tensor(x), Tensor(dy))
    assert_same(output.asnumpy(), y.detach().numpy(), "output")
    assert_same(dx.asnumpy(), tensor.grad.numpy(), "input")
    for (part, _), gradient in zip(cell.parts().items(), gradients):
        assert_same(gradient.asnumpy(), theirs[part].grad.numpy(), part)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_lycoriss(case):
    kind, spec = CASES[case]
    ours, theirs, x = base_layer(kind)
    cell = new_cell(ours, spec)
    module = MODULES[spec.algo](
        "layer", theirs, lora_dim=spec.rank, alpha=spec.alpha or spec.rank, use_tucker=spec.use_tucker,
        factor=spec.factor, rs_lora=spec.rs_lora,
    )  # fmt: skip
    parameters = dict(module.named_parameters())
    parts = cell.parts()
    assert parameters.keys() == parts.keys()
    for part, parameter in parts.items():
        assert tuple(parameters[part].shape) == tuple(parameter.shape), part
        parameters[part].data = torch.from_numpy(parameter.asnumpy().copy())
    compare(cell, module, parameters, x)
    # and what is saved is what every reader multiplies out
    layer = cell.layer_update({part: parameter.asnumpy() for part, parameter in parts.items()}, cell.scale)
    with torch.no_grad():
        matrix = module.make_weight() * module.scale if spec.algo == "lora" else module.get_weight(None)
        assert_same(layer.delta(), matrix.numpy().reshape(layer.shape), "update")
    if layer.rank is not None:
        assert layer.alpha == pytest.approx(float(module.alpha))


@pytest.mark.parametrize("kind", DORA)
def test_outputs_and_gradients_of_dora_are_pefts(kind):
    ours, theirs, x = base_layer(kind)
    cell = new_cell(ours, LayerSpec(3, 6.0, algo="dora"))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(theirs), config)
    layer = model.base_model.model[0]
    parameters = {
        "lora_down.weight": layer.lora_A["default"].weight,
        "lora_up.weight": layer.lora_B["default"].weight,
        "dora_scale": layer.lora_magnitude_vector["default"].weight,
    }
    for part, parameter in cell.parts().items():
        values = torch.from_numpy(parameter.asnumpy().copy()).reshape(parameters[part].shape)
        if part == "dora_scale":
            np.testing.assert_allclose(values, parameters[part].detach(), rtol=1e-6)
        parameters[part].data = values
    compare(cell, model, parameters, x)


@pytest.mark.parametrize("case", ["loha, linear", "loha, 3x3, tucker", "lokr, linear", "lokr, 3x3"])
def test_dora_of_the_other_kinds_is_the_formula_of_the_paper(case):
    """LyCORIS's layers do not take the norm for a constant. Their update goes through the formula here."""
    kind, spec = CASES[case]
    ours, theirs, x = base_layer(kind)
    cell = new_cell(ours, replace(spec, dora_wd=True))
    module = MODULES[spec.algo](
        "layer", theirs, lora_dim=spec.rank, alpha=spec.alpha or spec.rank, use_tucker=spec.use_tucker,
        rs_lora=spec.rs_lora,
    )  # fmt: skip
    parameters = dict(module.named_parameters())
    for part, parameter in cell.parts().items():
        values = torch.from_numpy(parameter.asnumpy().copy())
        if part == "dora_scale":
            parameters[part] = values.requires_grad_(True)
        else:
            parameters[part].data = values

    def forward(inputs):
        weight = theirs.weight + module.get_weight(theirs.weight.shape)
        norms = weight.reshape(len(weight), -1).norm(dim=1).detach()
        weight = weight * (parameters["dora_scale"] / norms).reshape(-1, *(1,) * (weight.ndim - 1))
        if kind == "linear":
            return torch.nn.functional.linear(inputs, weight, theirs.bias)
        return torch.nn.functional.conv2d(inputs, weight, theirs.bias, theirs.stride, theirs.padding)

    compare(cell, forward, parameters, x)


def test_channels_are_divided_as_lycoris_divides_them():
    for size in range(1, 400):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16, 50, 300):
            assert factorization(size, factor) == tuple(their_factorization(size, factor)), (size, factor)
    assert factorization(1280) == (32, 40)
