"""Which files in `{output_path}/ckpt` a run wrote itself. Only those are replaced, removed and moved.

`files.json` lists them, the oldest first. A name is added before its file is written, so a kill leaves no file that is
not listed. Versions before this record wrote none: if there are training states but no record, the files whose names
have exactly the form of a run's own are taken for its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_folder, list_folder
from ldm.files.paths import writing
from ldm.settings.saving import output_name_fault

logger = logging.getLogger(__name__)

RECORD = "files.json"
LINKS = ("lora.ckpt", "model.ckpt", "ti.safetensors")  # second names of the newest checkpoints
OF_BEST = ("best.ckpt", "best.json")  # second name, and record, of the best checkpoint
SUFFIXES = {"lora": ".ckpt", "model": ".ckpt", "state": ".safetensors", "best": ".ckpt", "ti": ".safetensors"}
_NUMBERED = re.compile(r"(lora|model|state|best|ti)-([0-9]{8,12})(\.ckpt|\.safetensors)")
SHARED_SUFFIX = ".safetensors"
_SHARED = re.compile(rf"(.+)-step([0-9]{{8,12}})\{SHARED_SUFFIX}")


class Numbered(NamedTuple):
    """The parts of a name such as lora-00000010.ckpt, or pokemon-step00000010.safetensors of the kind "share"."""

    kind: str
    step: int
    output_name: str = ""  # of the kind "share": the setting, "pokemon"

    @property
    def name(self) -> str:
        if self.kind == "share":
            return f"{self.output_name}-step{self.step:08d}{SHARED_SUFFIX}"
        return f"{self.kind}-{self.step:08d}{SUFFIXES[self.kind]}"


def parse_name(name: str) -> Numbered | None:
    """Return the kind and step in a name that has exactly the form of a run's own, else None."""
    if match := _NUMBERED.fullmatch(name):
        numbered = Numbered(match[1], int(match[2]))
    elif (match := _SHARED.fullmatch(name)) and not output_name_fault(match[1]):
        numbered = Numbered("share", int(match[2]), match[1])
    else:
        return None
    return numbered if numbered.name == name else None


def shared_name(output_name: str) -> str:
    """Return the name of the newest file to share."""
    return f"{output_name}{SHARED_SUFFIX}"


def find_states(folder: Path) -> list[Path]:
    """Return the training states in a folder, the newest first. Raises UserError if the folder may not be read."""
    if not is_folder(folder):
        return []
    states = [
        (numbered.step, folder / name)
        for name in list_folder(folder)
        if (numbered := parse_name(name)) and numbered.kind == "state" and os.path.isfile(folder / name)
    ]
    return [path for _, path in sorted(states, reverse=True)]


