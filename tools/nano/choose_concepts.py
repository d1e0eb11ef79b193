"""Choose the concepts that the embedded base draws, and write datasets/emoji_noto/img_txt.csv, and for each other style
the img_txt.csv of its training images of these concepts.

    python -m tools.nano.choose_concepts

All concepts of the test split of emoji_fluent_hc (the demo holds out their style, not the concept), and
whole groups of what a person would ask for: animals, plants, food, smiling faces, cats, instruments, boats, aeroplanes,
sports, things. Fewer concepts drawn well beat more of them drawn badly: two cores train this in hours. A LoRA learns a
style from images of what its base knows: captions that mean nothing to the base teach it to draw none (docs/nano.md).
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ldm.files.atomic import atomic_path
from ldm.files.outputs import claim_all, claim_file
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
    """Write datasets/<style>/img_txt.csv from (split/file, caption), sorted by file; returns the number of rows."""
    ordered = sorted(rows, key=lambda row: Path(row[0]).name)
    with atomic_path(DATASETS / style / "img_txt.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("dir", "text"))
            writer.writerows(ordered)
    return len(ordered)


def main() -> None:
    with claim_all(*(claim_file(DATASETS / style / "img_txt.csv", "the list") for style in ("emoji_noto", *STYLES))):
        choose()


def choose() -> None:
    """Write the lists, and say how long they are."""
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
        known = [(f"train/{row.path.name}", row.caption) for row in read_rows(style, "train") if row.path.name in chosen]
        print(f"{write_csv(style, known)} training images of {style} show one of them")


if __name__ == "__main__":
    main()
