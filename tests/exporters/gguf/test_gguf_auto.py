"""Types that are chosen by what they cost: ``quantization="auto:4.5bpw"``."""

from __future__ import annotations

import pytest

import gguf_tiny as tiny
import qlora_kit
from gguf_llamacpp import Llama, kl_divergence
from qlora_kit.errors import ConfigError, UnsupportedModelError
from qlora_kit.exporters.gguf.calibration.loss import Matrix
from qlora_kit.exporters.gguf.calibration.search import _lower_hull, _spend
from qlora_kit.exporters.gguf.quantization.targets import Target, parse_target
from qlora_kit.exporters.gguf.verification.gguf_file import GgufFile

torch = pytest.importorskip("torch")


def load(folder, case, shape="aligned", **changes):
    config = tiny.make_config(case, shape, **changes)
    base = tiny.save_checkpoint(tiny.make_model(config), tiny.byte_level_tokenizer(), folder / "b")
    model = qlora_kit.load_quantized(base, 64, "float32", load_in_4bit=False, engine="native")
    adapted = qlora_kit.attach_lora(model, r=4, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(5)
    for name, parameter in adapted.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapted


def test_sizes_are_read():
    assert parse_target("auto:4.5bpw") == Target(bits=4.5)
    assert parse_target("AUTO:2.4GB") == Target(size=2_400_000_000)
    assert parse_target("auto:500mb") == Target(size=500_000_000)
    assert parse_target("q4_k_m") is None
    assert Target(bits=4.5).count_bytes(1600) == 900
    for wrong in ("auto", "auto:", "auto:4.5", "auto:0bpw", "auto:-1GB", "auto:xGB"):
        with pytest.raises(ConfigError, match="bits per weight"):
            parse_target(wrong)


def test_bytes_go_where_they_save_most():
    # (bytes, loss, type): the middle one of the first saves less per byte than the last.
    points = [(10, 1.0, "Q2_K"), (11, 0.95, "Q3_K"), (12, 1.2, "Q4_0"), (20, 0.0, "Q8_0")]
    assert _lower_hull(points) == [points[0], points[3]]
    a, b = (Matrix(name, name, (1, 1)) for name in "ab")
    options = {
        a: [(10, 1.0, "Q2_K"), (15, 0.5, "Q4_K"), (30, 0.4, "Q8_0")],
        b: [(10, 9.0, "Q2_K"), (20, 1.0, "Q4_K"), (30, 0.0, "Q8_0")],
    }
    wanted = {20: "Q2_K Q2_K", 30: "Q2_K Q4_K", 35: "Q4_K Q4_K", 45: "Q4_K Q8_0", 60: "Q8_0 Q8_0"}
    for budget, types in wanted.items():
        assert " ".join(_spend(options, budget).values()) == types
    with pytest.raises(ConfigError, match="were asked for"):
        _spend(options, 19)


@pytest.mark.parametrize(
    ("shape", "bits"),
    # Rows that do not divide by 256 leave the types that are quick to encode.
    [("unaligned", 7.2), pytest.param("aligned", 4.6, marks=pytest.mark.slow)],
)
def test_the_loss_that_is_said_is_the_files(shape, bits, tmp_path):
    """The measured model and the file, run in llama.cpp, are as far from the live one."""
    model = load(tmp_path, "llama-tied", shape, num_hidden_layers=1)
    rows = [tiny.TEXT[0], tiny.TEXT[1]]
    done = qlora_kit.export_model(
        model, "gguf", tmp_path / "out", quantization=f"auto:{bits}bpw", imatrix=rows
    )
    assert done.verification.passed
    said = done.facts["measured"][f"auto-{bits}bpw"]
    path = done.path / done.facts["files"][f"auto-{bits}bpw"]
    file = GgufFile(path)
    weights = sum(int(tensor.n_elements) for tensor in file.tensors.values())
    size = sum(int(tensor.n_bytes) for tensor in file.tensors.values())
    assert bits - 0.3 < 8 * size / weights <= bits
    assert said["beside"]["bytes"] <= said["bytes"]
    assert said["kl"] < said["beside"]["kl"], "no better than a plain recipe"
    found = []
    with Llama(path) as llama:
        for text in rows:
            ids = model.tokenizer(text)["input_ids"][:64]
            with torch.no_grad():
                right = model.model(torch.tensor([ids])).logits[0].numpy()
            found.extend(kl_divergence(right, llama.logits(ids)))
    assert sum(found) / len(found) == pytest.approx(said["kl"], rel=0.3)


def test_what_cannot_be_measured_is_refused(tmp_path):
    model = load(tmp_path, "qwen3-moe", num_hidden_layers=1, moe_intermediate_size=256)

    def export(**options):
        qlora_kit.export_model(model, "gguf", tmp_path / "out", **options)

    with pytest.raises(UnsupportedModelError, match="plain matrices"):
        export(quantization="auto:4bpw", imatrix=tiny.TEXT[:1])
    with pytest.raises(ConfigError, match="not trained in this process"):
        export(quantization="auto:4bpw")
    with pytest.raises(ConfigError, match="one or the other"):
        export(quantization="auto:4bpw", tensor_types={"attn_q": "q8_0"})
    assert not (tmp_path / "out").exists()
