"""Every name of the published checkpoints maps to a canonical one and back, and no name is left over.

published_names.json.gz holds names and shapes of the published files: LDM SD1 and SD2 (made with CompVis's and
Stability AI's own classes), mindone's .ckpt, and diffusers' and transformers' networks.
"""

import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.weights.names import (
    component_of,
    compvis,
    detect_family,
    diffusers,
    map_keys,
    mindone,
    read_source,
    same_up_to_1x1,
    source_shape,
)
from ldm.weights.names.tables import Ignored
from ldm.weights.names.unused import find_unused
from tests.weight_names import from_diffusers, to_canonical, to_diffusers

HERE = Path(__file__).parent
SD = SimpleNamespace(
    path="configs/v1-inference.yaml",
    unet=dict(channel_mult=[1, 2, 4, 4], num_res_blocks=2, attention_resolutions=[4, 2, 1]),
    vae=dict(ch_mult=[1, 2, 4, 4], num_res_blocks=2),
)
VERSIONS = ("1", "2")


@pytest.fixture(scope="module")
def published():
    """Name -> {key: shape} of a published file."""
    return json.loads(gzip.decompress((HERE / "published_names.json.gz").read_bytes()))


def arrays_of(shapes):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def shapes_of(arrays):
    return {name: array.shape for name, array in arrays.items()}


def made_shapes(layout, canonical):
    """Name -> shape of what a layout makes, by concatenation."""
    return {name: np.concatenate([canonical[part] for part in made.names]).shape for name, made in layout.items()}


def canonical_shapes(published, version):
    return shapes_of(to_canonical(arrays_of(published[f"sd{version}_ldm_ckpt_keys"])))


