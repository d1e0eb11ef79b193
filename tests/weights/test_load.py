"""A base checkpoint is loaded whole or not at all, and what is wrong with it is said with its counts."""

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from ldm.errors import UserError
from ldm.generation.loading import load_model, set_up_sampling
from ldm.generation.pipeline import Pipeline
from ldm.lora.inject import inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.layers import set_compute_dtype
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.load import load_base_model, load_component
from ldm.weights.names import mindone
from ldm.weights.names.compvis import ema_name
from tests.weight_names import to_diffusers
from tests.weights.file_formats.torch_files import write_torch

TINY = Path(__file__).parent.parent / "tiny.yaml"
QUANT = "first_stage_model.quant_conv.bias"
TO_K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CONV_IN, CONV_OUT = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight"
TEXT = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def config():
    return load_model_config(TINY)


@pytest.fixture(scope="module")
def model(config):
    np.random.seed(0)
    return build_model(config)


@pytest.fixture(scope="module")
def weights(config):
    np.random.seed(1)
    return {p.name: p.asnumpy().copy() for p in build_model(config).get_parameters()}


@pytest.fixture(autouse=True)
def same_model_for_every_test(request):
    """The model is built once; each test finds it with the weights that it was built with."""
    model = request.getfixturevalue("model")
    before = arrays_of(model)
    yield
    for parameter in model.get_parameters():
        if not np.array_equal(parameter.asnumpy(), before[parameter.name]):
            parameter.set_data(type(parameter.value())(before[parameter.name]))


def arrays_of(model):
    return {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}


def save(path, weights, metadata=None):
    write_checkpoint(path, weights, metadata)
    return path


def refused(model, path, **options):
    """The message of the refusal; the model must be as it was."""
    before = arrays_of(model)
    with pytest.raises(UserError) as caught:
        load_base_model(model, path, **options)
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(array, before[name])
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


class TestLoading:
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_every_parameter_becomes_the_files(self, model, weights, tmp_path, suffix):
        report = load_base_model(model, save(tmp_path / f"base{suffix}", weights))
        assert report.ok and sum(part.matched for part in report.components.values()) == len(weights)
        for name, array in arrays_of(model).items():
            np.testing.assert_array_equal(array, weights[name])

    def test_half_precision_files_become_fp32_parameters(self, model, weights, tmp_path):
        halved = {name: array.astype(np.float16) for name, array in weights.items()}
        load_base_model(model, save(tmp_path / "base.safetensors", halved))
        loaded = arrays_of(model)[TO_K]
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, halved[TO_K].astype(np.float32))

    def test_linear_layers_fill_1x1_convolutions(self, model, weights, tmp_path):
        name = "first_stage_model.encoder.mid.attn_1.q.weight"
        flat = {**weights, name: weights[name].reshape(weights[name].shape[:2])}
        assert load_base_model(model, save(tmp_path / "base.ckpt", flat)).ok
        np.testing.assert_array_equal(arrays_of(model)[name], weights[name])

    def test_unused_keys_are_counted_by_reason(self, model, weights, tmp_path):
        more = {**weights, "betas": np.zeros(3), "alphas_cumprod": np.zeros(3), "model_ema.decay": np.zeros(1)}
        report = load_base_model(model, save(tmp_path / "base.ckpt", more))
        assert report.ignored == {"noise schedule": 2, "EMA copy": 1}
        assert "2 (noise schedule)" in str(report)

    def test_parameters_that_were_not_drawn_are_zeros_until_then(self, config, weights, tmp_path):
        empty = build_model(config, random=False)
        assert not arrays_of(empty)[TO_K].any() and arrays_of(empty)[TO_K].shape == weights[TO_K].shape
        load_base_model(empty, save(tmp_path / "base.ckpt", weights))
        for name, array in arrays_of(empty).items():
            np.testing.assert_array_equal(array, weights[name])

    def test_the_moving_averages_where_they_are_asked_for(self, model, weights, tmp_path):
        averages = {ema_name(name): array + 1 for name, array in weights.items() if name.startswith("model.")}
        path = save(tmp_path / "base.ckpt", {**weights, **averages})
        report = load_base_model(model, path, ema=True)
        assert report.ignored == {"weight that has an EMA copy": 286}
        loaded = arrays_of(model)
        np.testing.assert_array_equal(loaded[TO_K], weights[TO_K] + 1)
        np.testing.assert_array_equal(loaded[QUANT], weights[QUANT])

    def test_one_component_alone(self, model, weights, tmp_path):
        before = arrays_of(model)
        report = load_base_model(model, save(tmp_path / "base.ckpt", weights), components=["unet"])
        assert list(report.components) == ["unet"]
        assert set(report.ignored) == {"VAE, not asked for", "text encoder, not asked for"}
        after = arrays_of(model)
        np.testing.assert_array_equal(after[TO_K], weights[TO_K])
        np.testing.assert_array_equal(after[QUANT], before[QUANT])

    def test_a_file_with_one_component_fills_it(self, model, weights, tmp_path):
        unet = {name: array for name, array in weights.items() if name.startswith("model.")}
        path = save(tmp_path / "unet.ckpt", unet)
        assert load_base_model(model, path, components=["unet"]).ok
        assert "it holds no VAE and no text encoder" in refused(model, path)

    def test_injected_factors_are_no_part_of_a_base(self, config, weights, tmp_path):
        model = build_model(config)
        inject_lora(model, LoRASpec())
        assert load_base_model(model, save(tmp_path / "base.ckpt", weights)).ok
        np.testing.assert_array_equal(arrays_of(model)[TO_K], weights[TO_K])

    def test_the_compute_type_does_not_change_the_parameters(self, config, weights, tmp_path):
        model = build_model(config)
        set_compute_dtype(model, ms.float16)
        load_base_model(model, save(tmp_path / "base.ckpt", weights))
        np.testing.assert_array_equal(arrays_of(model)[TO_K], weights[TO_K])


