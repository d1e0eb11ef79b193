"""The diffusers side of compare_diffusers.py, in the environment with PyTorch and diffusers.

    .venv-parity/bin/python tools/eval/comparison/diffusers_worker.py train JOB.json
    .venv-parity/bin/python tools/eval/comparison/diffusers_worker.py generate JOB.json
    .venv-parity/bin/python tools/eval/comparison/diffusers_worker.py plot JOB.json

The jobs come from sides.py. Networks, LoRA layers, optimizer, noising and sampler are those of diffusers, PEFT and
PyTorch. The order of the rows, the images, the tokens, all random draws and the learning rates come from the same
modules as in train_text_to_image.py. None of them needs MindSpore.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from ldm.runtime.script import run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import CLIPTextModel  # noqa: E402

from ldm.data.batches import BatchOrder  # noqa: E402
from ldm.data.draws import augmentation_draws, micro_batch_draws  # noqa: E402
from ldm.data.transforms import load_image  # noqa: E402
from ldm.errors import UserError  # noqa: E402
from ldm.files.atomic import atomic_path  # noqa: E402
from ldm.tokenizer import AddedToken, Tokenizer  # noqa: E402
from ldm.training.metrics_file import Metrics, MetricsFile  # noqa: E402
from ldm.training.schedules import learning_rate  # noqa: E402

EPSILON = 1e-8  # of AdamW, torch's default
ENCODE_BATCH = 16
SAVE_SECONDS = 300.0  # between two training states, from which an interrupted training continues


class Networks:
    """The networks of a diffusers folder in fp32, frozen, its noise schedule's configuration, and the tokenizer."""

    def __init__(self, folder: Path, pad_token: str, added_tokens: Sequence[Sequence]):
        self.unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
        self.vae = load_vae(folder / "vae")
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
        self.schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer(pad_token, [AddedToken(*added) for added in added_tokens])
        for network in (self.unet, self.vae, self.text_encoder):
            network.requires_grad_(False).eval()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Return text embeddings (N, 77, D): the last layer's output after the final norm."""
        tokens = torch.from_numpy(self.tokenizer.encode(texts).astype(np.int64))
        parts = [self.text_encoder(part).last_hidden_state for part in tokens.split(ENCODE_BATCH)]
        return torch.cat(parts)

    @torch.no_grad()
    def moments(self, images: np.ndarray) -> torch.Tensor:
        """Return mean and log variance (N, 2C, h, w) of the latents of images (N, 3, H, W) in [-1, 1]."""
        distribution = self.vae.encode(torch.from_numpy(images)).latent_dist
        return torch.cat([distribution.mean, distribution.logvar], dim=1)


def load_vae(folder: Path) -> AutoencoderKL:
    """Load the autoencoder of a diffusers folder.

    The first convolution of diffusers' class is as wide as its first level. LDM's is `ch` wide whatever ch_mult begins
    with, as in the nano model. For such a file, layers of that width replace those of the class.
    """
    config = AutoencoderKL.load_config(folder)
    arrays = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae = AutoencoderKL.from_config(config)
    width, level = arrays["encoder.conv_in.weight"].shape[0], config["block_out_channels"][0]
    if width != level:
        encoder = vae.encoder
        encoder.conv_in = torch.nn.Conv2d(config["in_channels"], width, 3, padding=1)
        encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=width, out_channels=level, temb_channels=None, groups=config["norm_num_groups"], eps=1e-6
        )
    vae.load_state_dict(arrays)
    return vae


def load_lora(unet: UNet2DConditionModel, path: str, prefix: str | None) -> None:
    """Load a LoRA file, whose keys begin with `prefix`, into the UNet."""
    # Without use_safetensors, diffusers ignores the metadata of a .safetensors, which holds lora_alpha. All alphas
    # would be the rank, without a warning.
    unet.load_lora_adapter(path, prefix=prefix, adapter_name="default", use_safetensors=True)


# ---- training --------------------------------------------------------------------------------------------------------


