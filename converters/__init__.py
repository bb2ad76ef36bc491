"""Checkpoints in and out: header readers, conversion tables, the Orbax writer.

A foundation: nothing here knows a model class. A table says which tensor of a published checkpoint becomes which
parameter path; the caller supplies the paths and shapes it wants filled.
"""
