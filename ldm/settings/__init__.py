"""Settings of scripts, tools and configuration files: declared once, read and checked in one way."""
