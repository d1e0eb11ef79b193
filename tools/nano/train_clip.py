r"""Train the nano model's CLIP. Its text tower becomes the text encoder, its image tower scores images.

    python -m tools.nano.train_clip --output_path output/nano/clip --steps 1500
    python -m tools.nano.train_clip --output_path output/nano/clip_image --image_tower_only output/nano/clip \
        --steps 2000 --batch_size 64

The data are both splits of Noto's images, whose concepts the base model knows, and the train splits of the two other
styles. Their held-out images are used for measuring only. A batch holds different concepts, each in a random style.
Images are shifted and blurred, so that the image tower scores a small decoder's images as it scores sharp ones. Some
captions are encoded without their article ("cat" for "a cat"), as people write them. The temperature is fixed.

--image_tower_only continues a finished run and leaves the text tower as it is, so that a UNet trained with it remains
valid. It teaches the image tower to recognise a concept in any style: a batch shows each concept in two styles, a
quarter of the second ones as line art. Both images and the caption are matched with each other. It also reads the
images of datasets/styles.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ldm.runtime.script import run_script, start_script

if __name__ == "__main__":
    start_script()

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor, nn, ops  # noqa: E402

from ldm.data.draws import draws  # noqa: E402
from ldm.files.outputs import claim_file, claim_folder  # noqa: E402
from ldm.models.clip import CLIP_MODELS, CLIPModel, ImageFeatures, TextFeatures  # noqa: E402
from ldm.runtime.device import setup_runtime  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, MAX_SEED, REQUIRED, setting  # noqa: E402
from ldm.settings.model import load_model_config  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402
from ldm.tokenizer.tokenizer import Tokenizer  # noqa: E402
from tools.nano.images import MORE_STYLES, STYLES, blur, line_art, read_images, shift, to_network, turn  # noqa: E402
from tools.nano.loop import Step, learning_rates, load_parameters, train, write_results  # noqa: E402
from tools.nano.measure import nearer_than_another  # noqa: E402
from tools.nano.train_vae import CONFIG, in_batches  # noqa: E402

WEIGHTS = "clip.safetensors"
LINE_ART = 0.25  # share of pairs whose second image becomes line art


class ContrastiveLoss(nn.Cell):
    """CLIP's contrastive loss between the images and captions of a batch.

    Returns (loss, share of captions that match their own image best).
    """

    def __init__(self, clip: CLIPModel, batch_size: int):
        super().__init__(auto_prefix=False)
        self.clip = clip
        self.labels = Tensor(np.arange(batch_size, dtype=np.int32))
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.clip(images, tokens)
        scale = ops.exp(self.clip.logit_scale)
        by_image = self.product(image, text) * scale
        by_text = self.product(text, image) * scale
        loss = 0.5 * (ops.cross_entropy(by_image, self.labels) + ops.cross_entropy(by_text, self.labels))
        return loss, (by_text.argmax(1).astype(ms.int32) == self.labels).astype(ms.float32).mean()


class StylesLoss(nn.Cell):
    """ContrastiveLoss between each two of images, the same concepts in another style, and frozen text features.

    construct takes images (2 N, 3, S, S), those of the second style last, and text features (N, D). It returns (loss,
    share of captions that match their own image of the second style best).
    """

    def __init__(self, clip: CLIPModel, batch_size: int):
        super().__init__(auto_prefix=False)
        self.clip = clip
        self.batch_size = batch_size
        self.scale = float(np.exp(clip.logit_scale.asnumpy()))
        self.labels = Tensor(np.arange(batch_size, dtype=np.int32))
        self.product = ops.MatMul(transpose_b=True)

    def match(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.cross_entropy(self.product(a, b) * self.scale, self.labels)

    def construct(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        features = self.clip.image_features(images)
        first, second = features[: self.batch_size], features[self.batch_size :]
        loss = (
            self.match(first, second)
            + self.match(second, first)
            + self.match(first, text)
            + self.match(text, first)
            + self.match(second, text)
            + self.match(text, second)
        ) / 6.0
        right = (self.product(text, second).argmax(1).astype(ms.int32) == self.labels).astype(ms.float32).mean()
        return loss, right


def two_styles(images: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two images of a concept in different styles, sometimes the second one as line art made from it."""
    first, second = rng.choice(len(images), 2, replace=len(images) == 1)
    pixels = images[second]
    return images[first], line_art(pixels, rng) if first == second or rng.random() < LINE_ART else pixels


