"""In a notebook: what results show of themselves, displays that fail, and the example notebook."""

import ast
import json
from pathlib import Path

import pytest
from transformers import ProgressCallback

import qlora_kit
from qlora_kit import AlpacaFormatter, attach_lora, load_quantized, train_sft
from qlora_kit.evaluation import EvaluatedRow, EvaluationResult
from qlora_kit.results import Artifact, ArtifactFile, Check, ExportResults, Verification

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "classic.ipynb"
CELLS = [
    (cell["metadata"].get("tags", []), "".join(cell["source"]))
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]


def test_a_preview_is_text_and_colours_in_a_notebook(adapted):
    formatter = AlpacaFormatter(adapted.tokenizer, response_only=True)
    rows = formatter.load([{"instruction": "a <b> c", "input": "", "output": "d & e", "no": "<i>"}])
    preview = formatter.preview(rows)
    assert "a <b> c" in preview
    html = preview._repr_html_()
    assert "a &lt;b&gt; c" in html
    # Learned: the answer and the end token, which is underlined too.
    assert '<span style="background:rgba(46,160,67,.25)">d &amp; e</span>' in html
    assert 'underline">&lt;|im_end|&gt;</span>' in html
    assert "&lt;i&gt;" in html
    report = formatter.describe(rows)
    assert repr(report) == str(report)
    assert "<td" in report._repr_html_()


def test_results_are_short_as_text_and_tables_in_a_notebook():
    files = tuple(ArtifactFile(f"part-{n}.bin", 3_000_000, "0" * 64) for n in range(40))
    checked = Verification("standard", (Check("logits", passed=True, detail="off by < 0.1"),))
    made = Artifact("lora", Path("/x/<y>"), files, checked, manifest={"long": "x" * 5000})
    assert len(repr(made)) < 200
    html = made._repr_html_()
    assert "/x/&lt;y&gt;" in html
    assert "✓ logits" in html
    assert "off by &lt; 0.1" in html
    assert "and 28 more" in html
    assert "120.0 MB" in html
    both = ExportResults({"lora": made}, {"gguf": ValueError("no <family>")})
    assert "FAILED: ValueError: no &lt;family&gt;" in both._repr_html_()
    answers = tuple(EvaluatedRow("<q>", "e", "a", {"contains": 0.0}) for _ in range(7))
    result = EvaluationResult("m", 1.0, 10, 7, {"contains": 0.0}, answers)
    assert repr(result).startswith("EvaluationResult(m: loss 1.0000")
    assert result._repr_html_().count("&lt;q&gt;") == 5
    assert "and 2 more" in result._repr_html_()


class _Breaks(ProgressCallback):
    """A user's own bar, which fails as transformers' table does where nothing was logged."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Nothing to show yet."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        raise TypeError("unsupported operand type(s) for +: 'NoneType' and 'float'")


@pytest.mark.parametrize("is_table", [False, True])
def test_no_display_ends_a_run_or_takes_its_result(
    tiny_llama, alpaca_rows, tmp_path, caplog, capsys, is_table
):
    class Table(_Breaks):
        pass

    if is_table:
        # IPython's, which transformers chooses in a notebook.
        pytest.importorskip("IPython", reason="IPython is not installed")
        from transformers.utils.notebook import NotebookProgressCallback

        class Table(NotebookProgressCallback):
            on_step_end = _Breaks.on_step_end
            on_train_end = _Breaks.on_train_end

    model = attach_lora(load_quantized(tiny_llama, 64, "float32"), r=4)
    formatter = AlpacaFormatter(model.tokenizer)
    settings = {"output_dir": tmp_path, "plan": False, "disable_tqdm": False, "save_strategy": "no"}
    result = train_sft(model, formatter.load(alpaca_rows), max_steps=3, callbacks=[Table()],
                       **settings)  # fmt: skip
    assert result.steps == 1
    assert "Table failed and is left out from here on" in caplog.text
    assert "unsupported operand" in caplog.text
    assert "training 1/3 steps" in capsys.readouterr().err
    assert "<td" in result._repr_html_()


# -- the example ---------------------------------------------------------------------------------


def test_every_cell_of_the_example_compiles_and_imports_what_is_public():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    assert [tags for tags, _ in CELLS if tags] == [["parameters"]]
    known = set()
    for _, text in CELLS:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "qlora_kit":
                known |= {name.name for name in node.names}
    assert known == {
        "AlpacaFormatter", "attach_lora", "evaluate", "export_model", "generate_stream",
        "load_quantized", "train_sft",
    }  # fmt: skip
    assert known <= set(qlora_kit.__all__)
    # Nothing is installed where the package is.
    assert 'find_spec("qlora_kit") is None' in CELLS[0][1]


@pytest.mark.slow
def test_the_example_runs_in_a_kernel(tiny_llama, field_guide, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    given = {"MODEL": str(tiny_llama), "DATA": str(field_guide), "STEPS": 2, "OFFLINE": True}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type in ("display_data", "execute_result")
    ]
    assert sum("text/html" in data for data in shown) >= 7
    assert any("image/png" in data for data in shown)
    for name in ("lora_model", "merged", "gguf_model", "outputs"):
        assert any((tmp_path / name).iterdir())
