"""ModelScope's names and mirrors of the hub, against an endpoint on this machine."""

import json
import os
import subprocess
import sys

import pytest

from download_endpoint import DownloadEndpoint
from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized
from qlora_kit.data import read_source
from qlora_kit.errors import DataNotFoundError, ModelNotFoundError, OfflineError
from qlora_kit.pipeline import Pipeline
from qlora_kit.planning import plan_training

MODEL, ROWS = "modelscope:me/tiny-llama", "modelscope:me/rows"


@pytest.fixture
def endpoint(tiny_llama, alpaca_rows, tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    text = "\n".join(map(json.dumps, alpaca_rows))
    (rows / "train.jsonl").write_text(text, encoding="utf-8")
    with DownloadEndpoint({"me/tiny-llama": tiny_llama}, {"me/rows": rows}) as endpoint:
        yield endpoint


def test_modelscope_is_asked_only_where_that_was_allowed(
    endpoint, alpaca_rows, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("modelscope_hub", reason="modelscope-hub is not installed")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    caplog.set_level("INFO")
    with pytest.raises(OfflineError, match="no model 'me/tiny-llama' in ModelScope's local cache"):
        load_quantized(MODEL)
    with pytest.raises(OfflineError, match=r"no data set 'me/rows'.*local_files_only=False"):
        read_source(ROWS)
    assert endpoint.requests == []
    # A plan reads the configuration alone.
    asked = Pipeline(model=MODEL, data=None, loading={"local_files_only": False})
    assert plan_training(asked).model == MODEL
    assert not any(".safetensors" in one for one in endpoint.requests if "FilePath" in one)

    model = load_quantized(MODEL, 64, "float32", local_files_only=False)
    formatter = AlpacaFormatter(model.tokenizer)
    rows = formatter.load(ROWS, local_files_only=False)
    assert len(rows) == len(alpaca_rows)
    assert any(".safetensors" in one for one in endpoint.requests)
    with pytest.raises(ModelNotFoundError, match="'modelscope:me/none' could not be downloaded"):
        load_quantized("modelscope:me/none", local_files_only=False)

    endpoint.requests.clear()
    again = load_quantized(MODEL, 64, "float32")
    assert again.base.name_or_path == MODEL
    assert read_source([ROWS]).columns == ["instruction", "input", "output"]
    assert "taken from ModelScope's cache, nobody was asked" in caplog.text
    # The adapter remembers the name, and plain peft is given the folder.
    made = export_model(attach_lora(again, r=4), "lora", tmp_path / "lora", verify=False)
    assert made.manifest["base"]["name_or_path"] == MODEL
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"].startswith(str(tmp_path / "cache"))
    assert load_quantized(tmp_path / "lora", 64, "float32").adapter.r == 4
    assert endpoint.requests == []


def test_names_of_modelscope_have_an_owner_and_need_its_package(monkeypatch):
    for name in ("modelscope:", "modelscope:tiny", "modelscope:a/b/c", "modelscope:../x"):
        with pytest.raises(ModelNotFoundError, match="write modelscope:owner/name"):
            load_quantized(name)
        with pytest.raises(DataNotFoundError, match="write modelscope:owner/name"):
            read_source(name)
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    monkeypatch.setitem(sys.modules, "modelscope_hub.compat", None)
    with pytest.raises(ImportError, match="pip install modelscope-hub"):
        load_quantized("modelscope:a/b")


@pytest.mark.slow
def test_a_mirror_of_the_hub_is_asked_in_its_place(endpoint, alpaca_rows, tmp_path):
    script = (
        "from qlora_kit import load_quantized\n"
        "from qlora_kit.data import read_source\n"
        "from qlora_kit.errors import OfflineError\n"
        "try:\n    load_quantized('me/tiny-llama')\n"
        "except OfflineError:\n    print('offline')\n"
        "for asks in (True, False):\n"
        "    model = load_quantized('me/tiny-llama', 64, 'float32', local_files_only=not asks)\n"
        "    rows = read_source('me/rows', local_files_only=not asks).rows\n"
        "    print(model.base.name_or_path, len(rows))\n"
        "    print('asked', flush=True)\n"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint.url, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == "offline\n"
        assert endpoint.requests == []
        assert process.stdout.readline() == f"me/tiny-llama {len(alpaca_rows)}\n"
        process.stdout.readline()
        assert any("/me/tiny-llama/resolve/" in one for one in endpoint.requests)
        assert any("train.jsonl" in one for one in endpoint.requests)
        endpoint.requests.clear()
        assert process.stdout.read() == f"me/tiny-llama {len(alpaca_rows)}\nasked\n"
    assert process.returncode == 0
    assert endpoint.requests == []
