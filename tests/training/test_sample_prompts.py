"""Prompts to draw while training: kohya's line flags, JSON, TOML and lists, with the defaults of text_to_image.py."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.settings.generate import GenerateSettings
from ldm.settings.model import load_model_config
from ldm.settings.samples import SampleSettings
from ldm.training.sample_prompts import check_sample_prompts, read_sample_prompts
from tests.training.micro import MICRO

LINE = "a -- red cat --n blurry, grey --W 32 --h 16 --d 7 --l 2.5 --s 5 --ss dpmsolver"


def read(given, **settings):
    return read_sample_prompts(SampleSettings(sample_prompts=given, **settings), load_model_config(MICRO))


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def described(prompt):
    sampling = prompt.sampling
    return (
        prompt.prompt, prompt.negative_prompt, prompt.seed, sampling.width, sampling.height, sampling.guidance_scale,
        sampling.num_inference_steps, sampling.sampler,
    )  # fmt: skip


ALL = ("a -- red cat", "blurry, grey", 7, 32, 16, 2.5, 5, "dpm_solver")


def test_a_line_has_kohyas_flags(tmp_path):
    (prompt,) = read(write(tmp_path / "prompts.txt", f"# a comment\n\n{LINE}\n"))
    assert described(prompt) == ALL
    assert prompt.line == LINE and prompt.where.endswith("prompts.txt, line 3")


def test_what_a_prompt_leaves_out_is_that_of_text_to_image():
    first, second = read(["a cat", "--ss ddim"], sample_sampler="dpmsolver")
    assert described(first) == (
        "a cat", "", GenerateSettings.seed, 16, 16, 7.5, GenerateSettings.sampling_steps, "dpm_solver",
    )  # fmt: skip
    assert (second.prompt, second.sampling.sampler) == ("", "ddim")


def test_json_and_toml_have_kohyas_names(tmp_path):
    values = (
        '"prompt": "a -- red cat", "negative_prompt": "blurry, grey", "width": 32, "height": 16, "seed": 7, '
        '"scale": 2.5, "sample_steps": 5, "sample_sampler": "dpmsolver"'
    )
    of_json = read(write(tmp_path / "p.json", f'[{{{values}}}, "{LINE}"]'))
    toml = """
        [prompt]
        negative_prompt = "blurry, grey"
        width = 32
        height = 16
        seed = 7
        sample_steps = 9
        [[prompt.subset]]
        prompt = "a -- red cat"
        scale = 2.5
        sample_steps = 5
        sample_sampler = "dpmsolver"
    """
    of_toml = read(write(tmp_path / "p.toml", toml))
    assert [described(prompt) for prompt in (*of_json, *of_toml)] == [ALL] * 3
    assert read(of_json[0].line)[0].sampling == of_json[0].sampling  # prompts.txt can be read again


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "a dog\na cat --x 3", ("p.txt, line 2", "unknown flag --x", "--ss")),
        ("p.txt", "a cat --w ten", ("line 1", "--w", '"ten"', "whole number")),
        ("p.txt", "a cat --w 17", ("line 1", "17", "multiples of 2", "16")),
        ("p.txt", "a cat --s 0", ("line 1, --s", "at least 1")),
        ("p.txt", "a cat --s 2000", ("line 1", "2000", "1000")),
        ("p.txt", "a cat --ss dpmsingle", ("line 1, --ss", "dpmsingle", "dpmsolver++")),
        ("p.txt", "a cat --d 1 --d 2", ("line 1", "--d is given twice")),
        ("p.txt", "x" * 10_001, ("line 1", "10,001 characters")),
        ("p.txt", "# nothing\n", ("p.txt", "no prompts")),
        ("p.txt", "a cat\n" * 100, ("100 prompts", "at most 99")),
        ("p.json", '{"prompt": "a cat"}', ("p.json", "must hold a list")),
        ("p.json", '[{"prompt": "a cat", "widht": 16}]', ("p.json, prompt 1", "widht", "width")),
        ("p.json", '[{"seed": 1}]', ("p.json, prompt 1", "has no prompt")),
        ("p.json", "[3]", ("p.json, prompt 1",)),
        ("p.json", "[", ("p.json", "not valid JSON")),
        ("p.toml", 'prompt = "a cat"', ("p.toml", "[[prompt.subset]]")),
        ("p.toml", "x", ("p.toml", "not valid TOML")),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, name, text, words):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / name, text))
    for word in words:
        assert word in str(error.value)


def test_a_prompt_may_end_in_the_name_of_a_file(tmp_path):
    sign = "a sign that says readme.txt"
    assert [prompt.prompt for prompt in read([sign, f"{'a long ' * 99}story.json"])][0] == sign
    assert [prompt.prompt for prompt in read(write(tmp_path / "my prompts.txt", "a dog\n"))] == ["a dog"]


@pytest.mark.parametrize(("given", "words"), [("no.txt", "does not exist"), (["no.txt", "a cat"], "beside others")])
def test_the_file_is_checked_before_a_model_is_known(given, words):
    with pytest.raises(UserError, match=words):
        check_sample_prompts(SampleSettings(sample_prompts=given))


def test_nothing_is_drawn_where_nothing_is_asked_for():
    assert read(None) == []


def test_a_sampler_that_cannot_begin_from_noise_alone_is_refused_where_the_training_does():
    settings = SampleSettings(sample_prompts=["a cat --ss euler", "a cat --ss heun"])
    assert len(read_sample_prompts(settings, load_model_config(MICRO))) == 2
    with pytest.raises(UserError, match="prompt 2: the sampler heun cannot begin from noise alone"):
        read_sample_prompts(settings, load_model_config(MICRO), from_noise_alone=True)
