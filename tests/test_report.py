"""A run's report: one file without a network, what the manifests say, nothing of it as code."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from qlora_kit import (
    AlpacaFormatter,
    attach_lora,
    export_model,
    load_quantized,
    train_sft,
    write_report,
)
from qlora_kit.cli import main
from qlora_kit.errors import ConfigError, MissingDependencyError
from qlora_kit.report.charts import Line, draw_bars, draw_lines

STEPS = {"max_steps": 4, "plan": {"compile": False}, "disable_tqdm": True, "warmup_steps": 0}
PROMPTS = ["Say the number 3.", "Say <b>hi</b> & go"]


def train(tiny_llama, rows, folder, **options):
    model = attach_lora(load_quantized(tiny_llama, 128, "float32"), r=4, lora_dropout=0.1)
    formatter = AlpacaFormatter(model.tokenizer, response_only=True)
    result = train_sft(model, formatter.load(rows), output_dir=folder, **STEPS, **options)
    return model, result


@pytest.fixture(scope="module")
def run(tiny_llama, alpaca_rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    model, result = train(tiny_llama, alpaca_rows, folder, sample_prompts=PROMPTS, sample_steps=2,
                          eval_dataset=alpaca_rows[:4])  # fmt: skip
    return folder, model, result


class Reader(HTMLParser):
    """Tags that are open, and addresses that a page would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for name, v in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_the_page_says_what_the_run_was(run):
    folder, _, result = run
    page = read(folder / "report.html")
    text = "".join(page.text)
    assert page.loads == []
    assert "script" not in page.tags
    assert not re.search(r"url\(|@import", text)
    assert page.tags.count("svg") == 5
    assert f"{result.losses[0]:.3f} → {result.losses[-1]:.3f}" in text
    assert "Say <b>hi</b> & go" in text, "what rows and answers hold is text"
    assert "b" not in page.tags
    manifest = json.loads(result.manifest_path.read_text(encoding="utf-8"))
    assert f"planned {manifest['memory']['parts']['total_gib']:.2f}" in text
    marked = [piece for row in manifest["looks"]["rows"] for piece in row if piece["is_trained"]]
    assert "The number is 0." in marked[0]["text"]
    assert sum(manifest["looks"]["lengths"]["counts"]) == 12
    assert 'train = ["' not in text
    assert "the rows, which were in memory" in text


def test_prompts_are_asked_before_during_and_after(run):
    _, _, result = run
    assert [(one.step, one.prompt) for one in result.samples] == [
        (step, prompt) for step in (0, 2, 4) for prompt in PROMPTS
    ]
    assert [moment.step for moment in result.timeline] == [1, 2, 3, 4]
    assert result.timeline[-1].tokens == result.tokens_seen
    assert all(moment.memory_gib > 0 for moment in result.timeline)


def test_asking_changes_nothing_of_what_is_learned(run, tiny_llama, alpaca_rows, tmp_path):
    _, _, result = run
    _, silent = train(tiny_llama, alpaca_rows, tmp_path, eval_dataset=alpaca_rows[:4])
    assert silent.losses == result.losses
    assert silent.samples == ()
    for wrong in ({"sample_prompts": [3]}, {"sample_prompts": "a", "sample_steps": 0},
                  {"sample_steps": 2}):  # fmt: skip
        with pytest.raises(ConfigError, match="sample_"):
            train(tiny_llama, alpaca_rows, tmp_path, **wrong)


def test_exports_are_in_a_page_that_is_written_again(run, capsys, tmp_path):
    folder, model, result = run
    export_model(model, "lora", folder / "lora", overwrite=True)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text = "".join(read(folder / "report.html").text)
    assert "Exports" in text
    assert "✓" in text
    with pytest.raises(ConfigError, match="of a training"):
        write_report(tmp_path)
    assert "report.html" in result._repr_html_()
    assert len(repr(result)) < 300


def test_charts_take_what_runs_leave():
    assert "Nothing" in draw_lines([Line("loss", "one", [])], "loss")
    assert "Nothing" in draw_lines([Line("loss", "one", [(1, float("nan"))])], "loss")
    flat = draw_lines([Line("a<b", "one", [(1, 2.0), (2, 2.0)])], "x", limit=("most", 2.0))
    assert "nan" not in flat
    assert "a&lt;b" in flat
    assert "circle" in draw_lines([Line("one", "one", [(1, 0.0)])], "x")
    assert draw_bars([], 1, "tokens") == draw_bars([0], 1, "tokens")
    assert draw_bars([1, 2], 10, "tokens").count("<rect") == 2


def test_losses_are_drawn_where_matplotlib_is(run):
    _, _, result = run
    try:
        import matplotlib
    except ImportError:
        with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
            result.plot()
        return
    matplotlib.use("Agg")
    lines = result.plot().get_lines()
    assert list(lines[0].get_ydata()) == list(result.losses)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_without_scrolling_sideways(run, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    measured = "<script>document.title=document.documentElement.scrollWidth</script>"
    (tmp_path / "page.html").write_text(page.replace("</html>", measured), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={width},900", "--dump-dom", f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (found,) = re.findall(r"<title>(\d+)</title>", done.stdout)
    assert int(found) <= max(width, 500), "headless windows are at least 500 wide"
