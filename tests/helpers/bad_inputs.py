"""Bad inputs for every boundary, each tried in a fork with a time limit.

    python tests/helpers/bad_inputs.py [--all] [--json] [BOUNDARY ...]

Says how many were refused by name, raised something raw, hung, took much memory or were accepted.
"""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import bad_values as bad
import bad_values_beside as beside

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SECONDS = 25
#: Beside the laboratory itself: a refusal needs next to nothing.
MOST_GIB = 2.0
ROWS = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(6)]
#: What the sample of the suite always has: each of these once took minutes or gigabytes.
HANGS = ("num_hidden_layers", "id", "init_lora_weights", "prompt", "generate_stream")
#: Boundaries that the sample leaves to the whole table: their cases take a training each.
LONG = (
    "sampled-run",
    "beside-cli",
    "gguf-option",
    "resume",
    "asked-resume",
    "data",
    "rows",
    "run",
    "cli",
    "export",
    "damage",
)


def list_cases(*, every, only=()):
    """``(boundary, what, value)``; without ``every`` some of each boundary, and the hangs."""
    import dataclasses

    from trl import SFTConfig

    def spread(boundary, table):
        return [(boundary, name, value) for name, values in table.items() for value in values]

    cases = [
        *spread("config", bad.CONFIG), *spread("file", bad.FILES), ("tokenizer", "id", 10**9),
        *spread("adapter", bad.ADAPTER), *spread("adapter-file", bad.ADAPTER_FILES),
        *spread("resume", bad.RESUME), *spread("asked-resume", {"path": bad.ASKED_RESUMES}),
        *spread("gguf", {"file": bad.GGUF}), *spread("data", bad.DATA), ("data", "bomb", 2**31),
        *spread("rows", {"train_dataset": bad.ROWS}), *spread("load", bad.LOAD),
        *spread("load", {"model_name": bad.NAMES}), *spread("attach", bad.ATTACH),
        *spread("generate", bad.SAMPLING), *spread("export", bad.EXPORT), *spread("run", bad.RUNS),
        *spread("template", {"chat_template": bad.TEMPLATES}),
        *spread("template", {"generate_stream": bad.TEMPLATES}),
        *spread("cli", {"command": bad.COMMANDS}), *spread("plan", beside.PLANS),
        *spread("recipe", {"x.toml": beside.RECIPES, "x.yaml": beside.YAML_RECIPES}),
        *spread("evaluate", beside.EVALUATE), *spread("batch", beside.BATCH),
        *spread("gguf-option", beside.GGUF_OPTIONS), *spread("sampled-run", beside.SAMPLES),
        *spread("beside-cli", {"command": beside.COMMANDS}),
    ]  # fmt: skip
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        cases += [("damage", name, kind) for kind in bad.make_damages(12)]
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    cases += [("train", name, kind) for name in sorted(fields - {"output_dir", "max_length"})
              for kind in ("object", "huge", "nan", "list", "dict")]  # fmt: skip
    cases += [("train", name, kind) for name in ("bf16", "seed", "adam_beta1", "torch_compile",
              "warmup_steps", "save_total_limit", "torch_compile_mode", "max_grad_norm", "optim",
              "report_to", "loss_type") for kind in ("x", "-1")]  # fmt: skip
    if only:
        cases = [case for case in cases if case[0] in only]
    if every:
        return cases
    seen: Counter = Counter()
    sample = []
    for case in cases:
        seen[case[0]] += 1
        is_hang = case[1] in HANGS and case[2] in (10**6, 10**9, bad.LOOPS, "pissa_niter_99999",
                                                   "x" * 10**6)  # fmt: skip
        if is_hang or (case[0] not in LONG and seen[case[0]] % 24 == 1):
            sample.append(case)
    return sample


