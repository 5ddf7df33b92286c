"""Draws follow the law of the processed logits, and depend on seed and position only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxinfer.sampling import ACCEPT, DRAFT, RESIDUAL, TOKEN, Sampling, draws, logprobs, process

KEY = jax.random.key(42)
V, DRAWS = 40, 20000
LOGITS = (np.random.default_rng(1).normal(size=V) * 1.5).astype(np.float32)
TOKENS = [3, 3, 7, 12, 12, 5, 7, 7, 12, 30]  # four of prompt, six of output
BEST = np.argsort(-LOGITS)
noise = jax.jit(draws.noise, static_argnums=4)
sample = jax.jit(draws.sample)


def counts(num=DRAWS, logits=LOGITS, seeds=None, **controls):
    """How often each id is drawn at num positions of one row, every position being a row of one batch."""
    sampling = Sampling(**controls, seed=9 if seeds is None else seeds).rows(num, len(logits))
    tokens = np.broadcast_to(np.int32(TOKENS), (num, len(TOKENS)))
    length, prompt = np.full(num, len(TOKENS), np.int32), np.full(num, 4, np.int32)

    rows = np.broadcast_to(logits, (num, len(logits)))
    return np.bincount(np.asarray(_draw(rows, sampling, tokens, length, prompt)), minlength=len(logits))


@jax.jit
def _draw(logits, sampling, tokens, length, prompt):
    z = process(logits, sampling, tokens, length, prompt)
    return draws.sample(z, sampling, KEY, jnp.arange(len(z)))


def p_value(seen, law):
    """Of the chi-square test, cells of less than 5 expected draws merged as in vLLM; 0 if an impossible id came."""
    if seen[law == 0].any():
        return 0.0
    expected = law * seen.sum()
    large = expected >= 5
    seen = np.append(seen[large], seen[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    some = expected > 0
    return scipy.stats.chisquare(seen[some], expected[some]).pvalue if some.sum() > 1 else 1.0


CONTROLS = {
    "nothing": {},
    "temperature": dict(temperature=0.6),
    "a high temperature": dict(temperature=3.0),
    "top_k": dict(top_k=7),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "repetition_penalty": dict(repetition_penalty=1.8),
    "presence_penalty": dict(presence_penalty=1.1),
    "frequency_penalty": dict(frequency_penalty=0.6),
    "logit_bias": dict(logit_bias={int(BEST[0]): -np.inf, int(BEST[9]): 1.5}),
    "min_new_tokens": dict(min_new_tokens=7, stop_ids=[int(BEST[0]), int(BEST[2])]),
    "all": dict(
        temperature=1.4,
        top_k=25,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        logit_bias={int(BEST[5]): 1.0},
        min_new_tokens=7,
        stop_ids=[int(BEST[1])],
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_draws_follow_the_exact_distribution(name, law):
    want = law(LOGITS, TOKENS, 4, **CONTROLS[name])
    seen = counts(**CONTROLS[name])
    assert p_value(seen, want) > 1e-3
    if name != "nothing":  # and the test would see it if the control did nothing
        assert p_value(seen, law(LOGITS)) < 1e-9


def test_draws_follow_the_distribution_of_a_wide_nucleus(law):
    """The path of the threshold search: 400 nearly equal ids, of which the best 128 hold a third of the mass."""
    logits = (np.random.default_rng(2).normal(size=400) * 0.3).astype(np.float32)
    want = law(logits, top_p=0.7)
    assert (want > 0).sum() > 200
    assert p_value(counts(6000, logits, top_p=0.7), want) > 1e-3


def test_draws_of_other_seeds_and_of_neighbouring_positions_are_independent(law):
    want = law(LOGITS)
    assert p_value(counts(seeds=np.arange(DRAWS)), want) > 1e-3
    few = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.2])), (DRAWS + 1, 3))
    ids = np.asarray(sample(few, Sampling().rows(DRAWS + 1), KEY, jnp.arange(DRAWS + 1)))
    pairs = np.bincount(ids[:-1] * 3 + ids[1:], minlength=9)
    assert p_value(pairs, np.outer([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]).ravel()) > 1e-3


def test_greedy_is_the_largest_processed_logit():
    logits = np.tile(LOGITS, (3, 1))
    logits[1, BEST[7]] = logits[1, BEST[0]]  # a tie: the lower id
    sampling = Sampling(temperature=[0.0, 0.0, 1.0], logit_bias=[{int(BEST[0]): -np.inf}, None, None]).rows(3)
    zero, position = np.zeros((3, 1), np.int32), np.arange(3, dtype=np.int32)
    ids = sample(jax.jit(process)(logits, sampling, zero, zero[:, 0], zero[:, 0]), sampling, KEY, position)
    assert ids.dtype == jnp.int32
    assert ids[:2].tolist() == [BEST[1], min(BEST[0], BEST[7])]
    all_greedy = Sampling(temperature=0.0).rows(3)
    np.testing.assert_array_equal(sample(logits, all_greedy, KEY, position)[:2], [BEST[0], min(BEST[0], BEST[7])])


def test_a_draw_is_the_argmax_of_logits_and_noise():
    logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32)
    seed, position = np.int32([0, 1, 1, -1, 7]), np.int32([4, 4, 5, 0, 2**30])
    gumbel = np.asarray(noise(KEY, seed, position, TOKEN, 300))
    got = sample(logits, Sampling(seed=seed).rows(5), KEY, position)
    np.testing.assert_array_equal(got, np.argmax(logits + gumbel, axis=1))
    other = sample(logits, Sampling(seed=seed).rows(5), KEY, position, purpose=DRAFT)
    np.testing.assert_array_equal(other, np.argmax(logits + np.asarray(noise(KEY, seed, position, DRAFT, 300)), axis=1))
    np.testing.assert_array_equal(sample(logits, Sampling(seed=[0, 1, 1, 2**32 - 1, 7]).rows(5), KEY, position), got)


def test_noise_depends_on_key_seed_position_and_purpose_and_on_nothing_else():
    seed, position = np.int32([0, 0, 1, 1]), np.int32([0, 1, 0, 1])
    rows = [
        np.asarray(noise(key, seed, position, purpose, 257))
        for key in (KEY, jax.random.key(43))
        for purpose in (TOKEN, DRAFT, ACCEPT, RESIDUAL)
    ]
    assert len({row.tobytes() for row in np.concatenate(rows)}) == 4 * 8
    alone = np.asarray(noise(KEY, seed[2:3], position[2:3], TOKEN, 257))
    np.testing.assert_array_equal(alone[0], rows[0][2])
    for vocab in (50, 300):  # a vocabulary padded or cut for a mesh
        width = min(vocab, 257)
        got = np.asarray(noise(KEY, seed, position, TOKEN, vocab))[:, :width]
        np.testing.assert_array_equal(got, rows[0][:, :width])


def test_noise_is_keyed_as_the_contract_says():
    """fold_in(fold_in(fold_in(key, seed), position), purpose); a row of any batch under any transformation."""
    key = KEY
    for data in (3, 1000, ACCEPT):
        key = jax.random.fold_in(key, data)
    want = draws._gumbel(jax.random.key_data(key), jnp.arange(64, dtype=jnp.uint32))
    three, thousand = np.int32([3]), np.int32([1000])
    np.testing.assert_array_equal(noise(KEY, three, thousand, ACCEPT, 64)[0], want)
    np.testing.assert_array_equal(noise(jax.random.key_data(KEY), three, thousand, ACCEPT, 64)[0], want)
    vmapped = jax.jit(jax.vmap(lambda s, p: noise(KEY, s[None], p[None], ACCEPT, 64)[0]))
    np.testing.assert_array_equal(vmapped(np.int32([3, 4]), np.int32([1000, 1]))[0], want)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_kind_gives_rows_the_same_draws_in_any_batch(kind):
    key = jax.random.key(0, impl=kind)
    seed, position = np.int32([5, 6, 7]), np.int32([1, 2, 3])
    together = noise(key, seed, position, TOKEN, 100)
    np.testing.assert_array_equal(noise(key, seed[1:2], position[1:2], TOKEN, 100)[0], together[1])


def test_noise_is_gumbel():
    rows = np.arange(64, dtype=np.int32)
    gumbel = np.asarray(noise(KEY, rows, rows, TOKEN, 16384)).ravel()
    assert scipy.stats.kstest(gumbel, "gumbel_r").pvalue > 1e-3
    for edge in (4.0, 8.0, 10.0):  # the tail decides what rare ids get
        expected = gumbel.size * -np.expm1(-np.exp(-edge))
        assert abs((gumbel > edge).sum() - expected) < 4 * np.sqrt(expected)


def test_noise_of_every_bit_pattern_is_finite_and_resolves_the_tail():
    top = 2**32 - 1
    high = np.uint32([0, 0, 0, 0, 255, 256, 2**31 - 1, 2**31 - 1, 2**31, top, top])
    low = np.uint32([0, 1 << 16, 1 << 17, top, top, 0, 0, top, 0, 0, top])
    gumbel = np.asarray(draws._gumbel_of(high, low))
    assert np.isfinite(gumbel).all() and (np.diff(gumbel) <= 0).all()
    assert gumbel[0] > 33 and gumbel[-1] < -2.8
    uniform = (high.astype(np.float64) * 2.0**32 + low + 2.0**15) / 2.0**64
    np.testing.assert_allclose(gumbel[:-2], -np.log(-np.log1p(-uniform[:-2])), rtol=1e-4, atol=1e-6)


def test_logprobs_are_those_of_the_unprocessed_distribution():
    logits = (np.random.default_rng(3).normal(size=(4, 300)) * 5).astype(np.float32)
    logits[3, :200] = -np.inf
    ids = np.int32([0, 299, 17, 250])
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=1)[np.arange(4), ids]
    got = logprobs(jnp.asarray(logits), jnp.asarray(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert logprobs(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(ids)).dtype == jnp.float32
