"""Compile the graphs of sampling and training at tiny size and leave their intermediate representation in a folder.

    python -m tests.ascend_graphs FOLDER

A process of its own, because what it sets in MindSpore's context would stay for other tests. The files,
`FOLDER/<graph>/*_validate_*.ir`, are the graphs as the front end hands them to a device's back end.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

os.environ["MS_DEV_DUMP_IR_PASSES"] = "validate"  # the last pass that no device has a part in

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops  # noqa: E402

from ldm import ops as device_ops  # noqa: E402
from ldm.diffusion.loss import DiffusionLoss  # noqa: E402
from ldm.diffusion.on_device import GuidedUNet, WeightedSum  # noqa: E402
from ldm.diffusion.schedule import NoiseSchedule  # noqa: E402
from ldm.lora.dropout import make_dropout_key  # noqa: E402
from ldm.lora.inject import factors_cast_to, inject_lora  # noqa: E402
from ldm.lora.new_cells import new_lora_cell  # noqa: E402
from ldm.lora.spec import LayerSpec, LoRASpec  # noqa: E402
from ldm.models.autoencoder import VAEDecode, VAEEncode  # noqa: E402
from ldm.models.layers import Conv2d, Linear, set_compute_dtype  # noqa: E402
from ldm.models.stable_diffusion import StableDiffusion, build_model  # noqa: E402
from ldm.settings.loss import LossSettings  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.textual_inversion.embedding import Embedding  # noqa: E402
from ldm.textual_inversion.inject import NAME as LEARNED_ROWS  # noqa: E402
from ldm.textual_inversion.inject import put_embeddings  # noqa: E402
from ldm.training import optimizers  # noqa: E402
from ldm.training.step import TrainStep  # noqa: E402
from ldm.training.step_graphs import LossFromTokens  # noqa: E402
from ldm.training.weight_norms import NormLimit  # noqa: E402
from tests.training.toy import Product  # noqa: E402

# Optimizer -> its options and those of the step that it is combined with, which bring all its operators together.
UPDATES = {
    "update, adamw": ("AdamW", {}, {"rate_factors": {"p0": 0.5}, "use_ema": True}),
    "update, lion": ("Lion", {}, {"rate_factors": {"p0": 0.5}, "use_ema": True}),
    "update, adafactor": ("Adafactor", {"beta1": 0.9, "scale_parameter": True}, {"use_ema": True}),
    "update, adamwschedulefree": ("AdamWScheduleFree", {}, {"rate_factors": {"p0": 0.5}}),
    "update, prodigy": ("Prodigy", {"growth_rate": 1.02}, {"use_ema": True}),
    "update, limited": ("AdamW", {}, {}),
}
LOSSES = {
    "loss, l1": {"loss_type": "l1"},
    "loss, huber": {"loss_type": "huber", "min_snr_gamma": 5.0, "ip_noise_gamma": 0.1},
    "loss, smooth_l1": {"loss_type": "smooth_l1", "debiased_estimation_loss": True},
}


def zeros(*shape: int, dtype=np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype))


def as_on_ascend(config: ModelConfig) -> StableDiffusion:
    """UNet and text encoder in fp16, the autoencoder in fp32."""
    model = build_model(config)
    set_compute_dtype(model.model, ms.float16)
    set_compute_dtype(model.cond_stage_model, ms.float16)
    return model


def graphs(config: ModelConfig):
    """(name, cell, example inputs) of every graph that the two scripts run."""
    latents, timesteps, context = zeros(2, 4, 8, 8), zeros(2, dtype=np.int32), zeros(2, 77, config.context_dim)
    tokens, scalars = zeros(2, 77, dtype=np.int32), zeros(2, 7)

    model = as_on_ascend(config)
    yield "text", model.cond_stage_model, (tokens,)
    yield "encode", VAEEncode(model.first_stage_model), (zeros(1, 3, 16, 16),)
    yield "decode", VAEDecode(model.first_stage_model), (zeros(1, 4, 4, 4),)
    yield "unet", model.model.diffusion_model, (latents, timesteps, context)
    one = zeros(1)
    yield "guided", GuidedUNet(model.model.diffusion_model), (latents[:1], timesteps, context, one, one)
    yield "sampler", WeightedSum(), (zeros(2), latents, latents)

    # LoRA everywhere and a learned token, trained with everything that the step can do. The step of whole networks has
    # the same operators.
    model = as_on_ascend(config)
    spec = LoRASpec(rank=2, text_encoder=True, targets="all")
    # Dropout on a linear layer and a convolution brings all its operators. On every layer it takes most of the time.
    dropout = {name: LayerSpec(2, dropout=0.1) for name in ("to_q", "in_layers.2")}
    inject_lora(model, replace(spec, modules={**spec.layer_specs(), **dropout}))
    put_embeddings(model, [Embedding("<x>", np.zeros((2, config.text["width"]), np.float32))])
    for parameter in model.cond_stage_model.get_parameters():
        parameter.requires_grad = parameter.requires_grad or parameter.name == LEARNED_ROWS
    schedule = NoiseSchedule.from_config(config)
    loss = DiffusionLoss(model.model.diffusion_model, schedule, "v_prediction")
    step = TrainStep(
        LossFromTokens(loss, model.cond_stage_model),
        list(model.trainable_params()),
        clip=True,
        use_ema=True,
        skip_overflow=True,
        micro_batches=2,
        read_in_fp16=factors_cast_to(model, ms.float16),
    )
    yield "train", step.micro, (scalars, latents, latents, timesteps, tokens)
    yield "update", step.finish, (scalars,)


def graphs_of_updates():
    """(name, cell, example inputs) of the updates from totals: small matrices in the flat array, and a large one."""
    starts = [np.zeros(shape, np.float32) for shape in ((2, 9), (7, 2), (2, 3, 3, 3), (5, 2, 1, 1), (6,), (40, 50))]
    for name, (optimizer, options, others) in UPDATES.items():
        loss = Product(starts, in_fp16=2)
        parameters = list(loss.parameters)
        layers = [(*parameters[:2], 1.0), (*parameters[2:4], 0.5)]
        step = TrainStep(
            loss,
            parameters,
            optimizer=getattr(optimizers, optimizer)(**options),
            norm_limit=NormLimit(1.0, layers) if name == "update, limited" else None,
            clip=True,
            skip_overflow=True,
            micro_batches=2,
            large=1000,
            read_in_fp16=parameters[:2],
            **others,
        )
        yield name, step.finish, (zeros(2, 4 + len(step.optimizer.numbers(1, 1e-4))),)


class _Gradient(nn.Cell):
    """The gradient of a loss with respect to the one parameter of the network, which multiplies the latents."""

    def __init__(self, config: ModelConfig, settings: LossSettings):
        super().__init__()
        network = _Factor()
        loss = DiffusionLoss(network, NoiseSchedule.from_config(config), "v_prediction", settings)
        self.gradient = ops.grad(loss, None, weights=network.factor)

    def construct(self, *batch: Tensor) -> Tensor:
        return self.gradient(*batch)


class _Factor(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.factor = Parameter(zeros(2, 4, 8, 8), name="factor")

    def construct(self, latents: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        return (latents * self.factor).astype(ms.float16)


def graphs_of_losses(config: ModelConfig):
    """(name, cell, example inputs) of the losses that are no mean squared error, with their gradients."""
    for name, settings in LOSSES.items():
        channels = 8 if "ip_noise_gamma" in settings else 4
        inputs = zeros(2, 4, 8, 8), zeros(2, channels, 8, 8), zeros(2, dtype=np.int32), zeros(1)
        yield name, _Gradient(config, LossSettings(**settings)), inputs


class _Kinds(nn.Cell):
    """Linear layers and convolutions with every kind of LoRA, one after the other, and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        key = make_dropout_key()
        both = dict(rank_dropout=0.1, module_dropout=0.1)
        specs = (
            LayerSpec(2, algo="loha", **both), LayerSpec(8, algo="loha", dora_wd=True),
            LayerSpec(1, algo="lokr", **both), LayerSpec(9, algo="lokr"), LayerSpec(2, algo="dora", **both),
        )  # fmt: skip
        self.dense = nn.SequentialCell([self.layer(Linear(16, 16), spec, key) for spec in specs])
        specs = (*specs, *(replace(spec, use_tucker=True) for spec in (specs[0], specs[2], specs[4])))
        self.convolutions = nn.SequentialCell([self.layer(Conv2d(16, 16, 3, 1, 1), spec, key) for spec in specs])
        self.mean = device_ops.mean()
        set_compute_dtype(self, ms.float16)
        weights = [p for p in self.trainable_params() if ".lora_" in p.name]
        self.gradient = ops.grad(self.loss, (0, 1), weights=ParameterTuple(weights))
        self.set_train()

    def layer(self, base: nn.Cell, spec: LayerSpec, key: Parameter) -> nn.Cell:
        name = f"layer{len(list(self.get_parameters()))}.{id(base)}"
        for parameter in base.get_parameters():
            parameter.requires_grad, parameter.name = False, f"{name}.{parameter.name}"
        return new_lora_cell(base, name, spec, LoRASpec(), key)

    def loss(self, x: Tensor, images: Tensor) -> Tensor:
        return self.mean(self.dense(x).astype(ms.float32)) + self.mean(self.convolutions(images).astype(ms.float32))

    def construct(self, x: Tensor, images: Tensor):
        return self.gradient(x, images)


def main() -> None:
    folder = Path(sys.argv[1])
    device_ops.on_ascend = lambda: True
    config = load_model_config(Path(__file__).with_name("tiny.yaml"))
    config.unet["attention_resolutions"], config.text["num_layers"] = [2], 1  # more layers add no operators
    kinds = [("kinds of LoRA", _Kinds(), (zeros(2, 3, 16), zeros(2, 16, 8, 8)))]
    for name, cell, inputs in chain(graphs(config), graphs_of_updates(), graphs_of_losses(config), kinds):
        ms.set_context(mode=ms.GRAPH_MODE, save_graphs=1, save_graphs_path=str(folder / name))
        try:
            cell.compile(*inputs)
        except RuntimeError as error:  # after the last pass of the front end: the CPU lacks some of Ascend's kernels
            if "Kernel select failed" not in str(error):
                raise


if __name__ == "__main__":
    main()
