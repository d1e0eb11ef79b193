"""Everything here wants torch, diffusers and transformers: where they are not installed nothing is collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    from tests.parity.fid_reference import import_torchvision

    import_torchvision()  # before transformers, which fails with a torchvision that fails
