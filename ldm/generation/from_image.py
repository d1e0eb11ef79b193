"""From an image to the settings that make it again, from this project's text fields or from A1111's text.

`read_recipe` says what an image's texts hold, `settings_to_repeat` turns this into settings beside those that are
given, and `differences` says afterwards what is not as in the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.diffusion.sampling import CALL_PIXELS, default_batch_size
from ldm.errors import UserError, plain
from ldm.files.documents import json_text, parse_json
from ldm.files.inputs import content_hash, is_file, is_folder, is_there, list_folder
from ldm.files.paths import ROOT, path_and_strengths
from ldm.generation.a1111_settings import a1111_settings
from ldm.generation.a1111_text import loras_named, parse
from ldm.generation.image_text import read_image_text
from ldm.settings.declare import MAX_BATCH
from ldm.settings.generate import GenerateSettings
from ldm.settings.read import read_mapping
from ldm.settings.sampling import SAMPLER_FLAGS
from ldm.settings.values import settings_of
from ldm.settings.versions import VERSIONS

OWN = ("prompt", "seed", "settings", "checkpoint_sha256")  # the text fields by which this project's images are known
MAX_JSON = 100_000  # characters of a text field with JSON
MAX_LORAS = 100
UNKNOWN_SIDE = 512  # pixels of an image whose text names no size: SD 1.x's, with 768 the memory is in bounds too

_NEVER_FROM_FILES = (
    "prompt", "negative_prompt", "n_iter", "n_samples", "grid_x", "grid_y", "first_index", "full_batches", "mode",
    "ms_mode", "jit_level", "device_target", "enable_flash_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What an image says about how it was made.

    Attributes:
        path: The image.
        settings: Those of text_to_image.py that are taken over, by their names.
        fields: The text fields of an image of this project, {} of others.
        not_repeated: What cannot be repeated, each in a few words.
        model_hash: The first digits of the sha256 of an A1111 image's base model, "" where it is not named.
    """

    path: str
    settings: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    not_repeated: list[str] = field(default_factory=list)
    model_hash: str = ""


def read_recipe(path: str) -> Recipe:
    """Read what an image says about how it was made.

    Raises:
        UserError: The file cannot be read, or says nothing that is known.
    """
    texts = read_image_text(path, "from_image")
    where = f"from_image {plain(path)}"
    if all(name in texts for name in OWN):
        return _own_recipe(path, texts, where)
    if "parameters" in texts and not texts["parameters"].lstrip().startswith("{"):
        try:
            text = parse(texts["parameters"])
            settings, missing = a1111_settings(text, where)
            return Recipe(path, settings, {}, missing, text.values.get("Model hash", ""))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if texts.get("prompt", "").lstrip().startswith("{") or "workflow" in texts:
        raise UserError(
            f"{where} holds a graph of ComfyUI, which is not read: give its prompt and its settings as flags, or save "
            "the image in ComfyUI with A1111's text"
        )
    found = f"its texts are {plain(', '.join(texts), 100)}" if texts else "it has none (editors and web sites drop it)"
    raise UserError(f"{where} has no text that says how it was made, of this project or A1111: {found}")