class OwnFiles:
    """The files of a run in its checkpoint folder. Methods raise UserError if the folder cannot be read or written.

    If the run does not resume one in this folder (`resumed`), no file that is there belongs to it.
    """

    def __init__(self, folder: Path, resumed: bool):
        self.folder = folder
        self._cannot_remove = False
        self._record_is_foreign = False
        recorded = self._read_record()
        self.names = recorded if resumed else []

    def _read_record(self) -> list[str]:
        record = self.folder / RECORD
        if not os.path.lexists(record):
            return self._without_record()
        names, fault = None, f"{record} is not a list of a run's files"
        try:
            content = read_json(record)
            names = content.get("files") if isinstance(content, dict) else None
        except UserError as error:
            fault = str(error)
        if not isinstance(names, list):
            self._record_is_foreign = True
            logger.warning("%s: the files beside it are not taken for this run's", fault)
            return []
        return [name for name in dict.fromkeys(filter(_is_name, names)) if self._is_regular_file(name)]

    def _without_record(self) -> list[str]:
        """Return the files of a run that kept no record."""
        if not find_states(self.folder):
            return []
        found = filter(None, map(parse_name, list_folder(self.folder)))
        numbered = sorted((file for file in found if file.kind not in ("best", "share")), key=lambda file: file.step)
        return [name for name in (*(file.name for file in numbered), *LINKS) if self._is_regular_file(name)]

    def _is_regular_file(self, name: str) -> bool:
        """Whether a regular file has this name. A link or folder in its place is not the run's."""
        try:
            return stat.S_ISREG(os.lstat(self.folder / name).st_mode)
        except OSError:
            return False

    def begin(self, names: Sequence[str]) -> None:
        """Record files that are written next. Rename what has one of these names and is not this run's."""
        with writing(self.folder / RECORD):
            for name in names:
                if name not in self.names:
                    make_room(self.folder / name)
            if self._record_is_foreign:
                make_room(self.folder / RECORD)
                self._record_is_foreign = False
            self.names = [name for name in self.names if name not in names and self._is_regular_file(name)]
            self.names += names
            with atomic_path(self.folder / RECORD) as temporary:
                temporary.write_text(json.dumps({"files": self.names}, indent=1) + "\n", encoding="utf-8")

    def prune(self, kind: str, keep: int, beside: str | None = None) -> None:
        """Remove all but the `keep` files of a kind that were written last. Warn once if that is not possible.

        Those of the kind `beside` that are of the same steps are removed before them, so that a kill leaves none alone.
        """
        old = self._of_kind(kind)[:-keep]
        if beside is not None:
            steps = {_step(name) for name in old}
            self.remove([name for name in self._of_kind(beside) if _step(name) in steps])
        self.remove(old)

    def steps(self, kind: str) -> set[int]:
        """Return the steps of the files of a kind."""
        return {_step(name) for name in self._of_kind(kind)}

    def keep_steps(self, kind: str, steps: set[int]) -> None:
        """Remove the files of a kind but those of some steps. Warn once if that is not possible."""
        self.remove([name for name in self._of_kind(kind) if _step(name) not in steps])

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name in self.names if (numbered := parse_name(name)) and numbered.kind == kind]

    def remove(self, names: Sequence[str]) -> None:
        """Remove those of some files that are this run's. Warn once if that is not possible."""
        for name in names:
            if name not in self.names:
                continue
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                if not self._cannot_remove:
                    logger.warning("%s cannot be removed (%s): old files are kept from now on", self.folder / name,
                                   system_reason(error))  # fmt: skip
                self._cannot_remove = True

    def set_aside_later(self, step: int) -> None:
        """Move what another run left beyond `step` into `abandoned-after-<step>`, for a run that resumes from there.

        Otherwise the next resume would continue that other run. That run got further than `step` only if there is a
        training state: weights without one are from a save of this run that was killed, and are written again.
        """
        states = [path.name for path in find_states(self.folder) if _step(path.name) > step]
        if not states:
            return
        later = states + [name for name in self.names if _step(name) > step and name not in states]
        aside = free_name(self.folder / f"abandoned-after-{step:08d}")
        with writing(aside):
            aside.mkdir()
            for name in later:
                if os.path.lexists(self.folder / name):
                    os.replace(self.folder / name, aside / name)
        self.names = [name for name in self.names if name not in later]
        logger.warning(
            "%d files of a run that got beyond step %d were moved to %s; remove that folder if you do not need it",
            len(later), step, aside,
        )  # fmt: skip


def link(path: Path, second: Path) -> None:
    """Give `path` the second name `second`: as a hard link, or as a copy if the file system has no hard links."""
    with writing(second), atomic_path(second) as temporary:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def _step(name: str) -> int:
    """Return the step in a file's name, -1 if there is none."""
    numbered = parse_name(name)
    return -1 if numbered is None else numbered.step


def _is_name(name: object) -> bool:
    if not isinstance(name, str):
        return False
    is_shared = name.endswith(SHARED_SUFFIX) and not output_name_fault(name[: -len(SHARED_SUFFIX)])
    return name in (*LINKS, *OF_BEST) or is_shared or parse_name(name) is not None


def make_room(path: Path) -> None:
    """Rename what is at `path`, with a warning."""
    if os.path.lexists(path):
        kept = free_name(path.with_name(f"{path.stem}-kept{path.suffix}"))
        os.replace(path, kept)
        logger.warning("%s was not written by this run: it is renamed to %s", path, plain(kept.name))


def free_name(path: Path) -> Path:
    """Return `path`, or with a number added if it exists."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not os.path.lexists(free))
