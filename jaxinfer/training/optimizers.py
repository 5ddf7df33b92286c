"""Muon for the matrices, Adam for the embedding and the norms."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

# Which axes a product sums over, and which it makes. A head is not a matrix of its own: q is [NH, D] to Muon.
MATRICES = {
    "q": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "k": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "v": MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    "o": MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(0,)),
    "gate": MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
    "up": MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
    "down": MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
    "fuse_hidden": MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
    "fuse_embed": MuonDimensionNumbers(reduction_axis=(1,), output_axis=(0,)),
}


def matrices(params: Any) -> Any:
    """How Muon is to see every array of the params; None is for Adam."""
    return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES.get(getattr(path[-1], "key", "")), params)


def muon(
    rate: float, embed_rate: float, steps: int, warmup: int, decay: int, weight_decay: float, clip: float = 1.0
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) at `rate`, Adam at `embed_rate`: up in `warmup` steps, level, down to zero in `decay`.

    What comes before the last `decay` steps does not depend on how many steps there are, so a run may be made longer or
    shorter until then. Muon makes every update of a matrix orthogonal, so its rate needs no tuning by shape; gradients
    are clipped to a global norm of `clip` for Adam's sake. Weight decay is for the matrices.
    """

    def schedule(peak: float) -> optax.Schedule:
        up = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        down = optax.linear_schedule(peak, 0.0, decay)
        return optax.join_schedules([up, optax.constant_schedule(peak), down], [warmup, steps - decay])

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax_muon(
            schedule(rate),
            weight_decay=weight_decay,
            adam_learning_rate=schedule(embed_rate),
            adam_b1=0.9,
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        ),
    )
