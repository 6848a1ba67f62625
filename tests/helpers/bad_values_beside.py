"""Bad values of what surrounds a training: recipes, plans, evaluations, batches, GGUF's options."""

from bad_values import HUGE, INFINITE, NAN

#: Whole recipes; ``{base}`` and ``{rows}`` stand for what there is.
RECIPES = [
    "", "[", "x", "[model]\nname = 5", "[model]\nname = '{base}'", "[nope]\nx = 1", "model = 5",
    "[model]\nname = '{base}'\n[data]\ntrain = 5", "[[model]]\nname = 'x'", "\0", "\xff\xfe",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = 5}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = 'x'}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = -1}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = 0}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = nan}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = inf}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', weight = 1e18}]",
    "[model]\nname = '{base}'\n[data]\ntrain = [{path = '{rows}', nope = 1}]",
    "[model]\nname = '{base}'\n[data]\ntrain = []", "[model]\nname = '{base}'\n[data]\ntrain = ''",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\neval_fraction = 2",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\neval_fraction = 'x'",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\neval_fraction = nan",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\nsplit = 5",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\ndata_seed = 'x'",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[training]\nseed = 'x'",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[training]\nplan = 'x'",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[training]\nplan = {x = 1}",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[adapter]\nr = -1",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[adapter]\nr = 1979-05-27",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[export]\nformats = 5",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[export]\nformats = ['nope']",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[export.gguf]\nquantization = 'nope'",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[export.nope]\nx = 1",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[format]\ntemplate = 5",
    "[model]\nname = '{base}'\n[data]\ntrain = '{rows}'\n[data]\ntrain = 'x'",
    "a = " + "[" * 5000, "x = 9" + "9" * 5000,
]  # fmt: skip
#: The same as YAML, which has ways of its own to be wrong.
YAML_RECIPES = [
    "{", "- 1", "5", "model: {name: 5}", "model: [1]", "? [a]\n: b", "a: &a [*a]",
    "x: !!python/x y",
    "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]",
    "\t", "model:\n  name: 1\n  name: 2", "null", "2001-01-01: x",
]  # fmt: skip
#: Arguments of ``plan_training``.
PLANS = {
    "card": ["nope", 5, "", "GB", "-1GB", "0GB", "1e999GB", "nanGB", [], "x" * 5000, HUGE],
    "row_tokens": [0, -1, "x", 1.5, NAN, HUGE, True, 10**15],
    "ranks": [0, -1, "x", 1.5, True, 10**9],
    "pipeline": [None, 5, {}, [], "nope.toml", "/dev/null", "\0", b"x", object()],
}
#: Arguments of ``evaluate``.
EVALUATE = {
    "rows": [None, 5, [], "", "/nope.json", [{}], [{"a": 1}], object(), "\0", [{"text": "a"}]],
    "metrics": ["x", 5, ["nope"], {"x": 5}, {5: len}, {"x": lambda one: 1.0},
                {"x": lambda one, other: "x"}, None],
    "regex": ["(", 5, "", "(a*)*$", [], b"x"], "answers": ["x", 5, None],
    "max_new_tokens": [0, -1, "x", None, NAN, HUGE], "batch_size": [0, -1, "x", None, 1.5, 10**12],
    "limit": [0, -1, "x", 1.5, HUGE], "formatter": [5, "x", int],
}  # fmt: skip
#: Arguments of ``generate_batch``.
BATCH = {
    "prompts": [None, 5, "one text", {}, {"a": 1}, [5], [None], [""], [[]], [[-1]], b"x", object()],
    "at_once": [0, -1, "x", None, 1.5, HUGE, True, 10**12], "in_order": ["x", 5, None],
    "progress": ["x", 5], "seed": [-1, "x", 2**64, 1.5], "nope": [1], "max_new_tokens": [0, "x"],
    "temperature": [NAN, "x"], "stop": [5], "num_beams": [2],
}  # fmt: skip
#: GGUF's newer options.
GGUF_OPTIONS = {
    "imatrix": ["x", 5, "/nope.gguf", "/dev/null", [], {}, [5], [{}], object(), "nope.imatrix",
                [{"a": 1}], ""],
    "tensor_types": ["x", 5, [], {"(": "q8_0"}, {"x": "nope"}, {5: "q8_0"}, {"x": 5},
                     {"": "q8_0"}, {"(a*)*b": "q8_0"}, {"nothing_like_it": "q8_0"}],
    "output_type": ["nope", 5, "", [], "auto:4bpw"], "embedding_type": ["nope", 5, "", []],
    "split_size": ["x", 0, -1, "", "0G", "1e99G", NAN, INFINITE, HUGE, [], True, 1],
    "quantization": ["auto:", "auto:x", "auto:0bpw", "auto:-1GB", "auto:99bpw", "auto:nanbpw",
                     "auto:1e999GB", ["auto:4bpw", "q8_0", 5]],
    "threads": [0, -1, "x", 1.5, True, 10**9], "name": [5, "", "/", "\0", "a/b", "x" * 5000, ".."],
    "modelfile": ["x", 5, None], "base": ["x", 5, None], "dtype": ["x", 5],
}  # fmt: skip
#: What a run asks its model meanwhile.
SAMPLES = {
    "sample_prompts": [5, [5], [""], "", [None], b"x", {"a": 1}, ["x" * 10**6], "\0"],
    "sample_steps": [0, -1, "x", 1.5, NAN, HUGE, True, 1],
    "compute_metrics": ["x", 5, len],
}
#: Whole command lines of the newer commands.
COMMANDS = [
    "train MODEL ROWS --output OUT --nproc 0", "train MODEL ROWS --output OUT --nproc -1",
    "train MODEL ROWS --output OUT --nproc x", "train MODEL ROWS --output OUT --nproc 1000000",
    "train MODEL ROWS --output OUT --nproc 1.5", "train MODEL ROWS --output OUT --nproc HUGE",
    "train MODEL ROWS --output OUT --template nope", "plan MODEL --card nope", "plan MODEL",
    "plan /dev/null", "plan MODEL --row-tokens HUGE", "plan MODEL --card 0GB", "plan ''",
    "evaluate MODEL ROWS --metrics nope", "evaluate MODEL /dev/null",
    "evaluate MODEL ROWS --regex (",
    "evaluate MODEL ROWS --limit -1", "generate MODEL --input /dev/null --output OUT/a.jsonl",
    "generate MODEL --input ROWS --output /proc/x", "generate MODEL --input ROWS --output ''",
    "generate MODEL --input ROWS --output OUT", "generate MODEL --input ~nouser/x --output OUT/a",
    "recipe /dev/null", "recipe OUT", "recipe ''", "doctor --nope", "chat /dev/null",
    "export MODEL gguf OUT/x --set imatrix=DEEP", "export MODEL gguf OUT/x --set tensor_types=5",
    "report OUT", "report /dev/null",
]  # fmt: skip
