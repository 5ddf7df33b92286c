"""Distillation: what the losses are in numpy, what they are zero for, and how acceptance is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer import models, training
from jaxinfer.cache import init_cache
from jaxinfer.testing.tiny import tiny_config
from jaxinfer.training import distill

pytestmark = pytest.mark.usefixtures("quickly_compiled")
CONFIG = tiny_config(num_layers=1)
SMALL = tiny_config(num_layers=1, width=20)
HEAD = models.head_config(CONFIG)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 101, (3, 12)), jnp.int32)
key = jax.random.key


def softmax(scores):
    scores = np.exp(np.asarray(scores, np.float64) - np.max(scores, -1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def random_params(shapes, seed=1):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * draw(size=leaf.shape) + (leaf.ndim == 1), jnp.float32), shapes)


TARGET = random_params(models.param_shapes(CONFIG))


@pytest.fixture(scope="module")
def small():
    return random_params(models.param_shapes(SMALL), seed=2)


@pytest.fixture(scope="module")
def head():
    return random_params(models.head_shapes(HEAD), seed=3)


@functools.partial(jax.jit, static_argnums=1)
def scores(params, config, ids):
    return distill.scores(params, config, ids)


@functools.partial(jax.jit, static_argnums=1)
def guesses(head, depths, ids):
    """(truth, scores of the target, guesses at each depth, their scores)."""
    truth = training.features(TARGET, CONFIG, ids)
    found = distill.unroll(head, HEAD, TARGET, CONFIG, ids, truth, depths)
    return (
        truth,
        models.logits(TARGET, CONFIG, truth),
        found,
        [models.head_logits(head, TARGET, CONFIG, g) for g in found],
    )


model_loss = jax.jit(training.model_loss, static_argnums=(1, 3, 5))
head_loss = jax.jit(training.head_loss, static_argnums=(1, 3, 5, 6, 7, 8))
compare_model = jax.jit(training.compare_model, static_argnums=(1, 3))
compare_head = jax.jit(training.compare_head, static_argnums=(1, 3, 5))


def test_divergence_and_overlap_are_those_of_numpy_in_float64():
    p, q = (np.random.default_rng(seed).normal(size=(4, 5, 101)) * 3 for seed in (1, 2))
    p[..., 90:] = -np.inf  # ids that a mesh has padded the vocabulary with
    some = np.where(np.arange(101) < 90, q, -np.inf)
    for other in (q, some):
        a, b = softmax(p), softmax(other)
        wanted = np.sum(a[..., :90] * np.log(a[..., :90] / b[..., :90]), -1)
        np.testing.assert_allclose(distill.divergence(jnp.asarray(p), jnp.asarray(other)), wanted, rtol=1e-4)
        wanted = np.minimum(a, b).sum(-1)
        np.testing.assert_allclose(distill.overlap(jnp.asarray(p), jnp.asarray(other)), wanted, rtol=1e-4)
    slope = jax.grad(lambda q: distill.divergence(jnp.asarray(p), q).sum())(jnp.asarray(some))
    np.testing.assert_allclose(slope, softmax(some) - softmax(p), atol=1e-5)


def test_a_perfect_draft_has_zero_distillation_loss(small):
    np.testing.assert_allclose(model_loss(TARGET, CONFIG, TARGET, CONFIG, IDS, 0.5), 0, atol=1e-5)
    assert model_loss(small, SMALL, TARGET, CONFIG, IDS, 0.5) > 0.1


def test_acceptance_is_one_when_draft_is_target(small):
    kept, same = compare_model(TARGET, CONFIG, TARGET, CONFIG, IDS)
    np.testing.assert_allclose(kept, 1, atol=1e-5)
    np.testing.assert_array_equal(same, 1)
    kept, same = compare_model(small, SMALL, TARGET, CONFIG, IDS)
    assert kept.shape == same.shape == (1, 3, 11) and kept.max() < 0.99 and same.min() == 0


def test_the_loss_of_a_model_is_the_mean_divergence_and_teaches_the_draft_alone(small):
    p, q = softmax(scores(TARGET, CONFIG, IDS[:, :-1])), softmax(scores(small, SMALL, IDS[:, :-1]))
    wanted = (p * np.log(p / q)).sum(-1).mean()
    kept = np.minimum(p, q).sum(-1)
    found = model_loss(small, SMALL, TARGET, CONFIG, IDS, 0.5)
    np.testing.assert_allclose(found, wanted - 0.5 * np.log(kept).mean(), rtol=1e-4)
    np.testing.assert_allclose(compare_model(small, SMALL, TARGET, CONFIG, IDS)[0][0], kept, rtol=1e-4)
    slopes = jax.jit(jax.grad(training.model_loss, argnums=(0, 2)), static_argnums=(1, 3))
    ours, theirs = slopes(small, SMALL, TARGET, CONFIG, IDS)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(theirs))


def test_depths_of_a_head_are_its_own_guesses_one_slot_on(head):
    """Each depth by hand: which features or guesses are fed, with which tokens, at which positions."""
    ids = IDS[:, :-1]
    fed, _, found, _ = guesses(head, 3, ids)

    @functools.partial(jax.jit, static_argnums=0)
    def by_hand(depth, fed):
        slots = 11 - depth
        cache = init_cache(HEAD, rows=3, size=slots, kind="none")
        step = cache.step(jnp.full(3, slots), slots, start=jnp.full(3, depth - 1))
        return models.head(head, HEAD, TARGET, CONFIG, ids[:, depth:], fed[:, :slots], cache, step)[0]

    assert [g.shape[1] for g in found] == [10, 9, 8]
    for depth, g in enumerate(found, 1):
        fed = by_hand(depth, fed)
        np.testing.assert_allclose(g, fed, atol=1e-4)


def test_the_loss_of_a_head_weighs_its_depths_and_the_features(head):
    truth, p, found, scores = guesses(head, 3, IDS[:, :-1])
    p, each, kept = softmax(p), [], []
    for depth, q in enumerate(map(softmax, scores), 1):
        each.append((p[:, depth:] * np.log(p[:, depth:] / q)).sum(-1).mean())
        kept.append(np.minimum(p[:, depth:], q).sum(-1))

    def unit(x):
        return np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True))

    gap = np.abs(unit(found[0]) - unit(truth[:, 1:]))
    distance = np.where(gap < 1, gap * gap / 2, gap - 0.5).mean()
    each = [kl - 0.3 * np.log(o).mean() for kl, o in zip(each, kept, strict=True)]
    wanted = (each[0] + 0.5 * each[1] + 0.25 * each[2]) / 1.75 + 0.2 * distance
    np.testing.assert_allclose(head_loss(head, HEAD, TARGET, CONFIG, IDS, 3, 0.5, 0.2, 0.3), wanted, rtol=1e-4)
    overlap, same = compare_head(head, HEAD, TARGET, CONFIG, IDS, 3)
    for depth in (1, 2, 3):
        np.testing.assert_allclose(overlap[depth - 1, :, depth:], kept[depth - 1], rtol=1e-4)
        assert np.all(overlap[depth - 1, :, :depth] == -1) and np.all(same[depth - 1, :, :depth] == -1)


def test_a_head_that_guesses_the_features_has_zero_loss():
    """A target whose last layer adds nothing but what an embedding says, so that a head can be exact."""
    target = jax.tree.map(jnp.copy, TARGET)
    target["layers"] = tuple(
        p | {"o": jnp.zeros_like(p["o"]), "down": jnp.zeros_like(p["down"])} for p in target["layers"]
    )
    head = training.begin_head(target, CONFIG)  # f_{s+1} is the embedding of t_{s+1}
    head |= {"fuse_hidden": jnp.zeros_like(head["fuse_hidden"]), "fuse_embed": jnp.eye(CONFIG.width)}
    assert head_loss(head, HEAD, target, CONFIG, IDS, 3, 0.5, 0.2, 0.3) < 1e-3
    kept, same = compare_head(head, HEAD, target, CONFIG, IDS, 3)
    for depth in (1, 2, 3):
        np.testing.assert_allclose(kept[depth - 1, :, depth:], 1, atol=1e-3)
        assert np.all(same[depth - 1, :, depth:] == 1)


def test_a_head_starts_as_the_targets_last_layer_and_shares_no_memory_with_it():
    config = tiny_config(num_layers=2)
    target = random_params(models.param_shapes(config))
    head = training.begin_head(target, config)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), models.head_shapes(models.head_config(config)))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), head) == shapes
    jax.tree.map(np.testing.assert_array_equal, head["layers"][0], target["layers"][1])
    jax.tree.map(np.testing.assert_array_equal, head["norm"], target["norm"])
    jax.jit(lambda head: jax.tree.map(lambda a: a + 1, head), donate_argnums=0)(head)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(target))


def test_a_draft_starts_with_the_targets_words_as_far_as_they_fit():
    """Similarities of the embeddings are the target's best approximation of that rank, up to their size."""
    params = jax.jit(lambda: training.begin_model(SMALL, TARGET, CONFIG, key(0)))()
    assert not np.any(params["layers"][0]["down"]) and not np.any(params["layers"][0]["o"])
    left, size, _ = np.linalg.svd(np.asarray(TARGET["embed"], np.float64), full_matrices=False)
    best = (left[:, :20] * size[:20] ** 2) @ left[:, :20].T
    found = np.asarray(params["embed"], np.float64)
    found = found @ found.T
    np.testing.assert_allclose(found / np.trace(found), best / np.trace(best), atol=1e-5)
    for config in (SMALL, tiny_config(num_layers=1, width=48)):  # wider than the target: a random one
        made = jax.eval_shape(lambda config=config: training.begin_model(config, TARGET, CONFIG, key(0)))
        assert made == models.param_shapes(config)


