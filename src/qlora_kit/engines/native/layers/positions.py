"""Where tokens stand: rotary cosines and sines, windows and masks of every kind of layer.

transformers' rotary modules compute them. What they decide by looking at a whole batch, or remember
of earlier ones, is decided here for each example, so that it trains as it would alone: ``longrope``
and ``dynamic`` turn a long example by other frequencies than a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora_kit.engines.native.layers.attention import make_block_mask
from qlora_kit.engines.native.layers.families import Family
from qlora_kit.engines.native.layers.family_reader import read_windows
from qlora_kit.engines.native.layers.layer import Placement

__all__ = ["Positions", "Rotation"]


class Rotation(NamedTuple):
    """Rotary cosines and sines, shape ``(T, R)``, for the first ``R`` dimensions of a head."""

    cos: Tensor
    sin: Tensor


class Positions:
    """A decoder's positions.

    Args:
        decoder: transformers' decoder.
        config: Its configuration.
        family: Its family.
    """

    def __init__(self, decoder: Any, config: Any, family: Family) -> None:
        self._rotary, self._config, self._family = decoder.rotary_emb, config, family
        #: How far each layer sees, in host memory, where attention reads it; as a number it would
        #: mean a compiled graph for each.
        self.windows = [
            torch.tensor(window, dtype=torch.int32)
            for window in read_windows(decoder, config, family)
        ]
        count = len(decoder.layers)
        types: Sequence[str] = getattr(config, "layer_types", None) or ("",) * count
        has_types = isinstance(self._rotary.rope_type, dict)
        self._has_types = has_types
        turned = _find_rotated(config, family, types)
        #: For each layer, the key of its rotation in what :meth:`compute` returns.
        self.keys: list[str | None] = [
            (kind if has_types else "") if turns else None
            for kind, turns in zip(types, turned, strict=True)
        ]
        self._by_length = _choose_frequencies(self._rotary, config)

    @property
    def rereads_beyond(self) -> int | None:
        """Tokens beyond which all tokens before turn by other frequencies, or ``None``."""
        if self._rotary.rope_type != "longrope":
            return None
        return int(self._config.rope_parameters["original_max_position_embeddings"])

    def place(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        bounds: Tensor,
        longest: Tensor,
        *,
        has_mask: bool,
    ) -> list[Placement]:
        """Where tokens of examples laid end to end stand, for every layer.

        Args:
            hidden: Embeddings, shape ``(T, H)``, for their dtype and device.
            position_ids: Shape ``(T,)``.
            bounds: Cumulative lengths of examples, int32, shape ``(examples + 1,)``.
            longest: At least the longest length, int32, in host memory.
            has_mask: Whether attention takes a mask.
        """
        lengths = None
        if self._by_length is not None:
            lengths = _measure_examples(position_ids, bounds)
        rotations = self.compute(hidden, position_ids, lengths)
        stretch = self.stretch(position_ids, hidden.dtype)
        masks: dict[int, Tensor | None] = dict.fromkeys(map(int, self.windows))
        if has_mask:
            masks = {window: make_block_mask(bounds, hidden.shape[0], window) for window in masks}
        return [
            Placement(*rotations[key], stretch, bounds, longest, window, masks[int(window)])
            for key, window in zip(self.keys, self.windows, strict=True)
        ]

    def compute(
        self, hidden: Tensor, position_ids: Tensor, lengths: Tensor | None
    ) -> dict[str | None, Rotation]:
        """The rotations of tokens, by key; ``None`` is the one that does not turn.

        Args:
            hidden: Shape ``(any, H)``, for its dtype and device.
            position_ids: Shape ``(T,)``.
            lengths: Of the example that each token is in, shape ``(T,)``; read where that matters.
        """
        found: dict[str | None, Rotation] = {}
        for key in dict.fromkeys(key for key in self.keys if key is not None):
            cos, sin = self._turn(hidden, position_ids, lengths, key)
            if self._family.pairs and not self._family.laid_in_pairs:
                half = cos.shape[1] // 2
                cos, sin = (one[:, :half].repeat_interleave(2, dim=1) for one in (cos, sin))
            if self._family.rotates_wide and cos.dtype != torch.float64:
                cos, sin = cos.float(), sin.float()
            found[key] = Rotation(cos, sin)
        if None in self.keys:
            # Turned by nothing, so that all layers remain calls of one function.
            shape = (len(position_ids), self._head_dim)
            like = next(iter(found.values())).cos if found else hidden.new_empty(shape)
            found[None] = Rotation(torch.ones_like(like), torch.zeros_like(like))
        return found

    def stretch(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What each token's queries are multiplied with, shape ``(T, 1, 1)``, or ``None``."""
        if not self._family.stretches_queries:
            return None
        # Llama 4's temperature, as transformers' get_llama_4_attn_scale computes it.
        rope = self._config.rope_parameters
        beta, reach = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        scale = 1 + beta * torch.log(1 + torch.floor(position_ids / reach))
        return scale.to(dtype)[:, None, None]

    @property
    def _head_dim(self) -> int:
        config = self._config
        return int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )

    def _turn(
        self, hidden: Tensor, position_ids: Tensor, lengths: Tensor | None, key: str
    ) -> tuple[Tensor, Tensor]:
        if self._by_length is not None:
            assert lengths is not None
            frequencies = self._by_length(lengths[:, None])
            angles = position_ids[:, None].float() * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            scaling = self._rotary.attention_scaling
            cos, sin = angles.cos() * scaling, angles.sin() * scaling
            return cos.to(hidden.dtype), sin.to(hidden.dtype)
        kind = (key,) if self._has_types else ()
        cos, sin = self._rotary(hidden[None], position_ids[None], *kind)
        return cos[0], sin[0]


