"""What the compiled programs send between devices, family by family and mesh by mesh: this much and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CASES, hf_config

import jaxinfer
from jaxinfer import mesh, models, program
from jaxinfer.cache import init_cache
from jaxinfer.decoding import Decoder, State
from jaxinfer.decoding.generate import run
from jaxinfer.sampling import choose, process
from jaxinfer.testing import collectives_of, device_bytes, tiny_config

pytestmark = pytest.mark.usefixtures("compiled_to_be_read")
ROWS = 4
SPLIT = ("tensor=2", "tensor=8", "data=2,tensor=4", "seq=4", "seq=2,tensor=2")
GREEDY, FILTERED = jaxinfer.Sampling(temperature=0.0), jaxinfer.Sampling(temperature=0.8, top_k=40, top_p=0.9)


@functools.cache
def config_of(family):
    """A tiny config; only families whose layers differ on a mesh are worth a compile each."""
    return models.config_from_hf(hf_config(family, next(iter(CASES[family]))).to_dict())


def placed(config, size=64, **options):
    """(arranged config, params, cache) on the ambient mesh; what the params are does not matter here."""
    wide = models.arrange_config(config)
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), models.param_shapes(wide))
    params = mesh.shard(params, models.letters(wide))
    return wide, params, init_cache(wide, ROWS, size, **options)


def lying(tree, words):
    """A tree of shapes that lie as their letters say on the ambient mesh."""
    places = mesh.shardings(words, mesh.concrete())
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)


def shapes(config, size=64):
    """`placed`, abstract: nothing is drawn."""
    wide = models.arrange_config(config)
    letters = models.letters(wide)
    cache = jax.eval_shape(lambda: init_cache(wide, ROWS, size))

    return wide, lying(models.param_shapes(wide), letters), lying(cache, cache.letters())


def step_program(config, size=64):
    wide, params, cache = shapes(config, size)
    return wide, jaxinfer.decode_step.lower(params, wide, jnp.arange(ROWS), cache).compile()


def loop_program(config, sampling, size=64):
    wide, params, cache = shapes(config, size)
    state = jax.eval_shape(State.init, cache)
    state = lying(state, state.letters())
    static = {"model": Decoder(wide), "process": None, "buffer": 16}
    laid_out = sampling.rows(ROWS, wide.vocab_size)
    budget = np.full(ROWS, 8, np.int32)
    return run.lower(params, state, None, None, laid_out, budget, jax.random.key(0), **static).compile()


def sent(compiled, loop=False, cheapest=True):
    """{kind: (count, bytes)} of a step; of a loop's body with `loop`."""
    return {
        row["kind"]: (row["count"], row["bytes"])
        for row in program.collectives(compiled, cheapest)
        if bool(row["loop"]) == loop
    }


def promised(config, axes, loop):
    """{kind: count} of a decode step (or of one trip of the loop, with the draw and the question who still runs)."""
    split = mesh.parse_axes(axes)
    tensor, seq, data = (split.get(name, 1) > 1 for name in ("tensor", "seq", "data"))
    layers, whole = len(config.layers), sum(spec.window is None for spec in config.layers)
    # two a layer (o and down), three for a softmax over split slots (a ring's are not split); embedding
    reduces = layers * 2 * tensor + whole * 3 * seq + tensor
    reduces += tensor * sum(spec.qk_norm == "projection" for spec in config.layers)  # both norms in one
    reduces += loop and data
    # the door cuts the padding off its logits; the draw joins the devices' candidates
    return {"all-reduce": reduces} | ({"all-gather": 1} if tensor else {})