def settings_to_repeat(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that make an image again, without those that are given, which win.

    Raises:
        UserError: A file of the image's model or LoRA is not found, and none is given; or its size could take all
            memory, and none is given.
    """
    values = dict(recipe.settings)
    _check_size(recipe, given)
    if "data_path" in given:
        values.pop("prompt", None)
    if "negative_data_path" in given:
        values.pop("negative_prompt", None)
    if any(name in given for name in ("sampler", *SAMPLER_FLAGS)):
        for name in ("sampler", "ddim_eta", "eta"):
            values.pop(name, None)
    if "batch_size" not in given and not _is_usual_batch({**values, **given}):
        for name in ("batch_size", "full_batches"):
            values.pop(name, None)
    values.update(_model_files(recipe, given))
    values.update(_loras(recipe, given))
    prompt = "" if "prompt" in given else values.get("prompt", "")
    if not recipe.fields and "lora_dir" not in given and (loras := loras_named(prompt)):
        raise UserError(
            f"from_image {plain(recipe.path)}: its prompt names the LoRAs {plain(' '.join(loras), 100)}: give the "
            "folder of their files as --lora_dir, or the prompt without them as --prompt"
        )
    for name, label in (("init_image", "source image"), ("mask_image", "mask")):
        if name in recipe.fields and name not in given:
            raise _missing(recipe, str(recipe.fields[name]), name, label)
    return {name: value for name, value in values.items() if name not in given or name == "lora_ckpt_path"}


def complete_from_image(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the image that the setting from_image names, without those that are given."""
    path = given.get("from_image")
    return {} if path is None else settings_to_repeat(read_recipe(path), given)


def differences(recipe: Recipe, settings: GenerateSettings, fields: Mapping[str, Any]) -> list[str]:
    """Return what is not as in the image, each in a few words.

    Args:
        recipe: From read_recipe.
        settings: Those of this run.
        fields: The text fields of this run's first image.
    """
    found = []
    if recipe.fields:
        before, now = _flat(recipe.fields), _flat(fields)
        for name in dict.fromkeys([*before, *now]):
            if name in ("prompt_template", "negative_prompt_template"):  # from which the prompt was drawn
                continue
            if before.get(name) != now.get(name):
                found.append(f"{name} {plain(now.get(name), 80)} (the image: {plain(before.get(name), 80)})")
                if name == "model_config_sha256" and name not in now:
                    found[-1] += f": its model YAML {plain(recipe.fields.get('model_config'), 80)} is given as --config"
                if name == "batch_size" and name in recipe.settings and settings.batch_size is None:
                    found[-1] += ", too many to be taken from an image: --batch_size takes them"
    else:
        for name, value in recipe.settings.items():
            if getattr(settings, name) != value:
                found.append(f"{name} {plain(getattr(settings, name), 80)} (the image: {plain(value, 80)})")
        base = str(fields.get("checkpoint_sha256", ""))
        if recipe.model_hash and not base.startswith(recipe.model_hash.lower()):
            found.append(f"base model {base[:10]} (the image: {plain(recipe.model_hash, 20)})")
    return found


# ---- images of this project ------------------------------------------------------------------------------------------


def _own_recipe(path: str, texts: Mapping[str, str], where: str) -> Recipe:
    fields: dict[str, Any] = {name: text for name, text in texts.items() if name != "parameters"}
    for name in ("settings", "lora", "textual_inversion"):
        if name in fields:
            if len(fields[name]) > MAX_JSON:
                raise UserError(f"{where}: its text {name} has more than {MAX_JSON:,} characters")
            fields[name] = parse_json(fields[name], f"{where}: its text {name}", lines=False)
    given = fields["settings"]
    if not isinstance(given, dict):
        raise UserError(f"{where}: its text settings is not a mapping")
    content: dict[str, Any] = {"prompt": fields["prompt"], "negative_prompt": fields.get("negative_prompt", "")}
    content["seed"] = _number(fields["seed"], where, "seed")
    content["first_index"] = _number(fields.get("index", "0"), where, "index")
    known = _repeatable()
    content.update({name: value for name, value in given.items() if name in known and name not in content})
    if "batch_size" in content:
        content["full_batches"] = True
    unknown = [name for name in given if name not in known and name != "prediction_type"]
    not_repeated = [f"{plain(name, 60)}, which is no setting" for name in unknown]
    if "init_latents" in fields:
        not_repeated.append(f"its starting latents, which came from the file {plain(fields['init_latents'], 60)}")
    settings = read_mapping(GenerateSettings, content, where, partial=True)
    return Recipe(path, settings, fields, not_repeated)


def _repeatable() -> set[str]:
    """Return the settings that a file may set: no path, no output, no number of images, no device."""
    return {
        name
        for name, setting in settings_of(GenerateSettings).items()
        if not setting.rules["path"] and setting.rules["resume"] is None and name not in _NEVER_FROM_FILES
    }


def _check_size(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Raise UserError if the image names a size of more pixels than a default call of the network may have.

    Its file may be anyone's, and too large a size takes all memory without a warning. What is given is taken.
    """
    values = {**recipe.settings, **given}
    width, height = (
        math.ceil((values.get(name) or UNKNOWN_SIDE) * (values.get("hires_scale") or 1.0)) for name in ("W", "H")
    )
    flags = [
        f"--{name} {recipe.settings[name]}"
        for name in ("W", "H", "hires_scale")
        if recipe.settings.get(name) is not None and name not in given
    ]
    if flags and width * height > CALL_PIXELS:
        raise UserError(
            f"from_image {plain(recipe.path)} asks for an image of about {width} x {height} pixels, and more than "
            f"{CALL_PIXELS:,} are not taken from an image, because they may need more memory than there is: add "
            f"{' '.join(flags)} to make it so, or smaller numbers"
        )


def _is_usual_batch(values: Mapping[str, Any]) -> bool:
    """Return whether a call of the network takes no more pixels than one with a default batch size may.

    An image could ask for a batch that takes all memory.
    """
    height, width = values.get("H"), values.get("W")
    scale = values.get("hires_scale") or 1.0
    if not height or not width:
        return False  # the model's own size, which is not known yet
    height, width = math.ceil(height * scale), math.ceil(width * scale)
    return values.get("batch_size", 1) <= default_batch_size(MAX_BATCH, height, width)


def _number(text: Any, where: str, name: str) -> int:
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise UserError(f"{where}: its {name} is {plain(text, 60)}, not a whole number")


def _model_files(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the base model's files, where they are not given."""
    fields = recipe.fields
    values: dict[str, Any] = {}
    if fields and not any(name in given for name in ("ckpt_path", "version")):
        version, name = str(fields.get("model")), str(fields.get("checkpoint"))
        if version in VERSIONS and Path(VERSIONS[version].checkpoint).name == name:
            values["version"] = version
        else:
            values["ckpt_path"] = _find([ROOT / "models", Path("models")], name, fields["checkpoint_sha256"], recipe)
            if values["ckpt_path"] is None:
                raise _missing(recipe, name, "ckpt_path", "base model")
        if "model_config_sha256" in fields and "config" not in given:
            raise _missing(recipe, str(fields.get("model_config")), "config", "model YAML")
    if fields.get("checkpoint_ema") == "True":
        values["ckpt_ema"] = True
    for part in ("unet", "vae"):
        if f"{part}_checkpoint" in fields and f"{part}_ckpt_path" not in given:
            raise _missing(recipe, str(fields[f"{part}_checkpoint"]), f"{part}_ckpt_path", part)
    if "textual_inversion" in fields and "ti_ckpt_path" not in given:
        names = ", ".join(entry["file"] for entry in _entries(recipe, "textual_inversion"))
        raise _missing(recipe, names, "ti_ckpt_path", "learned token")
    return values


def _loras(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the LoRAs of an image of this project.

    Files that are given without a strength and are those of the image, in any order, get the image's strengths. If one
    of them is another file, they are taken as they are given.
    """
    entries = []
    for entry in _entries(recipe, "lora"):
        if not entry.get("from_prompt"):
            entries.append(entry)
        elif "lora_dir" not in given:
            raise _missing(recipe, entry["file"], "lora_dir", "LoRA")
    if not entries:
        return {}
    paths: list[str] = []
    if given.get("lora_ckpt_path"):
        of_hash: dict[str, str] = {}
        for text in given["lora_ckpt_path"]:
            path, strengths = path_and_strengths(text, "lora_ckpt_path")
            if strengths:
                return {"lora_ckpt_path": given["lora_ckpt_path"]}
            of_hash[lora_sha256(Path(path))] = str(path)
        if set(of_hash) != {entry["sha256"] for entry in entries}:
            return {"lora_ckpt_path": given["lora_ckpt_path"]}
        paths = [of_hash[entry["sha256"]] for entry in entries]
    elif given.get("use_lora") is False:
        return {}
    else:
        folders = [Path(given["lora_dir"])] if given.get("lora_dir") else []
        for entry in entries:
            at = _find(folders, entry["file"], entry["sha256"], recipe)
            if at is None:
                raise _missing(recipe, entry["file"], "lora_ckpt_path", "LoRA")
            paths.append(at)
    values: dict[str, Any] = {"lora_ckpt_path": []}
    for found, entry in zip(paths, entries):
        numbers = [entry.get("weight", 1.0), entry.get("text_encoder_weight", entry.get("weight", 1.0))]
        if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
            raise UserError(f"from_image {plain(recipe.path)}: the strength of a LoRA is {plain(numbers, 60)}")
        values["lora_ckpt_path"].append(f"{found}:{numbers[0]!r}:{numbers[1]!r}")
    for name, key in (("lora_start", "start"), ("lora_end", "end"), ("lora_block_weights", "block_weights")):
        of_each = [entry.get(key) for entry in entries]
        if all(value is not None for value in of_each):
            values[name] = of_each
    for name in ("lora_ft_unet", "lora_ft_text_encoder"):
        values[name] = entries[0].get(name)
    checked = read_mapping(GenerateSettings, values, f"from_image {plain(recipe.path)}", partial=True)
    return {name: value for name, value in checked.items() if name == "lora_ckpt_path" or name not in given}


def lora_sha256(path: Path) -> str:
    """Return the SHA-256 of a LoRA, for a folder those of its files, as the text field `lora` holds it."""
    if not is_folder(path):
        return content_hash(path, "lora_ckpt_path")
    from ldm.lora.formats import lora_files  # imports MindSpore

    return " ".join(content_hash(file) for file in lora_files(path))


def _entries(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    entries = recipe.fields.get(name, [])
    texts = ("file", "sha256")
    if not isinstance(entries, list) or len(entries) > MAX_LORAS or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(text), str) for text in texts) for entry in entries
    ):  # fmt: skip
        raise UserError(f"from_image {plain(recipe.path)}: its text {name} is not a list of at most {MAX_LORAS} files")
    return entries


def _find(folders: Iterable[Path], name: str, sha256: str, recipe: Recipe) -> str | None:
    """Return the file of this name and this hash in the folders and the folders in them, or else of this name."""
    if name in ("", "..") or name != Path(name).name:
        raise UserError(f"from_image {plain(recipe.path)}: {plain(name, 60)} is not the name of a file")
    paths = []
    for folder in folders:
        if is_folder(folder):
            paths += [folder / name, *(folder / below / name for below in list_folder(folder))]
    paths = [path for path in paths if is_there(path)]
    same = [path for path in paths if is_file(path) and content_hash(path) == sha256]
    return str((same or paths)[0]) if paths else None


def _missing(recipe: Recipe, name: str, flag: str, label: str) -> UserError:
    return UserError(
        f"from_image {plain(recipe.path)} was made with the {label} {plain(name, 100)}: give its "
        f"{'folder' if flag == 'lora_dir' else 'path'} as --{flag}"
    )


def _flat(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return text fields with those of the settings and of the LoRAs beside them, each as a text."""
    flat: dict[str, str] = {}
    for name, value in fields.items():
        if name == "settings" and isinstance(value, dict):
            flat.update(_flat(value))
        elif name != "parameters":
            flat[name] = value if isinstance(value, str) else json_text(value)
    return flat