def _choose_frequencies(rotary: Any, config: Any) -> Callable[[Tensor], Tensor] | None:
    """From lengths ``(T, 1)`` to frequencies ``(T, R / 2)``, where those depend on lengths."""
    if rotary.rope_type == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        reach = int(config.rope_parameters["original_max_position_embeddings"])
        make = ROPE_INIT_FUNCTIONS["longrope"]
        device = rotary.inv_freq.device
        short, long = (
            make(config, device, seq_len=length)[0].float() for length in (reach, reach + 1)
        )
        return lambda lengths: torch.where(lengths > reach, long, short)
    if rotary.rope_type == "dynamic":
        usual = rotary.original_inv_freq.to(rotary.inv_freq.device).float()
        rope, most = config.rope_parameters, config.max_position_embeddings
        theta, factor = rope["rope_theta"], rope["factor"]
        dimensions = 2 * len(usual)
        powers = torch.arange(0, dimensions, 2, device=usual.device).float() / dimensions

        def stretch(lengths: Tensor) -> Tensor:
            # NTK-aware scaling as transformers' _compute_dynamic_ntk_parameters has it.
            grown = factor * lengths.clamp(min=most) / most - (factor - 1)
            base = theta * grown ** (dimensions / (dimensions - 2))
            return torch.where(lengths > most, 1.0 / base**powers, usual)

        return stretch
    return None


def _measure_examples(position_ids: Tensor, bounds: Tensor) -> Tensor:
    """The length of the example that each token is in, shape ``(T,)``."""
    places = torch.arange(len(position_ids), device=bounds.device)
    owner = torch.bucketize(places, bounds[1:], right=True).clamp_(max=len(bounds) - 2)
    return bounds.diff()[owner]


def _find_rotated(config: Any, family: Family, types: Sequence[str]) -> list[bool]:
    """Which layers have positions."""
    if family.rotated_layers == "no_rope_layers":
        # 1 where a layer does rotate, whatever the name says.
        return [bool(turns) for turns in config.no_rope_layers]
    if family.rotated_layers == "sliding" and config.sliding_window is not None:
        return [kind == "sliding_attention" for kind in types]
    return [True] * len(types)
