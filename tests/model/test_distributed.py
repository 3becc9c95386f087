"""Training on two ranks (gloo, CPU): the gathered contrast equals the original's (docs/model.md, "Gather")."""

import functools
import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from conftest import OBJECTIVES, TOLERANCE, golden, golden_model, repo_class, training_batch

WORLD = 2


def modeling():
    """The module of the repository's training classes."""
    return sys.modules[repo_class("modeling_internvl.InternVLForPreTraining").__module__]


def losses_and_gradients(model, batch):
    output = model.train()(**batch)
    output.loss.backward()
    losses = torch.stack([output.loss, output.loss_itc, output.loss_itm]).detach()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


# --------------------------------------------------------------------------------------------------- jobs of a rank


def step(rank, objective, parallel):
    share = len(golden("tiny/inputs")["pixel_values"]) // WORLD
    model = golden_model(OBJECTIVES[objective])
    if parallel:
        model = DistributedDataParallel(model, find_unused_parameters=True)
    return losses_and_gradients(model, training_batch(objective, slice(rank * share, (rank + 1) * share)))


def weighted_sum_of_gathered(rank):
    """On rank r, the loss weights row i of all gathered rows with (r + 1) * 10^i."""
    local = torch.tensor([[1.0 + rank], [3.0 + rank]], requires_grad=True)
    gathered = modeling().GatherWithGradient.apply(local)
    weights = (rank + 1) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    (gathered * weights).sum().backward()
    return gathered.detach(), local.grad


def gathered_beside_a_sibling(rank):
    """The gradient of `sibling + gathered` is one tensor, which both sides receive, the gathered side first."""
    local, other = torch.ones(2, 1, requires_grad=True), torch.zeros(2 * WORLD, 1, requires_grad=True)
    sibling = other * 1.0
    gathered = modeling().GatherWithGradient.apply(local)
    ((sibling + gathered) * torch.arange(4.0).unsqueeze(1)).sum().backward()
    return local.grad, other.grad


def step_without_gradients_through_the_gather(rank):
    gather = modeling().GatherWithGradient
    original, gather.apply = gather.apply, modeling().gather
    try:
        return step(rank, "stage2", False)
    finally:
        gather.apply = original


JOBS = {
    "stage2": (step, "stage2", False),
    "retrieval": (step, "retrieval", False),
    "stage2-ddp": (step, "stage2", True),
    "retrieval-ddp": (step, "retrieval", True),
    "weighted": (weighted_sum_of_gathered,),
    "sibling": (gathered_beside_a_sibling,),
    "blocked": (step_without_gradients_through_the_gather,),
}


