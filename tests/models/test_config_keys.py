"""config.json: every key is read as transformers reads it, or refused by name."""

import json

import pytest
import torch
from tiny_models import CASES, GPT2, LONGROPE, PHI3, YARN, F, S, as_v4, hf_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jaxinfer.models import config_from_hf
from jaxinfer.models.positions import rope, rope_parameters
from jaxinfer.models.reading import Reader
from jaxinfer.models.registry import FAMILIES

EVERY = [(family, variant) for family, variants in CASES.items() for variant in variants]
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
SIZES |= {"n_embd", "n_layer", "n_head"}


def raw_of(family, variant="plain"):
    """The config.json of a case."""
    return as_json(hf_config(family, variant))


def as_json(config):
    return json.loads(config.to_json_string())


def transformers_reads(raw):
    """The config.json that transformers makes of another one; None where it refuses it."""
    try:
        return as_json(CONFIG_MAPPING[raw["model_type"]].from_dict(json.loads(json.dumps(raw))))
    except Exception:  # whatever it raises (its own classes, TypeError, KeyError): a refusal
        return None


def outcome(raw):
    """The ModelConfig of a config.json, or why it is refused."""
    try:
        return config_from_hf(raw)
    except ValueError as refusal:
        return str(refusal)


def edits(raw, value=...):
    """(key, raw) with each key left out, or with a value in its place; keys of nested dicts too."""
    for key, old in raw.items():
        if key == "model_type":
            continue
        rest = {k: v for k, v in raw.items() if k != key}
        yield key, rest if value is ... else rest | {key: value}
        if isinstance(old, dict) and key != "vision_config":
            yield from ((inner, rest | {key: edited}) for inner, edited in edits(old, value))


def test_every_family_has_a_tiny_model():
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_absent_keys_mean_what_transformers_means_by_them(family, variant):
    for key, raw in edits(raw_of(family, variant)):
        meant = transformers_reads(raw)
        if key in SIZES and family != "gemma3" or key == "text_config":
            with pytest.raises(ValueError, match=key):
                config_from_hf(raw)
        elif meant is not None:
            assert outcome(raw) == outcome(meant), key


@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_null_means_what_transformers_means_by_it_or_is_refused(family, variant):
    for key, raw in edits(raw_of(family, variant), None):
        read, meant = outcome(raw), transformers_reads(raw)
        if meant is not None:
            assert read == outcome(meant) or (isinstance(read, str) and key in read), key


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("family", "variant"), EVERY)
def test_a_v4_config_is_the_v5_config(family, variant, legacy):
    raw = raw_of(family, variant)
    old = as_v4(raw, legacy)
    assert "rope_parameters" not in old
    assert config_from_hf(old) == config_from_hf(raw)
    if not (legacy and family.startswith("gemma3")):  # transformers 5 no longer looks at gemma3's `type`
        assert config_from_hf(transformers_reads(old)) == config_from_hf(raw)


def test_scaling_of_v4_wins_over_parameters_of_v5():
    raw = raw_of("llama", "llama3") | {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 700.0}
    assert config_from_hf(raw) == config_from_hf(transformers_reads(raw))
    assert config_from_hf(raw) != config_from_hf(raw_of("llama", "llama3"))


def test_five_layers_of_six_are_local_unless_the_config_says_otherwise():
    raw = raw_of("gemma3_text") | {"num_hidden_layers": 13}
    raw = {key: value for key, value in raw.items() if "pattern" not in key and key != "layer_types"}
    windows = [spec.window for spec in config_from_hf(raw).layers]
    assert windows == [5, 5, 5, 5, 5, None] * 2 + [5]
    assert len({spec.rope for spec in config_from_hf(raw).layers}) == 2


def test_a_sparse_multimodal_config_is_completed_as_transformers_completes_it():
    raw = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    config = config_from_hf(raw)
    assert config.replace(stop_ids=(1,)) == config_from_hf(transformers_reads(raw)).replace(stop_ids=(1,))
    assert (config.vocab_size, config.layers[0].num_heads, config.stop_ids) == (262208, 8, (1, 106))


# --- rope --------------------------------------------------------------------------------------------------------

