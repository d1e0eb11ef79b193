"""The stages of a comparison, each done once for the same inputs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.metrics.report import write_json


class Stages:
    """Runs stages, each in its own folder, and skips those that are done with the same inputs.

    A stage's done.json holds its inputs and its result, and is written last. If the inputs differ, or the stage was
    interrupted, its folder is removed and the stage starts again, unless it can continue. `count` is the number of
    stages, for the messages.
    """

    def __init__(self, output: Path, count: int):
        self.output, self.count, self.number = output, count, 0

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        work: Callable[[Path], dict[str, Any] | None],
        can_continue: bool = False,
    ) -> dict[str, Any]:
        """Return the result of `work(folder)`, or that of an earlier run with the same inputs.

        Args:
            name: The folder of the stage.
            inputs: Everything that the result depends on, for JSON.
            work: Does the work in the folder and returns its result for JSON, if it has one.
            can_continue: Whether `work` can continue in the folder of an interrupted run.
        """
        self.number += 1
        label = f"[{self.number}/{self.count}] {name}"
        folder, inputs = self.output / name, json.loads(json.dumps(inputs))
        done, begun = folder / "done.json", folder / "begun.json"
        earlier = read_json_or_none(done)
        if earlier is not None and earlier["settings"] == inputs:
            print(f"{label}: done already", flush=True)
            return earlier["result"]
        if folder.exists() and not (can_continue and not done.exists() and read_json_or_none(begun) == inputs):
            shutil.rmtree(folder)
        print(f"{label} ...", flush=True)
        begin = time.time()
        write_json(begun, inputs)
        result = work(folder) or {}
        write_json(done, {"settings": inputs, "result": result})
        print(f"{label}: {time.time() - begin:.0f} s", flush=True)
        return result


def read_json_or_none(path: Path) -> Any:
    """Return the content of a JSON file that this script wrote, None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
