"""The command line: what is printed where, exit statuses, and Ctrl-C in a real process."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from qlora_kit.cli import INTERRUPTED, main

QUICK = ["--set", "disable_tqdm=true", "--max-seq-length", "128", "--dtype", "float32"]


@pytest.fixture(scope="module")
def data(alpaca_rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(alpaca_rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tiny_llama, data, tmp_path_factory):
    """What ``train`` leaves behind; its printed JSON is in ``printed.json``."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(
            ["train", str(tiny_llama), data, "--output", str(folder), "--json", *QUICK,
             "--set", "max_steps=3", "--export", "lora,merged_16bit", "--eval-data", data]
        )  # fmt: skip
    assert status == 0
    (folder / "printed.json").write_text(printed.getvalue(), encoding="utf-8")
    return folder


def test_training_exports_and_prints_json_alone(trained):
    printed = json.loads((trained / "printed.json").read_text(encoding="utf-8"))
    assert printed["training"]["steps"] == len(printed["training"]["losses"]) == 3
    assert printed["training"]["eval_losses"]
    assert [export["format"] for export in printed["exports"]] == ["lora", "merged_16bit"]
    assert printed["failures"] == {}
    assert (trained / "lora" / "adapter_model.safetensors").is_file()
    assert (trained / "merged_16bit" / "model.safetensors").is_file()


def test_generate_answers_with_the_trained_template(trained, capsys):
    arguments = ["generate", str(trained / "lora"), "Say the number 3.", "--max-new-tokens", "5"]
    assert main([*arguments, "--max-seq-length", "128"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\n")
    assert main([*arguments, "--max-seq-length", "128", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == text.removesuffix("\n")
    assert answer["token_count"] == 5
    assert answer["finish_reason"] in ("length", "eos")


def test_generation_settings_are_passed_on(trained, capsys):
    assert main(
        ["generate", str(trained / "lora"), "Say", "--set", "stopp=x", "--max-seq-length", "128"]
    ) == 1  # fmt: skip
    assert "UnknownOptionError" in capsys.readouterr().err


def test_export_writes_another_format_and_never_over_an_old_one(trained, tmp_path, capsys):
    arguments = ["export", str(trained / "lora"), "merged_16bit", str(tmp_path / "m"),
                 "--max-seq-length", "128"]  # fmt: skip
    assert main(arguments) == 0
    assert "checked against the live model" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "DestinationExistsError" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exports"][0]["format"] == "merged_16bit"


def test_an_earlier_export_is_noticed_before_training(trained, tiny_llama, data, capsys):
    before = sorted(path.name for path in trained.iterdir())
    assert main(["train", str(tiny_llama), data, "--output", str(trained), *QUICK]) == 1
    assert "already holds" in capsys.readouterr().err
    assert sorted(path.name for path in trained.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "./no/such/model", "DATA"], "ModelNotFoundError"),
        (["train", "owner/name", "DATA"], "OfflineError"),
        (["train", "MODEL", "./none.json"], "DataNotFoundError"),
        (["train", "MODEL", "DATA", "--export", "loar"], "'lora'"),
        (["train", "MODEL", "DATA", "--set", "learning_rat=1"], "'learning_rate'"),
        (["train", "MODEL", "DATA", "--set", "max_steps"], "NAME=VALUE"),
        (["train", "MODEL", "DATA", "--r", "0"], "rank"),
        (["train", "MODEL", "DATA", "--resume"], "holds no whole checkpoint"),
        (["export", "MODEL", "nope", "out"], "ConfigError"),
        (["export", "MODEL", "lora", "out"], "Train one with qlora-kit train first"),
    ],
)
def test_errors_are_one_explained_line_and_status_1(
    tiny_llama, data, tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": str(tiny_llama), "DATA": data}
    status = main([*(names.get(part, part) for part in arguments), "--max-seq-length", "128"])
    printed = capsys.readouterr()
    assert status == 1
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == [], "nothing is written before everything is checked"


def test_wrong_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "usage: qlora-kit" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "model", "hi", "--no-4bit", "--load-in-8bit"])
    assert stopped.value.code == 2


