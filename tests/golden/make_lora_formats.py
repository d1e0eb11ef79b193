"""Write lora/: small LoRA files as diffusers, PEFT and cloneofsimo's lora save them, and updates.npz, what each adds to
the weights of tests/tiny.yaml by PEFT's own account (multiplied by a vector, to be small).

Ranks and alphas differ from layer to layer; there are convolutions, and layers of the text encoder.
Run in the environment of `make test-parity`: python -m tests.golden.make_lora_formats
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ldm.lora.formats.modules import BaseModules
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import ModelConfig, load_model_config
from tests.named_weights import named_input, named_weight
from tests.parity.reference import Reference

FOLDER = Path(__file__).with_name("lora")
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
UNET_TARGETS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0", f"{BLOCK}.ff.net.0.proj",
                "down_blocks.1.attentions.0.proj_in", "mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj",
                "down_blocks.0.downsamplers.0.conv"]  # fmt: skip
TEXT_TARGETS = ["layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj", "layers.1.mlp.fc1"]
UNET = dict(
    r=2,
    lora_alpha=3,
    target_modules=UNET_TARGETS,
    rank_pattern={"mid_block.resnets.0.conv1": 4},
    alpha_pattern={"attn2.to_k": 0.5, "conv1": 10},
)
TEXT = dict(r=3, lora_alpha=1, target_modules=TEXT_TARGETS)


def main() -> None:
    config = load_model_config(Path(__file__).parents[1] / "tiny.yaml")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    updates = {}

    reference = adapted(config, UNET, TEXT)
    save_diffusers(reference, FOLDER / "diffusers")
    updates["diffusers"] = deltas(config, reference)

    reference = adapted(config, {**UNET, "use_rslora": True}, TEXT)
    save_peft(reference, FOLDER / "peft")
    updates["peft"] = deltas(config, reference)

    # diffusers' own conversions: neither knows of an alpha, kohya's writes alpha = rank.
    plain = dict(r=2, lora_alpha=2)
    reference = adapted(config, {**plain, "target_modules": UNET_TARGETS}, {**plain, "target_modules": TEXT_TARGETS})
    save_kohya(reference, FOLDER / "kohya.safetensors")
    updates["kohya"] = deltas(config, reference)

    reference = adapted(
        config, {**plain, "target_modules": UNET_TARGETS[:3]}, {**plain, "target_modules": TEXT_TARGETS[:2]}
    )
    save_older(reference, FOLDER / "older.safetensors")
    updates["older"] = deltas(config, reference)

    # Every linear layer of three classes, in the order that today's diffusers has.
    reference = adapted(
        config,
        {**plain, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]},
        {**plain, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]},
    )
    torch.save(numbered(reference.unet), FOLDER / "cloneofsimo.pt")
    torch.save(numbered(reference.text), FOLDER / "cloneofsimo.text_encoder.pt")
    updates["cloneofsimo"] = deltas(config, reference)

    np.savez_compressed(FOLDER / "updates.npz", **{
        f"{file} {name}": projected(name, update) for file, layers in updates.items() for name, update in layers.items()
    })  # fmt: skip
    for path in sorted(FOLDER.rglob("*")):
        print(path.relative_to(FOLDER), path.stat().st_size)


def projected(name: str, update: np.ndarray) -> np.ndarray:
    """(out,) for an update (out, in) or (out, in, k, k): its product with a vector that depends on the layer's name."""
    rows = update.reshape(len(update), -1)
    return (rows @ named_input(name, rows.shape[1:])).astype(np.float32)


def adapted(
    config: ModelConfig, unet: dict | None, text: dict | None, weights: dict[str, np.ndarray] | None = None
) -> Reference:
    """The reference networks with `weights` or named ones, and PEFT's adapters of random values in them."""
    if weights is None:
        shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).parameters_dict().items()}
        weights = {name: named_weight(name, shape) for name, shape in shapes.items()}
    reference = Reference(config, {k: v for k, v in weights.items() if not k.startswith("first_stage_model.")})
    for network, settings in ((reference.unet, unet), (reference.text, text)):
        if settings:
            network.add_adapter(LoraConfig(**settings))
            randomise(network)
    return reference


@torch.no_grad()
def randomise(network: torch.nn.Module) -> None:
    """Values of the size that training reaches, the same on every machine."""
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            shape = tuple(parameter.shape)
            values = 0.4 * named_input(name, shape) / np.sqrt(np.prod(shape[1:]))
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def deltas(config: ModelConfig, reference: Reference) -> dict[str, np.ndarray]:
    """canonical name -> what PEFT adds to the weight."""
    found = {}
    for module in BaseModules(config).modules:
        network = reference.unet if module.component == "unet" else reference.text
        path = module.path
        if module.component == "text_encoder" and hasattr(network, "text_model"):
            path = f"text_model.{path}"
        layer = network.get_submodule(path)
        if hasattr(layer, "get_delta_weight"):
            found[module.name] = layer.get_delta_weight("default").detach().numpy()
    return found


def save_diffusers(reference: Reference, folder: Path) -> None:
    """As diffusers' training scripts do today, with lora_adapter_metadata."""
    from diffusers.training_utils import _collate_lora_metadata

    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(reference.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(reference.text),
        **_collate_lora_metadata({"unet": reference.unet, "text_encoder": reference.text}),
    )


def save_peft(reference: Reference, folder: Path) -> None:
    """As PeftModel.save_pretrained does: adapter_config.json and adapter_model.safetensors for each network."""
    for part, network in (("unet", reference.unet), ("text_encoder", reference.text)):
        settings = network.peft_config["default"]
        values = get_peft_model_state_dict(network)
        model = get_peft_model(
            type(network).from_config(network.config) if part == "unet" else type(network)(network.config), settings
        )
        named = {name.replace(".weight", ".default.weight"): value for name, value in values.items()}
        missing = model.base_model.model.load_state_dict(named, strict=False)
        assert not missing.unexpected_keys
        model.save_pretrained(folder / part)
        (folder / part / "README.md").unlink()


def save_kohya(reference: Reference, path: Path) -> None:
    layers = {**_prefixed(reference.unet, "unet"), **_prefixed(reference.text, "text_encoder")}
    save_file(convert_state_dict_to_kohya(layers), path)


def save_older(reference: Reference, path: Path) -> None:
    """The names before PEFT: `lora.down`, and `lora_linear_layer.down` of the text encoder."""
    layers = {**_prefixed(reference.unet, "unet"), **_prefixed(reference.text, "text_encoder")}
    save_file(convert_state_dict_to_diffusers(layers), path, {"format": "pt"})


def numbered(network: torch.nn.Module) -> list[torch.Tensor]:
    """up, down, up, ... in the order in which cloneofsimo's lora walks, in half precision as it saves them."""
    pairs = [
        (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        for _, layer in network.named_modules()
        if hasattr(layer, "lora_A")
    ]
    return [factor.detach().half() for pair in pairs for factor in pair]


def _prefixed(network: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    # transformers 5 has no `text_model.` in its names; files have, as its earlier versions wrote them.
    inner = "text_model." if prefix == "text_encoder" and not hasattr(network, "text_model") else ""
    return {f"{prefix}.{inner}{name}": value for name, value in get_peft_model_state_dict(network).items()}


if __name__ == "__main__":
    main()
