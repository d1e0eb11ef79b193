"""Textual inversion (Gal et al. 2022): words whose vectors in the text encoder's table are learned from images."""
