"""Model cards: what a model is, how to load it, how it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_kit.device import get_versions
from qlora_kit.handles import LoadedModel
from qlora_kit.results import TrainResult

__all__ = ["describe_merged", "find_base_name", "write_adapter_card"]


def write_adapter_card(model: LoadedModel, folder: Path, base_name: str) -> None:
    """Write ``README.md`` with the front matter that the hub reads.

    Args:
        model: The adapted model.
        folder: Where to write.
        base_name: A name of the base that plain peft can load.
    """
    adapter = getattr(model, "adapter", None)
    lines = _front_matter("peft", base_name, ["lora", "qlora-kit"])
    lines += [f"# LoRA adapter for {Path(base_name).name}", ""]
    if adapter is not None:
        kinds = [
            label
            for label, used in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora))
            if used
        ]
        lines.append(
            f"Rank {adapter.r}, alpha {adapter.lora_alpha}"
            + (f", {' and '.join(kinds)}" if kinds else "")
            + f", on a base {_describe_base(model)}."
        )
    lines += [*_describe_training(model.record.training), *_usage(base_name)]
    lines += _describe_template(model.record.formatter)
    lines += _describe_versions()
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def describe_merged(model: LoadedModel, name: str, format: str) -> str:
    """A model card for a merged model on the hub.

    Args:
        model: The live model.
        name: Its name there.
        format: The export format.
    """
    base_name = find_base_name(model)
    is_checkpoint = format.startswith("merged_")
    library = "transformers" if is_checkpoint else "gguf" if format.startswith("gguf") else None
    lines = _front_matter(library, base_name, ["qlora-kit"])
    lines += [f"# {name.rsplit('/', maxsplit=1)[-1]}", ""]
    lines.append(f"{Path(base_name).name}, fine-tuned with a LoRA adapter; format `{format}`.")
    lines += _describe_training(model.record.training)
    if is_checkpoint:
        lines += [
            "",
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            "```",
        ]
    lines += _describe_template(model.record.formatter)
    lines += _describe_versions()
    return "\n".join(lines)


def find_base_name(model: LoadedModel) -> str:
    """A name for the base that plain peft and transformers can load.

    The name the user gave for a hub model, an absolute path for a folder, and for a ``.gguf``
    file the checkpoint it was dequantized into.
    """
    name = model.base.name_or_path
    if model.base.source == "gguf":
        return str(model.base.path.absolute())
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _front_matter(library: str | None, base_name: str, tags: Sequence[str]) -> list[str]:
    """What the hub reads."""
    lines = ["---"]
    if library is not None:
        lines.append(f"library_name: {library}")
    lines.append("pipeline_tag: text-generation")
    # The hub accepts only names of its own here, and refuses the whole card otherwise.
    if not Path(base_name).is_absolute() and base_name.count("/") == 1:
        lines.append(f"base_model: {base_name}")
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _describe_versions() -> list[str]:
    versions = get_versions()
    listed = ", ".join(
        f"{name} {versions[name]}"
        for name in ("qlora-kit", "peft", "transformers", "torch")
        if name in versions
    )
    return ["", f"Made with {listed}.", ""]


def _describe_base(model: LoadedModel) -> str:
    quantization = model.base.quantization
    if quantization is None:
        return f"in {model.base.compute_dtype}"
    return f"quantized to {quantization}, computing in {model.base.compute_dtype}"


def _describe_training(result: TrainResult | None) -> list[str]:
    if result is None or not result.losses:
        return []
    return [
        "",
        "## Training",
        "",
        f"{result.steps} steps on {result.trained_tokens:,} trained tokens in "
        f"{result.seconds:.0f} s; loss {result.losses[0]:.3f} at the first step, "
        f"{result.losses[-1]:.3f} at the last; optimizer {result.optimizer}.",
    ]


def _usage(base_name: str) -> list[str]:
    return [
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'adapter = "."  # this folder, or its name on the hub',
        f"base = AutoModelForCausalLM.from_pretrained({base_name!r})",
        "model = PeftModel.from_pretrained(base, adapter)",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        "```",
        "",
        "or `qlora_kit.load_quantized(adapter)`, which finds the base and loads it in 4 bits.",
    ]


def _describe_template(formatter: Any) -> list[str]:
    """How the model is to be asked: as its formatter put rows in training."""
    spec = {} if formatter is None else formatter.template_spec()
    fence = "````"
    prompts = {spec.get("prompt_no_input"): "without an input", spec.get("prompt_input"): None}
    lines: list[str] = []
    for prompt, when in prompts.items():
        if isinstance(prompt, str):
            title = "Prompts" if when is None else f"Prompts {when}"
            lines += ["", f"{title}:", "", f"{fence}text", prompt, fence]
    if not lines and spec.get("chat_template"):
        lines = ["", "Conversations, in the tokenizer's chat template."]
    elif not lines and spec.get("kind") in ("text", "prompt-completion"):
        lines = ["", "Rendered texts: a prompt is continued as it is."]
    if not lines:
        return []
    end = spec.get("eos_token")
    stop = ["", f"Answers end with `{end}`."] if end else []
    return ["", "## Prompt template", *lines, *stop]
