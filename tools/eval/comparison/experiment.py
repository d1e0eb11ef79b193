"""What is compared: the recipe, the data and the model, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from ldm.data.batches import BatchOrder
from ldm.data.content import content_key
from ldm.data.dataset import Row, read_image_text_csv
from ldm.errors import UserError
from ldm.files.inputs import is_file, is_folder, is_there, list_folder
from ldm.files.outputs import claim_folder
from ldm.files.paths import under_root
from ldm.files.prompts import read_prompts
from ldm.settings.declare import MAX_SEED, REQUIRED, default_of, names_of, setting
from ldm.settings.model import ModelConfig, load_model_config
from ldm.settings.read import read_settings
from ldm.settings.train import TrainSettings
from ldm.settings.versions import default_guidance_scale
from ldm.training.plan import RunPlan, make_plan
from ldm.weights.architecture import config_with_tokens, detect_model_config
from ldm.weights.base_model import base_model_hash
from tools.grid import evenly

SIDES = ("ours", "diffusers")


@dataclass
class Settings:
    """The command line of compare_diffusers.py."""

    train_config: str = setting(REQUIRED, "recipe of the LoRA, as for train_text_to_image.py", path=True)
    base: str = setting(REQUIRED, "base checkpoint: a file or a diffusers folder", path=True)
    data: str = setting(
        REQUIRED,
        "folder with train/ and test/, with img_txt.csv and images in each; test/ may hold a prompts.txt alone (no FID "
        "then); an img_txt.csv beside them chooses the training rows",
        path=True,
    )
    output_path: str = setting(REQUIRED, "folder for the results; an interrupted run continues there", path=True)
    seeds: list[int] = setting([1, 2, 3], "a training for each", low=0, high=MAX_SEED)
    prompts: Optional[int] = setting(None, "number of held-out prompts, evenly spread; None for all", low=2)
    sampling_steps: int = setting(20, "steps of DPM-Solver++", low=1, high=1000)
    scale: Optional[float] = setting(
        None, "guidance, 1 for none; None: 9.0 (SD2.x), 7.5 (SD1.5), 4.0 (nano)", low=1, high=1000
    )
    latents_seed: int = setting(1, "seed of the starting latents", low=0, high=MAX_SEED)
    inception_path: Optional[str] = setting(
        None,
        "Inception weights for FID and KID; None for the image tower of the nano CLIP, whose scores compare only here",
        path=True,
    )
    clip_path: Optional[str] = setting(
        None, "CLIP folder or file for the CLIP score; None for the nano CLIP", path=True
    )
    reference_python: Optional[str] = setting(
        None,
        "interpreter with requirements-parity.txt; None: .venv-parity, which is made where it is missing",
        path=True,
    )


class Experiment:
    """The inputs of a comparison, and the places of its files in the output folder.

    Args:
        args: The command line of compare_diffusers.py.
        flags: Settings of train_text_to_image.py that follow on the command line.

    Raises UserError if the comparison is impossible, or a file or setting is wrong.
    """

    def __init__(self, args: Settings, flags: Sequence[str]):
        self.args, self.flags = args, list(flags)
        self.base, self.output = Path(args.base), Path(args.output_path)
        self.diffusers_base = self.output / "base" / "diffusers"
        self.held_out = self.output / "held_out"  # held-out prompts, their real images and the starting latents
        if not is_there(self.base, "--base"):
            raise UserError(f"--base {self.base} does not exist: give a Stable Diffusion checkpoint")
        self.data, settings = Path(args.data), self.settings(args.seeds[0])
        if settings.model_config is None:
            self.config = detect_model_config(self.base, way_out="add --model_config with its YAML")
        else:
            self.config = config_with_tokens(load_model_config(under_root(settings.model_config)), self.base)
        self.generate_flags = [] if settings.model_config is None else ["--config", self.config.path]
        self.generate_flags += ["--device_target", settings.device_target] if settings.device_target else []
        check_model(self.config)
        self.training_folder = training_folder(self.data)
        self.rows, self.prompts, self.real = read_data(self.data, settings, args.prompts)
        self.plan(settings)  # raises the error for too few rows
        self.image_size = settings.image_size or self.config.image_size
        self.scale = default_guidance_scale(self.config.architecture) if args.scale is None else args.scale
        self.batch_size = 16 if self.image_size <= 128 else 4
        if is_folder(self.output, "--output_path"):
            names = [name for name in list_folder(self.output, "--output_path") if not name.startswith(".")]
            if names and "compared.json" not in names:
                raise UserError(f"--output_path {self.output} holds something else: choose a new folder")
        with claim_folder(self.output, "--output_path"):  # raises the error early; main claims it for the whole run
            pass
        self.data_hash = content_key("rows", *(part for row in self.rows for part in (row.content, row.caption)))
        self.real_hash = content_key("real", *(row.content for row in self.real))
        self.base_hash = base_model_hash(self.base)

    def settings(self, seed: int) -> TrainSettings:
        """Return the settings of both trainings with a seed."""
        return read_recipe(self.args.train_config, self.flags, str(self.base), seed)

    def plan(self, settings: TrainSettings) -> RunPlan:
        """Return the length of both trainings."""
        order = BatchOrder(len(self.rows), settings.train_batch_size, settings.seed)
        return make_plan(settings, order.steps_per_epoch)

    def recipe(self, settings: TrainSettings) -> dict[str, Any]:
        """Return what decides the trained weights, apart from the base model and the data."""
        rules = {field.name: field.metadata for field in fields(settings)}
        names = [name for name, rule in rules.items() if rule["resume"] or rule["shared_with_diffusers"]]
        names.append("train_batch_size")  # a resumed run compares it times the processes, and here there is one
        return {
            **{name: getattr(settings, name) for name in names},
            **settings.resolved(),
            "steps": self.plan(settings).steps,
        }

    def start_lora(self, seed: int) -> Path:
        """Return the path of the LoRA that both trainings with a seed start from."""
        return self.output / f"seed{seed}" / "start" / "pytorch_lora_weights.safetensors"

    def images(self, folder: str) -> list[Path]:
        """Return the images in a folder below the output folder."""
        return sorted((self.output / folder).glob("*.png"))


def read_recipe(path: str, flags: Sequence[str], base: str, seed: int = 0) -> TrainSettings:
    """Read the settings of both trainings. Raises UserError for a setting that diffusers' LoRA training has not."""
    for flag in flags:
        name = flag[2:].partition("=")[0].replace("-", "_")
        if flag.startswith("--") and name in names_of(TrainSettings, set_by_comparison=True):
            way = "use --seeds" if name == "seed" else "both sides get the same from this script; leave it out"
            raise UserError(f"--{name} cannot be given here: {way}")
    fixed = ["--pretrained_model_path", base, "--seed", str(seed), "--precision", "fp32", "--loss_scaler_type", "none"]
    settings = read_settings(TrainSettings, ["--train_config", path, *flags, *fixed], yaml_flag="train_config")
    if not settings.use_lora:
        raise UserError(f"{path} trains the whole UNet: this script compares LoRAs, add --use_lora True")
    for field in fields(TrainSettings):
        reason = field.metadata["not_in_diffusers"]
        if reason and getattr(settings, field.name) != default_of(field):
            raise UserError(
                f"{field.name} is set, which cannot be compared: {reason}; add --{field.name} {field.default}"
            )
    return settings


