r"""Train the same LoRA here and with diffusers, draw the same held-out prompts with both, and score both alike.

    python tools/eval/compare_diffusers.py --train_config configs/train/train_config_lora_nano.yaml \
        --base models/nano/nano.safetensors --data datasets/emoji_fluent_hc --output_path output/compare

Both sides start from the same base model and the same untrained LoRA. They see the same rows, draws of the latents,
noise, timesteps and dropped captions at every step, train with AdamW at the same rates in fp32, and draw from the same
starting latents with DPM-Solver++. Only the two implementations differ.

Settings of train_text_to_image.py may follow, such as --max_steps 100. They override the recipe for both sides. A run
that was interrupted, or that has more seeds, continues after the stages that are done. docs/evaluation.md explains the
results:

    OUTPUT/table.md, table.json     scores, seconds, memory, and the differences of the losses
    OUTPUT/curves/losses.png        the losses of both sides for each seed
    OUTPUT/grid_seed1.png           prompt, real image, base model, LoRA of both sides
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from ldm.data.draws import draws  # noqa: E402
from ldm.data.transforms import load_image  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.files.inputs import content_hash  # noqa: E402
from ldm.files.outputs import claim_folder  # noqa: E402
from ldm.files.paths import ROOT  # noqa: E402
from ldm.metrics.report import describe_network, write_json  # noqa: E402
from ldm.settings.read import read_settings, split_flags  # noqa: E402
from tools.eval.comparison.experiment import SIDES, Experiment, Settings  # noqa: E402
from tools.eval.comparison.jobs import Worker, reference_python  # noqa: E402
from tools.eval.comparison.report import (  # noqa: E402
    ALLOWED,
    compare_runs,
    markdown,
    read_metrics,
    seconds_per_step,
    shown_command,
)
from tools.eval.comparison.sides import Diffusers, Ours, write_diffusers_base, write_start_lora  # noqa: E402
from tools.eval.comparison.stages import Stages  # noqa: E402
from tools.grid import draw_grid, evenly  # noqa: E402

GRID_PROMPTS = 24


class Comparison:
    """The stages of an experiment and its report. Raises UserError for mistakes before any work."""

    def __init__(self, args: Settings, flags: Sequence[str]):
        self.args = args
        self.experiment = Experiment(args, flags)
        self.output = self.experiment.output
        self.worker = Worker(reference_python(args.reference_python))
        self.sides: dict[str, Ours | Diffusers] = {
            "ours": Ours(self.experiment),
            "diffusers": Diffusers(self.experiment, self.worker),
        }

    def run(self) -> None:
        """Run all stages that are not done."""
        describe_progress(
            lambda: f"before the end; finished stages are kept in {self.output}: the same command continues from there"
        )
        args, inputs = self.args, self.experiment
        write_json(self.output / "compared.json", {"base": str(inputs.base), "data": str(args.data)})
        self.stages = stages = Stages(self.output, 4 + 5 * len(args.seeds) + 2)
        model = {"base": inputs.base_hash, "model": inputs.config.content()}
        stages.run(
            "base", model, lambda folder: write_diffusers_base(inputs.base, inputs.config, inputs.diffusers_base)
        )
        held_out = {
            "prompts": inputs.prompts,
            "image_size": inputs.image_size,
            "latents_seed": args.latents_seed,
            "real": inputs.real_hash,
            "model": model["model"],
        }
        stages.run("held_out", held_out, self._write_held_out)
        sampling = {
            "base": inputs.base_hash, "held_out": held_out, "steps": args.sampling_steps, "scale": inputs.scale,
        }  # fmt: skip
        drawn = {
            f"base_{name}": stages.run(f"base_{name}", sampling, partial(side.draw, None))
            for name, side in self.sides.items()
        }
        trained: dict[str, dict[str, Any]] = {}
        for seed in args.seeds:
            trained.update(self._train(seed, {**model, "data": inputs.data_hash}))
            for name, side in self.sides.items():
                place, run = f"seed{seed}/{name}", trained[f"seed{seed}/{name}"]
                draw = partial(side.draw, self.output / f"seed{seed}" / f"train_{name}" / run["lora"])
                drawn[place] = stages.run(place, {**sampling, "lora": run["sha256"]}, draw)
        scores = stages.run("scores", self._score_inputs(drawn), lambda folder: self._score(list(drawn)))
        self._report(trained, drawn, scores)

    def _write_held_out(self, folder: Path) -> None:
        inputs = self.experiment
        shape = (inputs.config.latent_channels, *[inputs.image_size // inputs.config.vae_factor] * 2)
        latents = [
            draws(self.args.latents_seed, "starting latents", i).standard_normal(shape, np.float32)
            for i in range(len(inputs.prompts))
        ]
        with atomic_path(folder / "latents.npy") as path:
            np.save(path, np.stack(latents), allow_pickle=False)
        with atomic_path(folder / "prompts.txt") as path:
            path.write_text("".join(f"{prompt}\n" for prompt in inputs.prompts), encoding="utf-8")
        for i, row in enumerate(inputs.real):  # cropped as in training, so that a crop does not count as a difference
            pixels = np.round((load_image(row.path, inputs.image_size) + 1.0) * 127.5).astype(np.uint8)
            with atomic_path(folder / "real" / f"{i:05d}.png") as path:
                Image.fromarray(pixels.transpose(1, 2, 0)).save(path)

    def _train(self, seed: int, inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Train on both sides from the same untrained LoRA."""
        settings = self.experiment.settings(seed)
        inputs = {**inputs, "recipe": self.experiment.recipe(settings)}
        start_lora = self.experiment.start_lora(seed)
        start = self.stages.run(
            f"seed{seed}/start", inputs, lambda folder: write_start_lora(self.experiment.config, settings, start_lora)
        )
        inputs["start"] = start["sha256"]
        return {
            f"seed{seed}/{name}": self.stages.run(
                f"seed{seed}/train_{name}", inputs, partial(side.train, settings, start), can_continue=True
            )
            for name, side in self.sides.items()
        }

    def _score_inputs(self, drawn: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        weights = {"inception": self.args.inception_path, "clip": self.args.clip_path}
        networks = {name: content_hash(path) for name, path in weights.items() if path}
        if len(networks) < 2:
            files = ("clip.safetensors", "nano.safetensors")
            networks.update({file: content_hash(ROOT / "models" / "nano" / file) for file in files})
        return {
            "images": {name: result["sha256"] for name, result in drawn.items()},
            "prompts": self.experiment.prompts,
            "real": self.experiment.real_hash,
            "score_version": 2,  # raised when the entries of the scores change
            **networks,
        }

    def _score(self, names: Sequence[str]) -> dict[str, Any]:
        """Score every set of images and the differences between the sides."""
        from ldm.metrics.networks import clip, inception, nano_clip
        from tools.eval.comparison.scores import Scores

        args, images = self.args, self.experiment.images
        clip_network = clip(args.clip_path) if args.clip_path else nano_clip()
        image_network = inception(args.inception_path) if args.inception_path else nano_clip()
        real = images("held_out/real") if self.experiment.real else []
        scores = Scores(self.experiment.prompts, real, image_network, clip_network)
        return {
            "sets": {name: scores.add(name, images(f"{name}/samples")) for name in names},
            "pairs": {
                name: scores.difference(f"{name}{SIDES[0]}", f"{name}{SIDES[1]}")
                for name in ["base_", *(f"seed{seed}/" for seed in args.seeds)]
            },
            "real_clip_score": scores.real_clip_score,
            "image_network": describe_network(image_network),
            "clip_network": describe_network(clip_network),
        }

    def _report(self, trained: Mapping[str, Any], drawn: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        args, inputs = self.args, self.experiment
        metrics = {
            str(seed): {side: read_metrics(self.output / f"seed{seed}" / f"train_{side}") for side in SIDES}
            for seed in args.seeds
        }
        losses = {seed: {side: run["loss"] for side, run in runs.items()} for seed, runs in metrics.items()}
        plot = {"runs": losses, "allowed": ALLOWED}
        self.stages.run("curves", {"losses": losses}, lambda folder: self.worker.run("plot", folder, plot))
        chosen = evenly(len(inputs.prompts), GRID_PROMPTS)
        for seed in args.seeds:
            columns = {"real": "held_out/real"} if inputs.real else {}
            columns.update({"base": "base_ours/samples", **{side: f"seed{seed}/{side}/samples" for side in SIDES}})
            files = {title: [inputs.images(folder)[i] for i in chosen] for title, folder in columns.items()}
            draw_grid([inputs.prompts[i] for i in chosen], files, self.output / f"grid_seed{seed}.png")
        recipe = inputs.recipe(inputs.settings(args.seeds[0]))
        table = {
            "base": {"file": inputs.base.name, "sha256": inputs.base_hash, "architecture": inputs.config.architecture},
            "data": {"folder": inputs.data.name, "rows": len(inputs.rows), "prompts": len(inputs.prompts)},
            "seeds": args.seeds,
            "recipe": {key: value for key, value in recipe.items() if key != "seed"},
            "steps": recipe["steps"],
            "sampling": {"sampler": "DPM-Solver++", "steps": args.sampling_steps, "scale": inputs.scale,
                         "latents_seed": args.latents_seed},
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
                "diffusers": trained[f"seed{args.seeds[0]}/diffusers"]["versions"],
            },
        }  # fmt: skip
        text = markdown(table, shown_command(sys.argv[1:]))
        write_json(self.output / "table.json", table)
        with atomic_path(self.output / "table.md") as path:
            path.write_text(text, encoding="utf-8")
        print(f"\n{text}\n{self.output / 'table.md'}, table.json, curves/losses.png, grid_seed{args.seeds[0]}.png")


def main() -> None:
    own, flags = split_flags(Settings, sys.argv[1:])
    args = read_settings(Settings, own, description=__doc__)
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: give different ones")
    comparison = Comparison(args, flags)
    with claim_folder(comparison.output, "--output_path"):
        comparison.run()


if __name__ == "__main__":
    run_script(main)
