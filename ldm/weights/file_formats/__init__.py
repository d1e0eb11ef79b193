"""The file formats of checkpoints, read and written one array at a time."""
