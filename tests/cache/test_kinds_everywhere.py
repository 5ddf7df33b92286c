"""Every kind of cache in every loop, family and mesh: the ids it promises."""

import functools
import itertools
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from covering import covering

import jaxinfer
from jaxinfer import mesh, models
from jaxinfer.speculation import LayersDraft, ModelDraft, NGram, speculate
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41], [11, 12, 13], [20]]
NEW, SIZE, PENDING = 24, 64, 9
FAMILIES = {
    "llama": {},
    "gemma2": {"window": 6, "softcap": 20.0, "post_norm": True, "activation": "gelu_tanh"},
    "gpt2": {"rope": None, "gated": False, "qkv_bias": True, "ffn_bias": True, "num_kv_heads": 6, "activation": "gelu"},
    "olmo2": {"qk_norm": "projection", "pre_norm": False, "post_norm": True},
}
LOSSLESS = ("auto", "paged:page=4", "paged:page=16")
TABLE = {  # what must go together
    **dict.fromkeys(
        ("auto", "dense", "ring:window=12", "ring:window=33", "paged:page=8"),
        ("", "+int8", "+float8", "+int4:group=8,residual=16"),
    ),
    "ring:window=9,sinks=3": ("", "+int8", "+float8"),
    **dict.fromkeys(
        ("streaming:sinks=3,recent=9", "h2o:budget=12,recent=5", "snapkv:budget=12,window=4"), ("", "+int8")
    ),
}
MESHES = ("", "tensor=2", "data=2", "data=2,tensor=2")
DRAFTS = ("", "ngram", "model", "layers")


@functools.cache
def target(family):
    """(params, config); one layer of gemma2 has a window and one has not. Others are checkpoints of real families."""
    if family not in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            tiny_models.write_checkpoint(pathlib.Path(directory), family, "plain")
            return jaxinfer.load(directory, dtype=jnp.float32)
    params, config = tiny_model(num_layers=2, **FAMILIES[family])
    if family == "gemma2":
        first, second = config.layers
        config = config.replace(layers=(first, second.replace(window=None)), softcap=10.0, embed_scale=6.0)
    return params, config


def make_draft(name, params, config):
    return {
        "ngram": NGram,
        "model": lambda: ModelDraft(params, config),
        "layers": lambda: LayersDraft(params, config, 1),
    }[name]()


def say(kind, family, on_mesh, axes="", draft="", J=4, new=NEW, size=SIZE):
    """The ids of all rows together."""
    target(family)  # made without the mesh
    with on_mesh(axes):
        params, config = target(family)
        if axes:
            params, config = models.arrange(params, config)
            params = mesh.shard(params, models.letters(config))
        cache = jaxinfer.init_cache(config, len(PROMPTS), size, kind, max_pending=PENDING)
        if not draft:
            result = jaxinfer.generate(params, config, PROMPTS, cache=cache, max_new_tokens=new)
        else:
            drafts = make_draft(draft, params, config)
            result = speculate(
                params, config, PROMPTS, draft=drafts, num_draft_tokens=J, cache=cache, max_new_tokens=new
            )
        assert not np.asarray(result.cache.overflow).any()
        return np.asarray(result.ids)


@functools.cache
def alone(kind, family, new=NEW, size=SIZE):
    """What generate says with this kind on one device, each row by itself."""
    params, config = target(family)
    rows = []
    for prompt in PROMPTS:
        cache = jaxinfer.init_cache(config, 1, size, kind, max_pending=PENDING)
        ids = np.pad(np.array([prompt]), ((0, 0), (0, 24 - len(prompt))))  # the width they have together
        result = jaxinfer.generate(params, config, ids, num=np.array([len(prompt)]), cache=cache, max_new_tokens=new)
        rows.append(np.asarray(result.ids)[0])
    return np.stack(rows)


AXES = ("family", "axes", "draft", "J")


def cases(lengths=(1, 4, 8), families=tuple(FAMILIES), meshes=MESHES, drafts=DRAFTS):
    """What every kind meets."""
    return itertools.product(families, meshes, drafts, lengths)


WINDOWED = ("mistral", "gemma3_text")  # checkpoints, beside the manners of gemma2
ALL_LOCAL = ("mistral",)  # every layer has a window, so that no pages are wanted
LONG = {"new": 200, "size": 256}
LOSSLESS_CASES = [
    (kind, *case) for kind, case in itertools.product(LOSSLESS, cases(families=(*FAMILIES, *WINDOWED)))
    if not (kind.startswith("paged") and case[0] in ALL_LOCAL)
]  # fmt: skip
TABLE_CASES = [(*kind, *case) for kind, case in itertools.product(
    [(layout, numbers) for layout in TABLE for numbers in TABLE[layout]],
    cases((4, 8), ("llama", "gemma2"), ("", "tensor=2", "data=2"), ("", "ngram")))]  # fmt: skip


@pytest.mark.parametrize(("kind", *AXES), covering(LOSSLESS_CASES))
def test_a_kind_that_keeps_what_is_seen_says_what_dense_says(kind, family, axes, draft, J, on_mesh):
    got = say(kind, family, on_mesh, axes, draft, J, **LONG)
    np.testing.assert_array_equal(got, alone("dense", family, **LONG))


@pytest.mark.parametrize(("layout", "numbers", *AXES), covering(TABLE_CASES))
def test_a_kind_says_the_same_to_a_row_alone_and_in_any_batch_mesh_and_draft(
    layout, numbers, family, axes, draft, J, on_mesh
):
    np.testing.assert_array_equal(
        say(layout + numbers, family, on_mesh, axes, draft, J), alone(layout + numbers, family)
    )


PRODUCT = [  # of kinds and meshes, plainly and with a draft of four tokens: where nothing is lost, with every family
    (*kind, *case) for kinds, families in (
        ([(kind, "") for kind in LOSSLESS], (*FAMILIES, *(name for name in tiny_models.CASES if name not in FAMILIES))),
        ([(layout, numbers) for layout in TABLE for numbers in TABLE[layout]], ("llama", "gemma2")),
    )
    for kind, case in itertools.product(kinds, cases((4,), families))
    if case[2] in ("", "ngram") and not (case[0] in ALL_LOCAL and kind[0].startswith("paged"))
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(("layout", "numbers", *AXES), PRODUCT)
def test_a_kind_says_the_same_in_every_combination(layout, numbers, family, axes, draft, J, on_mesh):
    kind = layout + numbers
    expected = alone("dense" if kind in LOSSLESS else kind, family)
    np.testing.assert_array_equal(say(kind, family, on_mesh, axes, draft, J), expected)
