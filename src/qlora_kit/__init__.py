"""Fine-tune a language model with QLoRA on any machine, and export it to what comes next.

    load_quantized -> attach_lora -> train_sft -> generate_stream / export_model

Importing this package imports none of the heavy libraries: every public name is resolved
on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__all__ = [
    "AdaptedModel",
    "AdapterConfig",
    "AlpacaFormatter",
    "Answer",
    "Artifact",
    "ChatFormatter",
    "Check",
    "DataSource",
    "EvaluationResult",
    "ExportEstimate",
    "ExportRequest",
    "ExportResults",
    "Exporter",
    "Formatter",
    "FormatterBase",
    "LoadConfig",
    "LoadedModel",
    "Pipeline",
    "PipelineResult",
    "PromptCompletionFormatter",
    "QloraKitError",
    "Segment",
    "TextChunk",
    "TrainResult",
    "TrainingForecast",
    "Verification",
    "__version__",
    "attach_lora",
    "available_exporters",
    "check_export",
    "check_pipeline",
    "check_training",
    "describe_exporters",
    "errors",
    "evaluate",
    "export_model",
    "formatter_from_spec",
    "generate_batch",
    "generate_stream",
    "get_exporter",
    "hookimpl",
    "hookspec",
    "load_quantized",
    "nest_export",
    "pack_examples",
    "plan_training",
    "recipe_from_run",
    "run_pipeline",
    "run_recipe",
    "train_sft",
    "write_report",
]

_HOME_OF: Final = {
    "AdaptedModel": "handles",
    "AdapterConfig": "config",
    "AlpacaFormatter": "data",
    "Artifact": "results",
    "ChatFormatter": "data",
    "Check": "results",
    "DataSource": "data",
    "EvaluationResult": "evaluation",
    "ExportEstimate": "hookspecs",
    "ExportRequest": "hookspecs",
    "ExportResults": "results",
    "Exporter": "hookspecs",
    "Formatter": "data",
    "FormatterBase": "data",
    "LoadConfig": "config",
    "LoadedModel": "handles",
    "Pipeline": "pipeline",
    "PipelineResult": "pipeline",
    "PromptCompletionFormatter": "data",
    "QloraKitError": "errors",
    "Segment": "data",
    "Answer": "results",
    "TextChunk": "results",
    "TrainResult": "results",
    "TrainingForecast": "planning",
    "Verification": "results",
    "attach_lora": "adapters",
    "available_exporters": "export",
    "check_export": "export",
    "check_pipeline": "pipeline",
    "check_training": "training",
    "describe_exporters": "export",
    "evaluate": "evaluation",
    "export_model": "export",
    "formatter_from_spec": "data",
    "generate_batch": "generation",
    "generate_stream": "generation",
    "get_exporter": "export",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "load_quantized": "loading",
    "nest_export": "export",
    "pack_examples": "data",
    "plan_training": "planning",
    "recipe_from_run": "recipes",
    "run_pipeline": "pipeline",
    "run_recipe": "recipes",
    "train_sft": "training",
    "write_report": "report",
}

if TYPE_CHECKING:
    from qlora_kit import errors
    from qlora_kit.adapters import attach_lora
    from qlora_kit.config import AdapterConfig, LoadConfig
    from qlora_kit.data import (
        AlpacaFormatter,
        ChatFormatter,
        DataSource,
        Formatter,
        FormatterBase,
        PromptCompletionFormatter,
        Segment,
        formatter_from_spec,
        pack_examples,
    )
    from qlora_kit.errors import QloraKitError
    from qlora_kit.evaluation import EvaluationResult, evaluate
    from qlora_kit.export import (
        available_exporters,
        check_export,
        describe_exporters,
        export_model,
        get_exporter,
        nest_export,
    )
    from qlora_kit.generation import generate_batch, generate_stream
    from qlora_kit.handles import AdaptedModel, LoadedModel
    from qlora_kit.hookspecs import Exporter, ExportEstimate, ExportRequest, hookimpl, hookspec
    from qlora_kit.loading import load_quantized
    from qlora_kit.pipeline import Pipeline, PipelineResult, check_pipeline, run_pipeline
    from qlora_kit.planning import TrainingForecast, plan_training
    from qlora_kit.recipes import recipe_from_run, run_recipe
    from qlora_kit.report import write_report
    from qlora_kit.results import (
        Answer,
        Artifact,
        Check,
        ExportResults,
        TextChunk,
        TrainResult,
        Verification,
    )
    from qlora_kit.training import check_training, train_sft

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("qlora-kit")
    elif name == "errors":
        value = importlib.import_module("qlora_kit.errors")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(f"qlora_kit.{_HOME_OF[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
