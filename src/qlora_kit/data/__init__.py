"""Training data: rows to tokens and loss masks, and the batches they are laid out in.

This package decides which tokens a model sees and which of them carry loss. It does not
know models or trainers.
"""

from __future__ import annotations

from qlora_kit.data.alpaca import AlpacaFormatter
from qlora_kit.data.chat import ChatFormatter
from qlora_kit.data.choosing import FormatterPlan, plan_formatter
from qlora_kit.data.collators import PackedCollator, PaddedCollator
from qlora_kit.data.encoding import EncodedExamples
from qlora_kit.data.formatter import FormatterBase
from qlora_kit.data.inspection import DataReport
from qlora_kit.data.packing import pack_examples
from qlora_kit.data.protocol import Formatter
from qlora_kit.data.report import EncodingReport
from qlora_kit.data.rows import Rows
from qlora_kit.data.segments import Prompt, Segment
from qlora_kit.data.sources import RawRows, read_source
from qlora_kit.data.spec import formatter_from_spec
from qlora_kit.data.templates import AlpacaTemplate
from qlora_kit.data.text import PromptCompletionFormatter, TextFormatter
from qlora_kit.data.tokenized import take_tokenized

__all__ = [
    "AlpacaFormatter",
    "AlpacaTemplate",
    "ChatFormatter",
    "DataReport",
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
    "formatter_from_spec",
    "pack_examples",
    "plan_formatter",
    "read_source",
    "take_tokenized",
]
