r"""Train the same LoRA here and with diffusers, draw the same held-out prompts with both, and score both by one code.

    python tools/eval/compare_diffusers.py --train_config configs/train/train_config_lora_nano.yaml \\
        --base models/nano/nano.safetensors --data datasets/emoji_fluent_hc --output_path output/compare

Both start from the same base (written as a diffusers folder) and the same LoRA factors, see the same rows, latents'
posterior draws, noise, timesteps and dropped captions at every step, train with AdamW at the same rates in fp32, and
draw from the same starting latents with DPM-Solver++. What is left to differ is the two implementations.

Any setting of train_text_to_image.py may follow, such as --max_steps 100; it wins over the recipe for both. A run that
was interrupted, or one with more seeds, goes on from the stages that are done. docs/evaluation.md explains the results:

    OUTPUT/table.md, table.json     scores, seconds, memory, and how far the losses are apart
    OUTPUT/curves/losses.png        the losses of both for each seed
    OUTPUT/grid_seed1.png           prompt, real image, base, LoRA of both
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.data.batches import BatchOrder  # noqa: E402
from ldm.data.cache import content_key  # noqa: E402
from ldm.data.dataset import Row, read_image_text_csv  # noqa: E402
from ldm.data.draws import draws  # noqa: E402
from ldm.data.transforms import load_image  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.documents import json_text  # noqa: E402
from ldm.files.inputs import is_file, is_folder, is_there, list_folder  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.files.paths import ROOT, expanded, under_root, writing  # noqa: E402
from ldm.files.prompts import read_prompts  # noqa: E402
from ldm.runtime import subprocesses  # noqa: E402
from ldm.settings.command_line import Parser, number, whole_number  # noqa: E402
from ldm.settings.declare import names_of  # noqa: E402
from ldm.settings.model import ModelConfig, load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.settings.train import TrainSettings  # noqa: E402
from ldm.settings.versions import default_guidance_scale  # noqa: E402
from ldm.training.plan import make_plan  # noqa: E402
from ldm.weights.architecture import config_with_tokens, detect_model_config  # noqa: E402
from ldm.weights.base_model import base_model_hash  # noqa: E402
from ldm.weights.checkpoint import content_hash  # noqa: E402
from tools.eval.compare_report import (  # noqa: E402
    ALLOWED,
    SIDES,
    Scores,
    compare_runs,
    markdown,
    read_metrics,
    seconds_per_step,
)
from tools.grid import draw_grid, evenly  # noqa: E402

WORKER = "tools/eval/diffusers_worker.py"
VENV = ROOT / ".venv-parity"
NEEDED = ("torch", "diffusers", "transformers", "peft", "safetensors", "matplotlib", "PIL", "numpy", "ftfy", "tqdm")
GRID_PROMPTS = 24


# ---- what is compared ------------------------------------------------------------------------------------------------


def read_recipe(path: str, flags: Sequence[str], base: str, seed: int = 0) -> TrainSettings:
    """The recipe as both sides train it. Raises UserError for what diffusers' LoRA training has no counterpart of."""
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name in names_of(TrainSettings, set_by_comparison=True):
            way = "use --seeds" if name == "seed" else "both sides get the same from this script; leave it out"
            raise UserError(f"--{name} cannot be given here: {way}")
    config = read_settings(
        TrainSettings,
        ["--train_config", path, *flags, "--pretrained_model_path", base, "--seed", str(seed), "--precision", "fp32",
         "--loss_scaler_type", "none"],
        yaml_flag="train_config",
    )  # fmt: skip
    if not config.use_lora:
        raise UserError(f"{path} trains the whole UNet: this comparison is of LoRA, add --use_lora True")
    for field in fields(TrainSettings):
        reason = field.metadata["not_in_diffusers"]
        if reason and getattr(config, field.name):
            raise UserError(
                f"{field.name} is set, which cannot be compared: {reason}; add --{field.name} {field.default}"
            )
    return config


def training_folder(folder: Path) -> Path:
    """Where the rows to train on are: `folder` itself where it has an img_txt.csv of its own (a choice of images, as
    the bundled styles have), else its train/.
    """
    return folder if is_file(folder / "img_txt.csv", "--data") else folder / "train"


