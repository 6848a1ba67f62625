"""What a training step takes of memory, in bytes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qlora_kit.engines.native.layers import CAPPED_QUERIES

__all__ = ["MemoryModel", "count_state_bytes"]


#: What tensors' bytes leave out: gaps between blocks of many sizes (an H200 reserved 3 to 5% more
#: than was allocated, ``benchmarks/plan_memory.py``), and products' workspaces on a GPU.
_RESERVED_SHARE: Final = 1.05
_WORKSPACE_BYTES: Final = 96 * 1024**2
#: And the gaps between blocks that stay: 0.01 to 0.13 GiB on an H200 in three plans.
_STANDING_GAPS: Final = 192 * 1024**2

#: Bytes of an optimizer's states for each number that trains, by a part of its name; Adam has two
#: in float32.
_STATE_BYTES: Final = {
    "8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0, "lion": 4, "rmsprop": 4, "adagrad": 4,
}  # fmt: skip


@dataclass(frozen=True)
class MemoryModel:
    """What a training step of one model takes, in bytes.

    Attributes:
        layers: Number of decoder layers.
        saved_per_token: Activations one layer keeps per token for its backward pass.
        boundary_per_token: A layer's input per token, all that a recomputed layer keeps.
        transient_per_token: The largest extra per-token buffers while one layer runs backward.
        product_per_token: The same while one of its weights is dequantized.
        final_per_token: What the last normalization keeps of a token while the loss is computed.
        final_grad_per_token: The same, and what its own backward pass takes.
        dequantized: All projection weights, dequantized.
        largest_group: The largest group of projection weights, dequantized.
        loss_per_token: Logits and their gradient for one token.
        standing: What is there before the first step: copies of the adapters, their gathered
            gradients, and scales of the base's weights.
        optimizer: Gradients as the optimizer gets them, and its states.
        stepping: What it holds for the moment.
        workspace: What matrix products take of the device.
    """

    layers: int
    saved_per_token: int
    boundary_per_token: int
    transient_per_token: int
    product_per_token: int
    final_per_token: int
    final_grad_per_token: int
    dequantized: int
    largest_group: int
    loss_per_token: int
    standing: int
    optimizer: int = 0
    stepping: int = 0
    workspace: int = 0

    @classmethod
    def of_layers(
        cls,
        *,
        layers: int,
        hidden: int,
        queries: int,
        keys: int,
        intermediate: int,
        post_norms: int = 0,
        capped_heads: int = 0,
        item_bytes: int,
        vocabulary: int,
        has_triton: bool,
        dequantized: int,
        largest_group: int,
        copies: int,
        routed: int = 0,
        dropped: int = 0,
        scales: int = 0,
        trained: int = 0,
        state_bytes: int = 8,
        is_compiled: bool = True,
    ) -> MemoryModel:
        """What a step takes, from widths in numbers and from sizes in bytes.

        Args:
            layers: Number of decoder layers.
            hidden: Width of a token's state.
            queries: Width of all heads' queries.
            keys: Width of all heads' keys.
            intermediate: Width within the MLP; of all experts that a token goes to.
            post_norms: Norms of a layer's outputs, whose inputs are kept too.
            capped_heads: Attention heads whose scores are soft-capped and so written out.
            item_bytes: Bytes of a number.
            vocabulary: Tokens that the head scores.
            has_triton: Whether it runs on CUDA, where a kernel turns logits into their gradient in
                place.
            dequantized: Bytes of all projection weights, dequantized.
            largest_group: Bytes of the largest group of them.
            copies: Bytes of the adapters' copies and their gathered gradients.
            scales: Bytes of the base's scales in float32.
            trained: Numbers that train.
            state_bytes: Bytes of the optimizer's states for each of them.
            is_compiled: Whether layers go through the compiler, which keeps less of them.
            routed: Experts that a token goes to, each with a row of its own; 0 for none.
            dropped: Width of what a layer's adapters see of their inputs through dropout.
        """
        # Kept per token: normalized inputs, q/k/v before and after rotation, attention output,
        # gate and up, their product. The softmax keeps a float32 number for each head, and
        # adapters what lies between their matrices: each is less than the gaps.
        saved = (3 + post_norms) * hidden + 2 * (queries + 2 * keys) + queries + 3 * intermediate
        if not is_compiled:
            # The opened gate; and in 16 bits normalized numbers in float32.
            saved += intermediate
            saved += 0 if item_bytes >= 4 else 4 * hidden + 2 * (queries + keys)
        # Four of them in float32 in the backward pass.
        scores = 16 * capped_heads * CAPPED_QUERIES
        # A token's rows are gathered and added up again, each way.
        rows = 2 * hidden if not routed else 4 * hidden * routed
        return cls(
            layers=layers,
            # What was dropped is kept as a byte.
            saved_per_token=saved * item_bytes + dropped * (item_bytes + 1),
            boundary_per_token=hidden * item_bytes,
            # Where gate and up get their gradients, from the product's, which takes the product's
            # own place: two of the residual stream beside them.
            transient_per_token=(rows + 2 * intermediate) * item_bytes + scores,
            product_per_token=(rows + 2 * hidden + intermediate) * item_bytes + scores,
            # Outside of the compiled layers, and in float32.
            final_per_token=hidden * (4 * item_bytes + 8),
            final_grad_per_token=hidden * (6 * item_bytes + 12),
            dequantized=dequantized,
            largest_group=largest_group,
            # Triton's kernel turns logits into their gradient in place.
            loss_per_token=vocabulary * (item_bytes if has_triton else 2 * item_bytes + 8),
            standing=copies + scales + (_STANDING_GAPS if has_triton else 0),
            optimizer=trained * (4 + state_bytes),
            stepping=4 * trained if state_bytes >= 8 else 0,
            workspace=_WORKSPACE_BYTES if has_triton else 0,
        )

    @property
    def on_the_fly(self) -> int:
        """Bytes of weights that are dequantized for the moment."""
        # The next group is dequantized while the last one's memory is still held; in 16 bits on
        # a GPU it is copied beside its adapters.
        times = (2 if self.dequantized else 0) + (1 if self.workspace else 0)
        return times * self.largest_group

    def predict(self, tokens: int, checkpointed: int, *, caches: bool, loss_chunk: int) -> int:
        """Peak bytes beyond the loaded model for a micro-batch of ``tokens``."""
        return self.hold(caches=caches) + self.predict_step(
            tokens, checkpointed, caches=caches, loss_chunk=loss_chunk
        )

    def hold(self, *, caches: bool) -> int:
        """Bytes that stay from step to step."""
        return self.standing + self.optimizer + (self.dequantized if caches else 0)

    def predict_step(self, tokens: int, checkpointed: int, *, caches: bool, loss_chunk: int) -> int:
        """Bytes that come and go with a micro-batch, at their peak."""
        # A layer that is not recomputed keeps its activations; every layer keeps its input.
        kept = (self.layers - checkpointed) * self.saved_per_token
        kept += self.layers * self.boundary_per_token
        weights = 0 if caches else self.on_the_fly
        beside = max(tokens * self.transient_per_token, tokens * self.product_per_token + weights)
        # The loss comes before the first layer's backward pass; of the recomputed layers (Chen et
        # al., arXiv:1604.06174) one at a time holds all of its own, when the others are done.
        loss = max(
            tokens * self.final_per_token + min(loss_chunk, tokens) * self.loss_per_token,
            tokens * self.final_grad_per_token,
        )
        again = checkpointed * self.boundary_per_token + self.saved_per_token
        peak = max(
            tokens * kept + loss,
            tokens * kept + (beside if checkpointed < self.layers else 0),
            tokens * again + beside if checkpointed else 0,
            self.stepping,
        )
        return int(_RESERVED_SHARE * peak) + self.workspace


def count_state_bytes(optimizer: object) -> int:
    """Bytes of an optimizer's states for each number that trains, by its name."""
    name = str(getattr(optimizer, "value", optimizer))
    return next((size for word, size in _STATE_BYTES.items() if word in name), 8)
