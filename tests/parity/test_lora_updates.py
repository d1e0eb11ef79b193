"""Every kind of update against the forward passes of LyCORIS and PEFT on the same factors, through files.

A module of the other project gets random factors and is saved under the name of a layer of the nano model. What
read_lora makes of the file, added to the layer's weight, has the outputs of the module.
"""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft", reason="PEFT is not installed: requirements-parity.txt")
pytest.importorskip("lycoris", reason="LyCORIS is not installed: requirements-parity.txt")

from lycoris.modules.diag_oft import DiagOFTModule  # noqa: E402
from lycoris.modules.full import FullModule  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from lycoris.modules.norms import NormModule  # noqa: E402

from ldm.lora.formats import read_lora, write_lora  # noqa: E402
from ldm.lora.formats.modules import known_bases  # noqa: E402
from ldm.lora.lora import LoRA  # noqa: E402
from ldm.lora.merge import Update, add_updates  # noqa: E402
from ldm.lora.products import LoKr  # noqa: E402
from ldm.lora.updates import DoRA, LoRALayer  # noqa: E402
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402

NANO = known_bases()[2]
# diffusers' names of layers of the nano model: linear with and without a bias, 1x1 and 3x3 convolutions, a norm.
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FF = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"
PROJ = "down_blocks.1.attentions.0.proj_in"
CONV = "down_blocks.1.resnets.0.conv1"
DOWN = "down_blocks.0.downsamplers.0.conv"
NORM = "down_blocks.1.attentions.0.transformer_blocks.0.norm2"
GROUP_NORM = "down_blocks.1.resnets.0.norm1"
BOUND = 1e-6  # of the largest output


