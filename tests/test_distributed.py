"""Several processes give the result of one, send the reported bytes, and never continue with different parameters."""

import math
import os
import re
import signal
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from fgtrain.distributed import Ranks
from fgtrain.errors import ConfigError
from fgtrain.estimators import write_grads
from fgtrain.lightning import convert
from fgtrain.random import keyed_generator
from fgtrain.runs.starters import is_follower
from fgtrain.runs.world import plan
from tests import rank_jobs
from tests.commands import SWEEP_ON_TWO_PROCESSES, assert_every_other_job_failed, results_under, train
from tests.kills import PATIENCE, Started, lengthen_temporary, wait_for_ranks
from tests.rank_jobs import ESTIMATORS, MOMENTUM, SHARDABLE, STEPS, Data, fit, make, start

CPUS = ("trainer.accelerator=cpu", "trainer.devices=2")
STEP = ("trainer.max_steps=2", "callbacks=none")
STANDALONE = ("--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")

SCALARS = {"normal": 1, "projection": 2, "low_rank": 3, "clipped": 2, "spsa": 2, "mezo": 1}  # sent by each rank
SCALARS |= {"shrunk": 2, "shrunk_spsa": 2, "gauss_newton": 2 + 3, "forward_exact": 73}
EXCESS = {"shrunk": 2, "shrunk_spsa": 0}  # of normal numbers and of signs: s = (n - 1 + excess) / K
EXACT = ["backprop", "checkpointed", "local_guess", "local_backprop", "local_tail", "highway"]  # draw nothing
OWN_NOISE = ["activity", "second_order"]  # on every rank, whatever distributed.tangents says


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)], ids="{} processes".format
)
def trained(request, tmp_path_factory):
    return start(request.param, rank_jobs.train_all, tmp_path_factory.mktemp("ranks"))


def assert_close(weights, expected):
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-10, msg=name)


def one_process_all_directions(name, size):
    """Weights of a plain loop that evaluates every rank's directions on that rank's shard.

    Estimates shrunk by 1 / (1 + s) must be shrunk by 1 / (1 + s / R) instead, since the mean is over R K directions.
    """
    module, data = make(ESTIMATORS[name]()), Data(12)
    s = (sum(p.numel() for p in module.parameters()) - 1 + EXCESS.get(name, 0)) / 2
    divisor = size * (1 + s / size) / (1 + s) if name in EXCESS else size
    data.setup("fit")
    optimizer = module.make_optimizer(module.model.parameters())
    loader, step = data.train_dataloader(), 0
    while step < STEPS:
        for inputs, labels in loader:
            shards = zip(inputs.tensor_split(size), labels.tensor_split(size), strict=True)
            estimates = [
                module.estimator(
                    module.model,
                    lambda net, shard=shard: module.task.losses(net, shard),
                    generator=keyed_generator(0, step, 0, rank),
                )
                for rank, shard in enumerate(shards)
            ]
            write_grads(module.model, {n: sum(e.grads[n] for e in estimates) / divisor for n in estimates[0].grads})
            optimizer.step()
            step += 1
            if step == STEPS:
                break
    return module.model.state_dict()


@pytest.mark.parametrize("name", [*SCALARS, *EXACT])
def test_shared_equals_one_process_on_the_whole_batch(name, trained, tmp_path):
    alone = make(ESTIMATORS[name]())
    trainer = fit(alone, 12, tmp_path)
    weights, _, metrics = trained[0][name, "shared"]
    assert_close(weights, alone.model.state_dict() | alone.estimator.state_dict())
    for key in ("val/loss", "val/acc"):
        assert metrics[key] == pytest.approx(trainer.callback_metrics[key].item(), abs=1e-6)


@pytest.mark.parametrize("name", [*SCALARS, *OWN_NOISE])
def test_per_rank_equals_one_process_with_all_directions(name, trained):
    assert_close(trained[0][name, "per_rank"][0], one_process_all_directions(name, len(trained)))


def test_ranks_have_the_same_bits(trained):
    """Of the weights, and of what the estimators learn (feedback matrices, heads)."""
    first, *others = trained
    for run in first:
        for other in others:
            for name, value in first[run][0].items():
                assert torch.equal(value, other[run][0][name]), (run, name)


