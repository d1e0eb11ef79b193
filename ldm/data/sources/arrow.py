"""pyarrow, which reads Parquet and Arrow files where it is installed."""

from __future__ import annotations

from types import ModuleType

from ldm.errors import UserError, plain

# Earlier versions run code that an Arrow or Parquet file holds (CVE-2023-47248).
OLDEST = (14, 0, 1)
# Version 26 needs NumPy 2, and MindSpore 2.8 needs NumPy 1.
WAY = "pip install 'pyarrow>=14.0.1,<22'"


def import_pyarrow(path: str) -> ModuleType:
    """Return pyarrow. `path` is the file that needs it.

    Raises:
        UserError: pyarrow is not installed, does not fit the installed NumPy, or is too old.
    """
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise UserError(f"{path} needs pyarrow, which is not installed: {WAY}") from None
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow, which cannot be loaded ({plain(error, 120)}): {WAY}") from None
    if tuple(int(part) for part in pyarrow.__version__.split(".")[:3] if part.isdigit()) < OLDEST:
        raise UserError(f"{path} needs a later pyarrow than the installed {pyarrow.__version__}: {WAY}")
    return pyarrow
