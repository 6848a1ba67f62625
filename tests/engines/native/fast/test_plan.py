"""What users may ask for, and what memory decides."""

import dataclasses

import pytest

from qlora_kit.engines.native.fast.plan import resolve_plan
from qlora_kit.engines.native.fast.plan_options import FastPlan, parse_plan
from qlora_kit.engines.native.fast.step_memory import MemoryModel
from qlora_kit.errors import ConfigError, UnknownOptionError

GIB = 1024**3

#: Qwen3-4B's shapes.
MEMORY = MemoryModel.of_layers(
    layers=36, hidden=2560, queries=4096, keys=1024, intermediate=9728, item_bytes=2,
    vocabulary=151936, has_triton=True, dequantized=7_266_631_680, largest_group=99_614_720,
    copies=234 * 1024**2, scales=227 * 1024**2, trained=33_030_144, state_bytes=2,
)  # fmt: skip


def _resolve(free_gib, step_tokens=16384, longest=2048, usual_tokens=None, **asked):
    return resolve_plan(
        FastPlan(**asked), MEMORY, device_type="cuda", free_bytes=free_gib * GIB,
        step_tokens=step_tokens, longest=longest, is_quantized=True, supports_graphs=True,
        usual_tokens=usual_tokens,
    )  # fmt: skip


def test_plenty_of_memory_takes_the_batch_whole():
    plan = _resolve(130)
    assert plan.micro_batch_tokens == 16384
    assert plan.checkpointing == "none"


def test_less_memory_splits_before_it_recomputes():
    plan = _resolve(34)
    assert plan.micro_batch_tokens == 4096
    assert plan.checkpointing == "none"
    assert plan.predicted_bytes <= plan.usable_bytes


def test_little_memory_recomputes_as_few_layers_as_it_must():
    plan = _resolve(12)
    assert plan.checkpointing == "selective"
    assert plan.predicted_bytes <= plan.usable_bytes
    fewer = dataclasses.replace(plan, checkpointed_layers=plan.checkpointed_layers - 1)
    needed = MEMORY.predict(
        4096, fewer.checkpointed_layers, caches=False, loss_chunk=plan.loss_chunk_tokens
    )
    assert needed > plan.usable_bytes


def test_a_small_step_keeps_dequantized_weights_where_they_fit():
    assert _resolve(130, step_tokens=1500, longest=400).caches_weights
    assert not _resolve(12, step_tokens=1500, longest=400).caches_weights
    assert not _resolve(130).caches_weights


def test_small_steps_use_graphs_and_large_ones_do_not():
    assert _resolve(130, step_tokens=1500, longest=400).uses_cuda_graphs
    assert not _resolve(130).uses_cuda_graphs
    assert not _resolve(130, step_tokens=1500, longest=400, cuda_graphs=False).uses_cuda_graphs


def test_one_long_batch_does_not_decide_for_all():
    plan = _resolve(130, step_tokens=4722, longest=1000, usual_tokens=1600)
    assert plan.micro_batch_tokens == 4722
    assert plan.graph_tokens == 4096
    assert plan.caches_weights
    assert _resolve(130, step_tokens=4722, longest=1000, cuda_graphs=True).graph_tokens == 4722


def test_scarce_memory_takes_smaller_pieces_down_to_one_example():
    plan = _resolve(8, step_tokens=4096, longest=512)
    assert plan.predicted_bytes <= plan.usable_bytes
    assert plan.checkpointing != "none"
    tight = _resolve(2, step_tokens=4096, longest=512)
    assert tight.predicted_bytes <= tight.usable_bytes
    assert tight.micro_batch_tokens < 4096
    assert tight.loss_chunk_tokens == 256
    hopeless = _resolve(1, step_tokens=4096, longest=512)
    assert hopeless.micro_batch_tokens == 512
    assert hopeless.predicted_bytes > hopeless.usable_bytes


def test_a_mask_bounds_the_micro_batch():
    memory = dict(device_type="cuda", free_bytes=130 * GIB, is_quantized=True)
    sizes = dict(step_tokens=16384, longest=2048, supports_graphs=False)
    plan = resolve_plan(FastPlan(), MEMORY, **memory, **sizes, most_tokens=4096)
    assert plan.micro_batch_tokens == 4096
    pinned = FastPlan(micro_batch_tokens=16384)
    plan = resolve_plan(pinned, MEMORY, **memory, **sizes, most_tokens=4096)
    assert plan.micro_batch_tokens == 16384


def test_what_is_pinned_stays():
    plan = _resolve(
        4, checkpointing="none", micro_batch_tokens=9999, weights="cache", loss_chunk_tokens=7
    )
    assert plan.micro_batch_tokens == 9999
    assert plan.checkpointing == "none"
    assert plan.caches_weights
    assert plan.loss_chunk_tokens == 7
    assert _resolve(130, checkpointing="full").checkpointed_layers == 36
    assert _resolve(130, checkpointing="selective", checkpointed_layers=9).checkpointed_layers == 9


def test_what_users_may_type():
    assert parse_plan(None) == parse_plan("auto") == parse_plan(True) == FastPlan()
    assert parse_plan(False).enabled is False
    assert parse_plan({"weights": "cache"}) == FastPlan(weights="cache")


def test_wrong_options_are_named():
    with pytest.raises(UnknownOptionError, match="Did you mean 'weights'"):
        parse_plan({"weight": "cache"})
    with pytest.raises(ConfigError, match="'nf4', 'cache'; got 'int4'"):
        FastPlan(weights="int4")
    with pytest.raises(ConfigError, match="micro_batch_tokens"):
        FastPlan(micro_batch_tokens=0)
    with pytest.raises(ConfigError, match="needs checkpointing='selective'"):
        FastPlan(checkpointed_layers=3)
    with pytest.raises(ConfigError, match="compile"):
        FastPlan(compile=1)
    with pytest.raises(ConfigError, match="plan must be"):
        parse_plan("fastest")


def test_a_plan_reads_as_a_sentence():
    assert "checkpointing selective (9 of 36 layers)" in str(
        _resolve(130, checkpointing="selective", checkpointed_layers=9)
    )


@pytest.mark.parametrize("other", [{"weights": "cache"}, {"cuda_graphs": True}, {"enabled": False}])
def test_shards_leave_nothing_of_the_base_on_a_card(other):
    with pytest.raises(ConfigError, match=f"shard=True and {next(iter(other))}="):
        FastPlan(shard=True, **other)
    with pytest.raises(ConfigError, match="shard must be one of"):
        FastPlan(shard=2)


def test_a_sharded_base_is_neither_cached_nor_captured():
    def resolve(shards):
        return resolve_plan(
            FastPlan(), MEMORY, device_type="cuda", free_bytes=130 * GIB, step_tokens=1024,
            longest=512, is_quantized=True, supports_graphs=True, shards=shards,
        )  # fmt: skip

    whole, sharded = resolve(1), resolve(4)
    assert whole.caches_weights
    assert whole.uses_cuda_graphs
    assert not sharded.caches_weights
    assert not sharded.uses_cuda_graphs
    assert "sharded over 4 ranks" in str(sharded)