class TestPublishedFiles:
    def test_sd1_has_canonical_names(self, published):
        names = published["sd1_ldm_ckpt_keys"]
        key_map = map_keys(names)
        assert key_map.family == "ldm" and not key_map.unknown
        assert all(source.name == name and source.parts == 1 for name, source in key_map.sources.items())
        assert Counter(key_map.ignored.values()) == {"noise schedule": 12, "position numbers": 1}
        assert len(key_map.sources) + len(key_map.ignored) == len(names) == 1143

    def test_sd1_without_text_model_in_its_names(self, published):
        names = published["sd1_ldm_ckpt_keys"]
        shorter = [name.replace(".text_model.", ".") for name in names]
        key_map = map_keys(shorter)
        assert shorter != list(names) and key_map.sources.keys() == map_keys(names).sources.keys()
        assert not key_map.unknown and len(key_map.ignored) == 13

    def test_sd2_maps_every_key_once(self, published):
        names = published["sd2_ldm_ckpt_keys"]
        key_map = map_keys(names)
        assert key_map.family == "ldm" and not key_map.unknown
        used = {source.name for source in key_map.sources.values()}
        assert used | set(key_map.ignored) == set(names) and not used & set(key_map.ignored)
        assert Counter(key_map.ignored.values()) == {
            "noise schedule": 12,
            "text projection and scale of CLIP": 2,
            "the text encoder's last layer, unused by SD2": 12,
        }
        # q, k and v of 23 layers come from one array each, weights and biases.
        assert sum(source.parts == 3 for source in key_map.sources.values()) == 23 * 3 * 2

    @pytest.mark.parametrize("version", VERSIONS)
    def test_mindone_has_the_same_arrays(self, published, version):
        names = published[f"mindone_ckpt_names_v{version}"]
        key_map = map_keys(names)
        assert key_map.family == "mindone" and not key_map.unknown and not key_map.ignored
        assert {source.name for source in key_map.sources.values()} == set(names)
        assert shapes_of(to_canonical(arrays_of(names))) == canonical_shapes(published, version)

    @pytest.mark.parametrize("version", VERSIONS)
    def test_diffusers_has_the_same_arrays(self, published, version):
        canonical = from_diffusers(
            arrays_of(published[f"diffusers_unet_sd{version}"]),
            arrays_of(published["diffusers_vae_sd"]),
            arrays_of(published[f"transformers_text_encoder_sd{version}"]),
        )
        assert shapes_of(canonical) == canonical_shapes(published, version)

    @pytest.mark.parametrize("version", VERSIONS)
    def test_back_to_diffusers(self, published, version):
        canonical = to_canonical(arrays_of(published[f"sd{version}_ldm_ckpt_keys"]))
        unet, vae, text = to_diffusers(canonical, SD)
        wanted = [f"diffusers_unet_sd{version}", "diffusers_vae_sd", f"transformers_text_encoder_sd{version}"]
        for found, key in zip((unet, vae), wanted):
            assert shapes_of(found) == {name: tuple(shape) for name, shape in published[key].items()}
        text_names = {f"text_model.{name}": tuple(shape) for name, shape in published[wanted[2]].items()}
        assert shapes_of(text) == text_names

    @pytest.mark.parametrize("version", VERSIONS)
    def test_back_to_the_published_single_file(self, published, version):
        names = {name: tuple(shape) for name, shape in published[f"sd{version}_ldm_ckpt_keys"].items()}
        canonical = to_canonical(arrays_of(names))
        made = made_shapes(compvis.layout(canonical, openclip=version == "2"), canonical)
        # What is left is computed (the schedule, position numbers) or not used (SD2's last layer, CLIP's projection).
        assert made == {name: shape for name, shape in names.items() if not isinstance(compvis.map_key(name), Ignored)}

    @pytest.mark.parametrize("version", VERSIONS)
    def test_back_to_mindone(self, published, version):
        names = {name: tuple(shape) for name, shape in published[f"mindone_ckpt_names_v{version}"].items()}
        canonical = to_canonical(arrays_of(names))
        assert made_shapes(mindone.layout(shapes_of(canonical)), canonical) == names

    def test_the_published_schedule(self, published):
        buffers = compvis.schedule_buffers(0.00085, 0.012, 1000)
        names = published["sd1_ldm_ckpt_keys"]
        assert {name: list(array.shape) for name, array in buffers.items()} == {name: names[name] for name in buffers}
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in buffers.values())
        # Known of the published files: the first and last cumulative product, by every implementation.
        np.testing.assert_allclose(buffers["alphas_cumprod"][[0, -1]], [0.99915, 0.0046601], rtol=1e-4)

    def test_the_autoencoders_attention_under_its_older_names(self, published):
        older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        renamed = {}
        for name, shape in published["diffusers_vae_sd"].items():
            for new, old in older.items():
                name = name.replace(f".{new}.", f".{old}.")
            renamed[name] = shape
        assert renamed.keys() != published["diffusers_vae_sd"].keys()
        canonical = from_diffusers({}, arrays_of(renamed), {})
        wanted = canonical_shapes(published, "1")
        assert shapes_of(canonical) == {k: v for k, v in wanted.items() if component_of(k) == "vae"}


UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_LAYER = "cond_stage_model.transformer.text_model.encoder.layers."
# Published and canonical names of arrays whose shapes are equal.
SAME_SHAPES = {
    "diffusers": [
        ("unet/time_embedding.linear_2.bias", f"{UNET}time_embed.2.bias"),
        ("unet/down_blocks.1.resnets.1.norm1.weight", f"{UNET}input_blocks.5.0.in_layers.0.weight"),
        ("unet/down_blocks.1.resnets.1.norm1.bias", f"{UNET}input_blocks.5.0.in_layers.0.bias"),
        ("unet/down_blocks.1.resnets.1.norm2.weight", f"{UNET}input_blocks.5.0.out_layers.0.weight"),
        ("unet/down_blocks.0.resnets.1.conv1.weight", f"{UNET}input_blocks.2.0.in_layers.2.weight"),
        ("unet/down_blocks.0.resnets.1.conv2.weight", f"{UNET}input_blocks.2.0.out_layers.3.weight"),
        ("unet/down_blocks.0.downsamplers.0.conv.weight", f"{UNET}input_blocks.3.0.op.weight"),
        (
            "unet/down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q.weight",
            f"{UNET}input_blocks.8.1.transformer_blocks.0.attn1.to_q.weight",
        ),
        ("unet/mid_block.resnets.0.conv1.weight", f"{UNET}middle_block.0.in_layers.2.weight"),
        ("unet/mid_block.resnets.1.conv1.weight", f"{UNET}middle_block.2.in_layers.2.weight"),
        ("unet/up_blocks.0.resnets.1.time_emb_proj.weight", f"{UNET}output_blocks.1.0.emb_layers.1.weight"),
        ("unet/up_blocks.0.upsamplers.0.conv.weight", f"{UNET}output_blocks.2.1.conv.weight"),
        ("unet/up_blocks.1.upsamplers.0.conv.weight", f"{UNET}output_blocks.5.2.conv.weight"),
        ("unet/up_blocks.3.attentions.2.proj_out.weight", f"{UNET}output_blocks.11.1.proj_out.weight"),
        *(
            (f"vae/{half}.mid_block.attentions.0.{theirs}.weight", f"{VAE}{half}.mid.attn_1.{ours}.weight")
            for half in ("encoder", "decoder")
            for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
        ),
        ("vae/decoder.mid_block.resnets.0.conv2.weight", f"{VAE}decoder.mid.block_1.conv2.weight"),
        ("vae/encoder.down_blocks.3.resnets.1.norm2.bias", f"{VAE}encoder.down.3.block.1.norm2.bias"),
        ("vae/decoder.up_blocks.0.resnets.2.norm2.bias", f"{VAE}decoder.up.3.block.2.norm2.bias"),
        ("vae/decoder.up_blocks.1.resnets.0.conv1.weight", f"{VAE}decoder.up.2.block.0.conv1.weight"),
        ("vae/decoder.up_blocks.0.upsamplers.0.conv.weight", f"{VAE}decoder.up.3.upsample.conv.weight"),
    ],
    "mindone": [
        (f"{UNET}input_blocks.5.0.in_layers_norm.gamma", f"{UNET}input_blocks.5.0.in_layers.0.weight"),
        (f"{UNET}input_blocks.5.0.in_layers_norm.beta", f"{UNET}input_blocks.5.0.in_layers.0.bias"),
        (f"{UNET}input_blocks.5.0.out_layers_norm.gamma", f"{UNET}input_blocks.5.0.out_layers.0.weight"),
        (f"{UNET}input_blocks.2.0.in_layers_conv.conv.weight", f"{UNET}input_blocks.2.0.in_layers.2.weight"),
        (f"{UNET}input_blocks.2.0.out_layers_conv.conv.weight", f"{UNET}input_blocks.2.0.out_layers.3.weight"),
        (f"{VAE}decoder.norm_out.gamma", f"{VAE}decoder.norm_out.weight"),
        ("cond_stage_model.transformer.transformer_layer.resblocks.3.ln_1.gamma", f"{TEXT_LAYER}3.layer_norm1.weight"),
        ("cond_stage_model.transformer.transformer_layer.resblocks.3.ln_2.beta", f"{TEXT_LAYER}3.layer_norm2.bias"),
    ],
    "openclip": [
        ("cond_stage_model.model.transformer.resblocks.3.ln_1.weight", f"{TEXT_LAYER}3.layer_norm1.weight"),
        ("cond_stage_model.model.transformer.resblocks.3.ln_2.weight", f"{TEXT_LAYER}3.layer_norm2.weight"),
        ("cond_stage_model.model.transformer.resblocks.3.ln_2.bias", f"{TEXT_LAYER}3.layer_norm2.bias"),
    ],
}


