"""Small ICC colour profiles (ICC.1:2001), made for the tests."""

from __future__ import annotations

import itertools
import struct

import numpy as np

# The colours of the primaries as XYZ for the white of D50, in columns: of Adobe RGB (1998) and of sRGB.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_GAMMA = 563 / 256


def rgb_profile(primaries: np.ndarray = ADOBE, gamma: float = ADOBE_GAMMA) -> bytes:
    columns = {tag: _xyz(*column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T)}
    return _profile(b"RGB ", {**columns, **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))})


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A press on which full cyan is a middle grey (L* 50), and every other ink adds nothing but black, which covers."""
    corners = bytearray()
    for cyan, _, _, black in itertools.product((0, 1), repeat=4):
        lightness = 0 if black else (100, 50)[cyan]
        corners += bytes((round(lightness * 2.55), 128, 128))
    identity = struct.pack(">9i", *(65536 * int(row == column) for row in range(3) for column in range(3)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + ramp * 4 + bytes(corners) + ramp * 3
    return _profile(b"CMYK", {b"A2B0": table}, kind=b"prtr", connection=b"Lab ")


def adobe_in_srgb(color: tuple[int, int, int]) -> np.ndarray:
    """The sRGB of an Adobe RGB colour, 0 to 255, by the formulas of both standards."""
    linear = np.linalg.solve(SRGB, ADOBE @ (np.array(color) / 255) ** ADOBE_GAMMA)
    return _encoded(linear)


def power_in_srgb(value: int, gamma: float) -> float:
    """The sRGB of a grey whose light is a power of its value."""
    return float(_encoded((np.array(value) / 255) ** gamma))


def _encoded(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in (x, y, z)))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))


def _profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    tags = {b"wtpt": _xyz(0.9642, 1.0, 0.8249), **tags}
    offset = 128 + 4 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    white = struct.pack(">3i", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    header = (
        bytes(4) + struct.pack(">I", 0x02100000) + kind + space + connection + struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
        + b"acsp" + bytes(28) + white + bytes(48)
    )  # fmt: skip
    whole = header + table + content
    return struct.pack(">I", len(whole) + 4) + whole
