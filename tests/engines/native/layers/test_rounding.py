"""What is generated is what was trained: adapted projections round once while a model is read."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from qlora_kit import generate_stream
from qlora_kit.engines.native.decoding.weights import DecodingWeights
from qlora_kit.engines.native.layers.peft_layers import read_group


def _forwards(model):
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def _logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(5, 300, (1, 24), generator=torch.Generator().manual_seed(2))


def _update_of(module, x):
    weight = module.lora_B["default"].weight @ module.lora_A["default"].weight
    return (x.double() @ (weight.double() * module.scaling["default"]).T).detach()


def _arrived(out, without, update):
    """The share of an update that a result holds."""
    return float(((out.double() - without) * update).sum() / (update * update).sum())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_small_update_arrives(make_adapted, load_in_4bit, has_bias):
    """Of an update of a thousandth of the product's size, peft's order loses most."""
    adapted = make_adapted(dtype="bfloat16", load_in_4bit=load_in_4bit)
    module = adapted.model.get_base_model().model.layers[0].mlp.gate_proj
    module.lora_B["default"].weight.data *= 1e-3
    base = module.base_layer
    weight = base.weight.data
    if load_in_4bit:
        weight = dequantize_4bit(weight, base.weight.quant_state)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((200, 64), generator=generator).bfloat16().to(weight.device)
    exact = x.double() @ weight.double().T
    if has_bias:
        bias = torch.randn(128, generator=generator).bfloat16().to(weight.device)
        base.bias = torch.nn.Parameter(bias, requires_grad=False)
        exact += bias.double()
    update = _update_of(module, x)
    with torch.no_grad():
        peft = module(x[None])[0]
        with adapted.engine.inference(adapted):
            together = module(x[None])[0]
            one_by_one = torch.cat([module(row[None, None])[0] for row in x])
    assert update.norm() / exact.norm() < 1e-3
    assert _arrived(peft, exact, update) < 0.5
    assert _arrived(together, exact, update) == pytest.approx(1, abs=0.2)
    assert _arrived(one_by_one, exact, update) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_small_update_arrives_in_the_decoder(make_adapted, load_in_4bit, is_cached):
    """Of any number of tokens, whether or not a 16-bit copy is read."""
    module = make_adapted(dtype="bfloat16", load_in_4bit=load_in_4bit).model
    module = module.get_base_model().model.layers[0].mlp.gate_proj
    module.lora_B["default"].weight.data *= 1e-3
    group = read_group([module], torch.bfloat16, trains=False)
    weights = DecodingWeights(group, torch.bfloat16)
    if is_cached:
        weights.cache()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((240, 64), generator=generator).bfloat16().to(module.weight.device)
    exact = x.double() @ weights._dequantize().double().T
    update = _update_of(module, x)
    for count in (1, 3, 240):
        with torch.no_grad():
            out = torch.cat([weights(rows) for rows in x.split(count)])
        assert _arrived(out, exact, update) == pytest.approx(1, abs=0.2)


def test_float32_answers_are_pefts_own(make_adapted, ids):
    adapted = make_adapted(dtype="float32")
    expected = _logits(adapted.model.eval(), ids)
    with adapted.engine.inference(adapted) as model:
        assert torch.equal(_logits(model, ids), expected)


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"bias": "all"}], ids=str)
def test_what_training_leaves_to_peft_is_left_to_peft(make_adapted, ids, adapter):
    adapted = make_adapted(dtype="bfloat16", **adapter)
    if adapter.get("bias"):
        for module in adapted.model.modules():
            if hasattr(module, "lora_A"):
                bias = torch.ones(module.out_features, dtype=torch.bfloat16)
                module.base_layer.bias = torch.nn.Parameter(bias.to(adapted.model.device))
    expected = _logits(adapted.model.eval(), ids)
    with adapted.engine.inference(adapted) as model:
        assert torch.equal(_logits(model, ids), expected)


def test_disabled_and_switched_adapters_are_honoured(make_adapted, ids):
    adapted = make_adapted(dtype="bfloat16")
    model = adapted.model.eval()
    with model.disable_adapter():
        base = _logits(model, ids)
    with adapted.engine.inference(adapted):
        adapter = _logits(model, ids)
        with model.disable_adapter():
            assert torch.equal(_logits(model, ids), base)
        assert not torch.equal(adapter, base)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.set_adapter("second")
        # A new adapter's B is zero.
        torch.testing.assert_close(_logits(model, ids), base, rtol=0, atol=0.05)
        model.set_adapter("default")
        assert torch.equal(_logits(model, ids), adapter)


def test_gradients_go_through_peft(make_adapted, ids):
    adapted = make_adapted(dtype="bfloat16")
    ids = ids.to(adapted.model.device)
    expected = adapted.model.eval()(input_ids=ids).logits
    with adapted.engine.inference(adapted) as model:
        out = model(input_ids=ids).logits
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_last_reader_puts_everything_back(make_adapted, ids):
    adapted = make_adapted(dtype="bfloat16")
    model = adapted.model
    expected = _logits(model.eval(), ids)
    before = _forwards(model)
    first = generate_stream(adapted, ids[0].tolist(), max_new_tokens=8)
    second = generate_stream(adapted, ids[0].tolist(), max_new_tokens=8)
    next(first)
    patched = _forwards(model)
    assert len(patched - before) == 14
    next(second)
    first.close()
    assert _forwards(model) == patched
    second.close()
    assert _forwards(model) == before
    with pytest.raises(RuntimeError, match="mine"), adapted.engine.inference(adapted):
        raise RuntimeError("mine")
    assert _forwards(model) == before
    assert torch.equal(_logits(model, ids), expected)


@pytest.mark.slow
def test_a_trained_model_answers_as_in_float32(smollm2, tmp_path):
    """SmolLM2 after a few steps: the loss on other rows is float32's, and peft's is not."""
    from qlora_kit import attach_lora, load_quantized, train_sft

    rows = [
        {"instruction": f"Say the number {n} politely.", "input": "", "output": f"Number {n}, sir!"}
        for n in range(40)
    ]
    live = attach_lora(load_quantized(smollm2, 64, "bfloat16", engine="native"))
    train_sft(live, rows[:32], max_steps=6, warmup_steps=2, output_dir=tmp_path)
    live.model.save_pretrained(tmp_path / "adapter")
    loaded = load_quantized(smollm2, 64, "float32", engine="native")
    wide = live.engine.attach_saved(loaded, tmp_path / "adapter", is_trainable=False)
    texts = [str(live.record.formatter.prompt(row["instruction"])) for row in rows[32:]]

    def measure(model):
        losses = []
        for text in texts:
            ids = torch.tensor([live.tokenizer(text)["input_ids"]])
            logits = _logits(model, ids)[0, :-1].cpu()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        return float(torch.stack(losses).mean())

    reference, peft = measure(wide.model.eval()), measure(live.model.eval())
    with live.engine.inference(live) as model:
        ours = measure(model)
    assert abs(ours - reference) < 0.3 * abs(peft - reference)
