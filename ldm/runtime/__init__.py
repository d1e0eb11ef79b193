"""Processes, devices, signals and logs: how a script runs."""
