"""The configuration of a run, checked before anything is built.

`TrainConfig` types the keys of the top level. The nodes of the groups mirror constructors: the signature of a node's
`_target_` determines its arguments and their types, for fgtrain's classes and for the user's own.
"""

import inspect
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from fgtrain.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration files: in the package where it is installed, beside it in a checkout."""


@dataclass
class DistributedConfig:
    """Settings for several processes, see `fgtrain.distributed`; a single process ignores them.

    Args:
        tangents: "shared" for the same directions on all ranks, "per_rank" for directions of its own on each.
        check_every_n_steps: optimizer steps between two checks that all ranks have the same parameters; 0 for none.
        timeout_seconds: how long a rank waits for the others within a step before it gives up.
        gradients: what ranks send of exact gradients, see `fgtrain.lightning.exchange`.
        local_steps: optimizer steps after which the weights are averaged, with gradients=local.
    """

    tangents: str = "shared"
    check_every_n_steps: int = 1000
    timeout_seconds: float = 60.0
    gradients: str = "mean"
    local_steps: int = 16


@dataclass
class TrainConfig:
    """Top-level keys of a training run; the groups are nodes with a `_target_`.

    Args:
        seed: seed of the initialisation, data order and directions.
        lr: learning rate; each method brings its own.
        accumulate_grad_batches: batches averaged into one optimizer step.
        clip_grad_norm: largest norm of the gradient; null for none.
        shrinkage: shorten estimates by their variance, so that good learning rates hardly depend on the model and K,
            see fgtrain.tangents.combine.Shrinkage and each method.
        rowwise: loss i depends only on row i of every parameter (a starting point of a function).
        max_skipped_steps: end the run after this many batches in a row with a non-finite loss, derivative or gradient.
        max_skipped_share: end it also if a larger share of all batches was skipped; null for no limit.
        detect_divergence: end it also if the loss stays above this multiple of its lowest value so far for
            max_skipped_steps steps; null for no limit.
        compile: pass the model through torch.compile, see fgtrain.network.compilation.
        self_check: try the method on the first batch before training, see fgtrain.self_check.
        resume: where to continue: a checkpoint, the folder of a run, or auto for the run in run_dir, if any.
        run_dir: folder of the run.
        distributed: settings for several processes.
        quiet: print only errors.
    """

    seed: int = 42
    lr: float = MISSING
    accumulate_grad_batches: int = 1
    clip_grad_norm: float | None = None
    shrinkage: bool = True
    rowwise: bool = False
    max_skipped_steps: int = 10
    max_skipped_share: float | None = 0.1
    detect_divergence: float | None = None
    compile: bool = False
    self_check: bool = True
    resume: str | None = None
    run_dir: str = MISSING
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    quiet: bool = False
    method: Any = None
    tangents: Any = None
    task: Any = None
    data: Any = None
    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    trainer: Any = None
    logger: Any = None
    callbacks: Any = None


ConfigStore.instance().store(name="schema", node=TrainConfig)
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True)  # for simultaneous starts
OmegaConf.register_new_resolver("method_name", lambda _root_: _method_name(_root_))
OmegaConf.register_new_resolver("file_name", lambda _root_: _file_name(_root_))  # names the folder of a run in a sweep


def typed(plain: Mapping[Any, Any]) -> DictConfig:
    """The configuration of plain values, such as `to_saved`; `TrainConfig` converts values from the environment.

    Raises:
        ConfigKeyError: a key is not one of `TrainConfig`.
    """
    cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), dict(plain))
    assert isinstance(cfg, DictConfig)
    return cfg


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts and lists, interpolations resolved."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def to_saved(cfg: DictConfig) -> dict[str, Any]:
    """`to_plain` for saved files: values from the environment, which may be secret, stay ${oc.env:...}.

    In an entry with both, ${now:...} and other resolvers are resolved, if that gives the same value.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    stand_ins: dict[str, str] = {}
    token = _stand_ins.set(stand_ins)
    try:
        hidden = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    finally:
        _stand_ins.reset(token)
    return _where_equal(to_plain(cfg), hidden, raw, stand_ins)


def refuse_interpolation(folder: Path) -> None:
    """Refuse a folder with ${...} in its path: Hydra would resolve it again, to another path.

    Raises:
        ConfigError: there is one.
    """
    if "${" in str(folder.absolute()):
        raise ConfigError(f"the path {folder.absolute()} contains ${{, which Hydra resolves; use another folder")


def _file_name(root: DictConfig) -> str:
    """The varied keys as typed: values from the environment must not appear in a folder's name."""
    job = OmegaConf.to_container(root.hydra.job, resolve=False)
    assert isinstance(job, dict)
    return job["override_dirname"].replace("/", "-").replace("$", "")[:200]  # Hydra would resolve ${...}


def _where_equal(tree: Any, other: Any, raw: Any, stand_ins: Mapping[str, str]) -> Any:
    """`tree`, where it equals `other`; elsewhere `raw`, or `other` without stand-ins if `raw` has other resolvers."""
    if isinstance(tree, dict) and isinstance(raw, dict):
        return {key: _where_equal(tree[key], other[key], raw[key], stand_ins) for key in tree}
    if isinstance(tree, list) and isinstance(raw, list):
        return [_where_equal(*items, stand_ins) for items in zip(tree, other, raw, strict=True)]
    if tree == other:
        return tree
    if not (isinstance(other, str) and isinstance(raw, str) and re.search(r"\$\{(?!oc\.)\w[\w.]*:", raw)):
        return raw
    for stand_in, text in stand_ins.items():
        other = other.replace(stand_in, text)
    return other if _resolves_to(tree, other) else raw


