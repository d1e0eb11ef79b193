"""LoRA: inject it into a model, take it out, merge it, read and write every file format, add and resize.

from ldm.lora import LoRASpec, get_lora, inject_lora, merge_lora, read_lora, remove_lora, write_lora

names = inject_lora(model, LoRASpec(rank=8, targets=("to_q", "to_v")))  # trainable, everything else is frozen
lora = get_lora(model)  # layer name -> down, up, alpha
remove_lora(model)
merge_lora(model, lora, strength=0.7)  # W += 0.7 * alpha / rank * up @ down
write_lora("mine.safetensors", lora, "kohya")
"""

from ldm.lora.algebra import decompose, resize, weighted_sum
from ldm.lora.formats import detect_format, read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora, remove_lora, set_lora
from ldm.lora.lora import LoRA
from ldm.lora.merge import match_lora, merge_lora, unmerge_lora
from ldm.lora.spec import LayerSpec, LoRASpec
from ldm.lora.strength import Strength
from ldm.lora.updates import LoRALayer
from ldm.settings.block_weights import BlockWeights

__all__ = [
    "BlockWeights",
    "LayerSpec",
    "LoRA",
    "LoRALayer",
    "LoRASpec",
    "Strength",
    "decompose",
    "detect_format",
    "get_lora",
    "inject_lora",
    "match_lora",
    "merge_lora",
    "read_lora",
    "remove_lora",
    "resize",
    "set_lora",
    "unmerge_lora",
    "weighted_sum",
    "write_lora",
]
