"""A data folder that is made to hang or to exhaust the machine is refused at once."""

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_a_folder_of_hostile_files_ends_in_one_line_within_bounds(tmp_path):
    """No file blocks, no library prints a warning, and memory stays small."""
    small = io.BytesIO()
    Image.new("RGB", (16, 16)).save(small, "PNG")
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(small.getvalue())
    os.mkfifo(tmp_path / "0.png.fifo")
    header = bytearray(small.getvalue())
    header[16:24] = (13_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    for index, target in enumerate(["0.png.fifo", "/dev/zero", "/dev/stdin", "nowhere", ".", "5.png"]):
        (tmp_path / f"{index}.png").unlink()
        (tmp_path / f"{index}.png").symlink_to(target)
    (tmp_path / "6.png").write_bytes(header)
    (tmp_path / "7.png").write_bytes(b"GIF89a" + b"\xff\xff" * 2 + bytes(3) + b"\x2c" + bytes(4) + b"\xff\xff" * 2)
    large = io.BytesIO()
    Image.new("1", (9_500, 9_500)).save(large, "PNG")  # above where Pillow warns
    (tmp_path / "8.png").write_bytes(large.getvalue())
    rows = "".join(f"{index}.png,a cat\n" for index in range(20))
    (tmp_path / "img_txt.csv").write_text("dir,text\n" + rows)
    script = f"""
from pathlib import Path
from ldm.data.dataset import read_image_text_csv
from ldm.runtime.script import run_script
def main():
    try:
        read_image_text_csv(Path({str(tmp_path)!r}))
    finally:
        # Not getrusage's ru_maxrss, which begins with what the process that started this one had.
        print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
run_script(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30, stdin=subprocess.PIPE
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("left out: ")]
    assert done.returncode == 2 and "Warning" not in done.stderr and "8 of 20 rows are unusable" in errors[-1], errors
    assert int(done.stdout) < 800_000  # KB
