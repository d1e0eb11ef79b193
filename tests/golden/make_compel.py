"""Write compel.npz: the text embeddings of compel with the text encoder of small_sd1.yaml.

compel (https://github.com/damian0815/compel) means the same as this project by chunks of 75 tokens, where a text has no
comma ("BRUTAL"), and by clip skip 2. It means something else by a weight: it moves an embedding away from that of the
empty prompt, and keeps no mean. So no weight is recorded. Every fourth row is kept.

Run in the environment of `make test-parity`, with compel beside it: pip install --no-deps compel==2.5.1
python -m tests.golden.make_compel
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode

from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from tests.golden.make_tokenizer import clip_tokenizer
from tests.named_weights import named_weight
from tests.parity.reference import Reference

GOLDEN = Path(__file__).with_name("compel.npz")
ROWS = slice(None, None, 4)
TEXTS = {"short": "a red apple on a table", "long": "a red apple on a wooden table " * 25}
TYPES = {
    "": ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
    "_clip_skip_2": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED,
}


@torch.no_grad()
def main() -> None:
    config = load_model_config(GOLDEN.with_name("small_sd1.yaml"))
    parameters = build_model(config).parameters_dict()
    weights = {name: named_weight(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    text_encoder = Reference(config, weights).text
    # compel 2.5.1 names a part that transformers 5 has no more. Not as a submodule, which would be a circle.
    text_encoder.__dict__.setdefault("text_model", text_encoder)
    arrays = {}
    for suffix, embeddings_type in TYPES.items():
        provider = EmbeddingsProvider(
            clip_tokenizer(),
            text_encoder,
            truncate=False,
            returned_embeddings_type=embeddings_type,
            split_long_text_mode=SplitLongTextMode.BRUTAL,
        )
        for name, text in TEXTS.items():
            (embeddings,) = provider.get_embeddings_for_weighted_prompt_fragments([[text]], [[1.0]])
            arrays[name + suffix] = embeddings.numpy()[ROWS].astype(np.float32)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
