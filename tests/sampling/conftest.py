"""The law of the draw worked out the long way: numpy, float64, the whole vocabulary sorted."""

import numpy as np
import pytest


def kept_by_sorting(z, top_k=0, top_p=1.0, min_p=0.0):
    """Which of z [V] the filters keep, ties at an edge included."""
    z = np.asarray(z, np.float64)
    keep = np.ones(z.shape, bool)
    if 0 < top_k < z.size:
        keep &= z >= np.sort(z)[::-1][top_k - 1]
    if top_p < 1:
        order = np.argsort(-np.where(keep, z, -np.inf), kind="stable")
        mass = np.where(keep, np.exp(z - z.max()), 0)[order].cumsum()
        keep &= z >= z[order[min(np.searchsorted(mass, top_p * mass[-1]), z.size - 1)]]
    return keep & (z >= z.max() + (np.log(min_p) if min_p > 0 else -np.inf))


def law(
    logits,
    tokens=(),
    prompt=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias=None,
    stop_ids=(),
    min_new_tokens=0,
):
    """Probabilities [V] of the next id after tokens, in the documented order."""
    x = np.array(logits, np.float64)
    for i, value in (logit_bias or {}).items():
        x[i] += value
    for i in set(tokens):
        x[i] = x[i] / repetition_penalty if x[i] > 0 else x[i] * repetition_penalty
    for i in tokens[prompt:]:
        x[i] -= frequency_penalty
    for i in set(tokens[prompt:]):
        x[i] -= presence_penalty
    if len(tokens) - prompt < min_new_tokens:
        x[list(stop_ids)] = -np.inf
    x = x / temperature
    probability = np.where(kept_by_sorting(x, top_k, top_p, min_p), np.exp(x - x.max()), 0)
    return probability / probability.sum()


@pytest.fixture(name="law")
def _law():
    return law


@pytest.fixture(name="kept_by_sorting")
def _kept_by_sorting():
    return kept_by_sorting
