"""What ``generate_stream`` was asked for, as transformers' ``GenerationConfig``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.boundaries import describe_cause
from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean, invalid_value
from qlora_kit.generation.field_types import check_fields
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.values import is_finite_number, is_whole_number

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["Stops", "check_sampling", "make_config", "read_stops"]

#: No model writes as many.
_MOST_TOKENS: Final = 2**31

# Values that mean "no filtering"; anything else warns when decoding greedily.
_NEUTRAL: Final = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}

#: Ways of generating that do not yield one answer token by token, and what to use instead.
_REFUSED: Final[Mapping[str, str]] = {
    "num_beams": "Beam search knows its answer only at the end; sample or decode greedily.",
    "num_return_sequences": "One stream is one answer; call generate_stream once for each.",
    "penalty_alpha": "Contrastive search is not streamed; sample or decode greedily.",
    "max_length": "It would count the prompt as well; use max_new_tokens.",
    "return_dict_in_generate": "Chunks are what is returned.",
    "pad_token_id": "A single answer needs no padding.",
    "stop_strings": "Use stop=.",
}

_BEAMS: Final = "It belongs to beam search, which is not streamed."
_ASSISTED: Final = "It belongs to assisted generation, which is not streamed."
_CHUNKS: Final = "Chunks are what is returned, without it."
_ENCODERS: Final = "It belongs to models with an encoder."
#: Fields that would change nothing of an answer, and why.
_WITHOUT_EFFECT: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "low_memory"),
        _BEAMS,
    ),
    **dict.fromkeys(
        ("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
         "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
         "target_lookbehind"),
        _ASSISTED,
    ),
    **dict.fromkeys(
        ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), _CHUNKS
    ),
    **dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id"), _ENCODERS),
}  # fmt: skip
#: Fields that change nothing unless another one is given.
_NEEDED: Final[Mapping[str, str]] = {
    "cache_config": "cache_implementation",
    "max_matching_ngram_size": "prompt_lookup_num_tokens",
}


def check_sampling(
    max_new_tokens: Any, filters: Mapping[str, Any], repetition_penalty: Any, seed: Any
) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: At the first of them.
    """
    if not is_whole_number(max_new_tokens, at_least=1):
        raise invalid_value(
            "max_new_tokens",
            "must be a whole number of at least 1",
            max_new_tokens,
            "generate_stream",
        )
    if max_new_tokens >= _MOST_TOKENS:
        raise invalid_value(
            "max_new_tokens", f"must be below {_MOST_TOKENS:,}", "more", "generate_stream"
        )
    for name, value in {**filters, "repetition_penalty": repetition_penalty}.items():
        if value is not None and not is_finite_number(value):
            raise ConfigError(f"{name} must be a number, got {value!r}.")
    for name in ("top_p", "min_p"):
        if filters[name] is not None and not 0 <= filters[name] <= 1:
            raise ConfigError(f"{name} is a probability from 0 to 1, got {filters[name]!r}.")
    if filters["temperature"] is not None and filters["temperature"] <= 0:
        raise ConfigError(
            Setting("temperature", of="generate_stream"),
            f" must be above 0, got {filters['temperature']!r}; ",
            Setting("do_sample", False, "generate_stream"),
            " is greedy.",
            parameter="temperature",
            value=filters["temperature"],
        )
    if filters["top_k"] is not None and not is_whole_number(filters["top_k"], at_least=0):
        raise ConfigError(
            Setting("top_k", of="generate_stream"),
            f" must be a whole number of tokens, got {filters['top_k']!r}.",
            parameter="top_k",
            value=filters["top_k"],
        )
    if repetition_penalty is not None and repetition_penalty <= 0:
        raise invalid_value(
            "repetition_penalty", "must be above 0", repetition_penalty, "generate_stream"
        )
    if seed is not None and (not is_whole_number(seed, at_least=0) or seed >= 2**63):
        raise invalid_value(
            "seed", "must be a whole number from 0 to 2**63", seed, "generate_stream"
        )


@dataclass(frozen=True)
class Stops:
    """What ends an answer besides the model's own end tokens.

    Attributes:
        strings: Texts that are not part of the answer.
        token_ids: Special tokens, which an answer's text does not show.
    """

    strings: tuple[str, ...]
    token_ids: frozenset[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "strings", tuple(dict.fromkeys(self.strings)))


