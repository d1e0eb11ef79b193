"""Setting up a run: what is built, and that mistakes are found before the data is encoded."""

from __future__ import annotations

import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
import yaml

from ldm.diffusion.loss import DiffusionLoss
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.lora.formats import write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.settings.loss import LossSettings
from ldm.settings.model import load_model_config
from ldm.training.trainer import train
from ldm.weights.checkpoint import read_checkpoint, write_checkpoint
from tests.training.micro import FULL, MICRO, ROOT, UNET, prepare, write_velocity_config


def is_encoded(output) -> bool:
    return any(output.glob("cache/*/*.npy"))


def test_a_lora_starts_from_a_given_one_in_any_format(settings, empty_run, tmp_path):
    config = load_model_config(MICRO)
    given = build_model(config)
    inject_lora(given, LoRASpec(rank=2, alpha=6.0, seed=5))
    for parameter in given.trainable_params():
        parameter.set_data(ms.Tensor(np.random.standard_normal(parameter.shape).astype(np.float32)))
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(path, get_lora(given), "diffusers", config)
    run = prepare(settings(empty_run, use_lora=True, lora_rank=2, max_steps=2, lora_init_path=path))
    layers, expected = get_lora(run.model).layers, get_lora(given).layers
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert layer.alpha == 2.0  # the run's own
        np.testing.assert_allclose(layer.update(), expected[name].update(), rtol=1e-5, atol=1e-5)


def test_the_steps_loss_is_that_of_the_settings(settings, tmp_path, monkeypatch):
    made = []

    def recorded(*arguments):
        made.append(DiffusionLoss(*arguments))
        return made[-1]

    monkeypatch.setattr("ldm.training.setup.DiffusionLoss", recorded)
    config = write_velocity_config(tmp_path / "velocity.yaml")
    given = dict(use_lora=True, zero_terminal_snr=True, min_snr_gamma=5.0, loss_type="huber")
    prepare(settings(tmp_path / "run", model_config=config, **given))
    [loss] = made
    of_loss = LossSettings(zero_terminal_snr=True, min_snr_gamma=5.0, loss_type="huber")
    expected = DiffusionLoss(loss.unet, NoiseSchedule(zero_terminal_snr=True), "v_prediction", of_loss)
    assert loss.sqrt_alphas.asnumpy()[-1] == 0.0
    for name in ("sqrt_alphas", "sqrt_one_minus_alphas", "thresholds", "factors"):
        np.testing.assert_array_equal(getattr(loss, name).asnumpy(), getattr(expected, name).asnumpy(), err_msg=name)


def test_zero_terminal_snr_is_refused_where_a_models_file_would_not_say_so(settings, tmp_path):
    config = write_velocity_config(tmp_path / "velocity.yaml")
    modules = tmp_path / "modules.json"
    modules.write_text('{"to_q": {"r": 2}, "trainable_model": true}')
    given = dict(model_config=config, zero_terminal_snr=True)
    with pytest.raises(UserError, match="zero_terminal_snr does not go with trainable_model"):
        prepare(settings(tmp_path / "beside", use_lora=True, lora_config=str(modules), **given))
    with pytest.raises(UserError, match="zero_terminal_snr needs use_lora"):
        settings(tmp_path / "whole", **given)


