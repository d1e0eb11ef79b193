"""Choose the concepts that the nano model is trained on.

    python -m tools.nano.choose_concepts

Writes datasets/emoji_noto/img_txt.csv, and the img_txt.csv of the other styles with their training images of the same
concepts. Writes datasets/emoji_line_art, the demo's data set: line drawings of the same concepts, copied from
datasets/styles/notomono-bold. Its test split has the concepts whose image in emoji_fluent_hc is held out. The concepts
are those of the test split of emoji_fluent_hc, with which the demo's LoRA is measured, and whole groups of emoji:
animals, plants, food, smiling faces, cats, instruments, boats, aeroplanes, sports, things. A small model draws few
concepts better than many. A LoRA learns a style only from concepts that its base model knows (docs/nano.md).
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ldm.files.atomic import atomic_path
from ldm.files.outputs import claim_all, claim_file
from ldm.runtime.script import run_script
from tools.nano.images import DATASETS, LINE_ART, STYLES, categories, read_rows

LINE_DRAWINGS = "notomono-bold"  # the style of LINE_ART, "line drawing, bold" in the base model's training

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
    """Write datasets/<style>/img_txt.csv from rows of (file, caption), sorted by file name. Return their number."""
    ordered = sorted(rows, key=lambda row: Path(row[0]).name)
    with atomic_path(DATASETS / style / "img_txt.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("dir", "text"))
            writer.writerows(ordered)
    return len(ordered)


def write_line_art(chosen: Collection[str], held_out: Collection[str]) -> None:
    """Write datasets/emoji_line_art: the line drawings of the chosen files, in train/ and, those held out, in test/."""
    drawings = [row for row in read_rows(LINE_DRAWINGS) if row.path.name in chosen]
    for split in ("train", "test"):
        rows = [row for row in drawings if (row.path.name in held_out) == (split == "test")]
        folder = DATASETS / LINE_ART / split
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            with atomic_path(folder / row.path.name) as path:
                shutil.copyfile(row.path, path)
        for image in folder.glob("*.png"):
            if image.name not in {row.path.name for row in rows}:
                image.unlink()  # of an earlier choice
        count = write_csv(f"{LINE_ART}/{split}", [(row.path.name, row.caption) for row in rows])
        if split == "test":
            with atomic_path(folder / "prompts.txt") as path:
                path.write_text("".join(row.caption + "\n" for row in rows), encoding="utf-8")
        print(f"{count} line drawings in {LINE_ART}/{split}")


def main() -> None:
    folders = ("emoji_noto", *STYLES, f"{LINE_ART}/train", f"{LINE_ART}/test")
    with claim_all(*(claim_file(DATASETS / folder / "img_txt.csv", "img_txt.csv") for folder in folders)):
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
    write_line_art(chosen, held_out_style)


if __name__ == "__main__":
    run_script(main)
