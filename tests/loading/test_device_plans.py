"""The model on several cards, and on one that is too small, without any: see tools/machines/simulate_devices.py."""

import random
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ROOT

pytest.importorskip("accelerate")

from benchmarks import measuring
from tools.machines import simulate_devices as sim

TINY = ROOT / "tiny"
PARAMETERS = 13_834_975_747
ROOMY = sim.Setup.parse("8x1")  # for the tiny model, whose activations outweigh its weights


@cache
def tiny_model() -> torch.nn.Module:
    return sim.empty_model(TINY)


def pieces(model: torch.nn.Module) -> list[str]:
    """The smallest parts of a plan: blocks that stay whole, other modules with weights, and the model's own tensors."""
    blocks = sim.blocks_of(model)
    outside = [name for name, _ in model.named_parameters() if not any(name.startswith(f"{b}.") for b in blocks)]
    return [*blocks, *{name.rpartition(".")[0] or name: None for name in outside}]


# ------------------------------------------------------------------------------------------------ other devices


class Float64Results(TorchDispatchMode):
    """Notes the operators that give float64, which Apple's devices do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            self.found.add(str(func))
        return result


@pytest.mark.parametrize("device", ["cuda:0", "xpu:0", "mps:0"])
def test_no_call_needs_one_kind_of_device(device, monkeypatch):
    """Every public method, with weights and inputs on devices that this torch has not even been built for."""
    monkeypatch.setattr(measuring, "CARD", device)
    model, batch = tiny_model.__wrapped__(), sim.Batch(texts=2, length=8, caption=8)
    with measuring.simulated_card(), Float64Results() as float64:
        measuring.put_on_a_card(model, torch.bfloat16)
        found = {call.name: sim.failure(call, device) for call in sim.public_calls(model, batch, device)}
    wrong = {name: problem for name, problem in found.items() if problem}
    if device == "mps:0":  # transformers' own greedy search asks torch for its build on Apple's devices
        assert set(wrong) <= {"generate, greedy", "generate, greedy, prompt"}
        assert all("not linked with support for mps" in problem for problem in wrong.values())
    else:
        assert not wrong
    assert not float64.found


# ------------------------------------------------------------------------------------------------ at full size


@cache
def simulated(name: str, inputs: str = "cuda:0") -> sim.Report:
    """The published sizes on a setup: 20 seconds, once, for all that is asked about it."""
    return sim.simulate(ROOT, sim.Setup.parse(name), inputs=inputs)


# The two that split the model most and least evenly are enough for every day.
@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", ["8x8", "24+8+8:sequential", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2x24", "4x12"))]
)
def test_the_14b_fits_and_runs_where_transformers_places_it(name):
    """Every public method; within budget, no block split, towers in one piece after the other."""
    report = simulated(name)
    assert report.failures == []
    assert sum(report.weights.values()) == 2 * PARAMETERS  # bfloat16
    assert all(report.weights[card] > 0 for card in range(len(report.setup.cards)))
    assert all(report.peak[f"cuda:{card}"] > report.weights[card] for card in range(len(report.setup.cards)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["24", "16", "12", "8"])
def test_the_14b_fits_a_single_card_with_the_rest_on_the_host(name):
    assert simulated(name).failures == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x24", "24+8+8:sequential", "12"])
def test_the_14b_returns_results_to_the_host_for_inputs_from_there(name):
    assert simulated(name, inputs="cpu").failures == []


def test_a_balanced_plan_leaves_an_uneven_machine_half_empty_and_a_sequential_one_does_not():
    """transformers' balance gives no card more than its share, so 24 + 8 + 8 GB need another strategy than "auto"."""
    model = sim.empty_model(ROOT)
    balanced = sim.plan(model, sim.Setup.parse("24+8+8"))
    assert "cpu" in balanced.values()
    assert "cpu" not in sim.plan(model, sim.Setup.parse("24+8+8:sequential")).values()


# -------------------------------------------------------------------------- wherever the pieces land, at tiny size


@pytest.mark.parametrize("seed, inputs", [(0, "cuda:0"), (1, "cuda:5"), (2, "cpu")])
def test_every_piece_may_be_on_any_card(seed, inputs):
    draw = random.Random(seed)
    device_map = {piece: draw.randrange(8) for piece in pieces(tiny_model())}
    failures = sim.simulate(TINY, ROOMY, inputs=inputs, device_map=device_map).failures
    assert [failure for failure in failures if "scattered" not in failure] == []


@pytest.mark.parametrize(
    "offloaded, inputs", [("vision_model", "cuda:0"), ("qllama", "cpu"), ("all but the first block", "cuda:0")]
)
def test_parts_may_wait_in_the_memory_of_the_host(offloaded, inputs):
    names = pieces(tiny_model())
    device_map = {piece: "cpu" if piece.startswith(offloaded) else 0 for piece in names}
    if offloaded == "all but the first block":
        device_map = dict.fromkeys(names, "cpu") | {names[0]: 0}
    report = sim.simulate(TINY, ROOMY, inputs=inputs, device_map=device_map)
    assert [failure for failure in report.failures if "scattered" not in failure] == []
    assert report.weights["cpu"] > 0


# --------------------------------------------------------------------------------------- the simulation has teeth


