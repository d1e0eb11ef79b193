"""All formats: detected by their keys, written, read back and converted; what is no LoRA is refused by name."""

import json
import logging
import re

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.lora.formats import (
    DETECTORS,
    FORMATS,
    base_of,
    detect_format,
    diffusers,
    factors,
    kohya,
    lora_files,
    read_lora,
    write_lora,
)
from ldm.lora.formats.modules import BaseModules, known_bases
from ldm.lora.lora import LoRA, lora_metadata, timesteps_metadata
from ldm.lora.merge import match_shapes
from ldm.lora.updates import LoRALayer
from ldm.weights.arrays import CheckpointFile
from ldm.weights.checkpoint import open_checkpoint, read_checkpoint, write_checkpoint
from ldm.weights.recognise import unsupported_lora
from tests.growth import assert_linear
from tests.lora.formats.files import assert_same_updates, random_lora

CANONICAL = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
THEIRS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNDERSCORED = THEIRS.replace(".", "_")
KEEP_ALPHA = ("mindone", "kohya", "diffusers", "peft")
# The layers that a format has no place for.
LEFT_OUT = {
    "diffusers-oldest": lambda module: ".attn" not in module.path or module.component != "unet",
    "cloneofsimo": lambda module: module.path in ("conv_in", "conv_out"),
    "cloneofsimo-pt": lambda module: module.path in ("conv_in", "conv_out"),
}


def path_for(folder, name):
    return folder / ("lora" + (FORMATS[name].suffixes or ("",))[0])


def formats_with(keys):
    return [name for detect in DETECTORS if (name := detect(keys))]


def representable(lora, base, name):
    """The part of `lora` that a format has a place for."""
    left_out = LEFT_OUT.get(name, lambda module: False)
    layers = {
        module.name: lora.layers[module.name]
        for module in base.modules
        if module.name in lora.layers and not left_out(module)
    }
    return LoRA(layers, dict(lora.metadata))


@pytest.fixture(scope="module")
def base(tiny_config):
    return BaseModules(tiny_config)


@pytest.fixture(scope="module")
def whole(base):
    """A LoRA on every layer of the tiny model, with different ranks and alphas."""
    return random_lora(
        base, rank=lambda i: 1 + i % 3, alpha=lambda i: 0.5 + i % 2, architecture="custom", prediction_type="epsilon"
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory, base, whole):
    """Format -> a file in it with the part of `whole` that it has a place for."""
    paths = {}
    for name in FORMATS:
        paths[name] = path_for(tmp_path_factory.mktemp(name), name)
        write_lora(paths[name], representable(whole, base, name), name, base.config)
    return paths


