"""A ``.gguf`` file run in llama.cpp, through the ``xllamacpp`` package.

xllamacpp's server object is used in this process; it also listens on a free port of the
loopback interface while it lives.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from qlora_kit.errors import ExportError, MissingDependencyError
from qlora_kit.messages import Setting

__all__ = ["LlamaRun", "check_runner"]

# How many candidates llama.cpp reports first; a rarer token is looked for among all.
_CANDIDATES: Final = 64

# A bias on one token's logit that no other logit comes near.
_CERTAIN: Final = 1e4


def check_runner(verify: bool | Literal["full"] = "full") -> None:
    """Refuse a full verification where llama.cpp cannot run.

    Args:
        verify: The level asked for; others than ``"full"`` run nothing.

    Raises:
        MissingDependencyError: When xllamacpp is not installed.
    """
    if verify == "full" and importlib.util.find_spec("xllamacpp") is None:
        raise MissingDependencyError(
            Setting("verify", "full", "export_model"),
            " runs the file in llama.cpp, from the package xllamacpp: pip install xllamacpp.",
            parameter="verify",
            value="full",
            advice=(Setting("verify", True, "export_model"), " needs nothing more."),
        )


class LlamaRun:
    """A file, loaded for greedy scoring.

    Args:
        path: A ``.gguf`` model.
        plain_token: A token whose text is plain ASCII, see :meth:`next_log_probability`.
        threads: Threads llama.cpp computes with.
        context_length: Longest sequence, in tokens.
        lora: An adapter file to apply.

    Raises:
        ExportError: When llama.cpp does not load it.
        MissingDependencyError: When xllamacpp is not installed.
    """

    def __init__(
        self,
        path: Path,
        plain_token: int,
        *,
        threads: int = 1,
        context_length: int = 512,
        lora: Path | None = None,
    ) -> None:
        check_runner()
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context_length
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
        parameters.n_gpu_layers = 0
        parameters.warmup = False
        parameters.verbosity = 0
        if lora is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"llama.cpp does not load {path}: {error}") from error
        self._path = path
        self._plain_token = plain_token

    def next_log_probability(self, ids: Sequence[int], token: int) -> tuple[int, float]:
        """What llama.cpp would say next, and how likely it finds a given token.

        Args:
            ids: The sequence so far.
            token: The token asked about.

        Returns:
            The most likely token, and the log-probability of ``token``.
        """
        for count in (_CANDIDATES, 1 << 20):
            candidates = self._candidates(ids, count)
            by_id = {entry["id"]: float(entry["logprob"]) for entry in candidates}
            if token in by_id:
                return int(candidates[0]["id"]), by_id[token]
        return int(candidates[0]["id"]), -math.inf

    def complete(self, ids: Sequence[int], count: int) -> str:
        """The greedy continuation, at most ``count`` tokens."""
        answer = self._ask(ids, {"n_predict": count})
        return str(answer["choices"][0]["text"])

    def close(self) -> None:
        """Stop the server and free the model."""
        self._server = None

    def _candidates(self, ids: Sequence[int], count: int) -> list[dict[str, Any]]:
        # The server keeps its candidates to itself when the chosen token is half a character.
        # A bias makes it choose a plain one; the log-probabilities it reports are those before.
        bias = [[self._plain_token, _CERTAIN]]
        answer = self._ask(ids, {"n_predict": 1, "n_probs": count, "logit_bias": bias})
        content: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
        return list(content[0]["top_logprobs"])

    def _ask(self, ids: Sequence[int], more: dict[str, Any]) -> dict[str, Any]:
        request = {"prompt": list(ids), "temperature": 0, "cache_prompt": True, **more}
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "choices" not in answer:
            raise ExportError(f"llama.cpp did not run {self._path}: {answer}")
        return answer
