"""The dry runs that the tests look at, each in a process of its own.

Each takes (folder for its files, base model, data folder) and returns what it did on the simulated device. They come in
the order in which they start: the longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tools.ascend.dry_run import GRAPHS, training_flags
from tools.ascend.simulation import Simulated, simulate
from tools.ascend.stub_cann import DEFAULT_SOC

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny.yaml"
MICRO = ROOT / "tests" / "training" / "micro.yaml"
NANO = ROOT / "configs" / "nano.yaml"
A2, FIRST_910 = DEFAULT_SOC, "Ascend910A"
RECIPE = ROOT / "configs" / "train" / "train_config_lora_v1.yaml"

Result = Simulated
Run = Callable[[Path, Path, Path], Result]

# Runs of compile_graphs whose tables are recorded. tests/tiny.yaml has two levels; micro.yaml, with one level, has the
# same operators in a third of the time. EMA, clipping and the skip of overflows are on.
COMPARED = {
    "flash-O0": (TINY, 32, GRAPHS, True, "O0", A2),
    "plain-O0": (MICRO, 16, ("unet", "step"), False, "O0", A2),
    "flash-O1": (MICRO, 16, GRAPHS, True, "O1", A2),
    "plain-O1": (MICRO, 16, ("unet", "step"), False, "O1", A2),
    "first-910-O0": (MICRO, 16, ("step",), False, "O0", FIRST_910),
}

# Graph -> flags, of tests/ascend/updates.py: each optimizer with all that it is combined with, and whole steps.
_ACCUMULATED = ("--gradient_accumulation_steps=2",)
UPDATES = {
    "adamw": (*_ACCUMULATED, "--use_ema=True", "--loraplus_lr_ratio=16"),
    "adamw, limited": (*_ACCUMULATED, "--scale_weight_norms=1"),
    "lion": (*_ACCUMULATED, "--optim=lion", "--use_ema=True", "--loraplus_lr_ratio=16"),
    "adafactor": (*_ACCUMULATED, "--optim=adafactor", "--use_ema=True", "--loraplus_lr_ratio=16"),
    "adafactor, all options": (
        *_ACCUMULATED, "--optim=adafactor", "--optimizer_args", "beta1=0.9", "scale_parameter=True",
        "relative_step=True",
    ),
    "adamwschedulefree": (*_ACCUMULATED, "--optim=adamwschedulefree", "--loraplus_lr_ratio=16"),
    "prodigy": (*_ACCUMULATED, "--optim=prodigy", "--start_learning_rate=1", "--use_ema=True"),
    "prodigy, all options": (
        *_ACCUMULATED, "--optim=prodigy", "--start_learning_rate=1", "--optimizer_args", "growth_rate=1.02",
        "safeguard_warmup=True", "use_bias_correction=True",
    ),
    "checkpointed": ("--gradient_checkpointing=True", "--use_ema=True"),
    "losses": ("--loss_type=huber", "--min_snr_gamma=5", "--ip_noise_gamma=0.1", "--lora_targets=to_q"),
}  # fmt: skip
# Run -> its graphs, whose tables are recorded in tests/golden/ascend.
RECORDED = {name: arguments[2] for name, arguments in COMPARED.items()}
RECORDED["updates-O0"] = tuple(UPDATES)


def compile_graphs(
    config: Path, size: int, graphs: Sequence[str], flash: bool, jit_level: str, soc: str, *_: Path,
    process_count: int = 1, flags: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Compile graphs with a batch of two images, with LoRA of rank 4 in the attention."""
    argv = [
        f"--model_config={config}", f"--image_size={size}", "--train_batch_size=2", f"--jit_level={jit_level}",
        f"--enable_flash_attention={flash}", "--use_ema=True", *flags,
    ]  # fmt: skip
    command = ["-m", "tools.ascend.graphs", ",".join(graphs), *training_flags(argv)]
    return simulate(command, soc, process_count)


def compile_updates(jit_level: str, *_: Path) -> Result:
    """Compile the graphs of tests/ascend/updates.py."""
    return simulate(["-m", "tests.ascend.updates", jit_level])


def train(
    folder: Path, base_model: Path, data: Path, *, output: str, config: Path = MICRO, size: int = 16,
    flags: Sequence[str] = (), **options: object,
) -> Result:  # fmt: skip
    """Train LoRA with the script, two steps if `flags` do not say otherwise."""
    arguments = {
        "train_config": RECIPE, "model_config": config, "image_size": size, "train_batch_size": 2, "max_steps": 2,
        "data_path": data, "pretrained_model_path": base_model, "output_path": folder / output,
        "device_target": "Ascend",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in arguments.items()]
    return simulate([str(ROOT / "train_text_to_image.py"), *words, *flags], **options)


def train_nano(folder: Path, _: Path, data: Path) -> Result:
    nano = ROOT / "models" / "nano" / "nano.safetensors"
    return train(folder, nano, data, output="nano", config=NANO, size=64)


def generate_nano(folder: Path, *_: Path) -> Result:
    """Generate an image of the nano model with two steps of the sampler."""
    arguments = {
        "prompt": "a red apple", "output_path": folder / "images", "sampling_steps": 2, "n_samples": 1,
        "device_target": "Ascend",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in arguments.items()]
    return simulate([str(ROOT / "text_to_image.py"), *words])


def train_twice(folder: Path, base_model: Path, data: Path) -> tuple[Result, Result]:
    """Train with the compile cache, and resume the run in a second process."""
    run = partial(train, folder, base_model, data, output="cached")
    first = run(flags=["--compile_cache=True"])
    return first, run(flags=["--compile_cache=True", "--resume=True", "--max_steps=4"])


def compile_for_eight(folder: Path, *_: Path, divided: bool) -> Result:
    """Compile the step of the whole UNet on 8 cards, with 384 channels, so that 15 parameters are large."""
    config = folder / f"wide-{divided}.yaml"
    text = MICRO.read_text(encoding="utf-8").replace("model_channels: 32", "model_channels: 384")
    config.write_text(text.replace("num_head_channels: 16", "num_head_channels: 64"), encoding="utf-8")
    flags = ["--use_lora=False", "--use_parallel=True", f"--shard_optimizer={divided}"]
    return compile_graphs(config, 16, ("step",), True, "O0", A2, process_count=8, flags=flags)


RUNS: dict[str, Run] = {
    "train nano": train_nano,
    **{name: partial(compile_graphs, *arguments) for name, arguments in COMPARED.items()},
    "generate nano": generate_nano,
    "updates-O0": partial(compile_updates, "O0"),
    "compile cache": train_twice,
    "sink": partial(train, output="sink", flags=["--dataset_sink_mode=True", "--max_steps=4"]),
    "8 cards": partial(
        compile_graphs, MICRO, 16, ("step",), True, "O0", A2, process_count=8, flags=["--use_parallel=True"]
    ),
    "8 cards, whole UNet": partial(compile_for_eight, divided=False),
    "8 cards, whole UNet, divided": partial(compile_for_eight, divided=True),
}
