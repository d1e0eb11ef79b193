"""What tools/lora/doctor.py finds out about a LoRA file: facts, the strength of its blocks, and its effect."""
