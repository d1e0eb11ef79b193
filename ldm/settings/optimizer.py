"""The settings of training that concern the optimizer and the learning rate, and the options of each optimizer.

Names and defaults are those of kohya's sd-scripts and of mindone's recipes. TrainSettings holds the settings.
`optimizer_args` gives options as name=value, under the names of the optimizers' own packages.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Optional

from ldm.errors import UserError, plain
from ldm.settings.declare import MAX_COUNT, setting
from ldm.settings.values import check_range, from_word, list_item, nearest, settings_of

# Settings of the optimizer's course: a resumed run may change them, and the comparison with diffusers shares them.
followed_setting = partial(setting, resume="followed", shared_with_diffusers=True)
_adamw_only = partial(setting, not_in_diffusers="the comparison trains with AdamW at one rate")

MAX_RATE = 100
LEAST_PRODIGY_RATE = 0.01  # Prodigy multiplies its own rate by start_learning_rate, of which 1 is meant
RATES = ("unet_lr", "text_encoder_lr", "ti_lr", "loraplus_lr_ratio")  # settings of rates that are not the common one
SCHEDULERS = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
# The names in mindone's recipes and in sd-scripts. The warm-up goes with all schedules.
SCHEDULER_ALIASES = {"cosine_decay": "cosine", "linear_decay": "linear", "constant_with_warmup": "constant"}


def _betas(first: float, second: float) -> Any:
    return setting([first, second], "decay rates of the moments", low=0, below=1, length=2)


def _weight_decay(default: float) -> Any:
    return setting(default, "decoupled weight decay", low=0, high=1000)


def _eps() -> Any:
    return setting(1e-8, "added to the root of the second moment", above=0, high=1)


@dataclass
class AdamWOptions:
    """Options of AdamW, with the defaults of torch.optim.AdamW."""

    betas: list[float] = _betas(0.9, 0.999)
    weight_decay: float = _weight_decay(0.01)
    eps: float = _eps()


@dataclass
class LionOptions:
    """Options of Lion, with the defaults of lion-pytorch."""

    betas: list[float] = _betas(0.9, 0.99)
    weight_decay: float = _weight_decay(0.0)


@dataclass
class AdafactorOptions:
    """Options of Adafactor under transformers' names. scale_parameter and relative_step are off where not given."""

    eps: list[float] = setting(
        [1e-30, 1e-3], "added to the squared gradient; least size of a parameter", above=0, high=1, length=2
    )
    clip_threshold: float = setting(1.0, "largest root mean square of an update", above=0, high=1e6)
    decay_rate: float = setting(-0.8, "power of the step in the decay rate of the second moment", low=-10, below=0)
    beta1: Optional[float] = setting(None, "decay rate of the first moment; None: there is none", low=0, below=1)
    weight_decay: float = _weight_decay(0.0)
    scale_parameter: bool = setting(False, "multiply the learning rate by the size of each parameter")
    relative_step: bool = setting(False, "take a learning rate from the number of the step, not start_learning_rate")
    warmup_init: bool = setting(False, "let the learning rate of relative_step rise from 1e-6")


@dataclass
class ScheduleFreeOptions:
    """Options of schedule-free AdamW, with the defaults of AdamW's weight decay."""

    betas: list[float] = setting([0.9, 0.999], "decay rates of the moments", above=0, below=1, length=2)
    weight_decay: float = _weight_decay(0.01)
    eps: float = _eps()
    r: float = setting(0.0, "power of the step in the weights of the average", low=0, high=2)
    weight_lr_power: float = setting(2.0, "power of the learning rate in the weights of the average", low=0, high=4)


