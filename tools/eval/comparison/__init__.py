"""The parts of tools/eval/compare_diffusers.py."""
