"""``hub`` against a hub on this machine, through the real client and real connections."""

import hashlib
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hub_endpoint import GOOD_TOKEN, READ_TOKEN, HubEndpoint
from qlora_kit import AlpacaFormatter, export_model, load_quantized, train_sft
from qlora_kit.errors import (
    ConfigError,
    ExportError,
    OfflineError,
    UnknownOptionError,
    UnsupportedModelError,
    VerificationError,
)
from qlora_kit.exporters.hub import session as hub_session
from qlora_kit.exporters.hub.exporter import Hub


@pytest.fixture
def hub(monkeypatch):
    """The endpoint, and the client told to go online and to use the protocol it speaks."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The other one, Xet, needs a storage server of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_session, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def push(adapted, hub):
    def call(repo_id="me/model", model=adapted, token=GOOD_TOKEN, **options):
        return export_model(model, "hub", repo_id=repo_id, token=token, endpoint=hub.url, **options)

    return call


def shown(error):
    """Everything a traceback of an exception would show."""
    import traceback

    return "".join(traceback.format_exception(error))


def test_a_repository_is_made_and_everything_arrives_in_one_commit(push, hub, adapted, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    artifact = push(format="merged_16bit", private=True, commit_message="The first")
    repo = hub.repositories["me/model"]
    assert repo.private
    assert [message for _, message, _ in repo.commits] == ["The first"]
    alone = export_model(adapted, "merged_16bit", tmp_path / "alone")
    assert set(repo.files) == {file.name for file in alone.files} | {"README.md"}
    for file in alone.files:
        # The card says how to load it from there.
        if file.name not in ("qlora_kit_manifest.json", "README.md"):
            assert repo.files[file.name] == (tmp_path / "alone" / file.name).read_bytes()
    assert b"library_name: transformers" in repo.files["README.md"]
    assert b"name = 'me/model'" in repo.files["README.md"]
    assert artifact.path is None
    assert artifact.url == f"{hub.url}/me/model"
    assert artifact.facts["commit"] == repo.commits[0][0]
    assert artifact.facts["private"] is True
    assert artifact.facts["format"] == "merged_16bit"
    assert artifact.verification.checks == alone.verification.checks
    assert artifact.facts["kl"] == alone.facts["kl"]
    assert {file.name for file in artifact.files} == {file.name for file in alone.files}
    pushed = json.loads(repo.files["qlora_kit_manifest.json"])
    assert pushed["format"] == "merged_16bit"
    assert pushed["verification"]["passed"] is True
    # What someone else downloads works.
    for name, data in repo.files.items():
        (tmp_path / "down" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "down")
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("format", ["lora", "merged_4bit"])
def test_any_format_can_be_pushed_and_takes_its_own_options(push, hub, format):
    options = {"use_double_quant": False} if format == "merged_4bit" else {}
    artifact = push(format=format, **options)
    assert hub.repositories["me/model"].private
    weights = {"lora": "adapter_model.safetensors", "merged_4bit": "model.safetensors"}[format]
    assert weights in hub.repositories["me/model"].files
    if options:
        assert artifact.facts["format_options"]["use_double_quant"] is False
        assert b"absmax" in hub.repositories["me/model"].files[weights]
        assert b"nested_absmax" not in hub.repositories["me/model"].files[weights]
    with pytest.raises(UnknownOptionError, match=rf"'{format}' has no option 'max_shard_sise'"):
        push(format=format, max_shard_sise="1GB")


@pytest.mark.parametrize(
    "formats", [("hub", "merged_4bit", "merged_16bit"), ("merged_16bit", "hub", "merged_4bit")]
)
def test_with_other_formats_the_model_is_merged_once(hub, adapted, merges, formats, tmp_path):
    options = {"repo_id": "me/model", "token": GOOD_TOKEN, "endpoint": hub.url}
    given = {name: {"base": "original", **(options if name == "hub" else {})} for name in formats}
    results = export_model(adapted, given, tmp_path / "out", verify=False)
    assert list(results) == list(formats)
    assert not results.failures
    # Not even the format after the upload, whose own copy is gone by then, merges again.
    assert set(merges.values()) == {1}
    weights = (tmp_path / "out" / "merged_16bit" / "model.safetensors").read_bytes()
    assert hub.repositories["me/model"].files["model.safetensors"] == weights


def test_shards_come_with_their_index_and_replace_another_sharding(
    push, hub, make_adapted, tmp_path
):
    from checkpoints import make_checkpoint

    base = make_checkpoint(tmp_path / "base", "llama", hidden_size=256, intermediate_size=1024)
    model = make_adapted(base, load_in_4bit=False)
    repo = hub.add("me/model", files={"notes.md": b"mine", "other.safetensors": b"mine too"})
    push(model=model, max_shard_size="1MB")
    index = json.loads(repo.files["model.safetensors.index.json"])
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    assert shards <= set(repo.files)
    push(model=model)
    assert "model.safetensors" in repo.files
    # A loader would have preferred or mixed them.
    assert not shards & set(repo.files)
    assert "model.safetensors.index.json" not in repo.files
    assert repo.files["notes.md"] == b"mine"
    assert repo.files["other.safetensors"] == b"mine too"
    push(model=model, max_shard_size="1MB")
    assert "model.safetensors" not in repo.files
    assert len(repo.commits) == 3


def test_an_existing_repository_keeps_its_card_and_its_visibility(push, hub):
    repo = hub.add("me/model", private=False, files={"README.md": b"# Mine"})
    artifact = push(format="lora")
    assert repo.files["README.md"] == b"# Mine"
    assert artifact.facts["kept_card"] is True
    assert artifact.facts["private"] is False
    artifact = push(format="lora", replace_card=True)
    assert b"# LoRA adapter" in repo.files["README.md"]
    assert artifact.facts["kept_card"] is False


@pytest.mark.parametrize("format", ["lora", "merged_16bit"])
def test_no_local_path_is_pushed_and_nobody_else_reads_along(
    push, hub, format, alpaca_rows, make_adapted, tiny_llama, tmp_path, monkeypatch
):
    model = make_adapted()
    formatter = AlpacaFormatter(model.tokenizer)
    run = tmp_path / "run"
    train_sft(
        model, formatter.load(alpaca_rows), output_dir=run, max_steps=1, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    modes = set()

    def look(what, done, total):
        folders = [path for path in tmp_path.glob("*qlora_kit-*") if path.is_dir()]
        modes.update(path.stat().st_mode & 0o777 for path in folders)

    artifact = push(model=model, format=format, progress=look)
    assert modes == {0o700}
    files = hub.repositories["me/model"].files
    for name, data in files.items():
        for path in (tiny_llama, run, tmp_path):
            assert str(path).encode() not in data, name
    manifest = json.loads(files["qlora_kit_manifest.json"])
    assert manifest["base"]["path"] == tiny_llama.name
    for entry in manifest["files"]:
        assert entry["sha256"] == hashlib.sha256(files[entry["name"]]).hexdigest()
    assert {file.name for file in artifact.files} <= set(files) | {"README.md"}


def test_weights_meant_to_be_private_do_not_go_to_a_public_repository(push, hub, monkeypatch):
    from qlora_kit.exporters.merged_16bit import Merged16bit

    repo = hub.add("me/model", private=False)
    with pytest.raises(ExportError, match=r"is public, and private=True.*nothing was pushed"):
        push(private=True)
    assert repo.files == {}
    assert not repo.commits
    # Told before any work.
    with monkeypatch.context() as patch:
        patch.setattr(Merged16bit, "write", None)
        with pytest.raises(ExportError, match="is public"):
            push(private=True)
    push("me/open", private=False, format="lora")
    assert not hub.repositories["me/open"].private


def test_a_pull_request_leaves_the_main_branch_alone(push, hub):
    repo = hub.add("me/model", files={"README.md": b"# Mine"})
    artifact = push(format="lora", create_pr=True)
    assert set(repo.files) == {"README.md"}
    assert "adapter_model.safetensors" in repo.pull_requests["refs/pr/1"]
    assert artifact.url == f"{hub.url}/me/model/discussions/1"


def test_a_name_without_an_owner_is_ones_own(push, hub):
    artifact = push("model", format="lora")
    assert list(hub.repositories) == ["me/model"]
    assert artifact.facts["repo_id"] == "me/model"


@pytest.mark.parametrize("where", ["/lfs/", "/preupload/", "/commit/", "/create", "/whoami"])
def test_a_dropped_connection_is_tried_again(push, hub, where, monkeypatch):
    from huggingface_hub.utils import _http

    # The client waits a second before its own attempts.
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.drop = {where: 1}
    push(format="lora")
    assert hub.drop == {where: 0}
    repo = hub.repositories["me/model"]
    assert len(repo.commits) == 1
    assert "adapter_model.safetensors" in repo.files


def test_a_connection_that_stays_lost_is_one_clear_error_and_a_second_run_goes_on(
    push, hub, monkeypatch
):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.drop = {"/commit/": 1000}
    with pytest.raises(
        ExportError, match=r"(?s)Pushing to me/model failed.*no part of it"
    ) as caught:
        push(format="lora")
    assert "Run the same call again" in str(caught.value)
    assert GOOD_TOKEN not in shown(caught.value)
    repo = hub.repositories["me/model"]
    assert repo.files == {}
    sent = list(hub.uploads)
    hub.drop = {}
    push(format="lora")
    assert "adapter_model.safetensors" in repo.files
    # The weights had arrived and are not sent twice.
    assert hub.uploads == sent


def test_a_hub_that_is_not_there(adapted, monkeypatch, hub):
    hub.__exit__()
    with pytest.raises(ExportError, match=r"Asking http://127.0.0.1:.* about the token failed"):
        export_model(adapted, "hub", repo_id="me/x", token=GOOD_TOKEN, endpoint=hub.url)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_NobodyKnowsThisToken000", r"does not accept the token \(401\).*settings/tokens"),
        (READ_TOKEN, r"The token may only read\. Make one with write access"),
        ("hf_Token With Spaces99999", "spaces or characters that no token has"),
        ("hf_Tokén999999999999", "spaces or characters that no token has"),
        ("hf_TwoLines\nBroken999", "spaces or characters that no token has"),
    ],
)
def test_a_wrong_token_is_told_before_any_work_and_never_shown(push, hub, token, message, caplog):
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises((ExportError, ConfigError), match=message) as e,
    ):
        push(token=token)
    assert not hub.repositories
    assert token not in shown(e.value)
    assert token.split()[-1] not in shown(e.value)
    assert token not in caplog.text


def test_a_namespace_of_someone_else(push):
    with pytest.raises(ExportError, match=r"may not write there \(403\).*repo_id"):
        push("them/model", format="lora")


def test_the_token_appears_nowhere(adapted, hub, caplog, capfd, tmp_path, monkeypatch):
    """Logs at every level, manifests, results, requests, files, and a server that echoes it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with caplog.at_level(logging.DEBUG):
        artifact = export_model(
            adapted, "hub", repo_id="me/model", format="lora", token=f" {GOOD_TOKEN}\n",
            endpoint=hub.url,
        )  # fmt: skip
        hub.fail = {"/commit/": (400, "you sent {sent}")}
        hub.repositories.clear()
        with pytest.raises(ExportError) as caught:
            export_model(
                adapted, "hub", repo_id="me/model", format="lora", token=GOOD_TOKEN,
                endpoint=hub.url,
            )  # fmt: skip
    assert "you sent Bearer (token)" in str(caught.value)
    for text in (
        repr(artifact),
        str(artifact.facts),
        json.dumps(artifact.manifest),
        caplog.text,
        *capfd.readouterr(),
        shown(caught.value),
        repr(caught.value),
        *(data.decode(errors="replace") for repo in hub.repositories.values()
          for data in repo.files.values()),
    ):  # fmt: skip
        assert GOOD_TOKEN not in text
    assert artifact.manifest["options"]["repo_id"] == "me/model"
    assert "token" not in artifact.manifest["options"]
    left = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert not [path for path in left if GOOD_TOKEN.encode() in path.read_bytes()]
    with pytest.raises(ConfigError, match="token must be str or None, got a bytes") as caught:
        export_model(adapted, "hub", repo_id="me/model", token=GOOD_TOKEN.encode())
    assert GOOD_TOKEN not in shown(caught.value)


