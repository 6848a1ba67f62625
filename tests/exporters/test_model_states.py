"""Models that a user did something to, or took something from, before exporting them."""

import shutil
from pathlib import Path

import pytest

from checkpoints import make_checkpoint, randomize
from qlora_kit import attach_lora, export_model, load_quantized
from qlora_kit.errors import ExportError, ModelNotFoundError, UnsupportedModelError

FORMATS = ["lora", "merged_16bit", "merged_4bit", "gguf", "gguf-lora"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of one's own, whose base was named by a path relative to another folder."""
    make_checkpoint(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    model = randomize(attach_lora(load_quantized("base", 64, engine="native"), r=4))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return model


def change(model, how):
    if how == "merged":
        model.model.merge_adapter()
    elif how == "unloaded":
        model.model.unload()
    elif how == "merged and unloaded":
        model.model.merge_and_unload()
    elif how == "deleted":
        model.model.delete_adapter("default")
    elif how == "switched off":
        model.model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("format", FORMATS)
def test_the_working_directory_may_change_between_loading_and_exporting(model, format, tmp_path):
    assert model.base.path == tmp_path / "base"
    artifact = export_model(model, format, "out")
    assert artifact.verification.passed
    assert artifact.path == tmp_path / "elsewhere" / "out"


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("merged", r"already merged.*unmerge_adapter"),
        ("unloaded", r"taken out of this model.*Load a saved adapter again"),
        ("merged and unloaded", r"taken out of this model.*Load a saved adapter again"),
        ("deleted", r"No adapter of this model is active|must be active to be written"),
        ("switched off", r"switched off.*enable_adapter_layers"),
    ],
)
def test_an_adapter_that_is_not_at_work_is_refused_by_every_format(model, how, message):
    change(model, how)
    for name in FORMATS:
        with pytest.raises(UnsupportedModelError, match=message):
            export_model(model, name, "out")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("verify", [True, False])
def test_training_that_diverged_is_called_that(model, verify):
    import torch

    with torch.no_grad():
        next(p for p in model.model.parameters() if p.requires_grad)[0, 0] = float("nan")
    for name in FORMATS:
        with pytest.raises(ExportError, match=r"q_proj.lora_A.*not finite; training has diverged"):
            export_model(model, name, "out", verify=verify)


def test_a_bias_that_diverged_is_called_that(model):
    import torch

    layer = model.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer
    layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), float("nan")))
    for name in FORMATS:
        with pytest.raises(ExportError, match=r"up_proj.*bias.*not finite; training has diverged"):
            export_model(model, name, "out", verify=False)


def test_an_offloaded_adapter_is_called_that(model):
    import torch

    layer = model.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").lora_B.default
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    for name in FORMATS:
        with pytest.raises(UnsupportedModelError, match=r"up_proj.lora_B.* is offloaded"):
            export_model(model, name, "out")


def test_a_base_that_was_moved_away_is_named(model, tmp_path):
    shutil.move(tmp_path / "base", tmp_path / "moved")
    for name in FORMATS[:-1]:
        with pytest.raises(ModelNotFoundError, match=rf"{tmp_path}/base any more.*Put it back"):
            export_model(model, name, "out")
    assert export_model(model, "gguf-lora", "out").verification.passed


@pytest.mark.parametrize("name", ["lora", "merged_16bit", "gguf-lora"])
def test_an_adapter_that_changes_nothing_is_said(tiny_llama, tmp_path, name, caplog):
    base = load_quantized(tiny_llama, 64, "float32", load_in_4bit=False, engine="native")
    model = attach_lora(base, r=2, modules_to_save=None if name == "gguf-lora" else ["lm_head"])
    said = "the adapter changes nothing"
    idle = export_model(model, name, tmp_path / "idle").verification.checks
    assert [check.passed for check in idle if check.detail.startswith(said)] == [True]
    assert said in caplog.text
    trained = export_model(randomize(model), name, tmp_path / "trained").verification.checks
    assert not [check for check in trained if check.detail.startswith(said)]
