"""The undocumented parts of PyTorch and Lightning that fgtrain uses; a release that changes one fails here by name."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torchmetrics
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.compile import from_compiled
from torch import Tensor, nn
from torch._C import _autograd
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fgtrain import Backprop, _torch
from fgtrain.lightning._lightning import (
    SET_FIRST,
    Counters,
    compiler_of,
    configure_optimizers,
    current_hook,
    last_result,
    raise_limits,
    set_last_result,
)
from tests.small import Small, make, trainer

PACKAGE = Path(_torch.__file__).parent


class Override(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "asked"


def override():
    return torch.ones(2).as_subclass(Override)


def test_plain_tensors_asks_nobody():
    x = override()
    assert torch.sin(x) == "asked"
    with _torch.plain_tensors():
        assert isinstance(torch.sin(x), Tensor)
        with _torch.overrides_of_tensors():
            assert torch.sin(x) == "asked"


def test_frames_of_an_error_do_not_change_the_dispatcher_later():
    def fails():
        guard = torch._C._DisableFuncTorch()  # as in the repr of a tensor
        raise RuntimeError("inside", type(guard))

    before, key = str(torch._C._dispatch_tls_local_exclude_set()), torch._C.DispatchKey.AutogradCPU
    with (
        pytest.raises(RuntimeError, match="inside") as found,
        torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)),
    ):
        fails()
    _torch.release_frames(found.value)
    assert str(torch._C._dispatch_tls_local_exclude_set()) == before


def test_custom_function_call_is_seen_by_modes():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, *tangents):
            return 2 * tangents[0]

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.func.jvp(Doubled.apply, (torch.ones(2),), (torch.ones(2),))
    assert _torch.custom_function_call in seen


def test_outside_transforms_random_numbers_are_allowed():
    def noisy(x):
        with _torch.outside_transforms():
            assert torch.rand(2).shape == (2,)
        return 2 * x

    assert torch.equal(torch.vmap(noisy)(torch.ones(3)), torch.full((3,), 2.0))


def test_without_tangents():
    with fwAD.dual_level():
        x = fwAD.make_dual(torch.ones(2), torch.ones(2))
        with _torch.without_tangents():
            assert fwAD.unpack_dual(x.sin()).tangent is None
        assert fwAD.unpack_dual(x.sin()).tangent is not None


def test_no_overrides_asks_neither_subclasses_nor_modes():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return "asked"

    x = override()
    with Mode():
        assert torch.sin(x) == "asked"
        with _torch.no_overrides():
            assert isinstance(torch.sin(x), Tensor)


def test_no_torch_function():
    quiet = type("Quiet", (Tensor,), {"__torch_function__": _torch.no_torch_function})
    assert isinstance(torch.sin(torch.ones(2).as_subclass(quiet)), Tensor)


def test_set_grad_enabled():
    _torch.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        _torch.set_grad_enabled(True)


def test_is_inside_transform():
    found = []
    torch.func.vmap(lambda x: found.append(_torch.is_inside_transform(x)) or x)(torch.ones(2))
    assert found == [True]
    assert not _torch.is_inside_transform(torch.ones(2))


def test_owners_have_the_functions_written_in_cpp():
    assert any(hasattr(owner, "gelu") for owner in _torch.FUNCTION_OWNERS)


def test_setting_data_is_what_an_override_is_given():
    seen = []

    class Noting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch.ones(2).as_subclass(Noting).data = torch.zeros(2)
    assert _torch.SET_DATA in seen


def test_requires_grad_and_data_are_what_an_override_is_given():
    class Noting(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return [func == _torch.REQUIRES_GRAD, func == _torch.DATA]

    assert torch.ones(2).as_subclass(Noting).requires_grad == [True, False]
    assert torch.ones(2).as_subclass(Noting).data == [False, True]


def test_safe_softmax_of_masked_rows():
    assert torch.equal(_torch.safe_softmax(torch.full((1, 2), -torch.inf), -1), torch.zeros(1, 2))


def test_gamma():
    concentration = torch.tensor([2.0])
    sample = _torch.standard_gamma(concentration, torch.Generator().manual_seed(0))
    assert _torch.standard_gamma_grad(concentration, sample).item() > 0


def test_packing_is_undone():
    numbers, lengths = torch.arange(6.0).view(3, 2, 1), torch.tensor([3, 2])
    rows, sizes = _torch.pack_padded_sequence(numbers, lengths, False)
    again, found = _torch.pad_packed_sequence(rows, sizes, False, -1.0, 3)
    assert torch.equal(found, lengths)
    assert torch.equal(again[:2], numbers[:2])


def test_batch_and_instance_norms_have_one_base():
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d):
        assert issubclass(norm, _torch.BatchOrInstanceNorm)


def test_many_at_once():
    (norm,), copies = _torch.foreach_norm([torch.tensor([3.0, 4.0])], 2), [torch.zeros(1)]
    _torch.foreach_copy(copies, [torch.ones(1)])
    assert norm.item() == 5
    assert copies[0].item() == 1


def test_hooks_of_a_parameter():
    p = nn.Parameter(torch.ones(1))
    for i, register in enumerate((p.register_hook, p.register_post_accumulate_grad_hook)):
        assert not any(_torch.gradient_hooks(p))
        hook = register(lambda _: None)
        assert [bool(hooks) for hooks in _torch.gradient_hooks(p)] == [i == 0, i == 1]
        hook.remove()
    assert not any(_torch.gradient_hooks(p))


def test_backward_hooks_of_a_module():
    module = nn.Linear(1, 1)
    everywhere = nn.modules.module
    for i, (register, register_everywhere) in enumerate(
        (
            (module.register_full_backward_hook, everywhere.register_module_full_backward_hook),
            (module.register_full_backward_pre_hook, everywhere.register_module_full_backward_pre_hook),
        )
    ):
        for found, hook in (
            (_torch.backward_hooks(module), register(lambda *_: None)),
            (_torch.GLOBAL_BACKWARD_HOOKS, register_everywhere(lambda *_: None)),
        ):
            assert [bool(hooks) for hooks in found] == [i == 0, i == 1]
            hook.remove()
            assert not any(found)


def test_trees():
    leaves, spec = _torch.tree_flatten({"a": [1, 2]})
    assert _torch.tree_leaves({"a": [1, 2]}) == leaves == [1, 2]
    assert _torch.tree_unflatten(leaves, spec) == _torch.tree_map(lambda x: x, {"a": [1, 2]})
    assert _torch.tree_map_only(int, str, ("a", 1)) == ("a", "1")


def test_dispatch_mode_sees_operations():
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).sin()
    assert torch.ops.aten.sin.default in seen


@pytest.mark.slow
def test_is_compiled():
    model = nn.Linear(1, 1)
    assert not _torch.is_compiled(model)
    wrapped: Any = torch.compile(nn.Linear(1, 1))
    assert _torch.is_compiled(wrapped)
    model.compile()
    assert _torch.is_compiled(model)
    with _torch.eager_functions():
        assert not _torch.is_compiled(model)


def test_is_compiled_function():
    assert _torch.is_compiled_function(torch.compile(torch.sin))
    assert not _torch.is_compiled_function(torch.sin)


def test_compiler_of_a_module_that_lightning_has_unwrapped():
    module = make(Backprop())
    assert compiler_of(module) is None
    from_compiled(torch.compile(module))
    compiler = compiler_of(module)
    assert compiler is not None
    assert _torch.is_compiled_function(compiler(torch.sin))


def _stops(*_):
    raise RuntimeError("stops")


def test_the_hook_that_runs_is_known(tmp_path):
    module, seen = make(Backprop()), set()
    look = lambda *_: seen.add(current_hook(module))
    look()
    step = module.training_step
    module.training_step = lambda *args: look() or step(*args)
    trainer(tmp_path, LambdaCallback(on_train_batch_end=look), max_steps=2).fit(module, Small())
    assert seen == {None, "training_step", "on_train_batch_end"}
    with pytest.raises(RuntimeError, match="stops"):
        trainer(tmp_path, LambdaCallback(on_train_batch_end=_stops)).fit(module, Small())
    assert current_hook(module) is None


def test_the_default_group_takes_another_deadline():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _torch.set_group_timeout(timedelta(seconds=5))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_graphs_are_compiled_as_they_are():
    graph = torch.fx.symbolic_trace(lambda x: x.sin() + 1)
    x = torch.ones(3)
    with _torch.no_fake_tensor_cache():
        compiled = _torch.compile_graph(graph, [x], {"fallback_random": True})
    torch.testing.assert_close(compiled(x), [x.sin() + 1] if isinstance(compiled(x), (list, tuple)) else x.sin() + 1)


def test_optimizers_of_lightning():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    assert configure_optimizers(optimizer)[0] == [optimizer]


@pytest.mark.parametrize(
    "change",
    [lambda m: m(torch.ones(1)), lambda m: m.update(torch.ones(1)), lambda m: m.compute(), lambda m: m.reset()],
)
def test_changes_of_a_metric_begin_with_one_attribute(change, monkeypatch):
    metric = torchmetrics.MeanMetric()
    metric.update(torch.zeros(1))
    set_by, keep = [], torchmetrics.Metric.__setattr__
    monkeypatch.setattr(torchmetrics.Metric, "__setattr__", lambda m, *item: set_by.append(item[0]) or keep(m, *item))
    change(metric)
    states = {"mean_value", "weight", *SET_FIRST}
    assert next(name for name in set_by if name in states) in SET_FIRST


def test_the_last_result_of_a_metric():
    metric = torchmetrics.MeanMetric()
    assert metric(torch.ones(1)) == last_result(metric) == 1
    set_last_result(metric, 2)
    assert last_result(metric) == 2
    metric.reset()
    assert last_result(metric) is None


def test_a_ban_on_hooks_is_undone():
    with _torch.saved_tensor_hooks_as_they_were():
        _autograd._saved_tensors_hooks_disable("banned here")
    x = torch.ones(1, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()  # needs the hooks
    assert x.grad is not None


def test_reentrant_checkpoints_are_replaced_in_one_thread():
    x = torch.ones(1, requires_grad=True)

    def node():
        return type(checkpoint(torch.sin, x, use_reentrant=True).grad_fn).__name__

    with _torch.reentrant_checkpoints_replaced(), ThreadPoolExecutor(1) as pool:
        assert (node(), pool.submit(node).result()) == ("SinBackward0", "CheckpointFunctionBackward")
    assert node() == "CheckpointFunctionBackward"


CHANGED = f"Lightning {version('lightning')} has changed"


def fit_state(run):
    return run.fit_loop.state_dict()


@pytest.mark.parametrize("limits", [{"max_steps": 4}, {"max_epochs": 2}], ids=str)
def test_limits_can_be_raised(limits, tmp_path):
    """At the start of training, by one."""
    started = LambdaCallback(
        on_train_start=lambda run, _: raise_limits(run, "max_steps" in limits, "max_epochs" in limits)
    )
    run = trainer(tmp_path, started, **limits)
    run.fit(make(Backprop()), Small())
    assert run.global_step == (5 if "max_steps" in limits else 15), f"{CHANGED} where the limits of a run are"
    assert (run.max_steps, run.max_epochs) in [(5, -1), (-1, 3)]


def test_counters_are_those_of_the_run(tmp_path):
    """After three steps of the second epoch, each read in three hooks."""
    seen = []

    def look(run, *_):
        seen.append(Counters.of(fit_state(run)))

    hooks = {"on_train_batch_end": look, "on_validation_end": look, "on_train_epoch_end": look}
    run = trainer(tmp_path, LambdaCallback(**hooks), max_steps=8, num_sanity_val_steps=0)
    run.fit(make(Backprop()), Small())
    assert seen[-4:] == [
        Counters(1, True, 1, 6, False, False),
        Counters(1, True, 2, 7, False, False),
        Counters(1, True, 3, 8, False, False),
        Counters(2, False, 3, 8, False),
    ], CHANGED


@pytest.mark.parametrize(
    "state", [Counters(2, False, 0, 10, False), Counters(1, True, 3, 8, False), Counters(0, True, 5, 5, True, False)]
)
def test_counters_that_are_written_can_be_read(state, tmp_path):
    """In the layout of this release's checkpoints, with a place for everything."""
    fit = fit_state(trainer(tmp_path))
    names = set(fit)
    state.write(fit, 7)
    assert set(fit) == names, f"{CHANGED} the layout of a checkpoint"
    assert Counters.of(fit)[:5] == state[:5]
    fresh = fit_state(trainer(tmp_path))
    assert fresh["epoch_loop.state_dict"].keys() == fit["epoch_loop.state_dict"].keys(), (
        f"{CHANGED} the steps of its logs"
    )
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        for part in ("current", "total"):
            assert fresh[name][part].keys() == fit[name][part].keys(), f"{CHANGED} the counters of {name}"


