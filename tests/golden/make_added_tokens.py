"""Write tests/golden/added_tokens.json: what the reference tokenizers make of texts with added tokens.

Up to transformers 4 an added token is found in its own case alone, from 5 on in any unless it is special or not
normalized. As for make_tokenizer.py this runs twice, and each run replaces its column:

    pip install transformers==4.57.6 ftfy==6.3.1 && python tests/golden/make_added_tokens.py
    pip install transformers==5.23.0 && python tests/golden/make_added_tokens.py
"""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from make_tokenizer import clip_tokenizer

GOLDEN = Path(__file__).with_name("added_tokens.json")
ADDED = ("<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<Gelb>", "sks", "<猫>")
SPECIAL, NOT_NORMALIZED, SINGLE_WORD = "<Spec>", "<N>", "zwz"
TEXTS = (
    "a <cat-toy> on a table", "<cat-toy>", "a<cat-toy>b", "  <cat-toy>  ", "<cat-toy>\n<cat-toy>",
    "<cat-toy><cat-toy>_1<cat-toy>_2", "<cat-toy> <cat-toy>_1, <cat-toy>_2.", "<cat-toy>_3", "<cat-toy>s",
    "a photo of <cat-toy>'s friend", "A Painting OF <cat-toy>, 8K", "cat-toy < cat-toy >", "<cat-<cat-toy>toy>",
    "a <Gelb> x", "sks asksb sks, sks", "<猫>の写真 <猫>", "<|endoftext|> <cat-toy>", "a <Spec> b", "a<Spec>b",
    "<N> <Gelb>", "zwz a zwz", "azwz zwzb zwz_", "", "<cat-toy> " * 80, "a <spec> b", "a <n> b",
    "a <CAT-TOY> x", "a <gelb> <GELB>", "SKS", "(zwz) zwz, zwz-", "<cat-toy> &amp; x", "&lt;cat-toy&gt;",
)  # fmt: skip


def main() -> None:
    tokenizer, version = clip_tokenizer(), transformers.__version__
    tokenizer.add_tokens(list(ADDED))
    if version.startswith("4."):
        tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    else:
        tokenizer.add_tokens([SPECIAL], special_tokens=True)
    tokenizer.add_tokens([
        transformers.AddedToken(NOT_NORMALIZED, normalized=False, special=False),
        transformers.AddedToken(SINGLE_WORD, single_word=True),
    ])  # fmt: skip
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"references": {}}
    golden["added"] = [
        [text, token, text not in (SPECIAL, NOT_NORMALIZED), text == SINGLE_WORD]
        for text, token in tokenizer.get_added_vocab().items()
        if token >= 49408
    ]
    entries = golden.get("texts", [])
    if [entry["text"] for entry in entries] != list(TEXTS):
        entries = golden["texts"] = [{"text": text} for text in TEXTS]
    column = f"clip{version[0]}"
    golden["references"][column] = f"CLIPTokenizer of transformers {version}"
    for entry in entries:
        entry[column] = tokenizer(entry["text"], truncation=True, max_length=77)["input_ids"]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    head = json.dumps({key: golden[key] for key in ("references", "added")}, ensure_ascii=False)[:-1]
    GOLDEN.write_text(f'{head}, "texts": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