def work(rank, init_file, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=WORLD)
    try:
        results = {name: job(rank, *arguments) for name, (job, *arguments) in JOBS.items()}
        torch.save(results, os.path.join(folder, f"rank{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of every job on rank 0 and on rank 1. The processes start once, because starting takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    golden_model()  # the loader copies the code here, so that both ranks find it
    mp.spawn(work, (str(folder / "init"), str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.heavy
@pytest.mark.parametrize("parallel", ["", "-ddp"], ids=["averaged-here", "DistributedDataParallel"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_of_two_ranks(ranks, objective, parallel):
    (first_losses, first), (second_losses, second) = (results[objective + parallel] for results in ranks)
    expected = golden("tiny/expected_world2")
    assert_close(torch.stack([first_losses, second_losses]), expected[f"{objective}.losses_per_rank"], **TOLERANCE)
    names = [name.split(".grad.")[1] for name in expected if name.startswith(f"{objective}.grad.")]
    assert len(names) == 4
    for name in names:
        if parallel:  # DistributedDataParallel has already averaged
            assert_close(first[name], second[name], rtol=0, atol=0)
        average = (first[name] + second[name]) / WORLD
        assert_close(average, expected[f"{objective}.grad.{name}"], **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_every_tensor_of_two_ranks_is_covered():
    names = {tuple(name.split(".")[:2]) for name in golden("tiny/expected_world2")}
    assert names == {(objective, kind) for objective in OBJECTIVES for kind in ("losses_per_rank", "grad")}


@pytest.mark.heavy
def test_gather_concatenates_and_sums_the_ranks_gradients(ranks):
    (first, first_grad), (second, second_grad) = (results["weighted"] for results in ranks)
    assert first.tolist() == second.tolist() == [[1.0], [3.0], [2.0], [4.0]]
    # The weights of a row on both ranks: 1 + 2 times a power of ten.
    assert first_grad.tolist() == [[3.0], [30.0]]
    assert second_grad.tolist() == [[300.0], [3000.0]]


@pytest.mark.heavy
def test_gather_does_not_change_the_incoming_gradient(ranks):
    (first, other), (second, other_second) = (results["sibling"] for results in ranks)
    assert first.tolist() == [[0.0], [2.0]] and second.tolist() == [[4.0], [6.0]]
    assert other.tolist() == other_second.tolist() == [[0.0], [1.0], [2.0], [3.0]]


@pytest.mark.heavy
def test_without_gradients_through_the_gather_training_would_differ(ranks):
    for results in ranks:
        (losses, through), (blocked_losses, blocked) = results["stage2"], results["blocked"]
        assert_close(losses, blocked_losses, rtol=0, atol=0)
        difference = (through["text_projection"] - blocked["text_projection"]).abs().max()
        assert difference > 0.01 * through["text_projection"].abs().max()


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'init'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_single_rank_does_not_communicate(world_of_one, monkeypatch, objective):
    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, functools.partial(pytest.fail, f"{name} was called"))
    losses, gradients = losses_and_gradients(golden_model(OBJECTIVES[objective]), training_batch(objective))
    expected = golden("tiny/expected")
    assert_close(losses[0], expected[f"{objective}.loss"], **TOLERANCE)
    assert_close(gradients["query_tokens"], expected[f"{objective}.grad.query_tokens"], **TOLERANCE)


def test_gather_of_a_single_rank_returns_its_input(world_of_one):
    local = torch.randn(3, 2, requires_grad=True)
    gathered = modeling().GatherWithGradient.apply(local)
    assert_close(gathered, local, rtol=0, atol=0)
    weights = torch.randn(3, 2)
    (gathered * weights).sum().backward()
    assert_close(local.grad, weights, rtol=0, atol=0)


# -------------------------------------------------------------------------------- one rank, without a second process


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as the second of two ranks; it gathers its own tensors, negated, from the first."""
    summed = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", lambda parts, local: [parts[0].copy_(-local), parts[1].copy_(local)])
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: summed.append(gradient.shape) or gradient.mul_(2))
    return summed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_the_second_rank_follow_those_of_the_first(second_of_two, objective):
    model, embeds = golden_model(OBJECTIVES[objective]), torch.eye(3, 8)
    given = torch.ones(3)
    if objective == "retrieval":
        given = model._soft_targets(torch.tensor([1, 2, 3]), 3, embeds.device)
        assert given.tolist() == torch.eye(3, 6).roll(3, 1).tolist()
    loss = model._contrastive_loss(embeds.clone().requires_grad_(), embeds, given)
    scale = float(model.logit_scale.detach().exp())
    logits = torch.cat([-scale * torch.eye(3), scale * torch.eye(3)], dim=1)
    assert_close(loss.detach(), torch.nn.functional.cross_entropy(logits, torch.arange(3) + 3))


def test_gradients_through_the_gather_are_summed(second_of_two):
    local, weights = torch.ones(3, 2, requires_grad=True), torch.arange(12.0).view(6, 2)
    (modeling().GatherWithGradient.apply(local) * weights).sum().backward()
    assert second_of_two == [(6, 2)] and local.grad.tolist() == (2 * weights[3:]).tolist()