def test_traffic(trained):
    size = len(trained)
    for (name, _), (weights, sent, metrics) in trained[0].items():
        assert metrics["comm/bytes_per_step"] == pytest.approx(sent)
        if name in SCALARS:
            assert 0 < sent <= 8 * size * SCALARS[name]
        elif name in (
            "backprop",
            "checkpointed",
            "activity",
            "second_order",
        ):  # one bucket: the gradient, once around the ring
            assert sent == pytest.approx(2 * (size - 1) / size * sum(8 * w.numel() for w in weights.values()))


def test_traffic_does_not_depend_on_the_model(tmp_path):
    found = start(2, rank_jobs.traffic_of_widths, tmp_path)[0]
    assert found[5, "shared"] == found[50, "shared"] == 8 * 3
    assert found[5, "per_rank"] == found[50, "per_rank"] == 8 * 3


def test_a_batch_that_one_rank_cannot_use_is_skipped_by_all(tmp_path):
    first, second = start(2, rank_jobs.skipped, tmp_path)
    for name, (weights, skipped) in first.items():
        assert (skipped, second[name][1]) == (1, 1), name
        for key, value in weights.items():
            assert value.isfinite().all(), (name, key)
            assert torch.equal(value, second[name][0][key]), (name, key)


def test_ranks_that_use_other_parameters_share_all_gradients(tmp_path):
    for found, expected in start(2, rank_jobs.branches, tmp_path):
        assert len(expected) == 8  # without those of the third branch
        for method, grads in found.items():
            assert grads.keys() == expected.keys(), method
            for name, g in grads.items():
                tolerance = torch.finfo(torch.half).eps if method == "fp16" else 1e-12
                torch.testing.assert_close(g, expected[name], rtol=tolerance, atol=tolerance)


def test_a_loss_that_blows_up_ends_all_ranks(tmp_path):
    found = start(2, rank_jobs.blown_up, tmp_path)
    assert "DivergenceError" in found  # the other one may hear of it from the connection
    assert None not in found


def test_converted_module_on_two_processes(tmp_path):
    """One process on the whole batch; Lightning's own DDP and ours are the same."""
    first, second = start(2, rank_jobs.converted, tmp_path)
    for (strategy, name), weights in first.items():
        for key, value in weights.items():
            assert torch.equal(value, second[strategy, name][key]), (strategy, name, key)
            assert torch.equal(value, first["ddp", name][key]), (strategy, name, key)
        if name != "activity":  # whose noise is every rank's own
            alone = convert(rank_jobs.PlainModule(), ESTIMATORS[name]())
            fit(alone, 12, tmp_path)
            assert_close(weights, alone.state_dict())


def test_a_converted_module_on_two_processes_shares_its_buffers_as_plain_ones_do(tmp_path):
    """To rounding: DDP adds the gradients of accumulated batches in another order."""
    for plain, converted, plain_of_two, converted_of_two in start(2, rank_jobs.centred, tmp_path):
        assert_close(converted, plain)
        assert_close(converted_of_two, plain_of_two)


def test_ranks_that_disagree_are_stopped(tmp_path):
    for message in start(2, rank_jobs.drift, tmp_path):
        assert message is not None
        assert message.startswith("after step 4 parameter 1.block.1.weight of rank 1 differs from rank 0's")


def test_ranks_that_start_at_different_steps_are_stopped(tmp_path):
    for message in start(2, rank_jobs.ahead, tmp_path):
        assert message is not None
        assert message.startswith("the ranks start at steps [0, 3], so not from the same checkpoint")


@pytest.mark.slow
def test_waiting_has_an_end(tmp_path):
    message, _ = start(2, rank_jobs.stuck, tmp_path)
    assert re.match(r"rank 0 lost another rank in the middle of the run \(.*([Tt]imed out|closed)", message)


def test_buffers_are_rank_zeros(tmp_path):
    first, second = start(2, rank_jobs.buffers, tmp_path)
    assert torch.equal(first, second)


def test_replay_gives_the_gradients_back():
    module, data = make(ESTIMATORS["projection"]()), Data(12)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    estimate = module.estimator(
        module.model, lambda net: module.task.losses(net, batch), generator=keyed_generator(1, 2)
    )
    again = module.estimator.replay(module.model, estimate.directional_derivatives, keyed_generator(1, 2))
    for name, g in estimate.grads.items():
        assert torch.equal(g, again[name])


