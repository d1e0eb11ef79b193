"""A recipe of another project on its way to this one's settings, and the rules that its tables are made of.

A `Recipe` begins with all values of another project. Each is taken out as it becomes a setting here, or is named with
the reason why it does not. What is left at the end is named as unknown, so that nothing is dropped in silence.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, NamedTuple

from ldm.errors import UserError, plain
from ldm.settings.optimizer import LEAST_PRODIGY_RATE
from ldm.settings.train import TrainSettings
from ldm.settings.values import Setting, accept, convert, from_word, kinds_of, list_item, settings_of

# The lists that a value may end in which is no setting here, or one with a difference.
ANOTHER_MEANING = "another meaning"
NO_COUNTERPART = "no counterpart"
NOT_IN_VERSION = "not in this version"
NOT_NEEDED = "not needed here"
OFF = "off or empty"  # asks for nothing
LISTS = (ANOTHER_MEANING, NO_COUNTERPART, NOT_IN_VERSION, NOT_NEEDED, OFF)

EMPTY_WORDS = ("", "none", "null")
_ZERO_WORDS = ("0", "0.0", "false", "no", "off")
_SECRETS = re.compile(r"(api_key|huggingface_token|hub_token|^secrets\b.*|^cloud\b.*|password)$")
KEEPS_ALL = 100_000  # checkpoints, for projects that remove none
MAX_SETTINGS = 10_000
LONGEST_VALUE = 100  # characters of a value in a list

# The layers of Stable Diffusion under the last parts of their names here (ldm.lora.spec).
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
UNET_PROJECTIONS = ("proj_in", "proj_out")
UNET_RESIDUAL = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op", "conv")
UNET_OTHERS = ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2")
# The widths of the two that are narrower than usual ranks, which are refused there (but for LoKr).
NARROW = {"input_blocks.0.0": 36, "out.2": 4}
UNET_TRANSFORMER = (*UNET_ATTENTION, *UNET_FEED_FORWARD, *UNET_PROJECTIONS)
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_ENCODER = (*TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")


class Rule(NamedTuple):
    """How one setting of another project becomes one of this project.

    Attributes:
        theirs, ours: The two names.
        change: Makes the value here of the value there, None if it stays. Raises UserError for what it cannot change.
        note: What differs. With a note, the setting is listed under "another meaning".
    """

    theirs: str
    ours: str
    change: Callable[[Any], Any] | None = None
    note: str = ""


class Written(NamedTuple):
    """A setting to write.

    Attributes:
        value: Its value here.
        theirs: The other project's name, "" for a default.
        note: What the YAML says about it.
        given: The value there, where the note begins with it.
    """

    value: Any
    theirs: str = ""
    note: str = ""
    given: Any = None

    @property
    def comment(self) -> str:
        """The note, with the name and the value there in front."""
        if not (self.note and self.theirs and self.given is not None):
            return self.note
        return f"{self.theirs} {shown(self.theirs, self.given)}: {self.note}"


class Named(NamedTuple):
    """A value of the other project that is named in one of LISTS."""

    list: str
    theirs: str
    value: Any
    reason: str


def same(names: str) -> tuple[Rule, ...]:
    """Return the rules of settings with the same name and meaning, from names with spaces between them."""
    return tuple(Rule(name, name) for name in names.split())


def is_empty(value: Any) -> bool:
    """Whether a value stands for a setting that is left out."""
    if isinstance(value, str):
        return value.strip().lower() in EMPTY_WORDS
    return value is None or value == [] or value == {}


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: empty, zero or False."""
    if isinstance(value, str):
        return value.strip().lower() in (*EMPTY_WORDS, *_ZERO_WORDS)
    return is_empty(value) or (isinstance(value, (bool, int, float)) and not value)


def is_true(value: Any) -> bool:
    """Whether a switch is on, given as a truth value, a number or a word."""
    return not is_off(value)


