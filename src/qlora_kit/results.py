"""What comes back, as frozen dataclasses: results and artifacts.

This module holds values and renders them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from qlora_kit.errors import ExportError, MissingDependencyError
from qlora_kit.html_tables import make_grid, make_table

__all__ = [
    "Answer",
    "Artifact",
    "ArtifactFile",
    "Check",
    "ExportResults",
    "FinishReason",
    "Moment",
    "Sample",
    "TextChunk",
    "TrainResult",
    "Verification",
]

FinishReason = Literal["eos", "stop", "length"]

#: Files of an export that a notebook lists one by one.
_SHOWN_FILES: Final = 12


class Moment(NamedTuple):
    """The end of a step.

    Attributes:
        step: The step.
        seconds: Since training began.
        tokens: Tokens taken so far; ``None`` where that is not counted.
        memory_gib: Memory in use.
    """

    step: int
    seconds: float
    tokens: int | None
    memory_gib: float


class Sample(NamedTuple):
    """What a model answered in the course of its training.

    Attributes:
        step: After how many steps.
        prompt: What it was asked.
        answer: What it said.
    """

    step: int
    prompt: str
    answer: str


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What one training run did.

    Attributes:
        steps: Optimizer steps done, counted from the start of the run (resumed steps included).
        losses: Mean loss per trained token of each optimizer step of this call, in order.
        eval_losses: ``(step, loss)`` of each evaluation.
        tokens_seen: Tokens that went through the model in this call, padding excluded.
        trained_tokens: Of those, the tokens that carried loss.
        tokens_per_second: ``tokens_seen / seconds``.
        seconds: Wall-clock seconds of the training loop, compilation included.
        device: Name of the device, for example ``"NVIDIA H200"`` or the CPU's model.
        memory_before_gib: Peak memory (GPU: reserved; CPU: resident set) before training.
        peak_memory_gib: The same at its highest during training.
        trainable_parameters: Number of parameters that trained.
        total_parameters: Number of parameters of the model, counted unquantized.
        optimizer: The optimizer that ran.
        optimizer_note: Why it is not the one asked for, or an empty string.
        was_interrupted: Whether Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 ended the run early.
        checkpoint: Where an interrupted run can resume from, or ``None``.
        output_dir: Where checkpoints and the manifest are.
        manifest_path: The run's manifest, JSON.
        versions: Versions of the packages that took part.
        log_history: The trainer's own log records.
        plan: How steps were computed: micro-batches, checkpointing, weights, compilation.
        run_id: The run's name in its checkpoints and manifest; a resumed run keeps it.
        best_step: The step whose weights the model has, where ``load_best_model_at_end`` brought
            an earlier one's back; else ``None``.
        timeline: When each step ended, with tokens and memory.
        samples: Answers to ``sample_prompts``, before, during and after.
    """

    steps: int
    losses: tuple[float, ...]
    eval_losses: tuple[tuple[int, float], ...]
    tokens_seen: int
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    device: str
    memory_before_gib: float
    peak_memory_gib: float
    trainable_parameters: int
    total_parameters: int
    optimizer: str
    optimizer_note: str
    was_interrupted: bool
    checkpoint: Path | None
    output_dir: Path
    manifest_path: Path
    versions: Mapping[str, str]
    log_history: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    plan: str = ""
    run_id: str = ""
    best_step: int | None = None
    timeline: tuple[Moment, ...] = field(default=(), repr=False)
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    def plot(self, axes: Any = None) -> Any:
        """Draw the losses with matplotlib.

        Args:
            axes: matplotlib axes to draw on; new ones by default.

        Returns:
            The axes.

        Raises:
            MissingDependencyError: When matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise MissingDependencyError(
                    f"plot draws with matplotlib, which cannot be imported ({error}). "
                    "pip install matplotlib, or look at report.html in output_dir."
                ) from error
            _, axes = pyplot.subplots()
        first = self.steps - len(self.losses)
        axes.plot(range(first + 1, self.steps + 1), self.losses, label="loss")
        if self.eval_losses:
            axes.plot(*zip(*self.eval_losses, strict=True), marker="o", label="evaluation loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token")
        axes.legend()
        return axes

    def _repr_html_(self) -> str:
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (float("nan"),) * 2
        report = self.output_dir / "report.html"
        pairs: list[tuple[str, object]] = [
            ("steps", f"{self.steps}{', interrupted' if self.was_interrupted else ''}"),
            ("loss", f"{first:.3f} → {last:.3f}"),
            *(("evaluation loss", f"{loss:.3f}") for _, loss in self.eval_losses[-1:]),
            ("time", f"{self.seconds:.1f} s on {self.device}"),
            ("tokens", f"{self.tokens_seen:,}, {self.tokens_per_second:,.0f} a second"),
            (
                "peak memory",
                f"{self.peak_memory_gib:.2f} GiB ({self.memory_before_gib:.2f} before training)",
            ),
        ]
        if self.best_step is not None:
            pairs.append(("weights of step", self.best_step))
        if self.checkpoint is not None and self.was_interrupted:
            pairs.append(("goes on from", self.checkpoint))
        if report.is_file():
            pairs.append(("report", report))
        return make_table("Training", pairs)

    def __repr__(self) -> str:
        return f"TrainResult({self})"

    def __str__(self) -> str:
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (float("nan"),) * 2
        state = "interrupted after" if self.was_interrupted else "trained"
        kept = "" if self.best_step is None else f"; the weights are those of step {self.best_step}"
        return (
            f"{state} {self.steps} steps in {self.seconds:.1f} s on {self.device}: "
            f"loss {first:.3f} -> {last:.3f}, {self.tokens_seen:,} tokens "
            f"({self.tokens_per_second:,.0f} tokens/s), peak memory "
            f"{self.peak_memory_gib:.2f} GiB ({self.memory_before_gib:.2f} before training){kept}"
        )


@dataclass(frozen=True)
class TextChunk:
    """A piece of a streamed answer.

    Attributes:
        text: The new text; may be empty in the last chunk.
        token_count: Tokens generated so far, the stop token included.
        tokens_per_second: Generated tokens per second so far, prompt processing included.
        finish_reason: ``None`` until the last chunk, then ``"eos"``, ``"stop"`` (what ``stop``
            named) or ``"length"``.
    """

    text: str
    token_count: int
    tokens_per_second: float
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        index: Which of the prompts it answers, counted from 0.
        text: The answer.
        token_count: Its tokens, the stop token included.
        finish_reason: As in :class:`TextChunk`.
    """

    index: int
    text: str
    token_count: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Check:
    """One comparison made while verifying an export.

    Attributes:
        name: What was compared, for example ``"logits"``.
        passed: Whether it held.
        detail: One sentence with the figures.
        value: The measured figure, where there is one.
        tolerance: The limit it was held against, where there is one.
    """

    name: str
    passed: bool
    detail: str
    value: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Verification:
    """How an export was compared with the live model.

    Attributes:
        level: ``"none"``, ``"standard"`` or ``"full"``.
        checks: The comparisons made.
        facts: What comparing measured that belongs among the artifact's facts.
    """

    level: Literal["none", "standard", "full"]
    checks: tuple[Check, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every comparison held (true when none was asked for)."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class ArtifactFile:
    """One file of an export: its path inside the artifact, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, repr=False)
class Artifact:
    """A finished export.

    Attributes:
        format: The exporter's name.
        path: The folder that holds it, or ``None`` when it lives elsewhere (see ``url``).
        files: Every file, sorted by name.
        verification: How it was compared with the live model.
        facts: What the exporter reports of its own, for example a KL divergence.
        manifest: What the manifest file says.
        seconds: Wall-clock seconds the export took.
        url: Where it was published, if it was.
    """

    format: str
    path: Path | None
    files: tuple[ArtifactFile, ...]
    verification: Verification
    facts: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    url: str | None = None

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(file.size for file in self.files)

    def __repr__(self) -> str:
        checks = self.verification.checks
        checked = f"{len(checks)} checks passed" if checks else "not checked"
        where = self.path or self.url
        return (
            f"Artifact({self.format!r}, {str(where)!r}, {len(self.files)} files, "
            f"{self.size / 1e6:.1f} MB, {checked})"
        )

    def _repr_html_(self) -> str:
        shown = [(file.name, f"{file.size:,} bytes") for file in self.files[:_SHOWN_FILES]]
        if len(self.files) > len(shown):
            shown.append((f"and {len(self.files) - len(shown)} more", ""))
        pairs: list[tuple[str, object]] = [("where", self.path or self.url), *shown]
        marks = {True: "✓", False: "✗"}
        pairs += [
            (f"{marks[check.passed]} {check.name}", check.detail)
            for check in self.verification.checks
        ]
        if not self.verification.checks:
            pairs.append(("checks", "none were asked for"))
        return make_table(f"{self.format}, {self.size / 1e6:,.1f} MB", pairs)


@dataclass(frozen=True, repr=False)
class ExportResults(Mapping[str, Artifact]):
    """Several formats from one call: artifacts by format name, and what failed.

    Asking for a format that failed raises ``KeyError`` from its error.

    Attributes:
        artifacts: The exports that were made.
        failures: The error of every format that was not, by format name.
    """

    artifacts: Mapping[str, Artifact]
    failures: Mapping[str, Exception] = field(default_factory=dict)

    def raise_for_failures(self) -> None:
        """Do nothing when every format was made.

        Raises:
            ExportError: When one was not; names each, from the first one's error.
        """
        if self.failures:
            raise ExportError(str(self)) from next(iter(self.failures.values()))

    def __getitem__(self, name: str) -> Artifact:
        if name in self.failures:
            raise KeyError(f"format {name!r} failed: {self.failures[name]}") from self.failures[
                name
            ]
        return self.artifacts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.artifacts)

    def __len__(self) -> int:
        return len(self.artifacts)

    def __str__(self) -> str:
        total = len(self.artifacts) + len(self.failures)
        lines = [f"{len(self.artifacts)} of {total} formats exported"]
        lines += [f"  {name}: {made.path or made.url}" for name, made in self.artifacts.items()]
        lines += [
            f"  {name} FAILED: {type(error).__name__}: {error}"
            for name, error in self.failures.items()
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [
            (name, made.path or made.url, f"{made.size / 1e6:,.1f} MB",
             f"{len(made.verification.checks)} checks passed")
            for name, made in self.artifacts.items()
        ]  # fmt: skip
        rows += [
            (name, f"FAILED: {type(error).__name__}: {error}", "", "")
            for name, error in self.failures.items()
        ]
        return make_grid(("format", "where", "size", "checks"), rows)
