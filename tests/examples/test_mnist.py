"""The lesson of the digits: its data, commands, image and table, with stand-ins for the two scripts."""

from __future__ import annotations

import logging
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from examples import mnist
from ldm.data.dataset import read_image_text_csv
from ldm.errors import UserError
from ldm.lora.inject import inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.training.checks import check_settings
from ldm.weights.checkpoint import read_checkpoint
from tests.conftest import ROOT
from tools import lessons
from tools.nano.digit_classifier import load_digits, named_right, train_classifier

pytestmark = pytest.mark.processes

REAL = ROOT / "datasets" / "mnist"


@pytest.fixture(autouse=True)
def restored():
    """MindSpore's mode and the level of the log are as before."""
    yield
    ms.set_context(mode=ms.PYNATIVE_MODE)
    logging.getLogger("ldm").setLevel(logging.NOTSET)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data set of two digits of each kind in both splits."""
    return write_data(tmp_path / "data", 2)


def write_data(data: Path, count: int) -> Path:
    """Write a data set of `count` digits of each kind in both splits."""
    for split in ("train", "test"):
        folder = data / split
        folder.mkdir(parents=True)
        lines = ["dir,text"]
        for digit, name in enumerate(mnist.DIGITS):
            for path in sorted((REAL / split).glob(f"{digit}_*.png"))[:count]:
                (folder / path.name).write_bytes(path.read_bytes())
                lines.append(f"{path.name},the digit {name}")
        (folder / "img_txt.csv").write_text("\n".join(lines) + "\n")
    return data


class Scripts:
    """Stands for the two scripts: checks the settings of each command, and writes what it would write."""

    def __init__(self) -> None:
        self.trained: list[TrainSettings] = []
        self.drawn: list[GenerateSettings] = []

    def call(self, script: str, *flags: str) -> None:
        if script == "train_text_to_image.py":
            settings = read_settings(TrainSettings, flags, yaml_flag="train_config")
            check_settings(settings)
            self.trained.append(settings)
            path = Path(settings.output_path) / "ckpt" / ("lora.ckpt" if settings.use_lora else "model.ckpt")
            path.parent.mkdir(parents=True)
            path.write_bytes(b"weights")
            return
        settings = read_settings(GenerateSettings, flags)
        self.drawn.append(settings)
        samples = Path(settings.output_path) / "samples"
        samples.mkdir(parents=True)
        inverts = bool(settings.lora_ckpt_path) and settings.lora_scale > 0
        for i, line in enumerate(Path(settings.data_path).read_text().splitlines()):
            digit = mnist.DIGITS.index(line.split()[-1])
            image = Image.open(sorted((REAL / "test").glob(f"{digit}_*.png"))[i // 10])
            image.point(lambda value: 255 - value if inverts else value).save(samples / f"{i:05d}.png")


@pytest.fixture
def scripts(monkeypatch) -> Scripts:
    scripts = Scripts()
    for module in (mnist, lessons):
        monkeypatch.setattr(module, "call", scripts.call)
    return scripts


@pytest.mark.parametrize("channels, name", [(1, "mnist"), (3, "mnist_rgb")])
def test_the_lesson_from_data_to_table(scripts, data, tmp_path, monkeypatch, capsys, channels, name):
    monkeypatch.chdir(tmp_path)
    flags = ["--output_path", "out", "--data_path", "data", "--images", "3", "--classifier_steps", "2"]
    mnist.main([*flags, "--channels", str(channels), "--base_steps", "5"])
    base, lora = scripts.trained
    assert (base.use_lora, base.unet_initialize_random, base.max_steps) == (False, True, 5)
    assert (lora.use_lora, lora.unet_initialize_random, lora.lora_ft_text_encoder) == (True, False, False)
    for settings in (base, lora):
        config = load_model_config(settings.model_config)
        assert Path(config.path).stem == name and config.image_channels == channels and settings.resume is True
    assert Path(lora.pretrained_model_path).samefile(Path(base.output_path) / "ckpt" / "model.ckpt")
    assert Path(lora.data_path).samefile(tmp_path / "out" / "inverted")

    before, after, without = scripts.drawn
    assert not before.lora_ckpt_path and after.lora_scale == 1 and without.lora_scale == 0
    assert {(settings.scale, settings.batch_size, settings.seed) for settings in scripts.drawn} == {(3.0, 10, 1)}
    sheet = np.asarray(Image.open(tmp_path / "out" / ("" if channels == 1 else "rgb") / "mnist.png"))
    assert sheet[6, 6] == 0 and sheet[-6, -6] == 255  # the base model's digits above, the LoRA's below

    printed = capsys.readouterr().out
    assert "strength 0 gives the images of the base model, bit for bit: True" in printed
    rows = {line[:40].strip(): line.split()[-4:] for line in printed.splitlines() if "%" in line}
    backgrounds = {title: float(cells[-1]) for title, cells in rows.items()}
    assert backgrounds == {
        "the base model": 0, "with the LoRA": 1, "real digits, not used in training": 0, "the same inverted": 1,
    }  # fmt: skip
    assert rows["the base model"][0] == "30" and rows["the same inverted"][0] == "20"


def test_the_trainings_run_and_leave_the_lora(tmp_path, monkeypatch):
    """A step of each, in the processes that a user starts. The digits are drawn by a stand-in."""
    monkeypatch.setattr(mnist, "call", Scripts().call)
    data = write_data(tmp_path / "data", 4)  # enough for a batch of the recipe
    flags = ["--base_steps", "1", "--lora_steps", "1", "--classifier_steps", "1", "--images", "1"]
    mnist.main(["--output_path", str(tmp_path / "out"), "--data_path", str(data), *flags])
    lora, _ = read_checkpoint(tmp_path / "out" / "grey" / "lora" / "ckpt" / "lora.ckpt")
    factors = [array for name, array in lora.items() if name.endswith((".lora_down.weight", ".lora_up.weight"))]
    assert len(factors) > 100 and not any(np.isnan(array).any() for array in factors)


def test_the_inverted_data_set_is_made_once_and_completed_after_an_interruption(data, tmp_path):
    folder = mnist.invert(data / "train", tmp_path / "inverted")
    pairs = list(zip(read_image_text_csv(data / "train").rows, read_image_text_csv(folder).rows))
    assert len(pairs) == 20
    for row, inverted in pairs:
        assert row.caption == inverted.caption
        np.testing.assert_array_equal(np.asarray(Image.open(inverted.path)), 255 - np.asarray(Image.open(row.path)))
    pairs[0][1].path.unlink()
    mnist.invert(data / "train", folder)
    assert not pairs[0][1].path.exists()  # complete, as its img_txt.csv says
    (folder / "img_txt.csv").unlink()
    mnist.invert(data / "train", folder)
    assert pairs[0][1].path.exists()


def test_the_lora_of_the_recipe_fits_the_model_and_trains_both_ends_of_its_unet():
    model = build_model(load_model_config(ROOT / "configs/mnist.yaml"))
    assert sum(p.size for p in model.model.get_parameters()) == 1_001_905  # as the page says
    names = inject_lora(model, LoRASpec(text_encoder=False).with_config(ROOT / "configs/lora/mnist.yaml"))
    unet = "model.diffusion_model."
    assert {f"{unet}input_blocks.0.0", f"{unet}out.2"} < set(names)
    everything = inject_lora(build_model(load_model_config(ROOT / "configs/mnist.yaml")), LoRASpec(targets="all"))
    assert set(names) == {f"{unet}input_blocks.0.0", f"{unet}out.2", *everything}
    assert sum(p.size for p in model.trainable_params()) == 372_313


def test_the_classifier_learns_both_polarities_and_is_read_again(tmp_path, graph_mode):
    """Of two easy digits, so that a few steps suffice."""
    paths = [path for digit in (0, 1) for path in sorted((REAL / "train").glob(f"{digit}_*.png"))[:50]]
    images, digits = load_digits(paths), np.repeat([0, 1], 50)
    classifier = train_classifier(images, digits, tmp_path, 120)
    for polarity in (1, -1):
        assert named_right(classifier, polarity * images, digits).mean() > 0.95
    again = train_classifier(images, digits, tmp_path, 120)
    np.testing.assert_array_equal(again(ms.Tensor(images)).asnumpy(), classifier(ms.Tensor(images)).asnumpy())


def test_the_background_is_the_frame_of_the_images():
    images = np.full((2, 1, 8, 8), -1.0, np.float32)
    images[:, :, 2:6, 2:6] = 1.0
    assert mnist.background(images) == 0 and mnist.background(-images) == 1
    images[0, :, 0, 0] = 1.0
    assert mnist.background(images) == pytest.approx(1 / (2 * 48))


def test_a_caption_without_a_digit_is_refused_before_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "call", lambda *command: pytest.fail("it began"))
    table = data / "test" / "img_txt.csv"
    table.write_text(table.read_text().replace("the digit nine", "the digit"))
    with pytest.raises(UserError, match="the caption of .* does not end in one of zero one two"):
        mnist.main(["--data_path", str(data), "--output_path", str(tmp_path / "out")])


def test_a_wrong_number_of_channels_is_refused():
    with pytest.raises(UserError, match="--channels"):
        mnist.main(["--channels", "2"])
