"""Importance matrices: collected, written, read, refused; and files that they and types guide."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import gguf_tiny as tiny
import qlora_kit
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import ConfigError
from qlora_kit.exporters.gguf.calibration.collection import collect_importance
from qlora_kit.exporters.gguf.calibration.examples import CalibrationExamples, choose_examples
from qlora_kit.exporters.gguf.quantization.importance import (
    Importance,
    ImportanceMatrix,
    read_importance,
    write_importance,
)
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile

torch = pytest.importorskip("torch")

TEXTS = tiny.TEXT[:4]


def load(folder, case, targets, **changes):
    config = tiny.make_config(case, **changes)
    base = tiny.save_checkpoint(tiny.make_model(config), tiny.byte_level_tokenizer(), folder / "b")
    model = qlora_kit.load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    adapted = qlora_kit.attach_lora(model, r=4, target_modules=targets)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapted


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return load(tmp_path_factory.mktemp("dense"), "llama", "all-linear")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    changes = {"moe_intermediate_size": 256}
    return load(tmp_path_factory.mktemp("moe"), "qwen3-moe", ["q_proj"], **changes)


def ids_of(model):
    return [model.tokenizer(text)["input_ids"][:40] for text in TEXTS]


def collect(model):
    examples = CalibrationExamples(ids_of(model), "texts", len(TEXTS))
    return collect_importance(model, examples, lambda *_: None)


def test_the_squares_are_those_of_what_a_matrix_is_multiplied_with(dense):
    matrix = collect(dense)
    plain = dense.model.base_model.model.model
    seen = []
    layer = plain.layers[1].mlp
    handle = layer.register_forward_hook(
        lambda _, inputs, __: seen.append((inputs[0], layer.gate_proj(inputs[0])))
    )
    with torch.no_grad():
        for ids in ids_of(dense):
            dense.model(torch.tensor([ids]))
    handle.remove()
    rows = torch.cat([inputs[0] for inputs, _ in seen])
    entry = matrix.entries["blk.1.ffn_up.weight"]
    assert np.allclose(entry.sums[0], rows.square().sum(0), rtol=1e-4)
    assert entry.counts.tolist() == [rows.shape[0]] == [sum(map(len, ids_of(dense)))]
    gated = torch.cat([torch.nn.functional.silu(gate[0]) for _, gate in seen])
    with torch.no_grad():
        up = torch.cat([layer.up_proj(inputs[0]) for inputs, _ in seen])
    assert np.allclose(
        matrix.entries["blk.1.ffn_down.weight"].sums[0], (gated * up).square().sum(0), rtol=1e-3
    )
    assert len(matrix.entries) == 2 * 7, "every matrix of two blocks, and no table"


def test_every_expert_has_its_own(experts):
    matrix = collect(experts)
    up, down = (matrix.entries[f"blk.0.ffn_{part}_exps.weight"] for part in ("up", "down"))
    tokens = sum(map(len, ids_of(experts)))
    assert up.counts.tolist() == down.counts.tolist()
    assert up.counts.sum() == 2 * tokens, "two experts each"
    whole = matrix.entries["blk.0.attn_q.weight"]
    assert whole.sums.shape == (1, 256)
    assert up.sums.shape == (4, 256)
    # Each token's normed state reaches two of four experts.
    router = matrix.entries.get("blk.0.ffn_gate_inp.weight")
    assert router is None, "a router is never quantized"
    block = experts.model.base_model.model.model.layers[0].mlp
    inner = []
    handle = block.register_forward_pre_hook(lambda _, inputs: inner.append(inputs[0][0]))
    with torch.no_grad():
        for ids in ids_of(experts):
            experts.model(torch.tensor([ids]))
    handle.remove()
    assert np.allclose(up.sums.sum(0), 2 * torch.cat(inner).square().sum(0), rtol=1e-4)
    # The expert's own product, by hand for the first.
    states = torch.cat(inner)
    with torch.no_grad():
        chosen = block.gate(states)[-1]
        rows = states[(chosen == 0).any(-1)]
        gate, up_rows = (rows @ block.experts.gate_up_proj[0].T).chunk(2, -1)
    wanted = (torch.nn.functional.silu(gate) * up_rows).square().sum(0)
    assert np.allclose(down.sums[0], wanted, rtol=1e-3)


def test_files_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(1)
    counts = np.array([3, 0, 5])
    matrix = ImportanceMatrix(
        {
            "blk.0.ffn_up.weight": Importance(rng.random((1, 8), np.float32), np.array([4])),
            "blk.0.ffn_up_exps.weight": Importance(rng.random((3, 8), np.float32), counts),
        },
        ("a.txt", "b.txt"), 6, 512,
    )  # fmt: skip
    path = tmp_path / "m.gguf"
    write_importance(path, matrix)
    read = read_importance(path)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (("a.txt", "b.txt"), 6, 512)
    for name, entry in matrix.entries.items():
        assert np.array_equal(read.entries[name].sums, entry.sums)
        assert np.array_equal(read.entries[name].counts, entry.counts)
    weights = read.weights("blk.0.ffn_up_exps.weight")
    assert np.array_equal(weights[1], np.ones(8)), "no token reached it"
    assert np.array_equal(weights[2], matrix.entries["blk.0.ffn_up_exps.weight"].sums[2] / 5)


def test_the_older_format_is_read(tmp_path):
    sums = np.arange(1, 9, dtype="<f4")
    name = b"blk.0.ffn_up.weight"
    data = struct.pack("<i", 1) + struct.pack("<i", len(name)) + name
    data += struct.pack("<ii", 4, 8) + sums.tobytes()
    path = tmp_path / "m.dat"
    path.write_bytes(data + struct.pack("<ii", 9, 5) + b"a.txt")
    read = read_importance(path)
    assert np.array_equal(read.weights(name.decode())[0], sums / 4)
    assert (read.chunk_count, read.datasets) == (9, ("a.txt",))
    path.write_bytes(data)  # older still
    assert read_importance(path).chunk_count == 0
    for damaged in (data[:-3], b"", b"\xff" * 64, b"GGUF" + b"\0" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="importance matrix"):
            read_importance(path)


def test_files_are_guided_split_and_typed_as_asked(dense, tmp_path):
    done = qlora_kit.export_model(
        dense, "gguf", tmp_path / "out", quantization=["q3_k_m", "q2_k_s"], imatrix=TEXTS,
        tensor_types={r"blk\.1\.ffn_down": "q8_0"}, output_type="q5_k", embedding_type="iq4_nl",
        split_size="0.5M", name="m",
    )  # fmt: skip
    assert done.verification.passed
    assert done.facts["imatrix"]["matrices"] == 14
    first = done.path / done.facts["files"]["q3_k_m"]
    assert first.name == "m.Q3_K_M-00001-of-00002.gguf"
    assert done.facts["parts"] == {"q3_k_m": 2, "q2_k_s": 2}
    file = GgufFile(first, first.with_name("m.Q3_K_M-00002-of-00002.gguf"))
    wanted = {"blk.1.ffn_down": "Q8_0", "output": "Q5_K", "token_embd": "IQ4_NL"}
    assert {name: file.type_of(f"{name}.weight") for name in wanted} == wanted
    assert file.value("quantize.imatrix.entries_count") == 14
    ids = ids_of(dense)[0]
    with torch.no_grad():
        right = dense.model(torch.tensor([ids])).logits[0].numpy()
    with Llama(first) as llama:
        guided = kl_divergence(right, llama.logits(ids)).mean()
    assert guided < 0.15
    # What was collected is taken as a file too, and gives the same bytes.
    again = qlora_kit.export_model(
        dense, "gguf", tmp_path / "again", quantization="q4_k_m", name="m",
        imatrix=done.path / "m.imatrix.gguf",
    )  # fmt: skip
    plain = qlora_kit.export_model(
        dense, "gguf", tmp_path / "plain", quantization="q4_k_m", name="m", imatrix=TEXTS
    )
    files = [GgufFile(one.path / "m.Q4_K_M.gguf") for one in (again, plain)]
    assert all(
        np.array_equal(tensor.data, files[1].tensors[name].data)
        for name, tensor in files[0].tensors.items()
    )


def test_the_training_rows_are_what_true_means(tmp_path):
    model = load(tmp_path, "llama", "all-linear")
    with pytest.raises(ConfigError, match="not trained in this process"):
        qlora_kit.export_model(model, "gguf", tmp_path / "out", quantization="q4_0", imatrix=True)
    rows = [{"prompt": "What?", "completion": text} for text in tiny.TEXT[:4]]
    qlora_kit.train_sft(
        model, rows, output_dir=tmp_path / "run", max_steps=1, packing=True, report_to="none"
    )
    examples = choose_examples(model, True, option="imatrix")
    assert examples.total == 4, "packed rows are taken apart"
    assert examples.token_ids[0][-1] == model.tokenizer.eos_token_id
    given = choose_examples(model, rows, option="imatrix")
    assert sorted(map(tuple, given.token_ids)) == sorted(map(tuple, examples.token_ids))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "iq2_m"}, "imatrix=True"),
        ({"quantization": "iq2_m"}, "q2_k is the nearest"),
        ({"quantization": "q2_k_s"}, "importance matrix"),
        ({"imatrix": TEXTS}, "no effect on q8_0"),
        ({"quantization": "q4_0", "imatrix": "none.gguf"}, "no file"),
        ({"quantization": "q4_0", "imatrix": []}, "imatrix"),
        ({"quantization": "mxfp4"}, "no experts"),
        ({"quantization": "q4_0", "tensor_types": {"ffn_dwn": "q8_0"}}, "ffn_down"),
        ({"quantization": "q4_0", "tensor_types": {"attn_norm": "q8_0"}}, "no name of a matrix"),
        ({"quantization": "q4_0", "tensor_types": {"(": "q8_0"}}, "regular expression"),
        ({"quantization": "q4_0", "tensor_types": {"ffn_up": "q7_0"}}, "no type of ggml"),
        ({"quantization": "q4_0", "tensor_types": {"ffn_up": "iq1_s"}}, "importance matrix"),
        ({"quantization": "q4_0", "embedding_type": "iq2_xs"}, "importance matrix"),
        ({"quantization": "f16", "tensor_types": {"ffn_up": "q8_0"}}, "no effect on f16"),
        ({"quantization": "q4_0", "split_size": "4 apples"}, "split_size"),
        ({"quantization": "q4_0", "split_size": 0}, "split_size"),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_written(options, said, dense, tmp_path):
    with pytest.raises(ConfigError) as caught:
        qlora_kit.export_model(dense, "gguf", tmp_path / "out", **options)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_models_matrix_is_refused(dense, tmp_path):
    def refused(entries, said):
        path = tmp_path / "m.gguf"
        write_importance(path, ImportanceMatrix(entries))
        with pytest.raises(ConfigError, match=said):
            qlora_kit.export_model(
                dense, "gguf", tmp_path / "out", quantization="q4_k_m", imatrix=path
            )

    def entry(*sums):
        return Importance(np.array([sums], np.float32), np.array([1]))

    name = "blk.0.ffn_up.weight"
    refused({"blk.0.wq.weight": entry(1, 2)}, "another model")
    refused({name: entry(1, 2)}, "2 entries there and 256 here")
    refused({name: entry(*[np.nan] * 256)}, "no sums of squares")
