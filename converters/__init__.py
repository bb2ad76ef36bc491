"""Checkpoints in and out: header readers, conversion tables, the Orbax writer.

Nothing here knows a model class. A table says which tensors of a published checkpoint become which parameter; the
caller supplies the parameter paths and shapes.
"""
