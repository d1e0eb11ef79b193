"""compare_diffusers.py without its networks: its errors, the stages that it runs again, its numbers and its table."""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.files.outputs import claim_folder
from ldm.settings.model import load_model_config
from tools.eval import compare_diffusers
from tools.eval.compare_diffusers import Comparison
from tools.eval.comparison.experiment import SIDES, check_model, read_data, read_recipe, training_folder
from tools.eval.comparison.jobs import reference_python, run_command
from tools.eval.comparison.report import compare_runs, markdown, seconds_per_step, shown_command
from tools.eval.comparison.scores import Scores
from tools.eval.comparison.stages import Stages

ROOT = Path(__file__).parents[2]
NANO_RECIPE = str(ROOT / "configs" / "train" / "train_config_lora_nano.yaml")


@pytest.fixture
def data(tmp_path) -> Path:
    """train/ and test/, six images each."""
    for part in ("train", "test"):
        folder = tmp_path / "data" / part
        folder.mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / "img_txt.csv").write_text("dir,text\n" + "".join(f"{i}.png,{part} {i}\n" for i in range(6)))
    return tmp_path / "data"


class TestRecipe:
    def test_flags_take_precedence_and_fp32_is_fixed(self):
        config = read_recipe(NANO_RECIPE, ["--max_steps", "7", "--lora_targets", "to_q", "to_v"], "base.ckpt", seed=4)
        assert (config.max_steps, config.lora_targets, config.seed) == (7, ["to_q", "to_v"], 4)
        assert (config.precision, config.loss_scaler_type) == ("fp32", "none")
        assert config.pretrained_model_path == "base.ckpt"
        assert config.lora_rank == 16  # the recipe's

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--use_lora", "False"], "trains the whole UNet"),
            (["--lora_ft_text_encoder", "True"], "trains the UNet alone.*--lora_ft_text_encoder False"),
            (["--use_ema"], "no moving average.*--use_ema False"),
            (["--lora_dropout", "0.1"], "lora_dropout is set.*--lora_dropout 0"),
            (["--lora_targets", "attention", "--lora_config", "some.json"], "lora_targets.*--lora_config None"),
            (["--image_filter_size", "64"], "leave small images out"),
            (["--pretrained_model_ema", "True"], "convert the base"),
            (["--seed", "3"], "--seed cannot be given here: use --seeds"),
            (["--seed=3"], "use --seeds"),
            (["--data_path", "x"], "--data_path cannot be given here"),
            (["--resume"], "--resume cannot be given here"),
            (["--precision", "fp16"], "--precision cannot be given here"),
            (["--lora-init-path", "x"], "--lora_init_path cannot be given here"),
            (["--lora_ranks", "3"], "did you mean --lora_rank"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, flags, words):
        with pytest.raises(UserError, match=words):
            read_recipe(NANO_RECIPE, flags, "base.ckpt")


