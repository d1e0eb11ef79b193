"""Class images: which are there, which are drawn, and that drawing leaves the base model as it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.data.sources.rows import Listing, Row, Subset
from ldm.errors import UserError
from ldm.files.outputs import claim_folder
from ldm.generation.loading import load_model
from ldm.runtime.device import Runtime, setup_runtime
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training import class_images
from ldm.training.class_images import add_class_images, ensure_class_images, find_class_images
from ldm.training.status import Status
from tests.training.micro import MICRO, SETTINGS


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "class"


@pytest.fixture
def settings(folder, tmp_path, micro_base_model) -> TrainSettings:
    return make_settings(folder, tmp_path, micro_base_model)


def make_settings(folder: Path, output: Path, base_model: Path, **changed) -> TrainSettings:
    return TrainSettings(
        **{
            **SETTINGS, "data_path": "data", "output_path": str(output), "pretrained_model_path": str(base_model),
            "with_prior_preservation": True, "class_data_dir": str(folder), "class_prompt": "a dog",
            "num_class_images": 7, "sample_batch_size": 2, "use_lora": True, **changed,
        }
    )  # fmt: skip


@pytest.fixture
def drawn_batches(monkeypatch) -> list[list[int]]:
    """The numbers of each batch that is drawn, by a stand-in for the pipeline: image n has the grey value n."""
    batches: list[list[int]] = []

    def draw(pipeline, settings, sampling, numbers: np.ndarray) -> np.ndarray:
        batches.append(numbers.tolist())
        return np.stack([np.full((16, 16, 3), number, np.uint8) for number in numbers])

    monkeypatch.setattr(class_images, "_draw_batch", draw)
    monkeypatch.setattr(class_images, "_pipeline", lambda *networks: nullcontext())
    return batches


def ensure(settings: TrainSettings, model=None, processes: tuple[int, int] = (0, 1)) -> list[str]:
    """Return the names of the class images after `ensure_class_images`."""
    runtime = Runtime("CPU", ms.float32, *processes, mode=0)
    config = load_model_config(MICRO)
    status = Status(Path(settings.output_path) / "ckpt", False)
    listing = ensure_class_images(settings, config, runtime, lambda: model, False, status)
    assert {row.caption for row in listing.rows} == {"a dog"} and listing.subsets[0].is_reg
    assert status.phase == "before the first step"
    return [listing.name(row) for row in listing.rows]


def save(path: Path, value: int = 200) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (value, value, value)).save(path)


def numbered(numbers: Sequence[int]) -> list[str]:
    return [f"class-{number:06d}.png" for number in numbers]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_images_are_drawn_into_a_new_folder(settings, folder, drawn_batches):
    assert ensure(settings) == numbered(range(7))
    assert sorted(path.name for path in folder.iterdir()) == numbered(range(7))  # no lock, no half-written file
    assert drawn_batches == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_folder_is_in_output_path_where_none_is_given(settings, tmp_path, micro_base_model, drawn_batches):
    settings = make_settings(None, tmp_path / "run", micro_base_model)
    ensure(settings)
    assert len(list((tmp_path / "run" / "class_images").iterdir())) == 7


def test_enough_images_load_no_model(settings, folder, drawn_batches):
    for number in range(7):
        save(folder / "more" / f"{number}.jpg")
    assert ensure(settings) == [f"more/{number}.jpg" for number in range(7)]
    assert drawn_batches == []


def test_a_killed_run_draws_the_rest_and_ends_with_the_same_files(settings, folder, drawn_batches):
    ensure(settings)
    complete = contents(folder)
    for number in (3, 5, 6):
        (folder / f"class-{number:06d}.png").unlink()
    half_written = folder / ".class-000003.123-0badcafe.partial.png"
    half_written.write_bytes(b"half")
    drawn_batches.clear()
    ensure(settings)
    assert contents(folder) == complete
    assert drawn_batches == [[2, 3], [4, 5], [6, 7]]  # whole batches, as at first


def test_images_of_the_user_count_and_stay_as_they_are(settings, folder, drawn_batches):
    save(folder / "mine.jpg")
    save(folder / "class-000001.png")  # has the name of a drawn one
    before = contents(folder)
    assert ensure(settings) == [*numbered(range(6)), "mine.jpg"]
    assert {name: contents(folder)[name] for name in before} == before


def test_a_broken_image_is_named_and_another_one_drawn(settings, folder, drawn_batches, caplog):
    save(folder / "class-000001.png")
    whole = (folder / "class-000001.png").read_bytes()
    (folder / "class-000001.png").write_bytes(whole[:60])
    assert ensure(settings) == numbered([0, 2, 3, 4, 5, 6, 7])
    assert "class-000001.png" in caplog.text and "is not used" in caplog.text
    assert (folder / "class-000001.png").read_bytes() == whole[:60]


def test_the_log_counts_what_is_found_and_drawn(settings, folder, drawn_batches, caplog):
    caplog.set_level(logging.INFO, "ldm")
    save(folder / "mine.png")
    ensure(settings)
    assert "1 class images found, 6 of num_class_images 7 are missing" in caplog.text
    assert '6 class images drawn from "a dog"' in caplog.text


def test_images_of_another_prompt_are_used_with_a_warning(settings, folder, drawn_batches, caplog, tmp_path):
    ensure(settings)
    save(folder / "mine.png")
    ensure(settings)
    assert "another prompt" not in caplog.text
    changed = make_settings(folder, tmp_path, settings.pretrained_model_path, class_prompt="a cat")
    assert len(find_class_images(changed).paths) == 8
    assert '7 class images were drawn from another prompt, such as "a dog"' in caplog.text
    other = make_settings(folder, tmp_path, "models/other.ckpt")
    find_class_images(other)
    assert "by another base model" in caplog.text


def test_each_process_draws_its_share(settings, folder, drawn_batches, monkeypatch):
    given: list[list[int]] = []

    def gather_batches(batches, rounds):
        given.extend(numbers.tolist() for numbers, _ in batches)
        assert rounds == 2
        return iter(())  # as in every process but the first

    monkeypatch.setattr(class_images.peers, "gather_batches", gather_batches)
    for number in range(7):
        save(folder.with_name("enough") / f"{number}.png")
    monkeypatch.setattr(class_images.peers, "gather", lambda: folder.with_name("enough").rename(folder))
    ensure(settings, processes=(1, 2))
    assert given == [[2, 3], [6, 7]]


def test_two_runs_do_not_draw_into_a_folder_at_once(settings, folder, drawn_batches):
    with claim_folder(folder, "class_data_dir"), pytest.raises(UserError, match="class_data_dir .* two outputs"):
        ensure(settings)
    assert drawn_batches == []


def test_a_random_unet_draws_nothing(folder, tmp_path, micro_base_model):
    settings = make_settings(folder, tmp_path, micro_base_model, use_lora=False, unet_initialize_random=True)
    with pytest.raises(UserError, match="a random UNet .* cannot draw"):
        ensure(settings)


def add(settings: TrainSettings, data: Listing | None = None) -> Listing:
    """Return a data set, by default of one image, with the class images."""
    data = data or Listing("test", [Row("data/0.png", "sks dog", 0, 0)], (Subset("test", "data", "data"),), [], {})
    status = Status(Path(settings.output_path) / "ckpt", False)
    runtime = Runtime("CPU", ms.float32, 0, 1, mode=0)
    return add_class_images(data, settings, load_model_config(MICRO), runtime, lambda: None, False, status)


def test_class_images_are_added_behind_the_data_set(settings, drawn_batches):
    rows = add(settings).rows
    assert [row.caption for row in rows] == ["sks dog"] + ["a dog"] * 7
    assert [row.subset for row in rows] == [0] + [1] * 7


@pytest.mark.parametrize(
    "off", [dict(prior_loss_weight=0), dict(with_prior_preservation=False, class_data_dir=None, class_prompt=None)]
)
def test_nothing_is_added_or_drawn_where_it_has_no_effect(folder, tmp_path, micro_base_model, drawn_batches, off):
    assert len(add(make_settings(folder, tmp_path, micro_base_model, **off)).rows) == 1
    assert drawn_batches == [] and not folder.exists()


def test_nothing_is_drawn_into_a_folder_that_the_next_start_would_list(tmp_path, micro_base_model, drawn_batches):
    folder = tmp_path / "data" / "class"
    data = Listing(
        "caption_files", [Row(f"{tmp_path}/data/0.png", "sks dog", 0, 0)],
        (Subset("caption_files", f"{tmp_path}/data", ""),), [], {},
    )  # fmt: skip
    with pytest.raises(UserError, match="give a class_data_dir outside of data_path"):
        add(make_settings(folder, tmp_path, micro_base_model), data)
    assert drawn_batches == [] and not folder.exists()


def test_the_base_model_draws_by_number_and_is_as_before(folder, tmp_path, micro_base_model, graph_mode, monkeypatch):
    monkeypatch.setattr(class_images, "SAMPLING_STEPS", 2)
    setup_runtime("CPU", seed=None)
    model = load_model(load_model_config(MICRO), micro_base_model)
    before = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    settings = make_settings(folder, tmp_path, micro_base_model, num_class_images=3)
    ensure(settings, model)
    complete = contents(folder)
    assert len(set(complete.values())) == 3
    (folder / "class-000001.png").unlink()
    ensure(settings, model)
    assert contents(folder) == complete
    after = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    assert after.keys() == before.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with Image.open(folder / "class-000001.png") as image:
        assert image.size == (16, 16)
        fields = image.info
    assert (fields["prompt"], fields["negative_prompt"], fields["index"], fields["seed"]) == ("a dog", "", "1", "42")
    assert fields["checkpoint"] == micro_base_model.name and len(fields["checkpoint_sha256"]) == 64
    assert json.loads(fields["settings"])["sampler"] == "ddim"