def training_folder(data: Path) -> Path:
    """Return `data` if it has an img_txt.csv, which chooses the rows to train on, else its train/."""
    return data if is_file(data / "img_txt.csv", "--data") else data / "train"


def read_data(data: Path, settings: TrainSettings, count: int | None) -> tuple[list[Row], list[str], list[Row]]:
    """Return the rows to train on, the held-out prompts, and the rows with their real images.

    The last are empty if test/ has only a prompts.txt. `count` prompts are spread evenly over test/, or None for all.
    Raises UserError if the data cannot be read or cannot be compared.
    """

    def read(folder: Path) -> list[Row]:
        return read_image_text_csv(
            folder, image_column=settings.image_column or "dir", caption_column=settings.caption_column or "text"
        ).rows

    train_folder, test_folder = training_folder(data), data / "test"
    if not is_folder(train_folder, "--data") or not is_folder(test_folder, "--data"):
        raise UserError(
            f"--data {data} must hold the folders train and test, with img_txt.csv and images in each (test may hold "
            "only a prompts.txt): images that the training has seen do not show what was learned"
        )
    train = read(train_folder)
    prompts_file = test_folder / "prompts.txt"
    test: list[Row] = []
    if is_file(prompts_file, "--data") and not is_file(test_folder / "img_txt.csv", "--data"):
        prompts = read_prompts(prompts_file, "data_path")
    else:
        test = read(test_folder)
        prompts = [" ".join(row.caption.split()) for row in test]
        both = {row.path.resolve() for row in train} & {row.path.resolve() for row in test}
        if both:
            raise UserError(
                f"{train_folder / 'img_txt.csv'}: {len(both)} rows are held-out images of {test_folder} "
                f"({min(both).name}, ...): remove them from the training rows"
            )
    if "" in prompts:
        raise UserError(f"{test_folder}: held-out prompt {prompts.index('') + 1} is empty: write one or remove the row")
    if len(prompts) < 2:
        raise UserError(f"{test_folder} has one prompt: give 2 or more, one image has no distribution")
    chosen = evenly(len(prompts), count or len(prompts))
    return train, [prompts[i] for i in chosen], [test[i] for i in chosen] if test else []


def check_model(config: ModelConfig) -> None:
    """Raise UserError for a model that diffusers' classes cannot represent."""
    if config.in_pixel_space:
        raise UserError(
            f"{config.path} is a model in pixel space, and diffusers' pipeline needs a VAE: such a model cannot be "
            "compared"
        )
    if config.unet["channel_mult"][0] != 1:
        raise UserError(
            f"{config.path}: channel_mult must begin with 1, because diffusers' UNet begins with the width of its "
            "first level; such a model cannot be compared"
        )
    if config.vae["z_channels"] != config.vae["embed_dim"] or not config.vae.get("double_z", True):
        raise UserError(
            f"{config.path}: z_channels and embed_dim must be equal and double_z must be true, as in diffusers' "
            "autoencoder; such a model cannot be compared"
        )
