"""The ablations: what is trained, that it is not trained twice, the table between the markers of the page, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from tools.eval import ablations
from tools.eval.ablations import (
    BASE,
    BEGIN,
    END,
    PRODIGY,
    VARIANTS,
    Ablations,
    Row,
    folder_name,
    is_more_than_chance,
    prodigy_sentence,
    write_page,
)  # fmt: skip

# What a training of each variant and seed ends with.
LOSSES = {BASE: 0.40, "min-SNR 5": 0.38, PRODIGY: 0.41}


@pytest.fixture
def calls(monkeypatch):
    """Replaces the trainings, which are recorded, and the scores."""
    made = []

    def train(script, *flags):
        folder = Path(flags[flags.index("--output_path") + 1])
        made.append(flags)
        variant, seed = folder.parent.name, int(folder.name.removeprefix("seed"))
        name = next(name for name in LOSSES if folder_name(name) == variant)
        (folder / "ckpt").mkdir()
        (folder / "ckpt" / "lora.ckpt").write_text(f"{variant} {seed}")
        (folder / "ckpt" / "state-00000300.safetensors").write_text("state")
        loss = LOSSES[name] + seed / 100
        (folder / "validation.csv").write_text(
            f"step,images,loss\n0,validation,0.9\n0,training,0.8\n300,validation,{loss}\n300,training,0.1\n"
        )

    def score(self, runs):
        return {"clip_scores": [30.0 + seed for _, seed in runs], "base": 50.0, "network": "a network"}

    monkeypatch.setattr(ablations, "call", train)
    monkeypatch.setattr(Ablations, "_score", score)
    monkeypatch.chdir(Path.cwd())  # main changes it
    return made


def run(tmp_path, *flags):
    names = ("--output_path", str(tmp_path / "out"), "--page", str(tmp_path / "page.md"), "--variants", *LOSSES)
    ablations.main([*names, *flags])
    return (tmp_path / "page.md").read_text()


def test_every_variant_is_a_recipe(tmp_path, calls):
    made = Ablations(read_settings(ablations.Settings, ["--page", str(tmp_path / "page.md")]))
    for flags in VARIANTS.values():
        settings = read_settings(TrainSettings, made.training_flags(flags, 5), yaml_flag="train_config")
        assert (settings.max_steps, settings.seed, settings.use_lora) == (300, 5, True)
        assert settings.validation_data_path.endswith("emoji_fluent_hc/test")
    names = {folder_name(name) for name in VARIANTS}
    assert len(names) == len(VARIANTS) and all(
        name.replace("_", "").replace(".", "").replace("-", "").isalnum() for name in names
    )
    assert len(made.prompts) == 24


def test_the_page_has_a_row_for_each_variant_with_deviations(tmp_path, calls):
    page = run(tmp_path, "--seeds", "1", "2", "3")
    assert len(calls) == 9
    assert "| base recipe |  | 0.4200 +- 0.0100 |  | 32.00 +- 1.00 |  |" in page
    # All seeds differ by the same, so that the difference is none of chance.
    assert (
        "| min-SNR 5 | `--min_snr_gamma 5` | 0.4000 +- 0.0100 | **-0.0200 +- 0.0000** | 32.00 +- 1.00 | +0.00 +- 0.00 |"
        in page
    )
    assert "| base model, before training | | 0.9000 | | 50.00 | |" in page
    assert "ends at a validation loss of 0.4300, +2.4% beside the best of 1 rate of AdamW" in page
    assert "(base recipe, 0.4200): within 5%." in page
    assert "300 steps of the recipe train_config_lora_nano.yaml on emoji_fluent_hc, 3 seeds" in page
    assert "Base model: nano.safetensors, sha256 " in page and "CLIP: a network." in page
    assert str(tmp_path) not in page
    result = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert result["variants"][1]["losses"] == pytest.approx([0.39, 0.40, 0.41])
    with open(tmp_path / "out" / "ablations.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    assert not list((tmp_path / "out").rglob("state-*"))


def test_a_second_run_trains_only_what_is_missing(tmp_path, calls):
    page = run(tmp_path, "--seeds", "1", "2")
    (tmp_path / "out" / "min-snr_5" / "seed2" / "done.json").unlink()  # as after a kill
    (tmp_path / "out" / "min-snr_5" / "seed2" / "begun.json").unlink()
    del calls[:]
    assert run(tmp_path, "--seeds", "1", "2") == page
    assert [flags[flags.index("--seed") + 1] for flags in calls] == ["2"]
    del calls[:]
    run(tmp_path, "--seeds", "1", "2", "--noise_offset", "0.1")  # another recipe is trained anew
    assert len(calls) == 6 and all("--noise_offset" in flags for flags in calls)


def test_only_the_part_between_the_markers_is_written(tmp_path, calls):
    (tmp_path / "page.md").write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nreplaced\n{END}\n\nAfter.\n")
    page = run(tmp_path, "--seeds", "1")
    assert page.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n\n`python -m tools.eval.ablations")
    assert page.endswith(f"{END}\n\nAfter.\n") and "replaced" not in page
    assert "With one seed there is no standard deviation" in page and "**" not in page
    write_page(tmp_path / "page.md", ["again"])
    assert (tmp_path / "page.md").read_text() == f"# Title\n\nBefore.\n\n{BEGIN}\n\nagain\n\n{END}\n\nAfter.\n"


def test_a_difference_is_more_than_chance_where_the_seeds_agree():
    assert is_more_than_chance([1.0, 2.0, 3.0], [0.9, 1.9, 2.91])
    assert not is_more_than_chance([1.0, 2.0, 3.0], [0.9, 2.1, 2.9])
    assert not is_more_than_chance([1.0], [0.0])  # one seed tells nothing


def test_prodigy_is_compared_with_the_best_rate_of_adamw():
    rows = [Row(name, (), [loss], [0.0]) for name, loss in ((BASE, 0.4), ("AdamW, rate 3e-3", 0.39), (PRODIGY, 0.42))]
    (line, _) = prodigy_sentence(rows)
    assert "+7.7%" in line and "best of 2 rates" in line and "not within 5%" in line
    assert prodigy_sentence(rows[:2]) == [] and prodigy_sentence(rows[2:]) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seeds", "1", "1"], "--seeds 1 1: give different ones"),
        (["--base_model", "nowhere"], "--base_model .*nowhere does not exist"),
        (["--lora_rank", "0"], "lora_rank"),
    ],
)
def test_mistakes_are_answered_before_a_training(tmp_path, calls, flags, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path, *flags)
    assert calls == []


def test_a_page_without_markers_is_left_alone(tmp_path, calls):
    (tmp_path / "page.md").write_text("# My notes\n")
    with pytest.raises(UserError, match="has no lines .* add them, or name a new file"):
        run(tmp_path)
    assert (tmp_path / "page.md").read_text() == "# My notes\n" and calls == []


def test_a_training_without_a_validation_loss_is_an_error(tmp_path, calls, monkeypatch):
    train = ablations.call

    def without(script, *flags):
        train(script, *flags)
        (Path(flags[flags.index("--output_path") + 1]) / "validation.csv").unlink()

    monkeypatch.setattr(ablations, "call", without)
    with pytest.raises(UserError, match="has no validation loss at step 0 and step 300"):
        run(tmp_path)
