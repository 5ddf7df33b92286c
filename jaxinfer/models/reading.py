"""Reading a Hugging Face config.json without letting anything pass unread.

A key is taken by the recipe, or it is known to change no maths, or the config is refused by its name. An absent key
means what the family's own config class in transformers means by default (the recipe's DEFAULTS, which a test compares
with it); a null means that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# metadata, training and generation settings: none of them changes a logit
HARMLESS = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping embd_dropout embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range is_decoder label2id length_penalty max_length max_new_tokens
    min_length mlp_dropout model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty resid_pdrop residual_dropout return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
OFF = ("add_cross_attention", "is_encoder_decoder", "pruned_heads", "tie_encoder_decoder")  # handled if false or empty


class Reader:
    """A config.json whose keys are ticked off as they are read."""

    def __init__(self, raw: Mapping[str, Any], family: str, defaults: Mapping[str, Any] | None = None):
        self.raw, self.family, self.taken = raw, family, set[str]()
        self.defaults = defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or what the family means by its absence; `default` where that is null."""
        self.taken.add(key)
        value = self.raw[key] if key in self.raw else self.defaults.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a key that must have one."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.family} config has no {key!r}: add it to config.json")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """The value of a key that counts something."""
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.family} config has {key} = {value!r}: it must be a whole number of at least 1")
        return value

    def expect(self, key: str, *values: Any) -> None:
        """A key that may be absent, or have one of these values: anything else would change the maths."""
        value = self.get(key, values[0])
        if value not in values:
            fits = " or ".join(repr(v) for v in values)
            raise ValueError(f"{self.family} config has {key} = {value!r}: only {fits} is handled")

    def skip(self, *keys: str) -> None:
        """Keys that this family's checkpoints carry and that change nothing."""
        self.taken.update(keys)

    def activation(self, key: str) -> Any:
        """The activation that a key names."""
        value = self.need(key)
        if value not in ACTIVATIONS:
            fits = ", ".join(repr(v) for v in ACTIVATIONS)
            raise ValueError(f"{self.family} config has {key} = {value!r}: only {fits} are handled")
        return ACTIVATIONS[value]

    def heads(self) -> dict[str, Any]:
        """The heads of an attention layer: fields of a LayerSpec."""
        num_heads = self.size("num_attention_heads")
        head_width = self.size("head_dim", self.size("hidden_size") // num_heads)
        return {
            "num_heads": num_heads,
            "num_kv_heads": self.size("num_key_value_heads", num_heads),
            "head_width": head_width,
            "scale": head_width**-0.5,
        }

    def windows(self, window: int | None, slides: list[bool]) -> list[int | None]:
        """W of each layer, or None: by `layer_types` where the config lists them, else by the family's rule."""
        kinds = {"sliding_attention": True, "full_attention": False}
        listed = self.get("layer_types")
        if listed is not None:
            if unknown := sorted(set(listed) - set(kinds)):
                raise ValueError(f"{self.family} config has layer_types {unknown}: only {', '.join(kinds)} are handled")
            if len(listed) != len(slides):
                raise ValueError(f"{self.family} config has {len(slides)} layers but {len(listed)} layer_types")
            slides = [kinds[kind] for kind in listed]
        if any(slides) and window is None:
            raise ValueError(
                f"{self.family} config has sliding layers without a window: set sliding_window, and use_sliding_window"
            )
        return [window if slide else None for slide in slides]

    def model(self, **fields: Any) -> ModelConfig:
        """The ModelConfig of these fields and the keys that every family has; refuses what is left unread."""
        stop = self.get("eos_token_id", [])
        fields = {
            "vocab_size": self.size("vocab_size"),
            "tied": self.get("tie_word_embeddings", False),
            "max_length": self.get("max_position_embeddings", 0),
            "bos_id": self.get("bos_token_id"),
            "stop_ids": tuple(stop) if isinstance(stop, list) else (stop,),
            "dtype": "float32",
        } | fields
        if "width" not in fields:
            fields["width"] = self.size("hidden_size")
        self.finish()
        for spec in dict.fromkeys(fields["layers"]):
            self.check(spec)
        return ModelConfig(**fields)

    def check(self, spec: LayerSpec) -> None:
        """Refuses a layer whose numbers do not fit together."""
        if spec.num_heads % spec.num_kv_heads:
            raise ValueError(
                f"{self.family} config has {spec.num_heads} query heads on {spec.num_kv_heads} kv heads: "
                "the kv heads must divide the query heads"
            )
        if spec.rope is not None and spec.rope.width > spec.head_width:
            raise ValueError(f"{self.family} config has heads of {spec.head_width}: rope needs an even width")
        if spec.window is not None and spec.window < 1:
            raise ValueError(
                f"{self.family} config has a sliding window of {spec.window}: it must be 1 or more, or null"
            )

    def finish(self) -> None:
        """Refuses, by name, what nobody read."""
        for key in OFF:
            if self.raw.get(key):
                raise ValueError(f"{self.family} config has {key} = {self.raw[key]!r}: it is not handled")
        given = {key for key, value in self.raw.items() if value is not None}  # null: there is none
        surplus = sorted(given - self.taken - set(HARMLESS.split()) - set(OFF))
        if surplus:
            raise ValueError(
                f"{self.family} config has keys that are not handled: {', '.join(surplus)}: "
                "a key that changes the maths cannot be ignored; remove it if it does not"
            )