@pytest.mark.parametrize("name", SHARDABLE)
def test_sharded_equals_unsharded(name, tmp_path):
    passes = 2 if name == "forward_exact" else 1  # of its 73 numbers, 64 at a time
    alone = make(SHARDABLE[name](), optimizer=MOMENTUM)
    fit(alone, 12, tmp_path)
    found = start(2, rank_jobs.sharded, tmp_path, name)
    for run in found:
        assert_close(run["weights"], dict(alone.model.named_parameters()))
    first, second = (run["shapes"] for run in found)
    for name, p in alone.model.named_parameters():
        assert first[name][0] + second[name][0] == p.shape[0]
        assert first[name][0] < p.shape[0]
    assert [run["momenta"] for run in found] == [first, second]
    for run in found:  # three layers gathered once a pass, and nothing that belongs to gradients
        assert run["calls"]["c10d._allgather_base_"] == 3 * STEPS * passes
        assert not any("reduce_scatter" in call for call in run["calls"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "method=backprop",
            r"FSDP2 cannot train with Backprop\(\).*\(Replicas is trainer=ddp, .*method=fwdgrad\)\n",
        ),
        ("tangents=normal", r"FSDP2 cannot train with ForwardGradient\(tangents=Normal\(\)"),
        ("tangents=low_rank clip_grad_norm=1", r"sharded parameters take clip_grad_norm=null and distributed.tangents"),
    ],
)
def test_what_cannot_be_sharded(overrides, message, tmp_path):
    status, out, err = train(tmp_path, "trainer=fsdp2", *CPUS, *overrides.split())
    assert (status, out) == (2, "")
    assert re.search(rf"fgtrain: {message}", err)


@pytest.mark.slow
def test_sweep_of_runs_on_two_processes(tmp_path):
    methods = ("backprop", "fwdgrad")
    status, _, err = train(tmp_path, *SWEEP_ON_TWO_PROCESSES, f"method={','.join(methods)}")
    assert_every_other_job_failed(tmp_path, status, err, methods)


@pytest.mark.slow
def test_sweep_launched_by_submitit(tmp_path):
    run = Started(tmp_path, *SWEEP_ON_TWO_PROCESSES, "hydra/launcher=submitit_local")
    status = run.wait()
    assert_every_other_job_failed(tmp_path, status, run.err)


@pytest.mark.slow
def test_torchrun(tmp_path):
    run = Started(tmp_path, "trainer=ddp", "distributed.tangents=per_rank", *STEP, torchrun=STANDALONE)
    assert run.wait() == 0, run.err
    (results,) = results_under(tmp_path)
    assert (results["world_size"], results["comm/bytes_per_step"]) == (2, 4)
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    assert (tmp_path / "out.txt").read_text().count("results in") == 1


@pytest.mark.slow
def test_torchrun_resumes_by_the_same_command(tmp_path):
    command = ("hydra.run.dir=run", "trainer=ddp", "resume=auto")
    command += ("trainer.val_check_interval=5",)
    for steps in (10, 10, 20):  # begins, shows what is finished, goes on
        run = Started(tmp_path, *command, f"trainer.max_steps={steps}", torchrun=STANDALONE)
        assert run.wait() == 0, run.err
        (results,) = results_under(tmp_path)
        assert results["steps"] == steps


def descendants(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


@contextmanager
def training(folder, *overrides):
    """scripts/train.py on two processes that has taken some steps, and is ended with the test."""
    run = Started(folder, *CPUS, "hydra.run.dir=run", "callbacks.recovery.every_n_steps=10", *overrides)
    try:
        run.wait_for(folder / "run" / "checkpoints" / "last.ckpt")
        yield run
    finally:
        run.process.kill()
        run.wait()


START_METHODS = ["ddp", "ddp_spawn", "ddp_fork"]


@pytest.mark.slow
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_killed_rank_ends_the_run(start_method, tmp_path):
    with training(tmp_path, f"trainer={start_method}", "trainer.max_steps=1000000") as run:
        os.kill(max(descendants(run.session)), signal.SIGKILL)  # rank 1 is started last
        assert run.wait() == 2, run.err
        assert re.search(r"^fgtrain: rank 1 was ended by SIGKILL", run.err, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", START_METHODS)
def test_ranks_end_with_the_process_that_started_them(start_method, tmp_path):
    with training(tmp_path, f"trainer={start_method}", "trainer.max_steps=1000000") as run:
        started = descendants(run.session)
        assert len(started) >= 2
        run.process.kill()
        deadline = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{pid}").exists() for pid in started):
            assert time.monotonic() < deadline, "ranks go on without anybody"
            time.sleep(0.01)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "momentum"), [("ddp", 0.5), ("fsdp2", 0.5), ("fsdp2", 0.0)])
