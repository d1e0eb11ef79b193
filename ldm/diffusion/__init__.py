"""The noise schedule, the training loss, guidance and the samplers."""
