"""What a prompt says besides its words: weights, BREAK, wildcards, LoRA tags and flags, and its chunks of 75 tokens."""