def base_layer(path):
    """The layer of the base model as a torch module with random weights, and random inputs for it."""
    module = next(module for module in (*NANO.modules, *NANO.norms) if module.path == path)
    has_bias = f"{module.name}.bias" in NANO.shapes
    torch.manual_seed(0)
    if len(module.shape) == 1:
        layer = torch.nn.LayerNorm(module.shape[0]) if "transformer" in path else torch.nn.GroupNorm(4, module.shape[0])
        x = torch.randn(2, 5, module.shape[0]) if "transformer" in path else torch.randn(2, module.shape[0], 5, 5)
    elif len(module.shape) == 2:
        layer, x = torch.nn.Linear(module.shape[1], module.shape[0], bias=has_bias), torch.randn(2, 5, module.shape[1])
    else:
        out, incoming, size, _ = module.shape
        layer = torch.nn.Conv2d(incoming, out, size, padding=size // 2, stride=2 if "downsampler" in path else 1)
        x = torch.randn(2, incoming, 6, 6)
    return module, layer.double(), x.double()


def filled(module, std=0.1):
    """Give a module of LyCORIS random factors, in fp32."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.mul_(1 + std * torch.randn_like(parameter))
            else:
                parameter.copy_(std * torch.randn_like(parameter) + (1 if name == "rescale" else 0))
    return module


def arrays_of(module):
    return {name: tensor.detach().float().numpy().copy() for name, tensor in module.state_dict().items()}


def outputs(layer, lora, name, x, strength=1.0):
    """The outputs of the base layer with the LoRA in its weights."""
    updates = lora.updates()
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            update = updates.get(f"{name}.{parameter}")
            if update is not None:
                tensor = getattr(layer, parameter)
                before = tensor.numpy().astype(np.float32)
                merged = add_updates(before, [Update(update, strength, "the LoRA")], np.float32)
                tensor.add_(torch.from_numpy(merged.astype(np.float64) - before).to(tensor.dtype))
        return layer(x).numpy()


KINDS = {
    "LoCon": (LoConModule, {}, (TO_K, FF, PROJ, CONV, DOWN)),
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}, (CONV, DOWN)),
    "rsLoRA": (LoConModule, {"rs_lora": True}, (TO_K, CONV)),
    "DoRA": (LoConModule, {"weight_decompose": True}, (TO_K, FF, PROJ, CONV)),
    "DoRA by input": (LoConModule, {"weight_decompose": True, "wd_on_out": False}, (TO_K, FF, PROJ, CONV)),
    "LoHa": (LohaModule, {}, (TO_K, FF, PROJ, CONV)),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}, (CONV, DOWN)),
    "LoHa, DoRA": (LohaModule, {"weight_decompose": True}, (TO_K, CONV)),
    "LoKr, one whole": (LokrModule, {"factor": 2}, (TO_K, FF, PROJ, CONV)),
    "LoKr, both whole": (LokrModule, {"full_matrix": True}, (TO_K, CONV)),
    "LoKr, both factored": (LokrModule, {"factor": 8, "decompose_both": True, "lora_dim": 2}, (TO_K, CONV)),
    "LoKr, Tucker": (LokrModule, {"factor": 4, "use_tucker": True}, (CONV, DOWN)),
    "LoKr, DoRA": (LokrModule, {"factor": 4, "weight_decompose": True}, (TO_K, CONV)),
    "IA3": (IA3Module, {}, (TO_K, PROJ, CONV)),
    "IA3 on input": (IA3Module, {"train_on_input": True}, (TO_K, CONV)),
    "OFT": (DiagOFTModule, {}, (TO_K, CONV)),
    "OFT with a limit": (DiagOFTModule, {"constraint": 1e-3, "rescaled": True}, (TO_K, CONV)),
    "norms": (NormModule, {}, (NORM, GROUP_NORM)),
}


@pytest.mark.parametrize("kind, path", [(kind, path) for kind, (_, _, paths) in KINDS.items() for path in paths])
def test_lycoris(tmp_path, kind, path):
    cls, options, _ = KINDS[kind]
    module, layer, x = base_layer(path)
    theirs = filled(cls("lora", layer, 1.0, **{"lora_dim": 4, "alpha": 2.0, **options}))
    arrays = arrays_of(theirs)
    if kind.startswith("OFT"):  # whose inverse LyCORIS computes in fp32
        layer, x = layer.float(), x.float()
    else:
        theirs = theirs.double()
    name = f"lora_unet_{path.replace('.', '_')}"
    write_checkpoint(tmp_path / "a.safetensors", {f"{name}.{part}": array for part, array in arrays.items()})
    lora = read_lora(tmp_path / "a.safetensors", NANO.config)
    theirs.apply_to()
    with torch.no_grad():
        wanted = layer(x).numpy()
    theirs.restore()
    found = outputs(layer, lora, module.name, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=BOUND * np.abs(wanted).max())

    write_lora(tmp_path / "b.safetensors", lora, "kohya", NANO.config)
    written = read_checkpoint(tmp_path / "b.safetensors")[0]
    written = {key.removeprefix(f"{name}."): torch.tensor(array) for key, array in written.items()}
    if kind != "LoCon, Tucker":  # whose third factor is multiplied in
        assert written.keys() == arrays.keys() and not theirs.load_state_dict(written, strict=False).missing_keys
    write_lora(tmp_path / "b.ckpt", lora)
    for file in ("b.safetensors", "b.ckpt"):
        again = read_lora(tmp_path / file, NANO.config).updates()
        for parameter, update in lora.updates().items():
            for part, array in update.arrays().items():
                copy = again[parameter].arrays()[part].reshape(array.shape)  # a .ckpt does not tell a kernel's axes
                np.testing.assert_array_equal(array, copy, err_msg=f"{file}: {part}")


@pytest.mark.parametrize("path", [TO_K, FF, CONV])
def test_a_whole_difference(tmp_path, path):
    """LyCORIS's `full`, which takes the weight out of the layer."""
    module, layer, x = base_layer(path)
    difference = 0.1 * torch.randn_like(layer.weight)
    arrays = {"diff": difference.float().numpy()}
    with torch.no_grad():
        changed = FullModule("lora", layer, 1.0)
        changed.weight.copy_(difference)
        if layer.bias is not None:
            changed.bias.copy_(0.1 * torch.randn_like(layer.bias))
            arrays["diff_b"] = changed.bias.float().numpy()
        weight, bias = changed.get_merged_weight()
        layer2 = base_layer(path)[1]
        layer2.weight.copy_(weight)
        if bias is not None:
            layer2.bias.copy_(bias)
        wanted = layer2(x).numpy()
    name = f"lora_unet_{path.replace('.', '_')}"
    write_checkpoint(tmp_path / "a.safetensors", {f"{name}.{part}": array for part, array in arrays.items()})
    found = outputs(layer, read_lora(tmp_path / "a.safetensors", NANO.config), module.name, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=BOUND * np.abs(wanted).max())


class Net(torch.nn.Module):
    """The layers of the nano model that a test adapts, under their names in diffusers."""

    def __init__(self, paths):
        super().__init__()
        for path in paths:
            parent, *names = self, *path.split(".")
            for part in names[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(names[-1], base_layer(path)[1])


PEFT_KINDS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=2),
    "rsLoRA": peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=2, use_dora=True),
    "LoHa": peft.LoHaConfig(r=4, alpha=2, target_modules=[]),
    "LoHa, Tucker": peft.LoHaConfig(r=4, alpha=2, use_effective_conv2d=True, target_modules=[]),
    "LoKr": peft.LoKrConfig(r=4, alpha=2, decompose_factor=4, target_modules=[]),
    "LoKr, Tucker": peft.LoKrConfig(r=4, alpha=2, decompose_factor=4, use_effective_conv2d=True, target_modules=[]),
    "LoKr, both whole": peft.LoKrConfig(r=400, alpha=2, target_modules=[]),
    "LoKr, both whole, with patterns": peft.LoKrConfig(
        r=400, alpha=2, target_modules=[], alpha_pattern={"attn2.to_k": 7}, rank_pattern={"conv1": 600}
    ),
    "LoKr, both factored": peft.LoKrConfig(r=2, alpha=3, decompose_factor=8, decompose_both=True, target_modules=[]),
}


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft(tmp_path, kind):
    """PEFT's saved folder, read and added to the weights, has the outputs of PEFT's layers."""
    paths = [TO_K, FF, PROJ, CONV]
    config = PEFT_KINDS[kind]
    config.target_modules = paths
    model = peft.get_peft_model(Net(paths), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.copy_((0.1 * torch.randn_like(parameter)).float())
    model.save_pretrained(tmp_path / "theirs")
    lora = read_lora(tmp_path / "theirs", NANO.config)
    formats = ["kohya"] + (["peft", "diffusers"] if "Lo" not in kind.replace("LoRA", "") else [])
    loras = [lora]
    for format in formats:
        target = tmp_path / (format if format == "peft" else f"{format}.safetensors")
        write_lora(target, lora, format, NANO.config)
        loras.append(read_lora(target, NANO.config))
    for path in paths:
        module, layer, x = base_layer(path)
        with torch.no_grad():
            wanted = model.base_model.model.get_submodule(path)(x).numpy()
        for read in loras:
            found = outputs(base_layer(path)[1], read, module.name, x)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=BOUND * np.abs(wanted).max(), err_msg=path)


