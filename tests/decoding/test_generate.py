"""The laws of whole generations: greedy and sampled ids do not depend on batch, buffer, chunks or dispatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import Sampling
from jaxinfer.decoding.generate import run
from jaxinfer.testing import Table, byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PARAMS, CONFIG = tiny_model()
PROMPTS = [[5, 17, 99, 3], [42], [7, 8, 9, 10, 11, 12, 13]]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


def by_hand(prompt, num):
    """Greedy decoding, one public step at a time."""
    cache = jaxinfer.init_cache(CONFIG, 1, 64)
    logits, cache = jaxinfer.prefill(PARAMS, CONFIG, np.array([prompt]), cache)
    ids, logprobs = [], []
    for _ in range(num):
        ids.append(int(logits[0].argmax()))
        logprobs.append(float(jax.nn.log_softmax(logits[0])[ids[-1]]))
        logits, cache = jaxinfer.decode_step(PARAMS, CONFIG, np.array(ids[-1:]), cache)
    return ids, logprobs


def generate(prompts=PROMPTS, **options):
    return jaxinfer.generate(PARAMS, CONFIG, prompts, **({"max_new_tokens": 12} | options))


def new_ids(result):
    return [row[:n].tolist() for row, n in zip(np.asarray(result.ids), np.asarray(result.num), strict=True)]


def test_greedy_generation_is_the_public_steps_one_by_one():
    result = generate()
    for row, prompt in enumerate(PROMPTS):
        ids, logprobs = by_hand(prompt, 12)
        assert new_ids(result)[row] == ids
        np.testing.assert_allclose(result.logprobs[row, :12], logprobs, atol=1e-4)
    np.testing.assert_array_equal(result.ids[:, 12:], -1)
    np.testing.assert_array_equal(result.logprobs[:, 12:], 0)
    np.testing.assert_array_equal(result.finish, 2)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_row_alone_equals_row_in_batch(settings):
    seeds = [3, 1 << 20, 7]
    whole = generate(sampling=Sampling(**settings or {"temperature": 0.0}, seed=seeds))
    for row, prompt in enumerate(PROMPTS):
        one = generate([prompt], sampling=Sampling(**settings or {"temperature": 0.0}, seed=seeds[row]))
        assert new_ids(one)[0] == new_ids(whole)[row]


def test_equal_prompts_with_equal_seeds_say_the_same_and_other_seeds_do_not():
    ids = new_ids(generate([[5, 6]] * 3, sampling=Sampling(**SAMPLED, seed=[4, 4, 5])))
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
def test_going_on_with_the_state_is_as_if_it_had_never_stopped(settings):
    sampling = Sampling(**settings, presence_penalty=0.5, min_new_tokens=6, stop_ids=[[20, 21, 22, 23, 24]] * 3)
    whole = generate(sampling=sampling)
    part = generate(sampling=sampling, max_new_tokens=[1, 3, 5], cache=jaxinfer.init_cache(CONFIG, 3, 64))
    ids = new_ids(part)
    for _ in range(12):
        left = np.array([min(2, 12 - len(row)) for row in ids]) * (np.asarray(part.finish) != 1)
        part = jaxinfer.generate(PARAMS, CONFIG, state=part.state, sampling=sampling, max_new_tokens=left, buffer=4)
        ids = [a + b for a, b in zip(ids, new_ids(part), strict=True)]
    assert ids == new_ids(whole)


def test_what_is_said_next_goes_after_what_was_said():
    first = generate(max_new_tokens=3, cache=jaxinfer.init_cache(CONFIG, 3, 64))
    said = new_ids(first)
    second = jaxinfer.generate(PARAMS, CONFIG, [[1, 2], [], [3]], state=first.state, max_new_tokens=[4, 2, 4])
    for row, more in enumerate([[1, 2], [], [3]]):
        assert new_ids(second)[row] == by_hand(PROMPTS[row] + said[row] + more, 4)[0][: len(new_ids(second)[row])]
    np.testing.assert_array_equal(second.num, [4, 2, 4])


def test_a_bare_cache_goes_on_from_its_first_missing_token():
    _, cache = jaxinfer.prefill(PARAMS, CONFIG, np.array([PROMPTS[2][:4]]), jaxinfer.init_cache(CONFIG, 1, 64))
    result = generate([PROMPTS[2][4:]], cache=cache)
    assert new_ids(result)[0] == by_hand(PROMPTS[2], 12)[0]


def test_the_cache_holds_every_token_but_the_newest():
    result = generate(max_new_tokens=[3, 5, 12])
    np.testing.assert_array_equal(result.cache.length, [4 + 3 - 1, 1 + 5 - 1, 7 + 12 - 1])
    np.testing.assert_array_equal(result.state.length, result.cache.length + 1)
    for row, prompt in enumerate(PROMPTS):
        known = np.asarray(result.state.tokens[row, : result.state.length[row]]).tolist()
        assert known == prompt + new_ids(result)[row]


@pytest.mark.parametrize("at", range(6))
def test_a_stop_id_ends_its_own_row_where_it_comes(at):
    free = new_ids(generate())
    stop = [[free[0][at]], [], [free[2][0]]]
    result = generate(sampling=Sampling(temperature=0.0, stop_ids=stop))
    ends = free[0].index(free[0][at])
    assert new_ids(result) == [free[0][: ends + 1], free[1], free[2][:1]]
    np.testing.assert_array_equal(result.finish, [1, 2, 1])


def test_the_checkpoints_stop_ids_are_merged_in():
    free = new_ids(generate([PROMPTS[0]]))[0]
    config = CONFIG.replace(stop_ids=(free[4],))
    result = jaxinfer.generate(PARAMS, config, [PROMPTS[0]], max_new_tokens=12)
    assert new_ids(result)[0] == free[: free.index(free[4]) + 1]


def test_min_new_tokens_holds_the_stop_back():
    free = new_ids(generate([PROMPTS[0]]))[0]
    sampling = Sampling(temperature=0.0, stop_ids=[free[0]], min_new_tokens=4)
    assert int(generate([PROMPTS[0]], sampling=sampling).num[0]) > 4
    assert free[0] not in new_ids(generate([PROMPTS[0]], sampling=sampling))[0][:4]


def test_the_loop_ends_when_every_row_is_done():
    """Counted from inside the loop: 12 asked for, row 0 stops at 3, row 1 at 5."""
    calls = []

    def process(logits, state):
        jax.debug.callback(lambda: calls.append(1))
        return logits

    generate(PROMPTS[:2], max_new_tokens=[3, 5], process=process)
    jax.effects_barrier()
    assert len(calls) == 5


def test_a_changed_value_compiles_nothing():
    generate()
    before = run._cache_size()
    for settings in (
        {"temperature": 0.5},
        {"top_k": [1, 2, 3]},
        {"seed": 9, "min_new_tokens": 2},
        {"stop_ids": [4, 5]},
    ):
        generate(sampling=Sampling(**settings), max_new_tokens=[2, 9, 1], key=jax.random.key(5))
    generate([[1, 2, 3, 4, 5, 6, 7, 8], [1], [1, 2]])
    generate(sampling=Sampling(logit_bias={3: 2.0}, frequency_penalty=0.3, min_p=0.1))
    assert run._cache_size() == before


def test_a_custom_processor_and_a_custom_model_are_used():
    def never_even(logits, state):
        return jnp.where(jnp.arange(logits.shape[-1]) % 2 == 0, -jnp.inf, logits)

    assert all(i % 2 for row in new_ids(generate(process=never_even)) for i in row)
    table = jnp.roll(jnp.eye(101) * 9, 1, axis=1)  # after i comes i + 1
    result = jaxinfer.generate(table, CONFIG, [[3], [97, 98]], model=Table(), max_new_tokens=4)
    assert new_ids(result) == [[4, 5, 6, 7], [99, 100, 0, 1]]


def test_generation_composes_inside_the_callers_jit():
    def program(ids, num, budget):
        return jaxinfer.generate(PARAMS, CONFIG, ids, num=num, max_new_tokens=budget, buffer=16)

    ids = np.array([[5, 17, 99, 3, 0], [42, 0, 0, 0, 0]], np.int32)
    result = jax.jit(program)(ids, np.array([4, 1]), np.array([12, 12]))
    assert new_ids(result) == [by_hand(p, 12)[0] for p in PROMPTS[:2]]


def test_rows_without_a_budget_take_no_part():
    result = generate([[5, 17, 99, 3], []], max_new_tokens=[12, 0])
    assert new_ids(result) == [by_hand(PROMPTS[0], 12)[0], []]
    np.testing.assert_array_equal(result.cache.length, [15, 0])


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "row 0 has an empty prompt"),
        ([[1], [101]], {}, "row 1 has id 101 but the vocabulary ends at 100"),
        ([[1], [-5]], {}, "row 1 has id -5"),
        ([[1, 2, 3]], {"cache": 8}, "prompt has 3 tokens and 12 are to be made, but the cache holds 8"),
        ([[1], [2]], {"max_new_tokens": [1, 2, 3]}, r"max_new_tokens has shape \(3,\) but there are 2 rows"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"max_new_tokens": 0}, "row 0 has a prompt but max_new_tokens 0"),
        ([[1], [2]], {"cache": 64}, "ids have 2 rows but the cache has 1"),
    ],
)
def test_what_cannot_be_answered_rightly_is_refused(prompts, options, message):
    if "cache" in options:
        options = options | {"cache": jaxinfer.init_cache(CONFIG, 1, options["cache"])}
    with pytest.raises(ValueError, match=message):
        generate(prompts, **options)


def test_a_cache_is_filled_to_the_brim_and_not_beyond():
    result = generate([[1, 2, 3]], max_new_tokens=6, cache=jaxinfer.init_cache(CONFIG, 1, 8))
    assert new_ids(result)[0] == by_hand([1, 2, 3], 6)[0]
    assert int(result.cache.length[0]) == 8 and not result.cache.overflow.any()
    more = jax.jit(lambda s: jaxinfer.generate(PARAMS, CONFIG, state=s, max_new_tokens=3, buffer=4))(result.state)
    assert int(more.num[0]) == 0  # nothing fits: nothing is made


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    params, config = tiny_model(vocab_size=256, num_layers=2)
    return params, config, byte_tokenizer(tmp_path_factory.mktemp("bytes"))


TEXTS = ["naïve 🙂 café", "日本語", "x"]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("chunk", "prefill_chunk"), [(1, 512), (5, 4), (8, 3), (64, 1)])
def test_streaming_equals_not_streaming(bytes_model, settings, chunk, prefill_chunk):
    params, config, tokenizer = bytes_model
    sampling = Sampling(**settings, seed=[1, 2, 3])
    prompts = [tokenizer.encode(text) for text in TEXTS]
    whole = jaxinfer.generate(params, config, prompts, sampling=sampling, max_new_tokens=[30, 17, 3])
    flow = jaxinfer.stream(
        params, config, tokenizer, TEXTS, sampling=sampling, max_new_tokens=[30, 17, 3], chunk=chunk,
        prefill_chunk=prefill_chunk,
    )  # fmt: skip
    deltas = list(flow)
    assert flow.ids == new_ids(whole)
    for row, ids in enumerate(new_ids(whole)):
        mine = [delta for delta in deltas if delta.row == row]
        assert "".join(delta.text for delta in mine) == flow.text[row] == tokenizer.decode(ids)
        assert [i for delta in mine for i in delta.ids] == ids
        assert [delta.finish for delta in mine] == [None] * (len(mine) - 1) + ["length"]
        np.testing.assert_allclose(flow.logprobs[row], whole.logprobs[row, : len(ids)], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_a_stop_string_cut_across_tokens_ends_its_row_and_is_never_given(bytes_model, chunk):
    """A table that spells a text byte by byte: the answer is known beforehand."""
    params, config, tokenizer = bytes_model
    text = "abc→déf🙂ghi"
    spelled = text.encode()
    assert len(set(spelled)) == len(spelled)  # each byte has one successor
    table = np.zeros((256, 256), np.float32)
    table[list(spelled[:-1]), list(spelled[1:])] = 9
    for stop, answer in [("🙂", "bc→déf"), ("f🙂g", "bc→dé"), ("→", "bc"), ("bc→déf🙂ghi!", None), ("é", "bc→d")]:
        flow = jaxinfer.stream(
            jnp.asarray(table), config, tokenizer, ["a", "c"], model=Table(), stop=[stop], max_new_tokens=20,
            chunk=chunk,
        )  # fmt: skip
        pieces = [delta.text for delta in flow if delta.row == 0]
        if answer is None:
            assert flow.text[0].startswith("bc→déf🙂ghi") and flow.finish[0] == "length"
            continue
        assert "".join(pieces) == flow.text[0] == answer
        assert flow.finish[0] == "stop"
        used = spelled[1 : spelled.index(stop.encode()) + len(stop.encode())]
        assert bytes(flow.ids[0]) == used
        assert int(flow.state.length[0]) == 1 + len(used) == int(flow.state.cache.length[0]) + 1


def test_a_stream_goes_on_where_the_last_one_stopped(bytes_model):
    params, config, tokenizer = bytes_model
    first = jaxinfer.stream(params, config, tokenizer, ["hello"], max_new_tokens=9, size=128)
    list(first)
    second = jaxinfer.stream(params, config, tokenizer, ["more"], state=first.state, max_new_tokens=5)
    list(second)
    prompt = tokenizer.encode("hello") + first.ids[0] + tokenizer.encode("more")
    whole = jaxinfer.generate(params, config, [prompt], max_new_tokens=5)
    assert second.ids == new_ids(whole)


def test_the_stop_id_is_kept_among_the_ids_and_left_out_of_the_text(bytes_model):
    params, config, tokenizer = bytes_model
    free = new_ids(jaxinfer.generate(params, config, [tokenizer.encode("hey")], max_new_tokens=9))[0]
    sampling = Sampling(temperature=0.0, stop_ids=[free[6]])
    flow = jaxinfer.stream(params, config, tokenizer, ["hey"], sampling=sampling, max_new_tokens=9)
    list(flow)
    end = free.index(free[6])
    assert flow.ids[0] == free[: end + 1] and flow.finish == ["stop"]
    assert flow.text[0] == tokenizer.decode(free[:end])
