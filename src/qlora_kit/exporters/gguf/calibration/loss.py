"""What storing matrices in fewer bits costs the live model, measured on some texts.

A stored matrix is the matrix plus an error, so the model that a file will be is the live one with
the error's product added to each module's output. Nothing is written and nothing is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.calibration.examples import CalibrationExamples
from qlora_kit.exporters.gguf.conversion.tensors import PlannedTensor
from qlora_kit.exporters.gguf.quantization.blocks import cut_rows, encode_piece
from qlora_kit.exporters.gguf.quantization.importance import ImportanceMatrix
from qlora_kit.handles import LoadedModel
from qlora_kit.weights.live import get_hf_model
from qlora_kit.weights.source import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["Loss", "LossMeter", "Matrix", "find_matrices", "store"]

#: Tokens that are compared; their log-probabilities over the vocabulary are kept.
_TOKENS: Final = 512
_LONGEST: Final = 128

_FLOATS: Final = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Matrix:
    """A matrix of the file and the module behind it.

    Attributes:
        name: Its GGUF name.
        source: Its tensor's name in the model.
        shape: Rows, columns.
    """

    name: str
    source: str
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        """The module's name."""
        return self.source.removesuffix(".weight")


@dataclass(frozen=True)
class Loss:
    """How far from the live model's a stored one's predictions are.

    Attributes:
        kl: Mean KL divergence per token, in nats.
        same_top: Share of tokens whose most likely successor is the same one.
    """

    kl: float
    same_top: float


def find_matrices(tensors: Sequence[PlannedTensor], names: Sequence[str]) -> list[Matrix]:
    """The matrices of a plan, each from one tensor of the model with the same rows.

    Raises:
        UnsupportedModelError: When one is put together or taken apart, as experts are.
    """
    found = []
    wanted = set(names)
    for tensor in tensors:
        if tensor.name not in wanted:
            continue
        is_plain = len(tensor.sources) == 1 and len(tensor.shape) == 2
        if not is_plain or tensor.is_part or tensor.reorder_columns is not None:
            raise UnsupportedModelError(
                f"quantization='auto:...' measures plain matrices, and {tensor.name} is put "
                "together, taken apart or reordered. Choose a type, such as 'q4_k_m' or 'iq4_xs'."
            )
        found.append(Matrix(tensor.name, tensor.sources[0], tensor.shape))
    return found


def store(
    weight: torch.Tensor, type_name: str, importance: Any = None, name: str = ""
) -> torch.Tensor:
    """What a matrix is after it was stored and read back, float32."""
    import torch
    from gguf import GGMLQuantizationType, quants

    if type_name in _FLOATS:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type_name]
        return weight.to(dtype).float()
    pieces = [
        quants.dequantize(
            encode_piece(rows, type_name, name, importance), GGMLQuantizationType[type_name]
        )
        for _, rows in cut_rows(weight)
    ]
    return torch.cat([torch.from_numpy(piece) for piece in pieces])


class LossMeter:
    """The live model beside itself with some matrices stored.

    Args:
        model: The live model; only read.
        source: Its merged tensors.
        examples: What it reads.
        importance: What guides the quantizer.
    """

    def __init__(
        self,
        model: LoadedModel,
        source: TensorSource,
        examples: CalibrationExamples,
        importance: ImportanceMatrix | None,
    ) -> None:
        self._model = model
        self._source = source
        self._importance = importance
        self._modules = dict(get_hf_model(model.model).named_modules())
        self._batch = _make_batch(examples, model.tokenizer.pad_token_id or 0)
        self.tokens = int(self._batch[1].sum())
        self._right = self._predict({})

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """A matrix as the model has it, float32 on the CPU."""
        return self._source.load(matrix.source).float()

    def importance(self, matrix: Matrix) -> Any:
        """How much each of its columns matters, or ``None``."""
        weights = None if self._importance is None else self._importance.weights(matrix.name)
        return None if weights is None else weights.reshape(-1)

    def error(self, matrix: Matrix, type_name: str) -> torch.Tensor:
        """What storing a matrix adds to it."""
        weight = self.weight(matrix)
        stored = store(weight, type_name, self.importance(matrix), matrix.name)
        return stored - weight

    def measure(self, types: Mapping[Matrix, str]) -> Loss:
        """The loss of storing some matrices so, all at once."""
        import torch

        other = self._predict(types)
        right = self._right
        kl = (right.exp() * (right - other)).sum(-1)
        same = right.argmax(-1) == other.argmax(-1)
        return Loss(float(kl.double().mean()), float(same.to(torch.float32).mean()))

    def _predict(self, types: Mapping[Matrix, str]) -> torch.Tensor:
        """Log-probabilities at the tokens that count, shape (tokens, vocabulary)."""
        import torch

        ids, mask = self._batch
        with (
            self._model.engine.inference(self._model) as live,
            torch.no_grad(),
            self._storing(types),
        ):
            device = next(self._model.model.parameters()).device
            logits = live(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            rows = logits[mask.bool().to(device)].float()
            return torch.log_softmax(rows, -1).cpu()

    @contextlib.contextmanager
    def _storing(self, types: Mapping[Matrix, str]) -> Iterator[None]:
        handles = []
        embeddings = get_hf_model(self._model.model).get_input_embeddings()
        head = get_hf_model(self._model.model).get_output_embeddings()
        try:
            for matrix, type_name in types.items():
                module = self._modules.get(matrix.module)
                if module is None:
                    raise UnsupportedModelError(
                        f"quantization='auto:...' finds no module behind {matrix.name} to measure."
                    )
                hook = self._add_product(matrix, type_name)
                if module is embeddings:
                    handles.append(module.register_forward_hook(self._add_rows(matrix, type_name)))
                    is_tied = head is not None and head.weight is embeddings.weight
                    if is_tied:
                        handles.append(head.register_forward_hook(hook))
                else:
                    handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_product(self, matrix: Matrix, type_name: str) -> Callable[..., torch.Tensor]:
        def add(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            import torch

            # Made when it is needed and let go of, so that memory is bounded by a tensor.
            error = self.error(matrix, type_name).to(output.device)
            product = torch.nn.functional.linear(inputs[0].float(), error)
            return output + product.to(output.dtype)

        return add

    def _add_rows(self, matrix: Matrix, type_name: str) -> Callable[..., torch.Tensor]:
        def add(module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            error = self.error(matrix, type_name)
            rows = error[inputs[0].cpu()].to(output.device)
            # Gemma multiplies its embeddings in the module itself.
            return output + (rows * getattr(module, "embed_scale", 1.0)).to(output.dtype)

        return add


def _make_batch(examples: CalibrationExamples, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) padded on the right, and where they count."""
    import torch

    rows: list[list[int]] = []
    cut = [ids[:_LONGEST] for ids in examples.token_ids]
    step = max(1, len(cut) * _LONGEST // (2 * _TOKENS))
    for ids in cut[::step]:
        if sum(map(len, rows)) >= _TOKENS:
            break
        rows.append(ids)
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
