"""The command line before a model is loaded, and its errors in flags instead of Python."""

import ast
import dataclasses
import functools
import inspect
import json
import logging
import re
import subprocess
from pathlib import Path

import pytest

from qlora_kit import attach_lora, load_quantized
from qlora_kit.cli import INTERRUPTED, main
from qlora_kit.cli.flags import CALLS, SETTERS, SWITCHES, VALUED, FlagFormatter, FlagWriter
from qlora_kit.cli.parser import list_commands, make_parser
from qlora_kit.cli.values import read_columns, read_settings, split_names
from qlora_kit.errors import ConfigError
from qlora_kit.messages import UNSET, Call, Setting


@pytest.fixture
def folder(tmp_path, alpaca_rows, monkeypatch):
    """A working folder with data in it, and no way to load a model."""
    (tmp_path / "rows.json").write_text(json.dumps(alpaca_rows), encoding="utf-8")
    (tmp_path / "questions.json").write_text('[{"q": "a", "a": "b"}]', encoding="utf-8")
    (tmp_path / "broken.json").write_text('[{"instruction": "a",', encoding="utf-8")
    bad = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, bad)), encoding="utf-8")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}', encoding="utf-8")
    talks = [[{"role": "assistant", "content": "a"}], []]
    chat = "\n".join(json.dumps({"messages": talk}) for talk in talks)
    (tmp_path / "chat.jsonl").write_text(chat, encoding="utf-8")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_kit.load_quantized", _refuse_to_load)
    monkeypatch.setattr(
        "qlora_kit.pipeline.load_quantized", functools.wraps(load_quantized)(_refuse_to_load)
    )
    return tmp_path


def _refuse_to_load(*args, **kwargs):
    raise AssertionError("the model was loaded before everything was checked")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "M", "none.json"], "There is nothing at none.json"),
        (["train", "M", "rows.json", "--eval-data", "none.json"], "nothing at none.json"),
        (["train", "M", "owner/data"], "or allow that here with --download."),
        (["train", "M", "broken.json"], "line 1"),
        (["train", "M", "bad.jsonl"], "'output' is empty"),
        (["train", "M", "bad.jsonl"], "leave them out with --on-bad-rows skip."),
        (["train", "M", "chat.jsonl"], "line 2 (row 2): 'messages' is empty"),
        (["train", "M", "ids.jsonl", "--eos-token", "x"], "as they are. Leave out --eos-token."),
        (["train", "M", "questions.json"], "example --columns instruction=q."),
        (["train", "M", "rows.json", "--columns", "instruction=nope"], "no row of rows.json"),
        (["train", "M", "rows.json", "--columns", "instruction"], "takes ROLE=COLUMN"),
        (["train", "M", "rows.json", "--columns", "answer=output"], "names a role 'answer'"),
        (["train", "M", "rows.json", "--template", "alpca"], "Did you mean 'alpaca'"),
        (["train", "M", "rows.json", "--template", "chat"], "column 'messages'"),
        (["train", "M", "rows.json", "--eval-data", "questions.json"], "questions.json has a"),
        (["train", "M", "rows.json", "--export", "loar"], "Did you mean 'lora'"),
        (["train", "M", "rows.json", "--export-to", "rows.json"], "is a file"),
        (["train", "M", "rows.json", "--export-option", "dtyp=x"], "has an option 'dtyp'"),
        (
            ["train", "M", "rows.json", "--export", "gguf", "--export-option", "quantization=3"],
            "quantization must be str",
        ),
        (
            ["train", "M", "rows.json", "--export-option", "max_shard_size=huge",
             "--export", "merged_16bit"],
            "max_shard_size is a size such as '5GB'",
        ),
        (["train", "M", "rows.json", "--export", "hub"], "needs --export-option repo_id=..."),
        (["train", "M", "rows.json", "--set", "learning_rat=1"], "Did you mean 'learning_rate'"),
        (["train", "M", "rows.json", "--set", "max_steps=0"], "--max-steps must be at least 1"),
        (["train", "M", "rows.json", "--set", "truncation=x"], "truncation must be"),
        (["train", "M", "rows.json", "--set", "completion_only_loss=true"], "Use --response-only."),
        (["train", "M", "rows.json", "--set", "assistant_only_loss=true"], "Use --template chat,"),
        (["train", "M", "rows.json", "--set", "eval_strategy=steps"], "on: give --eval-data."),
        (["train", "M", "rows.json", "--r", "0"], "rank"),
        (
            ["train", "M", "rows.json", "--export", "", "--output", "rows.json"],
            "--output rows.json: rows.json is a file",
        ),
        (["train", "M", "rows.json", "--resume"], "--resume, but outputs holds no whole"),
        (["export", "M", "lora", "there"], "Give another path, or --overwrite to replace all"),
        (["export", "M", "lora,merged_16bit"], "Several formats need a path"),
        (["export", "M", "lora"], "needs a path: qlora-kit export MODEL lora out."),
        (["export", "M", "merged_16bit", "x", "--set", "dtyp=x"], "Did you mean 'dtype'"),
        (["export", "M", "hub"], "needs --set repo_id=..."),
        (["generate", "M", "Hi", "--template", "alpca"], "Did you mean 'alpaca'"),
        (["generate", "M", "Hi", "--system", "Be brief."], "goes with --template"),
    ],
)  # fmt: skip
def test_what_can_be_wrong_is_said_before_a_model_is_loaded(folder, arguments, said, capsys):
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert said.lower() in error.lower()
    assert not re.search(r"=(True|False|None)\b", error)
    assert sorted(folder.rglob("*")) == before