def as_number(value: Any, what: str) -> float:
    """Return a value as a number. Raises UserError, which begins with `what`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise UserError(f"{what}: {shown(what, value)} is not a number")
    return float(from_word(str(value).strip(), float, what))


def rounded(number: float) -> float:
    """Return a product without the last digits of a float, such as 3e-05 for 2.9999999999999997e-05."""
    return float(f"{number:.9g}")


def whole(number: float) -> float | int:
    """Return a number as an int where it is whole, so that the YAML reads 500 and not 500.0."""
    return int(number) if number.is_integer() else number


def shown(name: str, value: Any) -> str:
    """Return a value for a list, without secrets and control characters."""
    return "(not shown)" if _SECRETS.search(name) and not is_empty(value) else plain(value, LONGEST_VALUE)


def typed(value: Any, setting: Setting, where: str) -> Any:
    """Return a value of another project as the type of a setting here. Numbers and switches may be texts there."""
    hint, kinds = setting.hint, kinds_of(setting.hint)
    item = list_item(hint)
    if isinstance(value, str) and str not in kinds:
        if item is not None:
            return [typed_item(word, item, where) for word in value.split()]
        return from_word(value.strip(), hint, where)
    if item is not None and isinstance(value, (list, tuple)):
        return [typed_item(entry, item, where) for entry in value]
    if kinds[0] is bool and type(value) is int and value in (0, 1):
        return bool(value)
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool) and float not in kinds:
        value = str(value)
    return convert(value, hint, where)


def typed_item(value: Any, hint: Any, where: str) -> Any:
    """Return one entry of a list as the type that is wanted."""
    return from_word(value, hint, where) if isinstance(value, str) else convert(value, hint, where)


class Recipe:
    """The values of another project's recipe, and what has become of them.

    Attributes:
        project: The other project, for comments.
        left: Its names -> values, of those that nothing has been done with yet.
        given: All names that the recipe gives.
        values: All names -> values, as they were.
        settings: This project's names -> what is written.
        named: What is named in one of LISTS, in order.
        complete: Whether what the recipe leaves out has the other project's default.
    """

    def __init__(self, project: str, values: Mapping[str, Any], complete: bool = True):
        if len(values) > MAX_SETTINGS:
            raise UserError(f"it has {len(values):,} settings, at most {MAX_SETTINGS:,} are read: is it a recipe?")
        self.project = project
        self.left = dict(values)
        self.given = set(values)
        self.values = dict(values)
        self.settings: dict[str, Written] = {}
        self.named: list[Named] = []
        self.complete = complete
        self.known = {
            alias: setting
            for key, setting in settings_of(TrainSettings).items()
            for alias in (key, *setting.rules["aliases"])
        }

    def take(self, name: str, default: Any = None) -> Any:
        """Return a value and remove it from what is left. One that is left out or empty is the default."""
        if name not in self.left:
            return default
        value = self.left.pop(name)
        if is_empty(value):
            self.name(OFF, name, value)
            return default
        return value

    def is_on(self, name: str) -> bool:
        """Return whether a switch is on, without taking it."""
        return is_true(self.left.get(name))

    def name(self, list: str, theirs: str, value: Any, reason: str = "") -> None:
        """Name a value in one of LISTS. A default that the recipe does not give needs no name where it does nothing."""
        if list not in (OFF, NOT_NEEDED) or self.gives(theirs):
            self.named.append(Named(list, theirs, value, reason))

    def gives(self, theirs: str) -> bool:
        """Return whether the recipe gives a setting, or one of several with spaces or commas between them."""
        return not self.given.isdisjoint(re.split("[ ,]+", theirs))

    def add(self, name: str, value: Any) -> None:
        """Add a setting that the recipe gives as a part of another one."""
        self.left[name] = self.values[name] = value
        self.given.add(name)

    def write(self, ours: str, value: Any, theirs: str, given: Any = None, note: str = "") -> bool:
        """Make a value a setting here, or name it where this version has no such setting or does not allow the value.

        Args:
            ours: The setting here. An alias stands for it.
            value: Its value here.
            theirs: The other project's name.
            given: The value there, where it is another one.
            note: What differs, which is named.

        Returns:
            Whether it is written.
        """
        given = value if given is None else given
        if ours not in self.known:
            self.name(NOT_IN_VERSION, theirs, given, note or f"this version has no {ours}")
            return False
        setting = self.known[ours]
        try:
            value = typed(value, setting, ours)
            accept(value, setting, ours)
        except UserError as error:
            if is_off(given):
                self.name(OFF, theirs, given)
            else:
                self.name(NO_COUNTERPART, theirs, given, f"refused here: {error}")
            return False
        if setting.name in self.settings and self.settings[setting.name].theirs:
            self.name(NO_COUNTERPART, theirs, given, f"{self.settings[setting.name].theirs} gives {setting.name} here")
            return False
        if not self.gives(theirs):
            self.default(ours, value)
            return True
        self.settings[setting.name] = Written(value, theirs, note, given)
        if note:
            self.name(ANOTHER_MEANING, theirs, given, note)
        return True

    def default(self, ours: str, value: Any, note: str = "") -> None:
        """Write the other project's default of a setting, where the recipe leaves it out and it differs from ours."""
        setting = self.known.get(ours)
        if setting is None or not self.complete or setting.name in self.settings or value == setting.default:
            return
        self.settings[setting.name] = Written(value, "", note or f"left out there: the default of {self.project}")

    def take_rules(self, rules: Iterable[Rule]) -> None:
        """Take what a table of rules says."""
        for rule in rules:
            given = self.take(rule.theirs)
            if given is None:
                continue
            try:
                value = given if rule.change is None else rule.change(given)
            except UserError as error:
                self.name(NO_COUNTERPART, rule.theirs, given, f"refused here: {error}")
                continue
            # A value that is the default here too, such as no dropout, means the same.
            default = self.known[rule.ours].default if rule.ours in self.known else None
            means_same = str(value) == str(default) or (is_off(value) and is_off(default))
            self.write(rule.ours, value, rule.theirs, given, "" if means_same else rule.note)

    def take_named(self, list: str, reasons: Mapping[str, str], off: Mapping[str, Sequence[Any]] | None = None) -> None:
        """Name what a table of reasons -> names (with spaces between them, `*` allowed) says.

        `off` has the values, beside zero, False and empty ones, by which a name asks for nothing.
        """
        for reason, names in reasons.items():
            for pattern in names.split():
                for name in [name for name in self.left if fnmatch.fnmatchcase(name, pattern)]:
                    value = self.left.pop(name)
                    if is_off(value) or str(value) in map(str, (off or {}).get(name, ())):
                        self.name(OFF, name, value)
                    else:
                        self.name(list, name, value, reason)

    def finish(self) -> Recipe:
        """Name everything that has no name yet, and return the recipe."""
        for name, value in self.left.items():
            if is_off(value):
                self.name(OFF, name, value)
            else:
                self.name(NO_COUNTERPART, name, value, "this tool does not know it")
        self.left = {}
        told = {name for entry in (*self.settings.values(), *self.named) for name in re.split("[ ,]+", entry.theirs)}
        told |= {name.partition(".")[0] for name in told if name.startswith("network_args.")}
        told |= {entry.theirs for entry in self.named}  # a name may have spaces
        for name, value in self.values.items():
            if name not in told:
                self.name(OFF if is_off(value) else NOT_NEEDED, name, value, "other settings say so, or it is usual")
        return self


