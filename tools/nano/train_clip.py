"""Train the embedded model's small CLIP; its text tower becomes the text encoder, its image tower scores pictures.

    python -m tools.nano.train_clip --output_path output/nano/clip --steps 1500

Noto's pictures (both splits: the base knows its concepts) and the train splits of the two styles, with their captions;
the held-out style pictures are read to measure only. Every batch holds different concepts, each in a random style.
Pictures are moved and blurred, so that the image tower judges a small decoder's pictures as it does sharp ones;
captions lose their article at times ("cat" for "a cat"), since people leave it out. The temperature is fixed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.config.model import load_model_config
from ldm.data.draws import draws
from ldm.errors import run
from ldm.models.clip import FORMS, CLIPModel, ImageFeatures, TextFeatures
from ldm.runtime import setup_runtime
from ldm.tokenizer.tokenizer import Tokenizer
from ldm.weights.read import write_checkpoint
from tools.nano.loop import Step, learning_rates, train
from tools.nano.pictures import STYLES, blur, read_pictures, shift, to_network
from tools.nano.train_vae import CONFIG, in_batches


class ContrastiveLoss(nn.Cell):
    """Each picture picks its caption of the batch, and each caption its picture; returns (loss, share picked right)."""

    def __init__(self, clip: CLIPModel, batch_size: int):
        super().__init__(auto_prefix=False)
        self.clip = clip
        self.labels = Tensor(np.arange(batch_size, dtype=np.int32))
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, images: Tensor, tokens: Tensor):
        image, text = self.clip(images, tokens)
        scale = ops.exp(self.clip.logit_scale)
        by_image = self.product(image, text) * scale
        by_text = self.product(text, image) * scale
        loss = 0.5 * (ops.cross_entropy(by_image, self.labels) + ops.cross_entropy(by_text, self.labels))
        return loss, (by_text.argmax(1).astype(ms.int32) == self.labels).astype(ms.float32).mean()


def report(clip: CLIPModel, tokenizer: Tokenizer) -> str:
    """How often a caption's own picture is among the 5 nearest of its data set."""
    lines = []
    for style, splits in (("emoji_noto", ("train", "test")), *((s, ("test",)) for s in STYLES)):
        pictures = [p for split in splits for p in read_pictures(style, split)]
        images = in_batches(ImageFeatures(clip), to_network(np.stack([p.pixels for p in pictures])), 96)
        texts = in_batches(TextFeatures(clip), tokenizer.encode([p.text for p in pictures]), 96)
        scores = texts @ images.T
        rank = (scores > np.diag(scores)[:, None]).sum(axis=1)
        lines.append(f"{style} {'+'.join(splits)}: caption to picture, nearest {np.mean(rank == 0):.1%}, "
                     f"top 5 {np.mean(rank < 5):.1%} of {len(pictures)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, required=True, help="folder of clip.safetensors, log and state")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    setup_runtime("CPU", seed=args.seed)
    config = load_model_config(CONFIG)
    tokenizer = Tokenizer(config.pad_token)
    clip = CLIPModel(**FORMS["nano"])
    parameters = clip.parameters_dict()  # before an optimizer puts its own name before theirs

    concepts: dict[str, list] = {}
    for style, splits in (("emoji_noto", ("train", "test")), *((s, ("train",)) for s in STYLES)):
        for split in splits:
            for picture in read_pictures(style, split):
                # Noto three times: it is what the base draws.
                concepts.setdefault(picture.text, []).extend([picture] * (3 if style == "emoji_noto" else 1))
    captions = sorted(concepts)
    tokens = {text: tokenizer.encode([text, re.sub(r"^(a|an|the) ", "", text)]) for text in captions}

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = draws(args.seed, "clip", step)
        images, texts = [], []
        for i in rng.choice(len(captions), args.batch_size, replace=False):
            styles = concepts[captions[i]]
            picture = shift(styles[rng.integers(len(styles))].pixels, rng, 4)
            images.append(blur(picture, rng) if rng.random() < 0.5 else picture)
            texts.append(tokens[captions[i]][int(rng.random() < 0.25)])
        return to_network(np.stack(images)), np.stack(texts)

    trainable = [p for p in clip.trainable_params() if p is not clip.logit_scale]
    step = Step(ContrastiveLoss(clip, args.batch_size), trainable,
                learning_rates(args.learning_rate, args.steps, 100), weight_decay=0.01)
    settings = f"batch {args.batch_size}, seed {args.seed}"
    train(step, batch, args.steps, args.output_path, ("loss", "right"), settings, save_every=100)
    clip.set_train(False)
    text = report(clip, tokenizer)
    print(text)
    (args.output_path / "report.txt").write_text(text + "\n", encoding="utf-8")
    write_checkpoint(args.output_path / "clip.safetensors", {name: p.asnumpy() for name, p in parameters.items()})


if __name__ == "__main__":
    run(main)
