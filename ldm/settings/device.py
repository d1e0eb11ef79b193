"""Settings of the device that training, generation and the check of a device share."""

from __future__ import annotations

from typing import Any

from ldm.settings.declare import setting

PRECISIONS = ("auto", "fp16", "fp32", "bf16")
PYNATIVE_BF16_FAULT = "precision bf16 is for graph mode: leave out mode 1 (pynative), or use --precision fp32"
JIT_LEVELS = ("O0", "O1", "O2")
JIT_LEVEL_HELP = (
    "level of Ascend's graph compiler; None: O0. O0 runs operator by operator, O1 fuses some operators. O2 gives each "
    "whole graph to CANN's graph engine: this project never compiled it, and it may not compile, because MindSpore "
    "2.8.0 has no adapter to that engine for several operators used here"
)
FLASH_ATTENTION_HELP = "use fused attention in the UNet; None: in fp16 on Ascend A2 and later, which alone have it"


def jit_level_setting(**rules: Any) -> Any:
    """Return the setting of the graph compiler's level. The default is None."""
    return setting(None, JIT_LEVEL_HELP, choices=JIT_LEVELS, **rules)


def flash_attention_setting(**rules: Any) -> Any:
    """Return the setting of Ascend's fused attention. The default is None."""
    return setting(None, FLASH_ATTENTION_HELP, **rules)
