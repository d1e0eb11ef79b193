"""Which parameter is trained at which rate."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from ldm.lora.spec import LoRASpec
from ldm.settings.train import TrainSettings
from ldm.training.rates import make_rates

UNET, TEXT = "model.diffusion_model.x.lora_", "cond_stage_model.transformer.x.lora_"
NAMES = [f"{layer}{factor}.weight" for layer in (UNET, TEXT) for factor in ("down", "up")]


def absolute(**settings):
    """The rates of the unet's down and up matrix, and of the text encoder's."""
    given = TrainSettings(use_lora=True, lora_ft_text_encoder=True, start_learning_rate=1e-4, **settings)
    rates = make_rates(given, NAMES, LoRASpec())
    assert max(rates.factors.values()) == 1.0 and rates.differ
    return [1e-4 * rates.largest * rates.factors[name] for name in NAMES]


def test_one_rate_has_factors_of_exactly_one():
    for settings in ({}, {"unet_lr": 3e-4, "text_encoder_lr": 3e-4}, {"unet_lr": 1e-4}):
        rates = make_rates(TrainSettings(use_lora=True, lora_ft_text_encoder=True, **settings), NAMES[:2], LoRASpec())
        assert set(rates.factors.values()) == {1.0} and not rates.differ
    assert make_rates(TrainSettings(), NAMES, LoRASpec()).largest == 1.0


def test_unet_and_text_encoder_have_their_own_rates_or_the_common_one():
    assert absolute(unet_lr=2e-4, text_encoder_lr=5e-5) == pytest.approx([2e-4, 2e-4, 5e-5, 5e-5])
    assert absolute(text_encoder_lr=5e-5) == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5])


def test_the_logged_rate_is_that_of_the_unet_without_lora_plus():
    given = TrainSettings(use_lora=True, start_learning_rate=1e-5, unet_lr=1e-4, loraplus_lr_ratio=16)
    assert make_rates(given, NAMES, LoRASpec()).shown == pytest.approx(10)
    assert make_rates(TrainSettings(use_lora=True, loraplus_lr_ratio=16), NAMES, LoRASpec()).shown == 1.0


def test_lora_plus_raises_the_rate_of_the_up_matrices():
    assert absolute(loraplus_lr_ratio=16) == pytest.approx([1e-4, 16e-4, 1e-4, 16e-4])
    assert absolute(loraplus_lr_ratio=4, text_encoder_lr=5e-5) == pytest.approx([1e-4, 4e-4, 5e-5, 2e-4])


def test_a_module_of_a_lora_config_has_its_own_rate():
    spec = LoRASpec().with_config({"x": {"r": 2}, "diffusion_model.x": {"r": 2, "lr": 3e-4}})
    given = TrainSettings(use_lora=True, start_learning_rate=1e-4, unet_lr=2e-4, loraplus_lr_ratio=2)
    rates = make_rates(given, NAMES, spec)
    values = [1e-4 * rates.largest * rates.factors[name] for name in NAMES]
    assert values == pytest.approx([3e-4, 6e-4, 1e-4, 2e-4])
    given = TrainSettings(use_lora=True, optim="prodigy", start_learning_rate=1.0)
    with pytest.raises(UserError, match="leave lr out of lora_config"):
        make_rates(given, NAMES, spec)


def test_a_rate_is_no_part_of_what_a_resumed_run_must_have():
    spec, other = (LoRASpec().with_config({"x": {"r": 2, **rate}}) for rate in ({}, {"lr": 1e-3}))
    assert repr(spec.modules) == repr(other.modules)


def test_lora_plus_is_for_the_factors_that_start_at_zero():
    parts = (
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "lokr_w1",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "dora_scale",
    )
    names = [UNET + part for part in parts]
    rates = make_rates(TrainSettings(use_lora=True, loraplus_lr_ratio=16), names, LoRASpec())
    assert {part for part, name in zip(parts, names) if rates.factors[name] == 1.0} == {
        "hada_w2_a", "lokr_w2", "lokr_w2_b",
    }  # fmt: skip
    assert rates.shown == 1.0 and rates.factors[names[0]] == 1 / 16
