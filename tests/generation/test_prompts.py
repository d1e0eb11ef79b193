"""Prompts with weights, chunks, wildcards, LoRA tags and flags, from the settings to the images."""

from __future__ import annotations

import json
from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.diffusion.sampling import Sampling
from ldm.errors import UserError
from ldm.generation.generate import generate
from ldm.generation.pipeline import Pipeline
from ldm.generation.plan import plan_generation
from ldm.generation.requests import ImageRequest
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.merged import MergedLoRA
from ldm.lora.spec import LoRASpec
from ldm.lora.strength import Strength
from ldm.models.stable_diffusion import build_model
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import load_model_config
from ldm.weights.checkpoint import write_checkpoint
from tests.conftest import ROOT
from tests.named_weights import relative_error
from tests.network_cases import model_with_named_weights

MICRO = ROOT / "tests" / "training" / "micro.yaml"
FEW = Sampling(num_inference_steps=2, guidance_scale=2.0, batch_size=2)
LONG = "word " * 80 + "and a hat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with two layers of text, a folder with LoRAs a and sub/b, and wildcards."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model.yaml").write_text(MICRO.read_text().replace("num_layers: 1", "num_layers: 2"))
    config = load_model_config(folder / "model.yaml")
    np.random.seed(0)
    model = build_model(config)
    bias = model.cond_stage_model.transformer.text_model.final_layer_norm.bias
    bias.set_data(ms.Tensor(np.random.uniform(0, 1, bias.shape).astype(np.float32)))  # or the mean of z would be 0
    write_checkpoint(folder / "base.ckpt", {p.name: p.asnumpy().copy() for p in model.get_parameters()})
    inject_lora(model, LoRASpec(rank=2, text_encoder=True, targets="all"))
    (folder / "loras" / "sub").mkdir(parents=True)
    for name, form in (("a.ckpt", "mindone"), ("sub/b.safetensors", "kohya")):
        for parameter in model.trainable_params():
            parameter.set_data(ms.Tensor((0.2 * np.random.standard_normal(parameter.shape)).astype(np.float32)))
        write_lora(folder / "loras" / name, get_lora(model, config), form, config)
    (folder / "wild").mkdir()
    (folder / "wild" / "colours.txt").write_text("red\ngreen\nblue\n")
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    ms.set_context(mode=ms.GRAPH_MODE)
    # In fp32: images of prompts that are encoded together or alone are compared with bounds of its rounding.
    yield Pipeline.from_checkpoint(folder / "base.ckpt", config=folder / "model.yaml", dtype=ms.float32, device="CPU")
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def default(request):
    if "pipeline" in request.fixturenames:
        pipeline = request.getfixturevalue("pipeline")
        pipeline.unload_lora()
        pipeline.configure_prompts()


# ---- text embeddings -------------------------------------------------------------------------------------------------


def test_weight_one_and_one_chunk_are_the_same_bits_in_every_syntax(pipeline):
    texts = ["", "a red apple", "word " * 75, "émigré, 日本"]
    plain = pipeline.encode_prompts(texts)
    for options in ({"syntax": "a1111"}, {"support_long_prompts": True}):
        pipeline.configure_prompts(**options)
        np.testing.assert_array_equal(pipeline.encode_prompts(texts), plain)
    pipeline.configure_prompts(syntax="a1111")
    np.testing.assert_array_equal(pipeline.encode_prompts(["(a:1.0) red [(apple:1.1)]"]).shape, (1, 77, 32))
    np.testing.assert_array_equal(pipeline.encode_prompts(["(a:1.0) red apple", *texts[1:]])[0], plain[1])


