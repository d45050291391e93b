"""The jobs of the processes in tests/test_exchange.py."""

import torch
import torch.distributed as dist
from torch import nn

from fgtrain import Backprop, ForwardGradient
from fgtrain.distributed import Ranks
from fgtrain.errors import ConfigError, DivergenceError
from fgtrain.lightning.callbacks import RankCheck
from fgtrain.lightning.exchange import exchange_of
from fgtrain.lightning.strategy import Replicas
from tests.rank_jobs import fit, make

CALLS = 60


def gradients_of(rank):
    """A matrix of rank 6 and a vector, other ones on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "weight": torch.randn(24, 6, generator=generator) @ torch.randn(6, 30, generator=generator),
        "bias": torch.randn(24, generator=generator),
    }


def exchanged(folder):
    """What each exchange makes of constant gradients, with the bytes of every call; and what it refuses."""
    found = {}
    model = nn.Linear(30, 24)
    for name in ("fp16", "power_sgd"):
        ranks = Ranks()
        exchange = exchange_of(name, Backprop(), model, ranks)
        assert exchange is not None
        calls, sent = [], []
        for _ in range(CALLS):
            calls.append(exchange(gradients_of(ranks.rank)))
            sent.append(ranks.bytes_sent)
        found[name] = calls, sent
    try:
        exchange_of("fp16", ForwardGradient(), model, ranks)
    except ConfigError as error:
        found["refused"] = str(error)
    local = exchange_of("local", Backprop(), model, ranks)
    assert local is not None
    try:
        local({"weight": torch.tensor([1.0, float("nan")])})
    except DivergenceError as error:
        found["not finite"] = str(error)
    found["untouched"] = all(p.grad is None for p in model.parameters())
    return found


def trained(folder):
    """{(gradients, local_steps): weights and bytes per step} after six steps."""
    found = {}
    for gradients, local_steps in (("mean", 1), ("local", 1), ("local", 3), ("fp16", 1)):
        check = RankCheck(check_every_n_steps=0)
        module = make(Backprop(), distributed_gradients=gradients, local_steps=local_steps)
        fit(module, 12 // dist.get_world_size(), folder, check, devices=2, strategy=Replicas())
        found[gradients, local_steps] = module.model.state_dict(), check.bytes_per_step
    return found
