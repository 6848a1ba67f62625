"""The pipeline on the unsloth engine, in a process of its own: unsloth patches libraries.

Run by test_unsloth.py as ``python unsloth_pipeline.py BASE FOLDER``; writes what it saw to
``FOLDER/seen.json``.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def main(base: Path, folder: Path) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record)

    library = logging.getLogger("qlora_kit")
    library.setLevel(logging.INFO)
    library.addHandler(Keep())
    os.chdir(folder)

    from qlora_kit import (
        AlpacaFormatter,
        attach_lora,
        export_model,
        generate_stream,
        load_quantized,
        train_sft,
    )
    from qlora_kit.engines.selection import resolve_engine
    from qlora_kit.errors import QloraKitError

    seen: dict[str, object] = {"imported_early": "unsloth" in sys.modules}
    model = load_quantized(base, max_seq_length=128, dtype="float32", engine="unsloth")
    seen["engine"] = model.engine.name
    seen["quantization"] = model.base.quantization
    seen["stop_token_ids"] = list(model.base.stop_token_ids)

    import torch

    ids = torch.tensor([[5, 6, 7, 8, 9, 40, 41, 300]])

    def logits(handle):
        with torch.no_grad(), handle.engine.inference(handle) as module:
            return module(input_ids=ids).logits[0].float().tolist()

    seen["base_logits"] = logits(model)
    refused = {}
    for name, options in {
        "loftq": {"loftq_config": {"loftq_bits": 4}},
        "use_dora": {"use_dora": True},
        "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    }.items():
        try:
            attach_lora(model, r=4, **options)
        except QloraKitError as error:
            refused[name] = str(error)
    seen["refused"] = refused
    model = attach_lora(model, r=4)
    seen["trainable"] = model.trainable_parameters

    formatter = AlpacaFormatter(model.tokenizer)
    rows = [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"The number is {n}."}
        for n in range(12)
    ]
    prompt = formatter.prompt("Say the number 3.")
    model.model.train()
    before = "".join(chunk.text for chunk in generate_stream(model, prompt, max_new_tokens=8))
    seen["still_training"] = model.model.training
    result = train_sft(
        model,
        formatter.load(rows),
        max_steps=6,
        output_dir=folder / "out",
        learning_rate=2e-2,
        warmup_steps=1,
        disable_tqdm=True,
        optim="adamw_torch",
        save_strategy="no",
    )
    seen["losses"] = list(result.losses)
    seen["tokens"] = [result.tokens_seen, result.trained_tokens]
    chunks = list(generate_stream(model, prompt, max_new_tokens=8))
    seen["answers"] = [before, "".join(chunk.text for chunk in chunks)]
    seen["finish_reason"] = chunks[-1].finish_reason
    seen["trained_logits"] = logits(model)
    try:
        train_sft(model, formatter.load(rows), max_steps=1, output_dir="x", plan={"enabled": True})
    except QloraKitError as error:
        refused["plan"] = str(error)
    for name in ("lora", "merged_16bit"):
        artifact = export_model(model, name, folder / name)
        seen[name] = [check.name for check in artifact.verification.checks if check.passed]
    again = load_quantized(folder / "lora", 128, "float32", engine="unsloth", is_trainable=False)
    seen["reloaded_logits"] = logits(again)
    seen["reloaded_trainable"] = again.trainable_parameters

    seen["messages"] = [record.getMessage() for record in records]
    records.clear()
    seen["auto"] = resolve_engine("auto").name
    resolve_engine("native")
    seen["native_after"] = [(record.levelname, record.getMessage()) for record in records]
    (folder / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
