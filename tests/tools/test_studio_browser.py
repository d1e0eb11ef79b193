"""The page of tools/studio.py in a browser: from the first click to the saved image and to a finished training."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import browser, find_browser
from tests.conftest import ROOT

pytest.importorskip("starlette", reason="the extra `studio` is not installed")
pytest.importorskip("uvicorn", reason="the extra `studio` is not installed")

# It starts the page's server and trainings beside it.
pytestmark = pytest.mark.processes

TRAINING_SECONDS = 400  # on a busy machine; 30 on an idle one

UNNAMED = """[...document.querySelectorAll('input,select,textarea,button')].filter((e) =>
    e.checkVisibility() && !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).length"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set of six images."""
    folder = tmp_path_factory.mktemp("studio")
    (folder / "data" / "emoji").mkdir(parents=True)
    source = ROOT / "datasets" / "emoji_fluent_hc" / "train"
    rows = (source / "img_txt.csv").read_text(encoding="utf-8").splitlines()
    for row in rows[1:7]:
        shutil.copy(source / row.split(",")[0], folder / "data" / "emoji")
    (folder / "data" / "emoji" / "img_txt.csv").write_text("\n".join(rows[:7]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """The address of a page that is served, and ended by Ctrl-C."""
    command = [sys.executable, "tools/studio.py", "--port", "0", "--open_browser", "False"]
    command += ["--output_path", str(folder / "out"), "--data_root", str(folder / "data"), "--device_target", "CPU"]
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    yield server.stdout.readline().split()[0]
    server.send_signal(signal.SIGINT)
    try:
        assert server.wait(20) == 130, (folder / "log.txt").read_text()
    finally:
        server.kill()
        server.stdout.close()


@pytest.fixture(scope="module")
def page(address):
    if find_browser() is None:
        pytest.skip("there is no Chromium (apt-get install chromium-headless-shell); .ci/run installs it")
    with browser() as opened:
        open_page(opened, address)
        yield opened
        assert {request.split("/", 3)[2] for request in opened.requests} == {address.split("/")[2]}
        assert opened.errors == []


def open_page(page, address, **window):
    page.open_address(address, **window)
    page.wait_for("document.body.dataset.ready === 'true'")


def wait_for_images(page, count):
    """Wait until the gallery has so many images. A request that fails ends the wait."""
    page.wait_for(
        "(() => {const bad = document.querySelector('#jobs .bad'); if (bad) throw new Error(bad.textContent);"
        f"return document.querySelectorAll('#gallery img').length === {count}}})()"
    )


def shot(page, name):
    """Write a screenshot if the variable STUDIO_SHOTS names a folder."""
    if "STUDIO_SHOTS" in os.environ:
        page.screenshot(Path(os.environ["STUDIO_SHOTS"]) / f"{name}.png", whole=False)


def test_a_click_makes_an_image_and_saves_it(page, folder):
    page.type_into("#image-prompt", "a red apple")
    page.type_into("#image-sampling_steps", "3")
    page.type_into("#image-n_samples", "2")
    page.run("document.querySelector('#image-sampler').value = '\"euler\"'")
    page.click("#request button.main")
    wait_for_images(page, 2)
    page.wait_for("document.querySelector('#shown img')?.naturalWidth === 64")
    files = sorted((folder / "out" / "images").glob("*/samples/*.png"))
    assert [file.name for file in files] == ["00000.png", "00001.png"]
    with Image.open(files[0]) as image:
        assert image.text["prompt"] == "a red apple" and '"sampling_steps": 3' in image.text["settings"]
        assert '"sampler": "euler"' in image.text["settings"]
    assert page.run("document.querySelectorAll('#gallery img').length") == 2
    shown = page.run("document.querySelector('#shown dl').textContent")
    assert "a red apple" in shown and "sampling steps3" in shown
    shot(page, "generate")


def test_the_settings_of_an_image_fill_the_form(page):
    page.type_into("#image-prompt", "something else")
    page.type_into("#image-sampling_steps", "9")
    page.run("document.querySelector('#image-sampler').value = ''")
    page.click("#shown .actions button")
    assert page.run("document.querySelector('#image-prompt').value") == "a red apple"
    assert page.run("document.querySelector('#image-sampling_steps').value") == "3"
    assert page.run("document.querySelector('#image-sampler').value") == '"euler"'
    assert page.run("document.querySelector('#image-first_index').value") == "0"
    page.click("#gallery button:nth-child(2)")
    page.wait_for("document.querySelector('#shown dl').textContent.includes('index1')")
    page.click("#shown .actions button")
    assert page.run("document.querySelector('#image-first_index').value") == "1"
    note = page.run("document.querySelector('#reused').textContent")
    assert "the number of images" in note and "image 1 of its seed" in note and "LoRA" not in note
    page.click("#gallery button:nth-child(1)")
    page.wait_for("document.querySelector('#shown dl').textContent.includes('index0')")
    page.click("#shown .actions button")
    assert page.run("document.querySelector('#image-first_index').value") == "0"


def test_a_mistake_is_shown_and_the_page_goes_on(page):
    page.type_into("#image-H", "65")
    page.click("#request button.main")
    page.wait_for("!document.querySelector('#fault').hidden")
    assert "multiples of 16 pixels" in page.run("document.querySelector('#fault').textContent")
    # The browser itself reports the status 400.
    assert [error for error in page.errors if "400" not in error] == []
    page.errors.clear()
    page.type_into("#image-H", "64")
    page.click("#request button.main")
    wait_for_images(page, 4)
    assert page.run("document.querySelector('#fault').hidden")


def test_a_brush_says_which_part_of_an_image_is_made_anew(page, folder):
    before = page.run("document.querySelectorAll('#gallery img').length")
    page.run("document.querySelector('#shown .actions button:last-child').click()")  # Begin from this image
    page.wait_for("document.querySelector('.canvas canvas')?.width === 64")
    page.type_into("#image-prompt", "a blue square")
    page.drag(".canvas canvas", (0.1, 0.1), (0.5, 0.1), (0.9, 0.1))
    shot(page, "brush")
    page.click("#request button.main")
    wait_for_images(page, before + 2)
    (mask,) = (folder / "out" / "uploads").glob("*.png")
    with Image.open(mask) as image:
        painted = np.asarray(image.convert("L"))
    assert painted.shape == (64, 64) and painted[6, 32] == 255 and not painted[20:].any()
    files = sorted((folder / "out" / "images").glob("*/samples/00000.png"))
    source, made = (np.asarray(Image.open(file)).astype(int) for file in (files[-2], files[-1]))
    assert (source[20:] == made[20:]).all() and (source[:12] != made[:12]).any()
    page.wait_for("document.querySelector('#shown dl').textContent.includes('init image')")
    page.click("#shown .actions button")
    assert "init image" in page.run("document.querySelector('#reused').textContent")
    assert page.run("document.querySelector('#source').children.length") == 0


def test_a_training_is_started_stopped_resumed_and_used(page, folder):
    page.click("#tab-train")
    for name, text in (
        ("#run-name", "emoji"), ("#train-max_steps", "20"), ("#train-lora_rank", "4"), ("#train-train_batch_size", "2"),
        ("#train-ckpt_save_interval", "4"), ("#train-sample_prompts", "a cat face --s 3"),
        ("#train-sample_every_n_steps", "10"),
    ):  # fmt: skip
        page.type_into(name, text)
    assert page.run("document.querySelector('#run-data').value") == "data/emoji"
    page.click("#training button.main")
    page.wait_for("document.querySelector('#run progress')?.value >= 5", TRAINING_SECONDS)
    page.click("#stop")
    page.wait_for("document.querySelector('#resume') !== null")
    stopped = page.run("document.querySelector('#run progress').value")
    assert stopped < 20 and "stopped" in page.run("document.querySelector('#runs').textContent")
    page.click("#resume")
    page.wait_for("document.querySelector('#runs').textContent.includes('finished, 20 steps')", TRAINING_SECONDS)
    assert page.run("document.querySelectorAll('#run svg path.mean').length") == 1
    page.wait_for("document.querySelectorAll('#run .strip img').length === 3")
    assert len((folder / "out" / "training" / "emoji" / "metrics.csv").read_text().splitlines()) == 21
    shot(page, "train")
    page.click("#use-lora")
    page.wait_for("document.querySelector('#loras label') !== null")
    assert page.run("document.querySelector('#loras label').textContent") == "runs/emoji/ckpt/lora.ckpt"
    before = page.run("document.querySelectorAll('#gallery img').length")
    page.click("#request button.main")
    wait_for_images(page, before + 2)
    made = sorted((folder / "out" / "images").glob("*/samples/00000.png"))
    with Image.open(made[-1]) as image:
        assert '"lora.ckpt"' in image.text["lora"]
    assert made[-1].read_bytes() != made[0].read_bytes()
    page.wait_for("document.querySelector('#shown dl').textContent.includes('lora.ckpt at 1')")
    page.click("#loras button")  # remove it
    assert page.run("document.querySelector('#loras label') === null")
    page.click("#shown .actions button")
    assert page.run("document.querySelector('#loras label').textContent") == "runs/emoji/ckpt/lora.ckpt"
    page.run("document.querySelector('#lora').replaceChildren()")
    page.click("#shown .actions button")
    assert page.run("document.querySelector('#loras label') === null")
    assert "LoRA lora.ckpt at 1 (it is not in the list)" in page.run("document.querySelector('#reused').textContent")


@pytest.mark.parametrize("tab", ["generate", "train"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window(page, address, width, dark, tab):
    open_page(page, address, width=width, dark=dark, height=800)
    page.click(f"#tab-{tab}")
    time.sleep(0.3)
    shot(page, f"{tab}-{width}-{'dark' if dark else 'light'}")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(UNNAMED) == 0


def test_the_tabs_are_reached_by_the_keyboard(page, address):
    open_page(page, address)
    page.press("Tab")
    assert page.run("document.activeElement.id") == "tab-generate"
    page.press("ArrowRight")
    assert page.run("document.activeElement.id") == "tab-train" and page.run(
        "document.querySelector('#generate').hidden"
    )
