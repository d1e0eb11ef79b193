"""Command-line tools for LoRA files and base models with a LoRA."""
