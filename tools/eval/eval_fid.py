"""FID and KID between a folder of real images and a folder of generated images.

    python tools/eval/eval_fid.py --real_dir R --gen_dir G --ckpt_path pt_inception-2015-12-05-6726825d.pth
    python tools/eval/eval_fid.py --real_dir R --save_stats real.npz --ckpt_path ...
    python tools/eval/eval_fid.py --real_dir real.npz --gen_dir G --ckpt_path ...

Without --ckpt_path, the image features of the nano CLIP replace those of Inception. tools/eval/README.md
explains what the scores show.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.runtime.script import describe_progress, run_script, start_script  # noqa: E402

if __name__ == "__main__":
    start_script()

from ldm.errors import UserError  # noqa: E402
from ldm.files.outputs import claim_file  # noqa: E402
from ldm.metrics.image_files import find_images  # noqa: E402
from ldm.metrics.report import (  # noqa: E402
    ENOUGH_IMAGES,
    describe_broken,
    describe_network,
    print_broken,
    print_idle_processes,
    print_network,
    write_json,
)
from ldm.runtime.logs import set_up_logging  # noqa: E402
from ldm.runtime.parallel import first_process_prints, is_scheduler, process_index  # noqa: E402
from ldm.settings.declare import MAX_NETWORK_BATCH, REQUIRED, setting  # noqa: E402
from ldm.settings.read import read_settings  # noqa: E402


@dataclass
class Settings:
    """The command line."""

    real_dir: str = setting(REQUIRED, "folder of real images, or their statistics in an .npz", path=True)
    gen_dir: Optional[str] = setting(
        None,
        "folder of generated images, or their statistics in an .npz; may be left out where --save_stats is given",
        path=True,
    )
    ckpt_path: Optional[str] = setting(
        None,
        "Inception weights: pt_inception-2015-12-05-6726825d.pth or inception_v3_fid-9ec6dfe4.ckpt; None for the "
        "nano CLIP",
        path=True,
    )
    save_stats: Optional[Path] = setting(
        None, "write the statistics of --real_dir to this .npz (mu and sigma, as pytorch-fid reads them)", path=True
    )
    output: Optional[Path] = setting(None, "write the scores to this JSON file", path=True)
    batch_size: int = setting(32, "images in a call of the network", low=1, high=MAX_NETWORK_BATCH)
    use_parallel: bool = setting(
        False, "divide the batches between the processes that msrun started; the first one prints and writes the scores"
    )
    backend: str = setting("ms", "ms is MindSpore, the only backend here", choices=("ms",))
    device_target: Optional[str] = setting(None, "Ascend or CPU; None: Ascend where there is one")


def find_all_images(settings: Settings) -> dict[str, list[Path]]:
    """Check the settings and return the images of each folder. Raises UserError before a network is built."""
    if settings.gen_dir is None and settings.save_stats is None:
        raise UserError("--gen_dir is missing: give the folder of generated images")
    if settings.save_stats is not None and settings.real_dir.endswith(".npz"):
        raise UserError("--save_stats needs a folder of images as --real_dir, not an .npz")
    if settings.save_stats is not None and settings.save_stats.suffix != ".npz":
        raise UserError(f"--save_stats {settings.save_stats}: name an .npz file")
    paths = [path for path in (settings.real_dir, settings.gen_dir) if path is not None]
    return {path: find_images(path) for path in paths if not path.endswith(".npz")}


@first_process_prints()
def main(argv: Sequence[str] | None = None) -> None:
    """Check the settings and the files, then score."""
    settings = read_settings(Settings, argv, description=__doc__)
    is_other = settings.use_parallel and (is_scheduler() or process_index() > 0)
    if is_other:
        set_up_logging("ERROR")  # the other processes would repeat the warnings of the first one
    images = find_all_images(settings)
    if is_other:  # it claims no files
        score(settings, images)
        return
    with claim_file(settings.output, "--output"), claim_file(settings.save_stats, "--save_stats"):
        score(settings, images)


def score(settings: Settings, images: dict[str, list[Path]]) -> None:
    """Compute the statistics of each folder, then print and write the distances, in the first process of several."""
    describe_progress(lambda: "before there was a score")

    # MindSpore is imported after the settings are checked, so that a wrong flag is reported at once.
    from ldm.runtime.device import setup_runtime

    runtime = setup_runtime(settings.device_target, use_parallel=settings.use_parallel)
    from ldm.metrics.evaluate import ImageSet, distances, measure_images, read_image_set, send_features
    from ldm.metrics.networks import inception, nano_clip

    network = inception(settings.ckpt_path) if settings.ckpt_path is not None else nano_clip()
    most_images = max(map(len, images.values()), default=1)
    batch_size = min(settings.batch_size, most_images)
    paths = [path for path in (settings.real_dir, settings.gen_dir) if path is not None]
    if runtime.process_index:
        for path in paths:
            if path in images:
                send_features(images[path], network, batch_size, runtime.process_index, runtime.process_count)
        return
    print_network(network)
    print_idle_processes(most_images, batch_size, runtime.process_count)

    # Statistics are read before images are measured, which takes long.
    saved = {path: read_image_set(path, network) for path in paths if path not in images}

    def image_set(path: str, label: str, save_to: Path | None = None) -> ImageSet:
        if path in saved:
            return saved[path]
        measured = measure_images(images[path], network, batch_size, label, save_to, runtime.process_count)
        print_broken(measured.broken, label)
        return measured

    real = image_set(settings.real_dir, "real images", settings.save_stats)
    if settings.save_stats is not None:
        print(f"statistics of {real.count} images written to {settings.save_stats}")
        describe_progress(lambda: f"before there was a score; the statistics in {settings.save_stats} are kept")
    if settings.gen_dir is None:
        return
    generated = image_set(settings.gen_dir, "generated images")

    scores = distances(real, generated)
    counts = [side.count for side in (real, generated) if side.count is not None]
    print(f"images: {real.count or 'unknown'} real, {generated.count or 'unknown'} generated")
    if counts and min(counts) < ENOUGH_IMAGES:
        print(
            f"warning: {min(counts):,} images are fewer than {ENOUGH_IMAGES:,}: this FID lies far above its limit "
            "and compares only with FIDs of as many images; the KID's mean does not depend on their number"
        )
    print(f"FID: {scores.fid:.6g}")
    if scores.kid is None:
        print("KID: only from images, four or more a side, not from statistics")
    else:
        print(f"KID: {scores.kid:.6g} +- {scores.kid_std:.2g}")
    if settings.output is not None:
        sides: dict[str, Any] = {
            name: {"path": path, "images": side.count, "broken": describe_broken(side.broken)}
            for name, path, side in (("real", settings.real_dir, real), ("generated", settings.gen_dir, generated))
        }
        write_json(settings.output, {**asdict(scores), **sides, **describe_network(network)})


if __name__ == "__main__":
    run_script(main)
