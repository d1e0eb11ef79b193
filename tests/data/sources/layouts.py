"""The same images and captions in every layout."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Callable

import numpy as np
from PIL import Image

# Name -> caption. The names are in the order of their code points.
CAPTIONS = {
    "cats/B.png": "a cat, grey, on a mat",
    "cats/a.jpg": 'a "free" cat',
    "cats/c d.png": "two\nlines",
    "cats/ä.webp": "eine Katze, 猫 😀",
}


def image_bytes(number: int, format: str = "PNG") -> bytes:
    """Return a small image that differs from those of other numbers."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


IMAGES = {name: image_bytes(number) for number, name in enumerate(CAPTIONS)}


def write_images(folder: Path, captions: dict[str, str] = CAPTIONS) -> Path:
    for name in captions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGES.get(name) or image_bytes(0))
    return folder


def shuffled(captions: dict[str, str] = CAPTIONS) -> dict[str, str]:
    """Return the captions in another order, which no layout but img_txt.csv may keep."""
    return dict(sorted(captions.items(), key=lambda item: item[1]))


def write_csv(path: Path, header: str, captions: dict[str, str]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *captions.items()])


def image_text_csv(folder: Path) -> Path:
    write_csv(write_images(folder) / "img_txt.csv", "dir,text", CAPTIONS)
    return folder


def caption_files(folder: Path, suffix: str = ".txt") -> Path:
    write_images(folder)
    for name, caption in CAPTIONS.items():
        (folder / name).with_suffix(suffix).write_text(caption + "\n", encoding="utf-8")
    return folder


def kohya_folders(folder: Path) -> Path:
    os.rename(caption_files(folder, ".caption") / "cats", folder / "1_cats")
    return folder


def jsonl(folder: Path) -> Path:
    lines = [json.dumps({"file_name": name, "text": text, "more": [1]}) for name, text in shuffled().items()]
    (write_images(folder) / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def imagefolder_csv(folder: Path) -> Path:
    write_csv(write_images(folder) / "metadata.csv", "file_name,text", shuffled())
    return folder


def parquet(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    names, texts = zip(*shuffled().items())
    parquet.write_table(
        pyarrow.table({"file_name": list(names), "text": list(texts)}), write_images(folder) / "metadata.parquet"
    )
    return folder


def kohya_json(folder: Path) -> Path:
    keys = {name: os.path.splitext(name)[0] for name in CAPTIONS}
    keys["cats/B.png"] = str(folder / "cats/B.png")
    entries = {keys[name]: {"caption": text, "train_resolution": [64, 64]} for name, text in shuffled().items()}
    (write_images(folder) / "meta_cap.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def dataset_config(folder: Path) -> Path:
    caption_files(folder)
    text = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}/cats'\n"
    (folder / "config.toml").write_text(text, encoding="utf-8")
    return folder / "config.toml"


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_shards(folder: Path, suffix: str = ".txt", format: int = tarfile.PAX_FORMAT) -> Path:
    """Two shards, the second with what comes first by name."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(CAPTIONS)
    for shard, part in (("00001.tar", names[:2]), ("00000.tar", names[2:])):
        with tarfile.open(folder / shard, "w", format=format) as tar:
            for name in part:
                text = CAPTIONS[name]
                content = json.dumps({"text": text}) if suffix == ".json" else text
                add_member(tar, os.path.splitext(name)[0] + suffix, content.encode())
                add_member(tar, name, IMAGES[name])
    return folder


def saved_dataset(folder: Path, images: str = "struct") -> Path:
    """Two Arrow files; `images` is what they hold: struct, or path."""
    import pyarrow

    write_images(folder)
    rows = list(shuffled().items())
    for number, part in enumerate((rows[:3], rows[3:])):
        values = [{"bytes": IMAGES[name], "path": name} if images == "struct" else name for name, _ in part]
        table = pyarrow.table({"more": [0] * len(part), "text": [text for _, text in part], "image": values})
        with pyarrow.OSFile(str(folder / f"data-0000{number}-of-00002.arrow"), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# Name of the layout -> (its functions that write it).
WRITERS: dict[str, tuple[Callable[[Path], Path], ...]] = {
    "image_text_csv": (image_text_csv,),
    "caption_files": (caption_files,),
    "kohya_folders": (kohya_folders,),
    "imagefolder": (jsonl, imagefolder_csv, parquet),
    "kohya_json": (kohya_json,),
    "dataset_config": (dataset_config,),
    "tar_shards": (tar_shards,),
    "saved_dataset": (saved_dataset,),
}
NEED_PYARROW = (parquet, saved_dataset)
