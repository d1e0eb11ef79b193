"""choose_checkpoint.py: what it draws and writes, that it draws nothing twice, and its errors."""

from __future__ import annotations

import csv
import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.generation.pipeline import Pipeline
from ldm.lora.formats import write_lora
from ldm.lora.inject import get_lora, inject_lora
from ldm.lora.spec import LoRASpec
from ldm.models.stable_diffusion import build_model
from ldm.settings.model import load_model_config
from ldm.settings.read import save_settings
from ldm.settings.train import TrainSettings
from tests.training.micro import MICRO, SETTINGS
from tools.eval import choose_checkpoint
from tools.eval.choosing.run_folder import find_checkpoints, read_run, validation_losses

FLAGS = ["--strengths", "0.5", "1", "--sampling_steps", "1", "--resamples", "100", "--device_target", "CPU"]


def write_run(folder, base, data, **settings):
    """Write what a LoRA training of three held-out images leaves after steps 2 and 4."""
    model, config = build_model(load_model_config(MICRO)), load_model_config(MICRO)
    inject_lora(model, LoRASpec(rank=2, targets="all"))
    (folder / "ckpt").mkdir(parents=True)
    for step in (2, 4):
        rng = np.random.default_rng(step)
        for parameter in model.trainable_params():
            parameter.set_data(ms.Tensor(0.2 * rng.standard_normal(parameter.shape).astype(np.float32)))
        write_lora(folder / "ckpt" / f"lora-{step:08d}.ckpt", get_lora(model, config), "mindone")
    shutil.copy(folder / "ckpt" / "lora-00000004.ckpt", folder / "ckpt" / "lora.ckpt")
    paths = {"pretrained_model_path": base, "data_path": data, "output_path": folder}
    given = {**SETTINGS, **paths, "use_lora": True, "validation_split": 0.3, **settings}
    leave_out = ("train_config", "resume", "cache_only")
    save_settings(TrainSettings(**given), folder / "train_args.yaml", leave_out=leave_out)
    (folder / "validation.csv").write_text(
        "step,images,loss,loss_200\n2,validation,0.5,0.5\n2,training,0.9,0.9\n4,validation,0.4,0.4\n6,valid"
    )
    return folder


@pytest.fixture(scope="module")
def choice(micro_base_model, micro_data, tmp_path_factory):
    """A run, the pipelines that its choice was drawn with, and what the tool printed."""
    run = write_run(tmp_path_factory.mktemp("choice") / "run", micro_base_model, micro_data)
    ms.set_context(mode=ms.GRAPH_MODE)  # as in a process of its own: another test may have set up MindSpore
    pipelines, from_checkpoint = [], Pipeline.from_checkpoint

    def kept(*args, **options):
        pipelines.append(from_checkpoint(*args, **options))
        return pipelines[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "from_checkpoint", kept)
        choose_checkpoint.main(["--run", str(run), *FLAGS])
    yield run, pipelines
    ms.set_context(mode=ms.PYNATIVE_MODE)


def images(run):
    return {path.relative_to(run): path.read_bytes() for path in sorted((run / "choice" / "images").rglob("*.png"))}


def test_every_candidate_is_drawn_by_one_pipeline_in_the_same_compiled_graphs(choice):
    run, (pipeline,) = choice
    folders = {str(path.parent.relative_to("choice/images")) for path in images(run)}
    assert folders == {"base", *(f"lora-0000000{step}/{strength}" for step in (2, 4) for strength in ("0.5", "1"))}
    assert len(images(run)) == 5 * 3 and len(set(images(run).values())) == 15
    networks = (pipeline.unet, pipeline.text_encoder, pipeline.decoder)
    assert [len(network.compile_cache) for network in networks] == [1, 1, 1]


def test_the_images_are_those_of_the_pipeline_with_that_lora_and_strength(choice):
    run, (pipeline,) = choice
    pipeline.set_loras([(run / "ckpt" / "lora-00000004.ckpt", 0.5)])
    prompts = json.loads((run / "choice" / "choice.json").read_text())["prompts"]
    drawn = pipeline(prompts, num_inference_steps=1, seed=1, batch_size=3, progress=False).images
    for i, image in enumerate(drawn):
        with Image.open(run / "choice" / "images" / "lora-00000004" / "0.5" / f"{i:05d}.png") as written:
            np.testing.assert_array_equal(np.asarray(written), np.asarray(image))


