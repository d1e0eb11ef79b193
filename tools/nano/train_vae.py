"""Train the nano model's autoencoder.

    python -m tools.nano.train_vae --output_path output/nano/vae --steps 3000
    python -m tools.nano.train_vae --output_path output/nano/vae_decoder --steps 3000 --decoder_only output/nano/vae

The data are the train splits of Noto and of the two other styles. The test splits are used for measuring only. The
loss is L1 + 2 MSE + 0.5 L1 of the pixel differences along rows and columns (edges) + 0.5 L1 of R - G and G - B (small
models lose green and purple first) + a small KL term. At the end, the latents' mean and standard deviation on the
training images are folded into quant_conv and post_quant_conv, so that every latent channel has zero mean and unit
variance. --decoder_only keeps the encoder of a finished run, and thereby all latents, and adds 0.1 log MSE per image to
the loss instead of the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import numpy as np  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402

from ldm.data.draws import draws  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.models.autoencoder import AutoencoderKL, VAEEncode  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, MAX_SEED, REQUIRED, setting  # noqa: E402
from ldm.settings.model import load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from tools.nano.images import STYLES, read_images, shift, to_network, to_pixels, vary_colours  # noqa: E402
from tools.nano.loop import Step, learning_rates, load_parameters, train, write_results  # noqa: E402

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano.yaml"
WEIGHTS, PREFIX = "vae.safetensors", "first_stage_model."


class ReconstructionLoss(nn.Cell):
    """The loss of the autoencoder on images (N, 3, H, W) with posterior noise eps (N, z, h, w).

    Returns (loss, L1, MSE, KL per latent value).
    """

    def __init__(self, vae: AutoencoderKL, latent_channels: int, kl_weight: float, decoder_only: bool):
        super().__init__(auto_prefix=False)
        self.vae, self.z, self.kl_weight, self.decoder_only = vae, latent_channels, kl_weight, decoder_only

    def construct(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moments = self.vae.encode(images)
        if self.decoder_only:
            moments = ops.stop_gradient(moments)
        mean, logvar = moments[:, : self.z], ops.clamp(moments[:, self.z :], -30.0, 20.0)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1.0 - logvar).mean()
        error = self.vae.decode(mean + ops.exp(0.5 * logvar) * eps) - images
        l1, mse = error.abs().mean(), (error * error).mean()
        rows, columns = error[:, :, 1:] - error[:, :, :-1], error[:, :, :, 1:] - error[:, :, :, :-1]
        edges = rows.abs().mean() + columns.abs().mean()
        colour = (error[:, :2] - error[:, 1:]).abs().mean()
        loss = l1 + 2.0 * mse + 0.5 * edges + 0.5 * colour
        if self.decoder_only:  # the mean PSNR averages the logarithms of the images' errors
            loss = loss + 0.1 * ops.log((error * error).mean(axis=(1, 2, 3)) + 1e-5).mean()
        else:
            loss = loss + self.kl_weight * kl
        return loss, l1, mse, kl


def psnr(real: np.ndarray, made: np.ndarray) -> np.ndarray:
    """Return the PSNR of each image in decibels (N,), for uint8 pixels (N, H, W, 3)."""
    error = ((real.astype(np.float64) - made) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-9))


def in_batches(cell: nn.Cell, images: np.ndarray, size: int = 19) -> np.ndarray:
    """Run a cell over images (N, ...) in batches of `size`. The last is filled up, so that one graph is compiled."""
    out = []
    for first in range(0, len(images), size):
        part = images[first : first + size]
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)])
        out.append(cell(Tensor(filled)).asnumpy()[: len(part)])
    return np.concatenate(out)


def fold_normalisation(vae: AutoencoderKL, pixels: np.ndarray, z: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalise each latent channel over `pixels`, keeping the reconstruction; return the old mean and std."""
    means = in_batches(VAEEncode(vae), to_network(pixels))[:, :z]
    mean, std = means.mean(axis=(0, 2, 3)), means.std(axis=(0, 2, 3))
    layers = (vae.quant_conv, vae.post_quant_conv)
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    quant_weight, quant_bias, post_weight, post_bias = (parameter.asnumpy().copy() for parameter in parameters)
    quant_weight[:z] /= std.reshape(-1, 1, 1, 1)
    quant_bias[:z] = (quant_bias[:z] - mean) / std
    quant_bias[z:] -= 2 * np.log(std)
    post_bias += (post_weight[:, :, 0, 0] * mean).sum(axis=1)
    post_weight *= std.reshape(1, -1, 1, 1)
    for parameter, array in zip(parameters, (quant_weight, quant_bias, post_weight, post_bias)):
        parameter.set_data(Tensor(array))
    return mean, std


