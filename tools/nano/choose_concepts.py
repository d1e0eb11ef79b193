"""Choose the concepts that the embedded base draws, and write datasets/emoji_noto/img_txt.csv.

    python -m tools.nano.choose_concepts

All concepts of the test split of emoji_fluent_hc (the demo holds out their style, not the concept), and
whole groups of what a person would ask for: animals, plants, food, smiling faces, cats, instruments, boats, aeroplanes,
sports, things. Fewer concepts drawn well beat more of them drawn badly: two cores train this in hours.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ldm.atomic import atomic_path
from tools.nano.pictures import DATASETS, categories, read_rows

WHOLE_CATEGORIES = ("Animals & Nature", "Food & Drink")
SUBCATEGORIES = (
    "face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses", "cat-face", "monkey-face",
    "musical-instrument", "transport-water", "transport-air", "sport", "phone", "science", "light & video",
)


def main() -> None:
    held_out_style = {row.path.name for row in read_rows("emoji_fluent_hc", "test")}
    kind = categories()
    chosen = []
    for split in ("train", "test"):
        for row in read_rows("emoji_noto", split):
            category, subcategory = kind[row.path.name]
            if row.path.name in held_out_style or category in WHOLE_CATEGORIES or subcategory in SUBCATEGORIES:
                chosen.append((f"{split}/{row.path.name}", row.text))
    chosen.sort(key=lambda pair: Path(pair[0]).name)
    with atomic_path(DATASETS / "emoji_noto" / "img_txt.csv") as path:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("dir", "text"))
            writer.writerows(chosen)
    print(f"{len(chosen)} concepts, {len({text for _, text in chosen})} different captions, "
          f"{len(held_out_style)} of them with a held-out picture in another style")


if __name__ == "__main__":
    main()
