"""Bad inputs for every boundary, each tried in a fork with a time limit.

    python tests/helpers/bad_inputs.py [--all] [--json]

Says how many were refused by name, raised something raw, hung or were accepted.
"""

import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SECONDS = 25
NAN, HUGE = float("nan"), 10**400

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = ["{{ 1/0 }}", LOOPS, "{{", "{{ messages[99].content }}", "{{ range(10**9) }}",
             "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.nope.nope }}",
             "{{ 'a'.encode().nope() }}"]  # fmt: skip
CONFIG = {
    "hidden_size": [0, -1, "x", [], 1.5], "num_hidden_layers": [10**6, "x", -1],
    "num_attention_heads": [0, "x", 3], "vocab_size": ["x", -1, 10**9], "hidden_act": ["nope", 3],
    "model_type": ["nope", 5, []], "rope_parameters": ["x"], "head_dim": ["x"],
    "torch_dtype": ["nope"], "dtype": ["nope"], "quantization_config": ["x", [1]],
    "eos_token_id": ["x"], "layer_types": [["x"]],
}  # fmt: skip
FILES = {
    "config.json": ["", "[]", "{", "\0\1", "[" * 5000, "{}"],
    "generation_config.json": ["{", "[]", '{"temperature": "x"}', '{"eos_token_id": "x"}'],
    "tokenizer.json": ["", "{", "[]", "{}", '{"model": 5}'],
    "tokenizer_config.json": ["{", "[]", '{"tokenizer_class": 5}', '{"eos_token": 5}',
                              '{"added_tokens_decoder": "x"}'],
    "model.safetensors": ["", "x" * 100, "\xff" * 64],
    "model.safetensors.index.json": ["[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}'],
}  # fmt: skip
ATTACH = {
    "r": [0, -1, 1.5, "x", None, NAN, HUGE], "target_modules": ["", "x", [], [5], 5, None],
    "lora_alpha": [float("inf"), NAN, "x", 0, -1, None, HUGE], "lora_dropout": [-0.1, 1, "x", NAN],
    "bias": [5, "x", []], "use_gradient_checkpointing": ["x", 5], "random_state": [-1, 2**64, "x"],
    "use_rslora": ["x", 1, None], "use_dora": ["x"], "modules_to_save": ["x", [5], 5],
    "init_lora_weights": ["x", 5, None, [], "pissa_niter_99999"],
    "loftq_config": [5, "x", {"loftq_bits": 3}, {"x": 1}],
    "layers_to_transform": [[], "x", [99], -1, 1.5],
    "rank_pattern": ["x", {"q_proj": 0}, {"q_proj": "x"}, {5: 4}],
    "alpha_pattern": [{"q_proj": float("inf")}, "x"],
}  # fmt: skip
LOAD = {
    "max_seq_length": [True, 0, -1, "x", NAN], "dtype": ["x", 5, []], "load_in_4bit": ["x", 1],
    "engine": ["x", 5, []], "is_trainable": ["x"], "token": [5], "revision": [5, ""],
    "cache_dir": ["\0", 5], "trust_remote_code": ["x", 1], "base": [5, "x", "\0", []],
}  # fmt: skip
NAMES = ["/dev/null", "~nouser/x", "\0", "", " ", "a/b/c", "x" * 5000, 5, None, b"x"]
SAMPLING = {
    "max_new_tokens": [0, "x", None, NAN], "temperature": ["x", NAN, 0, HUGE], "top_p": [2, "x"],
    "top_k": [-1, 1.5], "seed": [-1, "x", 2**64], "stop": [5, [""]], "repetition_penalty": [NAN],
    "typical_p": [NAN, "x"], "eos_token_id": ["x", [None]], "bad_words_ids": ["x", [5]],
    "suppress_tokens": ["x"], "forced_eos_token_id": ["x"], "no_repeat_ngram_size": ["x"],
    "prompt": ["x" * 10**6, 5, [], [-1], [{"role": 5}]],
}  # fmt: skip
VALUES = {"x": "x", "-1": -1, "nan": NAN, "list": [[]], "object": object(), "huge": HUGE}


def list_cases(*, every):
    """``(boundary, what, value)``; without ``every`` a fourth of them, and each kind of hang."""
    cases = [("config", name, value) for name, values in CONFIG.items() for value in values]
    cases += [("file", name, text) for name, texts in FILES.items() for text in texts]
    cases += [("tokenizer", "id", 10**9)]
    cases += [("attach", name, value) for name, values in ATTACH.items() for value in values]
    cases += [("load", name, value) for name, values in LOAD.items() for value in values]
    cases += [("load", "model_name", name) for name in NAMES]
    cases += [("generate", name, value) for name, values in SAMPLING.items() for value in values]
    cases += [("template", "chat_template", text) for text in TEMPLATES]
    cases += [("template", "generate_stream", text) for text in TEMPLATES[:3]]
    import dataclasses

    from trl import SFTConfig

    kinds = {field.name for field in dataclasses.fields(SFTConfig)} - {"output_dir", "max_length"}
    cases += [("train", name, value) for name in sorted(kinds) for value in ("object", "huge")]
    cases += [("train", name, value) for name in ("bf16", "seed", "adam_beta1", "torch_compile",
              "warmup_steps", "save_total_limit", "torch_compile_mode", "lr_scheduler_kwargs",
              "max_grad_norm", "report_to", "optim", "loss_type")
              for value in ("x", "-1", "nan", "list")]  # fmt: skip
    if every:
        return cases
    hangs = [case for case in cases if case[2] in (10**6, LOOPS, 10**9, "pissa_niter_99999")]
    return hangs + [case for place, case in enumerate(cases) if place % 4 == 0]


class Laboratory:
    """A tiny model in memory and on disk, made before the forks."""

    def __init__(self, folder):
        from checkpoints import make_checkpoint
        from qlora_kit import attach_lora, load_quantized

        self.folder, self.base = folder, make_checkpoint(folder / "base", "llama")
        self.loaded = load_quantized(self.base, 64, "float32", False, engine="native")
        other = load_quantized(self.base, 64, "float32", False, engine="native")
        self.adapted = attach_lora(other, r=2)

    def try_case(self, boundary, what, value):
        """Do it; whatever is raised is the finding."""
        import shutil

        from qlora_kit import ChatFormatter, attach_lora, generate_stream, load_quantized
        from qlora_kit.training import check_training

        if boundary in ("config", "file", "tokenizer"):
            copy = Path(tempfile.mkdtemp(dir=self.folder)) / "model"
            shutil.copytree(self.base, copy)
            if boundary == "config":
                config = json.loads((copy / "config.json").read_text())
                (copy / "config.json").write_text(json.dumps({**config, what: value}))
            elif boundary == "tokenizer":
                content = json.loads((copy / "tokenizer.json").read_text())
                content["model"]["vocab"]["zzz"] = value
                (copy / "tokenizer.json").write_text(json.dumps(content))
            else:
                (copy / what).write_text(value, encoding="latin-1")
            model = load_quantized(copy, 64, "float32", False, engine="native")
            list(generate_stream(model, "a", max_new_tokens=2))
        elif boundary == "load":
            given = {"model_name": self.base, "load_in_4bit": False, "engine": "native"}
            load_quantized(**{**given, what: value})
        elif boundary == "attach":
            attach_lora(self.loaded, **{what: value})
        elif boundary == "generate":
            given = {"prompt": "a", "max_new_tokens": 2, what: value}
            list(generate_stream(self.adapted, given.pop("prompt"), **given))
        elif what == "generate_stream":
            self.adapted.tokenizer.chat_template = value
            list(generate_stream(self.adapted, [{"role": "user", "content": "a"}]))
        elif boundary == "template":
            ChatFormatter(self.adapted.tokenizer, chat_template=value).prompt("a")
        else:
            check_training(output_dir=self.folder / "out", **{what: VALUES[value]})


def judge(laboratory, case, seconds=SECONDS):
    """``named``, ``raw``, ``hung``, ``died`` or ``accepted``, and what was said."""
    from qlora_kit.errors import QloraKitError

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            laboratory.try_case(*case)
            found = ("accepted", "")
        except QloraKitError as error:
            found = ("named", f"{type(error).__name__}: {error}")
        except BaseException as error:
            found = ("raw", f"{type(error).__name__}: {error}")
        os.write(writer, json.dumps([found[0], found[1][:1000]]).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            said = os.read(reader, 20000)
            os.close(reader)
            return json.loads(said) if said else ["died", ""]
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return ["hung", f"over {seconds} s"]


def main(arguments):
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder))
        found = [(case, *judge(laboratory, case)) for case in
                 list_cases(every="--all" in arguments)]  # fmt: skip
    if "--json" in arguments:
        print(json.dumps([[c[0], c[1], repr(c[2])[:80], verdict, text]
                          for c, verdict, text in found]))  # fmt: skip
        return
    for case, verdict, text in found:
        if verdict != "named":
            print(verdict, case[0], case[1], repr(case[2])[:60], text[:200])
    print(dict(Counter(verdict for _, verdict, _ in found)))


if __name__ == "__main__":
    main(sys.argv[1:])
