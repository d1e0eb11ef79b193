"""Everything here wants torch, diffusers and transformers: where they are not installed nothing is collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
