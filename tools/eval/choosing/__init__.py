"""Choosing a checkpoint and a strength of a run: what is drawn, how it is scored and what can be told apart."""
