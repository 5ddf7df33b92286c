"""The names of kinds: what they mean, and what is refused by name."""

import pytest

from jaxinfer.cache import Dense, Heavy, Kind, Kivi, Paged, Ring, Sinks, Snap, init_cache
from jaxinfer.testing import tiny_config

LOCAL = tiny_config(num_layers=2, window=5)
MIXED = LOCAL.replace(layers=(LOCAL.layers[0], LOCAL.layers[1].replace(window=None)))
GLOBAL = tiny_config(num_layers=2)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("auto", (Ring, Dense)), ("dense", (Dense, Dense)), ("ring", (Ring, Dense)), ("ring:window=9", (Ring, Ring)),
        ("ring:window=9,sinks=2", (Ring, Sinks)), ("paged", (Ring, Paged)),
        ("streaming:sinks=2,recent=6", (Ring, Sinks)),
        ("h2o:budget=8", (Ring, Heavy)), ("snapkv:budget=8,window=4", (Ring, Snap)), ("int8", (Ring, Dense)),
        ("int4:group=4,residual=8", (Ring, Kivi)), ("dense+int4:group=4,residual=8", (Kivi, Kivi)),
        ("paged:page=8+int4:group=4,residual=8", (Ring, Kivi)),
    ],
)  # fmt: skip
def test_layers_with_a_window_keep_it_and_the_others_are_of_the_kind(kind, layers):
    assert tuple(type(layer) for layer in init_cache(MIXED, 2, 40, kind).layers) == layers


def test_a_ring_that_would_hold_all_positions_is_no_ring():
    assert all(isinstance(layer, Dense) for layer in init_cache(LOCAL, 2, 5).layers)
    assert all(isinstance(layer, Ring) for layer in init_cache(LOCAL, 2, 6).layers)
    assert all(isinstance(layer, Dense) for layer in init_cache(LOCAL, 2, 8, max_rewind=8).layers)


def test_options_not_given_are_the_usual_ones():
    assert dict(Kind.read("paged:page=32+int4").options) == {"page": 32, "pages": None, "group": 32, "residual": 128}
    assert dict(Kind.read("streaming").options) == {"sinks": 4, "recent": 252}
    assert Kind.read("int8") == Kind.read("auto+int8")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("paper", "cache kind 'paper' is not known: take one of auto, dense, ring, paged, streaming, h2o, snapkv"),
        ("paged+ring", "'paged\\+ring' says twice how"),
        ("int8+int4", "says twice how or in what numbers"),
        ("paged:pape=4", "cache kind paged has no option 'pape': it knows page, pages"),
        ("dense:window=4", "cache kind dense has no option 'window': it has none"),
        ("ring:window=big", "'window=big': give window a whole number of at least 1"),
        ("ring:window=0", "'window=0': give window a whole number"),
        ("ring", "no layer of this model has a window: force one with ring:window=W"),
        ("ring:sinks=4", "ring:sinks goes with a window of its own"),
        ("ring:window=9,sinks=2+int4", "a ring with sinks is kept in 16-bit, int8 or float8, not in int4"),
        ("paged:page=24+int4", "a page of 24 tokens holds no whole number of int4 groups of 32"),
        ("int4:group=5", "int4 has group=5: two codes share a byte"),
        ("int4:group=4,residual=2", "int4 keeps the newest 2 tokens plain but 4 may be pending"),
        ("h2o+int4", "cache kind h2o\\+int4 is not to be had: take h2o or h2o\\+int8"),
        ("snapkv+float8", "cache kind snapkv\\+float8 is not to be had"),
        ("streaming+int4", "cache kind streaming\\+int4 is not to be had"),
        ("none+int8", "none keeps nothing, in whatever numbers"),
        ("h2o:budget=8,recent=9", "h2o has recent=9 of budget=8"),
        ("snapkv:budget=8,window=8", "snapkv has window=8 of budget=8"),
        ("snapkv:kernel=4", "snapkv has kernel=4: an average about a token takes an odd number"),
        ("streaming:recent=0", "'recent=0': give recent a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(kind, message):
    with pytest.raises(ValueError, match=message):
        init_cache(GLOBAL, 2, 40, kind, max_pending=4)


@pytest.mark.parametrize("kind", ["h2o", "snapkv", "paged"])
def test_a_kind_that_no_layer_would_have_is_refused(kind):
    with pytest.raises(ValueError, match=f"every layer of this model has a window, .* {kind} has nothing to do"):
        init_cache(LOCAL, 2, 40, kind)
