"""The queue of images of the page: one thread owns the model, and makes what was asked for, one after the other.

Images are made and written by ldm.generation.generate, as text_to_image.py does, each request into a folder of its own.
"""

from __future__ import annotations

import inspect
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import LONGEST_MESSAGE, UserError, plain, system_error
from ldm.generation.generate import generate
from ldm.generation.plan import plan_generation
from ldm.settings.generate import GenerateSettings

if TYPE_CHECKING:
    from ldm.generation.pipeline import Pipeline

logger = logging.getLogger(__name__)

MAX_WAITING = 100  # requests
MAX_IMAGES = 256  # of a request; text_to_image.py makes more
KEPT_JOBS = 50  # that are finished


class Cancelled(Exception):
    """The user does not want the images any more."""


@dataclass
class Job:
    """Images that are asked for together.

    Attributes:
        number: From 1, in the order of the requests.
        settings: What is made, and into which folder.
        state: "waiting", "loading", "sampling", "saved", "cancelled" or "failed".
        step, total: Steps of the sampler that are done, and all of them as far as it is known.
        images: The files that are written.
        error: Why it failed.
    """

    number: int
    settings: GenerateSettings
    total: int
    state: str = "waiting"
    step: int = 0
    images: list[Path] = field(default_factory=list)
    error: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        """The folder of its images."""
        return Path(self.settings.output_path)

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change."""
        return self.state in ("saved", "cancelled", "failed")


class Generator:
    """Makes images in a thread of its own. The model stays in memory from one request to the next.

    Args:
        folder: Each request gets a folder in it.
        make: Makes and writes the images of settings. What is beside them opens the model. A test may replace it.
    """

    def __init__(self, folder: Path, make: Callable[..., None] = generate) -> None:
        self.folder, self._make = folder, make
        self.jobs: dict[int, Job] = {}
        self._queue: queue.Queue[Job] = queue.Queue()
        self._lock = threading.Lock()
        self._count = 0
        self._current: Job | None = None
        self._pipeline: Pipeline | None = None
        self._key: Any = None
        threading.Thread(target=self._work, daemon=True, name="images").start()

    def add(self, values: dict[str, Any]) -> Job:
        """Queue a request. `values` are settings of text_to_image.py.

        Raises:
            UserError: They are wrong, or too much is waiting.
        """
        with self._lock:
            if sum(not job.has_ended for job in self.jobs.values()) >= MAX_WAITING:
                raise UserError(f"{MAX_WAITING} requests are waiting: cancel some, or wait for them")
            folder = self._new_folder()
            settings = GenerateSettings(**values, output_path=str(folder), skip_grid=True)
            if settings.n_iter * settings.n_samples > MAX_IMAGES:  # before each of them is planned
                raise UserError(f"at most {MAX_IMAGES} images are made at once here: lower n_samples or n_iter")
            plan = plan_generation(settings)  # wrong values are an answer, and not a job that fails
            batches = math.ceil(len(plan.prompts) / plan.sampling.batch_size)
            self._count += 1
            job = Job(self._count, settings, batches * plan.sampling.num_inference_steps)
            self.jobs[job.number] = job
            for old in [job for job in self.jobs.values() if job.has_ended][:-KEPT_JOBS]:
                del self.jobs[old.number]
        self._queue.put(job)
        return job

    def cancel(self, number: int) -> None:
        """End a request: at once if it waits, after the current step of the sampler if it is being made.

        Raises:
            UserError: There is no such request.
        """
        job = self.jobs.get(number)
        if job is None:
            raise UserError(f"there is no request {number}: reload the page")
        job.cancelled.set()
        if job.state == "waiting":
            job.state = "cancelled"

    def _new_folder(self) -> Path:
        name = time.strftime("%Y%m%d-%H%M%S")
        taken = {job.folder for job in self.jobs.values()}
        for number in range(1, 10_000):
            folder = self.folder / f"{name}-{number:02d}"
            if folder not in taken and not folder.exists():
                return folder
        raise UserError(f"{self.folder} holds too many folders of this second: wait a moment")

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job.cancelled.is_set():
                job.state = "cancelled"
                continue
            self._current = job
            job.state = "loading"
            end = "failed"
            try:
                self._make(job.settings, self._open_model)
                end = "saved"
            except Cancelled:
                end = "cancelled"
            except UserError as error:
                job.error = plain(error, LONGEST_MESSAGE)
            except OSError as error:
                job.error = plain(system_error(error), LONGEST_MESSAGE)
            except MemoryError:
                job.error = "this machine's memory is not enough: use smaller sizes or batches"
            except BaseException as error:  # a fault of the program ends the request, not the page
                logger.error("%s", traceback.format_exc())
                job.error = f"a fault of the program ({type(error).__name__}): the terminal shows where"
            job.images = sorted(job.folder.glob("samples/*.png"))
            self._current = None
            job.state = end  # last, because the page asks no more once it has ended

    def _open_model(self, checkpoint: Path, **options: Any) -> Pipeline:
        """Return what Pipeline.from_checkpoint does: the one in memory if it is the same, without learned tokens."""
        key = {**options, "checkpoint": checkpoint}
        key = {name: _state(value) if isinstance(value, Path) else value for name, value in key.items()}
        if self._pipeline is None or key != self._key:
            self._pipeline = None  # two models may not fit into memory
            self._pipeline = self._class().from_checkpoint(checkpoint, **options)
            self._key = key
        else:
            self._pipeline.unload_embedding()
        return self._pipeline

    def _class(self) -> type[Pipeline]:
        """Return a pipeline that counts the sampler's steps for the job, and ends between two of them if it is told."""
        from ldm.generation.pipeline import Pipeline

        generator = self

        class WatchedPipeline(Pipeline):
            def sample(self, *args: Any, **options: Any) -> Any:
                given = inspect.signature(super().sample).bind(*args, **options)
                callback = given.arguments.get("callback")

                def count(step: int) -> None:
                    if callback is not None:
                        callback(step)
                    generator._count_step()

                generator._check_cancelled()
                given.arguments["callback"] = count
                return super().sample(*given.args, **given.kwargs)

        return WatchedPipeline

    def _count_step(self) -> None:
        job = self._current
        assert job is not None
        job.state = "sampling"
        job.step += 1
        job.total = max(job.total, job.step)
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self._current is not None and self._current.cancelled.is_set():
            raise Cancelled


def _state(path: Path) -> Any:
    """Return what changes when the file at a path does."""
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns
