"""Each rank's share of an effective batch, split by tokens, and exact means over ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, Final

from qlora_kit import ranks

__all__ = [
    "ExactEvaluation", "RankBatches", "RankRows", "RankedRows", "is_blank", "split_by_tokens",
]  # fmt: skip

#: Stands for a row without trained tokens, where a rank has none and must compute all the same.
_BLANK: Final = -1
_BLANK_TOKENS: Final = 2


def split_by_tokens(lengths: Sequence[int], shares: int, most_rows: int | None) -> list[list[int]]:
    """Positions of rows for each share, longest first to whoever has the fewest tokens.

    At a step's end every rank waits for the one with the most tokens: rows dealt at random leave
    half of 64 cards idle.

    Args:
        lengths: Tokens of each row.
        shares: Number of shares, some of which may be empty.
        most_rows: Most rows in a share, ``None`` for any number.
    """
    taken: list[list[int]] = [[] for _ in range(shares)]
    heap = [(0, share) for share in range(shares)]
    for position in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        tokens, share = heapq.heappop(heap)
        taken[share].append(position)
        if most_rows is None or len(taken[share]) < most_rows:
            heapq.heappush(heap, (tokens + lengths[position], share))
    return [sorted(positions) for positions in taken]


class RankBatches:
    """A batch sampler that yields one rank's rows, as many batches as every other rank's.

    All ranks draw the same order, so nothing has to be sent, and no row is taken twice to fill up
    the last effective batch.

    Args:
        sampler: Row numbers, in the order one process would take them.
        lengths: Tokens of each row.
        rows: Rows of a batch, per rank.
        accumulation: Batches of an effective batch.
        place: Which rank's rows to yield.
        seed: For samplers that draw from the global generator, which differs between ranks.
        drops_last: Whether a last, smaller batch is left out.
        fills: Whether each batch has at least one row, a blank one if need be, and at most
            ``rows``.
    """

    def __init__(
        self, sampler: Any, lengths: Sequence[int], *, rows: int, accumulation: int,
        place: ranks.Place, seed: int, drops_last: bool, fills: bool,
    ) -> None:  # fmt: skip
        self.sampler = sampler
        self._lengths = lengths
        self._rows, self._accumulation = rows, accumulation
        self._place, self._seed = place, seed
        self._drops_last, self._fills = drops_last, fills
        self._epoch = 0
        self.drop_last, self.batch_size = drops_last, rows

    @property
    def batch_sampler(self) -> RankBatches:
        """Itself: transformers sets the epoch of a sampler's own ``batch_sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Draw another order from now on."""
        self._epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        whole = self._rows * self._place.world
        count = len(self.sampler)
        return count // whole if self._drops_last else -(-count // whole)

    def __iter__(self) -> Iterator[list[int]]:
        whole = self._rows * self._place.world
        order = self._draw()
        if self._drops_last:
            order = order[: len(order) // whole * whole]
        for start in range(0, len(order), whole * self._accumulation):
            step = order[start : start + whole * self._accumulation]
            count = -(-len(step) // whole)
            shares = split_by_tokens(
                [self._lengths[index] for index in step],
                self._place.world,
                count * self._rows if self._fills else None,
            )
            mine = [step[position] for position in shares[self._place.rank]]
            size = -(-len(mine) // count)
            for batch in range(count):
                rows = mine[batch * size : (batch + 1) * size]
                yield rows or ([_BLANK] if self._fills else [])

    def _draw(self) -> list[int]:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._epoch)
            return list(self.sampler)


def is_blank(batch: Any) -> bool:
    """Whether a batch is a stand-in for rows that this rank has none of."""
    if ranks.find_place().world == 1 or batch["input_ids"].shape[0] != 1:
        return False
    mask = batch.get("attention_mask")
    shown = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return shown <= _BLANK_TOKENS and bool((batch["labels"] == -100).all())


class RankRows:
    """A dataset that has blank rows too, and no trouble with no rows at all."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        row = dict(dataset[0])
        blank = {name: row[name][:_BLANK_TOKENS] for name in ("input_ids", "labels")}
        ids = blank["input_ids"]
        # Whatever the rows are made of, lists or arrays.
        blank["labels"] = type(ids)([-100] * len(ids)) if isinstance(ids, list) else ids * 0 - 100
        if "seq_lengths" in row:
            blank["seq_lengths"] = [len(ids)]
        self._blank = blank

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self._blank if at == _BLANK else self._dataset[at] for at in indices]

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]


class RankedRows:
    """Mixin for ``transformers.Trainer``: each rank takes its share of the rows, and no other."""

    def get_train_dataloader(self) -> Any:
        """This rank's batches; alone, the trainer's own."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        place = ranks.find_place()
        if place.world == 1:
            return loader
        import torch

        args = self.args  # type: ignore[attr-defined]
        shared = _share_rows(
            loader, args, place, rows=self._train_batch_size,  # type: ignore[attr-defined]
            accumulation=args.gradient_accumulation_steps, drops_last=args.dataloader_drop_last,
            fills=not self.uses_fast_step,  # type: ignore[attr-defined]
        )  # fmt: skip
        # From here on only dropout draws: other ranks' rows get other masks.
        torch.manual_seed(args.seed + place.rank)
        return shared

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's batches; alone, the trainer's own."""
        loader = super().get_eval_dataloader(*args, **kwargs)  # type: ignore[misc]
        place = ranks.find_place()
        if place.world == 1:
            return loader
        settings = self.args  # type: ignore[attr-defined]
        fast = self.uses_fast_step and self.compute_metrics is None  # type: ignore[attr-defined]
        return _share_rows(
            loader, settings, place, rows=settings.per_device_eval_batch_size, accumulation=1,
            drops_last=False, fills=not fast,
        )  # fmt: skip


def _share_rows(
    loader: Any, args: Any, place: ranks.Place, *, rows: int, accumulation: int, drops_last: bool,
    fills: bool,
) -> Any:  # fmt: skip
    """A loader of one rank's rows, from the one that accelerate made."""
    from torch.utils.data import DataLoader

    batches = loader.batch_sampler
    # accelerate wraps the trainer's batch sampler in one that deals whole batches to ranks.
    batches = getattr(batches, "batch_sampler", batches)
    sampler = RankBatches(
        batches.sampler, _measure_lengths(loader.dataset), rows=rows, accumulation=accumulation,
        place=place, seed=args.seed, drops_last=drops_last, fills=fills,
    )  # fmt: skip
    workers = args.dataloader_num_workers
    return DataLoader(
        RankRows(loader.dataset),
        batch_sampler=sampler,
        collate_fn=loader.collate_fn,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )


def _measure_lengths(dataset: Any) -> list[int]:
    """Tokens of each row, without turning every token into a Python number."""
    import pyarrow.compute

    column = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    lengths: list[int] = pyarrow.compute.list_value_length(column).to_pylist()
    return lengths


class ExactEvaluation:
    """Mixin for ``transformers.Trainer``: ``eval_loss`` is a mean over tokens.

    The trainer's own is a mean of the batches' means, which depends on how rows lie in batches
    and on the number of ranks.
    """

    _evaluated: list[tuple[Any, int]] | None = None

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One batch, whose loss is added up by its tokens."""
        labels = inputs.get("labels") if hasattr(inputs, "get") else None
        trained = 0 if labels is None else int((labels[..., 1:] != -100).sum())
        found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        # A step of the trainer's own says how many there were.
        trained = self.__dict__.pop("_trained_in_batch", trained)
        # The mean over no token is not a number, and counts for nothing.
        if self._evaluated is not None and found[0] is not None and trained:
            self._evaluated.append((found[0].detach().mean(), trained))
        return found

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, with the loss over all ranks' tokens."""
        self._evaluated = []
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            evaluated = self._evaluated
        finally:
            self._evaluated = None
        total, trained = ranks.sum_up(
            [
                sum(float(loss) * count for loss, count in evaluated),
                sum(count for _, count in evaluated),
            ]
        )
        if trained and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = total / trained
        return output
