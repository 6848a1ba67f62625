"""What the tests of several formats share."""

from collections import Counter

import pytest


@pytest.fixture
def merges(monkeypatch):
    """Names of the tensors that were merged, as often as they were."""
    from qlora_kit.weights import merged

    made: Counter[str] = Counter()
    real = merged.MergedWeights.merge

    def count(self, live):
        made[live.name] += 1
        return real(self, live)

    monkeypatch.setattr(merged.MergedWeights, "merge", count)
    return made