@pytest.mark.parametrize("kind", ["model", "head"])
def test_a_few_steps_teach_a_draft(kind):
    """The loss falls on the batch that is taught, and what it stands for, acceptance, rises at every depth."""
    optimizer = optax.adam(0.02)
    if kind == "model":
        params = random_params(models.param_shapes(SMALL))
        step = training.make_step(lambda p, ids, t: training.model_loss(p, SMALL, t, CONFIG, ids), optimizer)
    else:
        params = training.begin_head(TARGET, CONFIG)
        step = training.make_step(lambda p, ids, t: training.head_loss(p, HEAD, t, CONFIG, ids, 3), optimizer)

    def kept(params):
        if kind == "model":
            return np.mean(compare_model(params, SMALL, TARGET, CONFIG, IDS)[0])
        found = compare_head(params, HEAD, TARGET, CONFIG, IDS, 3)[0]
        return np.array([np.mean(found[depth - 1, :, depth:]) for depth in (1, 2, 3)])

    before, losses = kept(params), []
    state = (params, optimizer.init(params))
    for _ in range(30):
        state, loss = step(state, IDS[None], TARGET)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert np.all(kept(state[0]) > before + 0.1)


def test_held_out_acceptance_counts_every_prediction_once_and_no_padding():
    """A comparison that gives each prediction its own id as a number: the mean says which were counted."""
    documents = [np.arange(1, n + 1) for n in (2, 9, 30)]

    def compare(ids):
        told = ids[:, 1:].astype(jnp.float32)
        ahead = jnp.where(jnp.arange(told.shape[1]) < 1, -1, told)  # a second kind, silent at the first
        return jnp.stack([told, ahead]), jnp.stack([told == 2, jnp.sign(ahead)])

    kept, same, counted = training.held_out_acceptance(compare, documents, length=8, rows=3)
    every = np.concatenate([document[1:] for document in documents])
    assert counted == len(every) == 1 + 8 + 29
    silent = {1: [2], 2: [2], 3: [2, 10, 18, 26]}  # the first predictions of each document's windows
    later = every.sum() - sum(map(sum, silent.values()))
    np.testing.assert_allclose(kept, [every.mean(), later / (len(every) - 6)], rtol=1e-6)
    np.testing.assert_allclose(same, [3 / 38, 1], rtol=1e-6)


def test_what_is_fixed_reaches_every_pass_of_a_step():
    step = training.make_step(lambda p, part, by: by * (p * part).mean(), optax.sgd(1.0))
    (params, _), loss = step((jnp.asarray(2.0), optax.sgd(1.0).init(2.0)), jnp.asarray([1.0, 3.0]), jnp.asarray(5.0))
    assert (float(params), float(loss)) == (2 - 10, 20)