def test_ctrl_c_saves_states_the_part_done_and_resumes(tiny_llama, data, tmp_path, capsys):
    command = ["train", str(tiny_llama), data, "--output", str(tmp_path), *QUICK]
    log = (tmp_path / "log.txt").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", *command, "--set", "max_steps=20000",
         "--set", "save_steps=5", "--set", "save_total_limit=1"],
        stdout=log, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("checkpoint-*/trainer_state.json")):
            assert process.poll() is None, (tmp_path / "log.txt").read_text(encoding="utf-8")
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == INTERRUPTED
    finally:
        process.kill()
        log.close()
    printed = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "Interrupted: finishing this step and saving a checkpoint." in printed
    assert "interrupted after" in printed
    assert "--resume goes on from" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "lora").exists()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"interrupted after {step} steps" in printed
    manifest = json.loads((tmp_path / "qlora_kit_manifest.json").read_text(encoding="utf-8"))
    assert manifest["result"]["was_interrupted"] is True
    assert len(manifest["result"]["losses"]) == step

    status = main([*command, "--resume", "--json", "--set", f"max_steps={step + 3}"])
    result = json.loads(capsys.readouterr().out)["training"]
    assert status == 0
    assert result["steps"] == step + 3
    assert len(result["losses"]) == 3
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_what_a_command_prints_is_not_logged_beside_it(
    tiny_llama, data, tmp_path, capsys, monkeypatch
):
    output = ["--output", str(tmp_path / "run"), "--max-steps", "1", "--plan", "false"]
    with monkeypatch.context() as context:
        # As in a process of its own: where pytest listens, the command adds no handler.
        context.setattr(logging.getLogger(), "handlers", [])
        assert main(["train", str(tiny_llama), data, *QUICK, *output, "-v"]) == 0
    printed = capsys.readouterr()
    assert "Engine 'native'" in printed.err
    assert (printed.out + printed.err).count("trained 1 steps in") == 1
    assert "Exported lora" not in printed.err
    assert "lora: " in printed.out


def test_a_reader_that_goes_away_is_no_traceback(trained):
    process = subprocess.run(
        [
            "bash",
            "-c",
            f"{sys.executable} -m qlora_kit exporters --json | true; exit ${{PIPESTATUS[0]}}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    # Packages may warn there; what is looked for is what a closed pipe leads to.
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


def test_settings_that_have_an_argument_of_their_own_are_refused():
    from qlora_kit.cli.values import read_settings
    from qlora_kit.errors import ConfigError

    with pytest.raises(ConfigError, match="an argument of its own"):
        read_settings(["output-dir=x"], "output_dir")
    assert read_settings(["max_steps=3"], "output_dir") == {"max_steps": 3}


def test_the_version_is_the_packages(capsys):
    import qlora_kit

    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"qlora-kit {qlora_kit.__version__}\n"


def test_defaults_of_options_are_json_values(capsys):
    assert main(["exporters", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["exporters"]}
    options = {option["name"]: option for option in listed["gguf"]["options"]}
    assert options["quantization"]["default"] == "q8_0"
    assert options["threads"]["default"] is None
    assert not options["threads"]["is_required"]
    (repo_id,) = (option for option in listed["hub"]["options"] if option["name"] == "repo_id")
    assert repo_id["is_required"]
    assert main(["exporters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "                   max_shard_size: int or str = '5GB'" in lines
    assert "                   repo_id: str (must be given)" in lines


def test_verbosity_is_asked_for_before_or_after_the_command():
    from qlora_kit.cli.parser import make_parser

    parser = make_parser()
    for arguments in (["-v", "exporters"], ["exporters", "-v"]):
        assert parser.parse_args(arguments).verbose
    assert not parser.parse_args(["exporters"]).verbose


def test_evaluation_may_have_a_split_of_its_own(alpaca_rows, tmp_path, monkeypatch):
    from qlora_kit import pipeline

    for name, rows in (("train", alpaca_rows), ("validation", alpaca_rows[:3])):
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    folder = str(tmp_path)
    checked = []

    def stop(pipeline, **others):
        checked.append(pipeline)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_pipeline", stop)
    arguments = ["train", "M", folder, "--eval-data", folder, "--eval-split", "validation"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == INTERRUPTED
    (found,) = checked
    assert (len(found.rows.rows), len(found.eval_rows.rows), found.formatter) == (12, 3, None)


def _write_chat(path):
    turns = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]
        for n in range(8)
    ]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns), encoding="utf-8")
    return str(path)


def _train(tiny_llama, data, folder, *arguments):
    status = main(
        ["train", str(tiny_llama), data, "--output", str(folder), *QUICK, "--set", "max_steps=1",
         "--set", "plan=false", *arguments]
    )  # fmt: skip
    assert status == 0
    return json.loads((folder / "qlora_kit_manifest.json").read_text(encoding="utf-8"))["formatter"]


def test_conversations_are_trained_and_asked_as_such(tiny_llama, tmp_path, capsys):
    data = _write_chat(tmp_path / "chat.jsonl")
    spec = _train(tiny_llama, data, tmp_path / "run", "--eval-data", data, "--export",
                  "lora,merged_16bit")  # fmt: skip
    assert (spec["kind"], spec["response_only"]) == ("chat", True)
    capsys.readouterr()
    for name in ("lora", "merged_16bit"):
        from qlora_kit import load_quantized

        model = load_quantized(tmp_path / "run" / name, dtype="float32")
        assert model.record.formatter.prompt("Hi").startswith("<|im_start|>user\nHi")
        assert main(["generate", str(tmp_path / "run" / name), "Hi", "--max-new-tokens", "2"]) == 0
        assert "does not say how it was trained" not in capsys.readouterr().err


def test_templates_columns_and_end_tokens_are_chosen_by_flags(tiny_llama, tmp_path):
    rows = [{"q": f"Say {n}.", "a": f"{n}."} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, {"q": None, "a": "x"}])), encoding="utf-8")
    (tmp_path / "own.txt").write_text("Frage: {instruction}\nAntwort: {output}\n", "utf-8")
    spec = _train(
        tiny_llama, str(data), tmp_path / "run", "--export", "", "--template",
        str(tmp_path / "own.txt"), "--columns", "instruction=q, output=a", "--response-only",
        "--eos-token", "<|endoftext|>", "--on-bad-rows", "skip",
    )  # fmt: skip
    assert spec["prompt_input"] == "Frage: {instruction}\nAntwort: "
    assert spec["eos_token"] == "<|endoftext|>"
    assert spec["response_only"] is True
    manifest = json.loads((tmp_path / "run" / "qlora_kit_manifest.json").read_text("utf-8"))
    assert manifest["data"]["rows"] == 8


