"""Arguments that people know from the classic script, and where they belong here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean

__all__ = ["ADAPTER_ARGUMENTS", "LOADING_ARGUMENTS", "ScriptArgument", "refuse_unknown"]


class ScriptArgument(NamedTuple):
    """An argument that is not taken.

    Attributes:
        advice: What to do instead.
        harmless: Values that ask for what happens anyway; ``None`` for any value.
    """

    advice: str
    harmless: tuple[Any, ...] | None = (None,)


#: What ``FastLanguageModel.get_peft_model`` and ``FastModel.get_peft_model`` take besides.
ADAPTER_ARGUMENTS: Final[Mapping[str, ScriptArgument]] = {
    "layers_pattern": ScriptArgument("Name modules in full in target_modules instead."),
    "finetune_last_n_layers": ScriptArgument(
        "Give layers_to_transform the indices of those layers instead."
    ),
    "finetune_vision_layers": ScriptArgument("Language models have none.", None),
    "finetune_audio_layers": ScriptArgument("Language models have none.", None),
    "finetune_language_layers": ScriptArgument("Nothing else is trained here.", (None, True)),
    "finetune_attention_modules": ScriptArgument(
        "Use target_modules='mlp' to leave attention out.", (None, True)
    ),
    "finetune_mlp_modules": ScriptArgument(
        "Use target_modules='attention' to leave the MLP out.", (None, True)
    ),
    "task_type": ScriptArgument("Adapters are for causal language models.", (None, "CAUSAL_LM")),
    "temporary_location": ScriptArgument("Nothing is moved to disk.", None),
    "qat_scheme": ScriptArgument("Quantization-aware training is not offered."),
    "ensure_weight_tying": ScriptArgument("Give modules_to_save what is to be trained in full."),
    "offload_layers": ScriptArgument("Activations stay on the device.", (None, False, 0)),
    "checkpoint_skip_layers": ScriptArgument(
        "Give train_sft plan={'checkpointing': 'selective', 'checkpointed_layers': N}.", (None, 0)
    ),
    "gradient_checkpointing": ScriptArgument("Its name here is use_gradient_checkpointing.", ()),
    "activation_checkpointing": ScriptArgument("Its name here is use_gradient_checkpointing.", ()),
    "use_activation_checkpointing": ScriptArgument(
        "Its name here is use_gradient_checkpointing.", ()
    ),
    "seed": ScriptArgument("Its name here is random_state.", ()),
}

#: What ``FastLanguageModel.from_pretrained`` takes besides.
LOADING_ARGUMENTS: Final[Mapping[str, ScriptArgument]] = {
    "load_in_16bit": ScriptArgument("Use load_in_4bit=False.", (None, False)),
    "load_in_fp8": ScriptArgument("Use load_in_8bit=True.", (None, False)),
    "full_finetuning": ScriptArgument(
        "Adapters are trained here, and what attach_lora's modules_to_save names.", (None, False)
    ),
    "device_map_planner_kwargs": ScriptArgument("Give device_map a map of transformers'."),
    "rope_scaling": ScriptArgument("Set it in the checkpoint's config.json."),
    "fix_tokenizer": ScriptArgument("The tokenizer is used as it is.", None),
    "use_gradient_checkpointing": ScriptArgument("Give it to attach_lora.", (None, "unsloth")),
    "resize_model_vocab": ScriptArgument("Resize the checkpoint with transformers first."),
    "use_exact_model_name": ScriptArgument("Names are always taken as they are.", None),
    "offload_embedding": ScriptArgument("Embeddings stay on the device.", (None, False, "auto")),
    "float32_mixed_precision": ScriptArgument("Use dtype='float32'.", (None, False)),
    "fast_inference": ScriptArgument(
        "Export the model for the server that runs it.", (None, False)
    ),
    "gpu_memory_utilization": ScriptArgument("Memory is taken as needed.", None),
    "float8_kv_cache": ScriptArgument("The cache has the model's dtype.", (None, False)),
    "random_state": ScriptArgument("Nothing random happens in loading; see attach_lora.", None),
    "max_lora_rank": ScriptArgument("Any rank can be attached.", None),
    "disable_log_stats": ScriptArgument("Logging follows Python's logging.", None),
    "qat_scheme": ScriptArgument("Quantization-aware training is not offered."),
    "unsloth_tiled_mlp": ScriptArgument("Give train_sft a plan if memory is short.", (None, False)),
    "text_only": ScriptArgument("Language models are loaded only.", None),
    "quantization_config": ScriptArgument(
        "load_in_4bit=True is NF4 with double quantization, load_in_8bit=True LLM.int8()."
    ),
    "torch_dtype": ScriptArgument("Its name here is dtype.", ()),
    "attn_implementation": ScriptArgument("The engine chooses attention; see train_sft's plan."),
    "max_length": ScriptArgument("Its name here is max_seq_length.", ()),
}


def refuse_unknown(
    function: Callable[..., Any], given: Mapping[str, Any], elsewhere: Mapping[str, ScriptArgument]
) -> None:
    """Let harmless arguments of the classic script pass, and explain the others.

    Args:
        function: What was called, for its name and parameters.
        given: Keyword arguments that it does not have.
        elsewhere: Known ones among them.

    Raises:
        ConfigError: For a known argument that asks for something else than what happens.
        UnknownOptionError: For any other, with the nearest names.
    """
    name = function.__name__
    own = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for argument, value in given.items():
        known = elsewhere.get(argument)
        if known is None:
            hint = did_you_mean(argument, own) or f" It has: {', '.join(own)}."
            raise UnknownOptionError(f"{name} has no argument {argument!r}.{hint}")
        if known.harmless is None or any(
            value is harmless or (isinstance(harmless, str | int) and value == harmless)
            for harmless in known.harmless
        ):
            continue
        raise ConfigError(
            f"{name} does not take {argument}={value!r}.",
            parameter=argument,
            value=value,
            advice=known.advice,
        )
