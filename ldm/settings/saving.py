"""The settings of the .safetensors that a LoRA training writes for others, beside each of its checkpoints.

Names and defaults are those of kohya's sd-scripts. TrainSettings holds them all. No weight depends on them, so that a
resumed run may have others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Optional

from ldm.errors import UserError, plain
from ldm.settings.declare import names_of, setting

DEFAULT_OUTPUT_NAME = "lora"
PRECISIONS = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}  # sd-scripts' words -> those of ldm.lora.formats
LONGEST_OUTPUT_NAME = 150  # bytes; "-step<12 digits>.safetensors" and the ending of a half-written file follow
LONGEST_TEXT = 10_000  # characters of a text in the metadata

# What a file name cannot hold on some system, and what cannot stand in `<lora:name:1>` of a prompt.
_NOT_IN_A_NAME = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]')
_NAME_OF_A_RUN = re.compile(r"(lora|model|state|best|ti)-[0-9]+|ti|.*-step[0-9]+")

_lora_setting = partial(setting, needs="use_lora")


@dataclass
class SavingSettings:
    """What is written beside lora.ckpt for A1111, ComfyUI and others, and what it says (docs/sharing.md)."""

    output_name: Optional[str] = _lora_setting(
        None,
        "name of the .safetensors that is written beside each lora.ckpt, in kohya's form, for A1111, ComfyUI and "
        f"others: its file name and its title. None: {DEFAULT_OUTPUT_NAME} (docs/sharing.md)",
        group="the file to share",
    )
    save_model_as: str = setting(
        "safetensors",
        "safetensors: write that file beside each .ckpt; ckpt: write the .ckpt alone",
        choices=("safetensors", "ckpt"),
    )
    save_precision: Optional[str] = _lora_setting(
        None, "type of its factors; None: float, which is what they are trained in", choices=tuple(PRECISIONS)
    )
    no_metadata: bool = _lora_setting(
        False, "leave out what it says of the training and its data: file names, captions, settings, dates and hashes"
    )
    metadata_title: Optional[str] = _lora_setting(None, "its title; None: output_name")
    metadata_author: Optional[str] = _lora_setting(None, "its author")
    metadata_description: Optional[str] = _lora_setting(None, "its description")
    metadata_license: Optional[str] = _lora_setting(None, "its licence")
    metadata_tags: Optional[str] = _lora_setting(None, "its tags, separated by commas")
    metadata_trigger_phrase: Optional[str] = _lora_setting(
        None, "the words that a prompt needs; None: instance_prompt or placeholder_token, if one is given"
    )
    metadata_usage_hint: Optional[str] = _lora_setting(None, "how to use it")
    training_comment: Optional[str] = _lora_setting(None, "a remark on its training")

    def check_saving(self) -> None:
        """Check the settings against each other. Raises UserError."""
        if self.output_name is not None and (fault := output_name_fault(self.output_name)):
            raise UserError(f"output_name {plain(self.output_name, 60)} {fault}: give a name such as pokemon")
        texts = [name for name in names_of(SavingSettings) if name.startswith("metadata_")] + ["training_comment"]
        for name in texts:
            text = getattr(self, name)
            if text is None:
                continue
            if self.no_metadata:
                raise UserError(f"{name} does not go with no_metadata, which leaves it out: leave out one of them")
            if len(text) > LONGEST_TEXT:
                raise UserError(
                    f"{name} has {len(text):,} characters, at most {LONGEST_TEXT:,} are written: shorten it"
                )

    @property
    def share_name(self) -> Optional[str]:
        """The name of the file to share without its suffix, None if none is written."""
        if self.save_model_as == "ckpt":
            return None
        return DEFAULT_OUTPUT_NAME if self.output_name is None else self.output_name

    @property
    def share_dtype(self) -> str:
        """The type of its factors, one of ldm.lora.formats.DTYPES."""
        return "fp32" if self.save_precision is None else PRECISIONS[self.save_precision]


def output_name_fault(name: str) -> str:
    """Say why a name cannot be that of a file to share, "" if it can."""
    found = _NOT_IN_A_NAME.search(name)
    if found:
        return f'holds "{plain(found[0])}", which a file name or a prompt cannot hold'
    if not name or name != name.strip() or name.startswith("."):
        return "is empty, begins with a dot, or begins or ends with a space"
    if len(name.encode()) > LONGEST_OUTPUT_NAME:
        return f"has {len(name.encode())} bytes, at most {LONGEST_OUTPUT_NAME} are possible"
    if _NAME_OF_A_RUN.fullmatch(name):
        return "is the name of another file of the run"
    return ""