class WithoutSeams(TorchFunctionMode):
    """Takes every `.to(device)` out of the model's own code."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        is_model = any(room in caller for room in ("modeling_", "texts_internvl", "captions_internvl"))
        if func is torch.Tensor.to and is_model and isinstance(args[1], torch.device):
            return args[0]
        return func(*args, **(kwargs or {}))


def test_a_model_without_seams_fails(monkeypatch):
    def failure(call: sim.Call, inputs: str) -> str | None:
        with WithoutSeams():
            return original(call, inputs)

    original = sim.failure
    monkeypatch.setattr(sim, "failure", failure)
    cards = {piece: number % 8 for number, piece in enumerate(pieces(tiny_model()))} | {"qllama.model.norm": 3}
    failures = sim.simulate(TINY, ROOMY, device_map=cards).failures
    for method in ("forward, InternVL-C", "encode_image, InternVL-G", "encode_text", "match", "generate, beams"):
        assert [failure for failure in failures if failure.startswith(f"{method}: ") and " devices" in failure]


def test_a_result_that_stays_where_it_was_computed_is_noticed():
    call = sim.Call("any", lambda: torch.empty(2, device="cuda:1"), [(2,)])
    with sim.simulated_machine():
        assert sim.failure(call, "cuda:0") == "result on ['cuda:1'], inputs on cuda:0"
        assert sim.failure(call, "cuda:1") is None
        assert "shapes [(2,)]" in sim.failure(sim.Call("any", call.run, [(3,)]), "cuda:1")


MIXTURES = {
    "sum": lambda a, b, ids: a + b,
    "product": lambda a, b, ids: a @ b,
    "concatenation": lambda a, b, ids: torch.cat([a, b]),
    "embedding": lambda a, b, ids: torch.nn.functional.embedding(ids, b),
    "index": lambda a, b, ids: b[ids],
    "convolution": lambda a, b, ids: torch.nn.functional.conv2d(a[None, None], b[None, None]),
    "norm": lambda a, b, ids: torch.nn.functional.rms_norm(a, (4,), b[0]),
    "attention": lambda a, b, ids: torch.nn.functional.scaled_dot_product_attention(a[None], a[None], b[None]),
}


@pytest.mark.parametrize("other", ["cuda:1", "cpu", "meta"])
@pytest.mark.parametrize("operation", MIXTURES)
def test_mixing_devices_raises_what_real_ones_raise(operation, other):
    with sim.simulated_machine():
        a, b, ids = (
            torch.empty(4, 4, device="cuda:0"),
            torch.empty(4, 4, device=other),
            torch.arange(2, device="cuda:0"),
        )
        assert MIXTURES[operation](a, a, ids).device == torch.device("cuda:0")
        with pytest.raises(RuntimeError, match="device|meta"):
            MIXTURES[operation](a, b, ids)


def test_indexing_has_the_shapes_of_real_indexing():
    real = torch.empty(5, 6, 7)
    ids = [0, 2, 4]
    cases = [
        lambda t, i: t[0], lambda t, i: t[-1, 2:], lambda t, i: t[:, None], lambda t, i: t[..., :3], lambda t, i: t[i],
        lambda t, i: t[None, ..., 0], lambda t, i: t[i, i], lambda t, i: t[:, i, 1:3], lambda t, i: t[::2, :, -1],
    ]  # fmt: skip
    wanted = [case(real, torch.tensor(ids)).shape for case in cases]
    with sim.simulated_machine():
        fake = torch.empty(5, 6, 7, device="cuda:1")
        assert [case(fake, torch.tensor(ids, device="cuda:1")).shape for case in cases] == wanted


def test_memory_is_counted_while_it_lives():
    with sim.simulated_machine() as meter:
        kept = torch.empty(250, device="cuda:0")
        view = kept[:100]
        del kept
        for _ in range(3):
            torch.empty(500, device="cuda:0")
        assert (meter.alive["cuda:0"], meter.peak["cuda:0"]) == (1000, 3000)
        meter.restart()
        assert meter.peak["cuda:0"] == 1000
        del view
        assert meter.alive["cuda:0"] == 0


def test_bad_plans_are_noticed():
    model = tiny_model()
    cards = dict.fromkeys(pieces(model), 0)
    split = {name: 0 for name, _ in model.named_parameters()} | {"qllama.model.layers.1.mlp.up_proj.weight": 1}
    assert sim.split_blocks(model, cards) == []
    assert sim.split_blocks(model, split) == ["qllama.model.layers.1"]
    assert sim.scattered_towers(model, cards | {"qllama.model.layers.3": "cpu"}) == []
    assert sim.scattered_towers(model, cards | {"vision_model.encoder.layers.1": 1}) == ["vision tower"]
    small = sim.simulate(TINY, sim.Setup.parse("1+0.001"), device_map=cards | {"qllama.lm_head": 1})
    assert [failure.split(" GB")[0] for failure in small.failures] == ["cuda:1 needs 0.00"]


# ------------------------------------------------------------------------------------------------------ the table


def test_setups_are_read_from_their_names():
    assert sim.Setup.parse("2x24").max_memory == {0: 24 * sim.GB, 1: 24 * sim.GB, "cpu": sim.HOST_MEMORY}
    assert sim.Setup.parse("0.5").max_memory[0] == 450_000_000  # transformers leaves a tenth of a single card
    uneven = sim.Setup.parse("24+8:sequential")
    assert (uneven.cards, uneven.strategy) == ((24 * sim.GB, 8 * sim.GB), "sequential")


def test_the_table_names_every_part_of_the_model():
    report = sim.simulate(TINY, sim.Setup.parse("2x0.5"))
    table = report.table()
    assert 'device_map="auto", max_memory={0: 0.5e9, 1: 0.5e9, "cpu": 64e9}' in table
    assert table.count("\n| ") == 3 and "FAILED" not in table
    assert sim.abbreviated(["a", "b.0", "b.1", "b.2", "c.4.d", "b.4"]) == ["`a`", "`b.0-2`", "`c.4.d`", "`b.4`"]
