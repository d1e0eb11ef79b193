"""The metadata for others: which keys there are, and what they say."""

from __future__ import annotations

import json

import pytest

from ldm.lora.metadata import (
    OF_BASE,
    OF_DATA,
    OF_DATA_AS_JSON,
    OF_LOSS,
    OF_RATES,
    OF_RUN,
    modelspec_metadata,
    ss_metadata,
    tag_frequency,
)

# sd-scripts 0.10.1, without `ss_`: train_network.py. Not here: what ldm.lora.formats.kohya writes of the network.
KOHYA = set(
    """
    session_id training_started_at training_finished_at output_name num_train_images num_validation_images
    num_reg_images num_batches_per_epoch num_epochs epoch steps max_train_steps seed training_comment
    network_dropout clip_skip
    learning_rate unet_lr text_encoder_lr optimizer lr_scheduler lr_warmup_steps max_grad_norm
    gradient_accumulation_steps gradient_checkpointing mixed_precision full_fp16 cache_latents lowram
    noise_offset multires_noise_iterations multires_noise_discount adaptive_noise_scale ip_noise_gamma
    zero_terminal_snr min_snr_gamma debiased_estimation loss_type prior_loss_weight scale_weight_norms
    batch_size_per_device total_batch_size resolution flip_aug random_crop shuffle_caption keep_tokens
    caption_dropout_rate max_token_length enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso
    dataset_dirs reg_dataset_dirs tag_frequency bucket_info
    sd_model_name sd_model_hash new_sd_model_hash
    """.split()
)


def test_the_keys_are_kohyas():
    names = [*OF_RUN, *OF_RATES, *OF_LOSS, *OF_DATA, *OF_DATA_AS_JSON, *OF_BASE]
    assert set(names) == KOHYA and len(names) == len(KOHYA)


def test_values_are_texts_as_pythons_str_gives_them_and_json_for_dictionaries():
    values = {name: None for name in KOHYA} | {"seed": 3, "learning_rate": 1e-5, "lowram": False, "resolution": (8, 16)}
    values["dataset_dirs"] = {"10_猫": {"n_repeats": 10, "img_count": 2}}
    found = ss_metadata(values)
    assert {key[:3] for key in found} == {"ss_"} and all(isinstance(text, str) for text in found.values())
    assert [found[f"ss_{name}"] for name in ("seed", "learning_rate", "lowram", "resolution", "unet_lr")] == [
        "3", "1e-05", "False", "(8, 16)", "None",
    ]  # fmt: skip
    assert found["ss_dataset_dirs"] == '{"10_猫":{"n_repeats":10,"img_count":2}}' and found["ss_bucket_info"] == "null"


@pytest.mark.parametrize("change", [{"seeds": 1}, {"seed": ...}])
def test_a_key_that_is_missing_or_unknown_is_an_error(change):
    values = {name: None for name in KOHYA} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        ss_metadata({name: value for name, value in values.items() if value is not ...})


def test_a_folder_has_no_hash():
    values = {name: None for name in KOHYA - {"sd_model_hash", "new_sd_model_hash"}}
    assert "ss_sd_model_hash" not in ss_metadata(values)


def test_tags_are_counted_by_folder_in_lower_case_the_commonest_first():
    captions = [
        ("10_cat", "Blue, cat ,blue", ","), ("10_cat", "CAT,, cat, sitting", ","), ("dog", "", ","),
        ("birds", "a|b", "|"),
    ]  # fmt: skip
    found = tag_frequency(captions)
    assert found == {"10_cat": {"cat": 3, "blue": 2, "sitting": 1}, "dog": {}, "birds": {"a": 1, "b": 1}}
    assert list(found["10_cat"]) == ["cat", "blue", "sitting"]


def test_of_too_many_tags_the_commonest_are_kept():
    captions = [("a", f"common, sentence number {number}", ",") for number in range(1000)]
    found = tag_frequency(captions, most_bytes=3000)
    assert next(iter(found["a"].items())) == ("common", 1000) and 50 < len(found["a"]) < 200
    assert len(json.dumps(found)) < 3100


@pytest.mark.parametrize(
    ("architecture", "prediction", "expected"),
    [
        ("sd1", "epsilon", ("stable-diffusion-v1/lora", "epsilon")),
        ("sd2", "epsilon", ("stable-diffusion-v2-512/lora", "epsilon")),
        ("sd2", "v_prediction", ("stable-diffusion-v2-768-v/lora", "v")),
        ("nano", "v_prediction", ("nano/lora", "v")),
    ],
)
def test_modelspec(architecture, prediction, expected):
    found = modelspec_metadata(
        architecture,
        prediction,
        title="t",
        resolution=(512, 768),
        seconds=1e9 + 0.5,
        author="me",
        license=None,
        tags="",
    )
    assert found == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": expected[0],
        "modelspec.implementation": "diffusers",
        "modelspec.title": "t",
        "modelspec.resolution": "512x768",
        "modelspec.date": "2001-09-09T01:46:40",
        "modelspec.prediction_type": expected[1],
        "modelspec.author": "me",
    }