VAE = "first_stage_model."


class TestSeparateVAE:
    """vae_ckpt_path replaces the VAE of a base model, or supplies a missing one."""

    @pytest.fixture
    def bare(self, weights, tmp_path):
        """A base model without a VAE."""
        arrays = {name: array for name, array in weights.items() if not name.startswith(VAE)}
        return save(tmp_path / "bare.safetensors", arrays)

    @pytest.fixture(params=["single file", "its training's file", "of a folder", "folder", "whole model", "mindone's"])
    def other(self, request, weights, config, tmp_path):
        """A file or folder with another VAE, and its parameters."""
        parameters = {name: array + 1 for name, array in weights.items() if name.startswith(VAE)}
        single = {name[len(VAE) :]: array for name, array in parameters.items()}
        if request.param == "single file":
            path = save(tmp_path / "vae.safetensors", single)
        elif request.param == "its training's file":  # such as vae-ft-mse-840000-ema-pruned.ckpt
            more = {"loss.logvar": np.zeros(1), "loss.discriminator.main.0.weight": np.zeros(1), "model_ema.decay":
                    np.zeros(1)}  # fmt: skip
            path = tmp_path / "vae.ckpt"
            write_torch(path, {"epoch": 1, "state_dict": {**single, **more}})
        elif request.param == "of a folder":
            path = save(tmp_path / "diffusion_pytorch_model.safetensors", to_diffusers(parameters, config)[1])
        elif request.param == "folder":
            path = tmp_path / "vae"
            path.mkdir()
            (path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
            save(path / "diffusion_pytorch_model.safetensors", to_diffusers(parameters, config)[1])
        elif request.param == "whole model":
            said = {"architecture": "sd2", "prediction_type": "v_prediction"}  # of its UNet, which is not taken
            path = save(tmp_path / "other.safetensors", {**weights, **parameters}, said)
        else:
            made = mindone.layout({name: array.shape for name, array in {**weights, **parameters}.items()})
            arrays = {name: np.concatenate([{**weights, **parameters}[part] for part in how.names])
                      for name, how in made.items()}  # fmt: skip
            path = save(tmp_path / "other.ckpt", arrays)
        return path, parameters

    def test_completes_a_base_model_without_one(self, config, weights, bare, other):
        path, parameters = other
        loaded = arrays_of(load_model(config, bare, vae=path))
        for name, array in {**weights, **parameters}.items():
            np.testing.assert_array_equal(loaded[name], array)

    def test_replaces_that_of_the_base_model(self, config, weights, tmp_path):
        single = {name[len(VAE) :]: array + 1 for name, array in weights.items() if name.startswith(VAE)}
        base, vae = save(tmp_path / "base.safetensors", weights), save(tmp_path / "vae.safetensors", single)
        loaded = arrays_of(load_model(config, base, vae=vae))
        np.testing.assert_array_equal(loaded[QUANT], weights[QUANT] + 1)
        np.testing.assert_array_equal(loaded[TO_K], weights[TO_K])

    def test_is_asked_for_where_there_is_none(self, config, bare):
        with pytest.raises(UserError, match="it holds no VAE .*; give --vae_ckpt_path with one, such as vae-ft-mse"):
            load_model(config, bare)

    @pytest.mark.parametrize("component", ["unet", "vae"])
    def test_a_file_with_another_network(self, model, config, weights, tmp_path, component):
        unet, vae, _ = to_diffusers(weights, config)
        path = save(tmp_path / "x.safetensors", vae if component == "unet" else unet)
        label = {"unet": "UNet", "vae": "VAE"}[component]
        with pytest.raises(UserError, match=f"x.safetensors holds no {label}: give a file or folder with one"):
            load_component(model, path, component, config)

    @pytest.mark.parametrize(
        "changed, words",
        [
            ({"encoder.conv_in.bias": None}, "VAE: 151 matched, 1 missing"),
            ({"refiner.bias": np.zeros(1)}, "1 unexpected"),
            ({"encoder.conv_in.bias": np.zeros(7)}, "1 of a wrong shape"),
        ],
    )
    def test_loading_is_strict(self, model, config, weights, tmp_path, changed, words):
        single = {name[len(VAE) :]: array for name, array in weights.items() if name.startswith(VAE)}
        single = {name: array for name, array in {**single, **changed}.items() if array is not None}
        with pytest.raises(UserError, match=words):
            load_component(model, save(tmp_path / "x.safetensors", single), "vae", config)

    def test_another_scaling_factor_is_refused(self, model, config, weights, tmp_path):
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "scaling_factor": 0.13025}')
        save(tmp_path / "diffusion_pytorch_model.safetensors", to_diffusers(weights, config)[1])
        with pytest.raises(UserError, match="a VAE with a scaling_factor of 0.13025, the model has 0.5"):
            load_component(model, tmp_path, "vae", config)