class TestData:
    def test_all_or_some_held_out_prompts_with_their_images(self, data):
        config = read_recipe(NANO_RECIPE, [], "base.ckpt")
        train, prompts, real = read_data(data, config, None)
        assert len(train) == 6 and prompts == [f"test {i}" for i in range(6)]
        assert [row.path.name for row in real] == [f"{i}.png" for i in range(6)]
        _, prompts, real = read_data(data, config, 2)
        assert prompts == ["test 0", "test 5"] and [row.caption for row in real] == prompts

    def test_prompts_alone_have_no_real_images(self, data):
        (data / "test" / "img_txt.csv").unlink()
        (data / "test" / "prompts.txt").write_text("one\ntwo\n")
        _, prompts, real = read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)
        assert prompts == ["one", "two"] and real == []

    def test_a_line_break_in_a_caption_does_not_make_a_second_prompt(self, data):
        (data / "test" / "img_txt.csv").write_text('dir,text\n0.png,"two\nlines"\n1.png,one\n')
        assert read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)[1] == ["two lines", "one"]

    def test_a_csv_beside_the_parts_chooses_the_training_rows(self, data):
        (data / "img_txt.csv").write_text("dir,text\ntrain/2.png,two\n")
        train, prompts, _ = read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)
        assert [(row.path.name, row.caption) for row in train] == [("2.png", "two")] and len(prompts) == 6
        assert training_folder(data) == data

    def test_a_held_out_image_as_training_row_is_refused(self, data):
        (data / "img_txt.csv").write_text("dir,text\ntrain/2.png,two\ntest/3.png,three\n")
        with pytest.raises(UserError, match="1 rows are held-out images of .*3.png"):
            read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)

    @pytest.mark.parametrize("missing", ["train", "test"])
    def test_data_without_a_part_is_refused(self, data, missing):
        (data / missing).rename(data / "other")
        with pytest.raises(UserError, match="must hold the folders train and test.*learned"):
            read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)

    def test_prompts_are_the_lines_that_text_to_image_reads(self, data):
        """Otherwise images would be drawn for other prompts than those that are scored."""
        (data / "test" / "img_txt.csv").unlink()
        (data / "test" / "prompts.txt").write_bytes("\ufeff one \r\ntwo\u2028lines\n\n".encode())
        assert read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)[1] == ["one", "two\u2028lines"]

    @pytest.mark.parametrize("content, words", [("0.png,\n1.png,one\n", "prompt 1 is empty"),
                                                ('0.png,one\n1.png," "\n', "prompt 2 is empty"),
                                                ("0.png,one\n", "has one prompt")])  # fmt: skip
    def test_held_out_images_that_cannot_be_scored_are_refused_before_training(self, data, content, words):
        (data / "test" / "img_txt.csv").write_text(f"dir,text\n{content}")
        with pytest.raises(UserError, match=words):
            read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)

    @pytest.mark.parametrize("content, words", [(b"", "is empty"), (b"\xff\xfe", "UTF-8"), (b"one\n\ntwo", "prompt 2"),
                                                (b"one\n", "has one prompt")])  # fmt: skip
    def test_invalid_prompts_are_refused(self, data, content, words):
        (data / "test" / "img_txt.csv").unlink()
        (data / "test" / "prompts.txt").write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_data(data, read_recipe(NANO_RECIPE, [], "base.ckpt"), None)


class TestSettings:
    def arguments(self, data, output, **changes):
        given = dict(
            train_config=NANO_RECIPE, base=str(ROOT / "models" / "nano" / "nano.safetensors"), data=str(data),
            seeds=[1], output_path=str(output), prompts=None, sampling_steps=20, scale=None, latents_seed=1,
            inception_path=None, clip_path=None, reference_python="nowhere/python",
        )  # fmt: skip
        return argparse.Namespace(**{**given, **changes})

    @pytest.mark.parametrize(
        "changes, flags, words",
        [
            ({"base": "nowhere.ckpt"}, [], "--base nowhere.ckpt does not exist"),
            ({"train_config": "nowhere.yaml"}, [], "nowhere.yaml does not exist"),
            ({"output_path": str(ROOT / "README.md")}, [], "cannot be a folder"),
            ({"output_path": str(ROOT / "configs")}, [], "holds something else"),
            ({}, ["--train_batch_size", "7"], "too few for one batch of 7"),
            ({}, [], "--reference_python .*nowhere/python is not a program"),
        ],
    )
    def test_mistakes_are_found_before_any_work(self, data, tmp_path, changes, flags, words):
        flags = flags or ["--train_batch_size", "2"]
        with pytest.raises(UserError, match=words):
            Comparison(self.arguments(data, tmp_path / "out", **changes), flags)
        assert not (tmp_path / "out").exists()

    def test_an_output_in_use_is_refused_before_an_environment_is_made(self, data, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".lock").touch()  # of a run that was killed
        with claim_folder(tmp_path / "out", "another"), pytest.raises(UserError, match="out is the .* of two"):
            Comparison(self.arguments(data, tmp_path / "out"), ["--train_batch_size", "2"])

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--seeds", "1", "1"], "--seeds 1 1: give different ones"),
            (["--seeds", "-1"], "--seeds: -1 is not allowed: at least 0"),
            (["--prompts", "1"], "--prompts: 1 is not allowed: at least 2"),
            (["--scale", "0.5"], "--scale: 0.5 is not allowed: at least 1"),
            (["--scale", "nan"], "--scale: .nan. is not a number"),
            (["--sampling_steps", "0"], "--sampling_steps: 0 is not allowed: at least 1"),
        ],
    )
    def test_numbers_out_of_range_are_refused(self, monkeypatch, flags, words):
        needed = ["--train_config", "c", "--base", "b", "--data", "d", "--output_path", "o"]
        monkeypatch.setattr(sys, "argv", ["compare_diffusers.py", *needed, *flags])
        with pytest.raises(UserError, match=words):
            compare_diffusers.main()

    def test_an_environment_without_the_packages_is_refused_by_their_names(self):
        with pytest.raises(UserError, match="has no torch, diffusers, .*requirements-parity.txt"):
            reference_python(sys.executable)

    def test_a_program_other_than_python_is_refused(self):
        with pytest.raises(UserError, match="/bin/false is not a Python that works"):
            reference_python("/bin/false")

    @pytest.mark.parametrize(
        "part, change, words",
        [
            ("unet", {"channel_mult": [2, 4]}, "channel_mult must begin with 1"),
            ("vae", {"embed_dim": 3}, "z_channels and embed_dim"),
            ("vae", {"double_z": False}, "double_z"),
        ],
    )
    def test_a_model_that_diffusers_cannot_represent_is_refused(self, part, change, words):
        model = load_model_config(ROOT / "tests" / "tiny.yaml")
        check_model(model)
        getattr(model, part).update(change)
        with pytest.raises(UserError, match=words):
            check_model(model)

    def test_a_model_in_pixel_space_is_refused(self):
        with pytest.raises(UserError, match="mnist.yaml is a model in pixel space"):
            check_model(load_model_config(ROOT / "configs" / "mnist.yaml"))

    def test_the_nano_model_can_be_compared(self):
        check_model(load_model_config(ROOT / "configs" / "nano.yaml"))


