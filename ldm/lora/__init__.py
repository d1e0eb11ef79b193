"""LoRA: put it into a network, take it out, merge it, read and write any format of it, add and shrink it.

from ldm.lora import LoRASpec, get_lora, inject_lora, merge_lora, read_lora, remove_lora, write_lora

names = inject_lora(model, LoRASpec(rank=8, targets=("to_q", "to_v")))   # trainable, everything else frozen
state = get_lora(model)                                                # layer name -> down, up, alpha
remove_lora(model)
merge_lora(model, state, 0.7)                                            # W += 0.7 * alpha / rank * up @ down
write_lora("mine.safetensors", state, "kohya")
"""

from ldm.lora.algebra import decompose, difference, resize, weighted_sum
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora, remove_lora
from ldm.lora.lora import LoRA, LoRALayer, Strength
from ldm.lora.merge import match_lora, merge_lora, unmerge_lora
from ldm.lora.spec import LayerSpec, LoRASpec

__all__ = [
    "LayerSpec", "LoRALayer", "LoRASpec", "LoRA", "Strength", "decompose", "difference", "inject_lora",
    "get_lora", "match_lora", "merge_lora", "read_lora", "remove_lora", "resize", "unmerge_lora", "weighted_sum",
    "write_lora",
]  # fmt: skip
