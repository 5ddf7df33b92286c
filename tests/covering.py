"""Few of many cases that show every pair of values (a pairwise covering set)."""

import itertools

import pytest


def covering(cases):
    """Few of the cases, tuples of the same axes, but every pair of values of every two axes that there is."""
    pairs = {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}
    chosen = []
    while pairs:
        best = max(cases, key=lambda case: len(pairs.intersection(itertools.combinations(enumerate(case), 2))))
        pairs.difference_update(itertools.combinations(enumerate(best), 2))
        chosen.append(best)
    return chosen


def pairwise(*axes):
    """Every combination of the axes' values; all but a covering set of them are left to `-m full`."""
    cases = list(itertools.product(*axes))
    few = set(covering(cases))
    return [case if case in few else in_full(*case) for case in cases]


def in_full(*values):
    """A case that the default run leaves to `-m full`."""
    return pytest.param(*values, marks=pytest.mark.full)
