"""``torch.compile`` where it works, the plain function where it does not, with the reason said."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import types
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch

__all__ = ["Compiled", "find_compile_obstacle", "find_too_short"]

logger = logging.getLogger(__name__)

#: Operations a second of a core in a step's products, for a rough idea of a run's length.
_CORE_SPEED: Final = 1.5e11
#: Seconds of steps without which compiling on a CPU takes longer than it saves: half a minute of
#: the processor for a fifth of a step (docs/performance.md).
_WORTHWHILE_SECONDS: Final = 240.0


def find_compile_obstacle(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot work here, or ``None``. Nothing is compiled to find out."""
    if device.type == "cpu":
        from torch._inductor import config, cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError, OSError):
            return f"no C++ compiler was found (looked for {config.cpp.cxx})"
        return None
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "triton is not installed or does not support this card"
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            return "triton needs a C compiler, and none was found"
        return None
    return f"it is not used on {device.type}"


def find_too_short(device: torch.device, steps: int, tokens: int, weights: int) -> str | None:
    """Why a run on a CPU is too short for compiling to pay off, or ``None``.

    By the run's shape and not by the clock, so that the same run computes the same numbers again.

    Args:
        device: Where it computes. On CUDA, compiled layers are always worth it.
        steps: Optimizer steps of the whole run.
        tokens: Tokens of a usual step.
        weights: Numbers in the model's matrices.
    """
    if device.type != "cpu":
        return None
    # Frozen weights take part forward and in the gradient of what comes in, two operations each.
    seconds = 4.0 * steps * tokens * weights / (_CORE_SPEED * (os.cpu_count() or 1))
    if seconds >= _WORTHWHILE_SECONDS:
        return None
    return (
        f"{steps} steps of about {tokens:,} tokens are about {max(seconds / 60, 0.1):.1f} minutes, "
        f"and it pays off from {_WORTHWHILE_SECONDS / 60:.0f} on; plan={{'compile': True}} insists"
    )


class Compiled:
    """A function that is compiled on its first call and runs plainly if that fails.

    Args:
        function: Pure, of tensors.
        wanted: ``True``, ``False`` or ``"auto"``.
        device: Where its tensors live.
        what: What it is, for messages.
        otherwise: What runs when it is not compiled; the function itself by default.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        wanted: bool | Literal["auto"],
        device: torch.device,
        what: str,
        otherwise: Callable[..., Any] | None = None,
    ) -> None:
        self._function = function
        self._plain = otherwise or function
        self._what = what
        self._has_own_code = False
        self._compiled: Callable[..., Any] | None = None
        obstacle = None if wanted is not False else "it was turned off"
        obstacle = obstacle or find_compile_obstacle(device)
        if obstacle is None:
            self._compiled = torch.compile(function, fullgraph=True)
        elif wanted is not False:
            logger.info("Running %s without torch.compile: %s.", what, obstacle)

    @property
    def is_compiled(self) -> bool:
        """Whether calls go through ``torch.compile``."""
        return self._compiled is not None

    def run_plainly(self) -> None:
        """Compile nothing from now on."""
        self._compiled = None

    def __call__(self, *arguments: Any, dynamic: Sequence[Any] | None = None) -> Any:
        """Call the function.

        Args:
            *arguments: Its arguments.
            dynamic: Tensors whose first dimension varies between calls; all by default.
        """
        if self._compiled is None:
            return self._plain(*arguments)
        for argument in arguments if dynamic is None else dynamic:
            if isinstance(argument, torch.Tensor) and argument.dim() > 0:
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        try:
            return self._compiled(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            if self._has_own_code:
                return self._give_up(error, arguments)
            # Graphs belong to a function's code, and other models of this process, each with
            # its shapes and dtype, have used up what torch allows it. A copy starts anew.
            self._has_own_code = True
            self._compiled = torch.compile(_copy(self._function), fullgraph=True)
            return self(*arguments, dynamic=dynamic)
        except torch._dynamo.exc.TorchDynamoException as error:
            return self._give_up(error, arguments)

    def _give_up(self, error: Exception, arguments: tuple[Any, ...]) -> Any:
        logger.warning(
            "Running %s without torch.compile, which failed: %s",
            self._what,
            str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        )
        logger.debug("torch.compile failed", exc_info=error)
        self._compiled = None
        return self._plain(*arguments)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own."""
    code = function.__code__
    return types.FunctionType(
        code.replace(co_name=f"{code.co_name}_{next(_copies)}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


_copies = itertools.count(1)