def read_stops(stop: Any, model: LoadedModel) -> Stops:
    """Stop strings, however they were given, and special tokens among them by their ids.

    Raises:
        ConfigError: When one of them is empty, not text, or has a special token inside.
    """
    given = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, Sequence) or any(not isinstance(s, str) or not s for s in given):
        raise invalid_value("stop", "must be non-empty strings", stop, "generate_stream")
    special = {
        token.content: token_id
        for token_id, token in model.tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for text in given:
        inside = next((name for name in special if name in text and name != text), None)
        if inside is not None and text not in special:
            raise invalid_value(
                "stop",
                f"cannot have the special token {inside} among other text, because an answer's "
                "text has no special tokens; give it alone",
                text,
                "generate_stream",
            )
    ids = frozenset(special[text] for text in given if text in special)
    return Stops((*given, *model.stop_strings), ids)


def make_config(
    model: LoadedModel, fields: Mapping[str, Any], caller: str = "generate_stream"
) -> GenerationConfig:
    """The model's own generation configuration with ``fields`` on top.

    Raises:
        UnknownOptionError: For names that are not fields, all of them at once.
        ConfigError: When transformers refuses a value, or it cannot be streamed.
    """
    import copy

    from transformers import GenerationConfig

    config: GenerationConfig = copy.deepcopy(model.model.generation_config)
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    unknown = [name for name in fields if name not in known]
    if unknown:
        hints = "".join(did_you_mean(name, known) for name in unknown)
        if "batch_size" in unknown:
            hints += " generate_batch answers at_once prompts at the same time."
        raise UnknownOptionError(
            f"{caller} and GenerationConfig have no {', '.join(map(repr, unknown))}.{hints}"
        )
    for name, advice in _REFUSED.items():
        if fields.get(name) not in (None, False, 1):
            raise ConfigError(
                Setting(name, fields[name], "generate_stream"),
                " cannot be streamed.",
                parameter=name,
                value=fields[name],
                advice=advice,
            )
    check_fields(fields, model.model.get_input_embeddings().weight.shape[0])
    _refuse_without_effect(fields, GenerationConfig())
    if not fields["do_sample"]:
        ignored = [name for name in _NEUTRAL if fields.get(name) is not None]
        if ignored:
            raise ConfigError(
                Setting("do_sample", False, "generate_stream"),
                f" takes the most likely token, whatever {ignored[0]} is. Drop one of the two.",
                parameter="do_sample",
                value=False,
            )
        for name, value in _NEUTRAL.items():
            setattr(config, name, value)
    config.max_length = None
    for name, value in fields.items():
        setattr(config, name, value)
    config.eos_token_id = _stop_token_ids(model, fields.get("eos_token_id"))
    config.pad_token_id = model.tokenizer.pad_token_id
    try:
        config.validate()
    # It compares and computes with what it is given, whatever that is.
    except Exception as error:
        raise ConfigError(
            f"transformers refuses these settings: {describe_cause(error)}"
        ) from error
    return config


def _refuse_without_effect(fields: Mapping[str, Any], usual: GenerationConfig) -> None:
    for name, value in fields.items():
        if value is None or value is False or value == getattr(usual, name):
            continue
        needed = _NEEDED.get(name)
        if needed is not None and fields.get(needed) is None:
            why = f"It needs {needed}."
        elif name in _WITHOUT_EFFECT:
            why = _WITHOUT_EFFECT[name]
        else:
            continue
        raise ConfigError(
            Setting(name, value, "generate_stream"),
            " would change nothing.",
            parameter=name,
            value=value,
            advice=f"{why} Leave it out.",
        )


def _stop_token_ids(model: LoadedModel, given: Any) -> list[int]:
    """What ends an answer: what the model was loaded with, and what it was trained to end with."""
    if given is not None:
        ids = list(given) if isinstance(given, list | tuple) else [given]
        vocabulary = model.model.get_input_embeddings().weight.shape[0]
        if not ids or not all(is_whole_number(id_, at_least=0) and id_ < vocabulary for id_ in ids):
            raise invalid_value(
                "eos_token_id", f"must be token ids below {vocabulary}", given, "generate_stream"
            )
        return ids
    return list(model.stop_token_ids)
