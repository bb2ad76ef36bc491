"""Attention over splits of the keys, before the splits are merged."""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32


class AttnStates(NamedTuple):
    """What each of I splits of the keys gives.

    out: attention within the split, in the queries' dtype, N heads beside each other. lse: the logarithm to base 2 of
    the split's sum of exponentials.
    """

    out: Float[Array, "I S NH"]
    lse: Float32[Array, "I S N"]