def read_data(folder: Path, config: TrainSettings, prompts: int | None) -> tuple[list[Row], list[str], list[Row]]:
    """(rows to train on, held-out prompts, the rows with their real images; none where test/ has prompts.txt alone).

    prompts: how many of the held-out ones, evenly spread; None for all. Raises UserError.
    """
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    if not is_folder(training_folder(folder), "--data") or not is_folder(folder / "test", "--data"):
        raise UserError(
            f"--data {folder} must hold the folders train and test, with img_txt.csv and images in each (test may "
            "hold a prompts.txt alone): images that training has seen say nothing about what was learned"
        )
    train = read_image_text_csv(training_folder(folder), **columns).rows
    lines = folder / "test" / "prompts.txt"
    if is_file(lines, "--data") and not is_file(folder / "test" / "img_txt.csv", "--data"):
        texts, test = read_prompts(lines, "data_path"), []
    else:
        test = read_image_text_csv(folder / "test", **columns).rows
        texts = [" ".join(row.caption.split()) for row in test]
        both = {row.path.resolve() for row in train} & {row.path.resolve() for row in test}
        if both:
            raise UserError(
                f"{training_folder(folder) / 'img_txt.csv'}: {len(both)} rows are held-out images of "
                f"{folder / 'test'} ({min(both).name}, ...): leave them out of the training rows"
            )
    if "" in texts:
        raise UserError(
            f"{folder / 'test'}: held-out prompt {texts.index('') + 1} is empty, which nothing can be held "
            "against: write one, or take the line out"
        )
    if len(texts) < 2:
        raise UserError(f"{folder / 'test'} has one prompt: give 2 or more, one image has no distribution")
    chosen = evenly(len(texts), prompts or len(texts))
    return train, [texts[i] for i in chosen], [test[i] for i in chosen] if test else []


# ---- stages ----------------------------------------------------------------------------------------------------------


class Stages:
    """Parts of the experiment, each in a folder of its own, done once for the same settings.

    A stage's done.json holds its settings and result; it is written last. Where the settings are others, or the stage
    was broken off, its folder is made anew, unless it can go on from what is there.
    """

    def __init__(self, output: Path, count: int):
        self.output, self.count, self.number = output, count, 0

    def run(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        goes_on: bool = False,
    ) -> dict[str, Any]:
        """What `make(folder)` gives, or gave before. goes_on: `make` can take up a folder that was broken off."""
        self.number += 1
        label = f"[{self.number}/{self.count}] {name}"
        folder, settings = self.output / name, json.loads(json.dumps(settings))
        done, begun = folder / "done.json", folder / "begun.json"
        earlier = _read_json(done)
        if earlier is not None and earlier["settings"] == settings:
            print(f"{label}: done already", flush=True)
            return earlier["result"]
        if folder.exists() and not (goes_on and not done.exists() and _read_json(begun) == settings):
            shutil.rmtree(folder)
        print(f"{label} ...", flush=True)
        begin = time.time()
        with writing(begun):
            _write_json(begun, settings)
        result = make(folder)
        with writing(done):
            _write_json(done, {"settings": settings, "result": result})
        print(f"{label}: {time.time() - begin:.0f} s", flush=True)
        return result


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(content, indent=2) + "\n", encoding="utf-8")


def call(*command: str) -> dict[str, float | None]:
    """Run a script, shown as one would type it: {"seconds", "peak_memory_mb"}. Its failure ends the comparison."""
    print("$ " + " ".join(shlex.quote(part) for part in command), flush=True)
    begin, peaks = time.perf_counter(), []
    # With os.environ as it was: MindSpore has set OMP_NUM_THREADS=1 behind Python's back, which would leave PyTorch one
    # thread.
    code = subprocesses.run(command, lambda process: peaks.append(_peak_memory(process)), env=dict(os.environ))
    if code:
        raise UserError(
            f"{command[1]} ended with exit code {code}; its message is above. What is done is kept: the "
            "same command goes on from there"
        )
    return {"seconds": time.perf_counter() - begin, "peak_memory_mb": next(filter(None, reversed(peaks)), None)}


