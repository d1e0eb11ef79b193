"""The estimate of a step: the measured figures where there are some, arithmetic, and no figure for anything else."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys

import mindspore as ms
import pytest

from ldm.errors import UserError
from ldm.generation.loading import set_up_sampling
from ldm.lora.inject import inject_lora
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.model_size import text_parameters, unet_parameters
from ldm.settings.optimizer import OPTIONS
from ldm.settings.train import TrainSettings
from ldm.training.estimate import (
    GB,
    OPTIMIZER_ARRAYS,
    TABLE,
    UNET_PARAMETERS,
    Row,
    estimate,
    lora_parameters,
    print_estimate,
    report,
)
from ldm.training.optimizers import make_optimizer
from ldm.training.setup import make_lora_spec
from ldm.training.trainer import train
from tests.conftest import ROOT

CONFIGS = {
    name: load_model_config(ROOT / "configs" / file)
    for name, file in (
        ("sd1", "v1-inference.yaml"),
        ("sd2", "v2-inference.yaml"),
        ("nano", "nano.yaml"),
        ("mnist", "mnist.yaml"),
    )
}
NANO = str(ROOT / "models" / "nano" / "nano.safetensors")
ONE_CORE = [row for row in TABLE if row.threads == 1]
TWO_CORES = [row for row in TABLE if row.threads == 2]


def made(**settings):
    """The figures are of fp32, which is not what auto is on every machine."""
    return TrainSettings(**{"use_lora": True, "device_target": "CPU", "precision": "fp32", **settings})


def estimated(model="sd1", pixels=512, batch=4, **settings):
    return estimate(made(image_size=pixels, train_batch_size=batch, **settings), CONFIGS[model])


def of_row(row, **settings):
    return estimated(
        row.model, row.pixels, row.batch,
        use_lora=row.training == "LoRA", gradient_checkpointing=row.gradient_checkpointing, **settings,
    )  # fmt: skip


def step_of(*shape, **settings):
    """The GB of the step alone, and its seconds."""
    found = estimated(*shape, **settings)
    return found.parts[0].gb, found.seconds


def added(**settings):
    """The GB that the settings add to the step and the frozen networks."""
    return sum(part.gb for part in estimated(**settings).parts[2:])


def line_with(lines, *words):
    [line] = [line for line in lines if all(word in line for word in words)]
    return line


# What was measured


@pytest.mark.parametrize("row", ONE_CORE, ids=str)
def test_a_measured_step_is_its_own_estimate(row):
    found = of_row(row)
    assert found.parts[0].gb == pytest.approx(row.gb) and found.seconds == pytest.approx(row.seconds)
    assert found.memory_gb == pytest.approx(row.gb, rel=0.2)  # with the autoencoder and the text encoder
    assert not any("was not measured" in note or "beyond" in note or "not measured:" in note for note in found.notes)


@pytest.mark.parametrize("row", TWO_CORES, ids=str)
def test_a_step_that_was_measured_with_two_threads_is_found_by_the_share(row):
    found = of_row(row)
    assert found.memory_gb == pytest.approx(row.gb, rel=0.2)
    assert found.seconds * found.two_cores == pytest.approx(row.seconds)


def test_the_memory_of_a_measured_epoch_is_that_of_the_step_and_the_frozen_networks():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^\| SD1.5 LoRA epoch, 64 images of 256 px, batch 1 \|.*$", page, re.MULTILINE)
    measured = float(re.findall(r"([\d.]+) GB", line)[0])
    assert estimated(pixels=256, batch=1).memory_gb == pytest.approx(measured, rel=0.05)


def test_the_table_is_that_of_the_page():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")

    def rows(heading):
        """The cells of the table with this heading."""
        text = page[re.search(rf"^\| {re.escape(heading)} \|.*\n\|[ -|]*\n", page, re.MULTILINE).end() :]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]

    expected = []
    for heading, training in (("LoRA: pixels", "LoRA"), ("full fine-tuning: pixels", "full")):
        for pixels, batch, gb, _, _, seconds, _ in rows(heading):
            if gb != "over 22":
                expected.append(Row("sd1", training, int(pixels), int(batch), float(gb), float(seconds)))
    for what, pixels, batch, gb, seconds in rows("LoRA of rank 4"):
        model, _, checkpointing = what.partition(", ")
        model = {"SD1.5": "sd1", "nano": "nano"}[model]
        shape = int(pixels), int(batch)
        expected.append(Row(model, "LoRA", *shape, float(gb), float(seconds), checkpointing != ""))
    for title, model, pixels, batch in (
        ("SD1.5 LoRA step, rank 4, batch 1, 64x64 latents", "sd1", 512, 1),
        ("SD1.5 LoRA step, rank 4, batch 1, 32x32 latents", "sd1", 256, 1),
        ("nano LoRA step, rank 4, batch 16", "nano", 64, 16),
    ):
        [cells] = [cells for cells in rows("work") if cells[0] == title]
        value, unit = cells[1].split()
        seconds = float(value) / {"s": 1, "ms": 1000}[unit]
        expected.append(Row(model, "LoRA", pixels, batch, float(cells[6].split()[0]), seconds, threads=2))
    assert sorted(TABLE) == sorted(expected)


def test_each_size_has_a_line_over_the_batch():
    sizes = {(row.model, row.training, row.pixels) for row in ONE_CORE}
    for size in sizes:
        assert len({row.batch for row in ONE_CORE if row[:3] == size and not row.gradient_checkpointing}) > 1, size


def test_the_parameters_are_those_of_the_measured_models():
    assert {name: unet_parameters(**CONFIGS[name].unet) for name in UNET_PARAMETERS} == UNET_PARAMETERS


# Between what was measured


@pytest.mark.parametrize("training", [True, False], ids=["LoRA", "full"])
def test_more_images_or_pixels_take_more(training):
    sizes, batches = range(128, 513, 64), range(1, 9)
    found = {shape: step_of("sd1", *shape, use_lora=training) for shape in itertools.product(sizes, batches)}
    for (size, batch), (gb, seconds) in found.items():
        for more in ((size, batch + 1), (size + 64, batch)):
            if more in found:
                # The memory of full fine-tuning was measured up to 4 % lower at larger shapes.
                assert found[more][0] >= gb * (1 if training else 0.96) and found[more][1] > seconds, (size, batch)


def test_a_shape_between_two_measured_ones_lies_between_them():
    for a, b in itertools.combinations([row for row in ONE_CORE if not row.gradient_checkpointing], 2):
        if a[:3] == b[:3] and not any(min(a.batch, b.batch) < row.batch < max(a.batch, b.batch)
                                      for row in ONE_CORE if row[:3] == a[:3]):  # fmt: skip
            batch = (a.batch + b.batch) // 2
            gb, seconds = step_of(a.model, a.pixels, batch, use_lora=a.training == "LoRA")
            assert min(a.gb, b.gb) - 1e-9 <= gb <= max(a.gb, b.gb) + 1e-9
            assert min(a.seconds, b.seconds) - 1e-9 <= seconds <= max(a.seconds, b.seconds) + 1e-9
    notes = estimated(pixels=384, batch=3).notes
    assert any("was not measured itself" in note for note in notes)


@pytest.mark.parametrize("shape", [(768, 1), (512, 16), (384, 16), (64, 4)])
def test_a_shape_beyond_the_measured_ones_is_said_to_be(shape):
    found = estimated("sd1", *shape)
    assert any("beyond the sizes and batches that were measured" in note for note in found.notes)
    assert found.parts[0].gb > 4 and found.seconds > 0


def test_other_sizes_of_nano_are_scaled_by_their_pixels():
    assert step_of("nano", 128, 4) == pytest.approx(step_of("nano", 64, 16))
    assert any("other sizes are scaled by their pixels" in note for note in estimated("nano", 128, 4).notes)
    assert not any("scaled" in note for note in estimated("nano", 64, 8).notes)


@pytest.mark.parametrize("shape", [(512, 1), (512, 4), (512, 8), (256, 16), (128, 1), (384, 2)])
def test_checkpointing_takes_less_memory_and_more_time(shape):
    plain, checkpointed = step_of("sd1", *shape), step_of("sd1", *shape, gradient_checkpointing=True)
    assert 4.0 < checkpointed[0] < plain[0] and checkpointed[1] > plain[1]
    notes = estimated("sd1", *shape, gradient_checkpointing=True).notes
    assert any("measured at 512 pixels with batch 4" in note for note in notes) == (shape != (512, 4))


def test_a_further_row_with_checkpointing_is_used(monkeypatch):
    before = step_of("sd1", 512, 4, gradient_checkpointing=True)
    row = Row("sd1", "LoRA", 256, 8, 5.5, 20.0, gradient_checkpointing=True)
    monkeypatch.setattr("ldm.training.estimate.TABLE", (*TABLE, row))
    assert step_of("sd1", 256, 8, gradient_checkpointing=True) == pytest.approx((5.5, 20.0))
    assert step_of("sd1", 512, 4, gradient_checkpointing=True) == pytest.approx(before)
    # Beyond the two, the factor of the time is that of the nearer one.
    plain, beyond = step_of("sd1", 128, 1), step_of("sd1", 128, 1, gradient_checkpointing=True)
    assert beyond[1] / plain[1] == pytest.approx(20.0 / 17.1)


def test_checkpointing_that_was_not_measured_has_the_figures_without_it():
    for given in (dict(use_lora=False), dict(model="nano", pixels=64, batch=16)):
        found = estimated(gradient_checkpointing=True, **given)
        assert line_with(found.notes, "not measured: gradient_checkpointing", "those without it")
        assert (found.memory_gb, found.seconds) == (estimated(**given).memory_gb, estimated(**given).seconds)


# The other settings


def test_micro_batches_multiply_the_time_and_add_their_sums():
    one, four = estimated(use_lora=False), estimated(use_lora=False, gradient_accumulation_steps=4)
    assert four.seconds == pytest.approx(4 * one.seconds)
    assert four.memory_gb - one.memory_gb == pytest.approx(UNET_PARAMETERS["sd1"] * 4 / GB)
    assert any("counts the optimizer's share" in note for note in four.notes)


@pytest.mark.parametrize(
    ("settings", "arrays"),
    [
        ({}, 0),
        ({"use_ema": True}, 1),
        ({"optim": "lion"}, -1),
        ({"optim": "adafactor"}, -2),
        ({"optim": "adafactor", "optimizer_args": ["beta1=0.9"]}, -1),
        ({"optim": "prodigy", "start_learning_rate": 1.0}, 2),
        ({"optim": "prodigy", "start_learning_rate": 1.0, "use_ema": True, "gradient_accumulation_steps": 2}, 4),
    ],
)
def test_arrays_of_the_trained_parameters_are_added(settings, arrays):
    assert added(use_lora=False, **settings) == pytest.approx(arrays * UNET_PARAMETERS["sd1"] * 4 / GB)
    of_lora = lora_parameters(made(), CONFIGS["sd1"])
    assert added(**settings) == pytest.approx(arrays * of_lora * 4 / GB)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_optimizer_has_its_number_of_arrays(name):
    rate = {"start_learning_rate": 1.0} if name == "prodigy" else {}
    groups = make_optimizer(made(optim=name, **rate)).groups
    assert OPTIMIZER_ARRAYS[name] == len([group for group in groups if group not in ("row", "column")])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"lora_rank": 8, "lora_targets": ["all"]},
        {"lora_targets": ["to_q", "attn2.to_v"]},
        {"lora_ft_text_encoder": True, "lora_targets": ["all"]},
        {"lora_ft_unet": False, "lora_ft_text_encoder": True},
        {"algo": "dora", "conv_dim": 2},
        {"algo": "loha", "conv_dim": 3, "use_tucker": True, "lora_ft_text_encoder": True},
        {"algo": "lokr", "lora_targets": ["all"], "use_tucker": True, "dora_wd": True},
        {"algo": "lokr", "lora_rank": 8, "factor": 4, "conv_dim": 64},
    ],
)
@pytest.mark.parametrize("model", ["nano", "mnist"])
def test_the_parameters_of_a_lora_are_counted_before_it_is_built(model, given):
    settings = made(**given)
    network = build_model(CONFIGS[model], random=False)
    inject_lora(network, make_lora_spec(settings))
    assert lora_parameters(settings, CONFIGS[model]) == sum(p.size for p in network.trainable_params())


def test_a_larger_lora_adds_itself_its_gradients_and_its_moments(tmp_path):
    count = lora_parameters(made(), CONFIGS["sd1"])
    assert added(lora_rank=64) == pytest.approx(15 * count * 4 * 4 / GB)
    assert estimated(lora_rank=64).seconds == estimated().seconds
    assert any("layers other than all of attention" in note for note in estimated(lora_targets=["all"]).notes)
    assert any("text encoder's own" in note for note in estimated(lora_ft_text_encoder=True).notes)
    assert any("layers other than all of attention" in note for note in estimated(conv_dim=4).notes)
    assert any("LoHa, LoKr and DoRA take" in note for note in estimated(dora_wd=True).notes)
    (tmp_path / "modules.json").write_text("{}")
    modules = str(tmp_path / "modules.json")
    assert any("ranks of lora_config" in note for note in estimated(lora_config=modules).notes)


# What was not measured


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("mnist", {"image_size": 32}, "the architecture custom. There are figures of sd1, sd2, nano"),
        ("nano", {"use_lora": False}, "full fine-tuning of the nano model"),
        ("sd1", {"device_target": "Ascend"}, "training on Ascend"),
        ("sd1", {"precision": "fp16"}, "training in fp16"),
        ("sd2", {"precision": "fp16"}, "training in fp16"),
        ("sd1", {"lora_ft_unet": False, "lora_ft_text_encoder": True}, "a LoRA of the text encoder alone"),
        ("sd1", {"use_lora": False, "placeholder_token": "<x>"}, "textual inversion without a LoRA"),
    ],
)
def test_what_was_not_measured_gets_no_figure(model, settings, words):
    settings = made(**settings)
    found = estimate(settings, CONFIGS[model])
    assert (found.memory_gb, found.seconds) == (None, None)
    lines = report(found, settings, 1.0, 2)
    assert line_with(lines, f"not measured: {words}")
    assert not any(re.search(r"\d GB|\d s\b", line) for line in lines)


def test_bf16_takes_half_of_the_held_weights_off_and_says_that_the_time_is_that_of_fp32():
    found, in_fp32 = estimated("nano", precision="bf16"), estimated("nano")
    network = build_model(CONFIGS["nano"], random=False)
    set_up_sampling(network, ms.bfloat16, False)
    held = sum(p.size for p in network.get_parameters() if p.dtype == ms.bfloat16)
    assert in_fp32.memory_gb - found.memory_gb == pytest.approx(2 * held / GB, rel=1e-2)
    assert found.seconds == in_fp32.seconds
    assert any(note.startswith("bf16: ") and "the time is that of fp32" in note for note in found.notes)
    assert not any("bf16" in note for note in in_fp32.notes)


def test_a_text_encoder_that_is_computed_twice_keeps_its_weights():
    sizes = [
        estimated("nano", precision=kind, lora_ft_text_encoder=True, gradient_checkpointing=True).memory_gb
        for kind in ("fp32", "bf16")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(2 * unet_parameters(**CONFIGS["nano"].unet) / GB)


@pytest.mark.parametrize("expected", [True, False])
def test_auto_is_estimated_as_what_it_is_expected_to_be(monkeypatch, expected):
    monkeypatch.setattr("ldm.training.estimate.kernels_are_expected_to_multiply_bf16", lambda: expected)
    found, given = (estimated("nano", precision=name) for name in ("auto", "bf16" if expected else "fp32"))
    assert found.memory_gb == given.memory_gb
    assert any("precision auto is expected to be bf16" in note for note in found.notes) == expected
    assert not any("expected" in note for note in given.notes)
    in_pynative = [estimated("nano", mode=1, precision=name).memory_gb for name in ("auto", "fp32")]
    assert in_pynative[0] == in_pynative[1]


def test_bf16_that_a_training_refuses_gets_no_estimate(tmp_path):
    with pytest.raises(UserError, match="bf16 is for graph mode"):
        made(precision="bf16", mode=1)
    (tmp_path / "lora.json").write_text('{"to_q": {"r": 2}, "trainable_model": 1}')
    paths = dict(pretrained_model_path=NANO, data_path=str(tmp_path), lora_config=str(tmp_path / "lora.json"))
    with pytest.raises(UserError, match="trainable_model in lora_config trains them: use auto or fp32"):
        print_estimate(made(**paths, precision="bf16"))


def test_a_unet_of_other_sizes_gets_no_figure():
    config = dataclasses.replace(CONFIGS["sd1"], unet={**CONFIGS["sd1"].unet, "num_res_blocks": 1})
    found = estimate(made(), config)
    assert found.memory_gb is None and "859,520,964" in found.notes[0]


def test_the_memory_of_sd2_is_scaled_and_said_to_be():
    found, of_sd1 = estimated("sd2"), estimated("sd1")
    scale = unet_parameters(**CONFIGS["sd2"].unet) / UNET_PARAMETERS["sd1"]
    assert found.parts[0].gb == pytest.approx(scale * of_sd1.parts[0].gb) and found.seconds is None
    difference = text_parameters(**CONFIGS["sd2"].text) - text_parameters(**CONFIGS["sd1"].text)
    assert found.parts[1].gb - of_sd1.parts[1].gb == pytest.approx(difference * 4 / GB)
    lines = report(found, made(), 100.0, 2)
    assert line_with(lines, "not measured: Stable Diffusion 2.x. The memory is scaled")
    assert not any(line.startswith("time") for line in lines)


def test_an_image_size_that_the_model_does_not_take_is_refused():
    with pytest.raises(UserError, match="image_size 100 must be a multiple of 64"):
        estimated(pixels=100)


# What is printed


def test_the_lines_have_the_machine_the_run_and_the_way_out():
    settings = made(image_size=512, max_steps=1000)
    found = estimate(settings, CONFIGS["sd1"])
    lines = report(found, settings, 8.0, 3)
    assert "about 39 s a step on one core" in line_with(lines, "time:") and "has 3 cores" in line_with(lines, "time:")
    assert "about 10.9 hours" in line_with(lines, "the whole run, 1,000 steps")
    warning = line_with(lines, "warning: 10 GB are more than the 8 GB of this machine")
    for way in ("gradient_checkpointing", "train_batch_size with more gradient_accumulation_steps", "image_size"):
        assert way in warning
    assert not any("warning" in line for line in report(found, settings, 100.0, 3))
    without_steps = dataclasses.replace(found, steps=None)
    assert "follows from the data" in line_with(report(without_steps, settings, 100.0, 3), "the whole run")


def test_ways_out_that_are_taken_are_not_offered():
    settings = made(gradient_checkpointing=True, train_batch_size=1, use_lora=False)
    warning = report(estimate(settings, CONFIGS["sd1"]), settings, 1.0, 2)[-1]
    assert "gradient_checkpointing" not in warning and "train_batch_size" not in warning
    assert "train a LoRA (use_lora)" in warning and "image_size" in warning


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"--max_steps 1000 --estimate True\n(.*?)```", page, re.DOTALL)
    settings = made(image_size=512, max_steps=1000)
    assert report(estimate(settings, CONFIGS["sd1"]), settings, 23.5, 2) == shown.splitlines()


@pytest.fixture
def no_data(tmp_path):
    """A folder without a data set: one that is read is refused."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def flags(tmp_path, no_data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("use_lora: True\nimage_size: 64\ntrain_batch_size: 16\nestimate: True\n")
    paths = {"train_config": recipe, "data_path": no_data, "output_path": tmp_path / "run",
             "pretrained_model_path": NANO}  # fmt: skip
    return [f"--{name}={path}" for name, path in paths.items()]


