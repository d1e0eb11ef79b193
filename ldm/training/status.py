"""How far a run has come, for the last line of an interrupted run and for its errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.training.own_files import find_states


@dataclass
class Status:
    """How far a run has come."""

    folder: Path  # of the checkpoints and training states
    resumes: bool  # whether it was started with --resume
    total_steps: int = 0
    steps_done: int = 0
    last_state: Path | None = None  # newest training state that the run can be resumed from
    phase: str = "before the first step"  # "" after the first step

    def describe(self) -> str:
        """Say what is done and how to continue, as in "after step 3 of 10; nothing was saved yet"."""
        return f"{self.phase or f'after step {self.steps_done} of {self.total_steps}'}; {self.how_to_continue()}"

    def how_to_continue(self) -> str:
        """Say how the run can be continued."""
        last_state = self.last_state
        if last_state is None and self.resumes:
            return "what was saved before is kept"
        if last_state is None:  # of a data-parallel run, the first process alone knows what it has saved
            last_state = self._newest_state()
        if last_state is None:
            return "nothing was saved yet"
        return f"--resume {True if last_state.parent == self.folder else last_state} continues from {last_state}"

    def _newest_state(self) -> Path | None:
        try:
            return next(iter(find_states(self.folder)), None)
        except UserError:  # the folder cannot be read
            return None
