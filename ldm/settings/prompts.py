"""The settings of the prompts and of the images that are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from ldm.errors import UserError
from ldm.settings.declare import MAX_SEED, input_path, setting
from ldm.settings.model_yaml import MAX_SIDE

MAX_IMAGES = 1_000_000
MAX_CLIP_SKIP = 100
SYNTAXES = ("plain", "a1111")  # of prompts, see ldm.prompts.syntax


@dataclass
class PromptSettings:
    """What the images show, how many there are and how large they are."""

    generate_config: Optional[str] = input_path(
        "YAML file with any of these settings; flags win over it", group="images"
    )
    # Not Optional, because "none" may be a prompt.
    prompt: str = setting("", "the prompt")
    data_path: Optional[str] = input_path(
        "text file (UTF-8) with one prompt per line, instead of prompt; an empty line is an empty prompt, but empty "
        "lines at the end do not count (a line with a space does)"
    )
    negative_prompt: str = setting("", "what the images should not show, for all prompts")
    negative_data_path: Optional[str] = input_path(
        "text file with one negative prompt per line, as many as prompts, or one for all"
    )
    prompt_syntax: str = setting(
        "plain",
        "plain: every character belongs to a word; a1111: (x), [x] and (x:1.3) weigh words, a backslash makes a "
        "bracket a word, BREAK ends a chunk, <lora:name:0.8> applies a LoRA of lora_dir, and long prompts are read "
        "whole (docs/prompts.md)",
        choices=SYNTAXES,
    )
    support_long_prompts: bool = setting(
        False, "encode prompts of more than 75 tokens in chunks of 75, instead of cutting them; a1111 always does"
    )
    prompt_flags: bool = setting(
        False,
        "read kohya's flags in prompts: --n negative prompt, --w width, --h height, --d seed, --l guidance scale, "
        "--s steps, --ss sampler; empty lines of data_path and those that begin with # do not count then",
    )
    enable_wildcard: Optional[bool] = setting(
        None,
        "draw wildcards for each image: {red|blue}, and __name__ for a line of name.txt in wildcard_dir; None: if "
        "wildcard_dir is given",
    )
    wildcard_dir: Optional[str] = input_path("folder of wildcards: .txt files with a text a line")
    clip_skip: Optional[int] = setting(
        None,
        "take the text embeddings from this layer of the text encoder, counted from the last; None: the model's own, "
        "1 for SD1.x and nano, 2 for SD2.x",
        low=1,
        high=MAX_CLIP_SKIP,
    )
    n_iter: int = setting(1, "rounds; each prompt gets n_iter x n_samples images", low=1, high=MAX_IMAGES)
    n_samples: int = setting(1, "images of each prompt in a round", low=1, high=MAX_IMAGES)
    H: Optional[int] = setting(None, "height in pixels; None for the model's own", low=1, high=MAX_SIDE)
    W: Optional[int] = setting(None, "width in pixels; None for the model's own", low=1, high=MAX_SIDE)
    seed: int = setting(
        42,
        "image i depends on (seed, i) only, not on the batch size; i counts the images of all prompts",
        low=0,
        high=MAX_SEED,
    )
    init_latents: Optional[str] = setting(
        None, "starting latents instead of the seed's: an .npy of floats, (images, channels, height, width)", path=True
    )

    @property
    def draws_wildcards(self) -> bool:
        """Whether the prompts' wildcards are drawn."""
        return self.wildcard_dir is not None if self.enable_wildcard is None else self.enable_wildcard

    def check_prompts(self, may_be_empty: bool) -> None:
        """Raise UserError unless the settings of the prompts go together. `may_be_empty`: the prompt."""
        if not self.prompt and self.data_path is None and not may_be_empty:
            raise UserError('nothing to generate: give --prompt "a text" or --data_path with a file of prompts')
        for name, other in (("prompt", "data_path"), ("negative_prompt", "negative_data_path")):
            if getattr(self, name) and getattr(self, other):
                raise UserError(f"--{name} and --{other} are both given: leave one of them out")
        if self.wildcard_dir is not None and not self.draws_wildcards:
            raise UserError("--wildcard_dir has no effect with --enable_wildcard False: leave one of them out")
