"""Three layouts of the same examples: padded, padding-free and packed batches.

A collator takes rows with ``input_ids`` and ``labels`` and lays them out. Which tokens
carry loss was decided before; here nothing is added to the loss or taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.errors import ConfigError, DataError
from qlora_kit.values import IGNORED_LABEL, is_whole_number

if TYPE_CHECKING:
    import torch

__all__ = ["PackedCollator", "PackedLayout", "PaddedCollator"]

PackedLayout = Literal["position_ids", "block_mask", "varlen"]


@dataclass(frozen=True)
class PaddedCollator:
    """One example per row, padded on the right to the longest.

    Padding is masked by place, not by id, so a padding token that is also the end token
    takes nothing out of the loss.

    Attributes:
        pad_token_id: What fills the unused places.
        pad_to_multiple_of: Round the length up to a multiple of this, in tokens.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_padding(self.pad_token_id, self.pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Lay out a batch.

        Args:
            features: Rows with ``input_ids`` and ``labels``.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, int64, each ``(B, T)``.
        """
        import torch

        _check_features(features)
        if any("seq_lengths" in feature for feature in features):
            raise ConfigError(
                "These rows are packed (they have seq_lengths); padding them would let the "
                "examples in a row see each other. Use PackedCollator."
            )
        lengths = [len(feature["input_ids"]) for feature in features]
        width = _round_up(max(lengths), self.pad_to_multiple_of)
        shape = (len(features), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for row, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            input_ids[row, :length] = _to_tensor(feature["input_ids"])
            labels[row, :length] = _to_tensor(feature["labels"])
            attention_mask[row, :length] = 1
        labels[:, 0] = IGNORED_LABEL
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class PackedCollator:
    """All examples of a batch in one row, one after the other, kept apart in attention.

    Takes rows of one example each (padding-free) and rows that :func:`pack_examples` made.
    Padding that ``pad_to_multiple_of`` asks for is an example of its own without loss.

    Attributes:
        pad_token_id: What fills the places added by ``pad_to_multiple_of``.
        attention: What keeps the examples apart. ``"position_ids"``: positions that start again
            at 0, from which transformers builds the block mask itself as long as there is no
            ``attention_mask`` and no key/value cache. ``"block_mask"``: the mask itself, boolean,
            ``(1, 1, T, T)``, true where a token may look. ``"varlen"``: positions, and the
            boundaries that variable-length attention kernels take.
        pad_to_multiple_of: Round the length up to a multiple of this, in tokens.
    """

    pad_token_id: int
    attention: PackedLayout = "position_ids"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        _check_padding(self.pad_token_id, self.pad_to_multiple_of)
        if self.attention not in ("position_ids", "block_mask", "varlen"):
            raise ConfigError(
                "attention must be 'position_ids', 'block_mask' or 'varlen', "
                f"got {self.attention!r}."
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Lay out a batch.

        Args:
            features: Rows with ``input_ids`` and ``labels``, and ``seq_lengths`` where packed.

        Returns:
            ``input_ids``, ``labels`` and ``position_ids``, int64, each ``(1, T)``. With
            ``"block_mask"`` also ``attention_mask``. With ``"varlen"`` also ``cu_seq_lens_q`` and
            ``cu_seq_lens_k``, int32, ``(examples + 1,)``, and ``max_length_q`` and
            ``max_length_k``, plain ints: the names of transformers' ``FlashAttentionKwargs``.
        """
        import torch

        _check_features(features)
        input_ids = torch.cat([_to_tensor(feature["input_ids"]) for feature in features])
        labels = torch.cat([_to_tensor(feature["labels"]) for feature in features])
        lengths = [length for feature in features for length in _get_lengths(feature)]
        missing = _round_up(len(input_ids), self.pad_to_multiple_of) - len(input_ids)
        if missing:
            lengths.append(missing)
            input_ids = torch.cat([input_ids, input_ids.new_full((missing,), self.pad_token_id)])
            labels = torch.cat([labels, labels.new_full((missing,), IGNORED_LABEL)])
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        starts = ends - sizes
        # No example is predicted from the end of the one before it.
        labels[starts] = IGNORED_LABEL
        position_ids = torch.arange(len(input_ids)) - starts.repeat_interleave(sizes)
        batch: dict[str, Any] = {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": position_ids[None],
        }
        if self.attention == "block_mask":
            example = torch.arange(len(lengths)).repeat_interleave(sizes)
            same = example[:, None] == example[None, :]
            batch["attention_mask"] = torch.tril(same)[None, None]
        elif self.attention == "varlen":
            boundaries = torch.cat([starts[:1], ends]).to(torch.int32)
            batch |= {
                "cu_seq_lens_q": boundaries,
                "cu_seq_lens_k": boundaries,
                "max_length_q": max(lengths),
                "max_length_k": max(lengths),
            }
        return batch


def _check_features(features: Sequence[Mapping[str, Any]]) -> None:
    for feature in features:
        if "input_ids" not in feature or "labels" not in feature:
            raise DataError(
                f"A row of a batch needs input_ids and labels; this one has {list(feature)}. "
                "formatter.encode(...).dataset has both."
            )


def _get_lengths(feature: Mapping[str, Any]) -> list[int]:
    total = len(feature["input_ids"])
    lengths = [int(n) for n in feature["seq_lengths"]] if "seq_lengths" in feature else [total]
    if sum(lengths) != total or min(lengths) < 1:
        raise ConfigError(f"seq_lengths {lengths} do not add up to the row's {total} tokens.")
    return lengths


def _to_tensor(values: Any) -> torch.Tensor:
    import torch

    return torch.as_tensor(values, dtype=torch.int64)


def _round_up(length: int, multiple: int | None) -> int:
    return length if multiple is None else -(-length // multiple) * multiple


def _check_padding(pad_token_id: int, multiple: int | None) -> None:
    if not is_whole_number(pad_token_id, at_least=0):
        raise ConfigError(
            f"pad_token_id must be a token id, got {pad_token_id!r}. Set tokenizer.pad_token, for "
            "example to tokenizer.eos_token: labels decide what carries loss, so that is safe."
        )
    if multiple is not None and not is_whole_number(multiple, at_least=1):
        raise ConfigError(f"pad_to_multiple_of must be at least 1, got {multiple!r}.")