def test_a_random_unet_needs_no_unet_in_the_checkpoint(settings, empty_run, micro_base_model, tmp_path):
    arrays, _ = read_checkpoint(micro_base_model)
    parts = tmp_path / "parts.safetensors"
    write_checkpoint(parts, {name: array for name, array in arrays.items() if not name.startswith(UNET)})
    drawn = []
    for seed in (1, 1, 2):
        run = prepare(settings(empty_run, pretrained_model_path=parts, unet_initialize_random=True, seed=seed))
        parameters = run.model.parameters_dict()
        drawn.append(parameters[f"{UNET}out.2.weight"].asnumpy())
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(
        parameters["first_stage_model.quant_conv.weight"].asnumpy(), arrays["first_stage_model.quant_conv.weight"]
    )
    with pytest.raises(UserError, match="UNet"):
        prepare(settings(empty_run, pretrained_model_path=parts))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(data_path=None), "--data_path is needed: give the data set"),
        (dict(pretrained_model_path=None), "--pretrained_model_path is needed"),
        (dict(pretrained_model_path="nowhere.ckpt"), "nowhere.ckpt does not exist: give"),
        (dict(output_path=str(ROOT / "README.md")), "output_path: .* cannot be a folder"),
        (dict(data_path="nowhere"), "nowhere"),
        (dict(model_config="nowhere.yaml"), "nowhere.yaml"),
        (dict(image_size=15), "image_size 15 must be a multiple of 2"),
        (dict(train_batch_size=50), "train_batch_size"),
        (dict(max_timestep=1001), "max_timestep 1001 is above the 1000 time steps"),
        (dict(min_timestep=1000), "min_timestep 1000 must be below max_timestep, which is 1000"),
        (dict(min_timestep=300, max_timestep=300), "min_timestep 300 must be below max_timestep"),
        (
            dict(use_lora=True, zero_terminal_snr=True),
            "zero_terminal_snr is for models that predict velocity, and .*micro.yaml",
        ),
        (dict(caption_column="caption"), "caption"),
        (dict(enable_flash_attention=True), "needs an Ascend device"),
        (dict(dataset_sink_mode=True), "needs an Ascend device"),
        (dict(use_parallel=True), "msrun"),
        (dict(use_lora=True, lora_targets=["to_nowhere"]), "to_nowhere"),
        (dict(use_lora=True, lora_rank=1000), "lora_rank 1000"),
        (dict(use_lora=True, lora_init_path="nowhere.ckpt"), "nowhere.ckpt"),
        (dict(loss_scaler_type="dynamic", drop_overflow_update=False), "drop_overflow_update False"),
        (dict(precision="fp16", drop_overflow_update=False), "drop_overflow_update False"),
        (dict(model_config=str(ROOT / "tests" / "tiny.yaml")), "does not fit"),
    ],
)
def test_a_wrong_setting_is_named_before_the_data_is_encoded(settings, tmp_path, change, error):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=error):
        train(settings(output, **change))
    assert not (output / "ckpt").exists() and not is_encoded(output)


def test_a_base_model_that_predicts_velocity_is_refused_for_a_configuration_that_predicts_noise(
    settings, micro_base_model, tmp_path
):
    arrays, _ = read_checkpoint(micro_base_model)
    velocity = tmp_path / "velocity.safetensors"
    write_checkpoint(velocity, arrays, {"prediction_type": "v_prediction"})
    with pytest.raises(UserError, match="prediction_type is v_prediction, but .* has epsilon"):
        prepare(settings(tmp_path / "output", pretrained_model_path=velocity, **FULL))


@pytest.mark.parametrize(
    "file", ["log.txt", "metrics.csv", "validation.csv", "train_args.yaml", "report.html", "run.json", "ckpt"]
)
def test_a_file_that_cannot_be_written_is_named_before_the_data_is_encoded(settings, tmp_path, file):
    output = tmp_path / "run"
    output.mkdir()
    (output / file).symlink_to("nowhere/at/all")
    with pytest.raises(UserError, match=f"output_path.* {output / file} is a link"):
        train(settings(output))
    assert not is_encoded(output)


def test_two_trainings_do_not_share_a_folder_until_one_is_killed(settings, tmp_path, monkeypatch):
    output = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from ldm.files.outputs import claim_folder\n"
         "with claim_folder(sys.argv[1], 'output_path'): print('held', flush=True); time.sleep(60)", str(output)],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        for resume in (False, True):
            with pytest.raises(UserError, match=f"output_path {output} is in use by process {holder.pid} on"):
                train(settings(output, **FULL, resume=resume))
        assert [path.name for path in output.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.setattr("ldm.training.trainer.set_up", lambda *_: None)
    monkeypatch.setattr("ldm.training.trainer.run_steps", lambda run: "done")
    assert train(settings(output)) == "done" and not list(output.iterdir())


def test_an_inpainting_model_is_refused_by_name(settings, tmp_path):
    document = yaml.safe_load(MICRO.read_text(encoding="utf-8"))
    document["model"]["params"]["unet_config"]["params"]["in_channels"] = 9
    (tmp_path / "inpainting.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(UserError, match="is an inpainting model .9 input channels.*training does not support"):
        prepare(settings(tmp_path / "run", model_config=tmp_path / "inpainting.yaml"))