class Laboratory:
    """A tiny model in memory and on disk, an adapter and a run's checkpoint, made before forks."""

    def __init__(self, folder, *, trains=True):
        from checkpoints import make_checkpoint
        from qlora_kit import attach_lora, export_model, train_sft

        self.folder, self.base = folder, make_checkpoint(folder / "base", "llama")
        self.loaded = self.load(self.base)
        self.adapted = attach_lora(self.load(self.base), r=2)
        self.run = {"max_steps": 2, "save_steps": 1, "output_dir": folder / "run",
                    "disable_tqdm": True, "plan": {"compile": False}}  # fmt: skip
        if trains:
            train_sft(attach_lora(self.load(self.base), r=2), ROWS, **self.run)
        export_model(self.adapted, "lora", folder / "adapter", verify=False)
        (folder / "rows.json").write_text(json.dumps(ROWS))

    @staticmethod
    def load(path):
        from qlora_kit import load_quantized

        return load_quantized(path, 64, "float32", False, engine="native")

    def try_case(self, boundary, what, value):
        """Do it; whatever is raised is the finding."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        getattr(self, f"_try_{boundary.replace('-', '_')}")(place, what, value)

    def _open(self, folder):
        from qlora_kit import generate_stream

        list(generate_stream(self.load(folder), "a", max_new_tokens=2))

    def _copy(self, source, place):
        return Path(shutil.copytree(source, place / "copy"))

    def _try_config(self, place, what, value):
        copy = self._copy(self.base, place)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, what: value}))
        self._open(copy)

    def _try_file(self, place, what, value):
        copy = self._copy(self.base, place)
        (copy / what).write_text(value, encoding="latin-1")
        if what == "pytorch_model.bin":
            (copy / "model.safetensors").unlink()
        self._open(copy)

    def _try_damage(self, place, what, value):
        copy = self._copy(self.base, place)
        (copy / what).write_bytes(bad.damage((copy / what).read_bytes(), *value))
        self._open(copy)

    def _try_tokenizer(self, place, what, value):
        copy = self._copy(self.base, place)
        content = json.loads((copy / "tokenizer.json").read_text())
        content["model"]["vocab"]["zzz"] = value
        (copy / "tokenizer.json").write_text(json.dumps(content))
        self._open(copy)

    def _try_adapter(self, place, what, value):
        copy = self._copy(self.folder / "adapter", place)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps({**config, what: value}))
        if what == "base_model_name_or_path":
            (copy / "qlora_kit_manifest.json").unlink()
        self._open(copy)

    def _try_adapter_file(self, place, what, value):
        copy = self._copy(self.folder / "adapter", place)
        (copy / what).write_text(value, encoding="latin-1")
        self._open(copy)

    def _train(self, rows, **settings):
        from qlora_kit import train_sft

        train_sft(self.adapted, rows, **{**self.run, **settings})

    def _try_resume(self, place, what, value):
        """Of the last checkpoint, and of the only one: the second must be refused."""
        copy = self._copy(self.folder / "run", place)
        shutil.rmtree(copy / "checkpoint-1")
        file = copy / "checkpoint-2" / what
        file.unlink() if value is None else file.write_text(value, encoding="latin-1")
        self._train(ROWS, output_dir=copy, max_steps=3, resume_from_checkpoint=True)

    def _try_asked_resume(self, place, what, value):
        self._train(ROWS, output_dir=place, resume_from_checkpoint=value)

    def _try_gguf(self, place, what, value):
        from qlora_kit import load_quantized

        (place / "x.gguf").write_text(value, encoding="latin-1")
        load_quantized(place / "x.gguf", 64, "float32", False, cache_dir=place)

    def _try_data(self, place, what, value):
        path = place / what
        if what == "bomb":
            import pyarrow as pa
            import pyarrow.parquet

            path, value = place / "rows.parquet", None
            column = pa.chunked_array([pa.array(["x" * 2**16] * 128)] * 256)
            pyarrow.parquet.write_table(pa.table({"instruction": column, "output": column}), path,
                                        compression="zstd")  # fmt: skip
        elif what.startswith("saved/"):
            from datasets import Dataset

            Dataset.from_list(ROWS).save_to_disk(place / "saved")
            path.unlink() if value is None else path.write_text(value, encoding="latin-1")
            path = place / "saved"
        else:
            path.write_text(value, encoding="latin-1")
        self._train(path, max_steps=1)

    def _try_rows(self, place, what, value):
        self._train(value, max_steps=1)

    def _try_load(self, place, what, value):
        from qlora_kit import load_quantized

        given = {"model_name": self.base, "load_in_4bit": False, "engine": "native"}
        load_quantized(**{**given, what: value})

    def _try_attach(self, place, what, value):
        from qlora_kit import attach_lora

        attach_lora(self.loaded, **{what: value})

    def _try_generate(self, place, what, value):
        from qlora_kit import generate_stream

        given = {"prompt": "a", "max_new_tokens": 2, what: value}
        list(generate_stream(self.adapted, given.pop("prompt"), **given))

    def _try_template(self, place, what, value):
        from qlora_kit import ChatFormatter, generate_stream

        if what == "chat_template":
            ChatFormatter(self.adapted.tokenizer, chat_template=value).prompt("a")
            return
        self.adapted.tokenizer.chat_template = value
        list(generate_stream(self.adapted, [{"role": "user", "content": "a"}], max_new_tokens=2))

    def _try_plan(self, place, what, value):
        from qlora_kit import Pipeline, plan_training

        asked = Pipeline(model=self.base, data=None, loading={"load_in_4bit": False})
        given = {"pipeline": asked, "row_tokens": 32, what: value}
        plan_training(given.pop("pipeline"), **given)

    def _try_recipe(self, place, what, value):
        from qlora_kit import plan_training

        text = value.replace("{base}", str(self.base))
        text = text.replace("{rows}", str(self.folder / "rows.json"))
        (place / what).write_text(text, encoding="latin-1")
        plan_training(place / what)

    def _try_evaluate(self, place, what, value):
        from qlora_kit import evaluate

        given = {"rows": ROWS, "max_new_tokens": 2, "limit": 2, what: value}
        evaluate(self.adapted, given.pop("rows"), **given)

    def _try_batch(self, place, what, value):
        from qlora_kit import generate_batch

        given = {"prompts": ["a", "b"], "max_new_tokens": 2, what: value}
        list(generate_batch(self.adapted, given.pop("prompts"), **given))

    def _try_gguf_option(self, place, what, value):
        from qlora_kit import export_model

        given = {"quantization": "q8_0", "verify": False, what: value}
        export_model(self.adapted, "gguf", place / "out", **given)

    def _try_sampled_run(self, place, what, value):
        given = {"sample_prompts": ["a"], what: value}
        self._train(ROWS, output_dir=place, max_steps=1, **given)

    def _try_beside_cli(self, place, what, value):
        self._try_cli(place, what, value)

    def _try_export(self, place, what, value):
        from qlora_kit import export_model

        given = {"format": "merged_16bit", "path": place / "out", what: value}
        if what == "quantization":
            given["format"] = "gguf"
        export_model(self.adapted, given.pop("format"), given.pop("path"), **given)

    def _try_run(self, place, what, value):
        settings = {"output_dir": place, "max_steps": 1, what: value}
        if what == "num_train_epochs":
            del settings["max_steps"]
        self._train(ROWS, **settings)

    def _try_train(self, place, what, value):
        from qlora_kit.training import check_training

        check_training(output_dir=place, **{what: bad.ANY[value]})

    def _try_cli(self, place, what, value):
        from qlora_kit.cli import main

        (place / "BAD.jinja").write_text("{{ 1/0 }}")
        meant = {"MODEL": str(self.base), "ROWS": str(self.folder / "rows.json"), "OUT": str(place),
                 "HUGE": "9" * 5000, "DEEP": "[" * 99999, "BIG": "x" * 100_000,
                 "BAD.jinja": str(place / "BAD.jinja")}  # fmt: skip
        words = shlex.split(value)
        for name, one in meant.items():
            words = [word.replace(name, one) if len(name) > 3 or word == name else word
                     for word in words]  # fmt: skip
        common = ["--no-4bit"] + (["--set", "max_steps=1"] if words[0] == "train" else [])
        status = 2
        with contextlib.suppress(SystemExit):
            status = main([*words[:1], *words[1:], *common])
        if status:
            from qlora_kit.errors import QloraKitError

            raise QloraKitError("the command line said why")


def judge(laboratory, case, seconds=SECONDS):
    """``named``, ``raw``, ``hung``, ``died``, ``fat`` or ``accepted``, and what was said."""
    from qlora_kit.errors import QloraKitError

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        before = _used_gib()
        # Whatever takes more fails in its fork, and not on the machine.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 6 * 2**30, -1))
        try:
            laboratory.try_case(*case)
            found = ("accepted", "")
        except QloraKitError as error:
            found = ("named", f"{type(error).__name__}: {error}")
        except BaseException as error:
            found = ("raw", f"{type(error).__name__}: {error}")
        if _used_gib() - before > MOST_GIB:
            found = ("fat", f"{found[0]}, {_used_gib() - before:.1f} GiB: {found[1]}")
        os.write(writer, json.dumps([found[0], found[1][:1000]]).encode())
        os._exit(0)
    os.close(writer)
    # Of its own time, as far as it uses any: other work must not make a case hang.
    deadline = time.monotonic() + 10 * seconds
    while time.monotonic() < deadline and _used_seconds(child) < seconds:
        if os.waitpid(child, os.WNOHANG)[0]:
            said = os.read(reader, 20000)
            os.close(reader)
            return json.loads(said) if said else ["died", ""]
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    return ["hung", f"over {seconds} s"]


def _used_seconds(process):
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _used_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments):
    import torch

    torch.set_num_threads(1)
    only = [word for word in arguments if not word.startswith("-")]
    with tempfile.TemporaryDirectory() as folder:
        cases = list_cases(every="--all" in arguments, only=only)
        laboratory = Laboratory(Path(folder), trains=any(case[0] in LONG for case in cases))
        found = []
        for case in cases:
            begun = time.monotonic()
            verdict, text = judge(laboratory, case)
            # torch's threads do not survive every fork, which says nothing of the case.
            for _ in range(9):
                if "Invalid thread pool" not in text:
                    break
                verdict, text = judge(laboratory, case)
            found.append([case[0], case[1], repr(case[2])[:80], verdict, text,
                          round(time.monotonic() - begun, 1)])  # fmt: skip
            if verdict != "named" and "--json" not in arguments:
                print(verdict, *found[-1][:3], text[:300], f"{found[-1][5]} s", flush=True)
    if "--json" in arguments:
        print(json.dumps(found))
        return
    slow = [case for case in found if case[5] > 5 and case[3] == "named"]
    print("slow:", [case[:3] + case[5:] for case in slow])
    print(dict(Counter(case[3] for case in found)))


if __name__ == "__main__":
    main(sys.argv[1:])
