"""The file to share: what a training writes beside lora.ckpt, and what it says."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ldm.lora.formats import read_lora
from ldm.lora.lora import LoRA
from ldm.lora.products import LoHa
from ldm.lora.updates import DoRA, Full, LoRALayer
from ldm.settings.model import load_model_config
from ldm.training import trainer
from ldm.training.sharing import describe_optimizer, first_start, fits_fp16, last_part
from ldm.training.training_state import TrainingState
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from ldm.weights.hashes import sshs_hashes
from tests.lora.test_metadata import KOHYA
from tests.training.micro import MICRO, prepare

# Of ecosystem's list, what ldm.lora.formats.kohya writes of the network.
OF_NETWORK = {"network_module", "network_dim", "network_alpha"}
OF_TIME = {"ss_training_finished_at", "modelspec.date"}
LORA = dict(use_lora=True, lora_rank=2, max_steps=6, start_learning_rate=1e-2, report_to=[])


def texts_of(path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        return file.metadata()


def saved(run, *steps):
    """Save at steps without training, and return the metadata of the newest file."""
    for run.status.steps_done in steps:
        trainer.save(run)
    return texts_of(run.output / "ckpt" / f"{run.settings.share_name}.safetensors")


@pytest.fixture(scope="module")
def trained(shared_run):
    return shared_run / "ckpt"


def test_each_checkpoint_has_the_same_lora_beside_it(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"style.safetensors", "style-step00000003.safetensors", "style-step00000006.safetensors"} <= names
    assert (trained / "style.safetensors").samefile(trained / "style-step00000006.safetensors")
    config = load_model_config(MICRO)
    for name, ckpt in (("style-step00000003", "lora-00000003"), ("style", "lora")):
        theirs = read_lora(trained / f"{name}.safetensors", config)
        ours = read_lora(trained / f"{ckpt}.ckpt", config)
        assert theirs.layers.keys() == ours.layers.keys() and theirs.metadata == ours.metadata
        for layer, found in theirs.layers.items():
            for factor in ("down", "up"):
                ours_factor, factor_here = getattr(ours.layers[layer], factor), getattr(found, factor)
                np.testing.assert_array_equal(factor_here.ravel(), ours_factor.ravel())
    assert not ours.file_metadata  # the .ckpt says what it said before


def test_it_says_all_that_kohyas_files_say(trained):
    texts = texts_of(trained / "style.safetensors")
    found = {key[3:] for key in texts if key.startswith("ss_")}
    # network_args tells kernels that are larger than 1x1, v2 and base_model_version are of SD1.x and SD2.x alone.
    assert found == KOHYA | OF_NETWORK | {"network_args"}
    expected = dict(
        output_name="style", num_train_images="10", num_reg_images="0", num_validation_images="0", epoch="2", steps="6",
        num_batches_per_epoch="5", num_epochs="2", max_train_steps="6", seed="42", training_comment="a test",
        learning_rate="0.01", unet_lr="None", optimizer="AdamW(betas=[0.9, 0.999],weight_decay=0.01,eps=1e-08)",
        lr_scheduler="constant", max_grad_norm="0.0", mixed_precision="no", batch_size_per_device="2",
        total_batch_size="2", resolution="(16, 16)", network_module="networks.lora", network_dim="2", network_alpha="2",
        sd_model_name="micro.safetensors", bucket_info="null", network_dropout="None",
    )  # fmt: skip
    assert {key: texts[f"ss_{key}"] for key in expected} == expected
    assert float(texts["ss_training_started_at"]) < float(texts["ss_training_finished_at"]) <= time.time()
    assert json.loads(texts["ss_tag_frequency"]) == {
        "captioned": {"blue": 10, "a square": 10, **{f"number {i}": 1 for i in range(10)}}
    }
    assert json.loads(texts["ss_dataset_dirs"]) == {"captioned": {"n_repeats": 1, "img_count": 10}}
    assert json.loads(texts["ss_reg_dataset_dirs"]) == {}
    assert texts["modelspec.title"] == "Blue squares" and texts["modelspec.trigger_phrase"] == "blue"
    assert texts["modelspec.resolution"] == "16x16" and len(texts["modelspec.date"]) == 19
    assert not any("sd-scripts" in text or key.startswith("ss_sd_scripts") for key, text in texts.items())


def test_its_hashes_are_those_of_its_content(trained):
    for name in ("style-step00000003", "style"):
        arrays, texts = read_checkpoint(trained / f"{name}.safetensors")
        assert sshs_hashes(arrays, texts).items() <= texts.items()


def test_nothing_in_it_tells_of_the_machine(trained, shared_run):
    content = (trained / "style.safetensors").read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    private = [str(shared_run.parent), *shared_run.parts[1:-1], os.path.expanduser("~"), os.uname().nodename]
    private += [getpass.getuser(), str(Path(__file__).parents[2])]
    for text in private:
        if len(text) > 3:  # a shorter name is in any text
            assert text.encode() not in header, text
    assert b"passport.data" in header


def test_a_resumed_run_writes_the_same_file_but_for_its_date(trained, shared_run, shared_settings, tmp_path):
    output = tmp_path / "resumed"
    (output / "ckpt").mkdir(parents=True)
    for name in ("state-00000003.safetensors", "style-step00000003.safetensors"):
        shutil.copy(trained / name, output / "ckpt")
    (output / "cache").symlink_to(shared_run / "cache")
    trainer.train(shared_settings(output, resume=True))
    for name in ("style-step00000006", "style"):
        (arrays, texts), (expected, said) = (
            read_checkpoint(folder / f"{name}.safetensors") for folder in (output / "ckpt", trained)
        )
        assert list(arrays) == list(expected)
        assert all(array.tobytes() == expected[key].tobytes() for key, array in arrays.items())
        assert list(texts) == list(said) and {key for key in texts if texts[key] != said[key]} <= OF_TIME
        assert texts["ss_training_finished_at"] != said["ss_training_finished_at"]


def test_the_first_start_is_that_of_any_file_to_share_that_can_be_read_and_else_now(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.sharing.time.time", lambda: 7.0)
    state = TrainingState(6, {}, {}, {}, tmp_path / "state-00000006.safetensors")
    assert first_start(None) == first_start(state) == 7.0
    (tmp_path / "style-step00000006.safetensors").write_bytes(b"damaged")
    write_checkpoint(tmp_path / "x-step00000001.safetensors", {}, {"ss_training_started_at": "nan"})
    assert first_start(state) == 7.0
    shutil.copy(trained / "style-step00000003.safetensors", tmp_path)
    assert first_start(state) == float(texts_of(trained / "style.safetensors")["ss_training_started_at"])
    write_checkpoint(tmp_path / "x-step00000006.safetensors", {}, {"ss_training_started_at": "5.5"})
    assert first_start(state) == 5.5  # the one that was written with the state


def test_the_same_seed_gives_the_same_hash_and_another_seed_another(settings, tmp_path):
    runs = [settings(tmp_path / str(number), **LORA, seed=seed) for number, seed in enumerate((1, 1, 2))]
    hashes = [saved(prepare(run), 1)["sshs_model_hash"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_metadata_only_what_loading_needs_is_left(settings, tmp_path):
    run = prepare(settings(tmp_path, **LORA, no_metadata=True, save_precision="fp16", output_name="a"))
    texts = saved(run, 1, 2)
    assert texts.keys() == {
        *(f"ss_{name}" for name in OF_NETWORK), "architecture", "prediction_type", "sshs_model_hash",
        "sshs_legacy_hash",
    }  # fmt: skip
    arrays, _ = read_checkpoint(tmp_path / "ckpt" / "a.safetensors")
    assert {array.dtype for name, array in arrays.items() if ".lora_" in name} == {np.dtype(np.float16)}


def test_without_the_file_to_share_the_ckpt_is_the_same(settings, tmp_path):
    saved(prepare(settings(tmp_path / "with", **LORA)), 1)
    run = prepare(settings(tmp_path / "run", **LORA, save_model_as="ckpt"))
    run.status.steps_done = 1
    trainer.save(run)
    assert {path.name for path in (tmp_path / "run" / "ckpt").iterdir() if not path.name.startswith(".")} == {
        "lora.ckpt", "lora-00000001.ckpt", "state-00000001.safetensors", "files.json"
    }  # fmt: skip
    names = ("lora.ckpt", "lora-00000001.ckpt")
    for name in names:
        assert (tmp_path / "run" / "ckpt" / name).read_bytes() == (tmp_path / "with" / "ckpt" / name).read_bytes()


def test_it_is_pruned_with_the_checkpoint_of_its_step_also_under_another_name(settings, tmp_path):
    saved(prepare(settings(tmp_path, **LORA, ckpt_max_keep=2)), 1, 2)
    run = prepare(settings(tmp_path, **{**LORA, "ckpt_max_keep": 2, "output_name": "new", "resume": True}))
    saved(run, 3)
    assert {path.name for path in (tmp_path / "ckpt").glob("*-step*")} == {
        "lora-step00000002.safetensors", "new-step00000003.safetensors"
    }  # fmt: skip


def test_subsets_buckets_and_class_images(settings, micro_data, tmp_path):
    """kohya's folders, one of them with class images, in buckets."""
    for name, count in (("3_blue cat", 4), ("1_cat", 2)):
        folder = tmp_path / ("img" if name.startswith("3") else "reg") / name
        folder.mkdir(parents=True)
        for i in range(count):
            shutil.copy(micro_data / f"{i}.png", folder / f"{i}.png")
    (tmp_path / "data.toml").write_text(
        f"""[[datasets]]
        resolution = 16
        enable_bucket = true
        min_bucket_reso = 8
        max_bucket_reso = 32
        bucket_reso_steps = 8
        [[datasets.subsets]]
        image_dir = '{tmp_path}/img/3_blue cat'
        class_tokens = 'blue cat, Sitting'
        num_repeats = 3
        [[datasets.subsets]]
        image_dir = '{tmp_path}/reg/1_cat'
        class_tokens = 'cat'
        is_reg = true
        """
    )
    texts = saved(prepare(settings(tmp_path / "run", **LORA, **{"data_path": str(tmp_path / "data.toml")})), 1)
    assert json.loads(texts["ss_dataset_dirs"]) == {"3_blue cat": {"n_repeats": 3, "img_count": 4}}
    assert json.loads(texts["ss_reg_dataset_dirs"]) == {"1_cat": {"n_repeats": 1, "img_count": 2}}
    assert json.loads(texts["ss_tag_frequency"]) == {"3_blue cat": {"blue cat": 4, "sitting": 4}}
    assert (texts["ss_num_train_images"], texts["ss_num_reg_images"]) == ("12", "12")
    assert (texts["ss_enable_bucket"], texts["ss_min_bucket_reso"]) == ("True", "8")
    (bucket,) = json.loads(texts["ss_bucket_info"])["buckets"].values()
    assert bucket == {"resolution": [16, 16], "count": 24}
    assert str(tmp_path) not in str(texts)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/me/10_cat", "10_cat"), ("data/10_cat/", "10_cat"), ("a/..", None), (".", None), ("x.ckpt", "x.ckpt")],
)
def test_of_a_path_the_last_part_alone_is_told(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert last_part(path) == (tmp_path.name if expected is None else expected)


def test_the_optimizer_has_kohyas_name(settings, tmp_path):
    found = describe_optimizer(settings(tmp_path, **LORA, optim="lion", optimizer_args=["betas=0.9,0.98"]))
    assert found == "Lion(betas=[0.9, 0.98],weight_decay=0.0)"


@pytest.mark.parametrize(
    ("value", "fits"), [(0.0, True), (1e-4, True), (65504.0, True), (65520.0, False), (1e-8, False)]
)
def test_values_that_fp16_loses_are_noticed(value, fits):
    layer = LoRALayer(np.full((1, 2), value, np.float32), np.zeros((2, 1), np.float32), 1.0)
    assert fits_fp16(LoRA({"a": layer})) == fits


@pytest.mark.parametrize("value, fits", [(1.0, True), (1e6, False), (1e-12, False)])
def test_values_of_all_kinds_and_tokens_are_looked_at(value, fits):
    array = np.full((4, 2), value, np.float32)
    pair = LoRALayer(np.ones((2, 4), np.float32), np.ones((4, 2), np.float32), 2.0)
    loha = {"hada_w1_a": array, "hada_w1_b": pair.down, "hada_w2_a": pair.up, "hada_w2_b": pair.down}
    for lora in (
        LoRA({"a": LoHa(loha, 1.0)}), LoRA({"a": DoRA(pair, array[:, 0])}), LoRA({"a": pair}, {}, {"cat": array}),
        LoRA({"a": pair}, {}, {}, {"a": Full(array[:, 0], "diff_b")}),
    ):  # fmt: skip
        assert fits_fp16(lora) == fits


def test_a_lora_that_fp16_does_not_hold_is_saved_in_float_with_a_warning(settings, tmp_path, caplog):
    run = prepare(settings(tmp_path, **LORA, save_precision="fp16", log_level="WARNING"))
    state = run.step.state()
    run.step.load_state({key: array + np.float32(1e5 if key.startswith("p.") else 0) for key, array in state.items()})
    saved(run, 1)
    arrays, _ = read_checkpoint(tmp_path / "ckpt" / "lora.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    assert "fp16 does not hold" in caplog.text or "fp16 does not hold" in (tmp_path / "log.txt").read_text()
