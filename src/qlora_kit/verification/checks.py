"""Comparing what was written with the live model: tensors, logits, stops, tokenizer.

Each function returns :class:`~qlora_kit.results.Check` objects with the figures it saw; it
does not decide what to do about them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qlora_kit.engines.tokenizer import load_tokenizer
from qlora_kit.engines.tokenizer_file import find_differing_text
from qlora_kit.errors import QloraKitError
from qlora_kit.handles import LoadedModel
from qlora_kit.results import Check
from qlora_kit.weights.live import get_hf_model

if TYPE_CHECKING:
    import torch

__all__ = [
    "LogitsDistance",
    "check_config",
    "check_generation_config",
    "check_stops",
    "check_tokenizer",
    "make_probes",
    "measure_logits_distance",
    "read_logits",
]

#: Texts that exercise prose, other scripts, code, digits and an instruction.
PROBE_TEXTS: Final = (
    "The capital of France is Paris, and the capital of Italy is",
    "Continue the fibonacci sequence: 1, 1, 2, 3, 5, 8,",
    "def add(a, b):\n    return",
    "机器学习是人工智能的一个分支,它",
)
_MAX_PROBE_TOKENS: Final = 64
_GENERATED: Final = 4


def make_probes(model: LoadedModel) -> list[list[int]]:
    """Token ids to run both models on: the fixed texts, and a prompt of the trained template."""
    texts = list(PROBE_TEXTS)
    if model.record.formatter is not None:
        texts.append(str(model.record.formatter.prompt("Name three primary colors.", "")))
    limit = min(_MAX_PROBE_TOKENS, model.max_seq_length)
    probes = [model.tokenizer(text)["input_ids"][:limit] for text in texts]
    vocabulary = get_hf_model(model.model).get_input_embeddings().weight.shape[0]
    # A tokenizer for a narrow domain may know none of these texts; spread over its ids then.
    step = max(1, vocabulary // 16)
    spread = [(7 + i * step) % vocabulary for i in range(16)][:limit]
    return [*(list(ids) for ids in probes if len(ids) > 1), spread]


def read_logits(model: Any, probes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of each probe in float32 on the CPU, shape (tokens, vocabulary)."""
    import torch

    device = next(p.device for p in model.parameters())
    results = []
    with torch.no_grad():
        for ids in probes:
            batch = torch.tensor([list(ids)], device=device)
            output = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
            results.append(output.logits[0].float().cpu())
    return results


class LogitsDistance:
    """How far one model's next-token distributions are from another's.

    Attributes:
        mean_kl: Mean over positions of KL(live || exported), in nats.
        max_kl: The largest of them.
        agreement: Share of positions whose most likely token is the same.
        max_difference: Largest absolute difference of two logits.
    """

    def __init__(self, live: Iterable[torch.Tensor], exported: Iterable[torch.Tensor]) -> None:
        import torch

        divergences, same, worst = [], [], 0.0
        for a, b in zip(live, exported, strict=True):
            width = min(a.shape[-1], b.shape[-1])
            p = torch.log_softmax(a[:, :width].double(), -1)
            q = torch.log_softmax(b[:, :width].double(), -1)
            divergences.append((p.exp() * (p - q)).sum(-1))
            same.append(a[:, :width].argmax(-1) == b[:, :width].argmax(-1))
            worst = max(worst, float((a[:, :width] - b[:, :width]).abs().max()))
        all_kl = torch.cat(divergences)
        self.mean_kl = float(all_kl.mean())
        self.max_kl = float(all_kl.max())
        self.agreement = float(torch.cat(same).double().mean())
        self.max_difference = worst

    def as_check(self, tolerance: float) -> Check:
        """A check that holds when the mean KL is within ``tolerance`` nats."""
        # A NaN compares false, so a broken model fails.
        return Check(
            "logits",
            self.mean_kl <= tolerance,
            f"mean KL(live || exported) {self.mean_kl:.2e} nats (limit {tolerance:g}), largest "
            f"{self.max_kl:.2e}; same most likely token at {self.agreement:.1%} of positions; "
            f"logits differ by at most {self.max_difference:.3g}",
            value=None if math.isnan(self.mean_kl) else self.mean_kl,
            tolerance=tolerance,
        )

    def as_facts(self) -> dict[str, Any]:
        """The figures for an artifact."""
        return {
            "kl": self.mean_kl,
            "kl_max": self.max_kl,
            "same_top_token": self.agreement,
            "kl_note": "KL(live || exported) in nats per token over the probe prompts",
        }


def measure_logits_distance(
    model: LoadedModel, exported: Any, probes: Sequence[Sequence[int]]
) -> LogitsDistance:
    """Run the live model and an exported one on the same probes."""
    with model.engine.inference(model) as live:
        expected = read_logits(live, probes)
    return LogitsDistance(expected, read_logits(exported, probes))