def test_sigterm_saves_and_resuming_is_exact(trainer, momentum, tmp_path):
    command = (*CPUS, "hydra.run.dir=run", "resume=auto", f"trainer={trainer}", "method=fwdgrad_lowrank", "lr=2")
    command += (f"optimizer.momentum={momentum}", "trainer.max_steps=60", "callbacks.recovery.every_n_steps=10")
    pause = ("+callbacks.pause._target_=tests.interrupted.AwaitSigterm", "+callbacks.pause.step=12")
    run = Started(tmp_path / "cut", *command, *pause, disturb=partial(wait_for_ranks, seconds=PATIENCE))
    run.wait_for(tmp_path / "cut" / "run" / "checkpoints" / "last.ckpt")
    os.kill(run.session, signal.SIGTERM)
    assert run.wait() == 143, run.err
    assert re.search(r"^fgtrain: stopped by SIGTERM after step [12]\d, saved in", run.err, re.MULTILINE), run.err
    weights = []
    for name in ("straight", "cut"):
        run = Started(tmp_path / name, *command)
        assert run.wait() == 0, run.err
        saved = tmp_path / name / "run" / "checkpoints" / "last.ckpt"
        weights.append(torch.load(saved, weights_only=True)["state_dict"])
    straight, resumed = weights
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_temporary_files_in_a_folder_whose_name_is_too_long_for_a_socket(tmp_path):
    run = Started(
        tmp_path, *CPUS, "trainer=ddp", "trainer.max_steps=2", "hydra.run.dir=run", disturb=lengthen_temporary
    )
    assert run.wait() == 0, run.err


TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}
TWO_NODES = TORCHRUN | {"WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("trainer", "environ", "size"),
    [
        ({}, {}, 1),
        ({"devices": 2}, {}, 2),
        ({"devices": [0, 1, 2]}, {}, 3),
        ({"devices": "0,1"}, {}, 2),
        ({"devices": "auto"}, TORCHRUN, 2),
        ({"devices": 2, "num_nodes": 2}, TWO_NODES, 4),
        ({"devices": "auto"}, TWO_NODES, 4),
        ({"devices": 2}, {"SLURM_NTASKS": "2"}, 2),
        ({"devices": "auto"}, {"SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, 4),
        ({"devices": 2}, {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, 2),
        ({"devices": 1}, {"SLURM_NTASKS": "1"}, 1),
    ],
)
def test_world(trainer, environ, size):
    assert plan({"accelerator": "cpu"} | trainer, environ).size == size


@pytest.mark.parametrize(
    ("trainer", "environ", "message"),
    [
        ({"devices": 1}, TORCHRUN, r"torchrun started 2 processes, but trainer.devices=1 .* asks for 1"),
        ({"devices": 2}, {"SLURM_NTASKS": "1"}, r"SLURM_NTASKS=1\) started 1 process, but .* asks for 2"),
        ({"devices": 2}, TWO_NODES, r"started 4 processes, but trainer.devices=2 x trainer.num_nodes=1 asks for 2"),
        ({"devices": 2, "num_nodes": 2}, {}, r"num_nodes=2 needs a start on every node; use torchrun --nnodes=2"),
        ({"strategy": "fsdp"}, {}, r"trainer.strategy=fsdp needs a backward pass"),
        ({"strategy": "deepspeed_stage_2"}, {}, r"trainer.strategy=deepspeed_stage_2 needs a backward pass"),
        ({"strategy": "fsdp2"}, {}, r"trainer=fsdp2 shards parameters over at least 2 devices"),
        ({"devices": "two"}, {}, r"trainer.devices must be a number above 0, a list of indices or auto, got 'two'"),
        ({"devices": []}, {}, r"trainer.devices must be a number above 0, a list of indices or auto, got \[\]"),
        ({"num_nodes": 0}, {}, r"trainer.num_nodes must be at least 1, got 0"),
    ],
)
def test_worlds_that_would_be_wrong(trainer, environ, message):
    with pytest.raises(ConfigError, match=message):
        plan({"accelerator": "cpu"} | trainer, environ)


def test_followers_leave_the_folder_to_rank_zero():
    assert is_follower(TORCHRUN)
    assert is_follower({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"})
    assert not is_follower(TORCHRUN | {"RANK": "0"})
    assert not is_follower({"RANK": "1"})


def test_one_process_sends_nothing():
    ranks = Ranks()
    assert ranks.size == 1
    assert math.isclose(ranks.bytes_sent, 0)
    assert ranks.gather(torch.ones(2))[0].tolist() == [1, 1]
