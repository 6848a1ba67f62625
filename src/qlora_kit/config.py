"""What a user asks for, as frozen dataclasses. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from qlora_kit.errors import ConfigError, did_you_mean, invalid_value
from qlora_kit.messages import Setting
from qlora_kit.values import is_finite_number, is_number, is_whole_number

__all__ = [
    "ATTENTION_ALIASES",
    "ATTENTION_MODULES",
    "DEFAULT_TARGET_MODULES",
    "MLP_ALIASES",
    "MLP_MODULES",
    "SCRIPT_TRAINING_DEFAULTS",
    "TARGET_PRESETS",
    "AdapterConfig",
    "DtypeName",
    "LoadConfig",
]

#: No model reads as many.
_MOST_TOKENS: Final = 2**31

DtypeName = Literal["bfloat16", "float16", "float32"]

ATTENTION_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES: Final = ("gate_proj", "up_proj", "down_proj")
#: With the names that families with fused projections use (phi3, gpt-neox, falcon).
ATTENTION_ALIASES: Final = (*ATTENTION_MODULES, "qkv_proj", "query_key_value", "Wqkv", "out_proj")
MLP_ALIASES: Final = (
    *MLP_MODULES, "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2",
)  # fmt: skip
DEFAULT_TARGET_MODULES: Final = ATTENTION_MODULES + MLP_MODULES
TARGET_PRESETS: Final = ("attention", "mlp", "all-linear")

#: The classic script's ``SFTConfig``. ``optim`` is chosen by what runs on the device.
SCRIPT_TRAINING_DEFAULTS: Final[Mapping[str, Any]] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "warmup_steps": 5,
    "max_steps": 60,
    "learning_rate": 2e-4,
    "logging_steps": 1,
    "weight_decay": 0.01,
    "lr_scheduler_type": "linear",
    "seed": 3407,
    "report_to": "none",
}


@dataclass(frozen=True)
class LoadConfig:
    """How a base model is loaded; see :func:`qlora_kit.load_quantized` for each field."""

    model_name: str
    max_seq_length: int = 2048
    dtype: DtypeName | None = None
    load_in_4bit: bool = True
    load_in_8bit: bool = False
    local_files_only: bool = True
    token: str | None = field(default=None, repr=False)
    revision: str | None = None
    cache_dir: str | None = None
    device_map: Any = None
    trust_remote_code: bool = False
    is_trainable: bool = True
    shard: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        places = self.device_map
        if not (
            places is None
            or isinstance(places, str | int)
            or (isinstance(places, Mapping) and places and all(isinstance(n, str) for n in places))
            # A torch.device.
            or (hasattr(places, "index") and hasattr(places, "type"))
        ):
            raise invalid_value(
                "device_map", "must be a device, 'auto', or devices by module", places,
                "load_quantized",
            )  # fmt: skip
        if not is_whole_number(self.max_seq_length):
            raise invalid_value(
                "max_seq_length",
                "must be a whole number of tokens",
                self.max_seq_length,
                "load_quantized",
            )
        if self.max_seq_length >= _MOST_TOKENS:
            raise invalid_value(
                "max_seq_length", f"must be below {_MOST_TOKENS:,} tokens", "more", "load_quantized"
            )
        if self.max_seq_length < 1:
            raise ConfigError(
                Setting("max_seq_length", of="load_quantized"),
                f" must be at least 1 token, got {self.max_seq_length}; 2048 is the usual choice.",
                parameter="max_seq_length",
                value=self.max_seq_length,
            )
        for name in ("load_in_4bit", "load_in_8bit", "local_files_only", "is_trainable",
                     "trust_remote_code"):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.shard, bool) and self.shard != "auto":
            raise invalid_value(
                "shard", "must be True, False or 'auto'", self.shard, "load_quantized"
            )
        for name in ("token", "revision", "cache_dir"):
            value = getattr(self, name)
            # A token is never shown; True would have huggingface_hub look for a stored one.
            if value is not None and (
                not isinstance(value, str) or not value.strip() or "\0" in value
            ):
                shown = f"a {type(value).__name__}" if name == "token" else repr(value)
                raise ConfigError(
                    Setting(name, of="load_quantized"),
                    f" must be text that is not empty, or None; got {shown}.",
                    parameter=name,
                )
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError(
                "load_in_4bit and load_in_8bit are both True; choose one (",
                Setting("load_in_8bit", True, "load_quantized"),
                " alone is enough).",
            )


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter to attach; see :func:`qlora_kit.attach_lora` for each field."""

    r: int = 16
    target_modules: str | Sequence[str] = DEFAULT_TARGET_MODULES
    lora_alpha: int | float = 16
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_gradient_checkpointing: bool | str = "auto"
    random_state: int = 3407
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: Mapping[str, Any] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Sequence[int] | int | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, int] | None = None
    target_parameters: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not is_whole_number(self.r) or self.r < 1:
            raise invalid_value(
                "r", "is the LoRA rank, a whole number of at least 1", self.r, "attach_lora"
            )
        if not is_finite_number(self.lora_alpha) or not self.lora_alpha > 0:
            raise invalid_value(
                "lora_alpha", "must be a number above 0", self.lora_alpha, "attach_lora"
            )
        if not is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise invalid_value(
                "lora_dropout",
                "is a probability from 0 up to (not including) 1",
                self.lora_dropout,
                "attach_lora",
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise invalid_value(
                "bias", "must be 'none', 'all' or 'lora_only'", self.bias, "attach_lora"
            )
        asked = self.use_gradient_checkpointing
        if not isinstance(asked, bool) and asked not in ("auto", "unsloth"):
            raise invalid_value(
                "use_gradient_checkpointing",
                "must be True, False, 'auto' or 'unsloth'",
                self.use_gradient_checkpointing,
                "attach_lora",
            )
        if not is_whole_number(self.random_state, at_least=0) or self.random_state >= 2**63:
            raise invalid_value(
                "random_state",
                "must be a whole number from 0 to 2**63",
                self.random_state,
                "attach_lora",
            )
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise invalid_value(
                    name, "must be True or False", getattr(self, name), "attach_lora"
                )
        if not isinstance(self.init_lora_weights, bool) and not (
            isinstance(self.init_lora_weights, str) and _STARTS.fullmatch(self.init_lora_weights)
        ):
            raise ConfigError(
                Setting("init_lora_weights", self.init_lora_weights, "attach_lora"),
                " is none of True, False, 'gaussian', 'orthogonal', 'olora', 'pissa', "
                "'pissa_niter_N' (N up to 99) and 'loftq'."
                f"{did_you_mean(str(self.init_lora_weights), _START_NAMES)}",
                parameter="init_lora_weights",
                value=self.init_lora_weights,
            )
        for name, pattern in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            if pattern is not None and not isinstance(pattern, Mapping):
                raise ConfigError(
                    Setting(f"{name}_pattern", of="attach_lora"),
                    f" must be a mapping of module names to numbers, got {pattern!r}.",
                    parameter=f"{name}_pattern",
                    value=pattern,
                )
            for key, value in (pattern or {}).items():
                if (
                    not is_finite_number(value)
                    or value <= 0
                    or (name == "rank" and not is_whole_number(value))
                ):
                    raise ConfigError(f"{name}_pattern[{key!r}] must be above 0, got {value!r}.")
        if self.target_parameters:
            self._check_parameters()

    def _check_parameters(self) -> None:
        """Refuse what peft's adapters of parameters do not have."""
        wrong: dict[str, str] = {}
        if self.lora_dropout:
            wrong["lora_dropout"] = "their product is added to the weight, which sees no input"
        if self.use_dora:
            wrong["use_dora"] = "peft has no DoRA of parameters"
        if self.loftq_config or self.init_lora_weights == "loftq":
            wrong["loftq_config" if self.loftq_config else "init_lora_weights"] = (
                "LoftQ starts adapters of linear layers"
            )
        elif self.init_lora_weights not in (True, False, "gaussian"):
            wrong["init_lora_weights"] = "they start by True or 'gaussian'"
        for name, why in wrong.items():
            raise ConfigError(
                Setting(name, getattr(self, name), "attach_lora"),
                f" does not go with adapters of parameters (target_parameters): {why}.",
                parameter=name,
                value=getattr(self, name),
                advice=(
                    "Leave it at its default, or adapt modules alone, without ",
                    Setting("target_parameters", of="attach_lora"),
                    ".",
                ),
            )


# Those of peft's starts that need nothing but the weights; the others look at data first.
_START_NAMES: Final = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "loftq")
_STARTS: Final = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_[1-9]\d?)?|loftq")
