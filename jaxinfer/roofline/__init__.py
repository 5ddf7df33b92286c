"""What a pass must read and compute, from the config alone, and how long no chip can be faster than.

    decode(config, rows=8, length=4096, chip="H200", axes={"tensor": 2}).tokens_per_second

Decoding reads every weight and every cached token once a step, so its limit is bytes over bandwidth (Pope et al. 2022,
"Efficiently Scaling Transformer Inference", section 2). Everything is counted, nothing estimated: of every product
2 m n k FLOPs, of attention the positions that are seen. What is left out, everywhere: norms, rope, softmax, softcap and
activations' FLOPs; activations' bytes, which stay in the chip; page tables and lengths; the latency of a collective.
Python numbers only: nothing here makes an array.
"""

from jaxinfer.roofline.chips import ALIASES, CHIPS, Chip, chip
from jaxinfer.roofline.keeping import (
    CacheKind,
    cache_bytes,
    kind_of,
    latent_attention_flops,
    latent_cache_bytes,
    shared_cache_bytes,
    token_width,
)
from jaxinfer.roofline.limits import (
    Limit,
    critical_batch,
    decode,
    forward,
    limit_seconds,
    part,
    prefill,
    sent_bytes,
    share_of_limit,
)
from jaxinfer.roofline.passes import (
    attention_flops,
    decode_bytes,
    decode_flops,
    forward_bytes,
    forward_flops,
    matmul_bytes,
    matmul_flops,
    pairs,
    visible,
)
from jaxinfer.roofline.sizes import (
    Packed,
    itemsize,
    layer_params,
    norm_params,
    params_count,
    product_params,
    products,
    weight_bytes,
    weights_of,
)

__all__ = [
    "ALIASES",
    "CHIPS",
    "CacheKind",
    "Chip",
    "Limit",
    "Packed",
    "attention_flops",
    "cache_bytes",
    "chip",
    "critical_batch",
    "decode",
    "decode_bytes",
    "decode_flops",
    "forward",
    "forward_bytes",
    "forward_flops",
    "itemsize",
    "kind_of",
    "latent_attention_flops",
    "latent_cache_bytes",
    "layer_params",
    "limit_seconds",
    "matmul_bytes",
    "matmul_flops",
    "norm_params",
    "pairs",
    "params_count",
    "part",
    "prefill",
    "product_params",
    "products",
    "sent_bytes",
    "share_of_limit",
    "shared_cache_bytes",
    "token_width",
    "visible",
    "weight_bytes",
    "weights_of",
]