def test_what_a_killed_push_left_is_removed_by_the_next_one(push, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / ".export.qlora_kit-0a1b2c3d.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"a whole model")
    seen = []
    write = Hub.write

    def watch(self, request, folder):
        seen.append((folder.parent, stat.S_IMODE(folder.stat().st_mode), left.exists()))
        return write(self, request, folder)

    monkeypatch.setattr(Hub, "write", watch)
    push(format="lora")
    # Nobody else on the machine may read a private model.
    assert seen == [(tmp_path, 0o700, False)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "endpoint",
    ["http://me:Geheim77@hub.local", "https://hub.local/?token=Geheim77", "me:Geheim77@hub.local"],
)
def test_credentials_in_an_endpoint_are_refused_and_not_shown(adapted, hub, endpoint, caplog):
    with pytest.raises(ConfigError, match="endpoint") as caught, caplog.at_level(logging.DEBUG):
        export_model(adapted, "hub", repo_id="me/x", token=GOOD_TOKEN, endpoint=endpoint)
    assert "Geheim77" not in shown(caught.value) + caplog.text


def test_what_fails_its_verification_is_not_pushed(push, hub, monkeypatch):
    from qlora_kit.exporters.lora import Lora

    write = Lora.write

    def write_broken(self, request, folder):
        facts = write(self, request, folder)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        return facts

    monkeypatch.setattr(Lora, "write", write_broken)
    with pytest.raises(VerificationError, match="cannot be read"):
        push(format="lora")
    assert not hub.repositories
    assert push(format="lora", verify=False).verification.level == "none"


def test_a_file_that_does_not_arrive_is_noticed(push, hub):
    hub.add("me/model", ignored=("adapter_config.json",))
    with pytest.raises(ExportError, match=r"1 of \d+ files did not arrive.*adapter_config.json"):
        push(format="lora")


def test_wrong_options_are_told_before_any_connection(adapted, hub, push, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="needs repo_id="):
        export_model(adapted, "hub", token=GOOD_TOKEN)
    with pytest.raises(ConfigError, match="repo_id must be 'name/model', got 'a/b/c'"):
        push("a/b/c")
    with pytest.raises(ConfigError, match=r"named 'merged_16bits'\. Did you mean 'merged_16bit'"):
        push(format="merged_16bits")
    with pytest.raises(ConfigError, match="format 'hub' writes none"):
        push(format="hub")
    with pytest.raises(ConfigError, match="commit_message is empty"):
        push(commit_message="")
    with pytest.raises(UnknownOptionError, match=r"'lora' has no.*of 'hub' .*mean 'private'\?"):
        push(format="lora", pirvate=True)
    with pytest.raises(ConfigError, match=r"endpoint must be an address.*got 'hub\.local'"):
        export_model(adapted, "hub", repo_id="me/x", token=GOOD_TOKEN, endpoint="hub.local")
    with pytest.raises(ConfigError, match="takes no path"):
        export_model(adapted, "hub", tmp_path / "x", repo_id="me/model", token=GOOD_TOKEN)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"no token to push with.*hf auth login"):
        push(token=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match=r"HF_HUB_OFFLINE.*Unset it"):
        push()
    assert hub.requests == []


def test_a_base_without_an_adapter_is_refused_by_the_format(tiny_llama, hub, push):
    base = load_quantized(tiny_llama, 64, engine="native")
    with pytest.raises(UnsupportedModelError, match="attach_lora first"):
        push(model=base, format="lora")
    assert hub.requests == []


def test_as_a_user_would_with_the_environments_settings(tmp_path, tiny_llama):
    """A process of its own: HF_ENDPOINT and HF_TOKEN, and the defaults for the rest."""
    script = """
import sys
from qlora_kit import attach_lora, export_model, load_quantized
model = attach_lora(load_quantized(sys.argv[1], 64, "float32", engine="native"), r=2)
artifact = export_model(model, "hub", repo_id="model")
print(artifact.url, artifact.verification.passed)
"""
    with HubEndpoint() as hub:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE",)
        }
        result = subprocess.run(
            [sys.executable, "-c", script, str(tiny_llama)],
            capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path,
            env={**environment, "HF_ENDPOINT": hub.url, "HF_TOKEN": GOOD_TOKEN,
                 "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.split()[-2:] == [f"{hub.url}/me/model", "True"]
        assert GOOD_TOKEN not in result.stdout + result.stderr
        assert "model.safetensors" in hub.repositories["me/model"].files
