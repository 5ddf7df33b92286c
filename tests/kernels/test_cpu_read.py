"""The plain read that other programs are compared with: it reads every word, on every instruction set."""

import numpy as np
import pytest

from jaxinfer.kernels import native

pytestmark = pytest.mark.usefixtures("kernels_are_built")


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("num", [0, 1, 15, 16, 17, 31, 32, 33, 4099])
def test_the_sum_is_that_of_every_word(isa, num):
    if isa not in native.isas():
        pytest.skip(f"this machine has no {isa}")
    words = np.random.default_rng(num).integers(0, 1 << 64, num + 1, np.uint64)[1:]  # not aligned to a whole load
    assert native.read(words, isa) == int(words.sum())


def test_what_is_no_plain_array_of_words_is_refused():
    for words in (np.ones(8), np.ones((8, 8), np.uint64)[:, :4]):
        with pytest.raises(ValueError, match="give it uint64 that lie side by side"):
            native.read(words)
