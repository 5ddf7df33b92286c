"""What a mesh adds, idle rows and ids past the vocabulary, nobody sees: not who takes rows, not who edits scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.speculation import NGram
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROWS, SIZE, V = [[5, 6, 7, 8, 9], [50, 51, 52], [97]], 16, 101
ODD = np.where(np.arange(V) % 2, 0, -1e9).astype(np.float32)


def equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def rows_of(cache, rows):
    """Some rows of a cache as they lie in its arrays."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], (cache.layers, cache.length))


@pytest.mark.parametrize("rows", [[2], [2, 0], [1, 2, 0]])
def test_rows_that_are_taken_and_put_back_are_the_same_beside_idle_rows(rows, on_mesh):
    params, config = tiny_model(num_layers=1)
    with on_mesh("data=2"):
        placed = mesh.shard(params, models.letters(config))
        ids = jnp.array([row + [0] * (5 - len(row)) for row in ROWS])
        cache = jaxinfer.init_cache(config, len(ROWS), SIZE)
        _, cache = jaxinfer.prefill(placed, config, ids, cache, num=jnp.array([5, 3, 1]))
        assert (cache.rows, cache.padding) == (3, 1)
        taken = cache.take(jnp.array(rows))
        assert (taken.rows, taken.padding) == (len(rows), len(rows) % 2)
        equal(rows_of(taken, range(len(rows))), rows_of(cache, rows))
        back = cache.put(jnp.array(rows), taken)
        assert (back.rows, back.padding) == (3, 1)
        equal(back, cache)
        # over other rows, so that what is put is seen to arrive, and to arrive nowhere else
        empty = jaxinfer.init_cache(config, len(ROWS), SIZE)
        other = empty.put(jnp.array(rows), taken)
        equal(rows_of(other, rows), rows_of(cache, rows))
        left = [row for row in range(4) if row not in rows]
        equal(rows_of(other, left), rows_of(empty, left))


def only_odd(scores, state):
    """A caller's process, which knows the ids that there are and no others."""
    assert scores.shape == (state.length.shape[0], V)
    return scores + ODD


@pytest.mark.parametrize("how", ["generate", "speculate"])
def test_a_callers_process_sees_the_ids_that_there_are_and_no_padding(how, on_mesh):
    params, config = tiny_model(vocab_size=V, num_layers=1)
    sampling = jaxinfer.Sampling(temperature=[0.0, 1.0, 1.0])
    speak = {"generate": jaxinfer.generate, "speculate": functools.partial(jaxinfer.speculate, draft=NGram())}[how]
    say = functools.partial(speak, ids=ROWS, max_new_tokens=12, sampling=sampling)
    plain = np.asarray(say(params, config, process=only_odd).ids)
    assert (plain[:, :12] % 2 == 1).all()
    with on_mesh("tensor=8"):
        arranged, wide = models.arrange(params, config)
        assert wide.padded_vocab == 104
        split = say(mesh.shard(arranged, models.letters(wide)), wide, process=only_odd)
    np.testing.assert_array_equal(np.asarray(split.ids), plain)
