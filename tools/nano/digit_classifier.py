"""A small network that names digits, the judge of examples/mnist.py. It is trained on real digits only."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ldm.data.draws import draws
from ldm.data.transforms import load_image
from tools.nano.loop import Step, learning_rates, load_parameters, train, write_results

SIZE = 32  # pixels
BATCH = 100
SHIFT = 2  # pixels at most, in both directions, of the images in training


class DigitClassifier(nn.Cell):
    """Three convolutions with stride 2 and a linear layer: images (N, 1, 32, 32) in [-1, 1] -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 16, 32, 64)
        layers: list[nn.Cell] = []
        for before, after in zip(channels, channels[1:]):
            layers += [nn.Conv2d(before, after, 3, stride=2, pad_mode="pad", padding=1, has_bias=True), nn.ReLU()]
        self.layers = nn.SequentialCell([*layers, nn.Flatten(), nn.Dense(channels[-1] * (SIZE // 8) ** 2, 10)])

    def construct(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ClassifierLoss(nn.Cell):
    """The cross-entropy of a classifier on images (N, 1, 32, 32) and digits (N,) int32, as a tuple of one."""

    def __init__(self, classifier: DigitClassifier) -> None:
        super().__init__(auto_prefix=False)
        self.classifier = classifier
        self.cross_entropy = nn.CrossEntropyLoss()

    def construct(self, images: Tensor, digits: Tensor) -> tuple[Tensor, ...]:
        return (self.cross_entropy(self.classifier(images), digits),)


def load_digits(paths: Sequence[Path]) -> np.ndarray:
    """Read image files as grey arrays (N, 1, 32, 32) in [-1, 1]."""
    return np.stack([load_image(path, SIZE, channels=1) for path in paths])


def train_classifier(images: np.ndarray, digits: np.ndarray, folder: Path, steps: int) -> DigitClassifier:
    """Train a classifier on images as they are and inverted, half each, or read it from `folder`.

    Args:
        images: (N, 1, 32, 32) in [-1, 1].
        digits: (N,).
        folder: The folder with a folder for each classifier: its weights, log and training state.
        steps: Steps of BATCH images.
    """
    np.random.seed(1)
    classifier = DigitClassifier()
    parameters = classifier.parameters_dict()  # before the optimizer prefixes their names
    content = hashlib.sha256(images.tobytes() + digits.tobytes()).hexdigest()[:16]
    folder = folder / f"{steps}_steps_{content}"  # another training or other digits make another classifier
    weights = folder / "classifier.safetensors"
    if weights.exists():
        load_parameters(parameters, weights)
        return classifier

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = draws(1, "classifier", step)
        rows = rng.integers(len(images), size=BATCH)
        shifts = rng.integers(-SHIFT, SHIFT + 1, size=(BATCH, 2))
        chosen = np.stack([np.roll(images[row], shift, (1, 2)) for row, shift in zip(rows, shifts)])
        polarity = np.where(rng.random(BATCH) < 0.5, -1.0, 1.0).astype(np.float32)
        return chosen * polarity[:, None, None, None], digits[rows].astype(np.int32)

    step = Step(ClassifierLoss(classifier), classifier.trainable_params(), learning_rates(3e-3, steps, 50), 0.01)
    train(step, batch, steps, folder, ("loss",))
    classifier.set_train(False)
    write_results(weights, parameters, f"a classifier of {len(images)} digits, {steps} steps of {BATCH}")
    return classifier


def named_right(classifier: DigitClassifier, images: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Return for each image (N, 1, 32, 32) in [-1, 1] whether the classifier names its digit, (N,) bool."""
    return classifier(ms.Tensor(images)).asnumpy().argmax(1) == digits
