"""What chips can do, as their makers publish it; a machine that was measured is a `Chip` of the caller's."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. FLOP/s are dense (no structured sparsity); 0 where nothing is published or measured.

    Of a measured machine `flops` and `bandwidth` are what its products and a plain read of its memory reach.
    """

    flops: float  # FLOP/s of bfloat16 products
    bandwidth: float  # bytes a second read from its memory
    memory: float  # bytes
    int8: float = 0.0  # operations a second of int8 products
    fp8: float = 0.0  # FLOP/s of float8 products
    interconnect: float = 0.0  # bytes a second that it sends to the other chips of one mesh axis, a ring

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which a bfloat16 program is bound by arithmetic, below by memory."""
        return self.flops / self.bandwidth

    def rate(self, math: str = "bfloat16") -> float:
        """FLOP/s of products in `math`: "bfloat16", "int8" or "fp8". ValueError where the chip has no such figure."""
        rates = {"bfloat16": self.flops, "int8": self.int8, "fp8": self.fp8}
        known = [name for name, rate in rates.items() if rate]
        if math not in known:
            raise ValueError(f"no FLOP/s of {math} products are known of this chip: take one of {', '.join(known)}")
        return rates[math]


# Makers' figures. GPUs: NVIDIA's data sheets, SXM parts (their "with sparsity" halved; a B200 is an eighth of a DGX
# B200); interconnect is one direction of NVLink, half of what the sheets say (L4: PCIe 4 x16). TPUs: the tables of
# chips in "How to Scale Your Model" (Austin et al. 2025), part 2; interconnect is both links of one axis that closes
# to a ring, which an axis of a small slice does not. v5e: its chapter on inference computes with 0.82e12, its table
# says 0.81e12, Google 819 GB/s.
CHIPS = {
    "A100 40GB": Chip(312e12, 1.555e12, 40e9, int8=624e12, interconnect=300e9),
    "A100": Chip(312e12, 2.039e12, 80e9, int8=624e12, interconnect=300e9),
    "H100": Chip(989e12, 3.35e12, 80e9, int8=1979e12, fp8=1979e12, interconnect=450e9),
    "H200": Chip(989e12, 4.8e12, 141e9, int8=1979e12, fp8=1979e12, interconnect=450e9),
    "B200": Chip(2250e12, 8e12, 180e9, int8=4500e12, fp8=4500e12, interconnect=900e9),
    "L4": Chip(121e12, 0.3e12, 24e9, int8=242.5e12, fp8=242.5e12, interconnect=32e9),
    "TPU v4": Chip(275e12, 1.2e12, 32e9, int8=275e12, interconnect=90e9),
    "TPU v5e": Chip(197e12, 0.82e12, 16e9, int8=394e12, interconnect=90e9),
    "TPU v5p": Chip(459e12, 2.8e12, 96e9, int8=918e12, interconnect=180e9),
    "TPU v6e": Chip(920e12, 1.6e12, 32e9, int8=1840e12, interconnect=180e9),
}
ALIASES = {"v5 lite": "v5e", "v6 lite": "v6e"}  # jax says device_kind "TPU v5 lite", and "TPU v5" for a v5p


def chip(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind` ("NVIDIA H200", "TPU v5 lite"); None for one that is not in the table."""
    for said, meant in ALIASES.items():
        device_kind = device_kind.replace(said, meant)
    words = re.sub(r"TPU v5$", "TPU v5p", device_kind).replace("-", " ").split()
    found = [name for name in CHIPS if set(name.split()) <= set(words)]
    return CHIPS[max(found, key=len)] if found else None


def known(on: Chip | str) -> Chip:
    """A chip by any name that `chip` understands, or itself. ValueError for one that is not in the table."""
    found = chip(on) if isinstance(on, str) else on
    if found is None:
        raise ValueError(f"chip {on!r} is not known: take one of {', '.join(CHIPS)}, or a Chip with measured numbers")
    return found
