"""LoRAs that a prompt names, in A1111's notation: `<lora:name:strength>`, looked up in a folder.

| in a prompt | strength of the text encoder's part, and of the UNet's |
| --- | --- |
| `<lora:name>` | 1, 1 |
| `<lora:name:0.8>` | 0.8, 0.8 |
| `<lora:name:0.4:0.8>` | 0.4, 0.8 |
| `<lora:name:te=0.4:unet=0.8>` | 0.4, 0.8 |
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm.errors import UserError, plain
from ldm.files.inputs import is_folder, list_folder
from ldm.files.paths import MAX_STRENGTH

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
# A folder with one of these is one LoRA: PEFT's (also with a subfolder for each network) and diffusers'.
FOLDER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
PEFT_SUBFOLDERS = ("unet", "text_encoder")
MAX_TAGS = 32  # of a prompt
MAX_ENTRIES = 100_000  # of the folder

# "lyco" is the older name of the same tag.
LORA_TAG = re.compile(r"<(?:lora|lyco):([^<>]*)>")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


class LoRATag(NamedTuple):
    """A LoRA that a prompt names."""

    name: str
    strength: float  # of its UNet part
    text_encoder_strength: float


def take_out_lora_tags(prompt: str) -> tuple[str, list[LoRATag]]:
    """Return a prompt without its tags, and the tags in order. The characters around a tag stay, as in A1111.

    Raises:
        UserError: A tag has no name, a strength is not a number within MAX_STRENGTH, or there are too many tags.
    """
    tags = [_tag(match.group(1), match.group()) for match in LORA_TAG.finditer(prompt)]
    if len(tags) > MAX_TAGS:
        raise UserError(f"a prompt names {len(tags)} LoRAs, at most {MAX_TAGS} are applied: leave some out")
    return LORA_TAG.sub("", prompt) if tags else prompt, tags


def refuse_lora_tags(negative_prompt: str) -> None:
    """Raise UserError if a negative prompt names a LoRA."""
    if match := LORA_TAG.search(negative_prompt):
        raise UserError(
            f"the negative prompt names a LoRA, {plain(match.group(), 60)}: move the tag to the prompt, because a LoRA "
            "changes the model for both; a negative strength takes it away"
        )


def _tag(content: str, tag: str) -> LoRATag:
    name, *words = content.split(":")
    if not name.strip():
        raise UserError(f"{plain(tag, 60)} has no name: <lora:name:0.8>")
    names = ["te", "unet"]
    strengths: dict[str, float] = {}
    for place, word in enumerate(words):
        key, equals, number = word.rpartition("=")
        if not equals and place < len(names):
            key = names[place]
        key = key.strip()
        if key not in names or key in strengths:
            raise UserError(
                f'{plain(tag, 60)}: "{plain(word, 40)}" is not understood: write <lora:name:0.8>, or '
                "<lora:name:0.4:0.8> with one strength for the text encoder and one for the UNet"
            )
        if not _NUMBER.fullmatch(number.strip()) or abs(float(number)) > MAX_STRENGTH:
            raise UserError(
                f'{plain(tag, 60)}: the strength "{plain(number, 40)}" is not a number from -{MAX_STRENGTH} to '
                f"{MAX_STRENGTH}, such as 0.7"
            )
        strengths[key] = float(number)
    text_encoder = strengths.get("te", 1.0)
    return LoRATag(name.strip(), strengths.get("unet", text_encoder), text_encoder)


class LoRAFolder:
    """Finds the LoRAs of a folder and its subfolders by their names.

    The name of a file is its name without the suffix, with or without its subfolders (`style`, `people/style`), or the
    whole file name. A folder of PEFT's or diffusers' has its own name. Links out of the folder are not followed, and a
    folder that holds one is no LoRA.

    Args:
        folder: The folder.

    Raises:
        UserError: It does not exist, or has too many entries.
    """

    def __init__(self, folder: str | Path) -> None:
        if not is_folder(folder, "lora_dir"):
            raise UserError(f"lora_dir {plain(folder)} is not a folder: give the folder with your LoRA files")
        self.folder = Path(folder)
        self._paths: dict[str, list[Path]] = {}  # name -> the LoRAs that it may mean
        self._index()

    def _index(self) -> None:
        root = os.path.realpath(self.folder)
        count = 0
        for place, folders, files in os.walk(self.folder):
            folders.sort()
            count += len(folders) + len(files)
            if count > MAX_ENTRIES:
                raise UserError(
                    f"lora_dir {plain(self.folder)} has more than {MAX_ENTRIES:,} entries: give a folder of LoRAs alone"
                )
            for folder in list(folders):
                if _is_lora(Path(place, folder)):
                    folders.remove(folder)
                    if all(_is_inside(path, root) for path in _places(Path(place, folder))):
                        self._add(Path(place, folder))
            for file in sorted(files):
                path = Path(place, file)
                if path.suffix in SUFFIXES and _is_inside(path, root):
                    self._add(path)

    def _add(self, path: Path) -> None:
        relative = path.relative_to(self.folder).as_posix()
        names = {relative, path.name}
        if path.suffix in SUFFIXES:
            names |= {name[: -len(path.suffix)] for name in (relative, path.name)}
        for name in names:
            self._paths.setdefault(name, []).append(path)

    def find(self, name: str) -> Path:
        """Return the file or folder of a LoRA.

        Raises:
            UserError: No LoRA has this name, or several have it.
        """
        paths = self._paths.get(name, [])
        if len(paths) > 1:
            # A name from the folder itself wins over the same one in a subfolder.
            outer = [path for path in paths if path.relative_to(self.folder).as_posix() in _spellings(name)]
            paths = outer if len(outer) == 1 else paths
        where = f"<lora:{plain(name, 60)}>"
        if len(paths) > 1:
            raise UserError(
                f"{where}: lora_dir {plain(self.folder)} has several: "
                f"{plain(', '.join(path.relative_to(self.folder).as_posix() for path in paths[:5]), 200)}; name one "
                "with its suffix and subfolder"
            )
        if not paths:
            known = sorted(
                name for name, found in self._paths.items() if not name.endswith(SUFFIXES) and "/" not in name
            )
            near = difflib.get_close_matches(name, known, 3, 0.4) or known[:3]
            raise UserError(
                f"{where}: lora_dir {plain(self.folder)} has no LoRA of this name: "
                + (f"did you mean {plain(' or '.join(near), 200)}?" if near else "there is none at all")
            )
        return paths[0]


def _spellings(name: str) -> set[str]:
    return {name, *(name + suffix for suffix in SUFFIXES)}


def _is_inside(path: str | Path, root: str) -> bool:
    """Return whether a path lies below the folder `root`, a real path, when its links are followed."""
    return os.path.realpath(path).startswith(root.rstrip(os.sep) + os.sep)


def _places(folder: Path) -> Iterator[Path]:
    """Yield the folder of a LoRA, all that lies in it, and all that lies in PEFT's subfolders of it."""
    yield folder
    for place in (folder, *(folder / part for part in PEFT_SUBFOLDERS)):
        if is_folder(place, "lora_dir"):
            yield from (place / name for name in list_folder(place, "lora_dir"))


def _is_lora(folder: Path) -> bool:
    places = [folder, *(folder / part for part in PEFT_SUBFOLDERS)]
    return any(os.path.lexists(place / file) for place in places for file in FOLDER_FILES)
