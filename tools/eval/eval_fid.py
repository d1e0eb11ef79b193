"""FID and KID between a folder of real images and a folder of generated ones.

    python tools/eval/eval_fid.py --real_dir R --gen_dir G --ckpt_path pt_inception-2015-12-05-6726825d.pth
    python tools/eval/eval_fid.py --real_dir R --save_stats real.npz --ckpt_path ...
    python tools/eval/eval_fid.py --real_dir real.npz --gen_dir G --ckpt_path ...

Without --ckpt_path the embedded nano CLIP's image features take the place of Inception's. tools/eval/README.md says
what the scores can and cannot say.
"""

# ruff: noqa: UP007, UP045 (the annotations are read when it runs, on Python 3.9 too)
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
    print_network,
    write_json,
)
from ldm.settings.declare import MOST_NETWORK_BATCH, REQUIRED, setting  # noqa: E402
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
        "embedded nano CLIP",
        path=True,
    )
    save_stats: Optional[Path] = setting(
        None, "write the statistics of --real_dir to this .npz (mu and sigma, as pytorch-fid reads them)", path=True
    )
    output: Optional[Path] = setting(None, "write the scores to this JSON file", path=True)
    batch_size: int = setting(32, "images in a call of the network", low=1, high=MOST_NETWORK_BATCH)
    backend: str = setting("ms", "ms (MindSpore), the only one here")
    device_target: Optional[str] = setting(None, "Ascend or CPU; None: Ascend where there is one")


def check(args: Settings) -> dict[str, list[Path]]:
    """Raise UserError for what can be seen to be wrong before a network is built; the images of each side that is a
    folder.
    """
    if args.backend != "ms":
        raise UserError(f"--backend {args.backend} is not here: MindSpore scores (ms), with pytorch-fid's result")
    if args.gen_dir is None and args.save_stats is None:
        raise UserError("--gen_dir is missing: give the folder of generated images")
    if args.save_stats is not None and args.real_dir.endswith(".npz"):
        raise UserError("--save_stats wants a folder of images as --real_dir, not an .npz")
    if args.save_stats is not None and args.save_stats.suffix != ".npz":
        raise UserError(f"--save_stats {args.save_stats}: name an .npz file")
    return {
        path: find_images(path)
        for path in (args.real_dir, args.gen_dir)
        if path is not None and not path.endswith(".npz")
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = read_settings(Settings, argv, description=__doc__)
    images = check(args)
    with claim_file(args.output, "--output"), claim_file(args.save_stats, "--save_stats"):
        score(args, images)


def score(args: Settings, images: dict[str, list[Path]]) -> None:
    """Measure the images of each folder, print the distances and write what is wanted."""
    describe_progress(lambda: "before there was a score")

    # MindSpore comes after the settings: a wrong flag is answered at once, and ldm.runtime.device quiets it.
    from ldm.runtime.device import setup_runtime

    setup_runtime(args.device_target)
    from ldm.metrics.evaluate import ImageSet, distances, measure_images, read_image_set
    from ldm.metrics.networks import inception, nano_clip

    network = inception(args.ckpt_path) if args.ckpt_path is not None else nano_clip()
    print_network(network)
    batch_size = min(args.batch_size, max(map(len, images.values()), default=1))

    # Before the images are measured, which takes long.
    saved = {
        path: read_image_set(path, network)
        for path in (args.real_dir, args.gen_dir)
        if path is not None and path not in images
    }

    def image_set(path: str, label: str, save_to: Path | None = None) -> ImageSet:
        if path in saved:
            return saved[path]
        measured = measure_images(images[path], network, batch_size, label, save_to)
        print_broken(measured.broken, label)
        return measured

    real = image_set(args.real_dir, "real images", args.save_stats)
    if args.save_stats is not None:
        print(f"statistics of {real.count} images written to {args.save_stats}")
        describe_progress(lambda: f"before there was a score; the statistics in {args.save_stats} are kept")
    if args.gen_dir is None:
        return
    generated = image_set(args.gen_dir, "generated images")

    found = distances(real, generated)
    counts = [side.count for side in (real, generated) if side.count is not None]
    print(f"images: {real.count or 'unknown'} real, {generated.count or 'unknown'} generated")
    if counts and min(counts) < ENOUGH_IMAGES:
        print(
            f"warning: {min(counts):,} images are fewer than {ENOUGH_IMAGES:,}: this FID lies far above its limit "
            "and compares only with FIDs of as many images; the KID's mean does not depend on their number"
        )
    print(f"FID: {found.fid:.6g}")
    print(
        "KID: only from images, four or more a side, not from statistics"
        if found.kid is None
        else f"KID: {found.kid:.6g} +- {found.kid_std:.2g}"
    )
    if args.output is not None:
        sides: dict[str, Any] = {
            name: {"path": path, "images": side.count, "broken": describe_broken(side.broken)}
            for name, path, side in (("real", args.real_dir, real), ("generated", args.gen_dir, generated))
        }
        write_json(
            args.output,
            {
                "fid": found.fid,
                "kid": found.kid,
                "kid_std": found.kid_std,
                **sides,
                **describe_network(network),
            },
        )


if __name__ == "__main__":
    run_script(main)
