"""Changes to tensors on the way from transformers to llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qlora_kit.exporters.gguf.families.family import Config, Transform

if TYPE_CHECKING:
    import torch

__all__ = [
    "NORMS_PLUS_ONE",
    "ROTARY",
    "add_one",
    "first_half",
    "keep",
    "negate_exponential",
    "second_half",
    "squeeze_convolution",
    "transpose",
    "unpermute_rotary",
]


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the two halves that transformers rotates against each other.

    Meta's checkpoints and llama.cpp pair neighbouring dimensions; transformers pairs a
    dimension with the one half a head away.

    Args:
        weight: Shape (heads * head_dim, ...).
        heads: Number of heads in it.
    """
    # transformers (H, 2, D/2, ...): dimension i turns with i + D/2. llama.cpp's "norm" rotation
    # (ggml-cpu/ops.cpp) turns 2i with 2i + 1, so the two axes change places: (H, D/2, 2, ...).
    # The same permutation on q and k leaves their products, hence attention, as they were; v has
    # no positions and stays. conversion/llama.py calls it permute().
    rest = weight.shape[1:]
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *rest)
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def _permute_query(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return unpermute_rotary(weight, config.heads)


def _permute_key(weight: torch.Tensor, config: Config) -> torch.Tensor:
    return unpermute_rotary(weight, config.kv_heads)


def add_one(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """Gemma stores its norms around zero."""
    # Gemma's layer multiplies by 1 + w, ggml's rms_norm by w. In float32, as norms are written:
    # in bfloat16 the sum would lose what is below 2**-8 (conversion/gemma.py, norm_shift()).
    return weight.float() + 1.0


def keep(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """A tensor that changes its name alone, or that others of its name's end do not speak for."""
    return weight


def transpose(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """(experts, inputs, outputs) -> (experts, outputs, inputs)."""
    return weight.transpose(-1, -2)


def first_half(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The gate's rows, of gate and up in one matrix."""
    return weight.chunk(2, dim=-2)[0]


def second_half(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The up projection's rows."""
    return weight.chunk(2, dim=-2)[1]


def negate_exponential(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """A decay as llama.cpp multiplies with it: a checkpoint has its logarithm."""
    return -weight.float().exp()


def squeeze_convolution(weight: torch.Tensor, config: Config) -> torch.Tensor:
    """(channels, 1, kernel) -> (channels, kernel), a matrix as llama.cpp's convolution wants."""
    return weight.squeeze(1)


#: Query and key rows as llama.cpp's "norm" rotation wants them.
ROTARY: Final[Mapping[str, Transform]] = {
    "q_proj.weight": _permute_query,
    "q_proj.bias": _permute_query,
    "k_proj.weight": _permute_key,
    "k_proj.bias": _permute_key,
}

#: Norms that are stored around zero.
NORMS_PLUS_ONE: Final[Mapping[str, Transform]] = {"norm.weight": add_one}
