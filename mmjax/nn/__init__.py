"""Building blocks of the models: norms, rotary positions, attention over pages, decoder and encoder stacks.

Axis letters, here and in every model: T tokens of a step, B query blocks of Q tokens each (T = B * Q), S sequences,
D width, K key/value heads, G query heads per key/value head, N = K * G query heads, H head size, F feed-forward width,
V vocabulary, U encoder units (patches, crops or clips), M media rows, P pages of a sequence, R rows of rotary
positions (1, or 3 for time, height and width), L layers, C width of an encoder.
"""