CONTEXT = {"original_max_position_embeddings": 16}
SCALINGS = {
    "default": {"rope_type": "default"},
    "default, another base": {"rope_type": "default", "rope_theta": 123.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT},
    "llama3, no context of its own": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 50.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, no context of its own": {"rope_type": "yarn", "factor": 4.0},
    "yarn, betas": YARN | {"beta_slow": 0.5},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, attention factor": YARN | {"attention_factor": 1.7},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, factor below one": YARN | {"factor": 0.5},
    "yarn, an empty ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        **CONTEXT,
    },
}
SCALINGS["longrope, factor"] = SCALINGS["longrope"] | {"factor": 5.0}
SCALINGS["longrope, attention factor"] = SCALINGS["longrope"] | {"attention_factor": 1.3}
SCALINGS["longrope, shorter than before"] = SCALINGS["longrope"] | {"original_max_position_embeddings": 512}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rope_matches_transformers(scaling, outside):
    """outside: with the original context at the top of the config, which wins, as Phi-3 writes it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    top = {"original_max_position_embeddings": 24} if outside else {}
    raw = raw_of("llama") | {"head_dim": 12, "rope_parameters": dict(scaling), **top}
    theirs = CONFIG_MAPPING["llama"].from_dict(json.loads(json.dumps(raw)))
    table = ROPE_INIT_FUNCTIONS | {"default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    reader = Reader(raw, "llama", {"rope_theta": 10000.0})
    ours = rope(reader, rope_parameters(reader), 12)
    for seq_len, frequency, scale in (
        (1, ours.frequency, ours.scale),
        (10_000, ours.long_frequency or ours.frequency, ours.long_scale if ours.long_frequency else ours.scale),
    ):
        expected, factor = table[scaling["rope_type"]](theirs, seq_len=seq_len)
        torch.testing.assert_close(torch.tensor(frequency), expected, rtol=1e-6, atol=0)
        assert scale == pytest.approx(factor, rel=1e-9)
    if scaling["rope_type"] == "longrope":
        assert ours.switch == theirs.rope_parameters["original_max_position_embeddings"]


# --- refusals ----------------------------------------------------------------------------------------------------

BROKEN = [  # family, what is changed, what the message must name
    ("llama", {"vision_tower": "clip"}, "llama config .*vision_tower"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"hidden_act": "tanh"}, "hidden_act = 'tanh'.*silu"),
    ("llama", {"hidden_size": "36"}, "hidden_size = '36'"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
    ("llama", {"num_key_value_heads": 4}, "6 query heads on 4 kv heads"),
    ("llama", {"head_dim": 9}, "heads of 9.*even"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"add_cross_attention": True}, "add_cross_attention"),
    ("llama", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'.*llama3"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' without factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ("mistral", {"layer_types": [S, S]}, "mistral config .*layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding window of 0"),
    ("qwen2", {"use_mrope": True}, "use_mrope"),
    ("qwen2", {"layer_types": [S, F]}, "sliding_window"),
    ("qwen2", {"layer_types": [F]}, "2 layers but 1 layer_types"),
    ("qwen3", {"layer_types": ["chunked_attention", F]}, "chunked_attention"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    ("gemma2", {"sliding_window_size": 7}, "sliding_window_size"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_parameters .*rope_theta"),
    ("gemma3_text", {"layer_types": None, "_sliding_window_pattern": 2}, "_sliding_window_pattern = 2"),
    ("gemma3", {"audio_config": {"hidden_size": 4}}, "gemma3 config .*audio_config"),
    ("gemma3", {"text_config": None}, "text_config"),
    ("phi3", {"mlp_bias": True}, "mlp_bias"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "1 numbers in long_factor but 6"),
    ("smollm3", {"no_rope_layers": [1]}, "2 layers but 1 no_rope_layers"),
    ("smollm3", {"layer_types": [S, F]}, "sliding_window"),
    ("gpt2", {"hidden_size": 43}, "n_embd = 42 and hidden_size = 43"),
    ("gpt2", {"n_head": 5}, "n_embd = 42 and n_head = 5"),
    ("gpt2", {"activation_function": "mish"}, "activation_function"),
    ("gpt2", {"rope_scaling": {"type": "linear"}}, "gpt2 config .*rope_scaling"),
]


@pytest.mark.parametrize(("family", "change", "names"), BROKEN, ids=[f"{b[0]}-{next(iter(b[1]))}" for b in BROKEN])
def test_what_is_not_handled_is_refused_by_name(family, change, names):
    raw = raw_of(family)
    config_from_hf(raw)
    with pytest.raises(ValueError, match=names) as refusal:
        config_from_hf(raw | change)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("model_type", ["mamba2", "", None])
def test_an_unknown_family_is_refused_with_those_that_are_known(model_type):
    with pytest.raises(ValueError, match=f"model_type {model_type!r}.*gemma2.*smollm3"):
        config_from_hf(raw_of("llama") | {"model_type": model_type})


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 2}),  # SmolLM 2
        ("qwen2", {"use_mrope": False}),  # Qwen 2.5
        ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 5, "cache_implementation": "hybrid"}),
        ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}),  # Phi-4-mini
        ("smollm3", {"max_window_layers": 28, "transformers.js_config": {"dtype": "q4"}}),
        ("gpt2", {"n_ctx": 64, "task_specific_params": {"text-generation": {"max_length": 50}}}),
    ],
)
def test_what_released_files_carry_and_what_changes_nothing_is_read_over(family, extra):
    assert config_from_hf(raw_of(family) | extra) == config_from_hf(raw_of(family))


def test_gpt2_may_be_written_with_the_names_that_others_use():
    names = {"n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
    raw = raw_of("gpt2")
    other = {names.get(key, key): value for key, value in raw.items()}
    assert config_from_hf(other) == config_from_hf(raw)
    assert config_from_hf(raw).layers[0].ffn_width == 4 * GPT2["n_embd"]


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_phi3_calls_longrope_by_other_names(name):
    factors = {key: LONGROPE[key] for key in ("short_factor", "long_factor")}
    raw = as_v4(raw_of("phi3")) | PHI3 | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16}
    raw["rope_scaling"] = factors | {"type": name}
    longrope = raw | {"rope_scaling": factors | {"type": "longrope"}}
    assert config_from_hf(raw) == config_from_hf(longrope) == config_from_hf(transformers_reads(longrope))
    if name != "su":  # transformers 5.23 renames it too late, and misses the original context then; v4 read it
        assert config_from_hf(raw) == config_from_hf(transformers_reads(raw))


def test_stop_ids_are_what_the_config_lists():
    raw = raw_of("llama")
    assert config_from_hf(raw).stop_ids == ()
    assert config_from_hf(raw | {"eos_token_id": 7}).stop_ids == (7,)
    assert config_from_hf(raw | {"eos_token_id": [7, 9]}).stop_ids == (7, 9)