class TestNamesOfArraysWithEqualShapes:
    @pytest.fixture
    def tables(self, published):
        """Family -> (its names, its layout)."""
        parts = {"unet": "diffusers_unet_sd1", "vae": "diffusers_vae_sd"}
        diffusers_names = [f"{part}/{name}" for part, key in parts.items() for name in published[key]]
        sd1, sd2 = canonical_shapes(published, "1"), canonical_shapes(published, "2")
        return {
            "diffusers": (diffusers_names, diffusers.layout(sd1, SD)),
            "mindone": (published["mindone_ckpt_names_v1"], mindone.layout(sd1)),
            "openclip": (published["sd2_ldm_ckpt_keys"], compvis.layout(sd2, openclip=True)),
        }

    @pytest.mark.parametrize("family", SAME_SHAPES)
    def test_map_to_canonical_names_and_back(self, tables, family):
        names, layout = tables[family]
        sources = map_keys(names).sources
        for theirs, ours in SAME_SHAPES[family]:
            assert theirs in names and sources[ours].name == theirs
            assert layout[theirs].names == (ours,)

    @pytest.mark.parametrize("theirs, ours", [("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")])
    def test_the_autoencoders_older_names(self, theirs, ours):
        names = [f"vae/encoder.mid_block.attentions.0.{theirs}.bias", "vae/encoder.down_blocks.0.resnets.0.conv1.bias"]
        assert map_keys(names).sources[f"{VAE}encoder.mid.attn_1.{ours}.bias"].name == names[0]


@pytest.fixture(scope="module", params=["tiny.yaml", "golden/small_sd1.yaml", "golden/small_sd2.yaml"])
def tiny(request):
    config = load_model_config(HERE.parent / request.param)
    model = build_model(config)
    return config, {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}


class TestNetworksOfThisProject:
    def test_have_canonical_names(self, tiny):
        _, arrays = tiny
        key_map = map_keys(arrays)
        assert key_map.family == "ldm" and not key_map.unknown and not key_map.ignored
        assert list(key_map.sources) == list(arrays)

    def test_go_to_diffusers_names_and_back_at_any_size(self, tiny):
        config, arrays = tiny
        unet, vae, text = to_diffusers(arrays, config)
        assert len(unet) + len(vae) + len(text) == len(arrays)
        back = from_diffusers(unet, vae, text)
        assert back.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(back[name], array)


class TestFusedProjections:
    def test_openclips_rows_are_q_then_k_then_v(self):
        key = "cond_stage_model.model.transformer.resblocks.4.attn.in_proj_weight"
        fused = np.arange(18, dtype=np.float32).reshape(6, 3)
        canonical = to_canonical({key: fused})
        layer = "cond_stage_model.transformer.text_model.encoder.layers.4.self_attn."
        assert list(canonical) == [f"{layer}{part}_proj.weight" for part in "qkv"]
        for part, name in enumerate(canonical):
            np.testing.assert_array_equal(canonical[name], fused[2 * part : 2 * part + 2])

    def test_mindones_rows_too(self):
        prefix = "cond_stage_model.transformer.transformer_layer.resblocks.0.attn.attn.in_proj."
        canonical = to_canonical({f"{prefix}bias": np.arange(6.0)})
        layer = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn."
        np.testing.assert_array_equal(canonical[f"{layer}k_proj.bias"], [2.0, 3.0])

    def test_shapes_are_split_like_arrays(self):
        key_map = map_keys(["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"])
        for source in key_map.sources.values():
            assert source_shape((9, 4), source) == read_source({source.name: np.zeros((9, 4))}, source).shape == (3, 4)
            assert source_shape((10, 4), source) == (10, 4)  # cannot be split: left to be found wrong


@pytest.mark.parametrize(
    "found, wanted, same",
    [
        ((3, 4), (3, 4), True),
        ((3, 4), (3, 4, 1, 1), True),
        ((3, 4, 1, 1), (3, 4), True),
        ((3, 4, 3, 3), (3, 4), False),
        ((3, 4), (4, 3), False),
        ((4,), (4, 1, 1), False),
        ((12,), (3, 4), False),
        ((), (), True),
    ],
)
def test_a_linear_layer_has_the_shape_of_a_1x1_convolution(found, wanted, same):
    assert same_up_to_1x1(found, wanted) is same


