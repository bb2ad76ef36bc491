"""Building blocks of the models: norms, rotary positions, attention over the KV cache, decoder and encoder stacks.

Axis letters, here, in the kernels and in every model.

Decoder: T tokens of a step, S sequences, B query blocks of Q tokens each (T = B * Q), P cache blocks of a sequence, D
width, K key/value heads, G query heads per key/value head, H head size, F feed-forward width, V vocabulary, R rotary
axes (1, or 3 for time, height and width), M rows of the mm_embeds buffer, k experts of a token, A = T * k (token,
expert) pairs, n experts. Encoders: I inputs that have positions of their own (crops, windows, chunks), t frames or
steps of one, U positions of a packed sequence (patches, or all inputs' positions end to end), N heads, C width, E media
embeddings, W their width.
"""
