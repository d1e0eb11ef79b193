"""The local page of tools/studio.py: its server, its queue of images, its trainings."""