class TestSeparateUNet:
    def test_comes_from_a_diffusers_file_too(self, model, config, weights, tmp_path):
        path = save(tmp_path / "diffusion_pytorch_model.safetensors", to_diffusers(weights, config)[0])
        assert load_component(model, path, "unet", config).ok
        np.testing.assert_array_equal(arrays_of(model)[TO_K], weights[TO_K])

    def test_another_prediction_type_is_refused(self, model, config, weights, tmp_path):
        path = save(tmp_path / "unet.safetensors", weights, {"prediction_type": "v_prediction"})
        with pytest.raises(UserError, match="unet.safetensors says that its prediction_type is v_prediction"):
            load_component(model, path, "unet", config)


class TestPrecision:
    def test_the_vae_computes_in_fp32_where_the_rest_computes_in_fp16(self, config, weights, tmp_path):
        name = "first_stage_model.decoder.conv_in.weight"
        loud = save(tmp_path / "loud.ckpt", {**weights, name: weights[name] * 1e7})  # beyond fp16's 65504
        latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
        half, full = (load_model(config, loud) for _ in range(2))
        set_up_sampling(half, ms.float16, False)
        assert half.model.diffusion_model.time_embed[0].dtype == ms.float16
        drawn = Pipeline(half).decode(latents)
        np.testing.assert_array_equal(drawn, Pipeline(full).decode(latents))
        assert drawn.std() > 1