class TestDetection:
    @pytest.mark.parametrize("name", FORMATS)
    def test_exactly_one_format_knows_a_file(self, written, name):
        for file in lora_files(written[name]):
            keys = list(open_checkpoint(file))
            assert formats_with(keys) == [name]
        assert detect_format(written[name]) == name

    @pytest.mark.parametrize("name", FORMATS)
    def test_one_pair_is_enough(self, base, tmp_path, name):
        lora = random_lora(base, rank=1, only="down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        write_lora(path_for(tmp_path, name), lora, name, base.config)
        keys = list(open_checkpoint(lora_files(path_for(tmp_path, name))[0]))
        assert formats_with(keys) == [name]


class TestRoundTrip:
    @pytest.mark.parametrize("name", FORMATS)
    def test_updates_and_alphas(self, base, whole, written, name):
        back, wanted = read_lora(written[name], base.config), representable(whole, base, name)
        assert_same_updates(back, wanted)
        assert match_shapes(base.shapes, back).ok
        for key, layer in wanted.layers.items():
            if name in KEEP_ALPHA:
                assert back.layers[key].alpha == pytest.approx(layer.alpha, rel=1e-6)
                np.testing.assert_array_equal(back.layers[key].up.reshape(-1), layer.up.reshape(-1))
            else:
                assert back.layers[key].alpha == back.layers[key].rank
            assert back.layers[key].down.ndim == layer.down.ndim
            assert back.layers[key].rank == layer.rank
        if name not in ("cloneofsimo-pt",):
            assert back.metadata == wanted.metadata

    @pytest.mark.parametrize("name", FORMATS)
    def test_converted_to_this_projects_format(self, base, written, tmp_path, name):
        """With the round trips from memory, this covers the conversion of every format into every other."""
        lora = read_lora(written[name], base.config)
        write_lora(tmp_path / "lora.ckpt", lora, "mindone", base.config)
        back = read_lora(tmp_path / "lora.ckpt", base.config)
        assert back.layers.keys() == lora.layers.keys() and back.metadata == lora.metadata
        for key, layer in lora.layers.items():
            np.testing.assert_array_equal(back.layers[key].down, layer.down)
            np.testing.assert_array_equal(back.layers[key].up, layer.up)
            assert back.layers[key].alpha == layer.alpha

    @pytest.mark.parametrize("dtype, bits, limit", [("fp16", 11, 2e-3), ("bf16", 8, 2e-2)])
    @pytest.mark.parametrize("name", FORMATS)
    def test_half_precision(self, base, tmp_path, name, dtype, bits, limit):
        lora = random_lora(base, rank=2, alpha=2.0, only="attn1.to_q")
        write_lora(path_for(tmp_path, name), lora, name, base.config, dtype)
        back = read_lora(path_for(tmp_path, name), base.config)
        assert_same_updates(back, lora, rtol=limit)
        for layer in back.layers.values():
            assert layer.down.dtype == np.float32
            mantissa, _ = np.frexp(layer.down)
            np.testing.assert_array_equal(mantissa * 2.0**bits, np.round(mantissa * 2.0**bits))
        tags = {"fp16": (b'"F16"', b"Float16", b"HalfStorage"), "bf16": (b'"BF16"', b"BFloat16")}[dtype]
        content = lora_files(path_for(tmp_path, name))[0].read_bytes()
        assert any(tag in content for tag in tags) and b'"F32"' not in content.replace(b'.alpha":{"dtype":"F32"', b"")

    @pytest.mark.parametrize("architecture", ["sd1", "sd2"])
    @pytest.mark.parametrize("name", ["kohya", "diffusers", "diffusers-middle", "peft", "cloneofsimo"])
    def test_every_layer_of_the_published_models(self, tmp_path, name, architecture):
        base = next(base for base in known_bases() if base.config.architecture == architecture)
        lora = representable(_cheap_lora(base), base, name)
        write_lora(path_for(tmp_path, name), lora, name)
        back = read_lora(path_for(tmp_path, name))
        assert back.layers.keys() == lora.layers.keys()
        for key, layer in lora.layers.items():
            assert back.layers[key].down.shape == layer.down.shape and back.layers[key].up.shape == layer.up.shape
            np.testing.assert_array_equal(back.layers[key].down, layer.down)

    def test_a_file_knows_its_base(self, tmp_path):
        """By its shapes: no configuration is given, and none is noted."""
        sd2 = known_bases()[1]
        lora = random_lora(sd2, rank=1, only="0.transformer_blocks.0.attn2.to_k", component="unet")
        write_lora(tmp_path / "lora.safetensors", lora, "kohya")
        back = read_lora(tmp_path / "lora.safetensors")
        assert back.metadata == {} and base_of(back) is sd2


def _cheap_lora(base):
    """A LoRA on every module, of rank 1, with values that are cheap and different in each layer."""
    layers = {}
    for i, module in enumerate(base.modules):
        outgoing, incoming, *kernel = module.shape
        layers[module.name] = LoRALayer(
            np.full((1, incoming, *kernel), 1 + i, np.float32),
            np.ones((outgoing, 1, *(1 for _ in kernel)), np.float32),
            1.0,
        )
    return LoRA(layers)


class TestWriting:
    @pytest.mark.parametrize("name", FORMATS)
    def test_nothing_to_write(self, tmp_path, base, name):
        with pytest.raises(UserError, match="no layers"):
            write_lora(path_for(tmp_path, name), LoRA({}), name, base.config)

    @pytest.mark.parametrize("name, file", [
        ("mindone", "lora.pt"), ("kohya", "lora.ckpt"), ("diffusers", "lora.bin"), ("diffusers", "folder"),
        ("cloneofsimo", "lora.pt"), ("cloneofsimo-pt", "lora.safetensors"), ("peft", "lora.safetensors"),
    ])  # fmt: skip
    def test_another_suffix(self, tmp_path, base, whole, name, file):
        with pytest.raises(UserError, match=f"{file}: {name} is written as "):
            write_lora(tmp_path / file, whole, name, base.config)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "name, layer", [("diffusers-oldest", "conv_in"), ("cloneofsimo", "conv_in"), ("cloneofsimo-pt", "conv_out")]
    )
    def test_a_layer_without_a_place_is_named(self, tmp_path, base, name, layer):
        with pytest.raises(UserError, match=layer):
            write_lora(path_for(tmp_path, name), random_lora(base, only=layer), name, base.config)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", FORMATS)
    def test_values_beyond_fp16(self, tmp_path, base, name):
        lora = random_lora(base, rank=1, only="down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        (layer,) = lora.layers.values()
        layer.up[0, 0] = 1e5
        with pytest.raises(UserError, match="fp16 ends at 65504"):
            write_lora(path_for(tmp_path, name), lora, name, base.config, "fp16")

    @pytest.mark.parametrize("name", FORMATS)
    def test_values_that_fp16_makes_zero(self, tmp_path, base, name):
        lora = random_lora(base, rank=1, only="down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        (layer,) = lora.layers.values()
        layer.down[:] *= 1e-10
        with pytest.raises(UserError, match="is 0 in fp16: write --dtype fp32"):
            write_lora(path_for(tmp_path, name), lora, name, base.config, "fp16")
        write_lora(path_for(tmp_path, name), lora, name, base.config, "bf16")

    @pytest.mark.parametrize("alpha", [0.0, -3.0])
    @pytest.mark.parametrize("name", FORMATS)
    def test_a_strength_that_is_not_positive(self, tmp_path, base, name, alpha):
        lora = random_lora(base, rank=2, alpha=alpha, only="attn1.to_q")
        write_lora(path_for(tmp_path, name), lora, name, base.config)
        assert_same_updates(read_lora(path_for(tmp_path, name), base.config), lora)

    @pytest.mark.parametrize("name, dtype", [("koyha", "fp32"), ("kohya", "float16"), ("mindone", "f32")])
    def test_a_format_or_type_that_is_not_known(self, tmp_path, whole, name, dtype):
        with pytest.raises(UserError, match="choose one of mindone, kohya, .* fp32, fp16, bf16"):
            write_lora(tmp_path / "lora.safetensors", whole, name, dtype=dtype)

    def test_a_base_that_is_not_known(self, tmp_path, whole):
        with pytest.raises(UserError, match="does not fit SD1.x: .*; SD2.x: .*; the nano model: .*model YAML"):
            write_lora(tmp_path / "lora.safetensors", whole, "kohya")

    def test_layers_of_another_base(self, tmp_path, tiny_config):
        lora = random_lora(known_bases()[0], rank=1, only="down_blocks.0.attentions.0.proj_in")
        with pytest.raises(UserError, match="proj_in is .320, 320, 1, 1., there it is"):
            write_lora(tmp_path / "lora.safetensors", lora, "kohya", tiny_config)


def keys_of(name):
    return {
        "mindone": (f"{CANONICAL}.lora_down.weight", f"{CANONICAL}.lora_up.weight"),
        "kohya": tuple(f"lora_unet_{UNDERSCORED}_to_q.lora_{half}.weight" for half in ("down", "up")),
        "diffusers": (f"unet.{THEIRS}.to_q.lora_A.weight", f"unet.{THEIRS}.to_q.lora_B.weight"),
        "diffusers-newer": tuple(f"unet.{THEIRS}.to_q.lora.{half}.weight" for half in ("down", "up")),
        "diffusers-middle": tuple(f"unet.{THEIRS}.processor.to_q_lora.{half}.weight" for half in ("down", "up")),
        "diffusers-oldest": tuple(f"{THEIRS}.processor.to_q_lora.{half}.weight" for half in ("down", "up")),
        "peft": tuple(f"base_model.model.{THEIRS}.to_q.lora_{half}.weight" for half in "AB"),
    }[name]


NAMED = ("mindone", "kohya", "diffusers", "diffusers-newer", "diffusers-middle", "diffusers-oldest", "peft")


def pair(name, rank=2, width=320):
    down, up = keys_of(name)
    return {down: np.ones((rank, width), np.float32), up: np.ones((width, rank), np.float32)}


def save(folder, arrays, metadata=None, settings=None):
    """A file of `arrays`; with PEFT's settings beside it, which hurt no other format."""
    (folder / "adapter_config.json").write_text(json.dumps(settings or {"r": 2, "lora_alpha": 2}))
    write_checkpoint(folder / "lora.safetensors", arrays, metadata)
    return folder / "lora.safetensors"


def pretend(monkeypatch, shapes):
    """Let the arrays of these names have these shapes, and be read by nobody."""
    spec, read = CheckpointFile.spec, CheckpointFile.__getitem__

    def get(self, name):
        assert name not in shapes, "an array is made before it is judged"
        return read(self, name)

    monkeypatch.setattr(CheckpointFile, "__getitem__", get)
    monkeypatch.setattr(
        CheckpointFile, "spec", lambda self, name: (spec(self, name)[0], shapes.get(name, spec(self, name)[1]))
    )


def refused(path, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        read_lora(path)
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMED)
class TestDamage:
    """Each format that names its layers."""

    def test_whole(self, tmp_path, name):
        assert list(read_lora(save(tmp_path, pair(name))).layers) == [CANONICAL]

    @pytest.mark.parametrize("half", [0, 1])
    def test_half_a_pair(self, tmp_path, name, half):
        arrays = pair(name)
        del arrays[keys_of(name)[half]]
        refused(save(tmp_path, arrays), f"lacks its (lora_)?{('down', 'up')[half]}, half of a pair")

    def test_factors_of_different_ranks(self, tmp_path, name):
        arrays = pair(name)
        arrays[keys_of(name)[1]] = np.ones((320, 3), np.float32)
        refused(save(tmp_path, arrays), "no pair of factors")

    @pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4), (0, 320)])
    def test_a_factor_that_is_no_matrix(self, tmp_path, name, shape):
        arrays = pair(name)
        arrays[keys_of(name)[0]] = np.ones(shape, np.float32)
        refused(save(tmp_path, arrays), "no pair of factors|must have 2 or 4 axes|rank")

    def test_factors_of_no_rank(self, tmp_path, name):
        refused(save(tmp_path, pair(name, rank=0), settings={"r": 0}), "rank 0")

    @pytest.mark.parametrize("shape", [(1,) * 20, (2, 320) + (1,) * 30, (2, 1, 1, 1, 320)])
    def test_factors_of_many_axes(self, tmp_path, name, shape, monkeypatch):
        path = save(tmp_path, pair(name))
        pretend(monkeypatch, {keys_of(name)[0]: shape})
        refused(path, "must have 2 or 4 axes")

    @pytest.mark.parametrize("rank", [2**14 + 1, 2**31])
    def test_an_absurd_rank(self, tmp_path, name, rank, monkeypatch):
        path = save(tmp_path, pair(name))
        pretend(monkeypatch, {keys_of(name)[0]: (rank, 320), keys_of(name)[1]: (320, rank)})
        monkeypatch.setattr(factors, "MAX_EXPANSION", 1e30)
        refused(path, f"is of rank {rank:,}, at most 16,384 is read")

    def test_arrays_that_the_file_does_not_hold(self, tmp_path, name, monkeypatch):
        """PyTorch's expanded tensors: one stored element that stands for any number."""
        path = save(tmp_path, pair(name))
        pretend(monkeypatch, {keys_of(name)[0]: (16384, 320), keys_of(name)[1]: (320, 16384)})
        refused(path, "bytes and its arrays would have 41,943,040: it is damaged or made to fill the memory")

    def test_a_rank_above_the_layers_width(self, tmp_path, name):
        (layer,) = read_lora(save(tmp_path, pair(name, rank=400), settings={"r": 400})).layers.values()
        assert layer.rank == 400

    def test_an_update_beyond_fp32(self, tmp_path, name, recwarn):
        arrays = {key: array * np.float32(1e20) for key, array in pair(name).items()}
        refused(save(tmp_path, arrays), "the update of .* outside the range of fp32")
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    @pytest.mark.parametrize(
        "key",
        [
            "lora_te_text_model_embeddings_position_ids",
            "global_step",
            "epoch",
            "text_encoder.text_model.embeddings.position_ids",
        ],
    )
    def test_what_training_leaves_beside_the_factors(self, tmp_path, name, key):
        path = save(tmp_path, {**pair(name), key: np.arange(1, dtype=np.int64)})
        assert list(read_lora(path).layers) == [CANONICAL]

    def test_bundled_embeddings_are_read(self, tmp_path, name):
        vectors = np.arange(2 * 768, dtype=np.float32).reshape(2, 768)
        extra = {"bundle_emb.cat.string_to_param.*": vectors, "bundle_emb.my dog.emb_params": vectors[0]}
        path = save(tmp_path, {**pair(name), **extra, "bundle_emb.cat.step": np.array(3)})
        lora = read_lora(path)
        assert list(lora.layers) == [CANONICAL] and list(lora.embeddings) == ["cat", "my dog"]
        np.testing.assert_array_equal(lora.embeddings["cat"], vectors)
        np.testing.assert_array_equal(lora.embeddings["my dog"], vectors[:1])

    def test_bundles_of_other_programs(self, tmp_path, name, caplog):
        """OneTrainer's name of the vectors, a name with dots, and arrays of a kind that is not supported."""
        vectors = np.ones((2, 768), np.float32)
        extra = {"bundle_emb.v1.5 cat.clip_l": vectors, "bundle_emb.v1.5 cat.clip_l_out": vectors}
        lora = read_lora(save(tmp_path, {**pair(name), **extra}))
        assert list(lora.embeddings) == ["v1.5 cat"]
        assert "1 arrays of learned tokens are left out, such as bundle_emb.v1.5 cat.clip_l_out" in caplog.text
        again = {**extra, "bundle_emb.v1.5 cat.emb_params": vectors}
        refused(save(tmp_path, {**pair(name), **again}), "are both the token v1.5 cat")

    @pytest.mark.parametrize("vectors", [
        np.ones((1, 2, 768), np.float32), np.full((1, 768), np.nan, np.float32), np.ones((0, 768), np.float32),
        np.ones((2, 768), np.int32), np.float32(1), np.ones((1025, 8), np.float32),
    ])  # fmt: skip
    def test_a_bundled_embedding_that_is_no_matrix(self, tmp_path, name, vectors):
        path = save(tmp_path, {**pair(name), "bundle_emb.cat.string_to_param.*": np.asarray(vectors)})
        refused(path, "the learned token cat (is no vector of finite numbers|has 1,025 vectors)")

    @pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
    def test_factors_that_are_whole_numbers(self, tmp_path, name, dtype):
        arrays = pair(name)
        arrays[keys_of(name)[1]] = arrays[keys_of(name)[1]].astype(dtype)
        refused(save(tmp_path, arrays), "the up of .* is of type .*: quantised")

    def test_factors_of_different_types(self, tmp_path, name):
        arrays = pair(name)
        arrays[keys_of(name)[0]] = arrays[keys_of(name)[0]].astype(np.float16)
        arrays[keys_of(name)[1]] = arrays[keys_of(name)[1]].astype(np.float64)
        (layer,) = read_lora(save(tmp_path, arrays)).layers.values()
        assert layer.down.dtype == layer.up.dtype == np.float32

    def test_values_beyond_fp32(self, tmp_path, name, recwarn):
        arrays = pair(name)
        arrays[keys_of(name)[1]] = np.full((320, 2), 1e300)
        refused(save(tmp_path, arrays), "values that are not finite")
        assert not [warning for warning in recwarn if "overflow" in str(warning.message)]

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("half", [0, 1])
    def test_values_that_are_not_finite(self, tmp_path, name, value, half):
        arrays = pair(name)
        arrays[keys_of(name)[half]][0, 1] = value
        refused(save(tmp_path, arrays), "values that are not finite")

    def test_zero_updates_are_warned_of(self, tmp_path, name, caplog):
        arrays = pair(name)
        arrays[keys_of(name)[1]][:] = 0
        with caplog.at_level(logging.WARNING):
            lora = read_lora(save(tmp_path, arrays))
        assert lora.zero_layers() == [CANONICAL] and "updates of all its 1 layers are zero" in caplog.text

    def test_a_stray_key(self, tmp_path, name, caplog):
        path = save(tmp_path, {**pair(name), f"{keys_of(name)[0][:-7]}.surplus": np.ones(3, np.float32)})
        if name == "mindone":  # mindone's own files have frozen weights beside the factors
            assert read_lora(path) and "1 arrays that are not LoRA's are left out" in caplog.text
        else:
            refused(path, "1 of its 3 keys belong to nothing in a LoRA")

    @pytest.mark.parametrize("width, made_for", [(2048, "SDXL"), (768, ""), (1024, ""), (1280, "no known base model")])
    def test_a_context_of_another_base(self, tmp_path, name, width, made_for):
        arrays = {key.replace("attn1", "attn2").replace("to_q", "to_k"): array for key, array in pair(name).items()}
        arrays = {
            key: array if array.shape[0] != 2 else np.ones((2, width), np.float32) for key, array in arrays.items()
        }
        if made_for and name != "mindone":
            refused(save(tmp_path, arrays), made_for)
        else:
            assert len(read_lora(save(tmp_path, arrays)).layers) == 1

    @pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
    def test_a_cut_off_file(self, tmp_path, name, part):
        path = save(tmp_path, pair(name))
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part)])
        refused(path, "cut off|cut-off")


