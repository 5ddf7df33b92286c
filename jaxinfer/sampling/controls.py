"""What a user may ask of the draw, checked on the host and laid out as arrays that never retrace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

# A lower temperature is greedy, in every function of the room. Greedy is its limit anyway, and dividing by less could
# overflow float32, where two different logits would tie at infinity. vLLM has the same constant.
GREEDY = 1e-5

# Widths of the [B, M] arrays, then times four: few, so that programs are few; most requests fit the first.
LADDER = (8, 32, 128, 512)


class Bias(NamedTuple):
    """Logit bias as programs see it: values[b, m] is added to logit ids[b, m]; id -1 = empty."""

    ids: Any  # [B, M] int32
    values: Any  # [B, M] float32


@struct.dataclass
class Sampling:
    """How each row draws its next id. Each control takes one number for all rows, or a list or array of one per row.

    temperature         0 is greedy (so is anything under 1e-5); 1, the default, is the model's own distribution
    top_k               only the k best ids, and all that tie with the k-th; 0 (or -1) is off
    top_p               only the smallest set of best ids whose mass reaches p, and ties of its last; 1 is off
    min_p               only ids at least min_p times as probable as the best; 0 is off
    repetition_penalty  divides positive logits of ids seen in prompt or output, multiplies negative ones; 1 is off
                        (CTRL, Keskar et al. 2019, section 4.1)
    presence_penalty    taken once from the logit of each id seen in the output; 0 is off
    frequency_penalty   taken from the logit of an id for each time it was seen in the output; 0 is off
    logit_bias          {id: value} for all rows, or a list of B of these; -inf forbids an id
    stop_ids            one list of ids for all rows, or B lists; the decode loop ends a row that draws one
    min_new_tokens      stop ids cannot be drawn before this many new tokens
    seed                32 bits of the row's own; draws depend on (key, seed, position) and nothing else

    `process` says in which order they act. `rows` checks and lays out; nothing is checked before.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    presence_penalty: Any = 0.0
    frequency_penalty: Any = 0.0
    logit_bias: Any = None
    stop_ids: Any = ()
    min_new_tokens: Any = 0
    seed: Any = 0

    def rows(self, B: int, vocab: int | None = None, stop_ids: Iterable[int] = ()) -> Sampling:
        """The form that programs see: numpy arrays of B rows and fixed dtypes. Values change, the program stays.

        Floats are [B] float32; top_k, min_new_tokens and seed [B] int32 (the 32 bits of a seed, so that those from
        2**31 on are negative); stop_ids [B, M] int32 and logit_bias a `Bias` of [B, M], where M is the first of 8, 32,
        128, 512, 2048, ... that fits and -1 = empty: only a step on that ladder changes a shape. `stop_ids` are the
        checkpoint's, added to each row's own (those outside the vocabulary, which no row can draw, are left out). Rows
        of rows are the same rows. Numbers that are being traced are broadcast, unchecked.

        Raises ValueError (what came, what fits, what to do) for a value out of range or NaN, a list that is not B
        long, and, where `vocab` is given, an id outside the vocabulary.
        """
        if self.laid_out and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            if self.temperature.shape != (B,):
                raise ValueError(f"sampling has {self.temperature.shape[0]} rows but the batch has {B}: use rows({B})")
            return self
        numbers = {name: _numbers(name, getattr(self, name), B) for name in _LIMITS}
        biases = _bias_rows(self.logit_bias, B, vocab)
        stops = _stop_rows(self.stop_ids, B, vocab)
        more = [int(i) for i in stop_ids if 0 <= int(i) < (vocab or 2**31)]
        return Sampling(
            **numbers,
            logit_bias=Bias(
                _packed([list(row) for row in biases], -1, np.int32),
                _packed([list(row.values()) for row in biases], 0, np.float32),
            ),
            stop_ids=_packed([list(dict.fromkeys([*row, *more])) for row in stops], -1, np.int32),
        )

    @staticmethod
    def letters() -> Sampling:
        """The letters of the arrays that `rows` gives, congruent with them."""
        return Sampling(**dict.fromkeys(_LIMITS, "B"), logit_bias=Bias("B_", "B_"), stop_ids="B_")

    @property
    def laid_out(self) -> bool:
        """Whether this is what `rows` returns."""
        return isinstance(self.logit_bias, Bias)


class _Limit(NamedTuple):
    dtype: type
    fits: Callable[[np.ndarray], np.ndarray]  # NaN must not fit
    must: str
    off: str


