"""The trainings of the page: each is a run of train_text_to_image.py in a process of its own.

    {folder}/{name}/train.yaml   the settings, written before the run: the recipe's and those of the page
    {folder}/{name}/console.txt  what the run prints
    {folder}/{name}/...          what every training writes (docs/watching.md)

All that is known of a run is read from these files, so runs of an earlier start of the page are there again.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError, plain, system_error
from ldm.files.documents import read_yaml
from ldm.files.inputs import is_file
from ldm.files.paths import ROOT, writing
from ldm.runtime import subprocesses
from ldm.settings.read import read_mapping, save_settings
from ldm.settings.train import TrainSettings
from ldm.training.checks import check_settings
from ldm.training.own_files import LINKS, find_states
from ldm.training.report.records import RunRecord, read_facts, read_metrics, read_strips, smoothed, smoothing_span
from ldm.training.sample_prompts import FILES
from tools.studio_page.fields import TRAIN_NAMES, read_values

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
MAX_RUNS = 1000  # that are listed
MAX_POINTS = 400  # of a curve
MAX_FRAMES = 12  # of a strip, as in the report
CONSOLE_BYTES = 8000  # of its end, which is shown
RESUMED = "--- resumed ---"  # a line of the console between two runs of a training


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A file of settings for a training."""

    name: str
    path: Path
    values: dict[str, Any]  # those of TRAIN_NAMES that it has