def report(clip: CLIPModel, tokenizer: Tokenizer) -> str:
    """Return how often a caption's own image is among the 5 nearest of its data set, as text."""
    lines = []
    for style, splits in (("emoji_noto", ("train", "test")), *((s, ("test",)) for s in STYLES)):
        images = [image for split in splits for image in read_images(style, split)]
        pixels, captions = [image.pixels for image in images], [image.caption for image in images]
        image_features = in_batches(ImageFeatures(clip), to_network(np.stack(pixels)), 96)
        text_features = in_batches(TextFeatures(clip), tokenizer.encode(captions), 96)
        scores = text_features @ image_features.T
        rank = (scores > np.diag(scores)[:, None]).sum(axis=1)
        lines.append(
            f"{style} {'+'.join(splits)}: caption to image, nearest {np.mean(rank == 0):.1%}, "
            f"top 5 {np.mean(rank < 5):.1%} of {len(images)}"
        )
        if style == "emoji_noto":
            noto = {image.name: feature for image, feature in zip(images, image_features)}
        else:
            nearer = nearer_than_another(np.stack([noto[image.name] for image in images]), image_features)
            lines.append(f"{style} test: Noto's image of the concept is nearer than another {nearer:.1%}")
    return "\n".join(lines)


@dataclass
class Settings:
    """The command line."""

    output_path: Path = setting(REQUIRED, "folder of clip.safetensors, the log and the training state", path=True)
    steps: int = setting(1500, "optimizer steps", low=1, high=10_000_000)
    batch_size: int = setting(96, "images in a step", low=1, high=MAX_NETWORK_BATCH)
    learning_rate: float = setting(1e-3, "learning rate", low=0)
    seed: int = setting(1, "seed of the weights and the batches", low=0, high=MAX_SEED)
    image_tower_only: Optional[Path] = setting(
        None, "folder of a finished run, whose image tower is trained further", path=True
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    with claim_folder(args.output_path, "--output_path"), claim_file(args.output_path / WEIGHTS, "--output_path"):
        train_clip(args)


def train_clip(args: Settings) -> None:
    """Train, print the report, and write the weights."""
    setup_runtime("CPU", seed=args.seed)
    config = load_model_config(CONFIG)
    tokenizer = Tokenizer(config.pad_token)
    clip = CLIPModel(**CLIP_MODELS["nano"])
    parameters = clip.parameters_dict()  # before the optimizer prefixes their names

    noto = [*read_images("emoji_noto", "train"), *read_images("emoji_noto", "test")]
    others = [image for style in STYLES for image in read_images(style, "train")]
    if args.image_tower_only:
        others += [image for style in MORE_STYLES for image in read_images(style)]
    concepts: dict[str, list[np.ndarray]] = {image.caption: [] for image in noto}
    for image in [*noto, *others]:
        concepts[image.caption].append(image.pixels)
    captions = sorted(concepts)
    tokens = {caption: tokenizer.encode([caption, re.sub(r"^(a|an|the) ", "", caption)]) for caption in captions}

    def image_and_tokens(rng: np.random.Generator, caption: str) -> tuple[np.ndarray, np.ndarray]:
        images = concepts[caption]
        # Noto's image, the first, counts three times, because the base model generates its style.
        image = shift(images[max(0, rng.integers(-2, len(images)))], rng, 4)
        return blur(image, rng) if rng.random() < 0.5 else image, tokens[caption][int(rng.random() < 0.25)]

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = draws(args.seed, "clip", step)
        chosen = rng.choice(len(captions), args.batch_size, replace=False)
        images, texts = zip(*(image_and_tokens(rng, captions[i]) for i in chosen))
        return to_network(np.stack(images)), np.stack(texts)

    def batch_of_styles(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = draws(args.seed, "styles", step)
        chosen = rng.choice(len(captions), args.batch_size, replace=False)
        pairs = [two_styles(concepts[captions[i]], rng) for i in chosen]
        varied = [turn(shift(image, rng, 4), rng) for side in zip(*pairs) for image in side]
        return to_network(np.stack([blur(image, rng) if rng.random() < 0.5 else image for image in varied])), (
            text_features[chosen]
        )

    if args.image_tower_only:
        load_parameters(parameters, args.image_tower_only / WEIGHTS)
        text_features = in_batches(TextFeatures(clip), np.stack([tokens[caption][0] for caption in captions]), 96)
        loss, batch = StylesLoss(clip, args.batch_size), batch_of_styles
        trainable = [p for name, p in parameters.items() if name.startswith(("vision_model.", "visual_projection."))]
    else:
        loss = ContrastiveLoss(clip, args.batch_size)
        trainable = [p for p in clip.trainable_params() if p is not clip.logit_scale]
    step = Step(loss, trainable, learning_rates(args.learning_rate, args.steps, 100), weight_decay=0.01)
    settings = f"batch {args.batch_size}, seed {args.seed}"
    if args.image_tower_only:
        settings += f", image tower of {args.image_tower_only}, {len(others)} images of other styles"
    train(step, batch, args.steps, args.output_path, ("loss", "right"), settings, save_every=100)
    clip.set_train(False)
    write_results(args.output_path / WEIGHTS, parameters, report(clip, tokenizer))


if __name__ == "__main__":
    run_script(main)