def test_the_command_in_the_help_can_be_copied_into_a_shell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_diffusers.py", "-h"])
    with pytest.raises(SystemExit):
        compare_diffusers.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("\\")]
    assert lines and not any(line.endswith("\\\\") for line in lines)


class TestShownCommand:
    def test_it_names_no_folder_of_this_machine(self):
        shown = shown_command([
            "--base", str(ROOT / "models" / "nano" / "nano.safetensors"), "--data=/home/someone/my images",
            "--reference_python", "/opt/torch/bin/python", "--output_path", "/home/someone/out", "--scale", "4",
            "--train_config", "configs/a.yaml"])  # fmt: skip
        assert shown == (
            "python tools/eval/compare_diffusers.py --base models/nano/nano.safetensors "
            "'--data=my images' --output_path out --scale 4 --train_config configs/a.yaml"
        )
        assert shown_command(["--reference_python=/opt/python"]).endswith("compare_diffusers.py")


class TestStages:
    def make(self, folder):
        (folder / "file").write_text("made")
        self.calls.append(folder.name)
        return {"number": len(self.calls)}

    @pytest.fixture(autouse=True)
    def no_calls(self):
        self.calls = []

    def test_a_finished_stage_is_not_run_again(self, tmp_path, capsys):
        for _ in range(2):
            stages = Stages(tmp_path, 1)
            assert stages.run("one", {"steps": 3, "rows": (1, 2)}, self.make) == {"number": 1}
        assert self.calls == ["one"] and "[1/1] one: done already" in capsys.readouterr().out

    def test_a_stage_with_other_inputs_runs_again_in_an_empty_folder(self, tmp_path):
        Stages(tmp_path, 1).run("one", {"steps": 3}, self.make)
        (tmp_path / "one" / "rest").write_text("of the run before")
        assert Stages(tmp_path, 1).run("one", {"steps": 4}, self.make) == {"number": 2}
        assert not (tmp_path / "one" / "rest").exists()

    def interrupted(self, folder):
        (folder / "rest").write_text("half")
        raise UserError("the disk is full")

    @pytest.mark.parametrize("can_continue, settings, kept", [(True, {"steps": 3}, True), (False, {"steps": 3}, False),
                                                         (True, {"steps": 4}, False)])  # fmt: skip
    def test_an_interrupted_stage_continues_only_if_it_can(self, tmp_path, can_continue, settings, kept):
        with pytest.raises(UserError):
            Stages(tmp_path, 1).run("one", {"steps": 3}, self.interrupted, can_continue=True)
        assert Stages(tmp_path, 1).run("one", settings, self.make, can_continue=can_continue) == {"number": 1}
        assert (tmp_path / "one" / "rest").exists() == kept

    def test_an_incomplete_result_is_ignored(self, tmp_path):
        Stages(tmp_path, 1).run("one", {}, self.make)
        (tmp_path / "one" / "done.json").write_text('{"settings": {}')
        Stages(tmp_path, 1).run("one", {}, self.make)
        assert self.calls == ["one", "one"]


