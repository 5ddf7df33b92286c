"""Thresholds of top-k, top-p and min-p against sorting the whole vocabulary in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import Sampling, filters, process, sample

KS = [0, 1, 5, 128, 129, 200]
PS = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1.0]
EDGE = 3e-7  # float32 cannot tell masses that are closer than this to p

_threshold = jax.jit(filters.threshold)


def kept(z, top_k=0, top_p=1.0, min_p=0.0):
    B = z.shape[0]
    row = [np.broadcast_to(np.asarray(x, t), (B,)) for x, t in [(top_k, np.int32), (top_p, "f4"), (min_p, "f4")]]
    return z >= np.asarray(_threshold(jnp.asarray(z), *row))[:, None]


def draw_logits(shape, scale=3.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])  # the first is nearly flat: the best 128 of 300 are not half of it
@pytest.mark.parametrize("V", [50, 300, 1001])
def test_every_k_and_p_keeps_what_sorting_keeps(V, scale, kept_by_sorting):
    pairs = [(k, p) for k in [*KS, V - 1, V, V + 10] for p in PS]
    z = draw_logits((len(pairs), V), scale)
    z[::3, ::7] = -np.inf
    got = kept(z, *np.array(pairs).T)
    decided = 0
    for row, (k, p), mask in zip(z, pairs, got, strict=True):
        p = float(np.float32(p))
        least, most = (kept_by_sorting(row, k, p + e if p < 1 else 1.0) for e in (-EDGE, EDGE))
        assert (least <= mask).all() and (mask <= most).all(), (k, p)
        decided += (least == most).all()
    assert decided > 0.97 * len(pairs)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (50, 0.9), (0, 0.3), (0, 0.9), (0, 0.99), (5000, 0.9), (5000, 1)]
)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_large_vocabulary_keeps_what_sorting_keeps(top_k, top_p, scale, kept_by_sorting):
    z = draw_logits((1, 128256), scale, seed=top_k)
    mask, p = kept(z, top_k, top_p)[0], float(np.float32(top_p))
    least, most = (kept_by_sorting(z[0], top_k, p + e if p < 1 else 1.0) for e in (-EDGE, EDGE))
    assert (least <= mask).all() and (mask <= most).all()
    assert most.sum() - least.sum() <= 1 + 1e-6 * z.size * 10


def test_min_p_keeps_what_the_ratio_to_the_best_says(kept_by_sorting):
    ps = np.float32([0.0, 0.001, 0.05, 0.5, 1.0])
    z = draw_logits((5, 300))
    for row, p, mask in zip(z, ps, kept(z, min_p=ps), strict=True):
        np.testing.assert_array_equal(mask, kept_by_sorting(row, min_p=float(p)))
    assert kept(z, min_p=ps).sum(1).tolist()[0] == 300 and kept(z, min_p=ps).sum(1).tolist()[-1] == 1


@pytest.mark.parametrize("V", [1, 50, 128, 129, 256, 257, 300, 1001, 5003, 32003])
def test_best_are_the_largest_values(V):
    z = np.round(draw_logits((3, V)), 1)  # with many ties
    z[1, V // 3 :] = -np.inf
    z[2] = np.sort(z[2])  # the best lie side by side
    np.testing.assert_array_equal(jax.jit(filters.best)(z), -np.sort(-z)[:, :128])


@pytest.mark.parametrize("top", [0.0, -0.0, 1e-3, -7.5, 3e4, 1e30])
def test_the_search_is_exact_at_any_scale(top):
    """k = 150 of 300 lies past the candidates, with both signs, one sign, and both zeros in the row."""
    z = (draw_logits((2, 300)) * max(abs(top), 1e-6) + np.float32(top)).astype(np.float32)
    z[1] = np.where(np.arange(300) % 3, 0.0, -0.0)
    mask = kept(z, 150)
    np.testing.assert_array_equal(mask[0], z[0] >= np.sort(z[0])[::-1][149])
    assert mask[1].all()


def test_candidates_and_search_give_the_same_bits():
    """With one candidate, everything is found by the search."""
    z = jnp.asarray(draw_logits((40, 2000), 5.0))
    top, candidates = jnp.max(z, -1), filters.best(z)
    k = jnp.arange(1, 41, dtype=jnp.int32)
    kth, nucleus = jax.jit(filters._kth), jax.jit(filters._nucleus)
    edge = kth(z, candidates, k)
    np.testing.assert_array_equal(kth(z, candidates[:, :1], k), edge)
    for low in (edge, jnp.full(40, -jnp.inf)):
        p = jnp.linspace(0.05, 0.6, 40)
        with_all = nucleus(z, candidates, top, low, p)
        assert (with_all >= candidates[:, -1]).all()  # the usual case is what this compares with
        np.testing.assert_array_equal(nucleus(z, candidates[:, :1], top, low, p), with_all)


def test_ties_at_the_edge_are_all_kept():
    flat = np.zeros((1, 300), np.float32)
    for k, p in [(1, 1.0), (0, 0.01), (200, 0.5)]:
        assert kept(flat, k, p).all()
    steps = np.repeat(np.float32([3, 2, 1]), 100)[None]
    assert kept(steps, 101).sum() == 200  # the k-th best is one of 100 equals
    first = 1 / (1 + np.exp(-1) + np.exp(-2))
    assert kept(steps, 0, first - 1e-3).sum() == 100 and kept(steps, 0, first + 1e-3).sum() == 200


def test_the_best_id_is_always_kept():
    z = draw_logits((3, 300))
    z[2] = -np.inf
    z[2, 17] = -1e30
    for k, p, min_p in [(1, 1.0, 0.0), (0, 1e-30, 0.0), (0, 1.0, 1.0), (1, 1e-7, 1.0)]:
        np.testing.assert_array_equal(kept(z, k, p, min_p) & (z > -np.inf), z == z.max(1, keepdims=True))


def test_one_filter_per_row_is_that_filter_alone():
    z = draw_logits((5, 1001), 1.0)
    top_k, top_p, min_p = np.int32([0, 7, 400, 0, 0]), np.float32([1, 1, 1, 0.95, 1]), np.float32([0, 0, 0, 0, 0.2])
    together = kept(z, top_k, top_p, min_p)
    for b in range(5):
        np.testing.assert_array_equal(kept(z[b : b + 1], top_k[b], top_p[b], min_p[b])[0], together[b])
    assert together[0].all() and together[1].sum() == 7 and together[2].sum() == 400 and together[3].sum() > 128


def test_mass_is_a_sum_of_integers_that_no_order_changes():
    weights = np.random.default_rng(0).random(128256).astype(np.float32) ** 8
    limbs = [np.asarray(limb, np.int64) for limb in filters._limbs(jnp.asarray(weights))]
    exact = sum(limb.sum() / 2 ** (filters.LIMB_BITS * i) for i, limb in enumerate(limbs, start=1))
    assert abs(exact - weights.astype(np.float64).sum()) < 2**-20
    summed = filters._mass([jnp.sum(limb, dtype=jnp.int32) for limb in filters._limbs(jnp.asarray(weights))])
    assert abs(float(summed) - exact) < 2e-7 * exact
    ones = [jnp.sum(limb, dtype=jnp.int32) for limb in filters._limbs(jnp.ones(filters.MAX_VOCAB))]
    assert float(filters._mass(ones)) == filters.MAX_VOCAB  # the fullest limb there can be


def test_a_vocabulary_whose_sums_would_overflow_is_refused():
    V = filters.MAX_VOCAB + 1
    row = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(ValueError, match=f"the vocabulary has {V} ids but top-p can sum {V - 1}"):
        jax.eval_shape(
            filters.threshold,
            jax.ShapeDtypeStruct((1, V), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
            row,
            row,
        )


def _inner(jaxpr, depth=0):
    """Every equation of a jaxpr, with how many conditionals lie around it."""
    for equation in jaxpr.eqns:
        yield equation, depth
        for value in equation.params.values():
            for sub in value if isinstance(value, list | tuple) else [value]:
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from _inner(sub, depth + (equation.primitive.name == "cond"))


def _step(logits, sampling, tokens, length, prompt, key):
    return sample(process(logits, sampling, tokens, length, prompt), sampling, key, length)


def _arguments(B, V):
    ints = jnp.zeros(B, jnp.int32)
    return jnp.zeros((B, V)), Sampling().rows(B), jnp.zeros((B, 16), jnp.int32), ints, ints, jax.random.key(0)


@pytest.mark.parametrize("V", [32000, 128256, 262208])
def test_no_program_sorts_the_vocabulary(V):
    traced = jax.jit(_step).trace(*_arguments(2, V))
    sorts = [e for e, _ in _inner(traced.jaxpr.jaxpr) if "sort" in e.primitive.name or "top_k" in e.primitive.name]
    widths = {e.invars[0].aval.shape[-1] for e in sorts}
    assert widths and max(widths) <= 4 * np.sqrt(128 * V)
    text = traced.lower().compile().as_text()
    lines = [line for line in text.splitlines() if " sort(" in line or "TopK" in line or "topk(" in line]
    assert lines and not [line for line in lines if f",{V}]" in line or f"[{V}]" in line]


def test_what_no_row_uses_is_behind_a_conditional():
    dear = ("scatter", "sort", "top_k", "exp", "threefry", "gather", "cumsum", "while")
    found = [(e.primitive.name, depth) for e, depth in _inner(jax.make_jaxpr(_step)(*_arguments(2, 5000)).jaxpr)]
    wide = [(name, depth) for name, depth in found if any(word in name for word in dear)]
    assert {word for word in dear for name, _ in wide if word in name} >= {
        "scatter",
        "top_k",
        "exp",
        "threefry",
        "while",
    }
    assert all(depth > 0 for _, depth in wide), wide
