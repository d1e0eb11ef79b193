"""The validation loss: its value, that it changes no training, the best step, and resuming."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ldm.data.draws import draws
from ldm.data.preparation import prepare_data, read_listing
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.own_files import find_states
from ldm.training.plan import make_plan
from ldm.training.trainer import run_steps, save, train
from ldm.training.training_state import load_state
from ldm.training.validation import Validation, is_due
from ldm.training.validation_loss import choose_rows
from ldm.training.validation_results import Measured, compare
from tests.training.micro import MICRO, SETTINGS, metrics, prepare

# A LoRA that learns in a few steps, with all that validation leaves out. 3 of 10 images are held out.
LORA = dict(
    use_lora=True, lora_rank=2, lora_targets=["attn2.to_q"], lora_dropout=0.2, caption_dropout=0.3, random_flip=True,
    start_learning_rate=2e-2, max_steps=8, ckpt_save_interval=3, validation_split=0.3, validate_every_n_steps=2,
    keep_best=True,
)  # fmt: skip
OFF = dict(validate_every_n_steps=None, validate_every_n_epochs=0, keep_best=False)


def rows_of(output: Path) -> list[dict[str, str]]:
    """The rows of validation.csv."""
    with open(output / "validation.csv", newline="") as file:
        return list(csv.DictReader(file))


def arrays_of(output: Path) -> dict[str, np.ndarray]:
    return load_state(find_states(output / "ckpt")[0]).arrays


@pytest.fixture(scope="module")
def validated(micro_base_model, micro_data, tmp_path_factory) -> Path:
    """The output folder of an uninterrupted run of LORA."""
    output = tmp_path_factory.mktemp("validated") / "run"
    paths = {"pretrained_model_path": micro_base_model, "data_path": micro_data, "output_path": output}
    train(TrainSettings(**{**SETTINGS, **LORA, **paths}))
    return output


# The number


def write_shapes(folder: Path) -> Path:
    """Write eight images of noise, in two shapes, with captions whose tags are shuffled and dropped in training."""
    folder.mkdir()
    for number in range(8):
        size = (24, 24) if number % 2 else (8, 32)
        pixels = draws(1, "image", number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number},two, three")
    return folder


def numpy_losses(run, images, timestep: int) -> list[float]:
    """The loss of each image by NumPy, but for the networks, which see one image at a time."""
    config, data, seed = run.model.config, images.inputs.data, images.seed
    alpha = NoiseSchedule.from_config(config).alphas_cumprod[timestep]
    losses = []
    for row in images.rows:
        _, moments = images.inputs.moments_of([row])
        mean, logvar = np.split(moments.astype(np.float64), 2, 1)
        shape = mean.shape[1:]
        eps, noise = (
            draws(seed, stream, row).standard_normal(shape, np.float32)[None]
            for stream in ("validation_posterior", f"validation_noise_{timestep}")
        )
        latents = (mean + np.exp(logvar / 2) * eps) * config.scale_factor
        noisy = np.sqrt(alpha) * latents + np.sqrt(1 - alpha) * noise
        embeddings = Tensor(images.inputs.texts.of([f"image {data.name(row)[0]}, two, three"]))
        prediction = run.model.model.diffusion_model(
            Tensor(noisy.astype(np.float32)), Tensor(np.array([timestep], np.int32)), embeddings
        ).asnumpy()
        losses.append(np.mean((prediction.astype(np.float64) - noise) ** 2))
    return losses


def test_the_loss_is_the_plain_mean_squared_error_of_whole_images(settings, tmp_path):
    """Whatever the training makes of loss, noise, images and captions. In two shapes, and twice the same."""
    run = prepare(settings(
        tmp_path / "run", data_path=write_shapes(tmp_path / "data"), use_lora=True, lora_dropout=0.5, max_steps=1,
        lora_targets=["attn2.to_q"],
        enable_bucket=True, min_bucket_reso=8, max_bucket_reso=32, bucket_reso_steps=8, random_flip=True,
        random_crop=True, shuffle_caption=True, caption_tag_dropout_rate=0.9, caption_dropout=1.0, min_snr_gamma=1.0,
        loss_type="huber", noise_offset=0.5, ip_noise_gamma=0.5, validation_split=0.5, validation_timesteps=[700, 300],
    ))  # fmt: skip
    validation = run.validation
    assert len(np.unique(validation.images["validation"].inputs.data.buckets.of_row)) == 2
    validation.begin()
    first = validation.last
    validation.measure(0)
    np.testing.assert_array_equal(validation.last.losses, first.losses)
    [row, training_row, *again] = rows_of(tmp_path / "run")
    assert again == [row, training_row]
    assert list(row) == ["step", "images", "loss", "loss_700", "loss_300"]
    for found, name in ((row, "validation"), (training_row, "training")):
        images = validation.images[name]
        assert found["images"] == name and len(images) == 4
        for timestep in (700, 300):
            expected = np.mean(numpy_losses(run, images, timestep))
            assert float(found[f"loss_{timestep}"]) == pytest.approx(expected, rel=1e-5)
        columns = [float(found[f"loss_{timestep}"]) for timestep in (700, 300)]
        assert float(found["loss"]) == pytest.approx(np.mean(columns), rel=1e-9)
    # Two processes measure a part each, whose sum is the whole, bit for bit.
    images, bar = validation.images["validation"], SimpleNamespace(update=lambda: None)
    whole, *parts = (
        images.losses(validation.network, [700], part, bar)
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    assert all(part.any() for part in parts)
    np.testing.assert_array_equal(parts[0] + parts[1], whole)


def test_averages_are_measured_and_what_is_trained_stays_as_it_is(settings, tmp_path, validated):
    averaged = {**LORA, "max_steps": 4, "use_ema": True, "ema_decay": 0.5, "lora_ft_text_encoder": True,
                "lora_targets": ["attn2.to_q", "q_proj"]}  # fmt: skip
    for name, others in (("with", {}), ("without", OFF)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(validated / "cache")
        train(settings(tmp_path / name, **{**averaged, **others}))
    expected = arrays_of(tmp_path / "without")
    for name, array in arrays_of(tmp_path / "with").items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert_measured_as_saved(settings, tmp_path / "with", {**averaged, "use_ema": False})


def test_of_schedule_free_adamw_the_averaged_point_is_measured(settings, tmp_path):
    options = {**LORA, "max_steps": 4, "optim": "adamwschedulefree"}
    train(settings(tmp_path / "run", **options))
    assert_measured_as_saved(settings, tmp_path / "run", {**options, "optim": "adamw"})


def assert_measured_as_saved(settings, output: Path, options: dict[str, object]) -> None:
    """The last loss of a run is the first one of a run without dropout that starts from its checkpoint."""
    options = {**options, "lora_dropout": 0.0}
    rows = {int(row["step"]): float(row["loss"]) for row in rows_of(output) if row["images"] == "validation"}
    run = prepare(settings(output.parent / "again", **options, lora_init_path=output / "ckpt" / "lora.ckpt"))
    run.validation.begin()
    assert run.validation.last.loss == pytest.approx(rows[4], rel=1e-6)
    assert rows[4] != pytest.approx(rows[0], rel=2e-5)  # twenty times what is allowed above


# A run


def test_a_run_measures_before_the_first_step_at_intervals_and_at_the_end(validated):
    rows = rows_of(validated)
    assert [(row["step"], row["images"]) for row in rows] == [
        (str(step), images) for step in (0, 2, 4, 6, 8) for images in ("validation", "training")
    ]
    assert list(rows[0])[2:] == ["loss", "loss_200", "loss_400", "loss_600", "loss_800"]
    losses = {int(row["step"]): float(row["loss"]) for row in rows if row["images"] == "validation"}
    best = json.loads((validated / "ckpt" / "best.json").read_text())
    assert best["step"] == min(losses, key=losses.get) and best["loss"] == pytest.approx(min(losses.values()))
    log = (validated / "log.txt").read_text()
    assert f"the best is {best['loss']:.5f} at step {best['step']}, with " in log
    assert log.count("validation loss 0") + log.count("validation loss 1") == 5


def test_training_is_the_same_without_it_bit_for_bit(settings, validated, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "cache").symlink_to(validated / "cache")
    train(settings(output, **{**LORA, **OFF}))
    assert not (output / "validation.csv").exists() and not (output / "ckpt" / "best.json").exists()
    expected, found = arrays_of(validated), arrays_of(output)
    assert expected.keys() == found.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    with_it, without = ([{**row, "seconds": ""} for row in metrics(folder)] for folder in (validated, output))
    assert with_it == without
    assert (output / "ckpt" / "lora.ckpt").read_bytes() == (validated / "ckpt" / "lora.ckpt").read_bytes()


@pytest.mark.processes
def test_a_killed_run_resumes_to_the_same_files(settings, validated, tmp_path):
    """It is killed after a step that was measured after the last training state."""
    moment = 5
    output = tmp_path / "run"
    output.mkdir()
    (output / "cache").symlink_to(validated / "cache")
    run = prepare(settings(output, **LORA))
    feed, left = run.feed, iter(range(moment))

    def killed_feed():
        if next(left, None) is None:
            raise KeyboardInterrupt
        return feed()

    run.feed = killed_feed
    with pytest.raises(KeyboardInterrupt):
        run_steps(run)
    assert int(rows_of(output)[-1]["step"]) == 4  # the training state is of step 3
    train(settings(output, **LORA, resume=True))
    for name in (
        "validation.csv",
        "ckpt/best.json",
        "ckpt/best.ckpt",
        "ckpt/lora.ckpt",
        "ckpt/state-00000008.safetensors",
    ):
        assert (output / name).read_bytes() == (validated / name).read_bytes(), name
    best = json.loads((output / "ckpt" / "best.json").read_text())["step"]
    numbered = output / "ckpt" / f"best-{best:08d}.ckpt"
    assert numbered.read_bytes() == (output / "ckpt" / "best.ckpt").read_bytes()


def test_a_run_that_resumes_with_other_time_steps_begins_a_new_file(settings, validated, tmp_path):
    output = tmp_path / "run"
    newest = find_states(validated / "ckpt")[0]
    run = prepare(settings(output, **LORA, resume=str(newest)))
    assert run.validation.best.step == json.loads((validated / "ckpt" / "best.json").read_text())["step"]
    (output / "validation.csv").write_bytes((validated / "validation.csv").read_bytes())
    log = output / "log.txt"
    changed = prepare(settings(output, **LORA, validation_timesteps=[500], resume=str(newest)))
    assert changed.validation.best is None and "not compared with those that follow" in log.read_text()
    changed.validation.begin()
    assert (output / "validation.csv").read_text().split() == ["step,images,loss,loss_500"]
    kept = output / "validation-until-00000008.csv"
    assert kept.read_bytes() == (validated / "validation.csv").read_bytes()


def saves_after_resuming(settings, output: Path, **others: object):
    """Resume in a folder, save after steps 9 to 11 without training, and return the run."""
    run = prepare(settings(output, **{**LORA, "max_steps": 12, **others}, resume=True))
    for step in range(9, 12):
        run.status.steps_done = step
        save(run)
    return run


def test_the_best_weights_stay_where_a_run_resumes_on_other_time_steps(settings, validated, tmp_path):
    output = shutil.copytree(validated, tmp_path / "run")
    run = saves_after_resuming(settings, output, validation_timesteps=[500])
    assert run.validation.best is None and not (output / "ckpt" / "best.ckpt").exists()
    kept = output / "ckpt" / "best-until-00000008.ckpt"
    for path in (kept, kept.with_suffix(".json")):
        assert path.read_bytes() == (validated / "ckpt" / f"best{path.suffix}").read_bytes()
    assert f"the best weights until step 8 are kept as {kept}" in (output / "log.txt").read_text()


def test_the_best_step_stays_where_a_run_resumes_without_validation_and_then_with(settings, validated, tmp_path):
    output = shutil.copytree(validated, tmp_path / "run")
    assert saves_after_resuming(settings, output, **OFF).validation is None
    run = prepare(settings(output, **{**LORA, "max_steps": 12}, resume=True))
    run.status.steps_done = 12
    save(run)
    for name in ("best.ckpt", "best.json"):
        assert (output / "ckpt" / name).read_bytes() == (validated / "ckpt" / name).read_bytes()
    assert run.validation.best.step == json.loads((validated / "ckpt" / "best.json").read_text())["step"]


def test_a_run_that_was_killed_after_its_last_save_ends_like_one_that_was_not(settings, validated, tmp_path):
    def said(log: Path) -> list[str]:
        return re.findall("validation loss: the best is .*|the last step is worse .*", log.read_text())

    output = shutil.copytree(validated, tmp_path / "run")
    for name in ("report.html", "log.txt"):
        (output / name).unlink()
    facts = json.loads((output / "run.json").read_text())
    facts["sessions"][0]["ended"] = "running"
    (output / "run.json").write_text(json.dumps(facts))
    train(settings(output, **LORA, resume=True))
    assert said(output / "log.txt") == said(validated / "log.txt") != []
    sessions = json.loads((output / "run.json").read_text())["sessions"]
    assert [session["ended"] for session in sessions] == ["killed", "finished"]
    assert (output / "report.html").exists()


@pytest.mark.parametrize(("header", "kept"), [("name,score", "validation-kept.csv"), ("step,images,loss,loss_1", None)])
def test_a_new_run_overwrites_the_file_of_a_run_alone(settings, tmp_path, monkeypatch, header, kept):
    monkeypatch.setattr(Validation, "measure", lambda self, step: None)
    output = tmp_path / "run"
    output.mkdir()
    (output / "validation.csv").write_text(f"{header}\n1,2\n")
    run = prepare(settings(output, **LORA))
    run.validation.begin()
    assert (output / "validation.csv").read_text().split() == ["step,images,loss,loss_200,loss_400,loss_600,loss_800"]
    assert [path.name for path in output.glob("validation-*")] == ([] if kept is None else [kept])
    if kept is not None:
        assert (output / kept).read_text() == f"{header}\n1,2\n"
        assert f"was not written by this run: it is renamed to {kept}" in (output / "log.txt").read_text()


# When, on what


@pytest.mark.parametrize(
    ("given", "due"),
    [
        (dict(), [0, 4, 7, 10]),  # an epoch has 3.5 steps
        (dict(validate_every_n_epochs=2), [0, 7, 10]),
        (dict(validate_every_n_steps=6), [0, 6, 10]),
        (dict(validate_every_n_steps=6, validate_every_n_epochs=2), [0, 6, 7, 10]),
        (dict(validate_every_n_steps=6, validate_every_n_epochs=0), [0, 6, 10]),
    ],
)
def test_when_the_loss_is_computed(given, due):
    settings = TrainSettings(max_steps=10, gradient_accumulation_steps=2, **given)
    plan = make_plan(settings, 7)
    assert [step for step in range(11) if is_due(settings, plan, step)] == due


def test_some_images_are_chosen_by_the_seed_and_no_class_images(tmp_path):
    for folder, count in (("a", 6), ("b", 6)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / folder / f"{number}.png")
            (tmp_path / folder / f"{number}.txt").write_text("an image")
    (tmp_path / "config.toml").write_text(
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'b'\nis_reg = true\n[[datasets.subsets]]\nimage_dir = 'a'\n"
    )
    settings = TrainSettings(data_path=str(tmp_path / "config.toml"), image_size=16)
    data, _ = prepare_data(read_listing(settings), settings, load_model_config(MICRO))
    assert [data.is_class_image(row) for row in choose_rows(data, 100, 1, "rows")] == [False] * 6
    chosen = choose_rows(data, 3, 1, "rows")
    assert len(chosen) == 3 and chosen == sorted(chosen) == choose_rows(data, 3, 1, "rows")
    assert any(choose_rows(data, 3, seed, "rows") != chosen for seed in (2, 3, 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(validation_split=0.0), "validate_every_n_steps needs images that are not trained"),
        (dict(validation_split=0.0, validate_every_n_steps=None), "keep_best needs images that are not trained"),
        (dict(validation_split=0.01), "validate_every_n_steps needs images that are not trained"),
        (dict(max_timestep=150), "none of 200, 400, 600, 800 is trained, which are 0 to 149"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_data_is_encoded(settings, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        train(settings(tmp_path / "run", **{**LORA, **change}))
    assert not list((tmp_path / "run" / "cache").glob("*.shard"))


def test_held_out_images_that_are_broken_are_named_with_their_own_folder(settings, tmp_path):
    held_out = write_shapes(tmp_path / "held_out")
    for number in (2, 4):
        (held_out / f"{number}.png").write_bytes(b"no image")
    run = prepare(settings(
        tmp_path / "run", use_lora=True, max_steps=1, check_images=False, validation_data_path=str(held_out)
    ))  # fmt: skip
    with pytest.raises(UserError, match=f"^{held_out}: 2 of 8 images are broken"):
        run.validation.encode()


def test_time_steps_that_are_not_trained_are_left_out(settings, validated, tmp_path):
    run = prepare(settings(tmp_path / "run", **LORA, max_timestep=500))
    assert run.validation.timesteps == [200, 400]


# The end


def test_a_difference_is_compared_with_its_standard_error():
    losses = np.array([1.0, 2.0, 4.0], np.float32)
    difference, chance = compare(losses + np.array([0.1, 0.2, 0.3], np.float32), losses)
    assert difference == pytest.approx(0.2) and chance == pytest.approx(4.30 * 0.1 / np.sqrt(3), rel=1e-5)
    assert compare(losses[:1] + 1, losses[:1]) == (1.0, np.inf)
    many = np.arange(101.0)
    assert compare(many, np.zeros(101))[1] == pytest.approx(1.984 * many.std(ddof=1) / np.sqrt(101), rel=1e-3)


@pytest.mark.parametrize(
    ("last", "best_step", "kept", "says"),
    [
        (
            [0.3, 0.4, 0.5],
            20,
            "best.ckpt",
            "worse than step 20 by more than chance .* use best.ckpt, which is from step 20",
        ),
        ([0.3, 0.4, 0.5], 20, None, "step 20 was not kept; train again with --keep_best True"),
        ([0.3, 0.4, 0.5], 0, None, "no step was better than what the training started from"),
        ([0.3, 0.2, 0.35], 20, "best.ckpt", "which may be chance"),
    ],
)
def test_the_end_says_whether_the_last_step_is_worse(caplog, last, best_step, kept, says):
    caplog.set_level(logging.INFO)
    best = Measured(best_step, 0.2, 0.1, np.array([0.1, 0.2, 0.3], np.float32))
    run = SimpleNamespace(
        best=best, last=Measured(40, float(np.mean(last)), 0.05, np.array(last, np.float32)), _file=None,
        checkpoints=SimpleNamespace(kept=lambda step: kept), runtime=SimpleNamespace(process_index=0),
    )  # fmt: skip
    Validation.finish(run)
    assert f"the best is 0.20000 at step {best_step}, with 0.10000 of the training images" in caplog.text
    assert "with 0.05000" in caplog.text
    assert re.search(says, caplog.text)
    caplog.clear()
    run.runtime.process_index = 1  # of a resumed run, every process knows the last step of the training state
    Validation.finish(run)
    assert not caplog.text


def test_the_best_step_is_read_back_from_a_training_state_bit_for_bit():
    best = Measured(30, 0.1 + 0.2, 1 / 3, np.array([0.1, np.pi], np.float32))
    again = Measured.parse(json.loads(json.dumps(best.content())))
    assert again[:3] == best[:3]
    np.testing.assert_array_equal(again.losses, best.losses)
    for damaged in (None, 3, {}, {**best.content(), "losses": "?"}, {**best.content(), "step": -1}):
        assert Measured.parse(damaged) is None
