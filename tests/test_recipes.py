"""Recipes: what a file says is what runs, and what ran can be run again from a file."""

import json
import shutil
from pathlib import Path

import pytest

from qlora_kit import DataSource, recipe_from_run, run_recipe
from qlora_kit.cli import INTERRUPTED, main
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.pipeline import check_pipeline
from qlora_kit.recipe_text import format_recipe
from qlora_kit.recipes import make_pipeline, merge_recipes, read_recipe, write_recipe

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"

TOML = """
[model]
name = "base"
max_seq_length = 256
[adapter]
r = 8
[data]
train = ["a.jsonl", { path = "b.jsonl", weight = 0.5, columns = { instruction = "q" } }]
eval_fraction = 0.25
[training]
learning_rate = 2e-4
output_dir = "out"
[export]
formats = ["lora", "gguf"]
[export.gguf]
quantization = ["q8_0", "f16"]
"""
YAML = """
model: {name: base, max_seq_length: 256}
adapter: {r: 8}
data:
  train:
    - a.jsonl
    - {path: b.jsonl, weight: 0.5, columns: {instruction: q}}
  eval_fraction: 0.25
training:
  learning_rate: 2e-4
  output_dir: out
export:
  formats: [lora, gguf]
  gguf: {quantization: [q8_0, f16]}
"""


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path, alpaca_rows, monkeypatch):
    """A folder with a recipe, data beside it, and another one to work in."""
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_rows(tmp_path / "a.jsonl", alpaca_rows)
    asked = [{"q": row["instruction"], "output": row["output"]} for row in alpaca_rows[:4]]
    write_rows(tmp_path / "b.jsonl", asked)
    (tmp_path / "r.toml").write_text(TOML, encoding="utf-8")
    (tmp_path / "r.yaml").write_text(YAML, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_a_file_says_all_of_a_pipeline_and_its_paths_are_its_own(folder, suffix):
    asked = make_pipeline(read_recipe(folder / f"r.{suffix}"))
    assert asked.model == str(folder / "base")
    assert asked.loading == {"max_seq_length": 256}
    assert asked.adapter == {"r": 8}
    assert asked.data == [
        DataSource(str(folder / "a.jsonl")),
        DataSource(str(folder / "b.jsonl"), weight=0.5, columns={"instruction": "q"}),
    ]
    assert asked.eval_fraction == 0.25
    assert asked.training == {"learning_rate": 2e-4, "output_dir": str(folder / "out")}
    assert asked.exports == {"lora": {}, "gguf": {"quantization": ["q8_0", "f16"]}}


def test_what_is_written_is_read_back(folder):
    recipe = read_recipe(folder / "r.toml")
    recipe["data"]["template"] = 'quoted "text"\n\twith {instruction}\x07\x7f \\ and 中文'
    recipe["training"] |= {"weight_decay": 0.0, "adam_epsilon": 1e-08, "packing": True}
    written = write_recipe(recipe, folder / "again.toml", note="made by a test")
    assert written.read_text(encoding="utf-8").startswith("# made by a test\n")
    again = read_recipe(written)
    assert again["data"].pop("template") == recipe["data"].pop("template")
    assert again == recipe
    with pytest.raises(ConfigError, match="exists already"):
        write_recipe(recipe, written)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("[modle]\nname = 'x'", "no section 'modle'. Did you mean 'model'"),
        ("r = 8", "no section 'r'. It belongs to [adapter]"),
        ("[adapter]\nlora_alpa = 8", "no 'lora_alpa'. Did you mean 'lora_alpha'"),
        ("[adapter]\nlearning_rate = 1", "It belongs to [training]"),
        ("[model]\ntemplate = 'chat'", "It belongs to [data]"),
        ("[data]\ntrain = 'a.jsonl'\n[model]\nmax_seq_len = 3", "Did you mean 'max_seq_length'"),
        ("[data]\ntrain = 'a.jsonl'", "names no model"),
        ("[model]\nname = 'x'", "names no data"),
        ("model = 'x'\n[data]\ntrain = 'none.jsonl'", "nothing at"),
        ("model = 'x'\n[data]\ntrain = 'c*.jsonl'", "No file matches"),
        ("model = 'x'\n[data]\ntrain = {path = 'a.jsonl', weigth = 2}", "Did you mean 'weight'"),
        ("model = 'x'\n[data]\ntrain = {path = 'a.jsonl', weight = 0}", "weight must be"),
        ("model = 'x'\ndata = 'a.jsonl'\n[training]\nmax_step = 3", "Did you mean 'max_steps'"),
        ("model = 'x'\ndata = 'a.jsonl'\n[export]\nformats = ['loar']", "Did you mean 'lora'"),
        ("model = 'x'\ndata = 'a.jsonl'\n[export]\nformats = ['lora']\n[export.gguf]\nthreads = 2",
         "formats does not name"),
        ("model = 'x'\n[data]\ntrain = 'a.jsonl'\neval_fraction = 2", "between 0 and 1"),
        ("model = 'x'\n[data]\ntrain = {path = 'a.jsonl', weight = 2}\neval_fraction = 0.1",
         "would be trained on"),
        ("model = 'x'\n[data]\ntrain = 'a.jsonl'\ntemplate = 'alpca'", "Did you mean 'alpaca'"),
        ("model = [", "cannot be read"),
        ("model = 3\ndata = 'a.jsonl'", "model_name"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_by_name_before_anything_loads(folder, recipe, said):
    (folder / "w.toml").write_text(recipe, encoding="utf-8")
    with pytest.raises((ConfigError, DataError)) as caught:
        check_pipeline(make_pipeline(read_recipe(folder / "w.toml")))
    assert said in str(caught.value)


def test_yaml_has_no_key_twice_and_no_tags(folder):
    (folder / "w.yaml").write_text("model: x\nmodel: y\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'model' is there twice"):
        read_recipe(folder / "w.yaml")
    (folder / "w.yaml").write_text("model: !!python/name:os.system\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(folder / "w.yaml")
    with pytest.raises(ConfigError, match=r"There is no recipe .*Did you mean '.*r.toml"):
        read_recipe(folder / "rr.toml")


def test_flags_and_settings_go_over_a_file(folder, monkeypatch, capsys):
    found = []

    def stop(pipeline, **others):
        found.append(pipeline)
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_kit.pipeline.run_pipeline", stop)
    status = main(
        ["train", str(folder / "r.toml"), "--r", "4", "--set", "data.eval_fraction=0.5",
         "--set", "export.gguf.quantization=q8_0", "--max-steps", "3", "--set", "adapter.bias=all",
         "--output", "here"]
    )  # fmt: skip
    assert status == INTERRUPTED, capsys.readouterr().err
    asked = found[0].asked
    assert asked.adapter == {"r": 4, "bias": "all"}
    assert asked.eval_fraction == 0.5
    assert asked.training == {"learning_rate": 2e-4, "output_dir": "here", "max_steps": 3}
    assert asked.exports["gguf"] == {"quantization": "q8_0"}
    assert main(["train", str(folder / "r.toml"), "--set", "datta.split=x"]) == 1
    assert "Did you mean 'data'" in capsys.readouterr().err
    assert main(["train", "M"]) == 1
    assert "or a recipe's .toml" in capsys.readouterr().err


def test_weights_columns_and_patterns_decide_which_rows_there_are(folder):
    checked = check_pipeline(make_pipeline({
        "model": "x",
        "data": {"train": [
            {"path": str(folder / "a.jsonl"), "weight": 1.5},
            {"path": str(folder / "b.jsonl"), "weight": 2, "columns": {"instruction": "q"}},
        ]},
        "export": {"formats": []},
    }))  # fmt: skip
    asked = [row.value["instruction"] for row in checked.rows.rows]
    assert len(asked) == 12 + 6 + 8
    counts = {text: asked.count(text) for text in asked}
    assert sorted(counts.values()) == [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2 or len(counts) == 12
    assert str(checked.rows.rows[-1].location).startswith(str(folder / "b.jsonl"))
    from qlora_kit.data import read_source

    one = read_source(str(folder / "a.json*")).rows
    assert [row.value for row in one] == [row.value for row in read_source(folder / "a.jsonl").rows]
    several = read_source([folder / "a.jsonl", folder / "b.jsonl"])
    assert len(several.rows) == 16
    assert [one.path for one in several.origin.sources] == [
        str(folder / "a.jsonl"), str(folder / "b.jsonl"),
    ]  # fmt: skip


# -- runs ----------------------------------------------------------------------------------------


def tensors_of(folder):
    return (folder / "lora" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def recipe(folder, tiny_llama):
    shutil.rmtree(folder / "base")
    (folder / "base").symlink_to(tiny_llama)
    given = read_recipe(folder / "r.toml")
    quick = {"max_steps": 3, "plan": False, "disable_tqdm": True, "warmup_steps": 0}
    over = {
        "model": {"dtype": "float32"}, "training": quick,
        "adapter": {"lora_dropout": 0.1, "random_state": 5},
        "data": {"response_only": True},
    }  # fmt: skip
    merged = merge_recipes(given, over)
    merged["export"] = {"formats": ["lora"]}
    return merged


def test_a_run_s_recipe_gives_the_same_adapter_bit_for_bit(folder, recipe, capsys):
    first = run_recipe(recipe)
    first.exports.raise_for_failures()
    assert len(first.training.eval_losses) > 0
    assert main(["recipe", "--from-run", str(folder / "out"), str(folder / "past.toml")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "past.toml")
    again = run_recipe(folder / "past.toml")
    assert again.training.losses == first.training.losses
    assert again.training.eval_losses == first.training.eval_losses
    assert again.training.output_dir == folder / "out-again"
    assert tensors_of(folder / "out-again") == tensors_of(folder / "out")


def test_a_run_of_single_calls_has_a_recipe_too(folder, tiny_llama, caplog):
    from qlora_kit import AlpacaFormatter, attach_lora, export_model, load_quantized, train_sft

    model = attach_lora(load_quantized(tiny_llama, 128, "float32"), r=4, use_rslora=True)
    template = "Q: {instruction} {input}\nA: {output}"
    formatter = AlpacaFormatter(model.tokenizer, template, response_only=True)
    rows, held_out = formatter.load(folder / "a.jsonl").split(0.25, seed=9)
    quick = {"max_steps": 2, "plan": False, "disable_tqdm": True, "warmup_steps": 0}
    train_sft(model, rows, output_dir=folder / "run", eval_dataset=held_out, **quick)
    export_model(model, "lora", folder / "run" / "lora")
    recipe = recipe_from_run(folder / "run")
    assert recipe["adapter"] == {"r": 4, "use_rslora": True}
    assert recipe["data"]["eval_fraction"] == 0.25
    assert recipe["data"]["formatter"]["kind"] == "alpaca"
    write_recipe(recipe, folder / "past.toml")
    run_recipe(folder / "past.toml")
    assert tensors_of(folder / "run-again") == tensors_of(folder / "run")
    # What no file can say is said.
    train_sft(model, [{"instruction": "a", "output": "b"}] * 4, output_dir=folder / "two", **quick)
    with pytest.raises(ConfigError, match="the rows, which were in memory"):
        recipe_from_run(folder / "two")
    with pytest.raises(ConfigError, match=r"holds no qlora_kit_manifest\.json of a run"):
        recipe_from_run(folder / "nothing")
    with pytest.raises(ConfigError, match="kind 'artifact'"):
        recipe_from_run(folder / "run" / "lora")


# -- the recipes that come along -----------------------------------------------------------------


def test_every_recipe_that_comes_along_asks_for_what_there_is():
    names = sorted(path.name for path in RECIPES.iterdir() if path.suffix in (".toml", ".yaml"))
    assert names == ["alpaca_zh.yaml", "chat.toml", "classic.toml", "cpu.toml", "long_rows.toml",
                     "small_gpu.yaml"]  # fmt: skip
    for name in names:
        recipe = merge_recipes(read_recipe(RECIPES / name), {"export": {"path": "/tmp/nothing"}})
        assert check_pipeline(make_pipeline(recipe)).rows.rows
        assert format_recipe(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["alpaca_zh.yaml", "chat.toml", "classic.toml", "cpu.toml", "long_rows.toml", "small_gpu.yaml"],
)
def test_every_recipe_that_comes_along_trains(name, tiny_qwen3, tmp_path):
    settings = {
        "model": {"name": str(tiny_qwen3)},
        "training": {"max_steps": 2, "output_dir": str(tmp_path / "run"), "disable_tqdm": True},
    }
    recipe = merge_recipes(read_recipe(RECIPES / name), {})
    formats = recipe["export"]["formats"]
    if "gguf" in recipe["export"] or "quantization" in recipe["export"]:
        # Rows of 64 weights are no whole block of a k-quant.
        settings["export"] = {"gguf": {"quantization": "q8_0"}}
    result = run_recipe(RECIPES / name, settings=settings)
    result.exports.raise_for_failures()
    assert set(result.exports) == set(formats)
    assert result.training.steps == 2


def test_a_recipe_of_a_saved_adapter_names_the_base_it_was_on(folder, tiny_llama):
    import shutil

    from qlora_kit import attach_lora, export_model, load_quantized
    from qlora_kit.training.recipe_record import _describe_model

    export_model(attach_lora(load_quantized(tiny_llama, 64), r=2), "lora", folder / "adapter")
    other = shutil.copytree(tiny_llama, folder / "other")
    said = _describe_model(load_quantized(folder / "adapter", 64, base=other))
    assert (said["name"], said["base"]) == (str(folder / "adapter"), str(other))
    asked = make_pipeline({"model": said, "data": {"train": "a.jsonl"}})
    assert asked.loading["base"] == str(other)
