"""Command-line tools, and the demo."""
