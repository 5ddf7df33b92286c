"""Every family against transformers: tiny random models, everything redrawn, odd sizes, ragged rows (DESIGN.md 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compiling import quickly
from tiny_models import CASES, VOCAB, write_checkpoint

import jaxinfer
from jaxinfer import models

NUM = np.array([19, 7, 1, 12])  # rows of different lengths, right-padded; all but one longer than the windows
NEW = 32
OPTIMIZED = ("llama", "gemma3_text", "gpt2")
TIE = 1e-4  # two scores nearer than this are a tie, and either id is right


@pytest.fixture
def compiled(family, variant):
    """A few plain variants are compiled as users compile them, the others quickly."""
    with quickly(not (variant == "plain" and family in OPTIMIZED)):
        yield


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("family", "variant"), [(f, v) for f, variants in CASES.items() for v in variants])
def test_family_matches_transformers(family, variant, tmp_path):
    """Prefill logits of every position, then 32 greedy steps with the cache: logits and ids."""
    reference = write_checkpoint(tmp_path, family, variant)
    ids = np.random.default_rng(0).integers(0, VOCAB, (len(NUM), NUM.max()))
    prefilled, stepped, greedy = run_reference(reference, ids)
    valid = np.arange(ids.shape[1]) < NUM[:, None]
    assert 1 < np.abs(prefilled[valid]).max() < 20, "logits must be of order 1 to 10 for 1e-4 to mean something"

    params, config = jaxinfer.load(tmp_path, dtype=jnp.float32)
    cache = jaxinfer.init_cache(config, rows=len(NUM), size=int(NUM.max()) + NEW)
    logits, cache = jaxinfer.forward(params, config, jnp.asarray(ids), cache, num=jnp.asarray(NUM))
    np.testing.assert_allclose(np.asarray(logits)[valid], prefilled[valid], atol=1e-4, rtol=0)
    assert not np.asarray(logits)[~valid].any(), "a pad's logits are zeros"

    scores = np.asarray(logits)[np.arange(len(NUM)), NUM - 1]
    for step in range(NEW):
        np.testing.assert_allclose(scores, stepped[step], atol=1e-4, rtol=0, err_msg=f"step {step}")
        check_ids(scores, greedy[:, step], step)
        scores, cache = jaxinfer.decode_step(params, config, jnp.asarray(greedy[:, step]), cache)
        scores = np.asarray(scores)


def run_reference(model, ids):
    """(logits [B, T, V] without a cache, logits [NEW, B, V] and ids [B, NEW] of `generate` with one)."""
    with torch.no_grad():
        prefilled = model(torch.from_numpy(ids)).logits.numpy()
        # generate wants the rows left-padded
        left, mask = np.zeros_like(ids), np.zeros_like(ids)
        for row, num in enumerate(NUM):
            left[row, -num:], mask[row, -num:] = ids[row, :num], 1
        out = model.generate(
            torch.from_numpy(left),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    stepped = np.stack([score.numpy() for score in out.logits])
    return prefilled, stepped, out.sequences[:, -NEW:].numpy()


def check_ids(scores, expected, step):
    """The best id of each row is the reference's, ties apart; the caller goes on with the reference's."""
    best = scores.argmax(-1)
    for row in np.flatnonzero(best != expected):
        lead = scores[row, best[row]] - scores[row, expected[row]]
        assert lead < TIE, f"row {row} step {step}: {best[row]} leads {expected[row]} by {lead}"
        print(f"tie in row {row} at step {step}: {best[row]} and {expected[row]}")


def test_reference_is_run_in_float32_without_fused_attention(tmp_path):
    model = write_checkpoint(tmp_path, "llama")
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert jax.config.jax_enable_x64 is False


# --- the law has teeth -------------------------------------------------------------------------------------------


def mistakes(config):
    """Configs that differ from a right one in what a recipe can get wrong, with their names."""

    def all_layers(**change):
        return config.replace(layers=tuple(spec.replace(**change) for spec in config.layers))

    def each(change):
        return config.replace(layers=tuple(change(spec) for spec in config.layers))

    def ropes(change):
        return each(lambda spec: spec.replace(rope=spec.rope and change(spec.rope)))

    layer = config.layers[0]
    other = {"silu": "gelu", "gelu_tanh": "silu", "gelu": "relu", "relu": "gelu"}
    if any(spec.window for spec in config.layers):
        yield "a window wider by one", each(lambda spec: spec.replace(window=spec.window and spec.window + 1))
        yield "a window narrower by one", each(lambda spec: spec.replace(window=spec.window and spec.window - 1))
        yield "windows on the other layers", each(lambda spec: spec.replace(window=None if spec.window else 5))
    if any(spec.rope for spec in config.layers):
        yield (
            "another base",
            ropes(lambda rope: rope.replace(frequency=tuple(f ** (1 + 0.1 * (f < 1)) for f in rope.frequency))),
        )
        yield "half of the positions", ropes(lambda rope: rope.replace(frequency=tuple(f / 2 for f in rope.frequency)))
        yield "a rope that scales", ropes(lambda rope: rope.replace(scale=rope.scale * 1.01))
        yield "no rope", all_layers(rope=None)
    if any(spec.rope is None for spec in config.layers) and layer.rope:
        yield "rope on every layer", all_layers(rope=layer.rope)
    if len({spec.rope for spec in config.layers if spec.rope}) > 1:
        yield "one rope for all layers", all_layers(rope=layer.rope)
    if layer.qk_norm != "none":
        yield "no norm on q and k", all_layers(qk_norm="none")
    if layer.softcap:
        yield "no softcap on scores", all_layers(softcap=None)
    if config.softcap:
        yield "no softcap on logits", config.replace(softcap=None)
    if config.embed_scale != 1:
        yield "embeddings unscaled", config.replace(embed_scale=1.0)
    if config.num_positions:
        yield "no learned positions", config.replace(num_positions=0)
    if layer.post_norm:
        yield "no norm behind", all_layers(post_norm=False)
    if layer.pre_norm:
        yield "no norm before", all_layers(pre_norm=False)
    yield "another scale", all_layers(scale=layer.scale * 1.01)
    yield "another activation", all_layers(activation=other[layer.activation])
    yield "another epsilon", all_layers(norm=layer.norm.replace(eps=1e-6))
    yield "another last epsilon", config.replace(norm=config.norm.replace(eps=1e-6))
    if layer.norm.kind == "rms":
        yield "another offset", all_layers(norm=layer.norm.replace(offset=0.5))


def misplaced(params):
    """Params with arrays in the wrong place, with their names."""

    def each(change):
        return params | {"layers": tuple(layer | change(layer) for layer in params["layers"])}

    layer = params["layers"][0]
    yield "k and v exchanged", each(lambda p: {"k": p["v"], "v": p["k"]})
    yield "query heads in another order", each(lambda p: {"q": p["q"][::-1]})
    if "gate" in layer:
        yield "gate and up exchanged", each(lambda p: {"gate": p["up"], "up": p["gate"]})
    for name in layer:
        if name.endswith("_bias") and name != "k_bias":  # without rope a bias of k changes no softmax
            yield f"no {name}", each(lambda p, name=name: {name: 0 * p[name]})


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("family", [family for family in CASES if family != "gemma3"])
def test_a_planted_mistake_moves_the_logits(family, tmp_path):
    write_checkpoint(tmp_path, family)
    params, config = jaxinfer.load(tmp_path, dtype=jnp.float32)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (1, 19)))

    def run(params, config):
        cache = jaxinfer.init_cache(config, rows=1, size=ids.shape[1], kind="none")
        step = cache.step(jnp.array([ids.shape[1]]), ids.shape[1])
        (hidden, _), _ = models.decoder(params, config, ids, cache, step)
        return np.asarray(models.logits(params, config, hidden))

    right = run(params, config)
    moved = {name: np.abs(run(params, wrong) - right).max() for name, wrong in mistakes(config)}
    moved |= {name: np.abs(run(wrong, config) - right).max() for name, wrong in misplaced(params)}
    assert len(moved) > 6
    assert {name: size for name, size in moved.items() if not size > 1e-3} == {}