SCRIPT = "import sys, train_text_to_image\ntrain_text_to_image.main()\nprint('mindspore' in sys.modules)"


@pytest.mark.parametrize("command", [["train_text_to_image.py"], ["-c", SCRIPT]], ids=["script", "without MindSpore"])
def test_the_script_prints_and_ends_and_writes_nothing(tmp_path, no_data, command):
    measured = ["--device_target=CPU", "--precision=fp32"]
    arguments = [sys.executable, *command, *flags(tmp_path, no_data), *measured, "--max_steps=10"]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert lines[0] == "estimate: LoRA of rank 4 of the nano model, 64 x 64 pixels, batch 16"
    cores = len(os.sched_getaffinity(0))
    assert "about 0.28 s" in line_with(lines, "time:") and f"has {cores} core" in line_with(lines, "time:")
    assert line_with(lines, "the whole run, 10 steps: about 2.8 s")
    assert command[0] != "-c" or lines[-1] == "False"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "recipe.yaml"] and not list(no_data.iterdir())


def test_a_missing_base_model_is_the_usual_error(tmp_path, no_data):
    arguments = [*flags(tmp_path, no_data), "--pretrained_model_path=nowhere.ckpt"]
    run = subprocess.run(
        [sys.executable, "train_text_to_image.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2 and "error: pretrained_model_path nowhere.ckpt does not exist" in run.stderr


def test_in_python_train_returns_the_output_path_and_does_not_create_it(tmp_path, no_data, capsys):
    settings = made(
        data_path=str(no_data), pretrained_model_path=NANO, output_path=str(tmp_path / "run"), estimate=True
    )
    assert train(settings) == tmp_path / "run" and not (tmp_path / "run").exists()
    assert capsys.readouterr().out.startswith("estimate: LoRA of rank 4 of the nano model")


@pytest.mark.parametrize("of_process", [{"MS_ROLE": "MS_SCHED"}, {"MS_ROLE": "MS_WORKER", "RANK_ID": "1"}])
def test_only_the_first_process_prints(of_process, no_data, tmp_path, capsys, monkeypatch):
    for name, value in of_process.items():
        monkeypatch.setenv(name, value)
    print_estimate(made(data_path=str(no_data), pretrained_model_path=NANO, output_path=str(tmp_path / "run")))
    assert capsys.readouterr().out == ""
