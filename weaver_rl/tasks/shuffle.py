"""A shuffle that is a function: the k-th element of a permutation, in constant memory. It knows nothing of tasks."""

from __future__ import annotations

import hashlib

_NUM_ROUNDS = 4


def permuted(index: int, size: int, key: str) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names.

    A Feistel network permutes the next power of four; indices that leave the range walk on until they are back in it
    (at most four steps on average), which keeps it a permutation of exactly range(size).
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside 0 ... {size - 1}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(_NUM_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        index = left << half_bits | right
        if index < size:
            return index
