"""A live model with its adapters merged in, read one tensor at a time.

The merge is done in float32 and rounded once. LoRA (arXiv:2106.09685) adds ``s * B @ A``;
rsLoRA, PiSSA and LoftQ differ only in ``s`` and in where they start; DoRA (arXiv:2402.09353,
equation 5) then rescales every output's weights to its trained magnitude.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, get_args

from qlora_kit.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, invalid_value
from qlora_kit.handles import LoadedModel
from qlora_kit.messages import Setting
from qlora_kit.weights.dequantize import dequantize
from qlora_kit.weights.expert_stacks import ExpertStacks, add_stack_update
from qlora_kit.weights.live import (
    LiveTensor,
    collect_live_tensors,
    drop_tied_copies,
    get_hf_model,
)
from qlora_kit.weights.mapped_file import TORCH_DTYPES
from qlora_kit.weights.merge_base import MergeBase, choose_merge_base, is_loftq
from qlora_kit.weights.source import SafetensorsSource

if TYPE_CHECKING:
    import torch

__all__ = ["MergeBase", "MergedWeights", "choose_merge_base"]

logger = logging.getLogger(__name__)


class MergedWeights:
    """The tensors of a model with its active adapters merged: a ``TensorSource``.

    Args:
        model: What ``load_quantized`` or ``attach_lora`` returned. It is only read.
        base: For a quantized base: ``"original"`` merges into the 16-bit checkpoint it was
            quantized from, ``"dequantized"`` into exactly the weights the adapter was trained
            on. An unquantized base is always read from memory, so both are the same then.
        dtype: Round every floating tensor to this once. ``None`` leaves merged tensors in
            float32 and the others as they are stored.

    Raises:
        ConfigError: When ``base="original"`` and there is no original, or the adapter only
            makes sense on the quantized weights (LoftQ).
        UnsupportedModelError: When something in the model cannot be merged.
    """

    def __init__(
        self,
        model: LoadedModel,
        base: MergeBase = "original",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if base not in get_args(MergeBase):
            raise invalid_value("base", "must be 'original' or 'dequantized'", base, "export_model")
        self.model = model
        self.base: MergeBase = base
        self.dtype = dtype
        self._live_all = collect_live_tensors(model.model)
        tied = getattr(get_hf_model(model.model), "all_tied_weights_keys", None) or {}
        live = drop_tied_copies(self._live_all, tied)
        self._files = _open_original(model, needed=self._needs_original(live))
        self._entries: dict[str, LiveTensor | None] = dict(live)
        self._stacks = ExpertStacks(get_hf_model(model.model))
        if self._files is not None:
            self._match_with_files(live, self._files)

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        live = self._entries[name]
        if live is None:
            return self._original.shape(name)
        return self._stacks.shape(name) if name in self._stacks else live.shape

    def adapted_names(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return [
            name for name, live in self._entries.items() if live is not None and live.is_adapted
        ]

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype :meth:`load` returns, without loading."""
        import torch

        live = self._entries[name]
        if live is None:
            stored = TORCH_DTYPES[self._original.dtype(name)]
            source = getattr(torch, stored)
        elif live.adapters or live.is_quantized or live.tokens is not None:
            source = torch.float32
        else:
            source = live.tensor.dtype
        return self.dtype if self.dtype is not None and source.is_floating_point else source

    def load(self, name: str) -> torch.Tensor:
        live = self._entries[name]
        if live is None:
            return self._rounded(self._original.load(name), name)
        return self._rounded(self.take_piece(name, "merged", self.merge), name).cpu()

    def take_piece(
        self, name: str, kind: str, make: Callable[[LiveTensor], torch.Tensor]
    ) -> torch.Tensor:
        """A tensor as the files have it: what ``make`` makes of it, or a piece of that.

        Args:
            name: A tensor in memory.
            kind: What ``make`` makes, in a word.
            make: Makes the whole tensor, of which a file may hold a piece (one expert).
        """
        live = self._entries[name]
        assert live is not None
        if name not in self._stacks:
            return make(live)
        piece: torch.Tensor = self._stacks.load(name, kind, make)
        return piece

    def live(self, name: str) -> LiveTensor | None:
        """The tensor in memory, or ``None`` when it is copied from the files as it is."""
        return self._entries[name]

    def load_base_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of the tensor without the adapter, unrounded; for comparing."""
        live = self._entries[name]
        if live is None or (live.is_quantized and self.base == "original"):
            return self._original.load_rows(name, start, stop)
        return self.take_piece(name, "base", self._read_base).detach()[start:stop].cpu()

    def merge(self, live: LiveTensor) -> torch.Tensor:
        """One tensor with its adapters merged, on the device of the live model."""
        import torch

        if live.tokens is not None:
            return self._replace_rows(live)
        if not live.adapters:
            return self._read_base(live).detach()
        with torch.no_grad():
            weight = self.merge_without_dora(live)
            if live.is_dora:
                _rescale_dora(weight, live)
            return weight

    def _replace_rows(self, live: LiveTensor) -> torch.Tensor:
        import torch

        with torch.no_grad():
            weight = self._read_base(live).detach().to(torch.float32, copy=True)
            for index, row in live.replaced_rows():
                weight[index] = row.to(weight)
            return weight

    def merge_without_dora(self, live: LiveTensor) -> torch.Tensor:
        """The base and every update, in float32, before DoRA gives outputs their magnitude."""
        import torch

        with torch.no_grad():
            # A copy even when it is float32 already: the base in memory must not change.
            weight = self._read_base(live).detach().to(torch.float32, copy=True)
            for adapter in live.adapters:
                scale = live.layer.scaling[adapter]
                if live.is_parameter:
                    add_stack_update(weight, live.layer, adapter)
                    continue
                if live.key == "bias":
                    bias = live.layer.lora_B[adapter].bias.detach()
                    weight.add_(bias.to(weight), alpha=scale)
                    continue
                a, b = (factor.to(weight) for factor in live.factors(adapter))
                if live.is_transposed:
                    weight.addmm_(a.T, b.T, alpha=scale)
                else:
                    weight.addmm_(b, a, alpha=scale)
            return weight

    def config_updates(self) -> dict[str, Any]:
        """What the merged model's ``config.json`` must say differently from the live config.

        A tied model whose embedding or head was adapted alone needs both tensors.
        """
        config = get_hf_model(self.model.model).config.get_text_config()
        if not getattr(config, "tie_word_embeddings", False):
            return {}
        tied = get_hf_model(self.model.model).all_tied_weights_keys
        untied = [name for name in tied if name in self._entries]
        head = [name for name in untied if name.endswith("lm_head.weight")]
        if not untied:
            return {}
        if untied != head and len(untied) != 1:
            raise UnsupportedModelError(
                f"The adapter changes {', '.join(untied)} apart from the tensors they are tied to, "
                "which this architecture cannot express. Export with format 'lora' instead."
            )
        return {"tie_word_embeddings": False}

    def close(self) -> None:
        """Unmap the original checkpoint's files."""
        if self._files is not None:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _original(self) -> SafetensorsSource:
        assert self._files is not None
        return self._files

    def _needs_original(self, live: dict[str, LiveTensor]) -> bool:
        if self.base == "dequantized" or not any(t.is_quantized for t in live.values()):
            return False
        if self.model.base.is_prequantized:
            raise ConfigError(
                Setting("base", "original", "export_model"),
                f" needs the 16-bit weights, and {self.model.base.path} holds only "
                f"{self.model.base.quantization} ones.",
                parameter="base",
                value="original",
                advice=("Use ", Setting("base", "dequantized", "export_model"), "."),
            )
        if is_loftq(self.model):
            raise ConfigError(
                "This adapter was started by LoftQ, so it already holds what quantization took "
                "from the base; merging it into the original weights would count that twice.",
                advice=("Use ", Setting("base", "dequantized", "export_model"), "."),
            )
        return True

    def _read_base(self, live: LiveTensor) -> torch.Tensor:
        """The base weight without adapters, on the device of the live model."""
        if not live.is_quantized:
            return live.tensor
        if self.base == "dequantized":
            weight = dequantize(live.module, live.key)
            return weight.T if live.is_turned else weight
        return self._original.load(live.name).to(live.tensor.device)

    def _match_with_files(self, live: dict[str, LiveTensor], files: SafetensorsSource) -> None:
        stored = set(files.names())
        missing = [name for name in live if name not in stored]
        extra = [name for name in files.names() if name not in self._live_all]
        if _has_weight_converters(self.model.model) and missing and extra:
            # transformers fused several stored tensors into one (experts); the files' own
            # spelling is what other tools read, so untouched ones are copied from there.
            pieces: dict[str, LiveTensor | None] = {}
            for name in missing:
                one = live[name]
                if one.is_adapted and one.is_quantized and self.base == "original":
                    raise self._refuse_original(name, one, "is not there")
                # Quantized ones that no adapter changes are what training saw, not what files have.
                if one.is_adapted or (one.is_quantized and self.base == "dequantized"):
                    pieces |= dict.fromkeys(self._stacks.add(one), one)
            lost = sorted(set(pieces) - set(extra))
            if lost:
                raise UnsupportedModelError(
                    f"The adapter changes {lost[0]}, which {files.folder} does not have in this "
                    "layout. Format 'lora' keeps the adapter as it is."
                )
            kept = {name: live.get(name) for name in files.names() if name in live}
            self._entries = {**kept, **{name: pieces.get(name) for name in extra}}
            return
        wrong = [
            name
            for name, tensor in live.items()
            if tensor.is_quantized and (name not in stored or files.shape(name) != tensor.shape)
        ]
        if wrong and self.base == "original":
            found = f"has shape {files.shape(wrong[0])}" if wrong[0] in stored else "is not there"
            raise self._refuse_original(wrong[0], live[wrong[0]], found)

    def _refuse_original(self, name: str, live: LiveTensor, found: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            Setting("base", "original", "export_model"),
            f": {name} {found} in {self.model.base.path}, and the model in memory has it with "
            f"shape {live.shape}.",
            parameter="base",
            value="original",
            advice=("Use ", Setting("base", "dequantized", "export_model"), "."),
        )

    def _rounded(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        import torch

        if self.dtype is None or not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        rounded = tensor.to(self.dtype)
        # Only float16 has a smaller range than what the weights were trained in.
        if self.dtype == torch.float16 and not bool(torch.isfinite(rounded).all()):
            raise UnsupportedModelError(
                f"{name} has values up to {tensor.abs().max().item():.3g}, beyond float16's 65504.",
                advice=("Export with ", Setting("dtype", "bfloat16", "export_model"), "."),
            )
        return rounded


def _open_original(model: LoadedModel, *, needed: bool) -> SafetensorsSource | None:
    """The checkpoint's files, where they exist and hold floating-point weights."""
    if model.base.is_prequantized:
        return None
    try:
        return SafetensorsSource(model.base.path)
    except (ModelNotFoundError, UnsupportedModelError):
        if needed:
            raise
        return None


def _has_weight_converters(model: Any) -> bool:
    conversions = getattr(get_hf_model(model), "_weight_conversions", None) or ()
    return any(type(entry).__name__ == "WeightConverter" for entry in conversions)


def _rescale_dora(weight: torch.Tensor, live: LiveTensor) -> None:
    """Give every output its trained magnitude, in place."""
    import torch

    magnitude = live.layer.lora_magnitude_vector[live.adapters[0]].weight.detach()
    inputs = 0 if live.is_transposed else 1
    norm = torch.linalg.vector_norm(weight, dim=inputs)
    weight.mul_((magnitude.reshape(-1).to(weight) / norm).unsqueeze(inputs))
