"""A draft head: the target's features in, guesses at the next ones out, and whose head it is."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import models, weights
from jaxinfer.cache import init_cache
from jaxinfer.config import NormSpec
from jaxinfer.mesh import make_mesh, shard
from jaxinfer.testing.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
B, T = 2, 7
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 101, (B, T)))  # of the tokens after the features


def random_head(config, seed=5):
    """A head of which every array is drawn anew: a norm of one hides that it is not multiplied by."""
    draw = np.random.default_rng(seed).normal

    def one(leaf):
        return jnp.asarray(0.3 * draw(size=leaf.shape) + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(one, models.head_shapes(config))


def run(params, config, target, target_config, ids, hidden, kind="none", start=0, cache=None):
    """(g, cache) of slots from `start` on."""
    rows, count = ids.shape
    cache = cache or init_cache(config, rows=rows, size=16, kind=kind, dtype=jnp.float32, max_pending=count)
    step = cache.step(jnp.full(rows, count), count, start=jnp.full(rows, start))
    return models.head(params, config, target, target_config, ids, hidden, cache, step)


@pytest.fixture(scope="module")
def both():
    """(target, its config, head, its config, features [B, T, D])."""
    target, config = tiny_model(window=3, softcap=20.0)
    head_config = models.head_config(config)
    hidden = jax.random.normal(jax.random.key(3), (B, T, config.width)) * 4
    return target, config, random_head(head_config), head_config, hidden


def test_a_head_is_one_layer_like_the_last_without_a_window(both):
    _, config, params, head_config, _ = both
    assert head_config.layers == (config.layers[-1].replace(window=None),)
    assert (head_config.vocab_size, head_config.width, head_config.norm) == (101, 36, config.norm)
    assert jax.tree.structure(params) == jax.tree.structure(models.head_letters(head_config))
    for word, leaf in zip(jax.tree.leaves(models.head_letters(head_config)), jax.tree.leaves(params), strict=True):
        assert len(word) == leaf.ndim
    assert params["fuse_embed"].shape == params["fuse_hidden"].shape == (36, 36)


def test_the_head_is_what_its_definition_says(both):
    """In numpy: two norms, two matrices, their sum through the target's kind of layer."""
    target, config, params, head_config, hidden = both

    def rms(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm.eps) * np.asarray(scale, np.float64)

    words = rms(np.asarray(target["embed"], np.float64)[IDS], params["embed_norm"]["scale"])
    x = rms(np.asarray(hidden, np.float64), params["hidden_norm"]["scale"]) @ np.asarray(params["fuse_hidden"]).T
    x = jnp.asarray(x + words @ np.asarray(params["fuse_embed"]).T, jnp.float32)
    cache = init_cache(head_config, rows=B, size=T, kind="none")
    alone = {"layers": params["layers"]}
    (wanted, _), _ = models.decoder(alone, head_config, IDS, cache, cache.step(jnp.full(B, T), T), hidden=x)
    g, _ = run(params, head_config, target, config, IDS, hidden)
    np.testing.assert_allclose(g, wanted, atol=1e-4)
    scores = models.head_logits(params, target, config, g)
    np.testing.assert_allclose(scores, models.logits(target | {"norm": params["norm"]}, config, g), atol=0)
    assert scores.shape == (B, T, 101) and scores.dtype == jnp.float32
    assert np.abs(scores - models.logits(target, config, g)).max() > 0.1  # the target's own norm is not what is used


@pytest.mark.parametrize("what", ["token", "feature"])
def test_the_head_sees_only_the_past(both, what):
    target, config, params, head_config, hidden = both
    before, _ = run(params, head_config, target, config, IDS, hidden)
    ids, other = (IDS.at[:, 4].add(1), hidden) if what == "token" else (IDS, hidden.at[:, 4].multiply(-1))
    after, _ = run(params, head_config, target, config, ids, other)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.abs(before[:, 4:] - after[:, 4:]).max((0, 2)) > 1e-3)  # there is no window: slot 6 sees slot 4


def test_slot_by_slot_with_a_cache_equals_all_at_once(both):
    target, config, params, head_config, hidden = both
    whole, _ = run(params, head_config, target, config, IDS, hidden)
    cache = init_cache(head_config, rows=B, size=16, dtype=jnp.float32)
    for slot in range(T):
        here = slice(slot, slot + 1)
        g, cache = run(params, head_config, target, config, IDS[:, here], hidden[:, here], start=slot, cache=cache)
        cache = cache.advance(jnp.ones(B, jnp.int32))
        np.testing.assert_allclose(g, whole[:, here], atol=1e-4)