_LIMITS = {
    "temperature": _Limit(np.float32, lambda x: (x >= 0) & (x < np.inf), "finite and at least 0", "use 0 for greedy"),
    "top_k": _Limit(np.int32, lambda x: (x >= -1) & (x < 2**31), "at least 0", "use 0 to keep all ids"),
    "top_p": _Limit(np.float32, lambda x: (x > 0) & (x <= 1), "above 0 and at most 1", "use 1 to keep all ids"),
    "min_p": _Limit(np.float32, lambda x: (x >= 0) & (x <= 1), "from 0 to 1", "use 0 to keep all ids"),
    "repetition_penalty": _Limit(
        np.float32, lambda x: (x > 0) & (x < np.inf), "finite and above 0", "use 1 for no penalty"
    ),
    "presence_penalty": _Limit(np.float32, lambda x: np.abs(x) < np.inf, "finite", "use 0 for no penalty"),
    "frequency_penalty": _Limit(np.float32, lambda x: np.abs(x) < np.inf, "finite", "use 0 for no penalty"),
    "min_new_tokens": _Limit(
        np.int32, lambda x: (x >= 0) & (x < 2**31), "at least 0", "use 0 to let stop ids come at once"
    ),
    "seed": _Limit(np.int32, lambda x: (x >= -(2**31)) & (x < 2**32), "of 32 bits", "use seed % 2**32"),
}


def _numbers(name: str, value: Any, B: int) -> Any:
    """value, checked, as [B] of the control's dtype."""
    dtype, fits, must, off = _LIMITS[name]
    least = 0 if name == "top_k" else None  # -1 is off too
    if isinstance(value, Tracer):
        return jnp.clip(jnp.broadcast_to(value.astype(dtype), (B,)), least)
    try:
        exact = np.asarray(value, np.float64)  # holds every float32 and every 32-bit integer
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: give one number, or a list with one number per row") from None
    if exact.ndim and exact.shape != (B,):
        raise ValueError(f"{name} has shape {exact.shape} but the batch has {B} rows: give one number, or one per row")
    exact = np.broadcast_to(exact, (B,))
    if dtype is np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            good = fits(exact.astype(np.float32))  # what the program will see: 1e-60 is 0, and top_p 0 keeps nothing
    else:
        good = fits(exact) & (exact == np.floor(exact))
        must = f"a whole number, {must}"
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"{name} of row {row} is {exact[row].item()!r}: it must be {must}; {off}")
    if dtype is np.int32:
        bits = (exact.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)
        return np.clip(bits.view(np.int32), least, None)
    return exact.astype(np.float32)


def _bias_rows(bias: Any, B: int, vocab: int | None) -> list[dict[int, float]]:
    if isinstance(bias, Bias):
        ids, values = np.asarray(bias.ids).tolist(), np.asarray(bias.values).tolist()
        bias = [{i: v for i, v in zip(*row, strict=True) if i >= 0} for row in zip(ids, values, strict=True)]
    if bias is None or isinstance(bias, dict):
        bias = [bias] * B
    if not isinstance(bias, list | tuple) or not all(row is None or isinstance(row, dict) for row in bias):
        raise ValueError(f"logit_bias is {bias!r}: give {{id: value}} for all rows, or a list with one per row")
    if len(bias) != B:
        raise ValueError(f"logit_bias has {len(bias)} rows but the batch has {B}: give one for all, or one per row")
    rows = [row or {} for row in bias]
    for i, value in {pair for row in rows for pair in row.items()}:
        _check_id("logit_bias", i, vocab)
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.float32(value) < np.inf:  # nor is NaN
                raise ValueError(f"logit_bias of id {i} is {value}: it must be finite, or -inf to forbid the id")
    return rows


def _stop_rows(stops: Any, B: int, vocab: int | None) -> list[list[int]]:
    if hasattr(stops, "tolist"):
        stops = stops.tolist()
    if _is_id(stops):
        stops = [stops]
    if not isinstance(stops, list | tuple | set | frozenset):
        raise ValueError(f"stop_ids is {stops!r}: give a list of ids for all rows, or one list per row")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in stops]
    if not any(isinstance(row, list | tuple | set | frozenset) for row in rows):
        rows = [rows] * B
    if len(rows) != B:
        raise ValueError(f"stop_ids has {len(rows)} rows but the batch has {B}: give one list for all, or one per row")
    rows = [list(row) if isinstance(row, list | tuple | set | frozenset) else [row] for row in rows]
    rows = [[i for i in row if i != -1] for row in rows]  # -1 = empty, as `rows` itself writes it
    for i in {i for row in rows for i in row}:
        _check_id("stop_ids", i, vocab)
    return rows


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_id(name: str, i: Any, vocab: int | None) -> None:
    if not _is_id(i):
        raise ValueError(f"{name} has the id {i!r}: ids are whole numbers; encode text with the tokenizer first")
    size = vocab or 2**31
    if not 0 <= i < size:
        raise ValueError(f"{name} has the id {i} but ids go from 0 to {size - 1}: use ids of this model's tokenizer")


def _packed(rows: Sequence[list], empty: int, dtype: type) -> np.ndarray:
    """Rows of different lengths as [B, M], M from the ladder."""
    most = max((len(row) for row in rows), default=0)
    width = next((m for m in LADDER if m >= most), LADDER[-1])
    while width < most:
        width *= 4
    out = np.full((len(rows), width), empty, dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out