def report(vae: AutoencoderKL) -> str:
    """Return the PSNR on the held-out images of each style, as text."""
    lines = []
    for style in ("emoji_noto", *STYLES):
        real = np.stack([image.pixels for image in read_images(style, "test")])
        scores = psnr(real, to_pixels(in_batches(vae, to_network(real))))
        lines.append(f"{style} test, {len(real)} images: mean PSNR {scores.mean():.2f} dB, lowest {scores.min():.2f}")
    return "\n".join(lines)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(REQUIRED, "folder of vae.safetensors, the log and the training state", path=True)
    steps: int = setting(3000, "optimizer steps", low=1, high=10_000_000)
    batch_size: int = setting(16, "images in a step", low=1, high=MAX_NETWORK_BATCH)
    learning_rate: float = setting(2e-3, "learning rate", low=0)
    kl_weight: float = setting(1e-4, "factor of the KL divergence in the loss", low=0)
    seed: int = setting(1, "seed of the weights and the batches", low=0, high=MAX_SEED)
    decoder_only: Optional[Path] = setting(
        None, "folder of a finished run, whose decoder is trained further", path=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    with claim_folder(args.output_path, "--output_path"), claim_file(args.output_path / WEIGHTS, "--output_path"):
        train_vae(args)


def train_vae(args: Settings) -> None:
    """Train, print the report, and write the weights."""
    setup_runtime("CPU", seed=args.seed)
    config = load_model_config(CONFIG)
    vae = AutoencoderKL(**config.vae)
    parameters = vae.parameters_dict()  # before the optimizer prefixes their names
    trainable = list(parameters.values())
    if args.decoder_only:
        load_parameters(parameters, args.decoder_only / WEIGHTS, PREFIX)
        trainable = [p for name, p in parameters.items() if name.startswith(("decoder.", "post_quant_conv."))]
    pixels = np.stack([p.pixels for style in ("emoji_noto", *STYLES) for p in read_images(style, "train")])
    side = config.image_size // config.vae_factor

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = draws(args.seed, "decoder" if args.decoder_only else "vae", step)
        chosen = pixels[rng.integers(0, len(pixels), args.batch_size)]
        varied = []
        for image in chosen:
            image = shift(image, rng, 3)
            image = image[:, ::-1] if rng.random() < 0.5 else image
            varied.append(vary_colours(image, rng) if rng.random() < 0.3 else image)
        eps = rng.standard_normal((args.batch_size, config.latent_channels, side, side), np.float32)
        return to_network(np.stack(varied)), eps

    loss = ReconstructionLoss(vae, config.latent_channels, args.kl_weight, args.decoder_only is not None)
    step = Step(loss, trainable, learning_rates(args.learning_rate, args.steps, 100), weight_decay=1e-4)
    settings = f"batch {args.batch_size}, KL {args.kl_weight}, seed {args.seed}, decoder only {bool(args.decoder_only)}"
    train(step, batch, args.steps, args.output_path, ("loss", "l1", "mse", "kl"), settings)

    vae.set_train(False)
    text = ""
    if not args.decoder_only:
        folded = fold_normalisation(vae, pixels[::3], config.latent_channels)
        mean, std = (values.astype(float).round(3).tolist() for values in folded)  # fp32 would print its rounding
        text = f"latents before folding: mean {mean}, std {std}\n"
    write_results(args.output_path / WEIGHTS, parameters, text + report(vae), PREFIX)


if __name__ == "__main__":
    run_script(main)