@dataclass
class ProdigyOptions:
    """Options of Prodigy, with the defaults of prodigyopt."""

    betas: list[float] = _betas(0.9, 0.999)
    beta3: Optional[float] = setting(None, "decay rate of s; None: the root of the second beta", low=0, below=1)
    weight_decay: float = _weight_decay(0.0)
    eps: float = _eps()
    decouple: bool = setting(True, "decoupled weight decay, which is the only kind here", choices=(True,))
    use_bias_correction: bool = setting(False, "correct the moments of the first steps, as AdamW does")
    safeguard_warmup: bool = setting(False, "leave the learning rate out of the sum that d is estimated by")
    d0: float = setting(1e-6, "first d", low=1e-12, high=1)
    d_coef: float = setting(1.0, "factor of the estimate of d", above=0, high=1e6)
    growth_rate: Optional[float] = setting(
        None, "largest factor by which d grows in a step; None: any", low=1, high=1e30
    )


OPTIONS: dict[str, type] = {
    "adamw": AdamWOptions,
    "lion": LionOptions,
    "adafactor": AdafactorOptions,
    "adamwschedulefree": ScheduleFreeOptions,
    "prodigy": ProdigyOptions,
}
# sd-scripts writes them so.
OPTIMIZER_ALIASES = {
    "AdamW": "adamw",
    "Lion": "lion",
    "AdaFactor": "adafactor",
    "Adafactor": "adafactor",
    "AdamWScheduleFree": "adamwschedulefree",
    "Prodigy": "prodigy",
}