def test_a_weight_multiplies_its_token_and_the_mean_of_the_chunk_stays(pipeline):
    z = pipeline.encode_prompts(["a red apple"])[0].astype(np.float64)
    pipeline.configure_prompts(syntax="a1111")
    weighted = pipeline.encode_prompts(["a (red:1.5) [apple]"])[0]
    expected = z.copy()
    expected[2] *= 1.5
    expected[3] /= 1.1
    expected *= z.mean() / expected.mean()
    np.testing.assert_allclose(weighted, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


def test_long_prompts_are_chunks_that_are_encoded_by_themselves(pipeline):
    parts = pipeline.encode_prompts(["word " * 75, "word " * 5 + "and a hat", ""])
    pipeline.configure_prompts(support_long_prompts=True)
    long, short = pipeline.encode_prompts([LONG, ""])
    assert long.shape == short.shape == (154, 32)
    np.testing.assert_array_equal(long, np.concatenate(parts[:2]))
    np.testing.assert_array_equal(short, np.concatenate([parts[2], parts[2]]))
    pipeline.configure_prompts(syntax="a1111")
    np.testing.assert_array_equal(
        pipeline.encode_prompts(["word " * 5 + "BREAK " + "word " * 5 + "and a hat"])[0, 77:], parts[1]
    )


def test_a_weight_that_leaves_nothing_is_named(pipeline):
    # With the mean of 0 there is nothing to restore.
    pipeline.configure_prompts(syntax="a1111")
    zero = lambda tokens: ms.Tensor(np.zeros((tokens.shape[0], 77, 4), np.float32))  # noqa: E731
    real, pipeline.text_encoder = pipeline.text_encoder, zero
    try:
        with pytest.raises(UserError, match="its weights leave nothing of it"):
            pipeline.encode_prompts(["(x:0.5)"])
    finally:
        pipeline.text_encoder = real


def test_clip_skip_takes_an_earlier_layer_and_its_own_gives_the_same_bits(pipeline):
    text_model = pipeline.model.cond_stage_model.transformer.text_model
    last = pipeline.encode_prompts(["a red apple"])
    pipeline.configure_prompts(clip_skip=2)
    skipped = pipeline.encode_prompts(["a red apple"])
    tokens = ms.Tensor(pipeline.tokenizer.encode(["a red apple"]))
    hidden = text_model.encoder.layers[0](text_model.embeddings(tokens))
    np.testing.assert_allclose(skipped, text_model.final_layer_norm(hidden).asnumpy(), atol=1e-5)
    assert np.abs(skipped - last).max() > 1e-2
    assert len(list(pipeline.model.get_parameters())) == len({p.name for p in pipeline.model.get_parameters()})
    pipeline.configure_prompts(clip_skip=1)
    np.testing.assert_array_equal(pipeline.encode_prompts(["a red apple"]), last)
    for clip_skip in (0, 3):
        with pytest.raises(UserError, match=f"clip_skip {clip_skip}: .* takes 1 to 2"):
            pipeline.configure_prompts(clip_skip=clip_skip)


@pytest.mark.parametrize(
    "yaml, clip_skip, layers",
    [("v1", None, 12), ("v1", 1, 12), ("v1", 2, 11), ("v1", 12, 1), ("v2", None, 23), ("v2", 2, 23), ("v2", 3, 22)],
)
def test_clip_skip_counts_from_the_last_hidden_state(yaml, clip_skip, layers):
    from ldm.prompts.clip_skip import layers_to_run

    path = {"v1": "v1-inference.yaml", "v2": "v2-inference.yaml"}[yaml]
    config = load_model_config(ROOT / "configs" / path)
    assert layers_to_run(config, clip_skip) == layers
    with pytest.raises(UserError, match="clip_skip"):
        layers_to_run(config, 1 if yaml == "v2" else 13)


def test_chunks_and_clip_skip_are_those_of_compel():
    golden = np.load(ROOT / "tests" / "golden" / "compel.npz")
    ms.set_context(mode=ms.GRAPH_MODE)
    pipeline = Pipeline(model_with_named_weights(load_model_config(ROOT / "tests" / "golden" / "small_sd1.yaml")))
    texts = {"short": "a red apple on a table", "long": "a red apple on a wooden table " * 25}
    for suffix, clip_skip in (("", None), ("_clip_skip_2", 2)):
        pipeline.configure_prompts(support_long_prompts=True, clip_skip=clip_skip)
        for name, text in texts.items():
            embeddings = pipeline.encode_prompts([text], 1)[0]
            assert len(embeddings) == {"short": 77, "long": 3 * 77}[name]
            assert relative_error(embeddings[::4], golden[name + suffix]) < 1e-5


# ---- images ----------------------------------------------------------------------------------------------------------


def images_of(pipeline, requests):
    batches = pipeline.batches_of(requests)
    found = {
        int(index): latents
        for batch in pipeline.generate_batches(batches, progress=False)
        for index, latents in zip(batch.indices, batch.latents)
    }
    return [found[request.index] for request in requests], batches


def test_images_of_several_lengths_do_not_depend_on_each_other(pipeline):
    pipeline.configure_prompts(syntax="a1111")
    one = replace(FEW, batch_size=1)
    prompts = [("a (red:1.3) cat", ""), (LONG, "blurry"), ("a dog", LONG), ("a cat", "")]
    requests = [ImageRequest(i, prompt, negative, 7, i, one) for i, (prompt, negative) in enumerate(prompts)]
    together, batches = images_of(pipeline, requests)
    assert [[request.index for request in batch.requests] for batch in batches] == [[0], [3], [1], [2]]
    assert len(pipeline.unet.compile_cache) == 2  # one graph for each number of chunks
    for latents, request in zip(together, requests):
        np.testing.assert_allclose(latents, images_of(pipeline, [request])[0][0], atol=1e-4)
    assert len({latents.tobytes() for latents in together}) == 4
    # Attention to two equal chunks is attention to one of them.
    twice = ImageRequest(3, "a cat BREAK a cat", "BREAK BREAK", 7, 3, one)
    assert pipeline._chunk_count(twice) == 2
    np.testing.assert_allclose(images_of(pipeline, [twice])[0][0], together[3], atol=1e-4)
    # A prompt of one chunk is the image of the plain syntax.
    pipeline.configure_prompts()
    (plain,) = pipeline.generate(["a cat"], one, 7, progress=False)
    pipeline.configure_prompts(syntax="a1111")
    (same,) = pipeline.generate(["a cat"], one, 7, progress=False)
    np.testing.assert_array_equal(same.latents, plain.latents)


def test_loras_of_requests_are_those_that_are_merged_by_hand(pipeline, folder):
    a, b = (
        MergedLoRA(name, read_lora(folder / "loras" / name, pipeline.config), Strength(0.8, 0.4))
        for name in ("a.ckpt", "sub/b.safetensors")
    )
    one = replace(FEW, batch_size=1)
    pipeline.configure_prompts(syntax="a1111")
    requests = [
        ImageRequest(i, "a cat", "", 7, 0, one, loras) for i, loras in enumerate([None, (a,), (a, b), None, (a,)])
    ]
    found, batches = images_of(pipeline, requests)
    assert [batch.requests[0].index for batch in batches] == [0, 3, 1, 4, 2]  # exchanged as rarely as possible
    np.testing.assert_array_equal(found[0], found[3])
    np.testing.assert_array_equal(found[1], found[4])
    assert pipeline.holds_base_weights
    for loras, expected in (([a], found[1]), ([a, b], found[2])):
        pipeline.merge_loras(loras)
        np.testing.assert_array_equal(images_of(pipeline, [replace(requests[0])])[0][0], expected)


def test_the_tokens_of_a_requests_lora_count(pipeline, folder):
    vectors = np.ones((5, 32), np.float32)
    lora = replace(read_lora(folder / "loras" / "a.ckpt", pipeline.config), embeddings={"<hat>": vectors})
    pipeline.configure_prompts(support_long_prompts=True)
    plain = ImageRequest(0, "word " * 72 + "<hat>", "", 7, 0, FEW)  # three tokens as words
    with_token = replace(plain, loras=(MergedLoRA("a", lora, Strength(1, 1)),))
    assert pipeline._chunk_count(plain) == 1 and pipeline._chunk_count(with_token) == 2
    first, second = pipeline.batches_of([with_token, plain])
    assert pipeline.encode_prompts(second.texts).shape[1] == 77
    pipeline.merge_loras(with_token.loras)
    assert pipeline.encode_prompts(first.texts).shape[1] == 154
    assert pipeline._chunk_count(replace(with_token, prompt="word " * 70 + "<hat>")) == 1


# ---- the plan --------------------------------------------------------------------------------------------------------


def planned(folder, **settings):
    return plan_generation(
        GenerateSettings(config=str(folder / "model.yaml"), ckpt_path=str(folder / "base.ckpt"), scale=7.0, **settings)
    )


def test_without_new_settings_a_prompt_is_what_it_was(folder):
    prompt = "a (red:1.3) {cat|dog} <lora:none:1> __x__ --n blurry BREAK"
    plan = planned(folder, prompt=prompt, n_samples=2)
    for index, image in enumerate(plan.images):
        assert (image.prompt, image.text, image.loras, image.template) == (prompt, prompt, (), None)
        assert (image.seed, image.noise_index, image.sampling) == (42, index, plan.sampling)


def test_the_flags_of_a_line_are_settings_of_its_images(folder, tmp_path):
    (tmp_path / "p.txt").write_text(
        "# a comment\n\na cat --n blurry --w 64 --h 32 --d 5 --l 3 --s 4 --ss ddim\na dog -- brown\n", "utf-8"
    )
    plan = planned(
        folder, data_path=str(tmp_path / "p.txt"), prompt_flags=True, n_samples=2, negative_prompt="grey", seed=9
    )
    first, second, third, fourth = plan.images
    assert (first.prompt, first.negative_prompt, third.prompt, third.negative_prompt) == (
        "a cat", "blurry", "a dog -- brown", "grey",
    )  # fmt: skip
    # A seed of the line begins anew, wherever the line stands.
    assert [(image.seed, image.noise_index) for image in plan.images] == [(5, 0), (5, 1), (9, 2), (9, 3)]
    sampling = first.sampling
    assert (sampling.width, sampling.height, sampling.guidance_scale, sampling.num_inference_steps) == (64, 32, 3, 4)
    assert sampling.sampler == "ddim" and third.sampling == plan.sampling and not plan.has_one_size
    assert [plan.final_size(place)[0] for place in range(4)] == [32, 32, *[plan.sampling.height] * 2]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": "a --w 33", "prompt_flags": True}, "prompt 1: W is 33"),
        ({"prompt": "a --x 3", "prompt_flags": True}, "prompt 1: unknown flag --x"),
        ({"prompt": "a --s no", "prompt_flags": True}, "prompt 1: --s"),
        ({"prompt": "__x__", "enable_wildcard": True}, "--wildcard_dir <folder>"),
        ({"prompt": "x", "wildcard_dir": "/nowhere"}, "wildcard_dir /nowhere is not a folder"),
        ({"prompt": "x", "wildcard_dir": "WILD", "enable_wildcard": False}, "has no effect"),
        ({"prompt": "__colour__", "wildcard_dir": "WILD"}, "did you mean __colours__"),
        ({"prompt": "x", "lora_dir": "LORAS"}, "add --prompt_syntax a1111"),
        ({"prompt": "x", "lora_dir": "/nowhere", "prompt_syntax": "a1111"}, "lora_dir /nowhere is not a folder"),
        ({"prompt": "<lora:a:1>", "prompt_syntax": "a1111"}, "prompt 1: <lora:a>: give the folder .* --lora_dir"),
        ({"prompt": "<lora:c:1>", "prompt_syntax": "a1111", "lora_dir": "LORAS"}, "did you mean"),
        ({"prompt": "x", "negative_prompt": "<lora:a:1>", "prompt_syntax": "a1111"}, "move the tag to the prompt"),
        ({"prompt": "(x:101)", "prompt_syntax": "a1111"}, "a weight of 101"),
        ({"prompt": "x", "clip_skip": 3}, "clip_skip 3: .* takes 1 to 2"),
        ({"prompt": "x", "clip_skip": 0}, "clip_skip"),
        ({"prompt": "x", "prompt_syntax": "compel"}, "one of"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_a_network_is_loaded(settings, message, folder):
    places = {"WILD": folder / "wild", "LORAS": folder / "loras"}
    settings = {
        name: str(places.get(value, value)) if isinstance(value, str) else value for name, value in settings.items()
    }
    with pytest.raises(UserError, match=message):
        planned(folder, **settings)


def test_latents_of_several_sizes_are_refused(folder, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb --w 64\n")
    with pytest.raises(UserError, match="save_latents holds latents of one size"):
        planned(folder, data_path=str(tmp_path / "p.txt"), prompt_flags=True, save_latents=str(tmp_path / "x.npy"))


def test_wildcards_depend_on_seed_and_image_alone(folder):
    options = {"wildcard_dir": str(folder / "wild"), "negative_prompt": "{x|y}"}
    many = planned(folder, prompt="a __colours__ {cat|dog}", n_samples=8, batch_size=3, **options).images
    few = planned(folder, prompt="a __colours__ {cat|dog}", n_samples=2, batch_size=1, **options).images
    assert many[:2] == [image._replace(sampling=many[0].sampling) for image in few]
    assert len({image.prompt for image in many}) > 3 and {image.negative_prompt for image in many} == {"x", "y"}
    assert {image.template for image in many} == {"a __colours__ {cat|dog}"} and many[0].text == many[0].prompt
    other = planned(folder, prompt="a __colours__ {cat|dog}", n_samples=8, seed=1, **options).images
    assert [image.prompt for image in other] != [image.prompt for image in many]


def test_use_lora_false_leaves_out_the_loras_of_prompts(folder, caplog):
    plan = planned(folder, prompt="a <lora:a:1>", prompt_syntax="a1111", lora_dir=str(folder / "loras"), use_lora=False)
    assert plan.images[0].loras == () and plan.images[0].text == "a " and "not applied" in caplog.text


# ---- a run, in pynative mode, which compiles nothing -----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    (out / "p.txt").write_text(
        "(a cat:1.2) <lora:a:0.8:0.5>\na dog --w 64 --d 3\n{a __colours__ hat|a hat} <lora:b:1>\na plain cat\n", "utf-8"
    )
    generate(
        GenerateSettings(
            config=str(folder / "model.yaml"),
            ckpt_path=str(folder / "base.ckpt"),
            data_path=str(out / "p.txt"),
            prompt_flags=True,
            prompt_syntax="a1111",
            lora_dir=str(folder / "loras"),
            wildcard_dir=str(folder / "wild"),
            clip_skip=2,
            lora_ckpt_path=[f"{folder}/loras/a.ckpt:0.5"],
            sampling_steps=1,
            scale=1.0,
            output_path=str(out),
            mode=1,
            device_target="CPU",
        )
    )
    yield [Image.open(path) for path in sorted((out / "samples").glob("*.png"))], out
    ms.set_context(mode=ms.PYNATIVE_MODE)


def test_a_png_says_what_its_own_image_is_made_from(run):
    images, out = run
    texts = [image.text for image in images]
    assert [image.size for image in images] == [(16, 16), (64, 16), (16, 16), (16, 16)]
    assert texts[0]["prompt"] == "(a cat:1.2) <lora:a:0.8:0.5>" and "prompt_template" not in texts[0]
    assert texts[1]["prompt"] == "a dog" and (texts[1]["seed"], texts[1]["index"]) == ("3", "0")
    assert texts[2]["prompt_template"] == "{a __colours__ hat|a hat} <lora:b:1>"
    assert texts[2]["prompt"] in {f"a {c}hat <lora:b:1>" for c in ("", "red ", "green ", "blue ")}
    names = [[(lora["file"], lora["weight"]) for lora in json.loads(text["lora"])] for text in texts]
    base = ("a.ckpt", 0.5)
    assert names == [[base, ("a.ckpt", 0.5)], [base], [base, ("b.safetensors", 1.0)], [base]]
    tagged = json.loads(texts[0]["lora"])[1]
    assert tagged["text_encoder_weight"] == 0.8 and len(tagged["sha256"]) == 64 and tagged["from_prompt"] is True
    for text, width in zip(texts, (16, 64, 16, 16)):
        settings = json.loads(text["settings"])
        assert settings["W"] == width and settings["clip_skip"] == 2 and settings["prompt_syntax"] == "a1111"
    assert not (out / "grid.png").exists()  # the images have several sizes


def test_the_image_of_a_line_is_that_of_the_pipeline(run, folder):
    images, _ = run
    ms.set_context(mode=ms.PYNATIVE_MODE)
    pipeline = Pipeline.from_checkpoint(folder / "base.ckpt", config=folder / "model.yaml")
    pipeline.load_lora(folder / "loras" / "a.ckpt", 0.5)
    pipeline.load_lora(folder / "loras" / "a.ckpt", Strength(0.5, 0.8))
    pipeline.configure_prompts(syntax="a1111", clip_skip=2)
    image = pipeline("(a cat:1.2) ", num_inference_steps=1, guidance_scale=1.0, seed=42, progress=False).images[0]
    assert image.tobytes() != images[3].tobytes()
    difference = np.abs(np.asarray(image, int) - np.asarray(images[0], int))
    assert difference.max() <= 1
