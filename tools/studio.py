"""Open a page in the browser to make images, look at them and train LoRAs.

    python tools/studio.py
    python tools/studio.py --version 1.5 --lora_dir ~/loras --data_root ~/photos

The page is served to this machine alone, and no request leaves it. Images, settings and trainings are kept in
output_path. Ctrl-C ends the page and interrupts its training, which can be resumed from the page later.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError, plain, system_reason  # noqa: E402
from ldm.files.inputs import is_folder  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.files.paths import ROOT, under_root  # noqa: E402
from ldm.generation.model_choice import find_model  # noqa: E402
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.settings.declare import setting  # noqa: E402
from ldm.settings.generate import GenerateSettings  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402

MODEL = ("version", "config", "ckpt_path", "vae_ckpt_path", "device_target", "precision")


def as_generation(name: str) -> Any:
    """Return the declaration of a setting of text_to_image.py."""
    field = next(field for field in dataclasses.fields(GenerateSettings) if field.name == name)
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(Path("output/studio"), "folder for images/, training/ and uploads/", path=True)
    lora_dir: Optional[list[str]] = setting(None, "folders of LoRAs, beside those that are trained here", path=True)
    data_root: Optional[list[str]] = setting(
        None, "folders of data sets, which trainings may read; None: the data sets of this project", path=True
    )

    version: Optional[str] = as_generation("version")
    config: Optional[str] = as_generation("config")
    ckpt_path: Optional[str] = as_generation("ckpt_path")
    vae_ckpt_path: Optional[str] = as_generation("vae_ckpt_path")
    device_target: Optional[str] = as_generation("device_target")
    precision: str = as_generation("precision")

    host: str = setting("127.0.0.1", "address that the page is served on", group="page")
    port: int = setting(7861, "its port; 0: any free one", low=0, high=65535)
    allow_hosts: Optional[list[str]] = setting(
        None, "names that the page may be opened by beside localhost, each with a port if it is another one"
    )
    open_browser: bool = setting(True, "open the page in the browser")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    settings = read_settings(Settings, argv, prog="tools/studio.py", description=__doc__)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f'the page needs {error.name}: pip install "starlette>=0.37,<2" "uvicorn>=0.29,<1"') from None
    from tools.studio_page.guard import host_names
    from tools.studio_page.server import make_app

    set_up_logging("INFO", prefix=False)
    with claim_folder(settings.output_path, "--output_path"), listen(settings.host, settings.port) as listening:
        port = listening.getsockname()[1]
        studio = open_studio(settings)
        app = make_app(studio, host_names(settings.host, port, settings.allow_hosts or ()))

        class Server(uvicorn.Server):
            def capture_signals(self) -> Any:  # ldm.runtime.script handles them
                return nullcontext()

            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                announce(settings, port)

        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", ws="none", http="h11", loop="asyncio",
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        try:
            Server(config).run(sockets=[listening])
        finally:
            describe_progress(lambda: f"by the user; images and trainings are in {settings.output_path}")
            studio.trainings.close()


def open_studio(settings: Settings) -> Any:
    """Find the model and the folders, and return what answers the page. Raises UserError."""
    from tools.studio_page.files import Folders
    from tools.studio_page.generation import Generator
    from tools.studio_page.server import Studio
    from tools.studio_page.training import Trainings

    version, checkpoint, config = find_model(settings.ckpt_path, settings.version, settings.config)
    roots: dict[str, Path] = {}
    for word, flag, given in (("loras", "lora_dir", settings.lora_dir), ("data", "data_root", settings.data_root)):
        if given is None and word == "data" and (ROOT / "datasets").is_dir():
            given = [str(ROOT / "datasets")]
        for number, path in enumerate(given or (), 1):
            if not is_folder(path, f"--{flag}"):
                raise UserError(f"--{flag} {plain(path)} is no folder: check the path")
            roots[word if number == 1 else f"{word}{number}"] = Path(path)
    output = settings.output_path
    folders = Folders(
        {**roots, "images": output / "images", "runs": output / "training", "uploads": output / "uploads"}
    )
    model = {name: getattr(settings, name) for name in MODEL}
    trainings = Trainings(
        folders.roots["runs"], under_root("configs/train"), checkpoint.resolve(), _below_root(config.path),
        settings.device_target, settings.precision,
    )  # fmt: skip
    title = f"{version or config.architecture} ({checkpoint.name})"
    return Studio(folders, Generator(folders.roots["images"]), trainings, model, title, config.image_size)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError if the address cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"--host {plain(host)} --port {port} cannot be listened on: {system_reason(error)}; or give --port 0"
        ) from None


def announce(settings: Settings, port: int) -> None:
    """Print the page's address and open it."""
    local = _is_loopback(settings.host)
    name = settings.host if local else "localhost"
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if not local:
        print("it is served to other machines too: whoever reaches it may use it, there is no password", flush=True)
    # Without a display it would be a browser in this terminal.
    if settings.open_browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _below_root(path: str) -> str:
    """Return a path as recipes name it, below the project's folder."""
    resolved = Path(path).resolve()
    return resolved.relative_to(ROOT).as_posix() if resolved.is_relative_to(ROOT) else path


if __name__ == "__main__":
    run_script(main)
