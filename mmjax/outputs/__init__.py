"""Turns what the device computed into the outputs of requests."""
