"""Tokenizers and random models small enough to make on the spot."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

TEXT = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock, they'll say; isn't it?",
    "Below is an instruction that describes a task. Write a response that completes it.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # the answer\n",
    "Voilà, le café est près de l'hôtel. Où êtes-vous? Привет, мир! 你好，世界 こんにちは",
    "The capital of France is Paris; the capital of Italy is Rome. 3.14159 and 2.71828.",
] * 4

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _pre_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    def byte_level(use_regex: bool) -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

    def split(digits: str, letter: str = r"\p{L}", other: str = r"\p{L}\p{N}") -> Any:
        return by_pattern(
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{digits}"
            rf"| ?[^\s{other}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )

    def split_by_case(digits: str, ending: str = "") -> Any:
        upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
        before = r"[^\r\n\p{L}\p{N}]?"
        return by_pattern(
            rf"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}|{digits}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )

    def by_pattern(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level(False)]
        )

    return {
        "gpt-2": lambda: byte_level(True),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(True)]
        ),
        "qwen2": lambda: split(r"\p{N}"),
        "llama-bpe": lambda: split(r"\p{N}{1,3}"),
        "dbrx": lambda: split(r"\p{N}{1,3}"),
        "qwen35": lambda: split(r"\p{N}", letter=r"[\p{L}\p{M}]", other=r"\p{L}\p{M}\p{N}"),
        "tekken": lambda: split_by_case(r"\p{N}"),
        "gpt-4o": lambda: split_by_case(r"\p{N}{1,3}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),
    }[kind]()


@functools.cache
def byte_level_tokenizer(kind: str = "gpt-2", vocabulary: int = 500) -> Any:
    """A byte-level BPE tokenizer that splits as llama.cpp's pre-tokenizer ``kind``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
    )