class TestUnknownNames:
    @pytest.mark.parametrize(
        "names",
        [
            [],
            ["weight", "bias"],
            ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
            ["down_blocks.0.resnets.0.conv1.weight"],  # a folder's file alone: without unet/ in front
            ["betas"],
        ],
    )
    def test_no_family_is_found(self, names):
        assert detect_family(names) is None
        with pytest.raises(UserError, match="no Stable Diffusion parameter"):
            map_keys(names)

    @pytest.mark.parametrize(
        "name",
        [
            "refiner.state.0",
            "cond_stage_model.model.transformer.resblocks.0.ln_3.weight",
            "cond_stage_model.model.visual.proj",
            "cond_stage_model.transformer.transformer_layer.resblocks.0.ln_3.gamma",
        ],
    )
    def test_a_single_one_is_unknown(self, name):
        known = "model.diffusion_model.out.0.gamma" if "gamma" in name else "model.diffusion_model.out.0.weight"
        assert map_keys([name, known]).unknown == [name]
        with pytest.raises(UserError, match="1 unknown name"):
            to_canonical({name: np.zeros(1), known: np.zeros(1)})

    def test_two_keys_for_one_parameter(self):
        names = ["model.diffusion_model.out.0.gamma", "model.diffusion_model.out.0.weight"]
        with pytest.raises(UserError, match="are both model.diffusion_model.out.0.weight"):
            map_keys(names)

    def test_ema_copies_are_known_and_left_out(self):
        names = ["model.diffusion_model.out.0.weight", "model_ema.diffusion_modelout0weight", "model_ema.decay"]
        assert set(map_keys(names).ignored.values()) == {"EMA copy"}

    def test_moving_averages_replace_the_weights(self):
        unet = ["model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "model.diffusion_model.out.2.bias"]
        averages = ["model_ema.diffusion_modelinput_blocks10in_layers2weight", "model_ema.diffusion_modelout2bias"]
        vae = "first_stage_model.quant_conv.bias"
        key_map = map_keys([*unet, *averages, vae, "model_ema.decay"], ema=True)
        assert [key_map.sources[name].name for name in (*unet, vae)] == [*averages, vae]
        assert key_map.ignored == {"model_ema.decay": "EMA copy", **dict.fromkeys(unet, "weight that has an EMA copy")}

    @pytest.mark.parametrize("kept", [0, 1])
    def test_incomplete_moving_averages(self, kept):
        unet = ["model.diffusion_model.out.0.bias", "model.diffusion_model.out.2.bias"]
        averages = ["model_ema.diffusion_modelout0bias", "model_ema.diffusion_modelout2bias"][:kept]
        with pytest.raises(UserError, match=f"{kept} of 2 UNet arrays have an EMA copy"):
            map_keys([*unet, *averages], ema=True)

    def test_canonical_names_of_another_size_of_network(self):
        name = "model.diffusion_model.input_blocks.12.0.in_layers.0.weight"
        with pytest.raises(UserError, match="1 names do not fit .*v1-inference.yaml"):
            to_diffusers({name: np.zeros(1)}, SD)


class TestNumbersWithoutBounds:
    """A name with a number that no model has is unknown, and costs nothing."""

    LARGE = ("64", "999999999", "9" * 6000, "²")

    @pytest.mark.parametrize("number", LARGE)
    @pytest.mark.parametrize("name", ["unet/down_blocks.{}.attentions.0.norm.weight", "unet/up_blocks.{}.x.weight",
                                      "unet/down_blocks.0.resnets.{}.conv1.weight",
                                      "vae/encoder.down_blocks.{}.resnets.0.conv1.weight",
                                      "vae/encoder.down_blocks.0.resnets.{}.conv1.weight"])  # fmt: skip
    def test_of_a_diffusers_folder(self, name, number):
        key_map = map_keys(["unet/conv_out.weight", name.format(number)])
        assert key_map.unknown == [name.format(number)] and len(key_map.sources) == 1

    @pytest.mark.parametrize("number", ["9" * 6000, "²"])
    def test_of_openclips_layers(self, number):
        name = f"cond_stage_model.model.transformer.resblocks.{number}.ln_1.weight"
        assert map_keys(["model.diffusion_model.out.2.bias", name]).unknown == [name]


class TestUnusedKeys:
    """Keys without use: what is known to do no harm is told with the reason, in every family of names."""

    KNOWN = {
        "cond_stage_model.logit_scale": "text projection and scale of CLIP",
        "cond_stage_model.text_projection": "text projection and scale of CLIP",
        "cond_stage_model.transformer.text_projection.weight": "text projection and scale of CLIP",
        "cond_stage_model.transformer.vision_model.post_layernorm.bias": "image tower of CLIP",
        "cond_stage_model.transformer.text_model.embeddings.position_ids": "position numbers",
        "cond_stage_model.transformer.embeddings.position_ids": "position numbers",
        "denoiser.sigmas": "noise schedule",
        "denoiser.log_sigmas": "noise schedule",
        "model.denoiser.sigmas": "noise schedule",
        "logvar": "noise schedule",
        "model_ema.decay": "EMA copy",
        "model_ema.num_updates": "EMA copy",
        "first_stage_model.model_ema.encoderconv_inweight": "EMA copy",
        "first_stage_model.loss.logvar": "losses of the VAE's training",
        "first_stage_model.loss.discriminator.main.0.weight": "losses of the VAE's training",
        "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": "losses of the VAE's training",
        "loss.logvar": "losses of the VAE's training",
        "embedding_manager.string_to_param_dict.*": "tokens of a textual inversion, which are not used",
        "global_step": "counters of training",
        "epoch": "counters of training",
        "pytorch-lightning_version": "counters of training",
        "optimizer_states.0.state.0.exp_avg": "training state",
        "adam_m.model.diffusion_model.out.2.bias": "training state",
        "checkpoint_merge_recipe": "notes of other programs",
        "sd_merge_models.a": "notes of other programs",
    }
    UNKNOWN = (
        "cond_stage_model.logit_scale.weight", "first_stage_model.lossy.weight", "v_pred", "global_step.weight",
        "model.diffusion_model_ema.decay", "encoder.loss.logvar", "first_stage_model.loss.encoder.conv_in.weight",
        "cond_stage_model.logit_scale\n",
    )  # fmt: skip
    BASES = ("model.diffusion_model.out.0.weight", "model.diffusion_model.out.0.gamma", "unet/conv_out.weight")

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("name", KNOWN)
    def test_known_ones(self, name, base):
        key_map = map_keys([base, name])
        assert key_map.ignored == {name: self.KNOWN[name]} and len(key_map.sources) == 1 and not key_map.unknown

    @pytest.mark.parametrize("name", ["text_encoder/logit_scale", "text_encoder/vision_model.x.weight",
                                      "text_encoder/text_model.embeddings.position_ids", "vae/loss.logvar",
                                      "vae/model_ema.decay"])  # fmt: skip
    def test_those_of_a_diffusers_folder(self, name):
        assert list(map_keys(["unet/conv_out.weight", name]).ignored) == [name]

    @pytest.mark.parametrize("name", UNKNOWN)
    def test_unknown_keys_are_not_ignored(self, name):
        key_map = map_keys([self.BASES[0], name])
        assert not key_map.ignored and (name in key_map.unknown or name in key_map.sources)

    def test_published_weights_are_not_among_them(self, published):
        for names in published.values():
            assert not [name for name in names if find_unused(name) and not name.endswith("position_ids")]
