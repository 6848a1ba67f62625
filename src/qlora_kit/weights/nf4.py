"""Merged weights in 4 bits, as bitsandbytes stores them, quantized one tensor at a time.

NF4 (QLoRA, arXiv:2305.14314) cuts a matrix into blocks of 64 values and keeps 4 bits per
value and one scale per block; double quantization keeps the scales themselves in 8 bits.
The numbers are bitsandbytes' own. This module arranges them under the names that
``Linear4bit`` saves, and knows their sizes before a weight is read. It does not write files.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.messages import Setting

if TYPE_CHECKING:
    import torch

    from qlora_kit.weights.merged import MergedWeights

__all__ = ["BLOCK", "NESTED_BLOCK", "STATE_PIECE", "LinearLayers", "Nf4Weights", "find_linears"]

BLOCK: Final = 64
NESTED_BLOCK: Final = 256
STATE_PIECE: Final = ".quant_state.bitsandbytes__nf4"

#: Values in bitsandbytes' 4-bit table and in its 8-bit table for scales.
_TABLE: Final = 16
_NESTED_TABLE: Final = 256

# The longest float that Python prints.
_LONGEST_FLOAT: Final = -2.2250738585072014e-308


@dataclass(frozen=True)
class LinearLayers:
    """Which weights of a model transformers will expect in 4 bits.

    Attributes:
        is_transposed: Weight name -> whether it is stored as (in, out), as GPT-2 does.
        skipped: Module names that stay in 16 bits, for ``llm_int8_skip_modules``.
    """

    is_transposed: Mapping[str, bool]
    skipped: tuple[str, ...]


def find_linears(config: Any, *, trust_remote_code: bool = False) -> LinearLayers:
    """Ask transformers which layers of an architecture it replaces by ``Linear4bit``.

    Args:
        config: The configuration that the checkpoint will have; it decides, for one, whether
            the head is tied to the embedding.
        trust_remote_code: Whether the architecture's own code may run.

    Returns:
        The layers and the exceptions. No weight is allocated.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    skipped = {*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())}
    layers = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, list(skipped))
    }
    return LinearLayers(layers, tuple(sorted(skipped)))


class Nf4Weights:
    """The tensors of a 4-bit checkpoint: a ``TensorSource`` over a merged one.

    Args:
        merged: Merged tensors in the 16-bit dtype that everything else keeps.
        layers: Which of them become 4-bit.
        use_double_quant: Keep the scales in 8 bits.
        device: Where to quantize.

    Raises:
        UnsupportedModelError: When a layer's weight is not among the merged tensors.
    """

    def __init__(
        self,
        merged: MergedWeights,
        layers: LinearLayers,
        *,
        use_double_quant: bool,
        device: torch.device,
    ) -> None:
        self.merged = merged
        self.layers = layers
        self.use_double_quant = use_double_quant
        self._device = device
        missing = sorted(set(layers.is_transposed) - set(merged.names()))
        if missing:
            raise UnsupportedModelError(
                f"{missing[0]} has no tensor of its own in this model's checkpoint (its experts "
                "are stored together), so it cannot be quantized layer by layer.",
                advice=(
                    "Export with format 'merged_16bit' and load that with ",
                    Setting("load_in_4bit", True, "load_quantized"),
                    ".",
                ),
            )
        self._pieces: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        self._owner: dict[str, str] = {}
        for name in merged.names():
            if name in layers.is_transposed:
                self._pieces[name] = self._plan(name)
                self._owner.update(dict.fromkeys(self._pieces[name], name))
            else:
                self._owner[name] = name
        self._ready: dict[str, torch.Tensor] = {}
        # Two shards are written at a time, and a weight's pieces may lie in both.
        self._lock = threading.Lock()

    def names(self) -> Sequence[str]:
        return list(self._owner)

    def quantized_names(self) -> list[str]:
        """Names of the weights that are in 4 bits."""
        return list(self._pieces)

    def piece_names(self, name: str) -> list[str]:
        """Names of what is stored for one 4-bit weight; the packed values come first."""
        return list(self._pieces[name])

    def shape(self, name: str) -> tuple[int, ...]:
        owner = self._owner[name]
        return self._pieces[owner][name][0] if owner in self._pieces else self.merged.shape(owner)

    def logical_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a 4-bit weight before packing."""
        rows, columns = self.merged.shape(name)
        return (columns, rows) if self.layers.is_transposed[name] else (rows, columns)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype :meth:`load` returns, without loading."""
        owner = self._owner[name]
        return self._pieces[owner][name][1] if owner in self._pieces else self.merged.dtype_of(name)

    def load(self, name: str) -> torch.Tensor:
        owner = self._owner[name]
        if owner not in self._pieces:
            return self.merged.load(name)
        with self._lock:
            if name not in self._ready:
                self._ready.update(self._quantize(owner))
            return self._ready.pop(name)

    def _plan(self, name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of one weight's pieces."""
        import torch

        count = math.prod(self.merged.shape(name))
        blocks = math.ceil(count / BLOCK)
        scales = torch.uint8 if self.use_double_quant else torch.float32
        pieces: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: ((math.ceil(count / 2), 1), torch.uint8),
            f"{name}.absmax": ((blocks,), scales),
            f"{name}.quant_map": ((_TABLE,), torch.float32),
        }
        if self.use_double_quant:
            nested = math.ceil(blocks / NESTED_BLOCK)
            pieces[f"{name}.nested_absmax"] = ((nested,), torch.float32)
            pieces[f"{name}.nested_quant_map"] = ((_NESTED_TABLE,), torch.float32)
        # Its length depends on how a float prints, which is unknown yet. JSON may end in spaces.
        longest = len(self._encode_state(name, _LONGEST_FLOAT))
        pieces[name + STATE_PIECE] = ((longest + -longest % 8,), torch.uint8)
        return pieces

    def _encode_state(self, name: str, offset: float) -> bytes:
        """The parts of a ``QuantState`` that are not tensors, as bitsandbytes packs them."""
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.merged.dtype_of(name)).removeprefix("torch."),
            "shape": list(self.logical_shape(name)),
        }
        if self.use_double_quant:
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": offset,
            }
        return json.dumps(state).encode()

    def _quantize(self, name: str) -> dict[str, torch.Tensor]:
        import torch
        from bitsandbytes import functional

        weight = self.merged.load(name).to(self._device)
        if self.layers.is_transposed[name]:
            weight = weight.T
        packed, state = functional.quantize_4bit(
            weight.contiguous(),
            blocksize=BLOCK,
            compress_statistics=self.use_double_quant,
            quant_type="nf4",
        )
        pieces = {
            name: packed,
            f"{name}.absmax": state.absmax,
            f"{name}.quant_map": state.code,
        }
        offset = 0.0
        if self.use_double_quant:
            pieces[f"{name}.nested_absmax"] = state.state2.absmax
            pieces[f"{name}.nested_quant_map"] = state.state2.code
            offset = float(state.offset)
        size = self._pieces[name][name + STATE_PIECE][0][0]
        text = self._encode_state(name, offset).ljust(size)
        pieces[name + STATE_PIECE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {key: piece.cpu() for key, piece in pieces.items()}