def square(value: Any) -> int:
    """Return the side of a resolution such as 512, "512" or "512,512". Raises UserError for a rectangle."""
    words = [str(word) for word in value] if isinstance(value, (list, tuple)) else re.findall(r"[^\s,x()]+", str(value))
    sides = {as_number(word, "resolution") for word in words}
    if len(sides) != 1 or len(words) > 2:
        raise UserError(
            "one side of a square is taken: for a rectangle give resolution = [width, height] in a dataset_config "
            "(docs/data.md)"
        )
    return int(sides.pop())


def write_schedule(recipe: Recipe, theirs: str, warmup: str, rate: float) -> None:
    """Write a learning rate schedule of diffusers.optimization, which sd-scripts uses too.

    Its decay ends at 0, the polynomial one at 1e-7, and its `constant` ignores the warm-up.

    Args:
        recipe: The recipe.
        theirs, warmup: The names of the schedule and of the steps of warm-up there.
        rate: The learning rate after the warm-up.
    """
    ends = {"constant": None, "constant_with_warmup": None, "linear": 0.0, "cosine": 0.0, "cosine_with_restarts": 0.0,
            "polynomial": 1e-7}  # fmt: skip
    given = recipe.take(theirs, "constant")
    name = str(given)
    if name == "cosine_with_min_lr":
        share = as_number(recipe.take("lr_scheduler_min_lr_ratio", 0), "lr_scheduler_min_lr_ratio")
        recipe.write("scheduler", "cosine", theirs, given, f"a cosine that ends at {share:g} of the rate")
        recipe.write("end_learning_rate", rounded(rate * share), "lr_scheduler_min_lr_ratio", share)
    elif name not in ends:
        recipe.name(NO_COUNTERPART, theirs, given, "a constant rate is used instead")
    else:
        recipe.write("scheduler", {"constant_with_warmup": "constant"}.get(name, name), theirs, given)
        if ends[name] is not None and rate > ends[name]:
            recipe.default("end_learning_rate", ends[name], f"the {name} of {recipe.project} ends there")
    steps = recipe.take(warmup)
    if name == "constant":
        if steps is not None:
            reason = f"the constant rate of {recipe.project} ignores the warm-up, so there is none here"
            recipe.name(OFF if is_off(steps) else NOT_NEEDED, warmup, steps, reason)
    elif steps is not None:
        recipe.write("warmup_steps", steps, warmup)


