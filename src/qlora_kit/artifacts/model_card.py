"""Model cards: what a model is, how to load it, how it was trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from qlora_kit.device import get_versions
from qlora_kit.handles import LoadedModel
from qlora_kit.paths import is_modelscope_name
from qlora_kit.results import TrainResult

__all__ = ["describe_merged", "find_base_name", "write_adapter_card", "write_merged_card"]

logger = logging.getLogger(__name__)

CARD: Final = "README.md"

#: What a model made out of another is still bound to, or still is.
_INHERITED: Final = ("license", "license_name", "license_link", "language")


def write_adapter_card(model: LoadedModel, folder: Path, base_name: str) -> None:
    """Write ``README.md`` with the front matter that the hub reads.

    Args:
        model: The adapted model.
        folder: Where to write.
        base_name: A name of the base that plain peft can load.
    """
    adapter = getattr(model, "adapter", None)
    lines = _front_matter(model, "peft", base_name, ["lora", "qlora-kit"])
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
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def write_merged_card(
    model: LoadedModel, folder: Path, format: str, repo_id: str | None = None
) -> None:
    """Write ``README.md`` of a merged model, with its base's license and languages.

    Args:
        model: The live model.
        folder: Where to write.
        format: The export format.
        repo_id: The model's name on the hub, if it has one.
    """
    (folder / CARD).write_text(describe_merged(model, repo_id, format), encoding="utf-8")


def describe_merged(model: LoadedModel, repo_id: str | None, format: str) -> str:
    """A model card for a merged model.

    Args:
        model: The live model.
        repo_id: Its name on the hub, if it has one.
        format: The export format.
    """
    base_name = find_base_name(model)
    is_checkpoint = format.startswith("merged_")
    library = "transformers" if is_checkpoint else "gguf" if format.startswith("gguf") else None
    lines = _front_matter(model, library, base_name, ["qlora-kit"])
    title = f"{Path(base_name).name}, fine-tuned"
    lines += [f"# {title if repo_id is None else repo_id.rsplit('/', maxsplit=1)[-1]}", ""]
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
            'name = "."  # this folder' if repo_id is None else f"name = {repo_id!r}",
            "model = AutoModelForCausalLM.from_pretrained(name)",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
            "```",
        ]
    lines += _describe_template(model.record.formatter)
    lines += _describe_versions()
    return "\n".join(lines)


def find_base_name(model: LoadedModel) -> str:
    """A name for the base that plain peft and transformers can load.

    The name the user gave for a hub model, an absolute path for a folder and for ModelScope's, and
    for a ``.gguf`` file the checkpoint it was dequantized into.
    """
    name = model.base.name_or_path
    if model.base.source == "gguf" or is_modelscope_name(name):
        return str(model.base.path.absolute())
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _front_matter(
    model: LoadedModel, library: str | None, base_name: str, tags: Sequence[str]
) -> list[str]:
    """What the hub reads, with what the base's own card says of license, languages and tags."""
    import yaml

    base = _read_front_matter(model.base.path / CARD)
    stated: dict[str, Any] = {} if library is None else {"library_name": library}
    stated["pipeline_tag"] = "text-generation"
    # The hub accepts only names of its own here, and refuses the whole card otherwise.
    if not Path(base_name).is_absolute() and base_name.count("/") == 1:
        stated["base_model"] = base_name
    stated |= {key: base[key] for key in _INHERITED if base.get(key) is not None}
    inherited = base.get("tags")
    more = inherited if isinstance(inherited, list) else []
    stated["tags"] = list(dict.fromkeys([*tags, *(str(tag) for tag in more)]))
    text = yaml.safe_dump(stated, sort_keys=False, allow_unicode=True)
    return ["---", *text.splitlines(), "---", ""]


def _read_front_matter(card: Path) -> Mapping[str, Any]:
    """The fields of a model card; none where there is no card."""
    import yaml
    from huggingface_hub import metadata_load

    if not card.is_file():
        return {}
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("The license and languages in %s cannot be read: %s", card, error)
        return {}


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
