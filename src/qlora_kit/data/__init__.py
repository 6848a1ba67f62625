"""Training data: rows to tokens and loss masks, and the batches they are laid out in.

This package decides which tokens a model sees and which of them carry loss.
"""

from __future__ import annotations

from qlora_kit.data.batches.collators import PackedCollator, PaddedCollator
from qlora_kit.data.batches.packing import pack_examples
from qlora_kit.data.formatters.alpaca import AlpacaFormatter
from qlora_kit.data.formatters.alpaca_templates import AlpacaTemplate
from qlora_kit.data.formatters.chat import ChatFormatter
from qlora_kit.data.formatters.formatter_base import FormatterBase
from qlora_kit.data.formatters.formatter_plan import (
    FormatterPlan,
    describe_templates,
    plan_formatter,
)
from qlora_kit.data.formatters.protocol import Formatter
from qlora_kit.data.formatters.registry import formatter_from_spec
from qlora_kit.data.formatters.text import PromptCompletionFormatter, TextFormatter
from qlora_kit.data.sources.origins import DataSource
from qlora_kit.data.sources.raw_rows import RawRows, read_source
from qlora_kit.data.sources.rows import Rows
from qlora_kit.data.tokens.encoding import EncodedExamples
from qlora_kit.data.tokens.encoding_report import EncodingReport
from qlora_kit.data.tokens.inspection import DataReport
from qlora_kit.data.tokens.pretokenized import take_tokenized
from qlora_kit.data.tokens.segments import Prompt, Segment

__all__ = [
    "AlpacaFormatter",
    "AlpacaTemplate",
    "ChatFormatter",
    "DataReport",
    "DataSource",
    "EncodedExamples",
    "EncodingReport",
    "Formatter",
    "FormatterBase",
    "FormatterPlan",
    "PackedCollator",
    "PaddedCollator",
    "Prompt",
    "PromptCompletionFormatter",
    "RawRows",
    "Rows",
    "Segment",
    "TextFormatter",
    "describe_templates",
    "formatter_from_spec",
    "pack_examples",
    "plan_formatter",
    "read_source",
    "take_tokenized",
]
