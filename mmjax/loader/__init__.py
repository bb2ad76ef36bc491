"""Checkpoints become parameters on the devices."""
