"""The scoring networks: golden features, weights of every family, the nano CLIP. tests/parity has the live ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from ldm.errors import UserError
from ldm.metrics.networks import clip, inception, nano_clip
from ldm.metrics.preprocessing import inception_input
from ldm.models.clip import CLIP_MODELS, CLIPModel
from ldm.weights.checkpoint import write_checkpoint
from ldm.weights.clip import read_clip
from ldm.weights.inception import published_modules, read_inception
from tests.metrics.named_networks import CLIP_ARGUMENTS, clip_weights, inception_weights, mindone_inception, openai_clip
from tests.metrics.odd_images import open_plain, write_odd_images

pytestmark = pytest.mark.usefixtures("graph_mode")
GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.npz"
CONFIG = {
    "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
    "vision_config": {"num_attention_heads": 3, "hidden_act": "quick_gelu"},
}


@functools.cache
def clip_arrays() -> dict[str, np.ndarray]:
    return clip_weights({name: tuple(p.shape) for name, p in CLIPModel(**CLIP_ARGUMENTS).parameters_dict().items()})


def test_inceptions_features_are_pytorch_fids(tmp_path):
    golden = np.load(GOLDEN, allow_pickle=False)
    write_checkpoint(tmp_path / "inception.safetensors", inception_weights())
    network = inception(tmp_path / "inception.safetensors")
    assert "not one of the published files" in network.name and not network.is_nano
    prepared = network.prepare(open_plain(write_odd_images(tmp_path)["odd.png"]))
    np.testing.assert_allclose(
        network.image_encoder(Tensor(prepared[None])).asnumpy()[0], golden["features"], atol=1e-4
    )


def test_preprocessing_is_pytorch_fids(tmp_path):
    golden = np.load(GOLDEN, allow_pickle=False)
    for name, path in write_odd_images(tmp_path).items():
        prepared = inception_input(open_plain(path)).reshape(-1)[:: golden["every"]]
        # Lossy images depend on the installed decoder by a grey level.
        bound = 0.03 if name.endswith(".jpg") else 1e-6
        np.testing.assert_allclose(prepared, golden[f"input {name}"], atol=bound, err_msg=name)


def test_mindones_inception_is_the_same(tmp_path):
    arrays = inception_weights()
    write_checkpoint(tmp_path / "theirs.ckpt", mindone_inception(arrays))
    found = read_inception(tmp_path / "theirs.ckpt")
    assert set(found) == set(arrays)
    assert all((found[name] == arrays[name]).all() for name in arrays)


def test_mindones_names_are_as_published():
    names = {ours: theirs for ours, (theirs, _) in published_modules().items()}
    assert len(names) == 94
    for ours, theirs in (
        ("Conv2d_1a_3x3", "Conv2d_1a"), ("Conv2d_3b_1x1", "Conv2d_3b"), ("Mixed_5b.branch1x1", "Mixed_5b.branch0"),
        ("Mixed_5b.branch5x5_2", "Mixed_5b.branch1.1"), ("Mixed_5d.branch_pool", "Mixed_5d.branch_pool.1"),
        ("Mixed_6a.branch3x3", "Mixed_6a.branch0"), ("Mixed_6a.branch3x3dbl_3", "Mixed_6a.branch1.2"),
        ("Mixed_6c.branch7x7dbl_5", "Mixed_6c.branch2.4"), ("Mixed_7a.branch3x3_2", "Mixed_7a.branch0.1"),
        ("Mixed_7a.branch7x7x3_4", "Mixed_7a.branch1.3"), ("Mixed_7b.branch3x3_1", "Mixed_7b.branch1"),
        ("Mixed_7c.branch3x3_2b", "Mixed_7c.branch1_b"), ("Mixed_7c.branch3x3dbl_2", "Mixed_7c.branch2.1"),
        ("Mixed_7c.branch3x3dbl_3a", "Mixed_7c.branch2_a"),
    ):  # fmt: skip
        assert names[ours] == theirs


def without(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


FIRST, VARIANCE = "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"


@pytest.mark.parametrize(
    "change, answer",
    [
        (without(FIRST), "1 of 470 arrays are missing"),
        (lambda a: {**a, "layer9.weight": np.zeros(3, np.float32)}, "1 unknown"),
        (lambda a: {**a, FIRST: a[FIRST][:, :1]}, "another network"),
        (lambda a: {**a, FIRST: a[FIRST] * np.nan}, "not finite"),
        (lambda a: {**a, VARIANCE: a[VARIANCE] - 5.0}, "negative"),
        (lambda a: {"unet.weight": np.zeros(3, np.float32)}, "470 of 470 arrays are missing"),
    ],
)
def test_another_network_than_inception_is_refused(tmp_path, change, answer):
    write_checkpoint(tmp_path / "file.safetensors", change(inception_weights()))
    with pytest.raises(UserError, match=answer):
        read_inception(tmp_path / "file.safetensors")


def test_what_follows_the_features_is_not_needed(tmp_path):
    extra = {
        "fc.weight": np.zeros((1008, 2048), np.float32),
        "fc.bias": np.zeros(1008, np.float32),
        "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0, np.int64),
    }
    write_checkpoint(tmp_path / "file.safetensors", {**inception_weights(), **extra})
    assert not set(extra) & set(read_inception(tmp_path / "file.safetensors"))


def hugging_face(folder, arrays=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    write_checkpoint(folder / "model.safetensors", clip_arrays() if arrays is None else arrays)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["hugging face", "openai", "mindone"])
def test_every_familys_clip_is_the_same(tmp_path, family):
    if family == "hugging face":
        path = hugging_face(tmp_path / "folder")
        config = None
    else:
        path, config = tmp_path / "clip.ckpt", tmp_path / "clip.yaml"
        write_checkpoint(path, openai_clip(clip_arrays(), mindone=family == "mindone"))
        config.write_text(json.dumps(CONFIG))
    weights = read_clip(path, config)
    expected = clip_arrays()
    assert set(weights.arrays) == set(expected)
    assert all((weights.arrays[name] == array).all() for name, array in expected.items())
    assert weights.arguments == CLIP_ARGUMENTS


def test_clips_features_are_transformers(tmp_path):
    golden = np.load(GOLDEN, allow_pickle=False)
    network = clip(hugging_face(tmp_path / "folder"))
    texts = [str(text) for text in golden["clip texts"]]
    np.testing.assert_allclose(network.encode_texts(texts), golden["clip text features"], atol=5e-6)
    found = network.image_encoder(Tensor(golden["clip images"])).asnumpy()
    np.testing.assert_allclose(found, golden["clip image features"], atol=5e-6)


def test_a_batch_that_is_filled_up_changes_nothing(tmp_path):
    network = clip(hugging_face(tmp_path / "folder"))
    texts = ["a", "b", "c", "a"]
    whole = network.encode_texts(texts, 8)
    np.testing.assert_allclose(network.encode_texts(texts, 2), whole, atol=1e-6)
    np.testing.assert_array_equal(whole[0], whole[3])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    np.testing.assert_allclose(network.encode_pixels(pixels, 2), network.encode_pixels(pixels, 3), atol=1e-6)


def test_a_long_text_keeps_its_end_token(tmp_path):
    """Beyond the 75 tokens that fit, words change nothing; a text without its end would be pooled at another place."""
    network = clip(hugging_face(tmp_path / "folder"))
    long, longer, short = network.encode_texts(["cat " * 75, "cat " * 75 + "dog", "cat " * 74])
    np.testing.assert_array_equal(long, longer)
    assert np.abs(long - short).max() > 1e-4


SIZES = "its sizes are not those of a known model"
POSITIONS = "vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_model.embeddings.patch_embedding.weight"
TEXT_POSITIONS, LAYER = "text_model.embeddings.position_embedding.weight", "text_model.encoder.layers."
TOKENS = "text_model.embeddings.token_embedding.weight"
LAYERS = {tower: {**found, "num_hidden_layers": 2} for tower, found in CONFIG.items()}


@pytest.mark.parametrize(
    "change, config, answer",
    [
        (lambda a: a, None, SIZES),
        (without("text_projection.weight"), CONFIG, "1 of .* arrays are missing"),
        (without("visual_projection.weight"), CONFIG, "needs the whole CLIP"),
        (lambda a: {k: v for k, v in a.items() if k.startswith("text_model.")}, CONFIG, "needs the whole CLIP"),
        (lambda a: {**a, "unet.weight": np.zeros(3, np.float32)}, CONFIG, "1 of .* names are unknown"),
        (lambda a: {"lora.weight": np.zeros(3, np.float32)}, CONFIG, "is not a CLIP"),
        (lambda a: {**a, "vision_model.post_layernorm.weight": np.zeros(3, np.float32)}, CONFIG, "wanted"),
        (lambda a: {**a, TEXT_POSITIONS: np.zeros((32, 32), np.float32)}, CONFIG, "32 tokens"),
        (lambda a: {**a, "visual_projection.weight": a["visual_projection.weight"] * np.inf}, CONFIG, "not finite"),
        (lambda a: {**a, POSITIONS: a[POSITIONS][:0]}, CONFIG, "wrong .*position_embedding"),
        (lambda a: {**a, POSITIONS: a[POSITIONS][:1]}, CONFIG, "1 positions"),
        (lambda a: {**a, POSITIONS: a[POSITIONS][:16]}, CONFIG, "16 positions"),
        (lambda a: {k: v for k, v in a.items() if ".layers.1." not in k}, LAYERS, "text_config.num_hidden_layers is 2"),
        (lambda a: {**a, f"{LAYER}0.other.weight": np.zeros(3, np.float32)}, CONFIG, "1 unknown"),
        (lambda a: {**a, f"{LAYER}999999999.other.weight": np.zeros(3)}, CONFIG, "3 layers in text_model.* 999999999"),
        (lambda a: {**a, PATCHES: np.zeros((24, 3, 1, 100_000), np.float32)}, CONFIG, "wanted .width, 3, size, size"),
        (lambda a: {**a, TOKENS: np.zeros((100, 32), np.float32)}, CONFIG, "knows 100 tokens"),
        (lambda a: a, {"text_config": {}}, "no vision_config"),
        (lambda a: a, {**CONFIG, "text_config": {"num_attention_heads": 10**30}}, "does not divide"),
        (lambda a: a, {**CONFIG, "text_config": {"num_attention_heads": -1}}, "does not divide"),
        (lambda a: a, {**CONFIG, "text_config": {"hidden_size": "x" * 10_000}}, "do not belong together"),
        (lambda a: a, [1], "no text_config"),
        (lambda a: a, {**CONFIG, "text_config": {"num_attention_heads": 5}}, "does not divide"),
        (lambda a: a, {**CONFIG, "text_config": {"num_attention_heads": "2"}}, "does not divide"),
        (lambda a: a, {**CONFIG, "vision_config": {"hidden_act": "relu"}}, "quick_gelu or gelu"),
        (lambda a: a, {**CONFIG, "vision_config": {"hidden_size": 768}}, "do not belong together"),
    ],
)
def test_an_incomplete_clip_is_refused(tmp_path, change, config, answer):
    with pytest.raises(UserError, match=answer):
        clip(hugging_face(tmp_path / "folder", change(clip_arrays()), config))


def heads(weights) -> tuple[int, int]:
    return weights.arguments["text"]["num_heads"], weights.arguments["vision"]["num_heads"]


def test_heads_come_from_the_configuration_that_is_given_then_from_the_one_beside_the_weights(tmp_path):
    folder = hugging_face(tmp_path / "folder", config={"text_config": {}, "vision_config": {}})
    assert heads(read_clip(folder)) == (8, 12)  # Hugging Face leaves its defaults out
    (tmp_path / "other.json").write_text(json.dumps(CONFIG))
    assert heads(read_clip(folder, tmp_path / "other.json")) == (2, 3)


def test_heads_of_a_published_model_are_known_by_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setitem(CLIP_MODELS, "ViT-B/32", CLIP_ARGUMENTS)
    weights = read_clip(hugging_face(tmp_path / "folder", config=None))
    assert heads(weights) == (2, 3) and "ViT-B/32" in weights.name
    assert read_clip(weights.path, model_name="openai/clip-vit-base-patch32").arguments == weights.arguments


def test_positions_that_older_files_count_out_are_passed_over(tmp_path):
    counted = {f"{tower}_model.embeddings.position_ids": np.arange(3)[None] for tower in ("text", "vision")}
    weights = read_clip(hugging_face(tmp_path / "folder", {**clip_arrays(), **counted}))
    assert set(weights.arrays) == set(clip_arrays())


def test_another_model_than_the_one_named_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not ViT-B/16"):
        read_clip(hugging_face(tmp_path / "folder"), model_name="ViT-B/16")
    with pytest.raises(UserError, match="choose from ViT-B/32"):
        read_clip(hugging_face(tmp_path / "folder"), model_name="ViT-G/14")


def test_a_folder_without_weights_says_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match="model.safetensors"):
        read_clip(tmp_path)


def test_the_published_models_have_their_published_sizes():
    sizes = {
        name: (model["text"]["width"], model["vision"]["width"], model["projection_dim"], model["text"]["activation"])
        for name, model in CLIP_MODELS.items()
    }
    assert sizes.pop("nano")[3] == "quick_gelu"
    assert sizes == {
        "ViT-B/32": (512, 768, 512, "quick_gelu"),
        "ViT-B/16": (512, 768, 512, "quick_gelu"),
        "ViT-L/14": (768, 1024, 768, "quick_gelu"),
        "ViT-H/14": (1024, 1280, 1024, "gelu"),
    }


def test_the_nano_clip_knows_its_captions():
    from tools.nano.images import read_images

    network = nano_clip()
    images = read_images("emoji_noto", "test")[:40]
    scores = (
        network.encode_pixels(np.stack([p.pixels for p in images]))
        @ network.encode_texts([p.caption for p in images]).T
    )
    assert network.is_nano
    assert (scores.argmax(axis=0) == np.arange(40)).mean() > 0.7


def test_the_hash_is_that_of_the_weights(tmp_path):
    one = clip(hugging_face(tmp_path / "folder"))
    changed = {**clip_arrays(), "logit_scale": np.float32(1.0)}
    other = clip(hugging_face(tmp_path / "other", changed))
    assert len(one.sha256) == 64 and one.sha256 != other.sha256
    assert one.identity != clip(tmp_path / "folder", "squash").identity


def test_images_of_any_size_are_prepared(tmp_path):
    network = clip(hugging_face(tmp_path / "folder"))
    for size in ((1, 1), (300, 20), (32, 32)):
        assert network.prepare(Image.new("RGB", size)).shape == (3, 32, 32)
