"""Prompts with settings of their own on the same line, as in kohya's sd-scripts.

    a red apple on a table --n blurry --w 512 --h 512 --d 1 --l 7.5 --s 28 --ss ddim

sample_prompts of a training and data_path of text_to_image.py (with prompt_flags) are read by this module.
"""

from __future__ import annotations

import re
from typing import Any

from ldm.errors import UserError, plain
from ldm.settings.read import read_mapping
from ldm.settings.samples import PromptLineSettings
from ldm.settings.values import from_word, settings_of

# The flags of a line, and the fields of PromptLineSettings.
FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "l": "scale",
    "s": "sample_steps",
    "ss": "sample_sampler",
}
# Two dashes before a letter, at the beginning of a word. Others are a part of the prompt.
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def read_prompt_line(line: str, where: str) -> dict[str, Any]:
    """Return the prompt of a line, and what its flags say, by the names of PromptLineSettings.

    The flags may be in capitals, too. `where` names the line in errors.

    Raises:
        UserError: A flag is unknown or given twice, or its value is out of range.
    """
    prompt, *parts = _FLAG.split(line)
    settings = settings_of(PromptLineSettings)
    values: dict[str, Any] = {"prompt": prompt.strip()}
    for part in parts:
        flag, word = (*part.split(None, 1), "")[:2]
        name = FLAGS.get(flag.lower())
        if name is None:
            known = ", ".join(f"--{letter}" for letter in FLAGS)
            raise UserError(
                f"{where}: unknown flag --{plain(flag, 40)}: the flags of a prompt are {known}; two dashes that belong "
                "to the prompt need a space behind them"
            )
        if name in values:
            raise UserError(f"{where}: --{flag} is given twice: leave one of them out")
        values[name] = from_word(word.strip(), settings[name].hint, f"{where}: --{flag}")
        read_mapping(PromptLineSettings, {name: values[name]}, f"{where}, --{flag}")
    return values
