"""Bad values by boundary and name; ``bad_inputs.py`` tries them."""

import random

NAN, HUGE, INFINITE = float("nan"), 10**400, float("inf")

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = ["{{ 1/0 }}", LOOPS, "{{", "{{ messages[99].content }}", "{{ range(10**9) }}",
             "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.nope.nope }}",
             "{{ 'a'.encode().nope() }}", "{{ 'x' * 10**10 }}", "{{ 9**9**9 }}",
             "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
             "{% include 'x' %}", "{{ raise_exception('no') }}", "{{ messages | nope }}",
             "{{ ''.__class__.__mro__ }}", "{{ '%999999999d' % 1 }}"]  # fmt: skip
CONFIG = {
    "hidden_size": [0, -1, "x", [], 1.5, 10**9], "num_hidden_layers": [10**6, "x", -1, None],
    "num_attention_heads": [0, "x", 3, 10**9], "vocab_size": ["x", -1, 10**9],
    "hidden_act": ["nope", 3], "intermediate_size": [10**9, 0, "x"], "num_key_value_heads": [0, 3],
    "model_type": ["nope", 5, []], "rope_parameters": ["x", {"rope_type": "nope"}, 5],
    "head_dim": ["x", 0], "torch_dtype": ["nope"], "dtype": ["nope"], "rms_norm_eps": ["x"],
    "quantization_config": ["x", [1], {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": 5}],
    "eos_token_id": ["x", [None]], "layer_types": [["x"]], "architectures": [5, ["Nope"]],
    "max_position_embeddings": ["x", -1], "tie_word_embeddings": ["x"], "attention_bias": ["x"],
}  # fmt: skip
FILES = {
    "config.json": ["", "[]", "{", "\0\1", "[" * 5000, "{}", '"x"', "5", "\xff\xfe"],
    "generation_config.json": ["{", "[]", '{"temperature": "x"}', '{"eos_token_id": "x"}',
                               '{"eos_token_id": [[1]]}', '{"max_length": "x"}', "\xff"],
    "tokenizer.json": ["", "{", "[]", "{}", '{"model": 5}', "[" * 9999, "\xff"],
    "tokenizer_config.json": ["{", "[]", '{"tokenizer_class": 5}', '{"eos_token": 5}',
                              '{"added_tokens_decoder": "x"}', '{"chat_template": 5}', "\xff"],
    "chat_template.jinja": ["\xff\xfe", "{{", "{{ 1/0 }}"],
    "special_tokens_map.json": ["{", "[]", '{"eos_token": 5}'],
    "model.safetensors": ["", "x" * 100, "\xff" * 64, "\x40" + "\0" * 7 + "{" * 64],
    "model.safetensors.index.json": ["[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{",
                                     '{"weight_map": {"a": "../../etc/passwd"}}', "{}",
                                     '{"weight_map": {"a": ""}}', '{"metadata": 5}',
                                     '{"weight_map": {"a": "model.safetensors"}}'],
    "pytorch_model.bin": ["", "x", "\x80\x04."],
    "qlora_kit_manifest.json": ["{", "[]", '{"formatter": 5}', '{"formatter": {"name": []}}',
                                '{"formatter": {"name": "alpaca", "template": 5}}',
                                '{"files": 5, "adapter": 5}', "\xff"],
}  # fmt: skip
#: Of a saved adapter: fields of its configuration, and whole files.
ADAPTER = {
    "r": ["x", 0, -1, None, 5], "lora_alpha": ["x", None, INFINITE], "target_modules": [5, [], "x"],
    "peft_type": ["NOPE", 5, None], "base_model_name_or_path": [5, "", "/nope", None, []],
    "lora_dropout": ["x", 2], "bias": ["x", 5], "rank_pattern": [5, {"q_proj": "x"}],
    "modules_to_save": [5, ["nope"]], "init_lora_weights": [5, "nope"], "revision": [5],
    "layers_to_transform": ["x", [99]], "use_dora": ["x"], "loftq_config": [5], "auto_mapping": [5],
    "task_type": ["NOPE", 5], "alpha_pattern": [5], "fan_in_fan_out": ["x"], "nope": [1],
}  # fmt: skip
ADAPTER_FILES = {
    "adapter_config.json": ["", "[]", "{", "5", "\xff", "[" * 9999],
    "adapter_model.safetensors": ["", "x" * 99, "\xff" * 64],
    "qlora_kit_manifest.json": ["{", "[]", '{"base": 5}', '{"base": {"name_or_path": 5}}',
                                '{"adapter": {"r": 2, "random_state": "x"}}', '{"formatter": []}'],
}  # fmt: skip
#: Of a checkpoint of a run; ``None`` for a file that is gone.
RESUME = {
    "adapter_config.json": ["{", None], "adapter_model.safetensors": ["", "x" * 99, None],
    "optimizer.pt": ["", "x", "PK\3\4"], "scheduler.pt": ["", "x"], "rng_state.pth": ["", "x"],
    "trainer_state.json": ["", "{", "[]", '{"global_step": "x"}', None],
    "training_args.bin": ["", "x"], "qlora_kit_manifest.json": ["", "{", "[]", "{}", None],
}  # fmt: skip
ASKED_RESUMES = ["/nope", "x" * 5000, "\0", 5, [], "", "checkpoint-99", "/dev/null", "~nouser/x"]
GGUF = ["", "GGUF", "GGUF\3\0\0\0", "x" * 99, "GGUF" + "\xff" * 60, "GGUF\3\0\0\0" + "\xff" * 16,
        "GGUF\3\0\0\0" + "\0" * 16, "GGUF\2\0\0\0" + "\1" * 200]  # fmt: skip
DATA = {
    "rows.json": ["", "{", "[" * 99999, "5", "[]", "[1]", '{"a": 1}', "\xff\xfe\0", "null",
    "[null]",
                  '[{"instruction": 5, "output": "a"}]', '[{"messages": 5}]', "[{}]"],
    "rows.jsonl": ["{", "5", "\n\n", '{"instruction": "a"}', '{"input_ids": ["x"]}',
                   '{"input_ids": [-1, 99999999]}', '{"input_ids": [[1]]}', '{"input_ids": 5}'],
    "rows.csv": ["", "a", '"', "a,b\n1", "\0", "instruction,output\na,b,c"],
    "rows.parquet": ["", "PAR1", "PAR1" + "\xff" * 50 + "PAR1"],
    "rows.xlsx": ["x"],
    "saved/dataset_info.json": ["", "{", "[]"], "saved/state.json": ["", "{", "[]", "{}"],
    "saved/data-00000-of-00001.arrow": ["", "x" * 99, None], "saved/dataset_dict.json": ["{", "[]"],
}  # fmt: skip
#: Whatever ``train_dataset`` may be given as.
ROWS = [None, 5, [], {}, "", "\0", "x" * 5000, "/nope.json", [5], [None], [[]], [{}], [{"a": 1}],
        [{"instruction": "a", "output": None}], [{"messages": []}], [{"messages": [5]}],
        [{"messages": [{"role": 5, "content": 5}]}], [{"text": ""}], [{"input_ids": []}],
        [{"input_ids": [1.5]}], [{"input_ids": [10**12]}], {"train": 5}, object(), b"x",
        [{"input_ids": [1, 2], "labels": [1]}], [{"prompt": "a", "completion": {}}],
        [{"input_ids": [1, 2], "seq_lengths": [9]}], {"a": [1]}, "/dev/null",
        "~nouser/x"]  # fmt: skip
ATTACH = {
    "r": [0, -1, 1.5, "x", None, NAN, HUGE, 10**9, True],
    "target_modules": ["", "x", [], [5], 5, None, ["q_proj", "nope"], {"q_proj": 1}],
    "lora_alpha": [INFINITE, NAN, "x", 0, -1, None, HUGE, True],
    "lora_dropout": [-0.1, 1, "x", NAN, True],
    "bias": [5, "x", []], "use_gradient_checkpointing": ["x", 5], "random_state": [-1, 2**64, "x"],
    "use_rslora": ["x", 1, None], "use_dora": ["x", 1], "modules_to_save": ["x", [5], 5, [""]],
    "init_lora_weights": ["x", 5, None, [], "pissa_niter_99999", "pissa_niter_x", "eva"],
    "loftq_config": [5, "x", {"loftq_bits": 3}, {"x": 1}, {"loftq_iter": 10**9}, {"loftq_iter": 0}],
    "layers_to_transform": [[], "x", [99], -1, 1.5, [1.5], ["x"], [-1]],
    "rank_pattern": ["x", {"q_proj": 0}, {"q_proj": "x"}, {5: 4}, {"nope": 4}, {"(": 4}],
    "alpha_pattern": [{"q_proj": INFINITE}, "x", {"q_proj": None}],
    "target_parameters": ["", "x", [], [5], 5, {"a": 1}, "experts", ["q_proj.weight"], True],
}  # fmt: skip
LOAD = {
    "max_seq_length": [True, 0, -1, "x", NAN, HUGE], "dtype": ["x", 5, [], "int8"],
    "load_in_4bit": ["x", 1], "load_in_8bit": ["x", 1], "engine": ["x", 5, [], "", object()],
    "is_trainable": ["x"], "token": [5, "", "\0"], "revision": [5, "", "\0"],
    "cache_dir": ["\0", 5, ""], "trust_remote_code": ["x", 1], "base": [5, "x", "\0", []],
    "local_files_only": ["x", 1],
    "device_map": ["x", 5, {"": "nope"}, {"": 99}, []],
}  # fmt: skip
NAMES = ["/dev/null", "~nouser/x", "\0", "", " ", "a/b/c", "x" * 5000, 5, None, b"x", "..", "/proc",
         "/dev/zero", "-", "a b", "é/é", "x/" * 3000]  # fmt: skip
SAMPLING = {
    "max_new_tokens": [0, "x", None, NAN, HUGE, True], "temperature": ["x", NAN, 0, HUGE, INFINITE],
    "top_p": [2, "x", NAN], "top_k": [-1, 1.5, HUGE], "min_p": [2, "x"], "seed": [-1, "x", 2**64],
    "stop": [5, [""], [5]], "repetition_penalty": [NAN, 0, "x"], "do_sample": ["x", 5],
    "typical_p": [NAN, "x", 2, 0], "eos_token_id": ["x", [None], -1, [10**12], 1.5],
    "bad_words_ids": ["x", [5], [[]], [["x"]], [[-1]]], "suppress_tokens": ["x", [10**9], [-5]],
    "forced_eos_token_id": ["x", 10**9], "no_repeat_ngram_size": ["x", -1, NAN],
    "forced_bos_token_id": ["x", 10**9], "begin_suppress_tokens": ["x", [10**9]],
    "min_new_tokens": ["x", -1, 99], "min_length": ["x", -1], "epsilon_cutoff": ["x", 2, NAN],
    "eta_cutoff": ["x", 2], "exponential_decay_length_penalty": ["x", [1], [1, "x"]],
    "sequence_bias": ["x", {5: 1}, [[5, "x"]]], "guidance_scale": ["x", NAN],
    "cache_implementation": ["x", 5], "cache_config": ["x", {"nope": 1}], "use_cache": ["x"],
    "num_beams": [2, "x"], "num_return_sequences": [2], "penalty_alpha": [0.6],
    "max_time": ["x", -1],
    "stop_strings": [5], "prompt_lookup_num_tokens": ["x", 3], "renormalize_logits": ["x"],
    "encoder_repetition_penalty": ["x"], "watermarking_config": ["x", 5], "token_healing": ["x"],
    "pad_token_id": ["x", 10**9], "bos_token_id": ["x"], "compile_config": ["x"], "nope": [1],
    "output_scores": ["x"], "remove_invalid_values": ["x"], "diversity_penalty": ["x"],
    "decoder_start_token_id": ["x"], "assistant_early_exit": ["x", 1], "disable_compile": ["x"],
    "prompt": ["x" * 10**6, 5, [], [-1], [{"role": 5}], None, b"x", [10**12], [1.5], [True],
               {"role": "user"}, [{"role": 5, "content": 5}], [{"role": "user", "content": []}],
               object(), "", ["a"], [[1]]],
}  # fmt: skip
#: Values for every field of ``SFTConfig``, checked before anything is loaded.
ANY = {
    "x": "x",
    "-1": -1,
    "nan": NAN,
    "list": [[]],
    "object": object(),
    "huge": HUGE,
    "dict": {5: 5},
}
#: Values of the right type that fail later, tried in a run of one step.
RUNS = {
    "lr_scheduler_type": ["cosine_with_min_lr", "warmup_stable_decay", "inverse_sqrt",
    "polynomial"],
    "lr_scheduler_kwargs": [{"x": 1}, "x", {"num_cycles": "x"}], "optim_args": ["x", "a=b", "="],
    "optim": ["lomo", "galore_adamw", "apollo_adamw", "adafactor", "schedule_free_adamw", "rmsprop",
              "grokadamw", "stable_adamw", "adamw_torch_4bit", "paged_adamw_8bit",
              "adamw_anyprecision",
              "adamw_torch_npu_fused"],
    "optim_target_modules": ["x", ["x"]], "report_to": ["nope", ["wandb"], "all", "mlflow", ["x"]],
    "loss_type": ["dft", "chunked_nll", "x"], "torch_empty_cache_steps": [0, 1],
    "torch_compile_backend": ["nope", "inductor"], "torch_compile_mode": ["max-autotune"],
    "gradient_checkpointing_kwargs": [{"x": 1}, "x"], "accelerator_config": ["x", {"x": 1},
        {"split_batches": True}, {"dispatch_batches": True}, {"gradient_accumulation_kwargs": 5}],
    "fsdp": ["x", "full_shard"], "fsdp_config": ["x", {"x": 1}], "deepspeed": ["x", {}, {"x": 1}],
    "debug": ["x", "underflow_overflow", "tpu_metrics_debug"], "label_names": [["x"], []],
    "ddp_backend": ["x", "nccl"], "dataloader_num_workers": [1], "dataloader_prefetch_factor": [2],
    "dataloader_multiprocessing_context": ["x", "spawn"], "dataloader_persistent_workers": [True],
    "train_sampling_strategy": ["x", "group_by_length", "sequential"], "length_column_name": ["x"],
    "log_level": ["x"], "log_level_replica": ["x"], "include_num_input_tokens_seen": ["x", "all"],
    "hub_strategy": ["x", "end"], "push_to_hub": [True], "hub_model_id": ["///"],
    "hub_revision": ["x"], "save_strategy": ["best", "x"], "eval_strategy": ["x", "steps"],
    "metric_for_best_model": ["x"], "load_best_model_at_end": [True], "greater_is_better": [True],
    "logging_steps": [0, 0.5, 1.5], "save_steps": [0, 1.5, 0.3], "eval_steps": [0],
    "warmup_steps": [10**9, 0.5, 1.5], "max_steps": [0], "num_train_epochs": [10**300],
    "learning_rate": [1e300, 0.0], "max_grad_norm": [0.0], "neftune_noise_alpha": [5.0],
    "label_smoothing_factor": [0.5], "adam_epsilon": [1e300], "weight_decay": [1e300],
    "max_length": [0, -1, 1, 10**12, "x", None], "pad_to_multiple_of": [10**9, 7],
    "per_device_train_batch_size": [10**9], "gradient_accumulation_steps": [10**9],
    "packing_strategy": ["x", "wrapped", "bfd_split"], "dataset_num_proc": [4],
    "use_liger_kernel": [True], "liger_kernel_config": [{"x": True}], "tf32": [True],
    "fp16": [True],
    "bf16": [True], "bf16_full_eval": [True], "fp16_full_eval": [True], "use_cpu": [False],
    "router_aux_loss_coef": [0.1, -1.0], "activation_offloading": [True], "use_cache": [True],
    "full_determinism": [True], "auto_find_batch_size": [True], "ignore_data_skip": [True],
    "restore_callback_states_from_checkpoint": [True], "enable_jit_checkpoint": [True],
    "trackio_space_id": ["x"], "project": [""], "run_name": [""], "prediction_loss_only": [True],
    "torch_compile": [True], "average_tokens_across_devices": [False], "do_eval": [True],
    "do_predict": [True], "local_rank": [5], "ddp_timeout": [1], "batch_eval_metrics": [True],
    "eval_on_start": [True], "include_for_metrics": [["x"]], "save_total_limit": [0],
    "plan": ["x", 5, {"x": 1}, {"micro_batch_tokens": 0}, {"weights": "x"}, [], {"compile": "x"}],
    "callbacks": [5, "x", [5], [int]], "truncation": ["x", 5], "columns": [5, {"x": 5}, "x"],
    "formatter": [5, "x", int], "eval_dataset": [{}, 5, [], "x", {"a": []}, [{"instruction": "a"}]],
    "output_dir": [5, "", "\0", "/dev/null", "/proc/x/y", "x" * 5000, "~nouser/x"],
    "resume_with_changes": ["x", True], "packing": ["x", 5], "padding_free": ["x"], "nope": [1],
}  # fmt: skip
EXPORT = {
    "format": ["", ",", "nope", 5, None, [], [5], {"lora": 5}, ["lora", "lora"], {}, "gguf/../x"],
    "path": ["", 5, "\0", "/dev/null", "/proc/x", "x" * 250, "x" * 5000, "~nouser/x", "/", None],
    "overwrite": ["x", 5], "verify": ["x", 5, None], "progress": ["x", 5], "nope": [1],
    "quantization": [5, "nope", [], ["q8_0", 5], {}], "dtype": ["x", 5], "max_shard_size": ["x",
    -1, 0],
}  # fmt: skip
#: Whole command lines; MODEL, ROWS and OUT stand for what there is.
COMMANDS = [
    "generate /dev/null hi", "generate ~nouser/x hi", "generate MODEL hi --set seed=HUGE",
    "generate MODEL hi --set stop=DEEP", "generate MODEL hi --template BAD.jinja",
    "generate MODEL hi --max-new-tokens HUGE", "generate MODEL hi --max-new-tokens 0",
    "train MODEL ROWS --output OUT --set seed=HUGE", "train MODEL ROWS --output /dev/null",
    "train MODEL ROWS --output OUT --set =token=x", "train MODEL ROWS --output OUT --set x",
    "train MODEL ROWS --output OUT --template BAD.jinja", "train MODEL /dev/null --output OUT",
    "train MODEL ROWS --output OUT --export ,,", "train MODEL ~nouser/x --output OUT",
    "train MODEL ROWS --output OUT --r 0", "train MODEL ROWS --output OUT --lora-alpha nan",
    "train MODEL ROWS --output OUT --lora-alpha HUGE", "train MODEL ROWS --output ~nouser/x",
    "train MODEL ROWS --output OUT --set lr_scheduler_kwargs=DEEP",
    "train MODEL ROWS --output OUT --max-seq-length HUGE", "train MODEL ROWS --output /proc/x",
    "train MODEL ROWS --output OUT --columns a", "train MODEL ROWS --output OUT --columns a=b",
    "train MODEL ROWS --output OUT --eval-data /dev/null", "export MODEL lora /proc/x",
    "export MODEL ,, OUT", "export MODEL nope OUT", "export /dev/null lora OUT",
    "export MODEL merged_16bit OUT --set max_shard_size=HUGE", "export MODEL lora OUT --set x",
    "train MODEL ROWS --output OUT --split ''",
    "train MODEL ROWS --output OUT --export-option DEEP",
    "train MODEL ROWS --output OUT --template /dev/null",
    "train MODEL ROWS --output OUT --system BIG",
    "generate MODEL BIG", "train '' ROWS --output OUT", "train MODEL '' --output OUT",
]  # fmt: skip


def make_damages(count: int) -> list[tuple[str, int]]:
    """``(kind, seed)`` of random damage to a file: cut off, one byte changed, or noise."""
    rng = random.Random(0)
    return [(rng.choice(("cut", "flip", "noise")), rng.randrange(2**31)) for _ in range(count)]


def damage(content: bytes, kind: str, seed: int) -> bytes:
    """The content, damaged."""
    rng = random.Random(seed)
    place = rng.randrange(max(1, len(content)))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (1 + rng.randrange(255))]) + \
            content[place + 1:]  # fmt: skip
    return content[:place] + rng.randbytes(64) + content[place + 64 :]