class TestRefusing:
    def test_counts_are_given_per_component(self, model, weights, tmp_path):
        bad = {**weights, TO_K: np.zeros((5, 5), np.float32), "model.diffusion_model.extra.weight": np.zeros(1)}
        del bad[QUANT]
        message = refused(model, save(tmp_path / "base.ckpt", bad))
        assert "UNet: 285 matched, 1 unexpected, 1 of a wrong shape" in message
        assert "VAE: 151 matched, 1 missing" in message
        assert "text encoder: 36 matched" in message

    def test_unknown_keys(self, model, weights, tmp_path):
        message = refused(model, save(tmp_path / "base.ckpt", {**weights, "refiner.step": np.zeros(1)}))
        assert (
            "other: 1 unexpected; for example refiner.step): remove the arrays that the networks do not have" in message
        )

    def test_another_architecture_is_named(self, model, weights, tmp_path):
        sd1 = {**weights, TO_K: np.zeros((32, 768), np.float32)}
        assert "SD1.x, and the model configuration describes a model with text embeddings of width 32" in refused(
            model, save(tmp_path / "b.ckpt", sd1)
        )
        sd2 = {**weights, TO_K: np.zeros((32, 1024), np.float32)}
        assert "SD2.x" in refused(model, save(tmp_path / "c.ckpt", sd2))

    def test_inpainting(self, model, weights, tmp_path):
        inpainting = {**weights, CONV_IN: np.zeros((32, 9, 3, 3), np.float32)}
        message = refused(model, save(tmp_path / "b.ckpt", inpainting))
        assert (
            "an inpainting model (its UNet takes 9 channels), and the model configuration is of no inpainting"
            in message
        )

    @pytest.mark.parametrize(
        "channels, words",
        [(8, "an InstructPix2Pix checkpoint (8 input channels)"), (5, "a depth-to-image"), (7, "an upscaling")],
    )
    def test_unets_of_other_tasks(self, model, weights, tmp_path, channels, words):
        other = {**weights, CONV_IN: np.zeros((32, channels, 3, 3), np.float32)}
        assert f"it is {words}" in refused(model, save(tmp_path / "b.ckpt", other))

    def test_other_latents_are_no_other_task(self, model, weights, tmp_path):
        both = {**weights, CONV_IN: np.zeros((32, 8, 3, 3), np.float32), CONV_OUT: np.zeros((8, 32, 3, 3), np.float32)}
        message = refused(model, save(tmp_path / "b.ckpt", both))
        assert "its UNet takes 8 channels, that of the model configuration 4 (UNet" in message

    def test_another_size_of_input_is_no_other_task(self, model, weights, tmp_path):
        for size, words in (((32, 3, 3, 3), ": its UNet takes 3 channels"), ((64, 4, 3, 3), " (UNet")):
            message = refused(model, save(tmp_path / "b.ckpt", {**weights, CONV_IN: np.zeros(size, np.float32)}))
            assert f"does not fit the model{words}" in message

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
    def test_weights_that_are_no_floating_point_numbers(self, model, weights, tmp_path, dtype):
        path = save(tmp_path / "b.safetensors", {**weights, TO_K: weights[TO_K].astype(dtype)})
        message = refused(model, path)
        assert "UNet: 285 matched, 1 of a wrong type" in message and "pixel space" not in message
        assert f"{TO_K} is {dtype}: take the file in fp32, fp16 or bf16" in message

    @pytest.mark.parametrize("part, label", [(0, "UNet"), (1, "VAE"), (2, "text encoder")])
    def test_a_component_of_a_diffusers_folder(self, config, model, weights, tmp_path, part, label):
        arrays = to_diffusers(weights, config)[part]
        path = save(tmp_path / "diffusion_pytorch_model.safetensors", arrays)
        assert f"is the {label} of a diffusers folder alone" in refused(model, path)
        # as transformers 5 names it
        shorter = {name.replace("text_model.", ""): array for name, array in arrays.items()}
        assert f"is the {label} of a diffusers folder alone" in refused(model, save(path, shorter))

    def test_a_vae_of_a_single_file(self, model, weights, tmp_path):
        vae = {name[len("first_stage_model.") :]: array for name, array in weights.items() if name.startswith("first_")}
        assert "is the VAE of a single file alone" in refused(model, save(tmp_path / "b.safetensors", vae))

    def test_other_checkpoints(self, model, tmp_path):
        sdxl = {"conditioner.embedders.0.transformer.x": np.zeros(1), "model.diffusion_model.out.0.weight": np.zeros(1)}
        assert "is an SDXL checkpoint" in refused(model, save(tmp_path / "b.safetensors", sdxl))

    def test_a_truncated_text_encoder(self, model, weights, tmp_path):
        short = {name: array for name, array in weights.items() if f"{TEXT}encoder.layers.1." not in name}
        assert "text encoder: 20 matched, 16 missing" in refused(model, save(tmp_path / "b.ckpt", short))