#: What an export may say otherwise than the live configuration: how it is stored, where it
#: came from, and what its own updates change.
_STORED_OTHERWISE: Final = frozenset(
    {"dtype", "torch_dtype", "quantization_config", "use_cache", "architectures", "_name_or_path",
     "transformers_version", "_pre_quantization_dtype"}
)  # fmt: skip


def check_config(
    model: LoadedModel,
    folder: Path,
    updates: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> Check:
    """Whether ``config.json`` describes the architecture of the live model.

    Args:
        model: The live model.
        folder: The export.
        updates: Values that must differ from the live ones.
        quantization: The quantization that it must state.
    """
    from transformers import AutoConfig

    try:
        reloaded = AutoConfig.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=model.config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Check("configuration", False, f"it cannot be loaded: {error}")
    live = get_hf_model(model.model).config
    expected = _describe_architecture(live.to_dict(), updates)
    found = _describe_architecture(reloaded.to_dict(), {})
    expected["quantization_config"] = quantization
    found["quantization_config"] = getattr(reloaded, "quantization_config", None)
    differing = sorted(
        key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)
    )
    return Check(
        "configuration",
        not differing,
        f"{differing[0]} is {found.get(differing[0])!r} and should be "
        f"{expected.get(differing[0])!r}"
        if differing
        else "every setting of the architecture as in the live model",
    )


def _describe_architecture(config: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's settings, nested ones too, without those that say how it is stored."""
    return {
        key: _describe_architecture(value, updates) if isinstance(value, Mapping)
        else updates.get(key, value)
        for key, value in config.items()
        if key not in _STORED_OTHERWISE
    }  # fmt: skip


def check_generation_config(model: LoadedModel, folder: Path) -> Check:
    """Whether the folder states the stop tokens of the live model."""
    wanted = set(model.stop_token_ids)
    path = folder / "generation_config.json"
    stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    found = set() if stated is None else set(stated) if isinstance(stated, list) else {stated}
    return Check(
        "stop tokens",
        found == wanted,
        f"generation_config.json stops at {sorted(found)}, the live model at {sorted(wanted)}",
    )


def check_stops(model: LoadedModel, exported: Any) -> Check:
    """Whether generation ends at every stop token of the live model, and only there.

    Each stop token is forced as the first new token; any other token must not.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    class _Force(LogitsProcessor):
        def __init__(self, token: int) -> None:
            self.token = token

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -math.inf)
            forced[:, self.token] = 0.0
            return forced

    device = next(p.device for p in exported.parameters())
    prompt = torch.tensor([make_probes(model)[-1][:4]], device=device)
    stops = model.stop_token_ids
    vocabulary = exported.get_input_embeddings().weight.shape[0]
    other = next(i for i in range(vocabulary) if i not in stops)

    def count_generated(token: int) -> int:
        with torch.no_grad():
            output = exported.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=_GENERATED,
                do_sample=False,
                logits_processor=LogitsProcessorList([_Force(token)]),
            )
        return int(output.shape[1] - prompt.shape[1])

    ran_on = [token for token in stops if count_generated(token) != 1]
    stopped_early = count_generated(other) != _GENERATED
    if ran_on:
        detail = f"generation runs past the stop tokens {ran_on}"
    elif stopped_early:
        detail = f"generation stops at token {other}, which is no stop token"
    else:
        detail = f"generation stops at each of {list(stops)} and not elsewhere"
    return Check("generation stops", not ran_on and not stopped_early, detail)


def check_tokenizer(model: LoadedModel, folder: Path) -> Check:
    """Whether the tokenizer in the folder encodes, ends and formats chats like the live one."""
    try:
        # As its file says, which is what the live one does: transformers alone may read the same
        # file in another way, as it reads the base's.
        reloaded = load_tokenizer(folder, trust_remote_code=model.config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, QloraKitError) as error:
        return Check("tokenizer", False, f"it cannot be loaded: {error}")
    live = model.tokenizer
    differing_text = find_differing_text(reloaded, live)
    differing = [
        label
        for label, same in (
            ("the end token", reloaded.eos_token_id == live.eos_token_id),
            ("the padding token", reloaded.pad_token_id == live.pad_token_id),
            ("the chat template", reloaded.chat_template == live.chat_template),
            ("token ids", differing_text is None),
        )
        if not same
    ]
    return Check(
        "tokenizer",
        not differing,
        f"{' and '.join(differing)} differ from the live tokenizer"
        + (f", for example of {differing_text!r}" if differing_text is not None else "")
        if differing
        else "same ids, end token, padding token and chat template as the live one",
    )
