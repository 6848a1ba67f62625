"""Formatters by their names: from what ``template_spec()`` said, as manifests keep it.

Whoever registers one, a module here or a plugin, does so through the same hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.data.formatters.protocol import Formatter
from qlora_kit.errors import ConfigError, QloraKitError, did_you_mean
from qlora_kit.plugins import get_formatter_registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.formatters.formatter_base import FormatterBase

__all__ = ["formatter_from_spec"]


def formatter_from_spec(
    spec: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> FormatterBase:
    """The formatter that a spec describes, a plugin's among them.

    Args:
        spec: What ``template_spec()`` returned.
        tokenizer: The tokenizer of the model it belongs to.

    Raises:
        ConfigError: When the spec is of an unknown kind or lacks a key.
        PluginError: When two plugins claim the kind.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(f"A formatter spec is what template_spec() returned, got {spec!r}.")
    kind = spec.get("kind")
    registry = get_formatter_registry()
    try:
        found = registry.get(str(kind))
    except ConfigError as error:
        names = registry.names()
        raise ConfigError(
            f"A formatter of kind {kind!r} cannot be rebuilt from its spec."
            f"{did_you_mean(str(kind), names)} Known kinds: {', '.join(map(repr, names))}. Install "
            "the package that registers it, or make it yourself and hand it over."
            f"{registry.describe_absent()}"
        ) from error
    origin = registry.get_origin(str(kind))
    try:
        formatter = found.from_spec(spec, tokenizer)
    except QloraKitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The formatter {kind!r} ({origin}) cannot be rebuilt from its spec: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(formatter, Formatter):
        raise ConfigError(
            f"from_spec() of the formatter {kind!r} ({origin}) returned "
            f"{type(formatter).__name__}, which is no formatter."
        )
    return formatter  # type: ignore[return-value]
