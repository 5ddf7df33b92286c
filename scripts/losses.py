"""What the tokens of a text cost a model: bits per byte over a cache of a kind, or with weights in codes.

    ids, num_bytes = losses.texts(losses.held_out(), tokenizer, rows=16, prompt_length=512, length=1024)
    facts, laws = losses.of(params, config, ids, num_bytes, prompt_length=512)

Rows of a text are read up to the prompt's length, then token by token, as in decoding; what each token costs there is
counted, and how far the model's law is from another one.
"""

from __future__ import annotations

import functools
import pathlib
import sysconfig
from collections.abc import Iterable
from typing import Any


def held_out() -> dict[str, str]:
    """What the built-in model never saw, by file. ValueError where this Python's library is another one."""
    from jaxinfer import training

    return training.read_corpus().held_out


def unseen() -> dict[str, str]:
    """The same modules as this Python's library has them, whatever its version."""
    from jaxinfer.training import corpus

    listed, library = corpus.read_list(), pathlib.Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(listed["files"]) if corpus.is_held_out(path, listed["held_out"])]
    return {path: (library / path).read_text("utf-8") for path in paths if (library / path).is_file()}


def read(paths: Iterable[pathlib.Path]) -> dict[str, str]:
    """The text of files. OSError or ValueError where one cannot be read."""
    found = {}
    for path in paths:
        try:
            found[str(path)] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    return found


def texts(documents: dict[str, str], tokenizer: Any, rows: int, prompt_length: int, length: int) -> tuple[Any, int]:
    """Rows of ids [B, L], at most `rows`, and how many bytes the tokens of all rows stand for that are counted."""
    import numpy as np

    found: list[list[int]] = []
    for text in documents.values():
        ids = tokenizer.encode(text)
        found += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)][:rows]
        if len(found) >= rows:
            break
    if not found:
        raise ValueError(f"no text has {length} tokens: give a longer one, or ask for fewer")
    ids = np.array(found[:rows], np.int32)
    return ids, sum(len(tokenizer.decode(row[prompt_length + 1 :].tolist()).encode()) for row in ids)


def of(
    params: Any, config: Any, ids: Any, num_bytes: int, prompt_length: int, kind: str = "dense", laws: Any = None
) -> tuple[dict[str, Any], Any]:
    """What the tokens after the prompts cost over a cache of a kind; and the laws [T, B, V] they were drawn from.

    laws: those to compare with, which an earlier call gave; none are given back then.
    """
    import numpy as np

    import jaxinfer

    cache = jaxinfer.init_cache(config, len(ids), ids.shape[1], kind)
    held = cache.bytes
    nats, apart, agreed, own, kept = decoded(params, config, ids, cache, laws, prompt=prompt_length)
    return {
        "bytes": held,
        "bytes_at_the_end": kept,
        "bytes_per_token": kept / ids.size,
        "bits_per_byte": float(np.asarray(nats, np.float64).sum() / np.log(2) / num_bytes),
        "kl_to_dense": float(apart),
        "same_best_as_dense": float(agreed),
    }, own


def decoded(params: Any, config: Any, ids: Any, cache: Any, laws: Any, prompt: int) -> tuple[Any, ...]:
    """Reads the prompts, then feeds what follows: (nats [B, T], mean KL, share of same best ids, laws, bytes held)."""
    import jax
    import jax.numpy as jnp

    import jaxinfer

    _, cache = jaxinfer.prefill(params, config, ids[:, :prompt], cache)
    if cache.compresses:
        cache = jax.jit(lambda cache: cache.compress(ids.shape[1] - prompt))(cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def follow(params, cache, ids, laws):
        def one(cache, at):
            fed, law = at
            score, cache = jaxinfer.decode_step(params, config, fed, cache)
            own = jax.nn.log_softmax(score)
            if law is None:
                return cache, (own, jnp.zeros(()), jnp.ones(()))
            apart = (jnp.exp(law) * (law - own)).sum(-1).mean()
            return cache, (own, apart, (law.argmax(-1) == own.argmax(-1)).mean())

        cache, (own, apart, agreed) = jax.lax.scan(one, cache, (ids[:, prompt:-1].T, laws))
        nats = -jnp.take_along_axis(own, ids[:, prompt + 1 :].T[..., None], 2)[..., 0].T
        return nats, apart.mean(), agreed.mean(), own if laws is None else None, cache

    nats, apart, agreed, own, cache = follow(params, cache, jnp.asarray(ids), laws)
    return nats, apart, agreed, own, cache.bytes
