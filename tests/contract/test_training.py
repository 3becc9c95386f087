"""A training step: finite losses, gradients for the right parameters, gradient checkpointing, PEFT LoRA."""

import pytest
import torch

from conftest import OBJECTIVES, TOLERANCE, golden_model, switch_checkpointing, training_batch

pytestmark = pytest.mark.feature("training")
UNUSED = {"stage2": "clip_projector.", "retrieval": "qllama.lm_head."}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_reaches_every_parameter_of_the_objective(objective):
    model = golden_model(OBJECTIVES[objective]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = model(**training_batch(objective)).loss
    first.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith(UNUSED[objective])}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        if name in without:
            continue
        assert parameter.grad.isfinite().all(), name
        # A key's bias adds a constant to all scores of a query, which softmax ignores.
        assert name.endswith("cross_attn.k_bias") or parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert model(**training_batch(objective)).loss < first


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointing_changes_no_gradient_and_runs_layers_again(objective):
    gradients, runs = {}, {}
    for on in (True, False):
        model = golden_model(OBJECTIVES[objective]).train()
        switch_checkpointing(model, on)
        runs[on] = [0, 0]

        def count(kind, on=on):
            runs[on][kind] += 1

        for kind, layers in enumerate((model.vision_model.encoder.layers, model.qllama.model.layers)):
            layers[0].register_forward_pre_hook(lambda *_, kind=kind, count=count: count(kind))
        model(**training_batch(objective)).loss.backward()
        gradients[on] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert runs[True] == [2 * count for count in runs[False]] and min(runs[False]) > 0
    assert set(gradients[True]) == set(gradients[False])
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, **TOLERANCE)


def test_a_step_of_lora():
    peft = pytest.importorskip("peft")
    model = golden_model("InternVLForPreTraining").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    targets = ["attn.qkv", "self_attn.q_proj", "mlp.down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = wrapped(**training_batch()).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())
        optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    merged = wrapped.merge_and_unload().state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(merged[name], tensor)}
    assert set(merged) == set(before) and changed == {
        n for n in before if n.endswith(tuple(f"{t}.weight" for t in targets))
    }
