"""Choose the concepts that the nano model is trained on.

    python -m tools.nano.choose_concepts

Writes datasets/emoji_noto/img_txt.csv, and the img_txt.csv of the other styles with their training images of the same
concepts. The concepts are those of the test split of emoji_fluent_hc, whose style the demo holds out, and whole groups
of emoji: animals, plants, food, smiling faces, cats, instruments, boats, aeroplanes, sports, things. A small model
draws few concepts better than many. A LoRA learns a style only from concepts that its base model knows (docs/nano.md).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ldm.files.atomic import atomic_path
from ldm.files.outputs import claim_all, claim_file
from ldm.runtime.script import run_script
from tools.nano.images import DATASETS, STYLES, categories, read_rows

WHOLE_CATEGORIES = ("Animals & Nature", "Food & Drink")
SUBCATEGORIES = (
    "face-smiling",
    "face-affection",
    "face-tongue",
    "face-hat",
    "face-glasses",
    "cat-face",
    "monkey-face",
    "musical-instrument",
    "transport-water",
    "transport-air",
    "sport",
    "phone",
    "science",
    "light & video",
)


def write_csv(style: str, rows: Iterable[tuple[str, str]]) -> int:
    """Write datasets/<style>/img_txt.csv from rows of (split/file, caption), sorted by file; return their number."""
    ordered = sorted(rows, key=lambda row: Path(row[0]).name)
    with atomic_path(DATASETS / style / "img_txt.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("dir", "text"))
            writer.writerows(ordered)
    return len(ordered)


def main() -> None:
    with claim_all(*(claim_file(DATASETS / style / "img_txt.csv", "img_txt.csv") for style in ("emoji_noto", *STYLES))):
        choose()


def choose() -> None:
    """Write the files and print their lengths."""
    held_out_style = {row.path.name for row in read_rows("emoji_fluent_hc", "test")}
    kind = categories()
    chosen = {}
    for split in ("train", "test"):
        for row in read_rows("emoji_noto", split):
            category, subcategory = kind[row.path.name]
            if row.path.name in held_out_style or category in WHOLE_CATEGORIES or subcategory in SUBCATEGORIES:
                chosen[row.path.name] = (f"{split}/{row.path.name}", row.caption)
    write_csv("emoji_noto", chosen.values())
    print(
        f"{len(chosen)} concepts, {len({text for _, text in chosen.values()})} different captions, "
        f"{len(held_out_style)} of them with a held-out image in another style"
    )
    for style in STYLES:
        known = [
            (f"train/{row.path.name}", row.caption) for row in read_rows(style, "train") if row.path.name in chosen
        ]
        print(f"{write_csv(style, known)} training images of {style} show one of them")


if __name__ == "__main__":
    run_script(main)
