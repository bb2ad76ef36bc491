"""Turns the results of dispatches into the outputs of requests."""
