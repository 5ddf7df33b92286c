"""The weights of a model in codes."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxinfer import kernels
from jaxinfer import mesh as meshes
from jaxinfer.models.params import WEIGHTS
from jaxinfer.quantization import Form, Int4, Int8, Weight, parse_form

OF_VOCABULARY = ("embed", "head")  # in eight bits at least: rows are looked up, and differences of scores are small


def quantize(params: dict[str, Any], form: str, mesh: Any = None, packed: bool | None = None) -> dict[str, Any]:
    """The params with every weight that is multiplied with in codes, rounded to the nearest; norms and biases stay.

    form: "int8" (a scale an output) or "int4:group=32" (a scale for so many neighbouring inputs; the matrix that makes
    logits is int8, and so is a weight whose inputs, or a device's part of them, the group does not divide). With
    ":dynamic" or ",dynamic" what a weight is multiplied with is rounded to eight bits too, 32 neighbours to a scale
    (as Q8_0 is multiplied in llama.cpp): faster on CPUs with AVX-512 VNNI. An embedding that is not also the head
    stays: of it a token reads a row. params: as loaded, for a mesh arranged for it. packed: codes of four bits two to
    a byte, as files have them; by default where this platform reads them better. `load(name, quantize=form)` does
    this tensor by tensor. ValueError for another form, and for params in codes.
    """
    wanted = parse_form(form)
    tied = "head" not in params

    def each(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: quantize_one(name, x, wanted, tied, mesh, packed) for name, x in tree.items()}

    return each({name: x for name, x in params.items() if name != "layers"}) | {
        "layers": tuple(each(layer) for layer in params["layers"])
    }


def quantize_one(name: str, w: Any, form: Form, tied: bool, mesh: Any = None, packed: bool | None = None) -> Any:
    """An array of the params by its name: in codes if it is a weight of products."""
    if isinstance(w, Weight):
        raise ValueError(f"{name} is in codes already ({type(w).__name__}): quantize params as they are loaded")
    if name not in WEIGHTS or (name == "embed" and not tied):
        return w
    outer, inner = WEIGHTS[name]
    fits = w.shape[-1] // meshes.size_of(inner[-1], mesh) % form.group == 0
    if form.bits == 8 or name in OF_VOCABULARY or not fits:
        return to_int8(w, len(outer), form.dynamic)
    return to_int4(w, form.group, kernels.packs_int4() if packed is None else packed, form.dynamic)


def form_of(params: Any) -> str | None:
    """The form that `quantize` gave these params; None where no weight is in codes."""
    leaves = [x for x in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(x)]
    groups = {x.group for x in leaves if isinstance(x, Int4)}
    if len(groups) > 1:
        raise ValueError(f"the weights are in groups of {' and '.join(map(str, sorted(groups)))}: quantize them alike")
    if not leaves:
        return None
    dynamic = leaves[0].dynamic
    return (Form(4, groups.pop(), dynamic) if groups else Form(8, dynamic=dynamic)).name


def repacked(params: Any, packed: bool) -> Any:
    """With codes of four bits two to a byte, or in arrays of their own."""
    return jax.tree.map(lambda x: x.repacked(packed) if isinstance(x, Int4) else x, params, is_leaf=is_weight)


def is_weight(x: Any) -> bool:
    """Whether this leaf of the params is in codes."""
    return isinstance(x, Weight)


to_int8 = functools.partial(jax.jit, static_argnums=(1, 2))(Int8.of)
to_int4 = functools.partial(jax.jit, static_argnums=(1, 2, 3))(Int4.of)
