"""The addresses of the page, and what each answers."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ldm.errors import LONGEST_MESSAGE, UserError, plain, system_error
from ldm.files.paths import MAX_STRENGTH
from ldm.prompts.lora_tags import LoRAFolder, take_out_lora_tags
from ldm.settings.generate import GenerateSettings
from ldm.settings.train import TrainSettings
from ldm.settings.values import settings_of
from ldm.training.own_files import parse_name
from tools.studio_page.fields import describe, generate_fields, read_values, train_fields
from tools.studio_page.files import Folders, NotAllowed, check_links_below
from tools.studio_page.gallery import image_fields, newest_images
from tools.studio_page.generation import Generator, Job
from tools.studio_page.guard import MAX_UPLOAD, Guard, Refused, read_body, read_json
from tools.studio_page.training import Trainings
from tools.studio_page.uploads import save_upload

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PARTS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "request.js": "text/javascript",
    "generation.js": "text/javascript",
    "training.js": "text/javascript",
    "source.js": "text/javascript",
    "chart.js": "text/javascript",
}
UPLOAD = "application/octet-stream"  # its kind is found by decoding it
# What may be read through an address. Their kind is never guessed from their content.
MEDIA = {".png": "image/png", ".safetensors": "application/octet-stream", ".ckpt": "application/octet-stream"}
# The report of a training has its style and script inside. In a sandbox it has no access to the page.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
)
LORA_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
MAX_LORAS = 8  # of an image
SOURCE = {"init_image": "image", "mask_image": "mask"}  # the settings of an image to begin from, and their words here

Handler = Callable[[Request], Awaitable[Response]]


class Studio:
    """Answers the page's requests.

    Args:
        folders: What may be read: the roots "loras", "data", "images", "runs" and "uploads". More folders of LoRAs or
            data are "loras2" etc.
        generator: Makes images.
        trainings: Run trainings.
        model: Settings of text_to_image.py that choose the model and the device, the same for all images.
        title: The model's name for the page.
        image_size: The model's own, in pixels.
    """

    def __init__(
        self, folders: Folders, generator: Generator, trainings: Trainings, model: dict[str, Any], title: str,
        image_size: int,
    ) -> None:  # fmt: skip
        self.folders, self.generator, self.trainings = folders, generator, trainings
        self.model, self.title, self.image_size = model, title, image_size
        self.fields = generate_fields()
        self.has_source = SOURCE.keys() <= settings_of(GenerateSettings).keys()

    def options(self) -> dict[str, Any]:
        """Return all that the page offers: settings, LoRAs, data sets and recipes."""
        return {
            "model": self.title,
            "image_size": self.image_size,
            "fields": describe(GenerateSettings, self.fields),
            "loras": self.loras(),
            "source": self.has_source,
            "train_fields": describe(TrainSettings, train_fields()),
            "recipes": [{"name": r.name, "values": r.values} for r in self.trainings.recipes.values()],
            "data": self.data_sets(),
        }

    def loras(self) -> list[str]:
        """Return the names of the LoRAs: those of the user's folders, and those that were trained here."""
        names = []
        for word in self.folders.roots:
            if word.startswith("loras"):
                for folder, _, files in self.folders.walk(word):
                    names += [f"{folder}/{file}" for file in files if file.endswith(LORA_SUFFIXES)]
        for folder, _, files in self.folders.walk("runs", depth=3):
            if folder.count("/") == 2 and folder.endswith("/ckpt"):
                names += [f"{folder}/{file}" for file in files if _is_trained_lora(file)]
        return names

    def data_sets(self) -> list[str]:
        """Return the names of folders that a training may read, those at the top first."""
        names = []
        for word in self.folders.roots:
            if word.startswith("data"):
                names += [f"{folder}/{name}" for folder, below, _ in self.folders.walk(word, 3) for name in below]
        return sorted(names, key=lambda name: (name.count("/"), name))

    def generate(self, content: dict[str, Any]) -> dict[str, Any]:
        """Queue images: {"settings": {...}, "loras": [{"name": ..., "strength": ...}], "image": ..., "mask": ...}."""
        _check_words(content, "settings", "loras", *(SOURCE.values() if self.has_source else ()))
        values = read_values(GenerateSettings, content.get("settings", {}), self.fields)
        loras = content.get("loras", [])
        if not isinstance(loras, list) or len(loras) > MAX_LORAS:
            raise UserError(f"the request: loras is no list of at most {MAX_LORAS}")
        chosen = [self._lora(entry) for entry in loras]
        files = {"lora_ckpt_path": chosen} if chosen else {}
        for setting, word in SOURCE.items():
            if word in content:
                files[setting] = [str(self.folders.resolve(content[word], "images", "uploads"))]
        return self._shown(self.generator.add({**values, **files, **self._lora_folder(values), **self.model}))

    def upload(self, raw: bytes) -> dict[str, Any]:
        """Keep an image that the browser sends, and return its name."""
        return {"name": self.folders.name_of(save_upload(raw, self.folders.roots["uploads"]))}

    def jobs(self) -> list[dict[str, Any]]:
        """Return the requests for images, the newest first."""
        return [self._shown(job) for job in reversed(list(self.generator.jobs.values()))]

    def gallery(self, before: str) -> dict[str, Any]:
        """Return the names of images, the newest first, after the one that is named."""
        return newest_images(self.folders, before)

    def image(self, name: str) -> dict[str, Any]:
        """Return the text fields of an image."""
        return image_fields(self.folders.resolve(name, "images"))

    def file(self, name: str) -> Response:
        """Return an image, a LoRA or the report of a training."""
        path = self.folders.resolve(name, "images", "runs", "uploads")
        if not path.is_file():
            raise NotAllowed(f'"{plain(name, 120)}" is no file')
        if path.name == "report.html" and name.startswith("runs/") and name.count("/") == 2:
            return FileResponse(path, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})
        if path.suffix not in MEDIA:
            raise NotAllowed(f'"{plain(name, 120)}" is no image and no LoRA')
        saved = None if path.suffix == ".png" else path.name
        return FileResponse(path, media_type=MEDIA[path.suffix], filename=saved)

    def runs(self) -> list[dict[str, Any]]:
        """Return the trainings, the newest first."""
        return self.trainings.summaries()

    def run(self, name: str) -> dict[str, Any]:
        """Return a training with its curves and strips, its files by the page's names."""
        details = self.trainings.details(name)
        for strip in details["strips"]:
            for frame in strip["frames"]:
                frame["file"] = f"runs/{frame['file']}"
        details["files"] = [f"runs/{file}" for file in details["files"]]
        details["report"] = details["report"] and f"runs/{details['report']}"
        return details

    def start(self, content: dict[str, Any]) -> dict[str, Any]:
        """Start a training: {"name": ..., "data": ..., "recipe": ..., "settings": {...}}."""
        _check_words(content, "name", "data", "recipe", "settings")
        words = [word for word in self.folders.roots if word.startswith("data")]
        data = self.folders.resolve(content.get("data"), *words)
        check_links_below(data, next(root for word in words if data.is_relative_to(root := self.folders.roots[word])))
        name = content.get("name")
        self.trainings.start(name, content.get("recipe"), data, content.get("settings", {}))
        return self.trainings.summary(str(name))

    def change(self, name: str, action: str) -> dict[str, Any]:
        """Stop or resume a training."""
        (self.trainings.stop if action == "stop" else self.trainings.resume)(name)
        return self.trainings.summary(name)

    def _lora_folder(self, values: dict[str, Any]) -> dict[str, str]:
        """Return lora_dir for a prompt that names LoRAs: the first of the folders that has all of them."""
        if values.get("prompt_syntax") != "a1111" or not (tags := take_out_lora_tags(values.get("prompt") or "")[1]):
            return {}
        roots = [str(root) for word, root in self.folders.roots.items() if word.startswith("loras")]
        for root in roots:
            with suppress(UserError):
                folder = LoRAFolder(root)
                for tag in tags:
                    folder.find(tag.name)
                return {"lora_dir": root}
        return {"lora_dir": roots[0]} if roots else {}  # what is missing is said by the plan

    def _lora(self, entry: object) -> str:
        """Return a LoRA of a request as text_to_image.py's flag names it."""
        if not isinstance(entry, dict) or set(entry) - {"name", "strength"}:
            raise UserError("the request: a LoRA is a name and a strength")
        words = [word for word in self.folders.roots if word.startswith("loras")]
        path, strength = self.folders.resolve(entry.get("name"), *words, "runs"), entry.get("strength", 1.0)
        is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not is_number or not abs(strength) <= MAX_STRENGTH:
            raise UserError(f"the request: the strength of a LoRA is a number from -{MAX_STRENGTH} to {MAX_STRENGTH}")
        return f"{path}:{strength}"

    def _shown(self, job: Job) -> dict[str, Any]:
        return {
            "number": job.number, "state": job.state, "step": job.step, "total": job.total, "error": job.error,
            "prompt": job.settings.prompt, "images": [self.folders.name_of(path.resolve()) for path in job.images],
        }  # fmt: skip