def test_peft_reads_the_dora_that_is_written(tmp_path):
    """The folder that write_lora writes gives PEFT's layers the outputs of the merged weights."""
    random = np.random.RandomState(0)
    layers = {}
    for path in (TO_K, CONV):
        module = next(module for module in NANO.modules if module.path == path)
        down = random.standard_normal((3, *module.shape[1:])).astype(np.float32)
        up = random.standard_normal((module.shape[0], 3, *(1,) * (len(module.shape) - 2))).astype(np.float32)
        layers[module.name] = DoRA(LoRALayer(down, up, 3.0), 1 + random.random(module.shape[0]).astype(np.float32))
    lora = LoRA(layers)
    write_lora(tmp_path / "ours", lora, "peft", NANO.config)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    model = peft.PeftModel.from_pretrained(Net([TO_K, CONV]), tmp_path / "ours")
    for path in (TO_K, CONV):
        module, layer, x = base_layer(path)
        with torch.no_grad():
            wanted = model.base_model.model.get_submodule(path)(x).numpy()
        found = outputs(layer, lora, module.name, x)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_scale_of_a_whole_lokr_is_lycoris_rule(tmp_path):
    """Without factored halves LyCORIS's scale is 1, whatever alpha says."""
    module = next(module for module in NANO.modules if module.path == TO_K)
    out, incoming = module.shape
    arrays = {
        "lokr_w1": np.ones((2, 2), np.float32), "lokr_w2": np.ones((out // 2, incoming // 2), np.float32),
        "alpha": np.array(7.0, np.float32),
    }  # fmt: skip
    name = f"lora_unet_{TO_K.replace('.', '_')}"
    write_checkpoint(tmp_path / "a.safetensors", {f"{name}.{part}": array for part, array in arrays.items()})
    (layer,) = read_lora(tmp_path / "a.safetensors", NANO.config).layers.values()
    assert isinstance(layer, LoKr) and math.isclose(layer.delta().max(), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_few_bits_are_those_of_torch(tmp_path, dtype):
    from safetensors.torch import save_file

    name = f"lora_unet_{TO_K.replace('.', '_')}"
    torch.manual_seed(0)
    down, up = torch.randn(4, 96).to(dtype), torch.randn(64, 4).to(dtype)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    (layer,) = read_lora(tmp_path / "a.safetensors", NANO.config).layers.values()
    np.testing.assert_array_equal(layer.down, down.float().numpy())
    np.testing.assert_array_equal(layer.up, up.float().numpy())
