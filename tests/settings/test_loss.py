"""The settings of the loss and the noise have the names and defaults of sd-scripts, and are checked together."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from ldm.errors import UserError
from ldm.settings.declare import names_of
from ldm.settings.loss import LossSettings
from ldm.settings.train import TrainSettings


def test_the_defaults_are_those_of_sd_scripts():
    assert asdict(LossSettings()) == {
        "loss_type": "l2", "huber_schedule": "snr", "huber_c": 0.1, "huber_scale": 1.0,
        "min_snr_gamma": None, "scale_v_pred_loss_like_noise_pred": False, "v_pred_like_loss": None,
        "debiased_estimation_loss": False,
        "noise_offset": None, "adaptive_noise_scale": None, "multires_noise_iterations": None,
        "multires_noise_discount": 0.3, "ip_noise_gamma": None, "zero_terminal_snr": False,
    }  # fmt: skip
    assert TrainSettings().loss_type == "l2"


def test_what_the_compiled_loss_depends_on_is_in_the_graphs_key():
    own = set(asdict(LossSettings()))
    on_the_host = {"noise_offset", "adaptive_noise_scale", "multires_noise_iterations", "multires_noise_discount"}
    assert own - set(names_of(TrainSettings, graph_key=True)) == on_the_host
    assert own <= set(names_of(TrainSettings, resume="fixed"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(loss_type="l3"), "loss_type.*l1.*huber.*smooth_l1"),
        (dict(huber_schedule="cosine"), "huber_schedule"),
        (dict(huber_c=0.0), "huber_c"),
        (dict(min_snr_gamma=-1.0), "min_snr_gamma"),
        (dict(multires_noise_discount=1.1), "multires_noise_discount"),
        (dict(adaptive_noise_scale=0.1), "adaptive_noise_scale needs noise_offset"),
        (dict(noise_offset=0.1, multires_noise_iterations=6), "noise_offset and multires_noise_iterations"),
        (dict(scale_v_pred_loss_like_noise_pred=True, v_pred_like_loss=1.0), "leave one of them out"),
    ],
)
def test_values_that_do_not_fit_are_refused(settings, says):
    for cls in (LossSettings, TrainSettings):
        with pytest.raises(UserError, match=says):
            cls(**settings)


@pytest.mark.parametrize(
    ("settings", "fits", "other"),
    [
        (dict(zero_terminal_snr=True), "v_prediction", "epsilon"),
        (dict(scale_v_pred_loss_like_noise_pred=True), "v_prediction", "epsilon"),
        (dict(v_pred_like_loss=1.0), "epsilon", "v_prediction"),
    ],
)
def test_a_loss_that_does_not_go_with_the_prediction_is_refused(settings, fits, other):
    LossSettings(**settings).check_prediction_type(fits, "v1.yaml")
    with pytest.raises(UserError, match=f"{next(iter(settings))}.* v1.yaml predicts .*leave it out"):
        LossSettings(**settings).check_prediction_type(other, "v1.yaml")


def test_0_turns_off_what_none_turns_off():
    names = ("min_snr_gamma", "v_pred_like_loss", "noise_offset", "multires_noise_iterations", "ip_noise_gamma")
    LossSettings(**dict.fromkeys(names, 0)).check_prediction_type("v_prediction", "v2.yaml")
