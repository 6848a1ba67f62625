"""Types and ranges of ``GenerationConfig``'s fields, which transformers takes as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from qlora_kit.errors import invalid_value
from qlora_kit.values import is_finite_number, is_whole_number

__all__ = ["check_fields"]

Check = Callable[[Any], bool]


def _is_share(value: Any) -> bool:
    return is_finite_number(value, at_least=0) and value <= 1


def _are_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        is_whole_number(one, at_least=0) for one in value
    )


def _are_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_are_ids(one) and one for one in value)


#: Fields that hold token ids, or lists of them.
_IDS: Final = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_eos_token_id",
    "forced_bos_token_id",
)  # fmt: skip

#: What must hold of a field's value, and how to say it. ``None`` always means the default.
_CHECKS: Final[Mapping[str, tuple[str, Check]]] = {
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing",
         "output_scores", "output_logits", "output_attentions", "output_hidden_states",
         "disable_compile", "low_memory", "is_assistant"),
        ("must be True or False", lambda value: isinstance(value, bool)),
    ),
    **dict.fromkeys(
        ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"),
        ("is a share from 0 to 1", _is_share),
    ),
    **dict.fromkeys(
        ("repetition_penalty", "encoder_repetition_penalty", "max_time"),
        ("must be a number above 0", lambda value: is_finite_number(value) and value > 0),
    ),
    **dict.fromkeys(
        ("guidance_scale", "diversity_penalty", "length_penalty"),
        ("must be a number", is_finite_number),
    ),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens",
         "prompt_lookup_num_tokens", "forced_bos_token_id", "bos_token_id",
         "decoder_start_token_id", "assistant_early_exit", "num_assistant_tokens"),
        ("must be a whole number of at least 0", lambda value: is_whole_number(value, at_least=0)),
    ),
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens"), ("must be a list of token ids", _are_ids)
    ),
    "forced_eos_token_id": (
        "must be a token id or a list of them",
        lambda value: is_whole_number(value, at_least=0) or _are_ids(value),
    ),
    "bad_words_ids": ("must be a list of lists of token ids", _are_words),
    "exponential_decay_length_penalty": (
        "must be a token count and a factor, such as [100, 1.05]",
        lambda value: isinstance(value, list | tuple) and len(value) == 2
        and is_whole_number(value[0], at_least=0) and is_finite_number(value[1]),
    ),
    "cache_config": ("must be a dictionary", lambda value: isinstance(value, Mapping)),
    "cache_implementation": ("must be text", lambda value: isinstance(value, str)),
}  # fmt: skip


def check_fields(fields: Mapping[str, Any], vocabulary: int) -> None:
    """Refuse values of another kind than a field takes.

    Args:
        fields: Fields of ``GenerationConfig`` by name.
        vocabulary: How many token ids there are.

    Raises:
        ConfigError: At the first of them.
    """
    for name, value in fields.items():
        expected, holds = _CHECKS.get(name, ("", lambda _: True))
        if value is not None and not holds(value):
            raise invalid_value(name, expected, value, "generate_stream")
        if name in _IDS and value is not None and any(id_ >= vocabulary for id_ in _flatten(value)):
            raise invalid_value(
                name, f"must be token ids below {vocabulary}", value, "generate_stream"
            )
    least, most = fields.get("min_new_tokens"), fields.get("max_new_tokens")
    if least is not None and most is not None and least > most:
        raise invalid_value(
            "min_new_tokens", f"is beyond max_new_tokens={most}", least, "generate_stream"
        )


def _flatten(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
        return
    for one in value:
        yield from _flatten(one)
