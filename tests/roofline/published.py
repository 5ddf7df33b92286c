"""Configs in numbers, and what the world has published of them."""

import itertools

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec


def config(D, F, N, K, H, L, V, tied=False, positions=0, **layer) -> ModelConfig:
    spec = LayerSpec(num_heads=N, num_kv_heads=K, head_width=H, scale=1.0, ffn_width=F, **layer)
    norm = layer.get("norm", NormSpec())
    layers = (spec,) * L
    return ModelConfig(
        vocab_size=V, width=D, layers=layers, tied=tied, num_positions=positions, norm=norm, dtype="bfloat16"
    )


HEAD, WHOLE, LAYER = {"qk_norm": "head"}, {"qk_norm": "projection"}, {"norm": NormSpec(kind="layer")}
GPT2 = LAYER | {"gated": False, "qkv_bias": True, "out_bias": True, "ffn_bias": True, "positions": 1024}

PUBLISHED = {  # what the checkpoints on the hub hold
    "Llama-2-7B": (6_738_415_616, config(4096, 11008, 32, 32, 128, 32, 32000)),
    "Llama-2-13B": (13_015_864_320, config(5120, 13824, 40, 40, 128, 40, 32000)),
    "Llama-3-8B": (8_030_261_248, config(4096, 14336, 32, 8, 128, 32, 128256)),
    "Llama-3-70B": (70_553_706_496, config(8192, 28672, 64, 8, 128, 80, 128256)),
    "Llama-3.2-1B": (1_235_814_400, config(2048, 8192, 32, 8, 64, 16, 128256, tied=True)),
    "Llama-3.2-3B": (3_212_749_824, config(3072, 8192, 24, 8, 128, 28, 128256, tied=True)),
    "Mistral-7B": (7_241_732_096, config(4096, 14336, 32, 8, 128, 32, 32000, window=4096)),
    "Qwen2.5-0.5B": (494_032_768, config(896, 4864, 14, 2, 64, 24, 151936, tied=True, qkv_bias=True)),
    "Qwen2.5-7B": (7_615_616_512, config(3584, 18944, 28, 4, 128, 28, 152064, qkv_bias=True)),
    "Qwen3-0.6B": (596_049_920, config(1024, 3072, 16, 8, 128, 28, 151936, tied=True, **HEAD)),
    "Qwen3-8B": (8_190_735_360, config(4096, 12288, 32, 8, 128, 36, 151936, **HEAD)),
    "Gemma-2-2B": (2_614_341_888, config(2304, 9216, 8, 4, 256, 26, 256000, tied=True, post_norm=True)),
    "Gemma-2-9B": (9_241_705_984, config(3584, 14336, 16, 8, 256, 42, 256000, tied=True, post_norm=True)),
    "Gemma-3-1B": (999_885_952, config(1152, 6912, 4, 1, 256, 26, 262144, tied=True, post_norm=True, **HEAD)),
    "Phi-3-mini": (3_821_079_552, config(3072, 8192, 32, 32, 96, 32, 32064)),
    "OLMo-2-7B": (7_298_617_344, config(4096, 11008, 32, 32, 128, 32, 100352, pre_norm=False, post_norm=True, **WHOLE)),
    "SmolLM3-3B": (3_075_098_624, config(2048, 11008, 16, 4, 128, 36, 128256, tied=True)),
    "GPT-2": (124_439_808, config(768, 3072, 12, 12, 64, 12, 50257, tied=True, **GPT2)),
}
SHAPES = {name: shape for name, (_, shape) in PUBLISHED.items()}
MIXED = ModelConfig(  # every field of LayerSpec that makes a parameter, in layers that differ
    vocab_size=97,
    width=24,
    layers=tuple(
        LayerSpec(
            num_heads=6,
            num_kv_heads=3,
            head_width=10,
            scale=1.0,
            ffn_width=40 + index,
            qk_norm=qk_norm,
            gated=gated,
            qkv_bias=bias,
            out_bias=not bias,
            ffn_bias=bias,
            pre_norm=gated,
            post_norm=not gated or bias,
            norm=NormSpec(kind=kind),
            window=7 if bias else None,
        )
        for index, (qk_norm, gated, bias, kind) in enumerate(
            itertools.product(["none", "head", "projection"], [True, False], [True, False], ["rms", "layer"])
        )
    ),
    num_positions=31,
)
