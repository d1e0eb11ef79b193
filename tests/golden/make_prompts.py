"""Write prompts.json: what A1111's stable-diffusion-webui makes of prompts with weights, BREAK and many tokens.

Its functions parse_prompt_attention and tokenize_line run as they are, with the settings of a new installation. The
file holds their answers: (text, weight) of the pieces, and the token ids and weights of the chunks. The words are
tokenized by ldm.tokenizer, which test_tokenizer.py compares with transformers. Needs PyTorch and a checkout:

    git clone https://github.com/AUTOMATIC1111/stable-diffusion-webui
    python -m tests.golden.make_prompts stable-diffusion-webui
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ldm.tokenizer import END_TOKEN, START_TOKEN, Tokenizer
from ldm.tokenizer.tokenizer import vocabulary

GOLDEN = Path(__file__).with_name("prompts.json")

PROMPTS = [
    "", " ", "normal text", "an (important) word", "(unbalanced", "(((unbalanced", "unbalanced)", "[less", "less]",
    r"\(literal\]", "(unnecessary)(parens)", "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", "(x:1.)",
    "(x:-1)", "(x:.5)", "(x:+0.5)", "(x: 1.3 )", "(x:0)", "(x:00.7)", "(x:1e5)", "(x:1,3)", "(x:)", "x:1.3)", "[x:1.3]",
    "(a:b:1.3)", "(a b, c:1.2), d", "((x))", "[[x]]", "[(x)]", "([x])", "(x:1.5:2)", "(a(b:2)c:3)", "()", "[]", "(())",
    "(:1.3)", "a:b", "::", r"\\", r"\\(x\\)", r"\(x:1.3\)", r"(\(x\):1.3)", r"a\b", "\\", r"\[x\]", r"(x\:1.3)",
    r"trailing\\", "(x:1.1", "(a [b (c] d) e", "[a (b] c)", "(x:2)(y:2)z", "((x:0.5)y:2)", "a (b:1.0) c", "{x} <y>",
    "(émigré:1.2) 日本 (猫:0.8)", "A (Photo) OF [A Cat]", "((((((((x))))))))", "[[[[[[[[x]]]]]]]]", "x(:)y", "(,:1.2),",
    "a BREAK b", "BREAK", "BREAK a", "a BREAK", "a BREAKS b", "a break b", "a\nBREAK\nb", "a BREAK BREAK b",
    "(a:1.2) BREAK [b] c", "a,BREAK,b", "xBREAK BREAKx", r"\BREAK", "a BREAK " * 5,
]  # fmt: skip
LONG = [
    "word " * 74, "word " * 75, "word " * 76, "word " * 150, "word " * 151, "word " * 400, "word, " * 60,
    "word " * 74 + ", tail", "word " * 75 + ", tail", "word " * 76 + ", tail", "word " * 54 + ", " + "tail " * 40,
    "word " * 55 + ", " + "tail " * 40, "word " * 56 + ", " + "tail " * 40, "word " * 60 + ", (tail:1.4) " * 20,
    "(" + "word " * 80, "(word:1.2) " * 80, "word " * 70 + "(a, b c d e f g h i j k:0.7)", "word " * 80 + "BREAK x",
    "word " * 75 + "BREAK x", "x BREAK " + "word " * 75, "," * 200, "a, " * 74 + "b c d",
]  # fmt: skip


def stub(name: str, **content: Any) -> None:
    """Make `name` a module with this content."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module


def main() -> None:
    modules = Path(sys.argv[1], "modules")
    parser = modules.joinpath("prompt_parser.py").read_text(encoding="utf-8")
    # Of prompt_parser.py, what stands from its first pattern of weights to the tests at its end: the rest needs lark.
    parser = parser[parser.index("re_attention =") :].split("\nif __name__")[0]
    functions: dict[str, Any] = {}
    exec(compile("import re\n" + parser, "prompt_parser.py", "exec"), functions)
    parse = functions["parse_prompt_attention"]
    stub("modules", **{name: None for name in ("devices", "sd_hijack", "sd_emphasis")})
    sys.modules["modules"].prompt_parser = SimpleNamespace(parse_prompt_attention=parse)  # type: ignore[attr-defined]
    stub("modules.shared", opts=SimpleNamespace(emphasis="Original", comma_padding_backtrack=20))
    embedder = runpy.run_path(str(modules / "sd_hijack_clip.py"))["FrozenCLIPEmbedderWithCustomWordsBase"]

    tokenizer = Tokenizer("end")
    no_embedding = SimpleNamespace(find_embedding_at_position=lambda tokens, position: (None, None))
    clip = embedder(None, SimpleNamespace(embedding_db=no_embedding))
    clip.tokenize = lambda texts: [tokenizer.tokenize(text) for text in texts]
    clip.id_start, clip.id_end, clip.comma_token = START_TOKEN, END_TOKEN, vocabulary().ids[",</w>"]

    cases = []
    for prompt in [*PROMPTS, *LONG]:
        chunks, _ = clip.tokenize_line(prompt)
        # Without start, end and padding, whose weight is 1.
        rows = [
            [[token, round(weight, 12)] for token, weight in zip(chunk.tokens[1:-1], chunk.multipliers[1:-1])]
            for chunk in chunks
        ]
        for row in rows:
            while row and row[-1] == [END_TOKEN, 1.0]:
                row.pop()
        pieces = parse(prompt) if prompt in PROMPTS else None
        cases.append({"prompt": prompt, "pieces": pieces, "chunks": [_packed(row) for row in rows]})
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _packed(row: list[list[float]]) -> list[list[float]]:
    """Return [token, weight, repeats] of each run of equal tokens."""
    runs: list[list[float]] = []
    for token, weight in row:
        if runs and runs[-1][:2] == [token, weight]:
            runs[-1][2] += 1
        else:
            runs.append([token, weight, 1])
    return runs


if __name__ == "__main__":
    main()
