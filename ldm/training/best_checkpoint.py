"""The weights of the step with the lowest validation loss, and the record of that step.

    ckpt/best-00000300.ckpt   the weights of step 300
    ckpt/best.ckpt            their second name, as lora.ckpt is that of the newest
    ckpt/best.json            {"step": 300, "loss": 0.1234}
    ckpt/best-until-00000500.ckpt, .json   what these were when the run resumed from step 500 on other held-out images

A killed run may have found a better step after its last training state, which a run that resumes from there need not
reach, because its learning rate may be another. So the best weights at each training state are kept as well. A loss on
other images or time steps cannot be compared, so the best weights until then are renamed, and no run removes them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ldm.files.atomic import atomic_path
from ldm.files.inputs import is_file
from ldm.files.paths import writing
from ldm.training.own_files import OF_BEST, Numbered, OwnFiles, free_name, link

logger = logging.getLogger(__name__)

NAME, RECORD = OF_BEST


class BestCheckpoint:
    """The files of the best step in the folder of a run's checkpoints.

    Args:
        folder: The folder.
        own_files: The run's files in it.
        start: Number of steps that are done before this run.
        states_kept: Number of training states that are kept.
    """

    def __init__(self, folder: Path, own_files: OwnFiles, start: int, states_kept: int):
        self.folder, self._own_files, self._start = folder, own_files, start
        self._step: int | None = None
        # The newest state may turn out to be damaged, so the bests of those before it are kept until two are saved.
        before = {step for step in own_files.steps("best") if step <= start}
        self._of_states: deque[set[int]] = deque([before], maxlen=states_kept)

    def restore(self, step: int | None, loss: float, kept: bool, source: Path | None) -> None:
        """Have the files say what a training state says, before a run that resumes from it writes the first file.

        Args:
            step: The best step. None: there is none, or its loss cannot be compared with those that follow.
            loss: Its validation loss.
            kept: Whether weights are kept.
            source: Folder of the training state, from which the weights are copied if they are not here.
        """
        if step is None:
            self._set_aside()
            return
        name = Numbered("best", step).name
        if name in self._own_files.names and is_file(self.folder / name):
            self.write(step, loss, lambda path: None)
        elif kept and source is not None and source.resolve() != self.folder.resolve() and is_file(source / name):
            self.write(step, loss, lambda path: _copy(source / name, path))
        else:
            if kept:
                logger.warning(
                    "the weights of the best step so far, %d, were not kept: best.ckpt will be those of a better step",
                    step,
                )
            self.write(step, loss)

    def write(self, step: int, loss: float, write: Callable[[Path], None] | None = None) -> None:
        """Record the best step, and write its weights if they are kept.

        Args:
            step: The step.
            loss: Its validation loss.
            write: Writes the weights to a path.

        Raises:
            UserError: A file cannot be written.
        """
        path = self.folder / Numbered("best", step).name
        self._own_files.begin([path.name, NAME, RECORD] if write else [RECORD])
        if write:
            write(path)
            link(path, self.folder / NAME)
        else:
            self._own_files.remove([NAME])  # of a step before, where keep_best was given then
        with writing(self.folder / RECORD), atomic_path(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps({"step": step, "loss": loss}) + "\n", encoding="utf-8")
        self._step = step
        self._prune()

    def after_save(self) -> None:
        """Remove what no training state needs any more, after one has been saved.

        Without a best step of this run nothing is removed: a run without a validation loss keeps what it found.
        """
        if self._step is not None:
            self._of_states.append({self._step})
            self._prune()

    def _set_aside(self) -> None:
        """Rename best.ckpt and best.json. A record without weights is removed."""
        names = [name for name in OF_BEST if name in self._own_files.names and is_file(self.folder / name)]
        if NAME in names:
            kept = free_name(self.folder / f"best-until-{self._start:08d}.ckpt")
            for name in reversed(names):  # the weights last, so that a kill leaves no weights without their record
                path = self.folder / name
                with writing(path):
                    os.replace(path, kept.with_suffix(path.suffix))
            logger.warning("the best weights until step %d are kept as %s", self._start, kept)
        self._own_files.remove(OF_BEST)
        self._own_files.names = [name for name in self._own_files.names if name not in OF_BEST]

    def _prune(self) -> None:
        needed = set().union(*self._of_states)
        self._own_files.keep_steps("best", needed if self._step is None else {*needed, self._step})


def _copy(source: Path, path: Path) -> None:
    with writing(path), atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