class Trainings:
    """Starts, stops and resumes trainings, one at a time, and tells how they are.

    Args:
        folder: Of the runs, a folder for each.
        recipes: The folder of the recipes.
        base_model: The checkpoint that they start from, unless None is known.
        model_config: The YAML of its model. Recipes for other models are not listed.
        device: The value of device_target.
        precision: Wins over the recipe's, unless it is "auto".
    """

    def __init__(
        self,
        folder: Path,
        recipes: Path,
        base_model: Path | None,
        model_config: str,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        self.folder, self.base_model, self.device, self.precision = folder, base_model, device, precision
        self.recipes = {recipe.name: recipe for recipe in _read_recipes(recipes, model_config)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopped: set[str] = set()  # those whose process was ended here
        self._lock = threading.Lock()

    def start(self, name: object, recipe: object, data: Path, values: object) -> None:
        """Start a training.

        Args:
            name: Of its folder, which must not exist.
            recipe: One of `recipes`.
            data: The data set.
            values: Settings of TRAIN_NAMES, which win over the recipe's.

        Raises:
            UserError: A value is wrong, or another training is running.
        """
        with self._lock:
            self._check_none_runs()
            folder = self._new_folder(name)
            if not isinstance(recipe, str) or recipe not in self.recipes:
                raise UserError(f'"{plain(recipe, 80)}" is no recipe of this page: choose one from the list')
            settings = self._settings(self.recipes[recipe], folder, data, values)
            check_settings(settings)
            with writing(folder):
                folder.mkdir(parents=True)
                save_settings(settings, folder / "train.yaml", leave_out=("train_config", "resume"))
            self._run(folder)

    def resume(self, name: str) -> None:
        """Continue a training from its last training state. Raises UserError if it cannot be continued."""
        with self._lock:
            self._check_none_runs()
            folder = self._existing(name)
            if not find_states(folder / "ckpt"):
                raise UserError(f"{name} has no training state to continue from: it ended before it saved one")
            self._run(folder, "--resume", "True")

    def stop(self, name: str) -> None:
        """Interrupt a training, as Ctrl-C does. Raises UserError if it is not running."""
        process = self._processes.get(self._existing(name).name)
        if process is None or process.poll() is not None:
            raise UserError(f"{name} is not running")
        self._stopped.add(name)
        subprocesses.terminate(process)

    def close(self) -> None:
        """Interrupt what is running."""
        for name, process in self._processes.items():
            if process.poll() is None:
                self._stopped.add(name)
                subprocesses.terminate(process)

    def names(self) -> list[str]:
        """Return the names of all runs, the newest first."""
        try:
            with os.scandir(self.folder) as entries:
                found = [
                    (entry.stat().st_mtime, entry.name)
                    for entry in entries
                    if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
                ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise system_error(error) from None
        return [name for _, name in sorted(found, reverse=True)[:MAX_RUNS] if _may_be_run(self.folder / name)]

    def summaries(self) -> list[dict[str, Any]]:
        """Return the summaries of all runs, the newest first. A run that cannot be read hides no other one."""
        found = []
        for name in self.names():
            try:
                found.append(self.summary(name))
            except UserError as fault:
                found.append(_summary(name, "stopped", str(fault)))
        return found

    def summary(self, name: str) -> dict[str, Any]:
        """Return how far a run is, as JSON. If a file of it cannot be read, "error" says why."""
        folder = self._existing(name)
        state = self._state(name, read_facts(folder))
        faults: list[str] = []
        settings = _read(lambda: read_yaml(folder / "train.yaml"), None, faults)
        states = _read(lambda: find_states(folder / "ckpt"), [], faults)
        can_resume = state not in ("running", "finished") and bool(states) and settings is not None
        steps = _read(lambda: _metrics(folder), {}, faults).get("step", np.zeros(0))
        total = settings.get("max_steps") if isinstance(settings, dict) else None
        return _summary(
            name,
            state,
            faults[0] if faults else self._last_error(folder) if state == "failed" else "",
            step=int(steps[-1]) if len(steps) else 0,
            total=total if isinstance(total, int) else None,
            can_resume=can_resume,
        )

    def details(self, name: str) -> dict[str, Any]:
        """Return the summary of a run with its curves, strips and files. Files are relative to the folder of runs."""
        folder = self._existing(name)
        summary = self.summary(name)
        faults = [summary["error"]] if summary["error"] else []
        metrics = _read(lambda: _metrics(folder), {}, faults)
        strips = [
            {
                "prompt": strip.prompt,
                "frames": [
                    {"step": frame.step, "file": frame.path.relative_to(self.folder).as_posix()}
                    for frame in _evenly(strip.frames, MAX_FRAMES)
                ],
            }
            for strip in _read(lambda: read_strips(folder / "samples"), [], faults)
        ]
        links = [folder / "ckpt" / link for link in LINKS]
        results = _read(lambda: [path for path in links if is_file(path)], [], faults)
        return {
            **summary,
            "error": faults[0] if faults else "",
            "curve": _curve(metrics),
            "strips": strips,
            "console": _console(folder),
            "report": f"{name}/report.html" if is_file(folder / "report.html") else None,
            "files": [path.relative_to(self.folder).as_posix() for path in results],
        }

    def _settings(self, recipe: Recipe, folder: Path, data: Path, values: object) -> TrainSettings:
        chosen = read_values(TrainSettings, values, TRAIN_NAMES)
        prompts = chosen.get("sample_prompts")
        if prompts is not None and not isinstance(prompts, list):
            raise UserError("the request: sample_prompts must be a list: a text would be the path of a file")
        # A training would read the file that such an entry names, or that it names by the time it starts.
        if named := next((line for line in prompts or () if Path(line).suffix.lower() in FILES), None):
            raise UserError(
                f'the request: the sample prompt "{plain(named, 80)}" would be the path of a file: leave out its ending'
            )
        if "ckpt_save_interval" in chosen:
            chosen["step_mode"] = True
        content = read_yaml(recipe.path)
        in_recipe = read_mapping(TrainSettings, content, recipe.name, partial=True)
        files = {"data_path": str(data), "output_path": str(folder), "device_target": self.device}
        if self.precision != "auto":
            files["precision"] = self.precision
        if self.base_model is not None:
            files["pretrained_model_path"] = str(self.base_model)
        return TrainSettings(**{**in_recipe, **chosen, **files})

    def _new_folder(self, name: object) -> Path:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f'"{plain(name, 80)}" cannot be the name of a run: use letters, digits, dots, - and _, 60 at most'
            )
        folder = self.folder / name
        if os.path.lexists(folder):
            raise UserError(f"there is a run {name} already: choose another name")
        return folder

    def _existing(self, name: str) -> Path:
        folder = self.folder / name
        if not NAME.fullmatch(name) or folder.is_symlink() or not is_file(folder / "train.yaml"):
            raise UserError(f'there is no run "{plain(name, 80)}": reload the page')
        return folder

    def _check_none_runs(self) -> None:
        for name, process in self._processes.items():
            if process.poll() is None:
                raise UserError(f"{name} is being trained: stop it first, or wait for its end")

    def _run(self, folder: Path, *flags: str) -> None:
        command = [sys.executable, str(ROOT / "train_text_to_image.py"), "--train_config", str(folder / "train.yaml")]
        self._stopped.discard(folder.name)
        with writing(folder), open(folder / "console.txt", "ab") as console:
            if console.tell():
                console.write(f"\n{RESUMED}\n".encode())
                console.flush()
            self._processes[folder.name] = subprocess.Popen(
                [*command, *flags], cwd=folder, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                preexec_fn=subprocesses.unblock_signals, start_new_session=True,
            )  # fmt: skip

    def _state(self, name: str, facts: RunRecord) -> str:
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            return "running"
        if process is not None and process.returncode not in (0, 130, 143, 129) and name not in self._stopped:
            return "failed"
        ended = facts.sessions[-1].get("ended") if facts.sessions else "interrupted"
        return ended if ended in ("finished", "failed") else "stopped"

    def _last_error(self, folder: Path) -> str:
        """Return what a run that failed said last, or the signal that ended it."""
        process = self._processes.get(folder.name)
        if process is not None and process.returncode == -signal.SIGKILL:
            return "the system killed it, perhaps because memory ran out: close other programs, or use smaller batches"
        if process is not None and process.returncode < 0:
            return f"it was ended by signal {-process.returncode}"
        lines = _console(folder).rpartition(RESUMED)[2].splitlines()
        errors = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else (lines[-1] if lines else "it ended without a message")


def _read_recipes(folder: Path, model_config: str) -> list[Recipe]:
    recipes = []
    for path in sorted(folder.glob("*.yaml")):
        content = read_yaml(path)
        if isinstance(content, dict) and content.get("model_config", model_config) == model_config:
            values = read_mapping(TrainSettings, content, path.name, partial=True)
            name = path.stem.replace("train_config_", "")
            recipes.append(Recipe(name, path, {key: values[key] for key in TRAIN_NAMES if key in values}))
    return recipes


def _may_be_run(folder: Path) -> bool:
    try:
        return is_file(folder / "train.yaml")
    except UserError:  # it may not be looked at, which its summary says
        return True


def _summary(
    name: str, state: str, error: str, step: int = 0, total: int | None = None, can_resume: bool = False
) -> dict[str, Any]:
    return {"name": name, "state": state, "step": step, "error": error, "total": total, "can_resume": can_resume}


def _read(read: Callable[[], Any], empty: Any, faults: list[str]) -> Any:
    """Return what `read` returns, or `empty` if a file cannot be read, which is added to the faults."""
    try:
        return read()
    except UserError as fault:
        faults.append(str(fault))
        return empty


def _metrics(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "metrics.csv"
    return read_metrics(path) if is_file(path) else {}


def _curve(metrics: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Return steps, losses and their running mean, at most MAX_POINTS of each. A loss that is not finite is None."""
    if "loss" not in metrics:
        return {"step": [], "loss": [], "mean": []}
    steps, losses = metrics["step"], metrics["loss"]
    means = smoothed(losses, smoothing_span(len(steps)))
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    return {
        "step": [int(step) for step in steps[places]],
        "loss": [_finite(value) for value in losses[places]],
        "mean": [_finite(value) for value in means[places]],
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _evenly(entries: list[Any], most: int) -> list[Any]:
    places = np.unique(np.linspace(0, len(entries) - 1, min(len(entries), most)).round().astype(int))
    return [entries[place] for place in places] if entries else []


def _console(folder: Path) -> str:
    """Return the last lines that a run has printed. Of a progress bar, the last state."""
    try:
        with open(folder / "console.txt", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - CONSOLE_BYTES))
            text = file.read(CONSOLE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(plain(line, 400) for line in lines if line.strip())
