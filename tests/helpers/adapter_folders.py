"""Adapters' folders as other tools write them; what transformers and peft alone make of them."""

import json
import shutil

#: A turn in words of its own, unlike the one of the tiny base.
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "<|turn_end|>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def load_plain_base(base):
    """The base in float32, through transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)


def load_plain_adapter(base, folder, rows=None):
    """The adapter on its base in float32, through transformers and peft alone."""
    from peft import PeftModel

    model = load_plain_base(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def make_peft(base, *, rows=None, seed=0, **options):
    """A peft model whose every trained parameter says something, on the base in float32."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = load_plain_base(base)
        if rows is not None:
            model.resize_token_embeddings(rows)
        options = {"target_modules": ["v_proj", "o_proj", "down_proj"], **options}
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_own_tokenizer(base, *, tokens=("<|turn_end|>",)):
    """The base's tokenizer with tokens, a template and an end token of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    if tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.eos_token = tokens[0]
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def copy_changed(folder, target, **changes):
    """A copy of an adapter's folder whose ``adapter_config.json`` says otherwise."""
    shutil.copytree(folder, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def write_peft(base, folder):
    """Plain peft: the adapter, and nothing else."""
    make_peft(base).save_pretrained(folder)


def write_trl(base, folder):
    """TRL's ``SFTTrainer``: template and end token of its own, and the arguments of the run."""
    make_peft(base).save_pretrained(folder)
    tokenizer = make_own_tokenizer(base, tokens=())
    tokenizer.eos_token, tokenizer.chat_template = "<|im_start|>", TEMPLATE
    tokenizer.save_pretrained(folder)
    # A pickle, which nothing here may open.
    (folder / "training_args.bin").write_bytes(b"\x80\x02cos\nabort\n)R.")
    make_peft(base, seed=1).save_pretrained(folder / "checkpoint-1")


def write_trl_added(base, folder):
    """The same after ``clone_chat_template``: a token is added, trained alone, and its head."""
    model = make_peft(
        base, rows=385, trainable_token_indices={"embed_tokens": [384]}, modules_to_save=["lm_head"]
    )
    model.save_pretrained(folder)
    make_own_tokenizer(base).save_pretrained(folder)


def write_unsloth(base, folder):
    """Unsloth: modules as one regular expression, a mapping that says who fixed it."""
    pattern = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:v_proj|o_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn"
        r"|mlp|feed_forward|ffn|dense)\.(?:(?:v_proj|o_proj|down_proj)))"
    )
    make_peft(base, target_modules=pattern, use_rslora=True).save_pretrained(folder)
    path = folder / "adapter_config.json"
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
        "unsloth_fixed": True,
    }
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "auto_mapping": mapping, "loftq_config": {}}))
    make_own_tokenizer(base, tokens=()).save_pretrained(folder)


def write_axolotl(base, folder):
    """axolotl: the model's config.json beside it, tokens added, embeddings and head in full."""
    import torch

    model = make_peft(base, rows=416, modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(folder, safe_serialization=False)
    assert torch.load(folder / "adapter_model.bin", weights_only=True)
    model.get_base_model().config.save_pretrained(folder)
    make_own_tokenizer(base, tokens=("<|turn_end|>", "<|tool|>")).save_pretrained(folder)
    (folder / "debug.log").write_text("[INFO] loss 1.0\n")


def write_llama_factory(base, folder):
    """LLaMA-Factory: ``resize_vocab`` to a multiple of 64, vocabulary files of old, logs."""
    model = make_peft(base, rows=448, use_dora=True)
    model.save_pretrained(folder, save_embedding_layers=True)
    tokenizer = make_own_tokenizer(base)
    tokenizer.save_pretrained(folder)
    added = tokenizer.get_added_vocab()
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = {"eos_token": "<|turn_end|>", "additional_special_tokens": ["<|turn_end|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (folder / name).write_text('{"epoch": 1.0}')
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 1}\n')


#: Who wrote a folder: the function, and the rows of its vocabulary where that is another one.
TOOLS = {
    "peft": (write_peft, None),
    "trl": (write_trl, None),
    "trl, token added": (write_trl_added, 385),
    "unsloth": (write_unsloth, None),
    "axolotl": (write_axolotl, 416),
    "llama-factory": (write_llama_factory, 448),
}