def test_an_export_in_the_way_is_said_before_a_model_is_loaded(folder, capsys):
    (folder / "outputs" / "lora").mkdir(parents=True)
    (folder / "outputs" / "lora" / "old").touch()
    assert main(["train", "M", "rows.json"]) == 1
    assert "or --overwrite to replace all of it" in capsys.readouterr().err


def test_what_a_format_lacks_here_is_said_before_training(folder, caplog, monkeypatch):
    from qlora_kit.exporters.lora import Lora

    monkeypatch.setattr(Lora, "find_missing", lambda self: ["the frobnicator"], raising=False)
    with pytest.raises(AssertionError, match="the model was loaded"):
        main(["train", "M", "rows.json"])
    assert "lora may not run here: missing: the frobnicator" in caplog.text


# -- flags ---------------------------------------------------------------------------------------


@pytest.fixture
def checked(folder, monkeypatch):
    """Run a training command up to its checked pipeline, and hand that back."""
    found = []

    def stop(pipeline, **others):
        found.append(pipeline.asked)
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_kit.pipeline.run_pipeline", stop)

    def check(*arguments):
        assert main(["train", "M", "rows.json", *arguments]) == INTERRUPTED
        return found.pop()

    return check


def test_every_argument_of_attach_lora_has_a_flag(checked):
    given = {
        "r": 8, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 32, "lora_dropout": 0.1,
        "bias": "all", "use_gradient_checkpointing": "unsloth", "random_state": 7,
        "use_rslora": True, "loftq_config": {"loftq_bits": 4}, "use_dora": True,
        "init_lora_weights": "gaussian", "modules_to_save": ["lm_head", "norm"],
        "layers_to_transform": [0, 1], "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"v_proj": 8},
    }  # fmt: skip
    names = set(inspect.signature(attach_lora).parameters) - {"model", "max_seq_length", "classic"}
    # Which goes with no dropout.
    parameters = ["mlp.experts.down_proj", "gate"]
    assert names == {*given, "target_parameters"}
    found = checked("--target-parameters", ",".join(parameters)).adapter
    assert found == {"target_parameters": parameters}
    arguments = []
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        arguments += [flag] if value is True else [flag, str(value)]
    assert checked(*arguments).adapter == given
    assert checked("--target-modules", "all-linear").adapter == {"target_modules": "all-linear"}
    assert checked("--no-use-rslora").adapter == {"use_rslora": False}


