"""A tiny random model of every family that layers are computed for, in float32."""

import torch

from gguf_tiny import longrope_case

TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4,
               "attention_multiplier": 0.2}  # fmt: skip
LONGROPE = {**longrope_case(16), "head_dim": 16, "original_max_position_embeddings": 20}
LONGROPE["rope_parameters"]["original_max_position_embeddings"] = 20
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
STRETCHED = {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

#: Configuration class, and what makes every part of the family matter.
CASES = {
    "arcee": ("ArceeConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.2, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.2, **TWO_KINDS}),
    "cwm": ("CwmConfig", {"rope_parameters": YARN, **TWO_KINDS}),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": True}),
    "exaone4": ("Exaone4Config", TWO_KINDS),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 8, "query_pre_attn_scalar": 24, **CAPS}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **TWO_KINDS,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "glm": ("GlmConfig", {"attention_bias": True}),
    "glm4": ("Glm4Config", {}),
    "granite": ("GraniteConfig", {**MULTIPLIERS, "logits_scaling": 3.0, "attention_bias": True}),
    "helium": ("HeliumConfig", {}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "hunyuan-dynamic": (
        "HunYuanDenseV1Config",
        {"max_position_embeddings": 20, "rope_parameters": {**DYNAMIC, "alpha": 50.0}},
    ),
    "hyperclovax": (
        "HyperCLOVAXConfig",
        {**MULTIPLIERS, "logits_scaling": 0.3, "use_post_norm": True},
    ),
    "jais2": ("Jais2Config", {}),
    "llama-dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 20, "rope_parameters": DYNAMIC},
    ),
    "ministral": ("MinistralConfig", TWO_KINDS),
    "ministral3": ("Ministral3Config", {"sliding_window": 8, "rope_parameters": STRETCHED}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "nemotron": ("NemotronConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", TWO_KINDS),
    "phi3": ("Phi3Config", {"sliding_window": 8, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("Phi3Config", LONGROPE),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8,
                              "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 8,
                              "max_window_layers": 1}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True}),
    "stablelm-parallel": ("StableLmConfig", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 8}),
    "vaultgemma": ("VaultGemmaConfig", {"sliding_window": 8, **CAPS}),
}  # fmt: skip

#: The same for families with experts.
EXPERT_CASES = {
    "granitemoe": (
        "GraniteMoeConfig", {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 8}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "mlp_only_layers": [0]},
    ),
}  # fmt: skip


def make_config(case, **changes):
    """The configuration of a case."""
    import transformers

    class_name, own = {**CASES, **EXPERT_CASES}[case]
    return getattr(transformers, class_name)(
        **{
            "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0, **own, **changes,
        }
    )  # fmt: skip


def make_base(config):
    """A model whose every part matters."""
    from transformers import AutoModelForCausalLM

    # Eager: transformers' other ways to attend leave soft caps out.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.copy_(torch.randn_like(parameter) * 0.7 / parameter.shape[-1] ** 0.5)
    return model


def adapt(base, targets="all-linear", **fields):
    """LoRA adapters that already say something."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **fields)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.train()
