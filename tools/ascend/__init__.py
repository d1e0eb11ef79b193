"""Checks of the Ascend side that need no Ascend device."""