@pytest.mark.parametrize("name", NAMED[1:])
class TestStrangers:
    """Names are looked up in a base's; this project's own are compared with the network itself, by merge_lora."""

    def test_a_layer_that_no_known_base_has(self, tmp_path, name):
        arrays = {
            key.replace("blocks.0", "towers.0").replace("blocks_0", "towers_0"): array
            for key, array in pair(name).items()
        }
        refused(save(tmp_path, arrays), "none of its 1 layers is one of SD1.x or SD2.x or the nano model")

    def test_a_stray_layer(self, tmp_path, name):
        stray = {key.replace("to_q", "to_z"): array for key, array in pair(name).items()}
        refused(save(tmp_path, {**pair(name), **stray}), "belong to nothing in")

    def test_for_a_base_that_lacks_its_layers(self, tmp_path, name, tiny_config):
        arrays = {
            key.replace("attentions.0", "attentions.1").replace("attentions_0", "attentions_1"): array
            for key, array in pair(name).items()
        }
        with pytest.raises(UserError, match="none of its 1 layers is one of the model of .*: it was made for SD1.x"):
            read_lora(save(tmp_path, arrays), tiny_config)


@pytest.mark.parametrize("name", ["diffusers", "diffusers-middle", "diffusers-oldest", "peft"])
def test_a_layer_twice(tmp_path, name):
    again = {
        key.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default").replace(".processor", ""): array
        for key, array in pair(name).items()
    }
    refused(save(tmp_path, {**pair(name), **again}), "stand for the same layer")


