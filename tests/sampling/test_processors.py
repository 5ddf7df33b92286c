"""process against transformers, against numpy where transformers has nothing, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as tf

from jaxinfer.sampling import Sampling, process, sample

PROMPT, LENGTH = 9, 17

_process = jax.jit(process)


def example(V, B=3, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, V)) * 4).astype(np.float32), rng.integers(0, V, (B, LENGTH)).astype(np.int32)


def ours(logits, tokens, length=LENGTH, prompt=PROMPT, **controls):
    B, V = logits.shape
    padded = np.pad(tokens, ((0, 0), (0, 22 - tokens.shape[1])), constant_values=1)  # ids past length do not count
    row = [np.broadcast_to(np.int32(x), (B,)) for x in (length, prompt)]
    return np.asarray(_process(jnp.asarray(logits), Sampling(**controls).rows(B, V), padded, *row))


def theirs(logits, tokens, *processors):
    chain = tf.LogitsProcessorList(processors)
    return chain(torch.tensor(tokens, dtype=torch.long), torch.tensor(logits)).numpy()


def assert_same(got, want):
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("V", [50, 300, 5003])
class TestAgainstTransformers:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
    def test_temperature(self, V, temperature):
        logits, tokens = example(V)
        want = theirs(logits, tokens, tf.TemperatureLogitsWarper(temperature))
        assert_same(ours(logits, tokens, temperature=temperature), want)

    @pytest.mark.parametrize("penalty", [0.8, 1.3])
    def test_repetition_penalty(self, V, penalty):
        logits, tokens = example(V)
        want = theirs(logits, tokens, tf.RepetitionPenaltyLogitsProcessor(penalty))
        assert (want != logits).any()
        assert_same(ours(logits, tokens, repetition_penalty=penalty), want)

    @pytest.mark.parametrize("k", [1, 5, 128, 129, 200, "V", "V + 10"])
    def test_top_k(self, V, k):
        k = {"V": V, "V + 10": V + 10}.get(k, k)
        logits, tokens = example(V)
        logits[0] = np.round(logits[0])  # ties at the edge: both keep them
        assert_same(ours(logits, tokens, top_k=k), theirs(logits, tokens, tf.TopKLogitsWarper(k)))

    @pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    @pytest.mark.parametrize("scale", [1.0, 0.1])
    def test_top_p(self, V, p, scale):
        logits, tokens = example(V)
        # Nearly flat, so that the mass lies outside the best 128; at V = 5003 flatter than the first is finer than
        # transformers' float32 cumsum tells apart (test_filters goes there, in float64)
        logits = logits * np.float32(scale if V < 5000 else 1.0)
        assert_same(ours(logits, tokens, top_p=p), theirs(logits, tokens, tf.TopPLogitsWarper(p)))

    @pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 1.0])
    def test_min_p(self, V, p):
        logits, tokens = example(V)
        assert_same(ours(logits, tokens, min_p=p), theirs(logits, tokens, tf.MinPLogitsWarper(p)))

    @pytest.mark.parametrize("least", [0, LENGTH - PROMPT, LENGTH - PROMPT + 1, 100])
    def test_min_new_tokens(self, V, least):
        logits, tokens = example(V)
        want = theirs(logits, tokens, tf.MinNewTokensLengthLogitsProcessor(PROMPT, least, [3, 11]))
        assert_same(ours(logits, tokens, min_new_tokens=least, stop_ids=[3, 11]), want)
        assert np.isneginf(want[:, [3, 11]]).all() == (least > LENGTH - PROMPT)

    def test_logit_bias(self, V):
        logits, tokens = example(V)
        want = theirs(logits, tokens, tf.SequenceBiasLogitsProcessor({(3,): 2.5, (V - 1,): -1.0, (7,): -float("inf")}))
        assert_same(ours(logits, tokens, logit_bias={3: 2.5, V - 1: -1.0, 7: -np.inf}), want)

    @pytest.mark.parametrize("k", [5, 40, 200])
    def test_all_of_them_in_its_order(self, V, k):
        """The order is generate()'s: `_get_logits_processor` in transformers' generation/utils.py."""
        logits, tokens = example(V)
        chain = [
            tf.SequenceBiasLogitsProcessor({(int(tokens[0, 0]),): 6.0, (3,): 2.5}),
            tf.RepetitionPenaltyLogitsProcessor(1.5),
            tf.MinNewTokensLengthLogitsProcessor(PROMPT, 20, [3]),
            tf.TemperatureLogitsWarper(1.6),
            tf.TopKLogitsWarper(k),
            tf.TopPLogitsWarper(0.8),
            tf.MinPLogitsWarper(0.01),
        ]
        got = ours(
            logits,
            tokens,
            logit_bias={int(tokens[0, 0]): 6.0, 3: 2.5},
            repetition_penalty=1.5,
            min_new_tokens=20,
            stop_ids=3,
            temperature=1.6,
            top_k=k,
            top_p=0.8,
            min_p=0.01,
        )
        assert_same(got, theirs(logits, tokens, *chain))


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-0.5, 1.5)])
def test_presence_and_frequency_count_the_output_only(presence, frequency):
    V = 20  # ids repeat, in the prompt and in the output
    logits, tokens = example(V)
    want = logits.astype(np.float64)
    for row, ids in zip(want, tokens, strict=True):
        times = np.bincount(ids[PROMPT:], minlength=V)
        assert times.max() > 1 and len(set(ids[:PROMPT]) - set(ids[PROMPT:]))
        row -= presence * (times > 0) + frequency * times
    assert_same(ours(logits, tokens, presence_penalty=presence, frequency_penalty=frequency), want)


def test_penalties_follow_the_repetition_penalty():
    logits, tokens = np.float32([[2.0, -2.0, 1.0]]), np.int32([[0, 1]])
    got = ours(logits, tokens, 2, 0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    np.testing.assert_allclose(got, [[2 / 2 - 0.75, -2 * 2 - 0.75, 1.0]], rtol=1e-6)


def test_unknown_ids_and_ids_past_the_length_are_ignored():
    logits, tokens = example(30)
    controls = dict(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    known = tokens.copy()
    known[:, 2] = known[:, 12] = -1
    gone = np.delete(tokens, [2, 12], axis=1)
    np.testing.assert_array_equal(
        ours(logits, known, **controls), ours(logits, gone, LENGTH - 2, PROMPT - 1, **controls)
    )
    shorter = ours(logits, tokens, LENGTH - 3, **controls)
    np.testing.assert_array_equal(shorter, ours(logits, tokens[:, : LENGTH - 3], LENGTH - 3, **controls))
    assert (shorter != ours(logits, tokens, **controls)).any()
    np.testing.assert_array_equal(ours(logits, tokens, 0, 0, **controls), logits)


def test_min_new_tokens_wins_over_the_bias():
    logits, tokens = example(30)
    assert np.isneginf(ours(logits, tokens, logit_bias={3: 100.0}, stop_ids=3, min_new_tokens=99)[:, 3]).all()


def test_greedy_rows_are_neither_divided_nor_filtered():
    logits, tokens = example(300)
    for temperature in (0.0, 1e-6):
        got = ours(logits, tokens, temperature=temperature, top_k=3, top_p=0.1, min_p=0.5)
        np.testing.assert_array_equal(got, logits)


def test_the_smallest_temperature_keeps_the_best_apart():
    got = ours(np.float32([[30.0, 29.999, -30.0]]), np.zeros((1, 2), np.int32), temperature=1e-5, top_p=0.9)
    assert np.isfinite(got[0, 0]) and np.isneginf(got[0, 1:]).all()


def test_a_row_of_forbidden_ids_is_minus_infinity_and_nan_stays_nan():
    logits, tokens = example(300)
    logits[0], logits[1, 5] = -np.inf, np.nan
    got = ours(logits, tokens, top_k=200, top_p=0.9, min_p=0.1, temperature=0.7, repetition_penalty=1.2)
    assert np.isneginf(got[0]).all() and np.isnan(got[1, 5]) and not np.isnan(got[2]).any()
    sampling = Sampling(temperature=0.7).rows(3)
    assert np.asarray(sample(jnp.asarray(got), sampling, jax.random.key(0), jnp.zeros(3, jnp.int32)))[:2].tolist() == [
        0,
        0,
    ]


def test_the_result_is_float32_whatever_came():
    logits, tokens = example(300)
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float32)
    got = _process(
        jnp.asarray(logits, jnp.bfloat16), Sampling(top_p=0.8).rows(3), tokens, *np.int32([[LENGTH] * 3, [PROMPT] * 3])
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ours(rounded, tokens, top_p=0.8))


MIXED = dict(
    temperature=[1.0, 0.0, 0.7, 1.3, 0.9, 2.0, 0.5, 1.0],
    top_k=[0, 5, 5, 200, 0, 0, 129, 0],
    top_p=[1.0, 0.5, 0.9, 1.0, 0.99, 0.3, 0.8, 1.0],
    min_p=[0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.05, 0.3],
    repetition_penalty=[1.0, 1.2, 1.0, 1.0, 1.5, 1.0, 1.0, 0.7],
    presence_penalty=[0.0, 0.1, 0.0, 0.7, 0.0, 0.0, 0.0, 0.0],
    frequency_penalty=[0.0, 0.0, 0.3, 0.0, 0.0, 0.0, -0.2, 0.0],
    logit_bias=[None, {3: 1.0}, None, {4: -np.inf, 9: 2.5}, None, None, {0: 0.3}, None],
    stop_ids=[[10, 11], [1], [2, 3], [], [4], [], [], [5]],
    min_new_tokens=[0, 99, 0, 0, 99, 0, 0, 99],
    seed=[0, 1, 2, 3, 4, 0, 0, 7],
)


@pytest.mark.parametrize("V", [50, 5003])
def test_row_alone_equals_row_in_batch(V):
    """To the bit, processed logits and draws: a mixture of settings, any neighbours, any slot."""
    logits, tokens = example(V, B=8)
    length, prompt, key = np.arange(9, 17, dtype=np.int32), np.full(8, 5, np.int32), jax.random.key(5)

    @jax.jit
    def step(logits, sampling, tokens, length, prompt):
        logits = process(logits, sampling, tokens, length, prompt)
        return logits, sample(logits, sampling, key, length)

    def rows(index):
        picked = {name: [values[i] for i in index] for name, values in MIXED.items()}
        return step(logits[index], Sampling(**picked).rows(len(index), V), tokens[index], length[index], prompt[index])

    together = jax.tree.map(np.asarray, rows(list(range(8))))
    for index in [*([b] for b in range(8)), *([[7, 2, 1], [4, 0, 6]] if V > 50 else [])]:
        some = jax.tree.map(np.asarray, rows(index))
        np.testing.assert_array_equal(some[0], together[0][index])
        np.testing.assert_array_equal(some[1], together[1][index])


def test_draft_positions_flatten_into_rows():
    """[B, J, V]: each position sees the ids drafted before it, which is what one call at a time would see."""
    (B, J, V), rng = (2, 3, 60), np.random.default_rng(0)
    logits = rng.normal(size=(B, J, V)).astype(np.float32) * 3
    tokens = rng.integers(0, V, (B, 12)).astype(np.int32)
    length, prompt = np.int32([5, 8]), np.int32([4, 4])
    sampling = Sampling(
        temperature=[0.8, 1.2], repetition_penalty=1.4, frequency_penalty=0.5, top_p=0.8, min_new_tokens=3, stop_ids=[1]
    ).rows(B, V)

    def flat(x):
        return np.repeat(x, J, axis=0)

    many = _process(
        logits.reshape(B * J, V),
        jax.tree.map(flat, sampling),
        flat(tokens),
        (length[:, None] + np.arange(J, dtype=np.int32)).reshape(-1),
        flat(prompt),
    ).reshape(B, J, V)
    for j in range(J):
        np.testing.assert_array_equal(
            many[:, j], _process(logits[:, j], sampling, tokens, length + np.int32(j), prompt)
        )