def test_export_options_reach_the_formats_that_have_them(tiny_llama, data, tmp_path):
    _train(tiny_llama, data, tmp_path, "--export", "lora,merged_16bit",
           "--export-option", "dtype=float16")  # fmt: skip
    manifest = tmp_path / "merged_16bit" / "qlora_kit_manifest.json"
    assert json.loads(manifest.read_text(encoding="utf-8"))["options"]["dtype"] == "float16"


def test_a_template_named_for_an_answer_goes_before_the_remembered_one(
    trained, tiny_llama, capsys, monkeypatch
):
    import qlora_kit

    prompts = []
    generate = qlora_kit.generate_stream
    monkeypatch.setattr(
        qlora_kit, "generate_stream",
        lambda model, prompt, **rest: prompts.append(prompt) or generate(model, prompt, **rest),
    )  # fmt: skip
    quick = ["--max-new-tokens", "1", "--max-seq-length", "256"]
    for model, arguments in (
        (trained / "lora", []),
        (trained / "lora", ["--template", "text"]),
        (tiny_llama, ["--template", "alpaca", "--system", "Be brief."]),
        (tiny_llama, []),
    ):
        assert main(["generate", str(model), "Hi", *quick, *arguments]) == 0
    assert prompts[0].startswith("Below is an instruction")
    assert prompts[1] == "Hi"
    assert prompts[2].startswith("Be brief.\n\n### Instruction:\nHi")
    assert prompts[3].startswith("<|im_start|>user\nHi<|im_end|>")
    said = capsys.readouterr().err
    assert said.count("does not say how it was trained; asking with --template chat") == 1


def test_a_format_may_have_an_option_called_format(trained, capsys):
    arguments = ["export", str(trained / "lora"), "hub", "--set", "repo_id=me/it"]
    assert main([*arguments, "--set", "format=nothing", "--max-seq-length", "128"]) == 1
    assert "'nothing'" in capsys.readouterr().err


def test_the_doctor_looks_at_the_parts_and_says_what_to_do(capsys, monkeypatch, no_network):
    from importlib import metadata

    from qlora_kit import diagnosis
    from qlora_kit.errors import MissingDependencyError

    older = {**diagnosis.read_tested(), "trl": "0.1.2"}
    assert older["torch"].split(".")[:2] >= ["2", "14"]
    monkeypatch.setattr(diagnosis, "read_tested", lambda: older)
    main(["doctor", "--json"])
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["trl"]["state"] == "note"
    assert found["trl"]["detail"] == f"{metadata.version('trl')}, tested with 0.1.2"
    assert {"python", "torch", "device", "4 bits", "exports", "cache"} <= set(found)
    assert found["4 bits"]["state"] == "ok"
    assert no_network == [], "nothing is asked unless --network is given"

    def refuse(*arguments):
        raise MissingDependencyError("no 4 bits here. Load with load_in_4bit=False.")

    monkeypatch.setattr("qlora_kit.engines.quantization.check_bitsandbytes", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert main(["doctor", "--network"]) == 1
    printed = capsys.readouterr().out
    assert "!!  4 bits        no 4 bits here." in printed
    assert "!!  hub" in printed
    assert "Set HF_ENDPOINT to a mirror" in printed
    assert no_network