def make_app(studio: Studio, hosts: frozenset[str]) -> Guard:
    """Return the application. `hosts`: see `guard.host_names`."""

    def get(answer: Callable[[Request], Any]) -> Handler:
        async def handle(request: Request) -> Response:
            return await _answered(run_in_threadpool(answer, request))

        return handle

    def post(answer: Callable[[Request, dict[str, Any]], Any]) -> Handler:
        async def handle(request: Request) -> Response:
            async def read_and_answer() -> Any:
                return await run_in_threadpool(answer, request, await read_json(request))

            return await _answered(read_and_answer())

        return handle

    async def upload(request: Request) -> Response:
        async def read_and_save() -> Any:
            return await run_in_threadpool(studio.upload, await read_body(request, UPLOAD, MAX_UPLOAD))

        return await _answered(read_and_save())

    def cancel(request: Request, content: dict[str, Any]) -> dict[str, Any]:
        studio.generator.cancel(request.path_params["number"])
        return {}

    parts = {name: (STATIC / name).read_bytes() for name in ("index.html", *PARTS)}

    def part(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in parts:
            raise Refused(404, "there is no such part of the page")
        return Response(parts[name], media_type=PARTS.get(name, "text/html"))

    routes = [
        Route("/", get(part)),
        Route("/static/{name}", get(part)),
        Route("/api/options", get(lambda request: studio.options())),
        Route("/api/loras", get(lambda request: studio.loras())),
        Route("/api/jobs", get(lambda request: studio.jobs())),
        Route("/api/jobs", post(lambda request, content: studio.generate(content)), methods=["POST"]),
        Route("/api/jobs/{number:int}/cancel", post(cancel), methods=["POST"]),
        Route("/api/uploads", upload, methods=["POST"]),
        Route("/api/gallery", get(lambda request: studio.gallery(request.query_params.get("before", "")))),
        Route("/api/image", get(lambda request: studio.image(request.query_params.get("name", "")))),
        Route("/api/runs", get(lambda request: studio.runs())),
        Route("/api/runs", post(lambda request, content: studio.start(content)), methods=["POST"]),
        Route("/api/runs/{name}", get(lambda request: studio.run(request.path_params["name"]))),
        *(
            Route(
                f"/api/runs/{{name}}/{action}",
                post(lambda request, content, action=action: studio.change(request.path_params["name"], action)),
                methods=["POST"],
            )
            for action in ("stop", "resume")
        ),
        Route("/files/{name:path}", get(lambda request: studio.file(request.path_params["name"]))),
    ]
    handlers = {404: _no_such_address, 405: _no_such_address}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)


