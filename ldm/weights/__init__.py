"""Checkpoints: file formats, name tables, recognising what a file holds, and strict loading."""
