"""Evaluation: CLIP score, FID and KID, and the comparison with diffusers."""
