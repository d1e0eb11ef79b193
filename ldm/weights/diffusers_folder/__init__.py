"""The diffusers folder: reading and writing it, and its config.json files."""
