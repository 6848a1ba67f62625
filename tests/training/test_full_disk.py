"""Disks that are really full: small file systems in memory."""

import subprocess

import pytest

from qlora_kit import attach_lora, load_quantized, train_sft
from qlora_kit.errors import ConfigError, TrainingError

ROWS = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(4)]


# Full in the middle of the adapter's file, of the optimizer's, and of the trainer's state.
@pytest.mark.parametrize("size", ["40k", "200k", "300k"])
def test_a_disk_that_fills_up_ends_the_run_with_the_step_to_go_on_from(tiny_llama, make_disk, size):
    disk = make_disk(size)

    def train(**settings):
        model = attach_lora(load_quantized(tiny_llama, 64, "float32", False), r=8)
        return train_sft(
            model, ROWS, output_dir=disk / "run", max_steps=4, save_steps=1, disable_tqdm=True,
            plan={"compile": False}, **settings,
        )  # fmt: skip

    with pytest.raises(TrainingError, match=r"after step \d: the disk of .*run is full") as caught:
        train()
    assert "Free some of it, or save less often." in str(caught.value)
    assert caught.value.__cause__ is not None
    if size == "300k":
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert train(resume_from_checkpoint="auto").steps == 4


@pytest.mark.parametrize("options", ["size=200k", "size=4m,ro"])
def test_a_gguf_base_that_has_no_room_in_the_cache_says_where_else_to_keep_it(
    tiny_llama, make_disk, tmp_path, options
):
    from qlora_kit import export_model

    model = attach_lora(load_quantized(tiny_llama, 64, "float32", False), r=2)
    export_model(model, "gguf", tmp_path / "gguf", quantization="f16", verify=False)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    disk = make_disk("4m")
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)
    with pytest.raises(ConfigError, match=r"cannot be dequantized into the cache .*give cache_dir"):
        load_quantized(file, 64, "float32", False, cache_dir=disk)
    assert [path.name for path in disk.rglob("*") if path.is_file()] == []
