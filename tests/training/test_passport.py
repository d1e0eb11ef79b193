"""The digests of what a LoRA is trained from: what they depend on, and what they do not."""

from __future__ import annotations

import re
import shutil

import pytest

from ldm.data.preparation import prepare_data, read_listing
from ldm.errors import UserError
from ldm.settings.model import load_model_config
from ldm.settings.train import TrainSettings
from ldm.training import passport
from ldm.training.passport import base_digests, code_digest, library_versions, settings_digests
from tests.training.micro import MICRO

CONFIG = load_model_config(MICRO)


def digest(folder, **settings: object) -> str:
    given = TrainSettings(**{"data_path": str(folder), "image_size": 16, **settings})
    data, _ = prepare_data(read_listing(given), given, CONFIG)
    found = data.content_digest()
    assert found is None or re.fullmatch("[0-9a-f]{64}", found)
    return found


def copy_of(folder, place):
    shutil.copytree(folder, place)
    return place


class TestData:
    def test_neither_order_nor_names_nor_layout_count(self, captioned_data, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        rows = ["dir,text"]
        for number, path in enumerate(sorted(captioned_data.glob("*.png"), reverse=True)):
            shutil.copy(path, other / f"image {number}.png")
            rows.append(f'image {number}.png,"{path.with_suffix(".txt").read_text()}"')
        (other / "img_txt.csv").write_text("\n".join(rows) + "\n")
        assert digest(other) == digest(captioned_data)

    @pytest.mark.parametrize("change", ["a caption", "an image", "one image less", "an image twice", "repeats"])
    def test_every_image_and_caption_counts(self, captioned_data, tmp_path, change):
        folder = copy_of(captioned_data, tmp_path / "changed")
        settings = {}
        if change == "a caption":
            (folder / "3.txt").write_text("blue, a square, number 3")  # one letter
        elif change == "an image":
            with open(folder / "3.png", "ab") as file:
                file.write(b"\0")
        elif change == "one image less":
            (folder / "3.png").unlink()
        elif change == "an image twice":
            for suffix in (".png", ".txt"):
                shutil.copy(folder / f"3{suffix}", folder / f"3b{suffix}")
        else:
            settings["num_repeats"] = 2
        assert digest(folder, **settings) != digest(captioned_data)

    def test_captions_are_not_exchanged_between_images(self, captioned_data, tmp_path):
        folder = copy_of(captioned_data, tmp_path / "changed")
        (folder / "3.txt").rename(folder / "x")
        (folder / "4.txt").rename(folder / "3.txt")
        (folder / "x").rename(folder / "4.txt")
        assert digest(folder) != digest(captioned_data)

    def test_what_the_data_set_sets_itself_counts(self, captioned_data, tmp_path):
        found = []
        for number, line in enumerate(("", "shuffle_caption = true", "caption_prefix = 'x'")):
            subset = f"[[datasets.subsets]]\nimage_dir = '{captioned_data}'\n{line}\n"
            (tmp_path / f"{number}.toml").write_text(f"[[datasets]]\nresolution = 16\n{subset}")
            found.append(digest(tmp_path / f"{number}.toml"))
        assert len(set(found)) == 3

    def test_images_that_were_not_read_have_none(self, captioned_data):
        assert digest(captioned_data, check_images=False) is None


class TestSettings:
    @pytest.mark.parametrize(
        "change",
        [dict(seed=1), dict(start_learning_rate=1e-4), dict(lora_rank=8), dict(weight_decay=0.1), dict(max_steps=9),
         dict(train_batch_size=1), dict(epochs=3), dict(lora_targets=["to_q"])],
    )  # fmt: skip
    def test_one_that_decides_the_weights_has_another_digest_and_no_other_changes(self, change):
        usual = dict(use_lora=True, max_steps=None if "epochs" in change else 5)
        before, after = (settings_digests(TrainSettings(**{**usual, **more})) for more in ({}, change))
        assert {name for name in before if before[name] != after[name]} == set(change)
        assert all(re.fullmatch("[0-9a-f]{12}", text) for text in after.values())

    @pytest.mark.parametrize(
        "change",
        [dict(output_path="elsewhere"), dict(data_path="elsewhere"), dict(ckpt_max_keep=3), dict(log_level="ERROR"),
         dict(betas=[0.9, 0.999]), dict(metadata_title="t", output_name="n"), dict(sample_prompts="a cat")],
    )  # fmt: skip
    def test_paths_and_what_only_watches_do_not_count_and_none_is_its_value(self, change):
        assert settings_digests(TrainSettings(use_lora=True, **change)) == settings_digests(
            TrainSettings(use_lora=True)
        )

    def test_epochs_do_not_count_beside_max_steps(self):
        first, second = (settings_digests(TrainSettings(max_steps=9, epochs=number)) for number in (1, 2))
        assert first == second

    def test_of_a_file_the_content_counts(self, tmp_path):
        found = []
        for name, content in (("a", '{"to_q": {"r": 2}}'), ("b", '{"to_q": {"r": 2}}'), ("c", '{"to_q": {"r": 3}}')):
            (tmp_path / f"{name}.json").write_text(content)
            found.append(settings_digests(TrainSettings(use_lora=True, lora_config=str(tmp_path / f"{name}.json"))))
        assert found[0] == found[1] != found[2]
        with pytest.raises(UserError, match="d.json"):
            settings_digests(TrainSettings(use_lora=True, lora_config=str(tmp_path / "d.json")))


def test_a_vae_of_its_own_has_a_digest(micro_base_model, tmp_path):
    other = tmp_path / "vae.safetensors"
    other.write_bytes(b"another")
    settings = TrainSettings(pretrained_model_path=str(micro_base_model), vae_ckpt_path=str(other))
    digests = base_digests(settings)
    assert digests.keys() == {"base", "vae"} and digests["base"] != digests["vae"]


def test_the_sources_count_and_a_commit_or_a_version_names_them(tmp_path, monkeypatch):
    place = tmp_path / "ldm" / "training"
    place.mkdir(parents=True)
    monkeypatch.setattr(passport, "__file__", str(place / "passport.py"))
    found = []
    for content in ("a = 1", "a = 2", "a = 1"):
        (place / "a.py").write_text(content)
        (place / "a.pyc").write_text(str(len(found)))
        found.append(code_digest())
    assert found[0] == found[2] != found[1]
    assert found[0].keys() - {"sources"} <= {"commit", "version"}


def test_library_versions():
    versions = library_versions()
    assert list(versions) == ["Python", "MindSpore", "NumPy", "Pillow"]
    assert all(re.match(r"[0-9]+\.[0-9]+", version) for version in versions.values())