async def _answered(work: Awaitable[Any]) -> Response:
    """Return an answer, or what went wrong as {"error": ...} with the status of HTTP. The server goes on."""
    try:
        answer = await work
        return answer if isinstance(answer, Response) else JSONResponse(answer)
    except Refused as error:
        return _error(error.status, str(error))
    except NotAllowed as error:
        return _error(404, str(error))
    except UserError as error:
        return _error(400, str(error))
    except OSError as error:
        return _error(500, str(system_error(error)))
    except Exception as error:
        logger.error("%s", traceback.format_exc())
        return _error(500, f"a fault of the program ({type(error).__name__}): the terminal shows where")


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": plain(reason, LONGEST_MESSAGE)}, status)


async def _no_such_address(request: Request, error: Exception) -> Response:
    return _error(getattr(error, "status_code", 404), "this address does not answer such a request")


def _check_words(content: dict[str, Any], *words: str) -> None:
    """Raise UserError for a word of a request that nothing reads."""
    unknown = set(content) - set(words)
    if unknown:
        raise UserError(f'the request: "{plain(min(unknown), 100)}" is unknown')


def _is_trained_lora(file: str) -> bool:
    numbered = parse_name(file)
    return numbered.kind in ("lora", "share", "best") if numbered else file in ("lora.ckpt", "best.ckpt")