@dataclass
class OptimizerSettings:
    """Which optimizer trains, and at which rates."""

    optim: str = setting(
        "adamw",
        "optimizer (docs/optimizers.md)",
        group="optimizer",
        choices=(*OPTIONS, *OPTIMIZER_ALIASES),
        resume="fixed",
        graph_key=True,
        aliases=("optimizer_type",),
        not_in_diffusers="the comparison trains with AdamW",
    )
    optimizer_args: list[str] = _adamw_only(
        [],
        "options of the optimizer as name=value, such as d_coef=2 betas=0.9,0.99; they win over betas and weight_decay",
        resume="followed",
        graph_key=True,
    )
    betas: Optional[list[float]] = followed_setting(
        None,
        "decay rates of the moments; None: the optimizer's own, 0.9 and 0.999 (Lion 0.9 and 0.99)",
        low=0,
        below=1,
        length=2,
        graph_key=True,
    )
    weight_decay: Optional[float] = followed_setting(
        None,
        "weight decay, for every trained parameter; None: the optimizer's own, 0.01 for AdamW with and without a "
        "schedule, 0 for the others",
        low=0,
        high=1000,
    )
    scheduler: str = followed_setting(
        "constant",
        "learning rate schedule after the warm-up",
        choices=(*SCHEDULERS, *SCHEDULER_ALIASES),
        aliases=("lr_scheduler",),
    )
    start_learning_rate: float = followed_setting(
        1e-5,
        "learning rate after the warm-up; for Prodigy, which finds its own, a factor of it: give 1",
        above=0,
        high=MAX_RATE,
        aliases=("learning_rate",),
    )
    end_learning_rate: float = followed_setting(
        1e-7, "learning rate at the end of all schedules but constant", low=0, high=MAX_RATE
    )
    warmup_steps: float = followed_setting(
        0,
        "steps of linear warm-up; below 1: share of all steps",
        low=0,
        high=MAX_COUNT,
        aliases=("lr_warmup_steps",),
    )
    decay_steps: int = setting(
        0,
        "steps from the start to the end learning rate; 0: all steps after the warm-up",
        low=0,
        high=MAX_COUNT,
        resume="followed",
    )
    lr_scheduler_num_cycles: int = followed_setting(
        1, "cosine_with_restarts: how often the rate falls from the start to the end", low=1, high=MAX_COUNT
    )
    lr_scheduler_power: float = followed_setting(
        1.0, "polynomial: power of the share of steps that is left", above=0, high=100
    )
    unet_lr: Optional[float] = _adamw_only(
        None,
        "learning rate of the UNet in place of start_learning_rate, with the same schedule",
        above=0,
        high=MAX_RATE,
        resume="followed",
        graph_key=True,
    )
    text_encoder_lr: Optional[float] = _adamw_only(
        None,
        "learning rate of the text encoder in place of start_learning_rate, with the same schedule; half of the UNet's "
        "or less is usual",
        above=0,
        high=MAX_RATE,
        resume="followed",
        graph_key=True,
    )
    ti_lr: Optional[float] = _adamw_only(
        None,
        "learning rate of placeholder_token in place of start_learning_rate, with the same schedule; without a LoRA "
        "1e-4 to 5e-3 is usual, with one 5e-4",
        above=0,
        high=MAX_RATE,
        resume="followed",
        graph_key=True,
        needs="placeholder_token",
        aliases=("learning_rate_ti",),
    )
    loraplus_lr_ratio: Optional[float] = _adamw_only(
        None,
        "LoRA+: the learning rate of LoRA's up matrices (with loha and lokr: of the factors that start at zero) is so "
        "many times that of the others; its paper takes 16",
        above=0,
        high=1e4,
        resume="followed",
        graph_key=True,
        needs="use_lora",
    )

    scale_weight_norms: Optional[float] = _adamw_only(
        None,
        "largest norm of a layer's LoRA; after each step those above it are scaled down to it, 1 is usual",
        above=0,
        high=1e6,
        resume="followed",
        graph_key=True,
        needs="use_lora",
    )

    def optimizer_options(self) -> Any:
        """Return the options of the optimizer, an instance of its class in OPTIONS. Raises UserError."""
        cls = OPTIONS[self.optim]
        declared = settings_of(cls)
        values: dict[str, Any] = {}
        for text in self.optimizer_args:
            name, equals, words = (part.strip() for part in text.partition("="))
            where = f"optimizer_args: {plain(name, 60)}"
            if not equals:
                raise UserError(f"optimizer_args: {plain(text, 60)} is no name=value, such as weight_decay=0.1")
            if name not in declared:
                raise UserError(
                    f'{where} is no option of {self.optim}: did you mean "{nearest(name, tuple(declared))}"?'
                )
            if name in values:
                raise UserError(f"{where} is given twice: leave one out")
            option = declared[name]
            item = list_item(option.hint)
            if item is None:
                value = from_word(words, option.hint, where)
            else:
                value = [from_word(word.strip(), item, where) for word in words.strip("()[]").split(",")]
            check_range(value, option, where)
            values[name] = value
        for name in ("betas", "weight_decay"):
            value = getattr(self, name)
            if value is None or name in values:
                continue
            if name not in declared:
                raise UserError(f"{name} is no option of {self.optim}: leave it out, or set it to None over a recipe's")
            check_range(value, declared[name], name)  # an optimizer may allow less than the setting of all
            values[name] = value
        return cls(**values)

    def resolved(self) -> dict[str, Any]:
        """Return the values of betas and weight_decay that are used."""
        options = asdict(self.optimizer_options())
        return {"betas": options.get("betas"), "weight_decay": options["weight_decay"]}

    def check_optimizer(self) -> None:
        """Check these settings against each other. Raises UserError."""
        self.optim = OPTIMIZER_ALIASES.get(self.optim, self.optim)
        self.scheduler = SCHEDULER_ALIASES.get(self.scheduler, self.scheduler)
        options = self.optimizer_options()
        if self.warmup_steps >= 1 and not float(self.warmup_steps).is_integer():
            raise UserError(f"warmup_steps {self.warmup_steps:g} is no whole number: from 1 on it counts steps")
        if self.optim == "prodigy":
            for name in RATES:
                if getattr(self, name) is not None:
                    raise UserError(f"{name} does not go with prodigy, which finds one rate for all: leave it out")
            if self.start_learning_rate < LEAST_PRODIGY_RATE:
                raise UserError(
                    "prodigy finds its learning rate and multiplies it by start_learning_rate, which is "
                    f"{self.start_learning_rate:g}: give --start_learning_rate 1"
                )
        if isinstance(options, AdafactorOptions) and options.warmup_init and not options.relative_step:
            raise UserError("optimizer_args: warmup_init needs relative_step=True, or leave it out")
        if isinstance(options, AdafactorOptions) and options.relative_step:
            for name in RATES:
                if getattr(self, name) is not None:
                    raise UserError(f"{name} does not go with relative_step, which makes the rate: leave one out")