def _peak_memory(pid: int) -> float | None:
    """The most memory that a process has held so far, in MB (VmHWM); None where the system does not say.

    Of a child's resource usage the same number would include that of this process, which it was forked from.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found[0] * 1024 / 1e6 if found else None


def _script(name: str) -> str:
    return os.path.relpath(ROOT / name)


class Worker:
    """Calls diffusers_worker.py in the environment that has PyTorch."""

    def __init__(self, python: Path):
        self.python = python
        self.versions: dict[str, Any] = {}

    def __call__(self, command: str, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
        job = {**job, "output": str(folder), "result": str(folder / "result.json")}
        with writing(folder):
            _write_json(folder / "job.json", job)
        spent = call(str(self.python), _script(WORKER), command, str(folder / "job.json"))
        return {**_read_json(folder / "result.json"), **spent}


def reference_python(given: str | None) -> Path:
    """The interpreter with PyTorch: the given one, else that of .venv-parity, which `make` builds where it is missing
    or older than its requirements. Raises UserError where something is missing in it.
    """
    if given is None:
        try:
            code = subprocesses.run(["make", "--silent", ".venv-parity/ready"], cwd=ROOT)
        except OSError:
            raise UserError(
                "make is not installed: build an environment from requirements-parity.txt and give its "
                "interpreter as --reference_python"
            ) from None
        if code:
            raise UserError(
                "make .venv-parity/ready failed, its message is above: diffusers needs an environment of "
                "its own; give another one's interpreter as --reference_python"
            )
    python = VENV / "bin" / "python" if given is None else Path(given).absolute()
    if not os.access(python, os.X_OK) or python.is_dir():
        raise UserError(
            f"--reference_python {python} is no program: give the interpreter of an environment with "
            "requirements-parity.txt in it"
        )
    code = "import sys, importlib.util as i; print(*(n for n in sys.argv[1:] if i.find_spec(n) is None))"
    asked = subprocess.run([str(python), "-c", code, *NEEDED], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"{python} is no Python that works: {(asked.stderr.strip() or 'no message').splitlines()[-1]}")
    if asked.stdout.split():
        raise UserError(
            f"{python} has no {', '.join(asked.stdout.split())}: install requirements-parity.txt there "
            "(without --reference_python, make does it)"
        )
    return python


# ---- the experiment --------------------------------------------------------------------------------------------------


class Comparison:
    """One experiment. Raises UserError before any work for what can be known then."""

    def __init__(self, args: argparse.Namespace, flags: Sequence[str]):
        self.args, self.flags = args, list(flags)
        self.base, self.output = Path(args.base), Path(args.output_path)
        if not is_there(self.base, "--base"):
            raise UserError(f"--base {self.base} does not exist: give a Stable Diffusion checkpoint")
        config = self.recipe(args.seeds[0])
        if config.model_config is None:
            self.model = detect_model_config(self.base, way_out="add --model_config with its YAML")
        else:
            self.model = config_with_tokens(load_model_config(under_root(config.model_config)), self.base)
        self.model_flags = [] if config.model_config is None else ["--config", self.model.path]
        self.model_flags += ["--device_target", config.device_target] if config.device_target else []
        check_expressible(self.model)
        self.rows, self.prompts, self.real = read_data(Path(args.data), config, args.prompts)
        BatchOrder(len(self.rows), config.train_batch_size, 0)  # says where there are too few
        self.image_size = config.image_size or self.model.image_size
        self.scale = default_guidance_scale(self.model.architecture) if args.scale is None else args.scale
        if is_folder(self.output, "--output_path"):
            names = [name for name in list_folder(self.output, "--output_path") if not name.startswith(".")]
            if names and "compared.json" not in names:
                raise UserError(f"--output_path {self.output} holds something else: choose a new folder")
        with claim_folder(self.output, "--output_path"):  # tried here, before an environment is made; held in main
            pass
        self.worker = Worker(reference_python(args.reference_python))
        self.batch_size = 16 if self.image_size <= 128 else 4
        self.data_hash = content_key("rows", *(part for row in self.rows for part in (row.content, row.caption)))
        self.base_hash = base_model_hash(self.base)

    def recipe(self, seed: int) -> TrainSettings:
        return read_recipe(self.args.train_config, self.flags, str(self.base), seed)

    def _recipe(self, config: TrainSettings) -> dict[str, Any]:
        """What decides the trained weights, beside the base model and the data."""
        order = BatchOrder(len(self.rows), config.train_batch_size, config.seed)
        rules = {field.name: field.metadata for field in fields(config)}
        names = [name for name, rule in rules.items() if rule["resume"] or rule["shared_with_diffusers"]]
        updates = make_plan(config, order.steps_per_epoch).steps
        return {**{name: getattr(config, name) for name in names}, "updates": updates}

    def run(self) -> None:
        describe_progress(lambda: f"before the end; what is done is kept in {self.output}: the same command goes on from there")
        with writing(self.output):
            _write_json(self.output / "compared.json", {"base": str(self.base), "data": str(self.args.data)})
        seeds = self.args.seeds
        self.stages = Stages(self.output, 4 + 5 * len(seeds) + 2)
        model = self.model.content()
        self.stages.run("base", {"base": self.base_hash, "model": model}, self._write_base)
        held_out = {"prompts": self.prompts, "image_size": self.image_size, "latents_seed": self.args.latents_seed,
                    "real": content_key("real", *(row.content for row in self.real)), "model": model}  # fmt: skip
        self.stages.run("held_out", held_out, self._write_held_out)
        sampling = {"base": self.base_hash, "held_out": held_out, "steps": self.args.sampling_steps,
                    "scale": self.scale}  # fmt: skip
        drawn: dict[str, dict[str, Any]] = {
            f"base_{side}": self.stages.run(f"base_{side}", sampling, draw)
            for side, draw in zip(SIDES, (self._draw_ours(None), self._draw_diffusers(None)))
        }
        trained: dict[str, dict[str, Any]] = {}
        for seed in seeds:
            config, name = self.recipe(seed), f"seed{seed}"
            settings = {"base": self.base_hash, "model": model, "data": self.data_hash, "recipe": self._recipe(config)}
            start = self.stages.run(f"{name}/start", settings, lambda folder, c=config: self._write_start(c, folder))
            settings["start"] = start["sha256"]
            runs = (
                lambda folder, c=config: self._train_ours(c, folder),
                lambda folder, c=config, s=start: self._train_diffusers(c, s, folder),
            )
            for side, make in zip(SIDES, runs):
                trained[f"{name}/{side}"] = self.stages.run(f"{name}/train_{side}", settings, make, goes_on=True)
            for side, draw in zip(SIDES, (self._draw_ours, self._draw_diffusers)):
                lora = self.output / name / f"train_{side}" / trained[f"{name}/{side}"]["lora"]
                drawn[f"{name}/{side}"] = self.stages.run(
                    f"{name}/{side}", {**sampling, "lora": trained[f"{name}/{side}"]["sha256"]}, draw(lora)
                )
        scores = self.stages.run("scores", self._scoring(drawn), lambda folder: self._score(list(drawn)))
        self._report(trained, drawn, scores)

    # ---- stages' work ------------------------------------------------------------------------------------------------

    def _write_base(self, folder: Path) -> dict[str, Any]:
        write_diffusers_folder(self.base, self.model, folder / "diffusers")
        return {}

    def _write_held_out(self, folder: Path) -> dict[str, Any]:
        shape = (self.model.latent_channels, *[self.image_size // self.model.vae_factor] * 2)
        latents = [
            draws(self.args.latents_seed, "starting latents", i).standard_normal(shape, np.float32)
            for i in range(len(self.prompts))
        ]
        with atomic_path(folder / "latents.npy") as path:
            np.save(path, np.stack(latents), allow_pickle=False)
        with atomic_path(folder / "prompts.txt") as path:
            path.write_text("".join(f"{prompt}\n" for prompt in self.prompts), encoding="utf-8")
        for i, row in enumerate(self.real):  # framed as for training, so that a crop does not count as a difference
            pixels = np.round((load_image(row.path, self.image_size) + 1.0) * 127.5).astype(np.uint8)
            with atomic_path(folder / "real" / f"{i:05d}.png") as path:
                Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
        return {}

    def _write_start(self, config: TrainSettings, folder: Path) -> dict[str, Any]:
        from ldm.lora.formats import write_lora
        from ldm.lora.inject import get_lora, inject_lora
        from ldm.models.stable_diffusion import build_model
        from ldm.training.setup import make_lora_spec

        network = build_model(self.model, random=False)
        inject_lora(network, make_lora_spec(config))
        state = get_lora(network, self.model)
        path = self._start_of(config.seed)
        write_lora(path, state, "diffusers", self.model)
        size = sum(layer.down.size + layer.up.size for layer in state.layers.values())
        return {"sha256": content_hash(path), "parameters": size}

    def _start_of(self, seed: int) -> Path:
        return self.output / f"seed{seed}" / "start" / "pytorch_lora_weights.safetensors"

    def _train_ours(self, config: TrainSettings, folder: Path) -> dict[str, Any]:
        spent = call(
            sys.executable, _script("train_text_to_image.py"), "--train_config", self.args.train_config, *self.flags,
            "--data_path", str(training_folder(Path(self.args.data))), "--pretrained_model_path", str(self.base),
            "--output_path", str(folder), "--seed", str(config.seed), "--precision", "fp32",
            "--loss_scaler_type", "none", "--lora_init_path", str(self._start_of(config.seed)), "--resume", "True",
        )  # fmt: skip
        return {**spent, **_trained(folder, "ckpt/lora.ckpt")}

    def _train_diffusers(self, config: TrainSettings, start: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        order = BatchOrder(len(self.rows), config.train_batch_size, config.seed)
        plan = make_plan(config, order.steps_per_epoch)
        job = {
            **{name: getattr(config, name) for name in names_of(TrainSettings, shared_with_diffusers=True)},
            "base": str(self.output / "base" / "diffusers"),
            "pad_token": self.model.pad_token,
            "added_tokens": self.model.added_tokens,
            "lora": str(self._start_of(config.seed)),
            "trained_parameters": start["parameters"],
            "rows": [[str(row.path), row.caption] for row in self.rows],
            "image_size": self.image_size,
            "batch_size": config.train_batch_size,
            "micro_steps": config.gradient_accumulation_steps,
            "updates": plan.steps,
            "decay_steps": plan.decay_steps,
        }
        return {**self.worker("train", folder, job), **_trained(folder, "pytorch_lora_weights.safetensors")}

    def _draw_ours(self, lora: Path | None) -> Callable[[Path], dict[str, Any]]:
        def draw(folder: Path) -> dict[str, Any]:
            held_out = self.output / "held_out"
            spent = call(
                sys.executable, _script("text_to_image.py"), *self.model_flags, "--ckpt_path", str(self.base),
                "--data_path", str(held_out / "prompts.txt"), "--init_latents", str(held_out / "latents.npy"),
                "--sampling_steps", str(self.args.sampling_steps), "--scale", str(self.scale),
                "--H", str(self.image_size), "--W", str(self.image_size), "--precision", "fp32",
                "--batch_size", str(self.batch_size), "--output_path", str(folder), "--skip_grid",
                *(["--lora_ckpt_path", str(lora)] if lora else []),
            )  # fmt: skip
            return {**spent, "sha256": _images_hash(folder)}

        return draw

    def _draw_diffusers(self, lora: Path | None) -> Callable[[Path], dict[str, Any]]:
        def draw(folder: Path) -> dict[str, Any]:
            job = {
                "base": str(self.output / "base" / "diffusers"),
                "pad_token": self.model.pad_token,
                "added_tokens": self.model.added_tokens,
                "lora": None if lora is None else str(lora),
                "prompts": self.prompts,
                "latents": str(self.output / "held_out" / "latents.npy"),
                "sampling_steps": self.args.sampling_steps,
                "scale": self.scale,
                "image_size": self.image_size,
                "batch_size": self.batch_size,
            }
            return {**self.worker("generate", folder, job), "sha256": _images_hash(folder)}

        return draw

    def _scoring(self, drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What the scores depend on."""
        networks = {name: str(path) and content_hash(path) for name, path in
                    (("inception", self.args.inception_path), ("clip", self.args.clip_path)) if path}  # fmt: skip
        embedded = {file: content_hash(ROOT / "models" / "nano" / file) for file in
                    ("clip.safetensors", "nano.safetensors")} if len(networks) < 2 else {}  # fmt: skip
        return {"images": {name: result["sha256"] for name, result in drawn.items()}, "prompts": self.prompts,
                "real": content_key("real", *(row.content for row in self.real)), **networks, **embedded}  # fmt: skip

    def _score(self, names: Sequence[str]) -> dict[str, Any]:
        """Scores of every set, of the differences between the two sides, and the networks that gave them."""
        from ldm.metrics.networks import clip, inception, nano_clip
        from ldm.metrics.report import describe_network

        args = self.args
        text_network = clip(args.clip_path) if args.clip_path else nano_clip()
        image_network = inception(args.inception_path) if args.inception_path else nano_clip()
        found = Scores(self.prompts, self.real and self._images("held_out/real"), image_network, text_network)
        sets = {name: found.add(name, self._images(f"{name}/samples")) for name in names}
        pairs = {
            name: found.difference(f"{name}{SIDES[0]}", f"{name}{SIDES[1]}")
            for name in ["base_", *(f"seed{seed}/" for seed in args.seeds)]
        }
        return {
            "sets": sets,
            "pairs": pairs,
            "real_clip_score": found.of_real(),
            "image_network": describe_network(image_network),
            "text_network": describe_network(text_network),
        }

    def _images(self, name: str) -> list[Path]:
        return sorted((self.output / name).glob("*.png"))

    # ---- results -----------------------------------------------------------------------------------------------------

    def _report(self, trained: Mapping[str, Any], drawn: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        metrics = {
            str(seed): {side: read_metrics(self.output / f"seed{seed}" / f"train_{side}") for side in SIDES}
            for seed in self.args.seeds
        }
        losses = {seed: {side: run["loss"] for side, run in runs.items()} for seed, runs in metrics.items()}
        self.stages.run(
            "curves", {"losses": losses},
            lambda folder: self.worker("plot", folder, {"runs": losses, "allowed": ALLOWED}),
        )  # fmt: skip
        chosen = evenly(len(self.prompts), min(GRID_PROMPTS, len(self.prompts)))
        for seed in self.args.seeds:
            columns = {"real": "held_out/real"} if self.real else {}
            columns.update({"base": "base_ours/samples", "ours": f"seed{seed}/ours/samples",
                            "diffusers": f"seed{seed}/diffusers/samples"})  # fmt: skip
            files = {title: [self._images(name)[i] for i in chosen] for title, name in columns.items()}
            draw_grid([self.prompts[i] for i in chosen], files, self.output / f"grid_seed{seed}.png")
        config = self.recipe(self.args.seeds[0])
        table = {
            "base": {"file": self.base.name, "sha256": self.base_hash, "architecture": self.model.architecture},
            "data": {"folder": Path(self.args.data).name, "rows": len(self.rows), "prompts": len(self.prompts)},
            "seeds": self.args.seeds,
            "recipe": {key: value for key, value in self._recipe(config).items() if key != "seed"},
            "updates": len(losses[str(self.args.seeds[0])]["ours"]),
            "sampling": {"sampler": "DPM-Solver++", "steps": self.args.sampling_steps, "scale": self.scale,
                         "latents_seed": self.args.latents_seed},
            "scores": scores,
            "losses": {seed: compare_runs(*(runs[side] for side in SIDES)) for seed, runs in metrics.items()},
            "training": {
                f"seed{seed}/{side}": {
                    "seconds_per_step": seconds_per_step(run),
                    **{key: trained[f"seed{seed}/{side}"][key] for key in ("seconds", "peak_memory_mb")},
                }
                for seed, runs in metrics.items() for side, run in runs.items()
            },
            "drawing": {name: {key: result[key] for key in ("seconds", "peak_memory_mb")}
                        for name, result in drawn.items()},
            "versions": {
                "ours": {"python": platform.python_version(),
                         **{name: metadata.version(name) for name in ("numpy", "mindspore")}},
                "diffusers": trained[f"seed{self.args.seeds[0]}/diffusers"]["versions"],
            },
        }  # fmt: skip
        text = markdown(table, shown_command(sys.argv[1:]))
        _write_json(self.output / "table.json", table)
        with atomic_path(self.output / "table.md") as path:
            path.write_text(text, encoding="utf-8")
        print(f"\n{text}\n{self.output / 'table.md'}, table.json, curves/losses.png, grid_seed{self.args.seeds[0]}.png")


def shown_command(argv: Sequence[str]) -> str:
    """The command for the page that others read: this project's files as seen from its root, without the folders that
    others on this machine lie in, and without the interpreter.
    """
    parts = list(argv)
    for i in reversed([i for i, part in enumerate(parts) if part.partition("=")[0] == "--reference_python"]):
        del parts[i : i + (1 if "=" in parts[i] else 2)]

    def shown(part: str) -> str:
        flag, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
        if not os.path.isabs(value):
            return part
        path = Path(value)
        return flag + equals + (str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)

    return shlex.join(["python", "tools/eval/compare_diffusers.py", *map(shown, parts)])


def check_expressible(model: ModelConfig) -> None:
    """Raise UserError for a model that cannot be put together from diffusers' classes."""
    if model.unet["channel_mult"][0] != 1:
        raise UserError(
            f"{model.path}: channel_mult must begin with 1, as diffusers' UNet begins as wide as its first "
            "level; such a model cannot be compared"
        )
    if model.vae["z_channels"] != model.vae["embed_dim"] or not model.vae.get("double_z", True):
        raise UserError(
            f"{model.path}: z_channels and embed_dim are one number in diffusers' autoencoder, and "
            "double_z is true; such a model cannot be compared"
        )


def write_diffusers_folder(base: Path, model: ModelConfig, folder: Path) -> None:
    """Write a base as a diffusers folder in fp32. Unlike ldm.weights.convert.convert it takes an encoder that begins
    narrower than diffusers' own can, as the embedded model's; diffusers_worker.py knows what to do with it.
    """
    from ldm.models.stable_diffusion import build_model
    from ldm.weights.base_model import map_base_model, open_base_model
    from ldm.weights.convert import DTYPES, diffusers_arrays
    from ldm.weights.diffusers_folder.writer import write_folder
    from ldm.weights.load import check_metadata, compare_shapes, mismatch_message
    from ldm.weights.names import COMPONENTS, CanonicalArrays

    checkpoint = open_base_model(base)
    check_metadata(checkpoint.metadata, model, base)
    key_map = map_base_model(checkpoint)
    shapes = {p.name: tuple(p.shape) for p in build_model(model, random=False).get_parameters()}
    report = compare_shapes(checkpoint, key_map, shapes, tuple(COMPONENTS))
    if not report.ok:
        raise UserError(mismatch_message(checkpoint, report))
    canonical = CanonicalArrays(checkpoint, key_map, shapes)
    write_folder(folder, model, diffusers_arrays(canonical, shapes, model, DTYPES["fp32"]))


def _trained(folder: Path, lora: str) -> dict[str, Any]:
    return {"lora": lora, "sha256": content_hash(folder / lora)}


def _images_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((folder / "samples").glob("*.png")):
        digest.update(np.asarray(Image.open(path)).tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--train_config", type=expanded, required=True, help="recipe of the LoRA, as for train_text_to_image.py"
    )
    parser.add_argument("--base", type=expanded, required=True, help="base checkpoint, a file or a diffusers folder")
    parser.add_argument(
        "--data",
        type=expanded,
        required=True,
        help="folder with train/ and test/, an img_txt.csv with images in each; test/ may hold a "
        "prompts.txt alone (no FID then); an img_txt.csv beside them chooses the training rows",
    )
    parser.add_argument(
        "--output_path", type=expanded, required=True, help="folder for the results; a run that stopped goes on there"
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(0, 2**32 - 1),
        nargs="+",
        default=[1, 2, 3],
        help="a training of each; default 1 2 3",
    )
    parser.add_argument(
        "--prompts", type=whole_number(2), help="so many of the held-out prompts, evenly spread; default all"
    )
    parser.add_argument(
        "--sampling_steps", type=whole_number(1, 1000), default=20, help="of DPM-Solver++; default %(default)s"
    )
    parser.add_argument(
        "--scale", type=number(1, 1000), help="guidance, 1 for none; default 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)"
    )
    parser.add_argument(
        "--latents_seed",
        type=whole_number(0, 2**32 - 1),
        default=1,
        help="of the starting latents; default %(default)s",
    )
    parser.add_argument(
        "--inception_path",
        type=expanded,
        help="Inception weights for FID and KID; default: the embedded nano CLIP's image tower takes "
        "its place, whose scores compare only here",
    )
    parser.add_argument(
        "--clip_path", type=expanded, help="CLIP folder or file for the CLIP score; default: the embedded nano CLIP"
    )
    parser.add_argument(
        "--reference_python",
        type=expanded,
        help="interpreter with requirements-parity.txt; default: .venv-parity, which is made where it is missing",
    )
    args, flags = parser.parse_known_args()
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give different ones")
    comparison = Comparison(args, flags)
    with claim_folder(comparison.output, "--output_path"):
        comparison.run()


if __name__ == "__main__":
    run_script(main)