def write_base_model(recipe: Recipe, theirs: str) -> None:
    """Write the base model, which is a path here and may be a name on the Hugging Face Hub there."""
    given = recipe.take(theirs)
    if given is None:
        return
    may_be_name = isinstance(given, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not os.path.exists(given)
    note = (
        "a path here: if it is a name on the Hugging Face Hub, download it and give the folder" if may_be_name else ""
    )
    recipe.write("pretrained_model_path", given, theirs, note=note)


def fit_layers(recipe: Recipe) -> None:
    """Leave out, and name, the layers that are narrower than the rank, which a training here refuses."""
    values = {name: entry.value for name, entry in recipe.settings.items()}
    targets, algo = values.get("lora_targets", []), values.get("algo")
    rank = values.get("conv_dim") or values.get("lora_rank") or recipe.known["lora_rank"].default
    narrow = [name for name in targets if NARROW.get(name, rank) < rank]
    if not narrow or algo == "lokr":
        return
    entry = recipe.settings["lora_targets"]
    recipe.settings["lora_targets"] = entry._replace(value=[name for name in targets if name not in narrow])
    widths = " and ".join(f"{name} (width {NARROW[name]})" for name in narrow)
    reason = f"trained there too, but a rank above the width is refused here: left out of lora_targets at rank {rank}"
    recipe.name(ANOTHER_MEANING, entry.theirs or "lora_targets", widths, reason)


def fit_prodigy(recipe: Recipe) -> None:
    """Give Prodigy the one rate that it takes here, a factor of the rate that it finds: 1 where a recipe has less."""
    if str(recipe.settings.get("optim", Written("")).value).lower() != "prodigy":
        return
    for name in ("unet_lr", "text_encoder_lr", "ti_lr"):
        entry = recipe.settings.pop(name, None)
        if entry is not None:
            recipe.name(NOT_NEEDED, entry.theirs, entry.value, "Prodigy finds one rate for all")
    entry = recipe.settings.get("start_learning_rate", Written(0.0))
    if entry.value < LEAST_PRODIGY_RATE:
        note = "Prodigy multiplies the rate that it finds by it: 1 is meant"
        recipe.settings["start_learning_rate"] = Written(1, entry.theirs, note, entry.value)
        if entry.theirs:
            recipe.name(ANOTHER_MEANING, entry.theirs, entry.value, note)
        end = recipe.settings.get("end_learning_rate")
        if end is not None and entry.value:
            recipe.settings["end_learning_rate"] = end._replace(value=rounded(end.value / entry.value))
