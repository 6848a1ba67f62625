"""Random checkpoints of two layers, their tokenizer, and adapters that already say something."""

from pathlib import Path

_TEXT = [
    "Below is an instruction that describes a task, paired with an input that provides context.",
    "Write a response that appropriately completes the request.",
    "### Instruction:\nName the capital of a country.\n\n### Input:\nItaly\n\n### Response:\nRome",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 10 100 1000",
]


def make_tokenizer(folder: Path, *, chat_template: bool = True) -> None:
    """A byte-level BPE tokenizer with <|im_end|> as its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    if chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{{ message['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    tokenizer.save_pretrained(folder)


def make_checkpoint(folder: Path, kind: str, *, seed: int = 0, **overrides: object) -> Path:
    """A random checkpoint of 2 layers, with its tokenizer."""
    import torch
    from transformers import (
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        OlmoeConfig,
        OlmoeForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    make_tokenizer(folder)
    settings = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        **overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**settings))
        elif kind == "qwen3_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=32, **experts, **settings))
        elif kind == "qwen2_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            experts["shared_expert_intermediate_size"] = 48
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**experts, **settings))
        elif kind == "olmoe":
            model = OlmoeForCausalLM(OlmoeConfig(num_experts=4, num_experts_per_tok=2, **settings))
        elif kind == "granitemoe":
            scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4}
            model = GraniteMoeForCausalLM(
                GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **scales, **settings)
            )
        elif kind == "mixtral":
            model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **settings))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def randomize(model, *, std=0.05, seed=1):
    """Give every trainable parameter values that matter; peft starts B at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                # Drawn on the CPU, so that the values are the same wherever the model is.
                noise = std * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device))
    return model
