"""Keeping a trainer off the network."""

from __future__ import annotations

__all__ = ["NoTelemetry"]


class NoTelemetry:
    """Mixin for TRL's trainers, which report their use to the hub when they are made.

    ``HF_HUB_DISABLE_TELEMETRY`` would do, but it is read from the environment when
    huggingface_hub is imported, and this library writes no environment.
    """

    def _send_telemetry(self) -> None:
        """Send nothing."""
