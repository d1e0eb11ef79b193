"""Which files in `{output_path}/ckpt` a run wrote itself: only those are written over, pruned and moved.

`files.json` names them, the oldest first. A name is in it before its file is written, so that a process killed at any
moment leaves no file that is not named. Runs older than the record have none: where training states lie there, the
files whose names have exactly the form of a run's own are taken for its own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.errors import UserError, plain, system_reason
from ldm.files.atomic import atomic_path
from ldm.files.documents import read_json
from ldm.files.inputs import is_folder, list_folder
from ldm.files.paths import writing

logger = logging.getLogger(__name__)

RECORD = "files.json"
LINKS = ("lora.ckpt", "model.ckpt")  # the newest, under a name that stays
SUFFIXES = {"lora": ".ckpt", "model": ".ckpt", "state": ".safetensors"}
_NUMBERED = re.compile(r"(lora|model|state)-([0-9]{8,12})(\.ckpt|\.safetensors)")


class Numbered(NamedTuple):
    """What a name such as lora-00000010.ckpt says."""

    kind: str
    step: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.step:08d}{SUFFIXES[self.kind]}"


def numbered(name: str) -> Numbered | None:
    """The kind and step in a name that has exactly the form of a run's own, else None."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    found = Numbered(match[1], int(match[2]))
    return found if found.name == name else None


def find_states(folder: Path) -> list[Path]:
    """The state files in a folder, the newest first. Raises UserError where the folder may not be read."""
    if not is_folder(folder):
        return []
    states = [
        (found.step, folder / name)
        for name in list_folder(folder)
        if (found := numbered(name)) and found.kind == "state" and os.path.isfile(folder / name)
    ]
    return [path for _, path in sorted(states, reverse=True)]


class OwnFiles:
    """The files of a run in `folder`.

    goes_on: the run resumes one in this folder; otherwise nothing that is there is its own.
    """

    def __init__(self, folder: Path, goes_on: bool):
        self.folder = folder
        self._keeps_old = False
        self._record_is_foreign = False
        recorded = self._recorded()
        self.names = recorded if goes_on else []

    def _recorded(self) -> list[str]:
        record = self.folder / RECORD
        if not os.path.lexists(record):
            return self._older()
        try:
            content = read_json(record)
        except UserError as error:
            content, fault = None, f"{error}"
        else:
            fault = f"{record} is no record of a run's files"
        names = content.get("files") if isinstance(content, dict) else None
        if not isinstance(names, list):
            self._record_is_foreign = True
            logger.warning("%s: the files beside it are not taken for this run's", fault)
            return []
        return [name for name in dict.fromkeys(filter(_is_name, names)) if self._is_whole(name)]

    def _older(self) -> list[str]:
        """The files of a run that kept no record."""
        if not find_states(self.folder):
            return []
        found = sorted(filter(None, map(numbered, list_folder(self.folder))), key=lambda each: each.step)
        return [name for name in (*(each.name for each in found), *LINKS) if self._is_whole(name)]

    def _is_whole(self, name: str) -> bool:
        """Whether it is a file there; what somebody has put a link or a folder in the place of is not the run's."""
        try:
            return stat.S_ISREG(os.lstat(self.folder / name).st_mode)
        except OSError:
            return False

    def begin(self, names: Sequence[str]) -> None:
        """Record files that are written next, and move away what is in their place and not this run's.

        Raises UserError where the folder refuses that.
        """
        with writing(self.folder / RECORD):
            for name in names:
                if name not in self.names:
                    _make_room(self.folder / name)
            if self._record_is_foreign:
                _make_room(self.folder / RECORD)
                self._record_is_foreign = False
            self.names = [name for name in self.names if name not in names and self._is_whole(name)] + list(names)
            with atomic_path(self.folder / RECORD) as temporary:
                temporary.write_text(json.dumps({"files": self.names}, indent=1) + "\n", encoding="utf-8")

    def prune(self, kind: str, keep: int) -> None:
        """Remove all but the `keep` files of a kind that were written last; one warning where that is refused."""
        for name in [name for name in self.names if (found := numbered(name)) and found.kind == kind][:-keep]:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                if not self._keeps_old:
                    logger.warning("%s cannot be removed (%s): old files stay from here on", self.folder / name,
                                   system_reason(error))  # fmt: skip
                self._keeps_old = True

    def set_aside_later(self, step: int) -> None:
        """Move what another run left beyond `step` into `abandoned-after-<step>`, for a run that goes on from there.

        Otherwise the next resume would take up that other run. It got further where a state is there: weights without
        one are what this run was saving when it was killed, and it writes them again.

        Raises UserError where the folder refuses that.
        """
        states = [path.name for path in find_states(self.folder) if numbered(path.name).step > step]
        if not states:
            return
        later = [*states, *(name for name in self.names
                            if (found := numbered(name)) and found.step > step and name not in states)]  # fmt: skip
        aside = _free_name(self.folder / f"abandoned-after-{step:08d}")
        with writing(aside):
            aside.mkdir()
            for name in later:
                if os.path.lexists(self.folder / name):
                    os.replace(self.folder / name, aside / name)
        self.names = [name for name in self.names if name not in later]
        logger.warning(
            "%d files of a run that got beyond step %d were moved to %s; remove that folder if nothing in it is wanted",
            len(later), step, aside,
        )  # fmt: skip


def _is_name(name: object) -> bool:
    return isinstance(name, str) and (name in LINKS or numbered(name) is not None)


def _make_room(path: Path) -> None:
    if os.path.lexists(path):
        kept = _free_name(path.with_name(f"{path.stem}-kept{path.suffix}"))
        os.replace(path, kept)
        logger.warning("%s was not written by this run: it is %s now", path, plain(kept.name))


def _free_name(path: Path) -> Path:
    """`path`, or with a number where that is taken."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
