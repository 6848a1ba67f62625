"""A random model of two layers with an adapter that says something, made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_kit.adapters import attach_lora
from qlora_kit.data import AlpacaFormatter
from qlora_kit.handles import AdaptedModel
from qlora_kit.loading import load_quantized

__all__ = ["make_tiny_model", "make_tiny_tokenizer"]

_CORPUS = (
    "Below is an instruction that describes a task. Write a response that completes it.",
    "### Instruction:\nName a primary color.\n\n### Response:\nRed",
    "The quick brown fox jumps over the lazy dog. 0 1 2 3 4 5 6 7 8 9 10",
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, *, load_in_4bit: bool = True, seed: int = 0) -> AdaptedModel:
    """A llama-shaped model of two layers and its tokenizer, with a random LoRA adapter.

    Args:
        folder: Where its checkpoint is written; it must stay while the model is used.
        load_in_4bit: Whether the base is quantized to NF4.
        seed: Of the weights and of the adapter.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    loaded = load_quantized(folder, 128, "float32", load_in_4bit, engine="native")
    model = attach_lora(loaded, r=4)
    model.record.formatter = AlpacaFormatter(model.tokenizer)
    shake_adapter(model, seed=seed + 1)
    return model


def shake_adapter(model: AdaptedModel, *, seed: int) -> None:
    """Add noise to every trainable parameter; peft starts half of them at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.1 * noise).to(parameter))


def make_tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 384 tokens in ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
