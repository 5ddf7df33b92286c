"""Reading a Hugging Face config.json without letting anything pass unread.

A key is taken by the recipe, or it is known to change no maths, or the config is refused by its name.
"""

from __future__ import annotations

from typing import Any

from jaxinfer.config import ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HARMLESS = frozenset(  # metadata, training and generation settings: none of them changes a logit
    """_attn_implementation _attn_implementation_internal _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
    is_encoder_decoder label2id length_penalty max_length min_length mlp_dropout model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop
    residual_dropout embd_dropout return_dict return_dict_in_generate sep_token_id suppress_tokens
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version transformers.js_config typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)


class Reader:
    """A config.json whose keys are ticked off as they are read."""

    def __init__(self, raw: dict[str, Any], family: str):
        self.raw, self.family, self.taken = raw, family, set[str]()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; null and absent are the same."""
        self.taken.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a key that must be there."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.family} config has no {key!r}: add it to config.json")
        return value

    def expect(self, key: str, *values: Any) -> None:
        """A key that may be absent, or have one of these values: anything else would change the maths."""
        value = self.get(key, values[0])
        if value not in values:
            fits = " or ".join(repr(v) for v in values)
            raise ValueError(f"{self.family} config has {key} = {value!r}: only {fits} is handled")

    def choice(self, key: str, table: dict[Any, Any], default: Any = None) -> Any:
        """The entry of `table` that the key names."""
        value = self.get(key, default)
        if value not in table:
            fits = ", ".join(repr(v) for v in table)
            raise ValueError(f"{self.family} config has {key} = {value!r}: only {fits} are handled")
        return table[value]

    def activation(self, key: str, default: str) -> Any:
        """The activation that a key names."""
        return self.choice(key, ACTIVATIONS, default)

    def model(self, **fields: Any) -> ModelConfig:
        """The ModelConfig of these fields and the keys that every family has; refuses what is left unread."""
        stop = self.get("eos_token_id", [])
        fields = {
            "vocab_size": self.need("vocab_size"),
            "tied": self.get("tie_word_embeddings", False),
            "max_length": self.get("max_position_embeddings", 0),
            "bos_id": self.get("bos_token_id"),
            "stop_ids": tuple(stop) if isinstance(stop, list) else (stop,),
            "dtype": "float32",
        } | fields
        self.finish()
        return ModelConfig(**fields)

    def finish(self) -> None:
        """Refuses, by name, what nobody read."""
        surplus = sorted(set(self.raw) - self.taken - HARMLESS)
        if surplus:
            raise ValueError(
                f"{self.family} config has keys that are not handled: {', '.join(surplus)}: "
                "a key that changes the maths cannot be ignored; remove it if it does not"
            )
