"""How long sums of products stay exact in narrow integers: proofs over the constants themselves.

A weight is known when a model is compiled and a code is at most what its bits allow, so that the
largest sum that any picture can bring is the sum of the positive weights times that, and the
smallest that of the negative ones. Every partial sum lies between them.
"""

import numpy as np

from mpqc.graph import Array

HALF_MOST = 2**15 - 1


def half_chunk(weight: Array, most: int) -> int:
    """Most steps that int16 lanes sum exactly, whatever the codes; 0 if not even one.

    Args:
        weight: integers [..., S, 4]: steps of four products, added two by two.
        most: largest code; the smallest is 0.

    Returns:
        A divisor of S.
    """
    steps = weight.shape[-2]
    pairs = weight.reshape(-1, steps, 2, 2)
    signs = [part(pairs, 0).sum(axis=-1, dtype=np.int32) for part in (np.maximum, np.minimum)]
    bound = HALF_MOST // most
    for chunk in sorted((d for d in range(1, steps + 1) if steps % d == 0), reverse=True):
        if all(_largest(sums, chunk) <= bound for sums in signs):
            return chunk
        if chunk > 1 and any(_largest(sums, 1) > bound for sums in signs):
            return 0
    return 0


def _largest(sums: Array, chunk: int) -> int:
    """Largest magnitude of the sums [..., S, lanes] over runs of ``chunk`` steps."""
    runs = sums.reshape(sums.shape[0], -1, chunk, sums.shape[-1]).sum(axis=2)
    return int(np.abs(runs).max(initial=0))
