"""Batches that depend on the seed and the step only, so that a run which was interrupted goes on as if it was not."""

from __future__ import annotations

import functools

import numpy as np


class Batches:
    """Windows of `length` + 1 tokens from documents that are shuffled, joined and cut anew in every epoch.

    documents: int arrays of token ids, each with its own first token. Call it with a first row and a number of rows;
    rows are counted through all epochs. Windows overlap by the one token that the earlier predicts last.
    """

    def __init__(self, documents: list[np.ndarray], length: int, seed: int):
        self.documents, self.length, self.seed = documents, length, seed
        self.tokens = sum(map(len, documents))
        # one window is given up, so that the cuts can begin anywhere
        self.per_epoch = (self.tokens - 1) // length - 1
        if self.per_epoch < 1:
            raise ValueError(
                f"{self.tokens} tokens make no epoch of windows of {length}: shorten them to a third of it"
            )
        self.epoch = functools.lru_cache(2)(self.draw_epoch)

    def draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The joined tokens of an epoch, and where its windows start, in their order."""
        draw = np.random.Generator(np.random.Philox(key=[self.seed, self.length << 32 | epoch]))
        joined = np.concatenate([self.documents[i] for i in draw.permutation(len(self.documents))])
        start = draw.integers(self.length) + self.length * draw.permutation(self.per_epoch)
        return joined, start

    def __call__(self, first: int, rows: int) -> np.ndarray:
        """[rows, length + 1] int32."""
        out = np.empty((rows, self.length + 1), np.int32)
        for row in range(rows):
            epoch, index = divmod(first + row, self.per_epoch)
            joined, start = self.epoch(epoch)
            out[row] = joined[start[index] : start[index] + self.length + 1]
        return out
