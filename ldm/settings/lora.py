"""The settings of LoRA: where the updates are, how large, and of which kind (docs/lora_kinds.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError
from ldm.files.paths import MAX_STRENGTH
from ldm.settings.declare import MAX_RANK, input_path, setting

# Settings that decide the trained weights and the compiled training step.
graph_setting = partial(setting, resume="fixed", graph_key=True)


@dataclass
class LoRASettings:
    """Which layers get a LoRA, and of which kind."""

    use_lora: bool = graph_setting(False, "train low-rank updates (LoRA) instead of the whole UNet", group="LoRA")
    lora_ft_unet: bool = graph_setting(True, "add LoRA to the UNet")
    lora_ft_text_encoder: bool = graph_setting(
        False,
        "add LoRA to the text encoder",
        needs="use_lora",
        not_in_diffusers="diffusers' script trains the UNet alone",
    )
    lora_rank: int = graph_setting(4, "rank; a larger one learns more and makes a larger file", low=1, high=MAX_RANK)
    lora_alpha: Optional[float] = graph_setting(
        None, "the update is multiplied by lora_alpha / lora_rank; None: by 1", above=0, high=1e6
    )
    lora_scale: float = graph_setting(1.0, "a further factor of the update", above=0, high=MAX_STRENGTH)
    lora_targets: list[str] = graph_setting(
        ["attention"],
        "which layers: attention (q, k, v and output projections), all (also feed-forward, projections and "
        "convolutions), or the last parts of layers' names, such as to_q to_v",
    )
    algo: str = graph_setting(
        "lora",
        "the kind of update, as LyCORIS calls it: lora; loha and lokr (products of small matrices); dora is lora with "
        "dora_wd, rslora is lora with rs_lora (docs/lora_kinds.md)",
        choices=("lora", "loha", "lokr", "dora", "rslora"),
        needs="use_lora",
        not_in_diffusers="diffusers' script trains pairs of factors alone",
    )
    dora_wd: bool = graph_setting(
        False,
        "DoRA: train the norm of what each output is computed from by itself, with any algo",
        needs="use_lora",
        not_in_diffusers="diffusers' script has no DoRA for Stable Diffusion",
    )
    rs_lora: bool = graph_setting(
        False,
        "rsLoRA: multiply the update by alpha / sqrt(rank) instead of alpha / rank, so that a large rank learns as "
        "fast as a small one; the file holds the alpha that says so to every reader",
        needs="use_lora",
        not_in_diffusers="lora_alpha says the same",
    )
    conv_dim: Optional[int] = graph_setting(
        None,
        "rank of the 3x3 convolutions. As in kohya's scripts, it adds the UNet's residual blocks and resampling to "
        "lora_targets, whose linear layers and 1x1 convolutions have lora_rank; None: lora_targets decide, and all "
        "layers have lora_rank",
        low=1,
        high=MAX_RANK,
        needs="use_lora",
        not_in_diffusers="diffusers' script trains the attention alone",
    )
    conv_alpha: Optional[float] = graph_setting(
        None, "alpha of the 3x3 convolutions; None: conv_dim", above=0, high=1e6, needs="use_lora",
        not_in_diffusers="diffusers' script trains the attention alone",
    )  # fmt: skip
    factor: int = graph_setting(
        -1,
        "lokr: divide the channels into this number of parts, or into as many as it allows; a larger one (up to the "
        "root of the channels) makes a smaller file; -1: parts and channels in each are as equal as can be",
        low=-1,
        high=MAX_RANK,
        needs="use_lora",
        not_in_diffusers="diffusers' script trains pairs of factors alone",
    )
    use_tucker: bool = graph_setting(
        False,
        "give 3x3 convolutions a factor of their own for the kernel's pixels: a smaller file",
        needs="use_lora",
        not_in_diffusers="diffusers' script trains the attention alone",
    )
    rank_dropout: float = graph_setting(
        0.0,
        "probability that a rank of a layer is left out in a step; with loha and lokr an output",
        low=0,
        below=1,
        needs="use_lora",
        not_in_diffusers="diffusers' script has no dropout of ranks",
    )
    module_dropout: float = graph_setting(
        0.0,
        "probability that a layer's whole update is left out in a step",
        low=0,
        below=1,
        needs="use_lora",
        not_in_diffusers="diffusers' script has no dropout of layers",
    )
    lora_config: Optional[str] = input_path(
        "JSON or YAML file with r, alpha, scale, algo, dropout, lr and more for each module by name, "
        "instead of lora_targets (docs/lora_toolbox.md); the settings here are the defaults",
        resume="fixed",
        needs="use_lora",
        not_in_diffusers="it may train scales and drop inputs, which diffusers' script does not; use lora_targets",
    )
    lora_dropout: float = graph_setting(
        0.0,
        "share of a layer's inputs that LoRA does not see in a step",
        low=0,
        below=1,
        not_in_diffusers="its masks are drawn differently",
    )
    lora_init_path: Optional[str] = setting(
        None,
        "LoRA file of any known format that training starts from; its layers and ranks must be those trained here",
        path=True,
        needs="use_lora",
        set_by_comparison=True,
    )
    lora_fp16: bool = graph_setting(
        True, "compute LoRA in fp16 where the network computes in fp16; its parameters stay fp32"
    )

    def check_lora(self) -> None:
        """Check the settings of the kind of LoRA against each other. Raises UserError."""
        if self.factor == 0:
            raise UserError("factor: 0 is not allowed: at least 1, or -1 (the default)")
        if self.factor != -1 and self.algo != "lokr" and self.lora_config is None:
            raise UserError(f"factor is for algo lokr, here it is {self.algo}: leave it out")
        if self.conv_alpha is not None and self.conv_dim is None:
            raise UserError("conv_alpha has no effect without conv_dim: give that too, or leave it out")
        if self.conv_dim is not None and self.lora_config is not None:
            raise UserError("conv_dim and lora_config both say the rank of convolutions: leave one of them out")
        if self.conv_dim is not None and not self.lora_ft_unet:
            raise UserError("conv_dim is for the UNet's convolutions: leave it out with lora_ft_unet False")