class TestCalls:
    def test_time_and_peak_memory_are_the_programs_own(self):
        code = "x = bytearray(300_000_000); x[::4096] = b'1' * len(x[::4096]); del x; import time; time.sleep(0.5)"
        spent = run_command(sys.executable, "-c", code)
        assert 0.5 < spent["seconds"] < 60 and 300 < spent["peak_memory_mb"] < 450

    def test_programs_do_not_inherit_the_variables_that_mindspore_sets(self, tmp_path, monkeypatch):
        """MindSpore sets OMP_NUM_THREADS=1 in the C environment, past os.environ."""
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        ctypes.CDLL(None).setenv(b"OMP_NUM_THREADS", b"1", 1)
        code = f"import os; open({str(tmp_path / 'found')!r}, 'w').write(str(os.environ.get('OMP_NUM_THREADS')))"
        run_command(sys.executable, "-c", code)
        assert (tmp_path / "found").read_text() == "None"

    def test_a_failure_ends_the_comparison_and_says_how_to_continue(self):
        with pytest.raises(UserError, match="exit code 3; its message is above.*continues from there"):
            run_command(sys.executable, "-c", "raise SystemExit(3)")


def metrics(losses, norms=None):
    return {"loss": losses, "gradient_norm": norms or [1.0] * len(losses), "seconds": [9.0] + [0.1] * (len(losses) - 1)}


class TestNumbers:
    def test_the_largest_difference_in_the_first_steps_and_in_all(self):
        theirs = [1.0] * 30
        ours = [1.0] * 30
        ours[4], ours[24] = 1.001, 0.9
        norms = [1.0] * 30
        norms[2], norms[29] = 1.05, 3.0
        found = compare_runs(metrics(ours, norms), metrics(theirs))
        assert found["early"] == pytest.approx(0.001) and found["agree"]
        assert (found["largest"], found["largest_at"]) == (pytest.approx(0.1), 25)
        assert found["early_gradient_norm"] == pytest.approx(0.05)  # of the first 20 steps
        assert found["last_ours"] == pytest.approx(1.0)

    def test_more_than_one_percent_early_does_not_agree(self):
        assert not compare_runs(metrics([1.0, 1.02, 1.0]), metrics([1.0, 1.0, 1.0]))["agree"]
        assert compare_runs(metrics([1.0] * 20 + [1.5]), metrics([1.0] * 21))["agree"]

    def test_runs_of_unequal_length_are_refused(self):
        with pytest.raises(UserError, match="3 steps here and 2 with diffusers"):
            compare_runs(metrics([1.0] * 3), metrics([1.0] * 2))

    def test_the_first_step_which_compiles_is_not_counted(self):
        assert seconds_per_step(metrics([1.0] * 3)) == 0.1
        assert seconds_per_step(metrics([1.0])) == 9.0


class Network:
    """Mean colours as features; a text is a colour."""

    def encode_texts(self, texts, batch_size):
        return np.array([[float(word) for word in text.split()] for text in texts])