@pytest.mark.parametrize(
    ("state", "stages"),
    [
        (Counters(2, False, 0, 10, False), {"restarted_on_epoch_start", "restarted_on_last"}),
        (Counters(1, True, 3, 8, False), {"restarted_mid_epoch", "restarted_on_last"}),
        (
            Counters(0, True, 5, 5, True, False),
            {"restarted_mid_epoch", "restarted_on_last", "restarted_mid_evaluation"},
        ),
    ],
    ids=["before an epoch", "in an epoch", "before a validation"],
)
def test_states_are_taken_for_what_they_are(state, stages, tmp_path):
    run = trainer(tmp_path, max_epochs=4)
    fit = fit_state(run)
    state.write(fit, state.total)
    run.fit_loop.load_state_dict(fit)
    run.fit_loop.update_restart_stage()
    loops = (run.fit_loop, run.fit_loop.epoch_loop, run.fit_loop.epoch_loop.val_loop)
    found = {n for loop in loops for n in dir(loop) if n.startswith(("restarted_", "resumed_")) and getattr(loop, n)}
    assert found == stages, f"{CHANGED} what it makes of the counters"


PRIVATE = re.compile(
    r"torch\.(?:\w+\.)*_[a-zA-Z]\w*|from torch\S*\._\w+ import"
    r"|(?<!fgtrain\.)lightning\.(?:\w+\.)*_\w+|import _[a-zA-Z]\w+"
)


@pytest.mark.parametrize(
    "file", [p for p in PACKAGE.rglob("*.py") if p.name not in ("_torch.py", "_lightning.py")], ids=lambda p: p.stem
)
def test_private_names_stand_in_two_files(file):
    code = re.sub(r"#.*", "", re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL))
    found = [name for name in PRIVATE.findall(code) if "_make_wrapper_subclass" not in name]  # PyTorch's notes name it
    assert not found
