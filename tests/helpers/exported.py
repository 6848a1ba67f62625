"""Exported checkpoints: how plain transformers reads them, and ways to damage them."""

import dataclasses
import json


def load_plain(folder, **options):
    """What someone who has transformers alone loads."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), **options)


def edit_json(path, **changes):
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def damage_file(folder, damage):
    """Cut the weights short or change a file beside them; whether the damage is one of those."""
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "eos":
        edit_json(folder / "generation_config.json", eos_token_id=1)
    elif damage == "tokenizer":
        edit_json(folder / "tokenizer_config.json", eos_token="<|im_start|>")
    else:
        return False
    return True


def end_answers_with(model, token):
    """A model whose training template ended answers with another token than the base's."""
    from qlora_kit.handles import RunRecord

    class Formatter:
        def template_spec(self):
            return {"eos_token": token}

        def prompt(self, instruction, input=""):
            return f"### Instruction:\n{instruction}\n### Response:\n"

    return dataclasses.replace(model, record=RunRecord(formatter=Formatter()))