def test_learned_positions_are_not_added_a_second_time():
    target, config = tiny_model(rope=None)
    config = config.replace(num_positions=32)
    target["positions"] = jax.random.normal(jax.random.key(2), (32, config.width))
    head_config = models.head_config(config)
    params, hidden = random_head(head_config), jax.random.normal(jax.random.key(3), (B, T, config.width))
    g, _ = run(params, head_config, target, config, IDS, hidden)
    target["positions"] = target["positions"] * 100
    np.testing.assert_array_equal(g, run(params, head_config, target, config, IDS, hidden)[0])


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_head_on_a_mesh_says_the_same(both, tmp_path, tensor):
    """2 divides the KV heads, 4 neither them nor anything else: what is repeated and padded changes nothing."""
    target, config, params, head_config, hidden = both
    wanted, _ = run(params, head_config, target, config, IDS, hidden)
    score = models.head_logits(params, target, config, wanted)
    weights.save_head(tmp_path / "head", params, head_config, "x")
    params, _, _ = weights.load_head(tmp_path / "head", jnp.float32)  # rounded to bfloat16, as it is on disk
    wanted, _ = run(params, head_config, target, config, IDS, hidden)
    score = models.head_logits(params, target, config, wanted)
    with jax.set_mesh(make_mesh({"data": 2, "tensor": tensor})):
        target, config = models.arrange(target, config)
        target = shard(target, models.letters(config))
        here, here_config, _ = weights.load_head(tmp_path / "head", jnp.float32)
        assert here_config == models.head_config(config).replace(dtype="float32")
        assert here["layers"][0]["q"].sharding.spec[0] == "tensor"
        g, _ = jax.jit(run, static_argnums=(1, 3))(here, here_config, target, config, IDS, hidden)
        found = models.head_logits(here, target, config, g)
        np.testing.assert_allclose(g, wanted, atol=1e-4)
        np.testing.assert_allclose(found[..., :101], score, atol=1e-3)
        drawn = models.init_head(here_config, jax.random.key(1))
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, here)
        weights.save_head(tmp_path / "again", here, here_config, "x")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "head" / name).read_bytes()


def test_a_fingerprint_names_sizes_and_weights_but_not_their_dtype():
    target, config = tiny_model()
    name = models.fingerprint(target, config)
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), target)
    digest = hashlib.sha256(
        np.asarray(rounded["norm"]["scale"]).tobytes() + np.asarray(rounded["embed"][:16]).tobytes()
    )
    assert name == f"D36-V101-L2-{digest.hexdigest()[:12]}"
    assert models.fingerprint(rounded, config.replace(dtype="bfloat16")) == name
    assert models.fingerprint(target | {"embed": target["embed"].at[3, 3].add(1)}, config) != name
    assert models.fingerprint(target | {"norm": {"scale": target["norm"]["scale"] * 2}}, config) != name


def test_a_fingerprint_is_the_same_on_a_mesh_that_pads_the_vocabulary():
    for vocab_size in (101, 13):  # 13: fewer rows than a fingerprint looks at
        target, config = tiny_model(vocab_size=vocab_size)
        name = models.fingerprint(target, config)
        with jax.set_mesh(make_mesh({"tensor": 4})):
            target, config = models.arrange(target, config)
            assert config.vocab_rows > vocab_size
            assert models.fingerprint(shard(target, models.letters(config)), config) == name


# --- on disk ------------------------------------------------------------------------------------------------------


def test_a_saved_head_comes_back(both, tmp_path):
    _, _, params, config, _ = both
    weights.save_head(tmp_path / "head", params, config, "D36-V101-L2-0123456789ab")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "head", "model.safetensors"]
    found, found_config, target = weights.load_head(tmp_path / "head")
    assert found_config == config.replace(dtype="bfloat16") and target == "D36-V101-L2-0123456789ab"
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, params)
    found, found_config, _ = weights.load_head(tmp_path / "head", jnp.float32)
    assert found_config == config and found["norm"]["scale"].dtype == jnp.float32


def test_a_layer_norm_keeps_its_bias(tmp_path):
    _, config = tiny_model(norm=NormSpec(kind="layer"), qkv_bias=True, out_bias=True, gated=False, ffn_bias=True)
    config = models.head_config(config)
    params = random_head(config)
    weights.save_head(tmp_path / "head", params, config, "x")
    found, _, _ = weights.load_head(tmp_path / "head")
    np.testing.assert_array_equal(found["hidden_norm"]["bias"], params["hidden_norm"]["bias"].astype(jnp.bfloat16))


def test_a_head_that_is_saved_again_replaces_the_old_one_and_nothing_else(both, tmp_path):
    _, _, params, config, _ = both
    weights.save_head(tmp_path / "head", params, config, "old")
    weights.save_head(tmp_path / "head", params, config, "new")
    assert weights.load_head(tmp_path / "head")[2] == "new"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no head: save into an empty directory"):
        weights.save_head(tmp_path / "notes", params, config, "x")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"


def spoil(name, old, new):
    """A change of a file: other bytes in the place of some, or, where there are none, its end cut off."""

    def change(directory):
        data = (directory / name).read_bytes()
        assert old in data
        (directory / name).write_bytes(data.replace(old, new) if old else data[:-10])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("config.json", b"jaxinfer_head", b"qwen3"), "is no draft head"),
        (spoil("config.json", b'"version": 1', b'"version": 2'), "of version 2, not 1"),
        (spoil("config.json", b'"width": 36', b'"width": 40'), "config.json asks for"),
        (spoil("config.json", b"", b""), "is not JSON"),
        (spoil("model.safetensors", b"", b""), "truncated"),
        (spoil("model.safetensors", b"fuse_embed", b"fuse_embad"), "lacks tensor"),
        (lambda directory: (directory / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_what_is_no_head_is_refused_in_one_line(both, tmp_path, change, message):
    _, _, params, config, _ = both
    weights.save_head(tmp_path / "head", params, config, "x")
    change(tmp_path / "head")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        weights.load_head(tmp_path / "head")
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        weights.load_head(tmp_path / "nowhere")
