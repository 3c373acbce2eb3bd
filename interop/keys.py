"""The keys of a `config.json`, of which none is passed over: each is asked for, or changes nothing."""

from collections.abc import Mapping
from typing import Any

# Keys that say nothing of the function from tokens to logits: dropout is for training, and so are the
# coefficients of routers' losses; the rest is about files, caches and how a text is begun and ended.
HARMLESS = set(
    """
    architectures model_type torch_dtype dtype transformers_version _name_or_path bos_token_id eos_token_id
    pad_token_id sep_token_id unk_token_id decoder_start_token_id use_cache initializer_range
    attention_dropout
    hidden_dropout attn_pdrop embd_pdrop resid_pdrop residual_dropout embedding_dropout hidden_dropout_prob
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise pretraining_tp
    cache_implementation gradient_checkpointing summary_type summary_use_proj summary_activation
    summary_first_dropout summary_proj_to_labels task_specific_params n_ctx auto_map ep_size output_attentions
    output_hidden_states return_dict is_encoder_decoder chunk_size_feed_forward id2label label2id
    use_mla attn_implementation _attn_implementation problem_type tokenizer_class
    reorder_and_upcast_attn initializer_factor
    _sliding_window_pattern
    """.split()
)


class Keys:
    """The keys of a config.json, each of which must be asked for, or be harmless."""

    def __init__(self, values: Mapping[str, Any]):
        self.values, self.asked = dict(values), set(HARMLESS)

    def get(self, name: str, default: Any = None) -> Any:
        """A value, where null is as good as absent."""
        self.asked.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a value that changes what is computed; the first of those allowed is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            shown = " or ".join(str(one).lower() for one in allowed)
            raise ValueError(f"config.json: {name}={value} is not supported; only {shown} is")

    def check_all_read(self) -> None:
        """Refuse what nobody has asked for: it may change what is computed."""
        strange = sorted(name for name in self.values if name not in self.asked)
        if strange:
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise ValueError(
                f"config.json: {strange[0]}={self.values[strange[0]]!r}{more} is not understood, and may "
                "change what the model computes"
            )
