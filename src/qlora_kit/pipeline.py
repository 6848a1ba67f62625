"""The whole way as one value: check everything, load, attach, train, export.

What can be known to be wrong without a model is refused before a weight is read: settings,
rows, templates, formats, destinations. The command line and Python scripts run the same.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from qlora_kit import ranks
from qlora_kit.adapters import attach_lora
from qlora_kit.config import AdapterConfig, LoadConfig
from qlora_kit.errors import ConfigError, UnknownOptionError, did_you_mean
from qlora_kit.export import check_export, export_model
from qlora_kit.handles import AdaptedModel
from qlora_kit.loading import load_quantized
from qlora_kit.messages import Setting
from qlora_kit.report import write_report
from qlora_kit.results import ExportResults, TrainResult
from qlora_kit.training import check_training, train_sft
from qlora_kit.values import is_finite_number

if TYPE_CHECKING:
    from qlora_kit.data import FormatterPlan, RawRows

__all__ = [
    "FORMATTER_OPTIONS",
    "CheckedPipeline",
    "Pipeline",
    "PipelineResult",
    "check_pipeline",
    "run_pipeline",
]

logger = logging.getLogger(__name__)

#: What ``formatting`` takes.
FORMATTER_OPTIONS: Final = (
    "template", "columns", "system", "response_only", "eos_token", "on_bad_rows",
    "max_reported_rows", "formatter",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Everything a fine-tuning takes, as plain values.

    Attributes:
        model: What ``load_quantized`` takes: a folder, an adapter's folder, a ``.gguf`` file or a
            hub name.
        data: Rows to train on: a file, a pattern, a folder, a hub data set's name, a
            ``datasets.Dataset``, rows in a list, or a list of paths and of
            :class:`~qlora_kit.DataSource`.
        split: Which split of ``data``.
        eval_data: Held-out rows, of the same kinds.
        eval_split: Which split of them; by default that of ``data``.
        eval_fraction: A random share of ``data`` to hold out instead, between 0 and 1.
        eval_seed: What chooses that share; by default ``data_seed``.
        data_seed: What chooses rows of a source whose weight is no whole number.
        loading: Further arguments of ``load_quantized``.
        adapter: Arguments of ``attach_lora``. A saved adapter trains on as it is and takes none.
        formatting: ``template`` (a name, a text or a file), ``columns``, ``system``,
            ``response_only``, ``eos_token``, ``on_bad_rows``, or ``formatter``, what a
            formatter's ``template_spec()`` said; by default the columns decide.
        training: Further arguments of ``train_sft``, ``SFTConfig``'s fields among them.
        exports: Formats to write afterwards, or a mapping of formats to their options.
        export_path: The folder for them, one folder inside it for each format; by default the
            run's output folder.
        export_options: Options that go to every format that has them.
        overwrite: Replace earlier exports.
    """

    model: str | os.PathLike[str]
    data: Any
    split: str = "train"
    eval_data: Any = None
    eval_split: str | None = None
    eval_fraction: float | None = None
    eval_seed: int | None = None
    data_seed: int = 3407
    loading: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    formatting: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    exports: Sequence[str] | Mapping[str, Mapping[str, Any]] = ()
    export_path: str | os.PathLike[str] | None = None
    export_options: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class CheckedPipeline:
    """A pipeline that lacks nothing but its model: what was read and found while checking.

    Attributes:
        asked: The pipeline.
        rows: The rows to train on.
        eval_rows: The rows to evaluate on, or ``None``.
        formatter: What formats them, where something was said about it; ``None`` leaves it to
            ``train_sft``, which chooses by columns.
    """

    asked: Pipeline
    rows: RawRows
    eval_rows: RawRows | None
    formatter: FormatterPlan | None


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline made.

    Attributes:
        model: The trained model, in memory.
        training: How its training went.
        exports: Artifacts by format and what failed; ``None`` when training was interrupted or
            no format was asked for.
    """

    model: AdaptedModel
    training: TrainResult
    exports: ExportResults | None


def check_pipeline(pipeline: Pipeline) -> CheckedPipeline:
    """Refuse whatever needs no model to be known to be wrong; rows are read and checked.

    Args:
        pipeline: What is to be done.

    Returns:
        The pipeline with its rows read, for :func:`run_pipeline`.

    Raises:
        QloraKitError: What the stage concerned would raise, before any weight is read.
    """
    if not isinstance(pipeline.model, str | os.PathLike):
        raise ConfigError(
            f"model_name must be a folder, a .gguf file or a hub name; got {pipeline.model!r}.",
            parameter="model_name",
            value=pipeline.model,
        )
    _check_names("load_quantized", pipeline.loading, load_quantized, taken=("model_name",))
    LoadConfig(
        model_name=str(pipeline.model), **_fields_of(LoadConfig, pipeline.loading, skip=("dtype",))
    )
    _check_names("attach_lora", pipeline.adapter, attach_lora, taken=("model",))
    AdapterConfig(**_fields_of(AdapterConfig, pipeline.adapter))
    training = _training_arguments(pipeline)
    if pipeline.exports:
        _check_exports(pipeline, None)
    rows, eval_rows, plan = _read_data(pipeline)
    has_eval = eval_rows is not None or pipeline.eval_fraction is not None
    check_training(has_eval=has_eval, **training)
    return CheckedPipeline(pipeline, rows, eval_rows, plan)


def run_pipeline(
    pipeline: Pipeline | CheckedPipeline,
    *,
    on_trained: Callable[[TrainResult], None] | None = None,
) -> PipelineResult:
    """Check, load, attach, train and export.

    Args:
        pipeline: What is to be done, or what :func:`check_pipeline` made of it.
        on_trained: Called with the training's result before anything is exported.

    Returns:
        The model, its training and its exports. Look at ``exports.failures``, or call
        ``exports.raise_for_failures()``: one format that fails does not stop the others.

    Raises:
        QloraKitError: What a stage raises; everything that can be known before a weight is read
            is raised before.
    """
    checked = pipeline if isinstance(pipeline, CheckedPipeline) else check_pipeline(pipeline)
    asked = checked.asked
    model = load_quantized(asked.model, **_loading_arguments(asked))
    if not isinstance(model, AdaptedModel):
        model = attach_lora(model, **asked.adapter)
    else:
        _check_against_saved(model, asked.adapter)
    if asked.exports:
        _check_exports(asked, model)
    formatter = None if checked.formatter is None else checked.formatter.make(model.tokenizer)
    rows: Any = checked.rows
    eval_rows: Any = checked.eval_rows
    if asked.eval_fraction is not None and formatter is not None:
        seed = asked.data_seed if asked.eval_seed is None else asked.eval_seed
        rows, eval_rows = formatter.load(rows).split(asked.eval_fraction, seed)
    training = train_sft(
        model,
        rows,
        formatter=formatter,
        eval_dataset=eval_rows,
        **_training_arguments(asked),
    )
    if on_trained is not None:
        on_trained(training)
    if training.was_interrupted or not asked.exports:
        return PipelineResult(model, training, None)
    exports = export_model(
        model,
        _formats(asked),
        _export_path(asked),
        overwrite=asked.overwrite,
        **asked.export_options,
    )
    if ranks.find_place().rank == 0:
        # With the exports in it.
        write_report(training.output_dir)
    return PipelineResult(model, training, exports)


def _check_exports(pipeline: Pipeline, model: AdaptedModel | None) -> None:
    check_export(
        _formats(pipeline),
        _export_path(pipeline),
        overwrite=pipeline.overwrite,
        model=model,
        **pipeline.export_options,
    )


def _loading_arguments(pipeline: Pipeline) -> dict[str, Any]:
    """What is loaded is what will be trained: in shards where those are asked for."""
    from qlora_kit.engines.native.fast.plan_options import parse_plan

    shard = parse_plan(pipeline.training.get("plan")).shard
    return {**({} if shard == "auto" else {"shard": shard}), **pipeline.loading}


def _training_arguments(pipeline: Pipeline) -> dict[str, Any]:
    taken = {"model", "train_dataset", "eval_dataset", "formatter"} & set(pipeline.training)
    if taken:
        name = sorted(taken)[0]
        raise ConfigError(
            Setting(name),
            " has a place of its own in a pipeline: model, data, eval_data or formatting.",
            parameter=name,
            value=pipeline.training[name],
        )
    return dict(pipeline.training)


def _formats(pipeline: Pipeline) -> Sequence[str] | Mapping[str, Mapping[str, Any]]:
    exports = pipeline.exports
    return (exports,) if isinstance(exports, str) else exports


def _export_path(pipeline: Pipeline) -> Any:
    if pipeline.export_path is not None:
        return pipeline.export_path
    return pipeline.training.get("output_dir", "outputs")


def _read_data(pipeline: Pipeline) -> tuple[RawRows, RawRows | None, FormatterPlan | None]:
    """The rows to train on and to evaluate on, and what formats them if that was said."""
    from qlora_kit.data import read_source

    said = {name: value for name, value in pipeline.formatting.items() if value is not None}
    for name, value in said.items():
        if name not in FORMATTER_OPTIONS:
            raise UnknownOptionError(
                f"formatting has no {name!r}.{did_you_mean(name, FORMATTER_OPTIONS)} It has: "
                f"{', '.join(FORMATTER_OPTIONS)}.",
                parameter=name,
                value=value,
            )
    offline = pipeline.loading.get("local_files_only", True)
    seed = pipeline.data_seed
    rows = read_source(pipeline.data, pipeline.split, local_files_only=offline, seed=seed)
    eval_rows = None
    _check_held_out(pipeline, rows)
    if pipeline.eval_data is not None:
        split = pipeline.eval_split or pipeline.split
        eval_rows = read_source(pipeline.eval_data, split, local_files_only=offline, seed=seed)
    if "input_ids" in rows.columns:
        if said:
            left_out: list[object] = []
            for name in said:
                left_out += [", "] if left_out else []
                left_out.append(Setting(name, of="formatter"))
            raise ConfigError(
                f"{rows.label} holds token ids, which are trained as they are.",
                advice=("Leave out ", *left_out, "."),
            )
        return rows, eval_rows, None
    plan = _plan_formatter(rows, said)
    for part in (rows, eval_rows):
        if part is not None:
            plan.check(part)
    # Nothing said is left to train_sft, which knows what not to remember.
    is_needed = bool(said) or pipeline.eval_fraction is not None
    return rows, eval_rows, plan if is_needed else None


def _plan_formatter(rows: RawRows, said: Mapping[str, Any]) -> FormatterPlan:
    from qlora_kit.data import FormatterPlan, plan_formatter

    spec = said.get("formatter")
    if spec is None:
        return plan_formatter(rows, **said)
    beside = set(said) - {"formatter", "columns", "on_bad_rows", "max_reported_rows"}
    if beside:
        raise ConfigError(
            f"formatter says everything about the template; leave out {', '.join(sorted(beside))}."
        )
    options = {name: value for name, value in said.items() if name != "formatter"}
    return FormatterPlan.from_spec(spec, options)


def _check_held_out(pipeline: Pipeline, rows: RawRows) -> None:
    """Refuse a share for evaluation that cannot be held out, or would be trained on too."""
    fraction = pipeline.eval_fraction
    if fraction is None:
        return
    if not is_finite_number(fraction) or not 0 < fraction < 1:
        raise ConfigError(
            f"eval_fraction is a share between 0 and 1, got {fraction!r}.",
            parameter="eval_fraction",
            value=fraction,
        )
    problem = ""
    if pipeline.eval_data is not None:
        problem = "there are rows to evaluate on already: leave out one of the two"
    elif "input_ids" in rows.columns:
        problem = "token ids are trained as they are: give rows to evaluate on"
    elif rows.origin is not None and any(one.weight > 1 for one in rows.origin.sources):
        problem = "a weight above 1 takes rows twice, so that what is held out would be trained on"
    if problem:
        raise ConfigError(f"eval_fraction={fraction}: {problem}.", parameter="eval_fraction")


def _check_names(
    owner: str, given: Mapping[str, Any], function: Callable[..., Any], taken: Sequence[str]
) -> None:
    """Refuse names that the function knows nothing of; the classic script's are its own matter."""
    from qlora_kit.script_arguments import ADAPTER_ARGUMENTS, LOADING_ARGUMENTS

    parameters = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and parameter.name not in taken
    ]
    known = {*parameters, *LOADING_ARGUMENTS, *ADAPTER_ARGUMENTS}
    for name in given:
        if name not in known:
            raise UnknownOptionError(
                f"{owner} has no argument {name!r}.{did_you_mean(name, parameters)}",
                parameter=name,
                value=given[name],
            )


def _fields_of(
    config: type[Any], given: Mapping[str, Any], skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Those arguments that are fields of a configuration, whose values it checks."""
    names = {entry.name for entry in fields(config)} - set(skip)
    values = {name: value for name, value in given.items() if name in names}
    if config is LoadConfig:
        # As load_quantized reads them: 4 bits unless 8 were asked for.
        if values.get("load_in_4bit") is None:
            values["load_in_4bit"] = not values.get("load_in_8bit", False)
        values.pop("cache_dir", None)
    return values


def _check_against_saved(model: AdaptedModel, given: Mapping[str, Any]) -> None:
    """Refuse settings of a new adapter that the saved one, which trains on, does not have."""
    for name, value in given.items():
        own = getattr(model.adapter, name, None)
        if value is not None and own != value:
            raise ConfigError(
                f"{model.base.name_or_path} was loaded with its saved adapter, which trains on as "
                "it is: ",
                Setting(name, value, "attach_lora"),
                f" is for a new one, and this one has {own!r}.",
                parameter=name,
                value=value,
                advice="Leave it out, or name the base model to start anew.",
            )
