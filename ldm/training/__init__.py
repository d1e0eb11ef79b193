"""Training: from settings to a run, its loop, checkpoints and resuming."""
