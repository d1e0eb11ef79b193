"""Compare what a LoRA's file says of its training (ldm.training.passport) with base model, data, settings and code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.data.preparation import prepare_data, read_listing
from ldm.errors import UserError, plain
from ldm.files.documents import parse_json
from ldm.files.paths import ROOT, under_root
from ldm.lora.formats import read_lora, write_lora
from ldm.lora.formats.modules import KNOWN
from ldm.lora.lora import LoRA
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.train import TrainSettings
from ldm.training.checks import read_model_config
from ldm.training.passport import PREFIX, VERSION, base_digests, code_digest, library_versions, settings_digests
from ldm.training.repeat import find_state, repeat_steps
from ldm.weights.arrays import BFLOAT16
from ldm.weights.checkpoint import open_checkpoint
from ldm.weights.hashes import MODEL_HASH, data_hash

MATCH, MISMATCH, NOT_CHECKED = "match", "MISMATCH", "not checked"
MOST_NAMED = 8  # settings that are named
_DTYPES = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16", BFLOAT16: "bf16"}


class Finding(NamedTuple):
    """One line of a verification."""

    what: str
    result: str  # MATCH, MISMATCH or NOT_CHECKED
    text: str


def read_passport(path: Path) -> dict[str, str]:
    """Return the metadata of a LoRA's file. Raises UserError if it says nothing of its training's inputs."""
    metadata = open_checkpoint(path).metadata
    version = metadata.get(f"{PREFIX}version")
    if version is None:
        raise UserError(
            f"{plain(path)} says nothing of what it was trained from: it is of another project, an earlier version, or "
            "was trained with no_metadata"
        )
    if version != VERSION:
        raise UserError(f"{plain(path)} has a passport of version {plain(version, 20)}, this version reads {VERSION}")
    return dict(metadata)


def verify(
    path: Path, metadata: Mapping[str, str], data: str | None, base: str | None, settings: TrainSettings | None
) -> list[Finding]:
    """Compare a file with what is there.

    Args:
        path: The LoRA.
        metadata: What read_passport returned.
        data: The data set, None if it is not given.
        base: The base model, None if it is not given.
        settings: Those of the training, None if they are not given.

    Raises:
        UserError: Something cannot be read.
    """
    return [
        _verify_file(path, metadata),
        *_verify_base(metadata, base, settings),
        _verify_data(metadata, data, base, settings),
        _verify_settings(metadata, settings),
        _verify_code(path, metadata),
        _verify_libraries(path, metadata),
    ]


def _verify_file(path: Path, metadata: Mapping[str, str]) -> Finding:
    if MODEL_HASH not in metadata:
        return Finding("file", NOT_CHECKED, f"it holds no {MODEL_HASH}")
    if data_hash(path) == metadata[MODEL_HASH]:
        return Finding("file", MATCH, "the weights are those that were written")
    return Finding("file", MISMATCH, "the weights are not those that were written: it was damaged or changed")


def _verify_base(metadata: Mapping[str, str], base: str | None, settings: TrainSettings | None) -> list[Finding]:
    has_vae = f"{PREFIX}vae" in metadata
    if base is None:
        return [Finding("base", NOT_CHECKED, "give --base")]
    vae = None if settings is None else settings.vae_ckpt_path
    digests = base_digests(TrainSettings(pretrained_model_path=base, vae_ckpt_path=vae))
    findings = [_compared("base", metadata, digests["base"], plain(base))]
    if has_vae and "vae" not in digests:
        findings.append(Finding("vae", NOT_CHECKED, "give --train_config with vae_ckpt_path"))
    elif has_vae or "vae" in digests:
        findings.append(_compared("vae", metadata, digests.get("vae"), plain(str(vae))))
    return findings


def _verify_data(
    metadata: Mapping[str, str], data: str | None, base: str | None, settings: TrainSettings | None
) -> Finding:
    if f"{PREFIX}data" not in metadata:
        return Finding("data", NOT_CHECKED, "the training did not read all images before its first step")
    if data is None:
        return Finding("data", NOT_CHECKED, "give --data")
    given = replace(settings or TrainSettings(), data_path=data, check_images=True)
    config = _model_config(metadata, base, given)
    if config is None:
        return Finding("data", NOT_CHECKED, "the model's image size is not known: give --base or --train_config too")
    trained, _ = prepare_data(read_listing(given), given, config)
    text = f"{plain(data)}, {len(trained):,} images with captions"
    finding = _compared("data", metadata, trained.content_digest(), text)
    if finding.result == MISMATCH and settings is None:
        hint = "without --train_config, settings that choose images and captions are at their defaults"
        return finding._replace(text=f"{text}; {hint}")
    return finding


def _model_config(metadata: Mapping[str, str], base: str | None, settings: TrainSettings) -> ModelConfig | None:
    """Return the configuration of the base model, None if it is not known. Only sizes of images depend on it."""
    if settings.model_config is not None:
        return load_model_config(under_root(settings.model_config))
    if base is not None:
        return read_model_config(replace(settings, pretrained_model_path=base))
    configs = (load_model_config(ROOT / path) for path in KNOWN)
    return next((config for config in configs if config.architecture == metadata.get("architecture")), None)


def _verify_settings(metadata: Mapping[str, str], settings: TrainSettings | None) -> Finding:
    if settings is None:
        return Finding("settings", NOT_CHECKED, "give --train_config, such as train_args.yaml in the run's output_path")
    saved, current = _dictionary(metadata, "settings"), settings_digests(settings)
    both = saved.keys() & current.keys()
    differing = sorted(name for name in both if saved[name] != current[name])
    others = len(saved.keys() ^ current.keys())
    more = f"; {others} that only one version has are not compared" if others else ""
    if not differing:
        return Finding("settings", MATCH, f"all {len(both)} that decide the weights{more}")
    named = ", ".join(differing[:MOST_NAMED]) + (", ..." if len(differing) > MOST_NAMED else "")
    return Finding("settings", MISMATCH, f"{len(differing)} of {len(both)} differ: {named}{more}")


def _verify_code(path: Path, metadata: Mapping[str, str]) -> Finding:
    saved, current = _dictionary(metadata, "code"), code_digest()
    names = [plain(found.get("commit", found.get("version", "an unknown version"))[:12]) for found in (saved, current)]
    if saved.get("sources") == current["sources"]:
        return Finding("code", MATCH, names[1])
    return Finding("code", MISMATCH, f"it was trained by {names[0]}, this is {names[1]} with other sources")


def _verify_libraries(path: Path, metadata: Mapping[str, str]) -> Finding:
    saved, current = _dictionary(metadata, "libraries"), library_versions()
    differing = [
        f"{plain(name, 20)} was {plain(saved.get(name, 'unknown'), 20)}, is {current.get(name, 'unknown')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differing:
        return Finding("libraries", MISMATCH, "; ".join(differing))
    return Finding("libraries", MATCH, ", ".join(f"{name} {version}" for name, version in current.items()))


def _compared(what: str, metadata: Mapping[str, str], digest: str | None, text: str) -> Finding:
    return Finding(what, MATCH if metadata.get(f"{PREFIX}{what}") == digest else MISMATCH, text)


def _dictionary(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """Return an entry that is a dictionary of texts. Raises UserError if it is not."""
    where = f"the file's {PREFIX}{name}"
    content = parse_json(metadata.get(f"{PREFIX}{name}", "{}"), where)
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise UserError(f"{where} is no dictionary of texts: the file is damaged")
    return content


def verify_by_repeating(
    path: Path, metadata: Mapping[str, str], settings: TrainSettings, state: str, steps: int
) -> Finding:
    """Repeat the last steps of the training and compare the factors with the file's, bit for bit.

    Args:
        path: The LoRA.
        metadata: What read_passport returned.
        settings: Those of the training, with its data and base model.
        state: A training state of it, or the folder of its training states.
        steps: Number of steps to repeat. More are repeated if no state of that step is kept.

    Raises:
        UserError: There is no such state, it belongs to another run, or the training fails.
    """
    text = metadata.get("ss_steps", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 13):
        raise UserError(f"{plain(path)} does not say its step (ss_steps {plain(repr(text), 30)})")
    step = int(text)
    place, start = find_state(Path(state), step, steps)
    lora, config = repeat_steps(settings, place, step)
    repeated = f"steps {start + 1} to {step}, from {plain(place.name)}"
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        again = Path(folder) / "again.safetensors"
        write_lora(again, lora, "kohya", config, _dtype(path))
        if data_hash(again) == data_hash(path):
            return Finding("repeat", MATCH, f"{repeated}: the factors are the same, bit for bit")
        difference = _difference(read_lora(path, config), read_lora(again, config))
    return Finding("repeat", MISMATCH, f"{repeated}: {difference}")


def _dtype(path: str | os.PathLike) -> str:
    """Return the type of a file's factors, one of ldm.lora.formats.DTYPES."""
    checkpoint = open_checkpoint(path)
    factors = {checkpoint.spec(key)[0] for key in checkpoint if checkpoint.shape(key)}
    return _DTYPES.get(factors.pop(), "fp32") if len(factors) == 1 else "fp32"


def _difference(lora: LoRA, other: LoRA) -> str:
    """Say in a few words how the layers and learned tokens of two LoRAs differ."""
    ours, theirs = _arrays_by_name(lora), _arrays_by_name(other)
    if ours.keys() != theirs.keys():
        return "its layers are others"
    largest, differing = 0.0, 0
    for name, arrays in ours.items():
        others = theirs[name]
        if {part: array.shape for part, array in arrays.items()} != {
            part: array.shape for part, array in others.items()
        }:
            return f"the rank or the kind of {plain(name)} is another"
        differences = [float(np.abs(array - others[part]).max(initial=0.0)) for part, array in arrays.items()]
        differing += any(differences)
        largest = max(largest, *differences)
    return f"{differing} of {len(ours)} layers and tokens differ, by {largest:.3g} at most"


def _arrays_by_name(lora: LoRA) -> dict[str, dict[str, np.ndarray]]:
    """Return layer or learned token -> part -> array."""
    arrays = {name.removesuffix(".weight"): update.arrays() for name, update in lora.updates().items()}
    return {**arrays, **{name: {"vectors": vectors} for name, vectors in lora.embeddings.items()}}
