"""What a model family is: how it differs between transformers and llama.cpp.

The families themselves stand in :mod:`.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.errors import UnsupportedModelError
from qlora_kit.exporters.gguf.families.rope import Rope, describe_rope, read_rope

if TYPE_CHECKING:
    import torch

    from qlora_kit.weights.source import TensorSource

__all__ = ["Config", "Description", "Family", "Transform"]

#: Keys of a configuration that name the activation, the first one that is there counts.
_ACTIVATIONS: Final = ("hidden_activation", "hidden_act", "activation_function")

Transform = Callable[["torch.Tensor", "Config"], "torch.Tensor"]


class Config:
    """A model's configuration, whose missing entries are named.

    Args:
        values: ``config.json`` as a dictionary, of transformers 4 or 5.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """An entry, or ``default`` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        """An entry that must be there.

        Raises:
            UnsupportedModelError: When it is not.
        """
        value = self.values.get(key)
        if value is None:
            raise UnsupportedModelError(
                f"The configuration of this {self.get('model_type')!r} model has no {key!r}, "
                "without which llama.cpp cannot run it. Add it to config.json."
            )
        return value

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.require("num_hidden_layers"))

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return int(self.require("num_attention_heads"))

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return int(self.get("num_key_value_heads", self.heads))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(self.get("head_dim", int(self.require("hidden_size")) // self.heads))


@dataclass
class Description:
    """What a family says of one model.

    Attributes:
        metadata: GGUF keys without the architecture prefix.
        tables: Extra tensors of divisors, by GGUF name.
        plain: GGUF keys that have no such prefix.
        fillers: Tensors that llama.cpp asks for and never reads, by GGUF name with their shape;
            zeros where the model has none.
        notes: What the user should know, one sentence each.
    """

    metadata: dict[str, Any]
    tables: dict[str, list[float]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    fillers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _describe_nothing(config: Config, description: Description) -> None:
    """A family whose common description is complete."""


@dataclass(frozen=True)
class Family:
    """How one family of models is written.

    Attributes:
        model_type: ``model_type`` of its configurations.
        architecture: llama.cpp's name for it, a value of ``gguf.MODEL_ARCH_NAMES``.
        activation: The only activation llama.cpp computes for it.
        describe: Adds to, or corrects, the metadata that all families share.
        choose: Makes the family of one model from this one, where the architecture or its parts
            depend on the configuration.
        read_values: Adds what the file says of tensors in its metadata.
        transforms: Changes to tensors, by the end of their Hugging Face name; of the first that
            fits, the others have no say.
        columns: Changes to the order of a matrix's inputs, likewise; an adapter's first factor
            takes them too.
        biases: Modules whose bias llama.cpp reads; any other bias is refused.
        epsilon: The configuration's entry for what is added under a norm's root.
        default_epsilon: That number where no configuration names it.
        has_layer_norm: Whether its norms subtract the mean as well (LayerNorm).
        rotary_kinds: Kinds of rotary scaling that llama.cpp computes for it, besides none.
        scales_by_alpha: Whether "dynamic" rotary embeddings with an ``alpha`` are plain ones of a
            larger base, whatever the length.
        rounds_yarn: Whether a YaRN that does not round its range is said rather than refused.
        rotary_layer_type: The entry of ``rope_parameters`` that is the main one, if it has any.
        default_theta: Base of the rotary embedding where none is stated.
        default_rotary_part: The part of a head that rotates, where that is not stated.
        has_experts: Whether blocks hold experts.
        ties_by_default: Whether the head is the embedding matrix where the configuration does
            not say.
        names: GGUF names of tensors that the ``gguf`` package's map does not know, by Hugging
            Face name, block numbers as ``{bid}`` in both, without ``.weight`` or ``.bias``.
        block_tensors: What every block must have, by GGUF name.
        tables: What must be there besides blocks, by GGUF name.
        splits: Tensors that llama.cpp has in several parts: by the end of the Hugging Face name,
            each part's GGUF name in its block, with ``.weight`` or ``.bias``, and how it is cut.
        stacks: Numbered tensors that llama.cpp has in one: the Hugging Face name, the number as
            ``{n}``, and the GGUF name.
        unadapted: Matrices that llama.cpp multiplies with past any adapter, by the end of their
            Hugging Face name.
        ignored: Ends of names that llama.cpp has no use for.
    """

    model_type: str
    architecture: str
    activation: str = "silu"
    describe: Callable[[Config, Description], None] = _describe_nothing
    choose: Callable[[Family, Config], Family] | None = None
    read_values: Callable[[TensorSource, Config, Description], None] | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    columns: Mapping[str, Transform] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    epsilon: str = "rms_norm_eps"
    default_epsilon: float | None = None
    has_layer_norm: bool = False
    rotary_kinds: tuple[str, ...] = ()
    scales_by_alpha: bool = False
    rounds_yarn: bool = False
    rotary_layer_type: str | None = None
    default_theta: float = 10000.0
    default_rotary_part: float = 1.0
    has_experts: bool = False
    ties_by_default: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    block_tensors: tuple[str, ...] = ("attn_norm", "attn_output", "ffn_norm")
    tables: tuple[str, ...] = ("token_embd", "output_norm")
    splits: Mapping[str, Mapping[str, Transform]] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    unadapted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def _find_epsilon(self, config: Config) -> float:
        if self.default_epsilon is not None:
            return float(config.get(self.epsilon, self.default_epsilon))
        return float(config.require(self.epsilon))

    def _describe_width(self, config: Config) -> dict[str, Any]:
        """The width of dense layers; a model of experts alone may state none."""
        if self.has_experts and config.get("intermediate_size") is None:
            return {}
        width = config.require("intermediate_size")
        if isinstance(width, list):
            if len(set(width)) > 1:
                raise UnsupportedModelError(
                    f"Layers are {sorted(set(width))} wide; llama.cpp wants all of "
                    f"{self.architecture!r} alike."
                )
            return {"feed_forward_length": [int(one) for one in width]}
        return {"feed_forward_length": int(width)}

    def _read_rope(self, config: Config) -> Rope:
        stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if self.scales_by_alpha and stated.get("alpha"):
            kind = stated.get("rope_type") or stated.get("type")
            if kind == "dynamic":
                # A base for the longest context at once: arXiv:2309.00071, "NTK-aware".
                width = config.head_dim
                theta = float(stated.get("rope_theta") or config.get("rope_theta", 10000.0))
                return Rope("default", theta * float(stated["alpha"]) ** (width / (width - 2)))
        return read_rope(config.values, self.rotary_layer_type, self.default_theta)

    def describe_model(self, config: Config) -> Description:
        """The metadata, extra tensors and notes of a model of this family.

        Raises:
            UnsupportedModelError: When llama.cpp would compute something else.
        """
        stated = (config.get(key) for key in _ACTIVATIONS)
        activation = next((name for name in stated if name is not None), self.activation)
        if activation != self.activation:
            raise UnsupportedModelError(
                f"This {self.model_type} model computes {activation!r}; llama.cpp computes "
                f"{self.activation!r} for {self.architecture!r}."
            )
        context = int(config.require("max_position_embeddings"))
        kind = "epsilon" if self.has_layer_norm else "rms_epsilon"
        epsilon = f"attention.layer_norm_{kind}"
        description = Description(
            {
                "context_length": context,
                "embedding_length": int(config.require("hidden_size")),
                "block_count": config.layers,
                **self._describe_width(config),
                "attention.head_count": config.heads,
                "attention.head_count_kv": config.kv_heads,
                epsilon: self._find_epsilon(config),
                "attention.key_length": config.head_dim,
                "attention.value_length": config.head_dim,
            }
        )
        rope = self._read_rope(config)
        if rope.kind not in ("default", *self.rotary_kinds):
            raise UnsupportedModelError(
                f"llama.cpp does not compute {rope.kind!r} rotary embeddings for "
                f"{self.model_type!r} models (it does: {', '.join(self.rotary_kinds) or 'none'}). "
                "Export with 'merged_16bit' and run it with transformers or vLLM."
            )
        partial = rope.parameters.get(
            "partial_rotary_factor", config.get("partial_rotary_factor", self.default_rotary_part)
        )
        if self.rounds_yarn and not rope.parameters.get("truncate", True):
            rope = replace(rope, parameters={**rope.parameters, "truncate": True})
            description.notes.append(
                "llama.cpp rounds the range in which YaRN fades, and this model's configuration "
                "does not: answers far into a long context can differ."
            )
        metadata, description.tables = describe_rope(
            rope, int(config.head_dim * float(partial)), context
        )
        description.metadata |= metadata
        if rope.kind == "longrope":
            description.notes.append(
                "llama.cpp chooses between LongRoPE's two tables by the context size it is started "
                "with, transformers by the length of the text."
            )
        self.describe(config, description)
        return description
