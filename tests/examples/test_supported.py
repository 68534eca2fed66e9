"""Every drop-in trains under autocast, torch.compile, DDP, torch.func and checkpointing: docs/supported.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.examples.drop_ins import CASES, ROWS, each_drop_in, flat, gradients, make, with_weights

EVERY = slice(0, ROWS)


def same(found: tuple[float, Tensor], expected: tuple[float, Tensor], tolerance: float) -> None:
    """The loss, and the gradient as a whole, up to a relative error."""
    assert abs(found[0] - expected[0]) <= tolerance * max(abs(expected[0]), 0.1), (found[0], expected[0])
    assert expected[1].norm() > 0
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()


@each_drop_in
def test_checkpointing(name: str, penalty: str) -> None:
    module, rows = make(name, penalty)
    plain = gradients(module, lambda: module(*rows(EVERY)))
    found = gradients(module, lambda: checkpoint(module, *rows(EVERY), use_reentrant=False))
    same(found, plain, 1e-6)


@each_drop_in
def test_autocast(name: str, penalty: str) -> None:
    """Bfloat16 products: the gradient points where it pointed."""
    module, rows = make(name, penalty)
    plain = gradients(module, lambda: module(*rows(EVERY)))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(*rows(EVERY))

    same(gradients(module, loss), plain, 0.1)


@each_drop_in
def test_torch_func(name: str, penalty: str) -> None:
    """grad over other weights, and the losses of two agents at once by vmap with the same noise."""
    module, rows = make(name, penalty)
    plain = gradients(module, lambda: module(*rows(EVERY)))
    weights = {key: p.detach() for key, p in module.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return with_weights(module, weights, rows(EVERY))

    torch.manual_seed(1)
    grads, value = grad_and_value(loss)(weights)
    same((value.item(), flat(list(grads.values()))), plain, 1e-5)

    torch.manual_seed(1)
    stacked = {key: torch.stack([weight, 1.1 * weight]) for key, weight in weights.items()}
    grads, values = vmap(grad_and_value(loss), randomness="same")(stacked)
    same((values[0].item(), flat([grad[0] for grad in grads.values()])), plain, 1e-5)
    assert values[1] != values[0]


@pytest.mark.long("traces each drop-in")
@pytest.mark.parametrize(("name", "penalty"), [case for case in CASES if case[0] != "torchrl_fql"])
def test_compile(name: str, penalty: str) -> None:
    """Traced forwards and backwards; PyTorch runs the graphs."""
    module, rows = make(name, penalty)
    plain = gradients(module, lambda: module(*rows(EVERY)))
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    same(gradients(module, lambda: compiled(*rows(EVERY))), plain, 1e-5)


@pytest.mark.long("imports TorchRL, which takes seconds, and traces its loss")
@pytest.mark.parametrize("penalty", ["fisher", "pullback"])
def test_compile_the_actor_loss_of_torchrl(penalty: str) -> None:
    total, rows = make("torchrl_fql", penalty)
    weights, found = total.agent.actor_network_params, []
    torch._dynamo.reset()
    for loss in (total.agent.actor_loss, torch.compile(total.agent.actor_loss, backend="aot_eager")):
        torch.manual_seed(1)
        value = loss(*rows(EVERY))
        found.append((value.item(), flat(list(torch.autograd.grad(value, list(weights.parameters()))))))
    same(found[1], found[0], 1e-5)


@pytest.mark.long("compiles C++")
@pytest.mark.parametrize("name", ["corl", "robot_chunks"])
def test_compile_by_inductor(name: str) -> None:
    module, rows = make(name, "fisher")
    plain = gradients(module, lambda: module(*rows(EVERY)))
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):  # the numbers that eager PyTorch draws
        compiled = torch.compile(module)
        same(gradients(module, lambda: compiled(*rows(EVERY))), plain, 1e-4)


def half(name: str, penalty: str, rank: int) -> tuple[nn.Module, tuple[object, ...]]:
    """The module and one process's rows. Each process draws different noise."""
    module, rows = make(name, penalty)
    return module, rows(slice(rank * ROWS // 2, (rank + 1) * ROWS // 2))


def one_process(rank: int, folder: str) -> None:
    """Backward of DDP for every drop-in; writes what each process holds afterwards."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, penalty in CASES:
        module, args = half(name, penalty, rank)
        parallel = DistributedDataParallel(module)
        _, found = gradients(module, lambda parallel=parallel, args=args: parallel(*args), seed=rank)
        torch.save(found, f"{folder}/{name}-{penalty}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(one_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.long("starts two processes")
@each_drop_in
def test_ddp(name: str, penalty: str, two_processes: Path) -> None:
    """Both processes hold the mean of the gradients that each would have found alone."""
    alone = []
    for rank in range(2):
        module, args = half(name, penalty, rank)
        _, gradient = gradients(module, lambda module=module, args=args: module(*args), seed=rank)
        alone.append(gradient)
    expected = (alone[0] + alone[1]) / 2
    assert (alone[0] - alone[1]).norm() > 1e-3 * expected.norm()
    for rank in range(2):
        found = torch.load(two_processes / f"{name}-{penalty}-{rank}.pt")
        assert (found - expected).norm() <= 1e-5 * expected.norm()
