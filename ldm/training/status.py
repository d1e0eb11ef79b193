"""How far a run has come, for the last line of an interrupted run and for its errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Status:
    """How far a run has come.

    Attributes:
        folder: Folder of the checkpoints and training states, `{output_path}/ckpt`.
        resumes: Whether the run was started with --resume.
        total_steps: Number of steps of the run.
        steps_done: Number of steps that are done.
        last_state: Newest training state that the run can be resumed from.
        phase: What the run does before its first step is done, "" afterwards.
    """

    folder: Path
    resumes: bool
    total_steps: int = 0
    steps_done: int = 0
    last_state: Path | None = None
    phase: str = "before the first step"

    def describe(self) -> str:
        """Say what is done and how to continue, as in "after step 3 of 10; nothing was saved yet"."""
        return f"{self.phase or f'after step {self.steps_done} of {self.total_steps}'}; {self.way_on()}"

    def way_on(self) -> str:
        """Say how the run can be continued."""
        if self.last_state is None:
            return "what was saved before is kept" if self.resumes else "nothing was saved yet"
        own = self.last_state.parent == self.folder
        return f"--resume {True if own else self.last_state} continues from {self.last_state}"
