"""The measurement of time and memory of this project and of diffusers on the same machine."""