def draw(folder, colours):
    folder.mkdir()
    for i, colour in enumerate(colours):
        Image.new("RGB", (4, 4), tuple(int(value) for value in colour)).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Scores with real images of eight colours, three sets added: the real ones, near ones, far ones."""

    def encode(files, network, batch_size):
        pixels = [np.asarray(Image.open(file), np.float64).mean(axis=(0, 1)) for file in files]
        return argparse.Namespace(features=np.stack(pixels))

    monkeypatch.setattr("tools.eval.comparison.scores.encode_images", encode)
    colours = np.random.default_rng(0).integers(0, 200, (8, 3))
    prompts = [" ".join(map(str, colour)) for colour in colours]
    scores = Scores(prompts, draw(tmp_path / "real", colours), Network(), Network())
    sets = {"same": colours, "near": colours + 5, "far": colours[::-1] + 50}
    found = {name: scores.add(name, draw(tmp_path / name, values)) for name, values in sets.items()}
    return scores, found


class TestScores:
    def test_nearer_images_score_better(self, scored):
        scores, found = scored
        assert found["same"]["fid"] == pytest.approx(0, abs=1e-6)
        assert found["near"]["fid"] == pytest.approx(3 * 5**2) and found["far"]["fid"] > 1000
        assert found["same"]["clip_score"] == pytest.approx(100) and found["far"]["clip_score"] < 99
        assert scores.real_clip_score == found["same"]["clip_score"]
        assert all(found["far"][f"{key}_std"] > 0 for key in ("fid", "kid", "clip_score"))

    def test_a_difference_is_that_of_the_scores_and_paired(self, scored):
        scores, found = scored
        pair = scores.difference("near", "far")
        for key in ("fid", "clip_score"):
            assert pair[key] == pytest.approx(found["near"][key] - found["far"][key])
        assert scores.difference("near", "near") == dict.fromkeys(pair, 0.0)
        assert scores.difference("near", "same")["pixels"] == pytest.approx(5)

    def test_an_incomplete_set_is_refused(self, scored, tmp_path):
        with pytest.raises(UserError, match="short has 2 images for 8 prompts"):
            scored[0].add("short", draw(tmp_path / "short", [(1, 1, 1)] * 2))


def a_table(seeds, fid=True):
    score = {"fid": 100.0 if fid else None, "fid_std": 4.0 if fid else None, "kid": 0.02 if fid else None,
             "kid_std": 0.001 if fid else None, "clip_score": 30.0, "clip_score_std": 0.5}  # fmt: skip
    sets = {"base_ours": score, "base_diffusers": score}
    pair = {**score, "fid": -2.0 if fid else None, "clip_score": 0.25, "pixels": 1.5}
    pairs = {"base_": pair}
    for seed in seeds:
        sets[f"seed{seed}/ours"] = {**score, "fid": 90.0 + seed if fid else None}
        sets[f"seed{seed}/diffusers"] = {**score, "fid": 95.0 + seed if fid else None}
        pairs[f"seed{seed}/"] = pair
    network = {"network": "a network", "sha256": "ab" * 32, "preprocessing": "none", "compares_only_with_itself": True}
    run = {"seconds_per_step": 0.5, "seconds": 60.0, "peak_memory_mb": 1000.0}
    return {
        "base": {"file": "b.ckpt", "sha256": "cd" * 32, "architecture": "sd1"},
        "data": {"folder": "emoji", "rows": 100, "prompts": 12}, "seeds": seeds, "steps": 30,
        "recipe": {"train_batch_size": 4, "gradient_accumulation_steps": 1, "lora_rank": 8, "start_learning_rate": 1e-4,
                   "scheduler": "cosine", "cache_latents": True, "cache_text": True, "random_crop": False,
                   "random_flip": False},
        "sampling": {"sampler": "DPM-Solver++", "steps": 20, "scale": 7.5, "latents_seed": 1},
        "scores": {"sets": sets, "pairs": pairs, "real_clip_score": 31.5 if fid else None,
                   "image_network": network, "clip_network": network},
        "losses": {str(seed): compare_runs(metrics([1.0] * 30), metrics([1.0] * 30)) for seed in seeds},
        "training": {f"seed{seed}/{side}": run for seed in seeds for side in SIDES},
        "versions": {"ours": {"mindspore": "1"}, "diffusers": {"torch": "2"}},
    }  # fmt: skip


def rows_of(text):
    return {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}


class TestMarkdown:
    def test_columns_are_the_published_ones_and_every_seed_has_its_row(self):
        text = markdown(a_table([1, 2, 3]), "python compare")
        assert "FID (ours) | FID (diffusers) | " in text and "CLIP score (ours) | CLIP score (diffusers) |" in text
        published = text.split("Ours minus")[0]
        assert rows_of(published)["LoRA, seed 2"][:3] == ["92.00 +- 4.00", "97.00 +- 4.00", "20.00 +- 1.00"]

    def test_the_mean_has_the_std_between_the_seeds(self):
        published = markdown(a_table([1, 2, 3]), "").split("Ours minus")[0]
        assert rows_of(published)["LoRA, mean of 3 seeds"][:2] == ["92.00 +- 1.00", "97.00 +- 1.00"]
        assert "mean of" not in markdown(a_table([1]), "").split("Ours minus")[0].split("+- is")[0]

    def test_differences_have_a_sign(self):
        differences = markdown(a_table([1]), "").split("Ours minus")[1]
        assert rows_of(differences)["LoRA, seed 1"][:2] == ["-2.00 +- 4.00", "+0.25 +- 0.50"]

    def test_small_scores_have_four_decimals(self):
        """The nano CLIP's FIDs."""
        table = a_table([1])
        for kind in ("sets", "pairs"):
            table["scores"][kind] = {
                name: {**found, "fid": found["fid"] / 1000, "fid_std": found["fid_std"] / 1000}
                for name, found in table["scores"][kind].items()
            }
        published, differences = markdown(table, "").split("Ours minus")
        assert rows_of(published)["LoRA, seed 1"][:2] == ["0.0910 +- 0.0040", "0.0960 +- 0.0040"]
        assert rows_of(published)["LoRA, seed 1"][4] == "30.00 +- 0.50"
        assert rows_of(differences)["LoRA, seed 1"][0] == "-0.0020 +- 0.0040"

    def test_zero_has_no_minus(self):
        table = a_table([1])
        table["scores"]["pairs"]["seed1/"]["fid"] = -1e-9
        assert rows_of(markdown(table, "").split("Ours minus")[1])["LoRA, seed 1"][0] == "+0.00 +- 4.00"

    def test_without_real_images_there_is_no_fid(self):
        published = markdown(a_table([1, 2], fid=False), "").split("Ours minus")[0]
        assert rows_of(published)["LoRA, seed 1"][:5] == ["-", "-", "-", "-", "30.00 +- 0.50"]
        assert rows_of(published)["LoRA, mean of 2 seeds"][0] == "-"

    def test_it_says_what_the_scores_compare_with(self):
        text = markdown(a_table([1]), "python tools/eval/compare_diffusers.py --seeds 1")
        assert "fewer than 2,048" in text and "compare only with each other" in text
        assert "CLIP score of the real images is 31.50" in text
        assert "of the real images" not in markdown(a_table([1], fid=False), "")
        assert "sha256 abababababababab" in text and "--seeds 1" in text and "torch 2" in text and "mindspore 1" in text

    @pytest.mark.parametrize("changes, words", [
        ({}, "latents and text embeddings cached by both"), ({"random_flip": True}, "text embeddings cached by both"),
        ({"random_crop": True, "cache_text": False}, "nothing cached by either"),
        ({"cache_text": False}, ", latents cached by both"),
        ({"cache_latents": False}, ", text embeddings cached by both"),
    ])  # fmt: skip
    def test_it_says_what_was_cached(self, changes, words):
        table = a_table([1])
        table["recipe"].update(changes)
        assert words in markdown(table, "")

    def test_losses_that_disagree_are_marked(self):
        table = a_table([1])
        table["losses"]["1"] = compare_runs(metrics([1.05] * 30), metrics([1.0] * 30))
        assert "5.0e-02, 0.0e+00 (more than 1%)" in markdown(table, "")
        assert "more than" not in markdown(a_table([1]), "").split("Training")[1]

    def test_the_table_can_be_read_back_from_json(self):
        table = a_table([1, 2])
        assert markdown(json.loads(json.dumps(table)), "c") == markdown(table, "c")