@functools.cache
def sentencepiece_tokenizer(style: str = "llama", vocabulary: int = 700) -> Any:
    """A SentencePiece-style BPE tokenizer: ``"llama"`` (prefix everywhere), ``"first"``
    (prefix at the start only) or ``"gemma"`` (no prefix)."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocabulary - 259, show_progress=False)
    )
    import json

    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


_SHAPES = {
    # (hidden, intermediate, heads, kv heads, head width)
    "aligned": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "unaligned": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: Name of a case: configuration class and what differs from its defaults.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": _YARN}),
    "llama-yarn-factor": (
        "LlamaConfig",
        {"rope_parameters": {**_YARN, "attention_factor": 1.3}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"head_dim": None}),
    "qwen2-yarn": ("Qwen2Config", {"head_dim": None, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen2-linear": ("Qwen2Config", {"head_dim": None, "rope_parameters": _LINEAR}),
    "qwen3-yarn": ("Qwen3Config", {"rope_parameters": _YARN}),
    "qwen3-linear": ("Qwen3Config", {"rope_parameters": _LINEAR}),
    "qwen3-moe-yarn": ("Qwen3MoeConfig", {**_MOE, "rope_parameters": _YARN}),
    "mistral-yarn": ("MistralConfig", {"sliding_window": None, "rope_parameters": _YARN}),
    "qwen3-tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", _MOE),
    "gemma2": ("Gemma2Config", {"sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "num_hidden_layers": 7}),
    "gemma3-short-period": (
        "Gemma3TextConfig",
        {
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3-linear": (
        "Gemma3TextConfig",
        {
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {"head_dim": None}),
    "phi3-partial": (
        "Phi3Config",
        {
            "head_dim": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}

#: Families whose blocks normalize, rotate or gate otherwise, see ``families/dense.py``.
NEW: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "head_dim": None,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "olmo": ("OlmoConfig", {"head_dim": None, "clip_qkv": 3.0}),
    "olmo2": ("Olmo2Config", {"head_dim": None}),
    "olmo3": ("Olmo3Config", {"head_dim": None, "sliding_window": 16, "num_hidden_layers": 5}),
    "smollm3": ("SmolLM3Config", {"head_dim": None, "num_hidden_layers": 5}),
    "cohere": ("CohereConfig", {"head_dim": None, "logit_scale": 0.2}),
    "cohere2": (
        "Cohere2Config",
        {"head_dim": None, "logit_scale": 0.2, "sliding_window": 16, "num_hidden_layers": 5},
    ),
    "gemma": ("GemmaConfig", {}),
    "ministral3": (
        "Ministral3Config",
        {
            "sliding_window": None,
            "rope_parameters": {
                **_YARN,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "glm4": ("Glm4Config", {"attention_bias": True}),
    "exaone4": (
        "Exaone4Config",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "seed_oss": ("SeedOssConfig", {"attention_bias": True}),
    "arcee": ("ArceeConfig", {}),
    "phi": ("PhiConfig", {"head_dim": None, "num_key_value_heads": None}),
    "stablelm": ("StableLmConfig", {"head_dim": None, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2Config", {"head_dim": None, "sliding_window": None}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {}),
    "nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.5}),
    "lfm2": (
        "Lfm2Config",
        {
            "head_dim": None,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention"] * 2,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "granitemoe": (
        "GraniteMoeConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": None,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": None,
            "num_key_value_heads": None,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_MOE,
            "norm_topk_prob": False,
            "head_dim": None,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0, "truncate": True},
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "num_hidden_layers": 3,
        },
    ),
    "dots1": (
        "Dots1Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "num_hidden_layers": 3,
            "num_key_value_heads": None,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_shared_experts": 1,
            "num_key_value_heads": None,
            "head_dim": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 48,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": None,
            "head_dim": 16,
        },
    ),
}

#: Layers that carry a state, see ``families/recurrent.py``; with more value heads than key heads.
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_hidden_layers": 4,
}
_SHARED = {**_MOE, "shared_expert_intermediate_size": 96}
_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [3, 3, 2],
}
#: Two layers with keys of their own, then two that take theirs.
_PER_LAYER = {"vocab_size_per_layer_input": 500, "sliding_window": 16}
_MIXER = {"mamba_d_state": 16, "num_hidden_layers": 4}
_GRANITE_SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
NEW |= {
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_PER_LAYER,
            "hidden_size_per_layer_input": 256,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.95] * 6,
        },
    ),
    "gemma3n-shared": (
        "Gemma3nTextConfig",
        {
            **_PER_LAYER,
            "vocab_size_per_layer_input": 480,
            "hidden_size_per_layer_input": 256,
            "num_hidden_layers": 22,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 11,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_PER_LAYER,
            "hidden_size_per_layer_input": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 128,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        {
            **_PER_LAYER,
            "hidden_size_per_layer_input": 0,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 32,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "apertus": ("ApertusConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 192,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 5,
            "rope_parameters": _LLAMA3_ROPE,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "num_hidden_layers": 3},
    ),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {
            "num_experts": 4,
            "moe_topk": [2, 2],
            "num_shared_expert": [1, 1],
            "moe_intermediate_size": [512, 512],
            "intermediate_size": 512,
        },
    ),
    "hunyuan-alpha": (
        "HunYuanDenseV1Config",
        {
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "alpha": 1000.0,
                "factor": 1.0,
            },
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_GRANITE_SCALES,
            **_MIXER,
            "head_dim": None,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
        },
    ),
    "granite-hybrid-dense": (
        "GraniteMoeHybridConfig",
        {
            **_GRANITE_SCALES,
            "head_dim": None,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        {
            **_MIXER,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_ssm": 128,
            "mamba_n_groups": 2,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "num_hidden_layers": 2,
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 1.9,
            "mlp_multipliers": [0.8, 1.3],
            "key_multiplier": 0.6,
            "attention_out_multiplier": 1.2,
            "attention_in_multiplier": 0.9,
            "ssm_multipliers": [0.9, 1.1, 0.7, 1.3, 0.8],
            "ssm_in_multiplier": 1.4,
            "ssm_out_multiplier": 0.75,
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", {**_DELTA_NET, **_SHARED}),
    "qwen3_5": ("Qwen3_5TextConfig", {**_DELTA_NET, "rope_parameters": _MROPE}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA_NET, **_SHARED, "head_dim": 64}),
}
for _name in ("deepseek_v2", "deepseek_v3"):
    NEW[f"{_name}-yarn"] = (
        NEW[_name][0],
        {
            **NEW[_name][1],
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    )
CASES |= NEW


def longrope_case(dimensions: int) -> dict[str, Any]:
    """phi3's long-context tables, random but fixed."""
    generator = random.Random(7)
    return {
        "head_dim": None,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + generator.random() for _ in range(dimensions // 2)],
            "long_factor": [2.0 + 4 * generator.random() for _ in range(dimensions // 2)],
            "original_max_position_embeddings": 256,
        },
    }


def make_config(case: str, shape: str = "aligned", *, vocabulary: int = 500, **changes: Any) -> Any:
    """A configuration of a family's test case."""
    import transformers

    class_name, own = CASES[case]
    values: dict[str, Any] = {
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "vocab_size": vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": class_name.startswith(("Gemma", "Cohere")),
        **_SHAPES[shape],
        **own,
        **changes,
    }
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values["head_dim"] is None:
        del values["head_dim"]
        values["hidden_size"] = _SHAPES[shape]["hidden_size"]
    if class_name.startswith("Gemma"):
        values.setdefault("query_pre_attn_scalar", values["head_dim"])
    return getattr(transformers, class_name)(**values)


def make_wrapper(kind: str) -> Any:
    """The configuration of a model that also sees, around a text model of a test case."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    case, class_name, own = {
        "gemma3": ("gemma3", "Gemma3Config", {"mm_tokens_per_image": 4}),
        "mistral3": ("mistral", "Mistral3Config", {}),
        "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeConfig", {}),
    }[kind]
    text = make_config(case).to_dict()
    if kind == "qwen3_5_moe":
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": text["hidden_size"]}
    return getattr(transformers, class_name)(
        text_config=text,
        vision_config={**vision, **({"head_dim": 16} if kind == "mistral3" else {})},
        tie_word_embeddings=text["tie_word_embeddings"],
        **own,
    )


#: Families whose attention is not divided by the root of a head's width.
_UNSCALED = ("gemma3n_text", "gemma4_text")


def make_model(config: Any, seed: int = 0) -> Any:
    """A model with random weights, spread as trained ones are; float32, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight") and config.model_type in _UNSCALED:
                # As trained ones are: nothing else makes up for the width of a head, and keys are
                # kept in 16 bits.
                parameter.mul_(0.2)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.7 / parameter.shape[-1] ** 0.5)
    return model


def save_checkpoint(model: Any, tokenizer: Any, folder: Path) -> Path:
    """``save_pretrained``, model and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Shapes:
    """A source of which only names and shapes are asked."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def load(self, name: str) -> Any:
        raise AssertionError("planning reads no weight")


def make_shapes(config: Any) -> Shapes:
    """The tensors of a model that is never made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return Shapes(shapes)
