"""The evaluation commands: their output, their JSON and their errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.files.outputs import claim_file
from ldm.metrics import networks
from ldm.metrics.report import NANO_CLIP
from tools.eval import eval_clip_score, eval_fid

ROOT = Path(__file__).parents[2]


@pytest.fixture
def one_network(monkeypatch):
    """The nano CLIP, built once for all tests."""
    if not hasattr(one_network, "network"):
        one_network.network = networks.nano_clip()
    monkeypatch.setattr(networks, "nano_clip", lambda: one_network.network)


def images(folder: Path, count: int, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        size = (40 + seed, 30 + i)  # no two sizes are the same
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:05d}.png")
    return folder


def fid(*args) -> None:
    eval_fid.main([*map(str, args), "--device_target", "CPU"])


def clip_score(*args) -> None:
    eval_clip_score.main([*map(str, args), "--device_target", "CPU"])


def test_fid_prints_its_protocol_and_writes_it(tmp_path, capsys, one_network):
    real, made = images(tmp_path / "real", 6), images(tmp_path / "made", 5, 1)
    (made / "00009.png").write_bytes(b"broken")
    fid("--real_dir", real, "--gen_dir", made, "--output", tmp_path / "fid.json", "--batch_size", 4)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == NANO_CLIP
    result = json.loads((tmp_path / "fid.json").read_text())
    for text in (
        "images: 6 real, 5 generated",
        "fewer than 2,048",
        "00009.png is no image",
        "generated images: 1 left",
        f"sha256 {result['sha256'][:16]}",
        result["preprocessing"],
        f"FID: {result['fid']:.6g}",
        f"KID: {result['kid']:.6g} +- {result['kid_std']:.2g}",
    ):
        assert text in printed
    assert result["generated"]["broken"][0]["file"].endswith("00009.png")
    assert "no image" in result["generated"]["broken"][0]["fault"]
    assert (result["real"]["images"], result["generated"]["images"]) == (6, 5)
    assert result["fid"] > 0 and result["compares_only_with_itself"]


def test_statistics_replace_their_images(tmp_path, capsys, one_network):
    real, made = images(tmp_path / "real", 6), images(tmp_path / "made", 5, 1)
    fid("--real_dir", real, "--save_stats", tmp_path / "real.npz")
    fid("--real_dir", real, "--gen_dir", made)
    fid("--real_dir", tmp_path / "real.npz", "--gen_dir", made)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("FID", "KID"))]
    assert lines[0] == lines[2] and "only from images" in lines[3]


def test_statistics_of_another_network_are_refused(tmp_path, one_network):
    made = images(tmp_path / "made", 3)
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    with pytest.raises(UserError, match="2048 features"):
        fid("--real_dir", tmp_path / "inception.npz", "--gen_dir", made)
    np.savez(tmp_path / "other.npz", mu=np.zeros(96), sigma=np.eye(96), count=7, network="another CLIP")
    with pytest.raises(UserError, match="another CLIP"):
        fid("--real_dir", tmp_path / "other.npz", "--gen_dir", made)


def test_a_set_with_itself_has_no_distance(tmp_path, capsys, one_network):
    real = images(tmp_path / "real", 5)
    fid("--real_dir", real, "--gen_dir", real, "--output", tmp_path / "fid.json")
    assert abs(json.loads((tmp_path / "fid.json").read_text())["fid"]) < 1e-9


def test_the_prompts_path_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "prompts").write_text("a cat\nthe number six\n")  # without .txt, so that it must exist to be a path
    monkeypatch.setenv("HERE", str(tmp_path))
    assert eval_clip_score.find_prompts("$HERE/prompts", [Path("0.png"), Path("1.png")]) == ["a cat", "the number six"]


def test_clip_score_of_two_images_per_prompt(tmp_path, capsys, one_network):
    made = images(tmp_path / "made", 4)
    (tmp_path / "prompts.txt").write_text("a cat\nthe number six\n")
    clip_score(
        "--image_path_or_dir", made, "--prompt_or_path", tmp_path / "prompts.txt", "--output", tmp_path / "clip.json"
    )
    result = json.loads((tmp_path / "clip.json").read_text())
    assert [row["prompt"] for row in result["scores"]] == ["a cat", "a cat", "the number six", "the number six"]
    assert result["score"] == pytest.approx(np.mean([row["score"] for row in result["scores"]]))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == NANO_CLIP and f"CLIP score: {result['score']:.4f} +- " in printed


def test_a_broken_image_is_left_out_with_its_prompt(tmp_path, capsys, one_network):
    made = images(tmp_path / "made", 3)
    (made / "00001.png").write_bytes(b"")
    (made / "prompts.txt").write_text("one\ntwo\nthree\n")  # as in this project's samples
    clip_score("--image_path_or_dir", made, "--output", tmp_path / "clip.json")
    result = json.loads((tmp_path / "clip.json").read_text())
    assert [row["prompt"] for row in result["scores"]] == ["one", "three"]
    assert "00001.png is an empty file" in capsys.readouterr().out and len(result["broken"]) == 1


@pytest.mark.parametrize("prompt", ["a cat", "none"])
def test_a_prompt_for_one_image(tmp_path, capsys, one_network, prompt):
    made = images(tmp_path / "made", 1)
    clip_score("--image_path_or_dir", made / "00000.png", "--prompt_or_path", prompt)
    assert "images: 1 with 1 different" in capsys.readouterr().out


def test_images_compared_with_images(tmp_path, capsys, one_network):
    real = images(tmp_path / "real", 3)
    clip_score("--image_path_or_dir", real, "--real_image_path_or_dir", real, "--output", tmp_path / "clip.json")
    result = json.loads((tmp_path / "clip.json").read_text())
    assert result["score"] == pytest.approx(100) and result["mean_of_all_pairs"] < 100
    assert "in pairs: 100.0" in capsys.readouterr().out
    clip_score("--image_path_or_dir", real, "--real_image_path_or_dir", images(tmp_path / "more", 4))
    printed = capsys.readouterr().out
    assert "all with all" in printed and "in pairs" not in printed


MADE, REAL = ("--gen_dir", "{made}"), ("--real_dir", "{made}")


@pytest.mark.parametrize(
    "main, args, answer",
    [
        (fid, REAL, "--gen_dir is missing"),
        (fid, (*REAL, "--gen_dir", "nowhere"), "nowhere does not exist"),
        (fid, ("--real_dir", "nowhere.npz", *MADE), "nowhere.npz does not exist"),
        (fid, (*REAL, *MADE, "--backend", "pt"), '--backend: "pt" is not allowed: one of "ms"'),
        (fid, (*REAL, *MADE, "--batch_size", "0"), "--batch_size: 0 is not allowed: at least 1"),
        (fid, (*REAL, *MADE, "--batch_size", "1000000000"), "--batch_size: .* at most 4096"),
        (fid, (*REAL, *MADE, "--gendir", "x"), "unknown setting --gendir: did you mean --gen_dir"),
        (fid, MADE, "--real_dir is missing: give a path"),
        (fid, (*REAL, "--save_stats", "real.txt"), "name an .npz"),
        (fid, ("--real_dir", "a.npz", *MADE, "--save_stats", "b.npz"), "needs a folder"),
        (fid, (*REAL, *MADE, "--output", "{made}"), "is a folder"),
        (fid, (*REAL, *MADE, "--ckpt_path", "nowhere.pth"), "nowhere.pth does not exist"),
        # An empty path comes from a variable that is not set. The nano CLIP must not take its place.
        (fid, (*REAL, *MADE, "--ckpt_path", ""), '--ckpt_path: "" is no path'),
        (fid, (*REAL, *MADE, "--ckpt_path", "{made}/00000.png"), "PNG image"),
        (clip_score, ("--image_path_or_dir", "{made}"), "no prompts.txt"),
        (
            clip_score,
            ("--image_path_or_dir", "{made}", "--prompt_or_path", "nowhere.txt"),
            "nowhere.txt does not exist",
        ),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "{made}"), "is a folder"),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "{two}"), "3 images and 2 prompts"),
        (
            clip_score,
            ("--image_path_or_dir", "{made}", "--prompt_or_path", "a", "--backend", "pt"),
            '--backend: "pt" is not allowed: one of "ms"',
        ),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "\udcb7\udce7"), "is not UTF-8 text"),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "a", "--ckpt_path", "{two}"), "text file"),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "a", "--batch_size", "-1"), "--batch_size"),
        (
            clip_score,
            ("--image_path_or_dir", "{made}", "--prompt_or_path", "a", "--real_image_path_or_dir", "{made}"),
            "give one of them",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, one_network, main, args, answer):
    made, two = images(tmp_path / "made", 3), tmp_path / "two.txt"
    two.write_text("a\nb\n")
    with pytest.raises(UserError, match=answer):
        main(*(arg.format(made=made, two=two) for arg in args))


@pytest.mark.parametrize(
    "script", ["tools/eval/eval_fid.py", "eval/eval_fid.py", "tools/eval/eval_clip_score.py", "eval/eval_clip_score.py"]
)
def test_the_published_paths_work_from_any_folder(tmp_path, script):
    name = "--real_dir" if "fid" in script else "--image_path_or_dir"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / script),
            name,
            "nowhere",
            "--gen_dir" if "fid" in script else "--prompt_or_path",
            "nowhere",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere does not exist") and not done.stdout


@pytest.mark.parametrize(
    "main, args, flag",
    [
        (fid, (*REAL, *MADE), "--output"),
        (fid, REAL, "--save_stats"),
        (clip_score, ("--image_path_or_dir", "{made}", "--prompt_or_path", "a"), "--output"),
    ],
)
@pytest.mark.parametrize(
    "output, answer",
    [
        ("{tmp}", "is a folder"),
        ("{tmp}/dead", "dead.npz is a link to nowhere/x.npz, whose folder does not exist"),
        ("{tmp}/made/00000.png/x", "cannot be a folder, as .*00000.png is a file"),
        ("{tmp}/" + "n" * 252, "File name too long"),
        ("{tmp}/used", "used.npz is the path of two outputs"),
        ("/dev", "is not a regular file|is a folder|name an .npz"),
    ],
)
def test_an_unusable_output_is_refused_before_the_work(tmp_path, monkeypatch, main, args, flag, output, answer):
    made = images(tmp_path / "made", 2)
    (tmp_path / "dead.npz").symlink_to("nowhere/x.npz")
    (tmp_path / "x.npz").mkdir()
    output = output.format(tmp=tmp_path) + "/x" * output.endswith("}") + ".npz" * (output != "/dev")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(networks, "nano_clip", lambda: pytest.fail("the network was built"))
    with claim_file(tmp_path / "used.npz", "another"), pytest.raises(UserError, match=answer):
        main(*(arg.format(made=made) for arg in args), flag, output)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_are_expanded_and_hold_names_of_any_bytes(tmp_path, capsys, monkeypatch, one_network):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = images(tmp_path / "made", 2)
    name = os.fsdecode(b"\xb7\xe7\xb8\xf1.png")  # GBK, as archives from Chinese Windows have it
    (made / "00000.png").rename(made / name)
    clip_score("--image_path_or_dir", "~/made", "--prompt_or_path", "a", "--output=$HOME/clip.json")
    fid("--real_dir=~/made", "--gen_dir", made, "--output=~/fid.json", "--save_stats=~/real.npz")
    result = json.loads((tmp_path / "clip.json").read_text(encoding="utf-8"))
    assert str(made / name) in [row["image"] for row in result["scores"]]
    assert json.loads((tmp_path / "fid.json").read_text())["real"]["images"] == 2 and (tmp_path / "real.npz").is_file()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "main, flag, rest",
    [
        (fid, "--real_dir", MADE),
        (fid, "--gen_dir", REAL),
        (fid, "--ckpt_path", (*REAL, *MADE)),
        (fid, "--output", (*REAL, *MADE)),
        (fid, "--save_stats", REAL),
        (clip_score, "--image_path_or_dir", ("--prompt_or_path", "a")),
        (clip_score, "--prompt_or_path", ("--image_path_or_dir", "{made}")),
        (clip_score, "--real_image_path_or_dir", ("--image_path_or_dir", "{made}")),
        (clip_score, "--ckpt_path", ("--image_path_or_dir", "{made}", "--prompt_or_path", "a")),
    ],
)
def test_a_folder_without_permission_is_named_with_the_reason(unprivileged, main, flag, rest):
    made = images(unprivileged / "made", 2)
    (unprivileged / "closed").mkdir(mode=0)
    place = unprivileged / "closed" / ("x.npz" if flag in ("--output", "--save_stats") else "x.txt")
    with pytest.raises(UserError, match="closed.*Permission denied"):
        main(*(arg.format(made=made) for arg in rest), flag, place)
