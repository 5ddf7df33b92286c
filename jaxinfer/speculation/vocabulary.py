"""Whether two models mean the same by an id."""

from __future__ import annotations

import itertools

from jaxinfer.text import Tokenizer

SHOWN = 3  # ids that a refusal names


def shared_vocabulary(target: Tokenizer, draft: Tokenizer, target_size: int, draft_size: int) -> int | None:
    """How many ids, from 0 on, a draft shares with its target: `vocab` of a `ModelDraft`; None where it is all of them.

    target, draft: the tokenizers of both. target_size, draft_size: how many ids each of them scores (`vocab_size`);
    they may differ by padding, ids at the end that no token has. Special tokens are tokens like others, and an id that
    a model does not score has none. Raises ValueError, with both tokens, for ids that mean different things.
    """
    ours, theirs = tokens(target, target_size), tokens(draft, draft_size)
    pairs = list(itertools.zip_longest(ours, theirs))
    differ = [i for i, (own, other) in enumerate(pairs) if own != other]
    if differ:
        first = "; ".join(f"id {i} is {said(pairs[i][0])} and {said(pairs[i][1])}" for i in differ[:SHOWN])
        more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise ValueError(
            f"target and draft have different vocabularies ({first}{more}): take a draft with the target's tokenizer"
        )
    return None if target_size == draft_size else min(target_size, draft_size)


def tokens(tokenizer: Tokenizer, size: int) -> list[str | None]:
    """The token of each id below `size`, None for padding."""
    return [tokenizer.backend.id_to_token(i) for i in range(size)]


def said(token: str | None) -> str:
    """A token in a refusal."""
    return "no token" if token is None else repr(token)