def test_the_classic_script_s_training_names_are_flags(checked):
    asked = checked(
        "--max-steps", "7", "--learning-rate", "1e-3", "--per-device-train-batch-size", "1",
        "--lr-scheduler-type", "cosine", "--run-name", "2024", "--report-to", "none",
        "--packing", "--truncation", "drop", "--set", "adam_beta2=0.9", "--output-dir", "o",
        "--seed", "1", "--plan", "false", "--revision", "main",
    )  # fmt: skip
    expected = {
        "max_steps": 7, "learning_rate": 1e-3, "per_device_train_batch_size": 1,
        "lr_scheduler_type": "cosine", "run_name": "2024", "report_to": "none", "packing": True,
        "truncation": "drop", "adam_beta2": 0.9, "output_dir": "o", "seed": 1, "plan": False,
    }  # fmt: skip
    assert asked.training == expected
    assert asked.loading == {"revision": "main"}
    assert checked("--plan", "auto").training["plan"] == "auto"
    for text in ("compile=false,weights=nf4", '{"compile": false, "weights": "nf4"}'):
        plan = checked("--plan", text).training["plan"]
        assert plan == {"compile": False, "weights": "nf4"}


def test_lists_are_given_by_comma(checked, monkeypatch):
    from transformers.integrations import integration_utils

    for name in ("tensorboard", "wandb"):
        monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    asked = checked("--report-to", "tensorboard,wandb", "--export", "gguf, lora",
                    "--export-option", "quantization=q4_k_m,q8_0")  # fmt: skip
    assert asked.training["report_to"] == ["tensorboard", "wandb"]
    assert asked.exports == ["gguf", "lora"]
    assert asked.export_options == {"quantization": ["q4_k_m", "q8_0"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "M", "D", "--lora-droput", "1"], "no --lora-droput. Did you mean '--lora-drop"),
        (["train", "M", "D", "--max-step=3"], "no --max-step. Did you mean '--max-steps'"),
        (["train", "M", "D", "--adam-beta1", "1"], "give it as --set adam_beta1=VALUE"),
        (["exporters", "--overwrite"], "It is a flag of train, "),
        (["export", "M", "lora", "x", "--quantisation", "q8_0"], "no --quantisation. See --help"),
        (["export", "M", "lora", "x", "y"], "what is y?"),
        (["trian", "M", "D"], "Did you mean 'train'?"),
    ],
)
def test_unknown_flags_are_answered_with_near_ones(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_setting_is_given_once(folder, capsys):
    assert main(["train", "M", "rows.json", "--max-steps", "3", "--set", "max_steps=4"]) == 1
    assert "given twice, by --max-steps and by --set" in capsys.readouterr().err


def test_templates_are_listed(capsys):
    assert main(["templates", "--json"]) == 0
    listed = {entry["name"]: entry["summary"] for entry in json.loads(capsys.readouterr().out)}
    assert {"alpaca", "alpaca-zh", "chat", "prompt-completion", "text"} <= set(listed)
    assert main(["templates"]) == 0
    assert f"chat               {listed['chat']}" in capsys.readouterr().out


def test_a_shell_completes_commands_and_their_flags(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")
    asked = [("train --lora-d", 2, "--lora-dropout"), ("exp", 1, "export exporters")]
    for words, place, answer in asked:
        typed = f"COMP_WORDS=(qlora-kit {words}); COMP_CWORD={place}; _qlora_kit"
        command = f"source {tmp_path}/script; {typed}; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == answer
    assert main(["completion", "fish"]) == 0
    assert "-n '__fish_seen_subcommand_from train' -l lora-dropout" in capsys.readouterr().out


# -- spelling ------------------------------------------------------------------------------------


def list_flags():
    """Every flag of every command."""
    commands = list_commands(make_parser())
    return {flag for sub in commands.values() for flag in sub._option_string_actions}


def test_every_flag_that_errors_name_exists():
    switches = {flag for table in SWITCHES.values() for flag in table.values()}
    setters = {flag for table in SETTERS.values() for flag in table.values()}
    written = " ".join([*VALUED.values(), *switches, *setters, *(w("x") for w in CALLS.values())])
    named = set(re.findall(r"--[\w-]+", written))
    assert named <= list_flags()
    assert {"--export-option", "--template", "--no-4bit"} <= named


@pytest.mark.parametrize(
    ("piece", "python", "flags"),
    [
        (Setting("local_files_only", False, "read_source"), "local_files_only=False", "--download"),
        (Setting("engine", "native", "load_quantized"), "engine='native'", "--engine native"),
        (Setting("load_in_4bit", False, "load_quantized"), "load_in_4bit=False", "--no-4bit"),
        (Setting("on_bad_rows", "skip", "formatter"), "on_bad_rows='skip'", "--on-bad-rows skip"),
        (Setting("columns", {"instruction": "my question"}, "formatter"),
         "columns={'instruction': 'my question'}", "--columns 'instruction=my question'"),
        (Setting("split", ..., "read_source"), "split=...", "--split ..."),
        (Setting("resume_from_checkpoint", "a/checkpoint-3"),
         "resume_from_checkpoint='a/checkpoint-3'", "--resume"),
        (Setting("eos_token", "<|im_end|>", "formatter", "AlpacaFormatter(tokenizer, {})"),
         "AlpacaFormatter(tokenizer, eos_token='<|im_end|>')", "--eos-token '<|im_end|>'"),
        (Setting("gradient_checkpointing", True), "gradient_checkpointing=True",
         "--gradient-checkpointing"),
        (Setting("plan", {"checkpointing": "full"}), "plan={'checkpointing': 'full'}",
         "--plan '{\"checkpointing\": \"full\"}'"),
        (Setting("max_steps"), "max_steps", "--max-steps"),
        (Setting("r", of="attach_lora"), "r", "--r"),
        (Setting("overwrite", False, "export_model"), "overwrite=False",
         "--export-option overwrite=false"),
        (Setting("dtype", "bfloat16", "load_quantized"), "dtype='bfloat16'", "--dtype bfloat16"),
        (Setting("dtype", "bfloat16", "export_model"), "dtype='bfloat16'",
         "--export-option dtype=bfloat16"),
        (Setting("temperature", 1.0, "generate_stream"), "temperature=1.0", "temperature=1.0"),
        (Call("export_model", "export_model(model, 'lora', 'out')", "lora"),
         "export_model(model, 'lora', 'out')", "qlora-kit export MODEL lora out"),
        (Call("elsewhere", "do(this)"), "do(this)", "do(this)"),
    ],
)  # fmt: skip
def test_python_is_said_in_flags(piece, python, flags):
    error = ConfigError("Use ", piece, ".")
    assert str(error) == f"Use {python}."
    assert error.render(FlagWriter("train")) == f"Use {flags}."


def test_text_that_only_looks_like_an_argument_stays_as_it_is():
    error = ConfigError("/runs/overwrite=True/x is a file")
    assert error.render(FlagWriter("train")) == "/runs/overwrite=True/x is a file"


def test_a_command_s_own_setter_takes_what_has_no_flag():
    option = Setting("dtype", "bfloat16", "export_model")
    assert FlagWriter("export")(option) == "--set dtype=bfloat16"
    assert FlagWriter("generate")(option) == "dtype='bfloat16'"


def test_log_records_are_written_in_flags_and_left_as_they_are_for_others():
    inner = ConfigError("it", advice=("Use ", Setting("packing", True), "."))
    setting = Setting("overwrite", True, "export_model")
    record = logging.makeLogRecord({"msg": "%d: %s, %s", "args": (3, setting, inner)})
    said = FlagFormatter(FlagWriter("train")).format(record)
    assert said == "3: --overwrite, it Use --packing."
    assert record.getMessage() == "3: overwrite=True, it Use packing=True."


def test_errors_carry_the_parameter_its_value_and_the_advice(folder):
    from qlora_kit import check_training

    with pytest.raises(ConfigError) as caught:
        check_training(max_steps=0)
    assert (caught.value.parameter, caught.value.value) == ("max_steps", 0)
    with pytest.raises(ConfigError) as caught:
        check_training(truncation_mode="keep_end")
    assert caught.value.advice == "Use truncation='end', 'drop' or 'error'."
    again = caught.value.after("here: ")
    assert (str(again), again.parameter) == (f"here: {caught.value}", "truncation_mode")
    assert ConfigError("no parameter").value is UNSET


#: What makes a setting of a message, and its arguments in order.
_ARGUMENTS = {
    "Setting": ("name", "value", "of", "inside"),
    "invalid_value": ("name", "expected", "value", "of"),
}


def test_every_setting_that_messages_name_exists():
    """An argument that an error advises is one that the function it belongs to has."""
    from transformers import GenerationConfig
    from trl import SFTConfig

    import qlora_kit
    from qlora_kit.data import AlpacaFormatter, ChatFormatter, read_source

    def names(*functions):
        return {name for f in functions for name in inspect.signature(f).parameters}

    options = {o["name"] for e in qlora_kit.describe_exporters()["exporters"] for o in e["options"]}
    known = {
        "load_quantized": names(qlora_kit.load_quantized),
        "attach_lora": names(qlora_kit.attach_lora),
        "formatter": names(AlpacaFormatter, ChatFormatter),
        "read_source": names(read_source),
        "train_sft": names(qlora_kit.train_sft) | {f.name for f in dataclasses.fields(SFTConfig)},
        "generate_stream": names(qlora_kit.generate_stream) | set(vars(GenerationConfig())),
        "export_model": names(qlora_kit.export_model) | options,
        "evaluate": names(qlora_kit.evaluate),
        "plan_training": names(qlora_kit.plan_training),
    }
    found = []
    for path in Path(qlora_kit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            order = _ARGUMENTS.get(getattr(getattr(node, "func", None), "id", ""))
            if order is None:
                continue
            given = {k.arg: k.value for k in node.keywords}
            given |= dict(zip(order, node.args, strict=False))
            owner = given.get("of", ast.Constant("train_sft"))
            # What a loop or a function takes as a name is not known here.
            if isinstance(given["name"], ast.Constant) and isinstance(owner, ast.Constant):
                found.append((path.name, owner.value, given["name"].value))
    assert len(found) > 100
    assert [entry for entry in found if entry[2] not in known[entry[1]]] == []


def test_columns_are_read_by_comma_or_one_by_one():
    assert read_columns(["instruction=q, output=a", "input=x=y"]) == {
        "instruction": "q", "output": "a", "input": "x=y",
    }  # fmt: skip
    assert read_columns([]) is None
    with pytest.raises(ConfigError, match="ROLE=COLUMN"):
        read_columns(["=q"])


def test_the_settings_that_can_be_named_are_those_there_are(folder, capsys):
    """What --set takes is asked of the libraries that define it."""
    assert main(["train", "M", "rows.json", "--set", "truncation_mode=keep_end"]) == 1
    assert "Use --truncation end" in capsys.readouterr().err


def test_commas_alone_name_no_format():
    assert split_names("") == []
    assert split_names("lora, gguf,") == ["lora", "gguf"]
    with pytest.raises(ConfigError, match="',, ' names nothing"):
        split_names(",, ")


def test_settings_that_cannot_be_read_are_named_and_not_echoed():
    for pair in ("=token=Geheim77", "Geheim77", "--Geheim77"):
        with pytest.raises(ConfigError, match=r"--set takes NAME=VALUE, and number 2") as caught:
            read_settings(["max_steps=3", pair])
        assert "Geheim77" not in str(caught.value)
    with pytest.raises(ConfigError, match="--set token: it has an argument of its own") as caught:
        read_settings(["token=Geheim77"], "token")
    assert "Geheim77" not in str(caught.value)
    with pytest.raises(ConfigError, match="--set seed: A number has too many digits"):
        read_settings(["seed=" + "9" * 5000])
    with pytest.raises(ConfigError, match="--set x: JSON is nested too deeply"):
        read_settings(["x=" + "[" * 100_000])


def test_a_token_where_none_is_taken_is_not_echoed(capsys):
    with pytest.raises(SystemExit):
        main(["exporters", "hf_AbcdefGeheim77"])
    said = capsys.readouterr().err
    assert "(token)" in said
    assert "Geheim77" not in said