def test_the_files_say_what_was_chosen_and_by_which_rule(choice):
    run, _ = choice
    result = json.loads((run / "choice" / "choice.json").read_text())
    with open(run / "choice" / "choice.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["strength"]) for row in rows] == [("2", "0.5"), ("2", "1.0"), ("4", "0.5"), ("4", "1.0")]
    assert [row["chosen"] for row in rows].count("True") == 1
    chosen = next(row for row in rows if row["chosen"] == "True")
    assert chosen["checkpoint"] == result["chosen"]["checkpoint"] and result["rule"] == "mean_rank"
    assert float(chosen["mean_rank"]) == min(float(row["mean_rank"]) for row in rows)
    assert [float(row["validation_loss"]) for row in rows] == [0.5, 0.5, 0.4, 0.4]
    assert all(float(row["clip_score_std"]) >= 0 for row in rows) and "kid" not in rows[0]  # three prompts are too few
    # The training images are the real ones, because three held-out images are too few.
    assert result["real_images"] == {"count": 7, "origin": "training images"}
    assert len(result["prompts"]) == 3 and result["resamples"] == 100
    with Image.open(run / "choice" / "sheet.png") as sheet:
        assert sheet.size == (300 + 3 * 136 + 8, 40 + 4 * 136)  # base and two strengths; two prompts of two checkpoints


def test_a_second_run_draws_only_what_is_missing(choice, monkeypatch, capsys):
    run, _ = choice
    before = images(run)
    lost = run / "choice" / "images" / "lora-00000002" / "1" / "00001.png"
    lost.unlink()
    drawn = []
    generate = Pipeline.generate

    def recorded(self, prompts, sampling, *args, **options):
        drawn.append(prompts)
        return generate(self, prompts, sampling, *args, **options)

    monkeypatch.setattr(Pipeline, "generate", recorded)
    choose_checkpoint.main(["--run", str(run), *FLAGS, "--rule", "clip_score"])
    (prompts,) = drawn
    assert len(prompts) == 3 and len(set(prompts)) == 1  # a whole batch, as before: no other graph is compiled
    assert images(run) == before
    printed = capsys.readouterr().out
    assert "by the highest CLIP score" in printed and "no KID" in printed
    assert "against 7 training images" in printed


def test_other_prompts_draw_all_images_again(choice, tmp_path, monkeypatch):
    run, _ = choice
    (tmp_path / "prompts.txt").write_text("a red cat\na blue dog\na green bird\n")
    drawn = []
    monkeypatch.setattr(Pipeline, "generate", lambda self, prompts, *args, **options: drawn.append(prompts) or [])
    with pytest.raises(UserError, match="no image|does not exist|not one of"):  # nothing was drawn
        choose_checkpoint.main(["--run", str(run), *FLAGS, "--prompts", str(tmp_path / "prompts.txt")])
    assert drawn == [["a red cat", "a blue dog", "a green bird"]] * 5


def test_a_choice_needs_a_run_with_loras(tmp_path, micro_base_model, micro_data):
    def refused(words, *flags):
        with pytest.raises(UserError, match=words):
            choose_checkpoint.main(["--run", str(tmp_path / "run"), *flags])

    refused("is no folder: give the output_path of a training")
    (tmp_path / "run").mkdir()
    refused("holds no train_args.yaml")
    shutil.rmtree(tmp_path / "run")
    run = write_run(tmp_path / "run", micro_base_model, micro_data)
    refused("--steps 3: .* but of 2, 4", "--steps", "2", "3")
    refused("--strengths 1.0 1.0: give different ones", "--strengths", "1", "1")
    refused("--prompts .*nowhere.txt does not exist", "--prompts", str(tmp_path / "nowhere.txt"))
    refused("give --base with its place today", "--base", str(tmp_path / "nowhere"))
    refused("--rule kid needs 8 prompts", "--rule", "kid")
    (run / "validation.csv").write_text("step,images,loss\n2,validation,0.5\n")
    refused("--rule validation_loss: .*every checkpoint", "--rule", "validation_loss")
    (run / "validation.csv").write_text("step,loss\n2,0.5\n")
    refused("validation.csv has no column images")
    (run / "validation.csv").unlink()
    (run / "choice" / "images" / "base").mkdir(parents=True)
    refused("was not written by this tool: give another --output_path", *FLAGS)
    for path in (run / "ckpt").glob("lora*"):
        path.unlink()
    refused("holds no LoRA")
    args = (run / "train_args.yaml").read_text()
    (run / "train_args.yaml").write_text(args.replace("use_lora: true", "use_lora: false"))
    refused("trained the whole UNet")


def test_a_run_without_held_out_images_needs_prompts(tmp_path, micro_base_model, micro_data):
    run = write_run(tmp_path / "run", micro_base_model, micro_data, validation_split=0.0)
    with pytest.raises(UserError, match="held out no images .*give --prompts.* or --held_out"):
        choose_checkpoint.main(["--run", str(run), *FLAGS])


def test_checkpoints_are_listed_once_by_step(tmp_path, micro_base_model, micro_data):
    run = write_run(tmp_path / "run", micro_base_model, micro_data)
    ckpt = run / "ckpt"
    assert [checkpoint.label for checkpoint in find_checkpoints(run)] == ["step 2", "step 4"]
    assert [checkpoint.step for checkpoint in find_checkpoints(run, [4])] == [4]
    shutil.copy(ckpt / "lora-00000002.ckpt", ckpt / "best.ckpt")  # the best step is a numbered one
    assert [checkpoint.label for checkpoint in find_checkpoints(run)] == ["step 2", "step 4"]
    (ckpt / "lora-00000002.ckpt").unlink()  # ckpt_max_keep has removed it
    (ckpt / "best.json").write_text('{"step": 2, "loss": 0.5}')
    (ckpt / "lora.ckpt").write_bytes(b"another")
    labels = [checkpoint.label for checkpoint in find_checkpoints(run)]
    assert labels == ["best.ckpt (step 2)", "step 4", "lora.ckpt"]
    assert validation_losses(run) == {2: 0.5, 4: 0.4} and read_run(run).lora_rank == 4
