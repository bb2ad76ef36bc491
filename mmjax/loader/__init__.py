"""Loads checkpoints: files become parameters on the devices."""
