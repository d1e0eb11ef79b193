"""Stable Diffusion on MindSpore: LoRA and full fine-tuning, generation and metrics."""

import os

# MindSpore reads its log level at its first import: show errors only. An exported GLOG_v takes precedence.
os.environ.setdefault("GLOG_v", "3")
