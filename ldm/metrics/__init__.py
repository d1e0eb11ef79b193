"""The quality of images: CLIP score, FID, KID, and comparisons of files."""
