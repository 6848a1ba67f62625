"""Attaching a LoRA adapter: which modules, how large, started how.

This stage turns presets into module names and checks them against the model. The engine
attaches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlora_kit.boundaries import describe_cause, is_out_of_memory, translate_errors
from qlora_kit.config import (
    ATTENTION_ALIASES,
    DEFAULT_TARGET_MODULES,
    MLP_ALIASES,
    AdapterConfig,
)
from qlora_kit.engines.contract import check_handle
from qlora_kit.engines.target_modules import (
    check_layers,
    check_names,
    check_pattern,
    check_ranks,
    resolve_targets,
)
from qlora_kit.engines.target_parameters import resolve_parameters
from qlora_kit.errors import (
    ConfigError,
    EngineError,
    QloraKitError,
    invalid_value,
)
from qlora_kit.handles import AdaptedModel, LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.script_arguments import ADAPTER_ARGUMENTS, refuse_unknown

__all__ = ["attach_lora"]

logger = logging.getLogger(__name__)


def attach_lora(
    model: LoadedModel,
    r: int = 16,
    target_modules: str | Sequence[str] = DEFAULT_TARGET_MODULES,
    lora_alpha: int | float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_gradient_checkpointing: bool | str = "auto",
    random_state: int = 3407,
    use_rslora: bool = False,
    loftq_config: Mapping[str, Any] | None = None,
    *,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    modules_to_save: Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    target_parameters: str | Sequence[str] | None = None,
    max_seq_length: int | None = None,
    **classic: Any,
) -> AdaptedModel:
    """Attach a new LoRA adapter to a loaded model (Hu et al., arXiv:2106.09685).

    Args:
        model: What :func:`~qlora_kit.load_quantized` returned, without an adapter.
        r: Rank of the update.
        target_modules: Module names, or ``"attention"``, ``"mlp"`` or ``"all-linear"``. The
            default is Llama's seven projections; where a model has others, ``"all-linear"``
            stands in for it and the log says so.
        lora_alpha: The update is scaled by ``lora_alpha / r``.
        lora_dropout: Dropout on the adapter's input; 0 is fastest.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        use_gradient_checkpointing: Recompute activations in the backward pass to save memory:
            ``True``, ``False``, ``"unsloth"`` (the same as ``True`` for the native engine), or
            ``"auto"``: on a GPU yes, on a CPU no, where it costs time and memory is not short.
        random_state: Seed of the initial weights.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (arXiv:2312.03732).
        loftq_config: ``{"loftq_bits": 4}`` starts the adapter at what quantization took away
            (arXiv:2310.08659); works on a 4-bit base.
        use_dora: Weight-decomposed adaptation (arXiv:2402.09353).
        init_lora_weights: peft's initializations: ``True``, ``"gaussian"``, ``"pissa"``,
            ``"pissa_niter_4"``, ``"loftq"`` and others.
        modules_to_save: Modules to train in full and save with the adapter, such as ``"lm_head"``.
        layers_to_transform: Indices of the layers to adapt; all by default.
        rank_pattern: Ranks by module name where they differ from ``r``.
        alpha_pattern: Alphas by module name where they differ from ``lora_alpha``.
        target_parameters: Parameters to adapt besides, such as experts that lie together:
            ``["mlp.experts.gate_up_proj"]``, or ``"experts"`` for all of them. With
            ``target_modules=[]`` nothing else is adapted.
        max_seq_length: The model's own, which the classic script gives again; no other.
        **classic: Further arguments of the classic script, where they ask for what happens anyway.

    Returns:
        The adapted model. It shares the base model's memory with ``model``, which should not be
        used any more.

    Raises:
        ConfigError: When an argument cannot work; for unknown module names, lists those that
            exist. ``UnknownOptionError`` for unknown arguments, with the nearest name.
    """
    refuse_unknown(attach_lora, classic, ADAPTER_ARGUMENTS)
    if not isinstance(model, LoadedModel):
        raise ConfigError(
            f"attach_lora takes what load_quantized returned, got {type(model).__name__}. Pass the "
            "handle on whole, as in model = attach_lora(load_quantized(...)); it unpacks as "
            "model, tokenizer wherever those are needed."
        )
    if isinstance(model, AdaptedModel):
        given = {
            "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": bias,
            "use_gradient_checkpointing": use_gradient_checkpointing,
            "random_state": random_state, "use_rslora": use_rslora, "use_dora": use_dora,
            "init_lora_weights": init_lora_weights, "loftq_config": loftq_config or None,
            "modules_to_save": modules_to_save, "layers_to_transform": layers_to_transform,
            "rank_pattern": rank_pattern or None, "alpha_pattern": alpha_pattern or None,
            "target_parameters": resolve_parameters(target_parameters, model.model),
        }  # fmt: skip
        return _keep_adapter(model, target_modules, given)
    if any(hasattr(module, "lora_A") for module in model.model.modules()):
        raise ConfigError(
            "This base carries an adapter already, which attach_lora put on it. Go on with what "
            "attach_lora returned (a cell that says model = attach_lora(model) may run again), or "
            "load the base anew."
        )
    if max_seq_length not in (None, model.max_seq_length):
        raise ConfigError(
            Setting("max_seq_length", max_seq_length, "load_quantized"),
            f": this model was loaded for {model.max_seq_length}. Give load_quantized another "
            "one, or train_sft a max_length.",
            parameter="max_seq_length",
            value=max_seq_length,
        )
    parameters = resolve_parameters(target_parameters, model.model)
    targets = resolve_targets(target_modules, model.model, are_alone=parameters is None)
    if isinstance(modules_to_save, str):
        modules_to_save = (modules_to_save,)
    if modules_to_save is not None and (
        not isinstance(modules_to_save, Iterable)
        or not all(isinstance(name, str) for name in modules_to_save)
    ):
        raise invalid_value(
            "modules_to_save",
            "must be names of modules, such as ['lm_head']",
            modules_to_save,
            "attach_lora",
        )
    if layers_to_transform is not None and not isinstance(layers_to_transform, int | Sequence):
        raise invalid_value(
            "layers_to_transform",
            "must be indices of layers, such as [0, 1]",
            layers_to_transform,
            "attach_lora",
        )
    check_names(modules_to_save or (), "modules_to_save", model.model)
    check_layers(layers_to_transform, model.model)
    if parameters is not None and layers_to_transform is not None:
        raise ConfigError(
            Setting("layers_to_transform", layers_to_transform, "attach_lora"),
            " says nothing of parameters, which would be adapted in every layer.",
            parameter="layers_to_transform",
            value=layers_to_transform,
            advice=(
                "Name those of some layers in ",
                Setting("target_parameters", of="attach_lora"),
                f", such as {f'layers.1.{parameters[0]}'!r}.",
            ),
        )
    for pattern, parameter in ((rank_pattern, "rank_pattern"), (alpha_pattern, "alpha_pattern")):
        if pattern is not None and not isinstance(pattern, Mapping):
            raise invalid_value(
                parameter, "must be a mapping of module names to numbers", pattern, "attach_lora"
            )
        check_pattern(pattern, parameter, (*targets, *(parameters or ())))
    if loftq_config is not None and not isinstance(loftq_config, Mapping):
        raise invalid_value(
            "loftq_config",
            "must be a dictionary such as {'loftq_bits': 4}",
            loftq_config,
            "attach_lora",
        )
    config = AdapterConfig(
        r=r,
        target_modules=targets,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        bias=bias,  # type: ignore[arg-type]  # checked by AdapterConfig
        use_gradient_checkpointing=use_gradient_checkpointing,
        random_state=random_state,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,
        loftq_config=dict(loftq_config) if loftq_config else None,
        modules_to_save=tuple(modules_to_save) if modules_to_save else None,
        layers_to_transform=layers_to_transform,
        rank_pattern=dict(rank_pattern) if rank_pattern else None,
        alpha_pattern=dict(alpha_pattern) if alpha_pattern else None,
        target_parameters=parameters,
    )
    check_ranks(config, targets, model.model)
    with translate_errors(lambda error: _explain_attaching(error, config)):
        attached = model.engine.attach(model, config)
    adapted = check_handle(model.engine, "attach", attached, AdaptedModel)
    logger.info(
        "Training %s of %s parameters (%.2f%%) in %s.",
        f"{adapted.trainable_parameters:,}",
        f"{adapted.total_parameters:,}",
        100 * adapted.trainable_parameters / max(1, adapted.total_parameters),
        ", ".join((*targets, *(parameters or ()))),
    )
    return adapted


def _keep_adapter(
    model: AdaptedModel, target_modules: str | Sequence[str], given: Mapping[str, Any]
) -> AdaptedModel:
    """The model as it is where it is asked for again, as when a notebook's cell runs twice.

    Raises:
        ConfigError: When other settings are asked for; names them.
    """
    own = model.adapter
    changes = [
        f"{name}={value!r} (it has {getattr(own, name)!r})"
        for name, value in given.items()
        if _as_tuple(getattr(own, name)) != _as_tuple(value)
    ]
    presets = {"attention": ATTENTION_ALIASES, "mlp": MLP_ALIASES}
    has = set(_as_tuple(own.target_modules) or ())
    if isinstance(target_modules, str) and target_modules in presets:
        is_same = has <= set(presets[target_modules])
    elif target_modules == "all-linear":
        is_same = has >= set(DEFAULT_TARGET_MODULES)
    elif target_modules is DEFAULT_TARGET_MODULES and own.target_parameters:
        is_same = has <= set(DEFAULT_TARGET_MODULES)
    else:
        is_same = has == set(_as_tuple(target_modules) or ())
    if not is_same:
        changes.append(f"target_modules={target_modules!r}")
    if changes:
        raise ConfigError(
            f"This model already has an adapter, and {', '.join(changes)} would be another one. "
            "Load the base again for a new one: attach_lora(load_quantized(...)); or go on "
            "training this one."
        )
    logger.info("The model already has this adapter; it is kept as it is, trained or not.")
    return model


def _as_tuple(value: Any) -> Any:
    """A list, a tuple or one name alike."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return (value,) if isinstance(value, str) else value
    return tuple(value)


def _explain_attaching(error: Exception, config: AdapterConfig) -> QloraKitError:
    if is_out_of_memory(error):
        return EngineError(
            f"There is not enough memory to attach an adapter of rank {config.r}: "
            f"{describe_cause(error)} Load the base again and attach a smaller one."
        )
    return ConfigError(f"peft refuses this adapter: {describe_cause(error)} Load the base again.")