def promised_bytes(wide, axes):
    """Bytes of a decode step's all-reduces; sums are float32.

    | where                                 | axis   | how many      | floats a row                      |
    |---------------------------------------|--------|---------------|-----------------------------------|
    | embedding                             | tensor | one           | D                                 |
    | o, down                               | tensor | two a layer   | D each                            |
    | norms over the projections of q and k | tensor | one a layer   | 2 (olmo2 alone)                   |
    | softmax over split slots (no ring's)  | seq    | three a layer | N, N and N x H, of the device's N |
    (the last twice where N = K: a lone query is multiplied as two)
    """
    split = mesh.parse_axes(axes)
    tensor, seq, data = (split.get(name, 1) for name in ("tensor", "seq", "data"))
    floats = wide.width * (tensor > 1)
    for spec in wide.layers:
        floats += 2 * wide.width * (tensor > 1)
        floats += 2 * (tensor > 1 and spec.qk_norm == "projection")
        alone = 1 + (spec.num_heads == spec.num_kv_heads)  # a lone query is multiplied as two
        floats += alone * spec.num_heads // tensor * (spec.head_width + 2) * (seq > 1 and spec.window is None)
    return 4 * ROWS // data * floats


FAMILIES = [family for family in CASES if family != "gemma3"]  # its text part is gemma3_text


@pytest.mark.parametrize(
    ("family", "axes"),
    # every family, every mesh, and both for those whose layers say something of their own on a mesh
    [(family, axes) for i, family in enumerate(FAMILIES) for j, axes in enumerate(SPLIT)
     if family in ("llama", "olmo2", "gpt2") or i % len(SPLIT) == j],
)  # fmt: skip
def test_a_decode_step_sends_what_its_layers_must(family, axes, on_mesh):
    config = config_of(family)
    with on_mesh(axes) as devices:
        wide, compiled = step_program(config)
        found = sent(compiled)
    assert {kind: count for kind, (count, _) in found.items()} == promised(config, axes, loop=False)
    assert found["all-reduce"][1] == promised_bytes(wide, axes)
    assert found.get("all-gather", (0, 0))[1] <= ROWS // mesh.size_of("B", devices) * wide.padded_vocab * 4


@pytest.mark.full
@pytest.mark.parametrize("axes", SPLIT)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_mesh_sends_what_its_layers_must(family, axes, on_mesh):
    with on_mesh(axes):
        found = sent(step_program(config_of(family))[1])
    assert {kind: count for kind, (count, _) in found.items()} == promised(config_of(family), axes, loop=False)


@pytest.mark.parametrize("axes", SPLIT)
def test_one_token_of_the_loop_sends_what_its_layers_must_and_one_draw(axes, on_mesh):
    config = config_of("olmo2")
    with on_mesh(axes):
        found = sent(loop_program(config, GREEDY), loop=True)
    assert {kind: count for kind, (count, _) in found.items()} == promised(config, axes, loop=True)


def test_a_draw_with_every_filter_sends_at_most_four_things(on_mesh):
    """In the usual case: the loops that search below the best 128 of each device are another matter, and counted so."""
    with on_mesh("tensor=8"):

        def draw(logits, sampling, tokens, length):
            chosen = process(logits, sampling, tokens, length, length)
            return choose(chosen, logits, sampling, jax.random.key(0), length)

        logits, tokens = jnp.zeros((ROWS, 4096)), jnp.zeros((ROWS, 16), jnp.int32)
        laid_out = jaxinfer.Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, presence_penalty=1.0).rows(ROWS)
        compiled = jax.jit(draw).lower(logits, laid_out, tokens, jnp.zeros(ROWS, jnp.int32)).compile()
    usual = [row for row in program.collectives(compiled) if row["loop"] is None]
    assert 0 < sum(row["count"] for row in usual) <= 4
    assert sum(row["bytes"] for row in usual) < ROWS * 8 * 140 * 4, "128 candidates a device, and little more"