def _resolves_to(value: Any, text: Any) -> bool:
    try:
        return OmegaConf.to_container(OmegaConf.create([text]), resolve=True) == [value]
    except OmegaConfBaseException:  # it refers to another key
        return False


def _of_environment(*arguments: Any) -> str | None:
    """OmegaConf's own oc.env, except in `to_saved`, where it is a word that stands for its text."""
    stand_ins = _stand_ins.get()
    if stand_ins is None:
        return oc.env(*arguments)
    stand_in = f"hidden_{len(stand_ins)}_"
    stand_ins[stand_in] = f"${{oc.env:{','.join(map(str, arguments))}}}"
    return stand_in


_stand_ins: ContextVar[dict[str, str] | None] = ContextVar("_stand_ins", default=None)
OmegaConf.register_new_resolver("oc.env", _of_environment, replace=True)


def signature_of(target: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of the callable that a `_target_` names; for a class, those of its constructor.

    Raises:
        ConfigError: there is no such callable.
    """
    try:
        found = get_object(target)
    except Exception as error:
        reason = " ".join(str(error).split())
        remedy = r"start the command in the folder of \1, or install it"
        reason = re.sub(r"Are you sure that module '([\w.]+)' is installed\?", remedy, reason)
        raise ConfigError(f"_target_ {target!r} cannot be imported: {reason}") from error
    if not callable(found):
        raise ConfigError(f"_target_ {target!r} is not callable")
    try:
        return inspect.signature(found).parameters
    except ValueError as error:
        raise ConfigError(f"_target_ {target!r} is built in and has no signature; name a class") from error


def drop_arguments_of_replaced_targets(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Make `model._target_=mine.Net` sufficient: remove the arguments that the chosen file sets for its own target.

    Arguments that the new target requires stay, and so do interpolations (`${seed}`). In other groups than data, method
    and model, and in an experiment, which may have set them on purpose, all arguments that the new target takes stay.

    Args:
        cfg: changed in place.
        overrides: arguments of the command line; the keys they set stay, and are checked.

    Returns:
        The required arguments that keep their values from the chosen files, as key=value.

    Raises:
        ConfigError: a method of the user's own would be trained with the learning rate of the chosen file.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    kept = []
    for path in sorted(key.removesuffix("._target_") for key in given if key.endswith("._target_")):
        node = OmegaConf.select(cfg, path)
        try:
            takes = signature_of(node._target_)
        except ConfigError:
            continue  # `check` raises it
        if path == "method" and not given & {"lr", "optimizer", "optimizer.lr", "task", "experiment"}:
            raise ConfigError(
                f"method._target_={node._target_} needs a learning rate of its own, not that of the chosen preset "
                f"(lr={cfg.get('lr')}); give it with lr=..."
            )
        has_own_values = path in ("data", "method", "model") and "experiment" not in given
        with open_dict(node):
            for name in map(str, list(node)):
                if name.startswith("_") or any(
                    key == f"{path}.{name}" or key.startswith(f"{path}.{name}.") for key in given
                ):
                    continue
                is_own = has_own_values and not OmegaConf.is_interpolation(node, name)
                if name not in takes or (is_own and takes[name].default is not inspect.Parameter.empty):
                    del node[name]
                elif is_own:
                    kept.append(f"{path}.{name}={node[name]}")
    return kept


def refuse_ignored_tangents(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse `tangents=...` for a method that draws its own or none.

    Raises:
        ConfigError: the method of `cfg` does not use the group.
    """
    given = [override for override in overrides if re.match(r"\+{0,2}tangents[.=]", override)]
    if not given or cfg.method is None or "${tangents}" in OmegaConf.to_yaml(cfg.method):
        return
    own = (cfg.method.get("tangents") or {}).get("_target_")
    draws = f"it draws {own.rpartition('.')[2]}; set method.tangents.* or" if own else "it takes no law of tangents;"
    raise ConfigError(f"{given[0]} has no effect on the chosen method: {draws} choose method=fwdgrad")


def name_targets(choices: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The chosen file of every group, or the `_target_` that an override gives instead."""
    found = {str(group): choice for group, choice in choices.items()}
    for override in overrides:
        key, _, value = override.partition("=")
        if key.removesuffix("._target_") in found and key.endswith("._target_"):
            found[key.removesuffix("._target_")] = value
    return found


def _method_name(root: DictConfig) -> str:
    """The method's name as a part of a folder's name."""
    overrides = OmegaConf.to_container(root.hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    method = name_targets(root.hydra.runtime.choices, [str(text) for text in overrides]).get("method")
    return re.sub(r"[^\w.-]", "-", str(method).rpartition(".")[2])


def nodes(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every (path, mapping) that has a `_target_`."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield path, dict(tree)
        for key, value in tree.items():
            yield from nodes(value, f"{path}.{key}" if path else str(key))