@pytest.mark.parametrize(
    "form",
    ["to_out.lora.{}.weight", "to_out.0.lora.{}.weight", "to_out_lora.{}.weight", "processor.to_out_lora.{}.weight"],
)
def test_the_ways_to_call_the_output_projection(tmp_path, form):
    arrays = {
        f"unet.{THEIRS}.{form.format(half)}": np.ones(shape, np.float32)
        for half, shape in (("down", (2, 320)), ("up", (320, 2)))
    }
    assert list(read_lora(save(tmp_path, arrays)).layers) == [CANONICAL.replace("to_q", "to_out.0")]


# What a file is -> (its names, with X, Y and CANONICAL for a block or layer, what the error says).
OTHERS = {
    "half of a LoHa": ("lora_unet_X_to_q.hada_w1_a lora_unet_X_to_q.alpha", "hada_w1_b is missing"),
    "LoKr that does not fit": ("lora_unet_X_to_q.lokr_w1 lora_unet_X_to_q.lokr_w2", r"to_q is \(4, 4\)"),
    "LoKr beside half a pair": (
        "lora_unet_X_to_q.lokr_w1 lora_unet_X_to_q.lokr_w2 lora_unet_X_to_k.lora_down.weight",
        "to_k lacks its up",
    ),
    "GLoRA": (
        "lora_unet_X_to_q.a1.weight lora_unet_X_to_q.a2.weight lora_unet_X_to_q.b1.weight lora_unet_X_to_q.b2.weight",
        "GLoRA",
    ),
    "a magnitude alone": ("lora_unet_X_to_q.dora_scale", "alone"),
    "a magnitude beside no factors": ("lora_unet_X_to_q.dora_scale lora_unet_X_to_q.diff", "not beside a pair"),
    "two kinds": (
        "CANONICAL.hada_w1_a CANONICAL.lora_down.weight CANONICAL.lora_up.weight",
        "a pair of factors and LoHa at once",
    ),
    "a norm's weight for a linear layer": ("lora_unet_X_to_q.w_norm", "not one number for each channel"),
    "both of two": ("lora_unet_X_to_q.diff lora_unet_X_to_q.w_norm", "has both diff and w_norm"),
    "two biases": ("lora_unet_X_to_q.diff_b lora_unet_X_to_q.b_norm", "has both diff_b and b_norm"),
    "two magnitudes": (
        "lora_unet_X_to_q.lora_down.weight lora_unet_X_to_q.lora_up.weight lora_unet_X_to_q.dora_scale "
        "lora_unet_X_to_q.lora_magnitude_vector",
        "has both dora_scale and magnitude",
    ),
    "a whole and a factored half": (
        "lora_unet_X_to_q.lokr_w1 lora_unet_X_to_q.lokr_w1_b lora_unet_X_to_q.lokr_w2",
        "has both lokr_w1 and lokr_w1_b",
    ),
    "half of IA3": ("lora_unet_X_to_q.on_input lora_unet_X_to_k.diff", "has on_input without weight"),
    "one core of two": (
        "lora_unet_X_to_q.hada_w1_a lora_unet_X_to_q.hada_w1_b lora_unet_X_to_q.hada_w2_a lora_unet_X_to_q.hada_w2_b "
        "lora_unet_X_to_q.hada_t1",
        "has hada_t1 without hada_t2",
    ),
    "T-LoRA": ("lora_unet_X_to_q.q_layer.weight lora_unet_X_to_q.lambda_layer", "T-LoRA"),
    "OFT of PEFT": ("base_model.model.Y.to_q.oft_R.weight", "OFT in another form"),
    "IA3 of PEFT": ("base_model.model.Y.to_q.ia3_l", "IA3 in PEFT's form"),
    "biases": ("unet.Y.to_q.lora_A.weight unet.Y.to_q.lora_B.weight unet.Y.to_q.lora_B.bias", "with biases"),
    "embedding": (
        "base_model.model.text_model.embeddings.token_embedding.lora_embedding_A "
        "base_model.model.text_model.embeddings.token_embedding.lora_A.weight",
        "embedding table",
    ),
    "SDXL of kohya": (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight "
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
        "SDXL",
    ),
    "SDXL's second text encoder": (
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight lora_unet_X_to_q.lora_down.weight",
        "SDXL",
    ),
    "SDXL's second text encoder in ComfyUI's names": (
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_down.weight "
        "diffusion_model.input_blocks.4.1.proj_in.lora_down.weight",
        "SDXL",
    ),
    "SDXL's labels": (
        "diffusion_model.label_emb.0.0.lora_A.weight diffusion_model.label_emb.0.0.lora_B.weight",
        "SDXL",
    ),
    "SDXL of diffusers": (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight unet.Y.to_q.lora_A.weight",
        "SDXL",
    ),
    "SDXL's depth": (
        "unet.down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q.lora_A.weight "
        "unet.down_blocks.2.attentions.0.transformer_blocks.7.attn1.to_q.lora_B.weight",
        "SDXL",
    ),
    "Flux": (
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight "
        "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight",
        "none of its 1 layers",
    ),
    "Flux's many blocks": (
        "transformer.single_transformer_blocks.7.attn.to_q.lora_A.weight "
        "transformer.single_transformer_blocks.7.attn.to_q.lora_B.weight "
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight "
        "transformer.transformer_blocks.7.attn.to_q.lora_B.weight",
        "none of its 2 layers",
    ),
    "Flux in ComfyUI's names": (
        "diffusion_model.double_blocks.7.img_attn.qkv.lora_A.weight "
        "diffusion_model.double_blocks.7.img_attn.qkv.lora_B.weight",
        "none of its 1 layers",
    ),
    "a language model": (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "none of its 1 layers",
    ),
    "another project's mindone": ("blocks.0.to_q.lora_down.weight", "another kind of model"),
    "textual inversion": ("emb_params", "textual-inversion"),
    "textual inversion of diffusers": ("<cat-toy>", "textual-inversion"),
    "textual inversion of many words": (
        "<s0> <s1> <s2> <s3> <s4> <s5> <s6> <s7> <s8> <s9> <s10> <s11>",
        "textual-inversion",
    ),
    "textual inversion of SDXL": ("clip_g clip_l", "textual-inversion"),
    "SDXL base": ("conditioner.embedders.0.x CANONICAL.weight", "SDXL checkpoint"),
    "base": ("CANONICAL.weight first_stage_model.quant_conv.bias", "base weights"),
    "mindone base": ("cond_stage_model.transformer.ln_final.gamma", "base weights"),
    "diffusers UNet": ("Y.to_q.weight", "base weights"),
    "transformers text encoder": ("text_model.encoder.layers.0.self_attn.q_proj.weight", "base weights"),
    "something else": ("fc1.weight fc1.bias", "2 unknown names"),
    "nothing": ("", "without any arrays"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_checkpoints(tmp_path, kind):
    names, pattern = OTHERS[kind]
    names = names.replace("X", UNDERSCORED).replace("Y", THEIRS).replace("CANONICAL", CANONICAL).split()
    path = save(tmp_path, {name: np.ones((2, 2), np.float32) for name in names})
    with pytest.raises(UserError) as caught:
        read_lora(path)
    message = str(caught.value)
    assert str(path) in message and re.search(pattern, message.replace(str(path), "")) and "\n" not in message


@pytest.mark.parametrize(
    "part",
    [
        ".",
        "_",
        ".lora_A",
        ".lora_A.x",
        "lora_B.x",
        ".oft_a",
        "lora_",
        ".processor",
        "unet:",
        "transformer_blocks_",
        ".to_q_lora",
        "bundle_emb.",
    ],
)
def test_a_name_of_any_length_is_looked_at_once(part):
    """Going back over what was matched would take minutes for these."""

    def look_at(names):
        for name in names:
            for detect in DETECTORS:
                detect([name])
            unsupported_lora([name], {}), factors.without_extras([name])
            kohya._parse(name), diffusers.parse(name)

    ends = ("", ""), ("lora_unet_", ".lora_down.weight"), ("unet.", ".bias"), ("diffusion_model.", "!")
    assert_linear(look_at, lambda n: [head + part * (n // len(part)) + tail for head, tail in ends], 20_000)


@pytest.mark.parametrize(
    "content, pattern",
    [
        (b"", "empty file"),
        (b"<!doctype html><html></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"PK\x03\x04" + b"archive/data.pkl", "truncated or damaged"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, pattern):
    path = tmp_path / "lora.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        read_lora(path)


def test_a_folder_without_a_lora_and_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="is a folder without a LoRA in it"):
        read_lora(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_lora(tmp_path / "lora.ckpt")


def test_a_folder_of_diffusers(tmp_path, base, whole):
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", whole, "diffusers", base.config)
    assert_same_updates(read_lora(tmp_path, base.config), whole)


def test_metadata_of_another_project_is_not_taken_for_ours(tmp_path):
    path = save(tmp_path, pair("kohya"), {"architecture": "stable-diffusion-v1/lora", "prediction_type": "v"})
    assert read_lora(path).metadata == {}
    assert read_checkpoint(path)[1]["prediction_type"] == "v"


@pytest.mark.parametrize("name", FORMATS)
def test_the_time_steps_of_the_training_go_with_the_lora(tmp_path, base, whole, name):
    lora = representable(whole, base, name)
    lora.metadata.update(timesteps_metadata(range(0, 550)))
    write_lora(path_for(tmp_path, name), lora, name, base.config)
    found = read_lora(path_for(tmp_path, name), base.config).timesteps
    assert found == (None if name == "cloneofsimo-pt" else range(0, 550))  # a list of arrays alone


@pytest.mark.parametrize("name", FORMATS)
def test_training_with_zero_terminal_snr_goes_with_the_lora(tmp_path, base, whole, name):
    lora = representable(whole, base, name)
    lora.metadata["zero_terminal_snr"] = "True"
    write_lora(path_for(tmp_path, name), lora, name, base.config)
    assert read_lora(path_for(tmp_path, name), base.config).zero_terminal_snr == (name != "cloneofsimo-pt")


def test_zero_terminal_snr_is_read_from_kohyas_metadata_too():
    assert lora_metadata({"ss_zero_terminal_snr": "True"}) == {"zero_terminal_snr": "True"}
    for text in ("False", "None", "true", ""):
        assert lora_metadata({"ss_zero_terminal_snr": text, "zero_terminal_snr": text}) == {}


@pytest.mark.parametrize(
    "low, end", [("200", "200"), ("550", "200"), ("-5", "10"), ("a", "b"), ("", "9"), ("1.5", "9"), ("1", "9" * 30)]
)
def test_time_steps_that_are_none_are_ignored(low, end):
    assert lora_metadata({"min_timestep": low, "max_timestep": end}) == {}