@pytest.mark.parametrize("axes", SPLIT)
def test_a_device_holds_its_part_of_weights_and_cache_and_no_more(axes, on_mesh):
    config = tiny_config(num_heads=6, num_kv_heads=2, head_width=10, ffn_width=51, vocab_size=101)
    split = mesh.parse_axes(axes)
    tensor, seq, data = (split.get(name, 1) for name in ("tensor", "seq", "data"))
    with on_mesh(axes):
        wide, params, cache = placed(config)
        held = {word: 0 for word in ("K", "V", "D")}
        for leaf, word in zip(jax.tree.leaves(params), jax.tree.leaves(models.letters(wide)), strict=True):
            parts = tensor if set(word) & set("NKFV") else 1
            assert device_bytes(leaf) * parts == leaf.nbytes, word
            held["K" if "K" in word else "V" if "V" in word else "D"] += device_bytes(leaf)
        repeat = np.lcm(2, tensor) // 2
        kv = 2 * len(config.layers) * 2 * 10 * config.width * 4  # k and v of all layers, canonical
        assert held["K"] * tensor == kv * repeat
        assert device_bytes(cache.layers) * tensor * seq * data == (
            2 * len(config.layers) * ROWS * 2 * 64 * 10 * 4 * repeat
        )


@pytest.mark.parametrize("axes", ["tensor=2", "data=2,tensor=4", "seq=2,tensor=2"])
def test_the_loop_holds_one_cache_a_device_and_not_two(axes, on_mesh):
    config = tiny_config(num_layers=2, num_heads=4, num_kv_heads=4, head_width=64)
    with on_mesh(axes):
        memory = program.temporaries(loop_program(config, FILTERED, size=4096))
        cache = device_bytes(placed(config, 4096)[2].layers)
    assert memory["alias"] >= cache
    assert memory["temp"] < cache / 2


@pytest.mark.usefixtures("quickly_compiled")
def test_a_step_compiles_once_whatever_comes_back(on_mesh):
    """The state that a dispatch gives lies as the one that it took: going on compiles nothing."""
    config = tiny_config()
    with on_mesh("data=2,tensor=4"):
        wide, params, _ = placed(config)
        result = jaxinfer.generate(params, wide, [[1, 2], [3], [4]], max_new_tokens=4, buffer=8)
        again = jaxinfer.generate(params, wide, state=result.state, max_new_tokens=4, buffer=8)
        before = run._cache_size()  # pyright: ignore
        for _ in range(3):
            again = jaxinfer.generate(params, wide, state=again.state, max_new_tokens=4, buffer=8)
        assert run._cache_size() == before


# --- the laws can be broken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["q", "k", "o", "up", "down", "head"])
def test_a_sharding_mistake_is_found(leaf, on_mesh, monkeypatch):
    """One kind of weight lies whole on every device: its bytes show it, or what is sent does."""
    monkeypatch.setitem(mesh.OVERRIDES, leaf, dict.fromkeys("NKFV"))
    jax.clear_caches()
    config = tiny_config()
    with on_mesh("tensor=8"):
        wide, params, cache = placed(config)
        whole = [
            word
            for x, word in zip(jax.tree.leaves(params), jax.tree.leaves(models.letters(wide)), strict=True)
            if set(word) & set("NKFV") and device_bytes(x) * 8 != x.nbytes
        ]
        count = collectives_of(jaxinfer.decode_step, params, wide, jnp.arange(ROWS), cache)
    assert whole or count != promised(config, "tensor=8", loop=False)


def test_a_cache_that_is_split_otherwise_than_its_heads_is_found(on_mesh):
    """Slots where heads should be: the compiler gathers the cache, or sends as much as one."""
    with on_mesh("tensor=4") as devices:
        config = tiny_config(num_heads=4, num_kv_heads=4)
        wide, params, cache = placed(config)
        wrong = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(None, None, "tensor"))
        cache = cache.replace(layers=jax.device_put(cache.layers, wrong))
        compiled = jaxinfer.decode_step.lower(params, wide, jnp.arange(ROWS), cache).compile()
        count = {kind: n for kind, (n, _) in sent(compiled).items()}
    assert count != promised(config, "tensor=4", loop=False)
