"""Kernels for NVIDIA GPUs, written in Pallas and compiled by Triton."""

from jaxinfer.kernels.gpu import attention, products
from jaxinfer.kernels.gpu.tiles import unavailable

__all__ = ["attention", "products", "unavailable"]
