"""Sampling: what is refused, and the form that programs see."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import Bias, Sampling, process, sample

EVERYTHING = Sampling(
    temperature=[0.0, 0.7],
    top_k=jnp.array([5, 0]),
    top_p=np.array([0.9, 1.0]),
    min_p=0.1,
    repetition_penalty=1.2,
    presence_penalty=(0.5, -0.5),
    frequency_penalty=0.25,
    logit_bias=[{3: 1.5, 4: -np.inf}, None],
    stop_ids=[[7], [8, 9]],
    min_new_tokens=[0, 4],
    seed=[1, 2**32 - 1],
)


def test_rows_are_numpy_arrays_of_fixed_types():
    rows = EVERYTHING.rows(2, vocab=20)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(rows))  # nothing was sent to a device
    floats = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
    for name in floats:
        assert getattr(rows, name).dtype == np.float32 and getattr(rows, name).shape == (2,), name
    for name in ["top_k", "min_new_tokens", "seed"]:
        assert getattr(rows, name).dtype == np.int32 and getattr(rows, name).shape == (2,), name
    assert rows.stop_ids.dtype == rows.logit_bias.ids.dtype == np.int32
    assert rows.stop_ids.shape == rows.logit_bias.ids.shape == rows.logit_bias.values.shape == (2, 8)
    np.testing.assert_array_equal(rows.temperature, np.float32([0, 0.7]))
    np.testing.assert_array_equal(rows.logit_bias.ids[:, :3], [[3, 4, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(rows.logit_bias.values[0, :3], np.float32([1.5, -np.inf, 0]))
    np.testing.assert_array_equal(rows.stop_ids[:, :3], [[7, -1, -1], [8, 9, -1]])
    np.testing.assert_array_equal(rows.seed, [1, -1])


def test_rows_of_rows_are_the_same_rows():
    once = EVERYTHING.rows(2, vocab=20, stop_ids=(2, 7))
    chex.assert_trees_all_equal(once.rows(2, vocab=20, stop_ids=(2, 7)), once)
    chex.assert_trees_all_equal(jax.tree.map(jnp.asarray, once).rows(2), once)


def test_stop_ids_of_the_checkpoint_join_those_of_each_row():
    rows = Sampling(stop_ids=[[7], []]).rows(2, vocab=20, stop_ids=(2, 7, 500))
    np.testing.assert_array_equal(rows.stop_ids[:, :3], [[7, 2, -1], [2, 7, -1]])  # 500 is outside: nobody draws it
    for given in [5, [5], (5,), {5}, np.array([5]), [[5], [5]], np.array([[5, -1], [5, -1]])]:
        np.testing.assert_array_equal(Sampling(stop_ids=given).rows(2).stop_ids[:, :2], [[5, -1], [5, -1]])


def test_minus_one_is_top_k_off():
    np.testing.assert_array_equal(Sampling(top_k=[-1, 3]).rows(2).top_k, [0, 3])


def test_widths_climb_a_ladder():
    def width(num):
        return Sampling(logit_bias={i: 1.0 for i in range(num)}, stop_ids=list(range(num))).rows(1)

    for num, M in [(0, 8), (8, 8), (9, 32), (32, 32), (33, 128), (129, 512), (513, 2048), (2049, 8192)]:
        assert width(num).stop_ids.shape == width(num).logit_bias.values.shape == (1, M)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(temperature=-1.0), "temperature of row 0 is -1.0: it must be finite and at least 0; use 0 for greedy"),
        (dict(temperature=[1.0, float("nan")]), "temperature of row 1 is nan"),
        (dict(temperature=float("inf")), "temperature of row 0 is inf"),
        (dict(temperature=1e39), "temperature of row 0 is 1e"),  # inf in float32
        (dict(temperature="warm"), "temperature is 'warm': give one number"),
        (dict(temperature=[1.0, 1.0, 1.0]), r"temperature has shape \(3,\) but the batch has 2 rows"),
        (dict(temperature=[[1.0], [1.0]]), r"temperature has shape \(2, 1\) but the batch has 2 rows"),
        (dict(temperature=None), "temperature of row 0 is nan"),
        (dict(top_p=0.0), "top_p of row 0 is 0.0: it must be above 0 and at most 1; use 1 to keep all ids"),
        (dict(top_p=1e-60), "top_p of row 0 is 1e-60"),  # 0 in float32
        (dict(top_p=[0.5, 1.1]), "top_p of row 1 is 1.1"),
        (dict(top_p=float("nan")), "top_p of row 0 is nan"),
        (dict(min_p=-0.1), "min_p of row 0 is -0.1: it must be from 0 to 1"),
        (dict(min_p=1.5), "min_p of row 0 is 1.5"),
        (dict(top_k=-2), "top_k of row 0 is -2.0: it must be a whole number, at least 0"),
        (dict(top_k=2.5), "top_k of row 0 is 2.5: it must be a whole number"),
        (dict(top_k=2**31), "top_k of row 0"),
        (dict(repetition_penalty=0.0), "repetition_penalty of row 0 is 0.0: it must be finite and above 0"),
        (dict(presence_penalty=float("nan")), "presence_penalty of row 0 is nan"),
        (dict(frequency_penalty=float("-inf")), "frequency_penalty of row 0 is -inf"),
        (dict(min_new_tokens=-1), "min_new_tokens of row 0 is -1.0"),
        (dict(seed=2**32), "seed of row 0 is 4294967296.0: it must be a whole number, of 32 bits; use seed % 2"),
        (dict(logit_bias={20: 1.0}), "logit_bias has the id 20 but ids go from 0 to 19"),
        (dict(logit_bias={-1: 1.0}), "logit_bias has the id -1 but ids go from 0 to 19"),
        (dict(logit_bias={"a": 1.0}), "logit_bias has the id 'a': ids are whole numbers"),
        (dict(logit_bias={3: float("nan")}), "logit_bias of id 3 is nan: it must be finite, or -inf to forbid"),
        (dict(logit_bias={3: float("inf")}), "logit_bias of id 3 is inf"),
        (dict(logit_bias=[{3: 1.0}]), "logit_bias has 1 rows but the batch has 2"),
        (dict(logit_bias=1.0), "logit_bias is 1.0: give {id: value}"),
        (dict(stop_ids=[20]), "stop_ids has the id 20 but ids go from 0 to 19"),
        (dict(stop_ids=[[1], [-3]]), "stop_ids has the id -3"),
        (dict(stop_ids=[[1]]), "stop_ids has 1 rows but the batch has 2"),
        (dict(stop_ids="</s>"), "stop_ids is '</s>': give a list of ids"),
        (dict(stop_ids=[1.5]), "stop_ids has the id 1.5: ids are whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused_with_value_limit_and_remedy(given, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**given).rows(2, vocab=20)


def test_rows_laid_out_for_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\) but the batch has 2 rows"):
        Sampling().rows(3).rows(2)
    with pytest.raises(ValueError, match="sampling has 3 rows but the batch has 2"):
        jax.jit(lambda s: s.rows(2).temperature)(Sampling().rows(3))


def test_a_changed_value_compiles_nothing():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(logits, sampling, tokens, length, prompt, key):
        return sample(process(logits, sampling, tokens, length, prompt), sampling, key, length)

    key, logits = jax.random.key(0), jnp.zeros((2, 20))
    tokens, length, prompt = jnp.zeros((2, 6), jnp.int32), jnp.array([3, 4]), jnp.array([2, 2])
    changes = dict(
        temperature=[0.0, 0.5, [0.0, 2.0]],
        top_k=[1, -1, [3, 0]],
        top_p=[0.5, np.float64(1), [0.1, 0.2]],
        min_p=[0.3, 1, jnp.array([0.0, 0.5])],
        repetition_penalty=[1.3, [1.0, 2.0]],
        presence_penalty=[1, -1.5],
        frequency_penalty=[1, -1.5],
        logit_bias=[{1: 2.0}, {1: 2.0, 5: -np.inf}, [None, {2: 1.0}]],
        stop_ids=[3, [3, 4], [[], [5]]],
        min_new_tokens=[1, 100],
        seed=[7, 2**32 - 1, [1, 2]],
    )
    assert set(changes) == set(Sampling.__dataclass_fields__)
    step(logits, Sampling().rows(2), tokens, length, prompt, key)
    step(logits, EVERYTHING.rows(2, vocab=20), tokens, length, prompt, key)
    for name, values in changes.items():
        for value in values:
            step(logits, Sampling(**{name: value}).rows(2, stop_ids=(9,)), tokens, length, prompt, key)
    assert step._cache_size() == 1


def test_traced_numbers_and_plain_settings_work_inside_jit():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 20)), jnp.float32)
    key, position, zero = jax.random.key(0), jnp.arange(3), jnp.zeros(3, jnp.int32)

    def draw(sampling):
        return sample(process(logits, sampling, zero[:, None], zero, zero), sampling, key, position)

    traced = jax.jit(lambda t, k: draw(Sampling(temperature=t, top_k=k, seed=4)))(0.5, -1)
    np.testing.assert_array_equal(traced, jax.jit(draw)(Sampling(temperature=0.5, seed=4).rows(3)))
    assert isinstance(jax.jit(lambda s: s.rows(3))(Sampling().rows(3)).logit_bias, Bias)
