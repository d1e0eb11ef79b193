"""Which tests want kernels.cc compiled."""

import pytest

from ldm.models.kernels import library

needs_compiler = pytest.mark.skipif(library() is None, reason="no C++ compiler here")