def train(job: dict) -> None:
    """Train a LoRA as diffusers' train_text_to_image_lora.py does.

    It starts from the LoRA job["lora"], or continues from the state that an interrupted run left in job["output"].
    """
    networks = Networks(Path(job["base"]), job["pad_token"], job["added_tokens"])
    unet = networks.unet
    load_lora(unet, job["lora"], "unet")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    if count != job["trained_parameters"]:
        raise UserError(f"PEFT trains {count} parameters, {job['lora']} has {job['trained_parameters']}")
    unet.train()
    noising = DDPMScheduler.from_config(networks.schedule)
    optimizer = torch.optim.AdamW(
        trained, lr=job["start_learning_rate"], betas=tuple(job["betas"]), eps=EPSILON, weight_decay=job["weight_decay"]
    )
    batches = Batches(job, networks)
    state = Path(job["output"]) / "state.pt"
    done = load_state(state, trained, optimizer) if state.is_file() else 0
    metrics_file = MetricsFile(Path(job["output"]) / "metrics.csv", done)
    saved = time.perf_counter()
    bar = tqdm(range(done, job["steps"]), desc="training with diffusers", unit="step", smoothing=0.1, initial=done,
               total=job["steps"])  # fmt: skip
    for step in bar:
        begin = time.perf_counter()
        rate = learning_rate(
            step, scheduler=job["scheduler"], start=job["start_learning_rate"], end=job["end_learning_rate"],
            warmup_steps=job["warmup_steps"], decay_steps=job["decay_steps"],
            cycles=job["lr_scheduler_num_cycles"], power=job["lr_scheduler_power"],
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for number in range(step * job["micro_batches"], (step + 1) * job["micro_batches"]):
            latents, noise, timesteps, text_embeddings = batches(number)
            noisy_latents = noising.add_noise(latents, noise, timesteps)
            predicted = unet(noisy_latents, timesteps, text_embeddings).sample
            velocity = noising.config.prediction_type == "v_prediction"
            target = noising.get_velocity(latents, noise, timesteps) if velocity else noise
            batch_loss = F.mse_loss(predicted.float(), target.float()) / job["micro_batches"]
            batch_loss.backward()
            loss += batch_loss.item()
        # An infinite maximum clips nothing, but the norm is returned.
        norm = torch.nn.utils.clip_grad_norm_(trained, job["max_grad_norm"] if job["clip_grad"] else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        metrics_file.write(Metrics(step + 1, loss, rate, 1.0, seconds, norm.item()))
        if time.perf_counter() - saved > SAVE_SECONDS:
            save_state(state, trained, optimizer, step + 1)
            saved = time.perf_counter()
    metrics_file.close()
    unet.save_lora_adapter(Path(job["output"]), adapter_name="default")
    state.unlink(missing_ok=True)


def save_state(path: Path, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write everything that later steps depend on. Random draws need no state: they follow from the step."""
    with atomic_path(path) as temporary:
        torch.save(
            {"done": done, "trained": [parameter.data for parameter in trained], "optimizer": optimizer.state_dict()},
            temporary,
        )


def load_state(path: Path, trained: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Load what save_state wrote. Returns the number of steps done."""
    state = torch.load(path, weights_only=True)
    for parameter, values in zip(trained, state["trained"]):
        parameter.data.copy_(values)
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]


class Batches:
    """The micro-batches (latents, noise, timesteps, text embeddings), the same as ldm.training.inputs.Inputs."""

    def __init__(self, job: dict, networks: Networks):
        self.job, self.networks = job, networks
        self.paths, self.captions = zip(*job["rows"])
        self.order = BatchOrder(len(self.paths), job["batch_size"], job["seed"])
        self.text_embeddings = networks.encode_texts([*self.captions, ""]) if job["cache_text"] else None
        self.moments = None
        if job["cache_latents"] and not (job["random_crop"] or job["random_flip"]):
            parts = []
            for start in tqdm(range(0, len(self.paths), ENCODE_BATCH), desc="latents", unit="batch"):
                images = [load_image(path, job["image_size"]) for path in self.paths[start : start + ENCODE_BATCH]]
                parts.append(networks.moments(np.stack(images)))
            self.moments = torch.cat(parts)

    def __call__(self, number: int) -> tuple[torch.Tensor, ...]:
        job = self.job
        rows = self.order.indices(number)
        mean, logvar = self._moments(rows, number).chunk(2, dim=1)
        drawn = micro_batch_draws(
            job["seed"], number, tuple(mean.shape), range(self.networks.schedule["num_train_timesteps"]),
            job["caption_dropout"],
        )  # fmt: skip
        latents = mean + torch.exp(0.5 * logvar) * torch.from_numpy(drawn.posterior)
        latents = latents * self.networks.vae.config.scaling_factor
        timesteps = torch.from_numpy(drawn.timesteps.astype(np.int64))
        return latents, torch.from_numpy(drawn.noise), timesteps, self._text_embeddings(rows, drawn.dropped)

    def _text_embeddings(self, rows: np.ndarray, dropped: np.ndarray) -> torch.Tensor:
        if self.text_embeddings is not None:
            return self.text_embeddings[np.where(dropped, len(self.captions), rows)]
        return self.networks.encode_texts(["" if drop else self.captions[row] for row, drop in zip(rows, dropped)])

    def _moments(self, rows: np.ndarray, number: int) -> torch.Tensor:
        if self.moments is not None:
            return self.moments[rows]
        job = self.job
        images = [
            load_image(
                self.paths[row], job["image_size"], random_crop=job["random_crop"], random_flip=job["random_flip"],
                rng=rng,
            )
            for row, rng in zip(rows, augmentation_draws(job["seed"], number, len(rows)))
        ]  # fmt: skip
        return self.networks.moments(np.stack(images))


# ---- generating ------------------------------------------------------------------------------------------------------


def generate(job: dict) -> None:
    """Draw job["prompts"] from the latents in job["latents"] with StableDiffusionPipeline and the LoRA, if any."""
    networks = Networks(Path(job["base"]), job["pad_token"], job["added_tokens"])
    scheduler = DPMSolverMultistepScheduler.from_config(
        networks.schedule, algorithm_type="dpmsolver++", timestep_spacing="linspace"
    )
    pipeline = StableDiffusionPipeline(
        vae=networks.vae, text_encoder=networks.text_encoder, tokenizer=None, unet=networks.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if job["lora"]:
        load_lora(pipeline.unet, job["lora"], None)
        pipeline.unet.fuse_lora()
    starting = torch.from_numpy(np.load(job["latents"], allow_pickle=False))
    prompts, size, guided = job["prompts"], job["batch_size"], job["scale"] != 1.0
    folder = Path(job["output"]) / "samples"
    with tqdm(total=len(prompts), desc="sampling with diffusers", unit="image") as bar:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            text_embeddings = networks.encode_texts([*batch, ""])
            images = pipeline(
                prompt_embeds=text_embeddings[:-1],
                negative_prompt_embeds=text_embeddings[-1:].repeat(len(batch), 1, 1) if guided else None,
                latents=starting[start : start + size],
                height=job["image_size"],
                width=job["image_size"],
                num_inference_steps=job["sampling_steps"],
                guidance_scale=job["scale"],
                output_type="np",
            ).images
            for index, image in enumerate(images, start):
                with atomic_path(folder / f"{index:05d}.png") as path:
                    Image.fromarray(np.round(image * 255).astype(np.uint8)).save(path)
            bar.update(len(batch))


# ---- curves ----------------------------------------------------------------------------------------------------------


def plot(job: dict) -> None:
    """Plot the losses of both sides for each seed, and below them their relative difference at each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = job["runs"]
    size = (5.5 * len(runs), 6)
    figure, axes = pyplot.subplots(2, len(runs), figsize=size, squeeze=False, sharex="col", sharey="row")
    for column, seed in enumerate(runs):
        ours, theirs = (np.array(runs[seed][side]) for side in ("ours", "diffusers"))
        steps = np.arange(1, len(ours) + 1)
        upper, lower = axes[:, column]
        for losses, label, colour, line in ((ours, "this project", "C0", "-"), (theirs, "diffusers", "C1", "--")):
            upper.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            upper.plot(steps, running_mean(losses), color=colour, label=label, linestyle=line)
        upper.set_title(f"seed {seed}")
        lower.semilogy(steps, np.maximum(np.abs(ours - theirs) / np.abs(theirs), 1e-9), color="C2", linewidth=0.8)
        lower.axhline(job["allowed"], color="grey", linestyle=":", label=f"{job['allowed']:.0%}")
        lower.set_xlabel("step")
    axes[0, 0].set_ylabel("loss (thin), running mean")
    axes[1, 0].set_ylabel("relative difference of a step's loss")
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    with atomic_path(Path(job["output"]) / "losses.png") as path:
        figure.savefig(path, dpi=110)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the tenth of the curve that ends at each step, or over all steps before it."""
    window = max(1, len(values) // 10)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def main() -> None:
    command, path = sys.argv[1:]
    # Their warnings concern what this script does not use: image processors, the hub, other precisions.
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    {"train": train, "generate": generate, "plot": plot}[command](job)
    packages = ("numpy", "torch", "diffusers", "transformers", "peft")
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages},
                "threads": torch.get_num_threads()}  # fmt: skip
    with atomic_path(job["result"]) as temporary:
        temporary.write_text(json.dumps({"versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
