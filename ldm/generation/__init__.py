"""Generating images: planning from the settings, the pipeline, and the files that are written."""
