"""The check of a configuration: every argument exists and has the type that its class declares."""

import difflib
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fgtrain.distributed import TANGENTS_OVER
from fgtrain.errors import ConfigError
from fgtrain.lightning.exchange import GRADIENTS
from fgtrain.runs.config import TrainConfig, nodes, signature_of, to_plain

_SET_BY_RUNS = {"callbacks": "callbacks=...", "logger": "logger=...", "default_root_dir": "hydra.run.dir=..."}
"""Arguments of the trainer that a run sets, and the options that determine them."""


def check(cfg: DictConfig) -> None:
    """Refuse values that are out of range or of the wrong type, and keys that are not an argument of their `_target_`.

    Raises:
        ConfigError: the message names the key, the value and what is allowed.
    """
    unknown = sorted(set(map(str, cfg)) - {field.name for field in fields(TrainConfig)})
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no such key; the top level has {', '.join(TrainConfig.__annotations__)}"
        )
    if OmegaConf.is_missing(cfg, "lr"):
        raise ConfigError("lr is not set; give the learning rate with lr=...")
    for key, (what, is_allowed) in ALLOWED.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and not is_allowed(value):
            raise ConfigError(f"{key} must be {what}, got {value!r}")
    plain = to_plain(cfg)
    for group in ("method", "task", "data", "model", "optimizer", "trainer"):
        if not isinstance(plain[group], dict) or "_target_" not in plain[group]:
            raise ConfigError(f"{group} needs a _target_, got {plain[group]!r}; choose one of conf/{group}")
    for key, off in (
        ("val_check_interval", "; trainer.limit_val_batches=0 leaves validation out"),
        ("check_val_every_n_epoch", "; null counts the steps of all epochs"),
        ("log_every_n_steps", ""),
    ):
        value = plain["trainer"].get(key)
        if isinstance(value, (int, float)) and not value > 0:
            raise ConfigError(f"trainer.{key} must be above 0, got {value}{off}")
    for key, option in _SET_BY_RUNS.items():
        if key in plain["trainer"]:
            raise ConfigError(f"trainer.{key}: the run sets this argument; use {option}")
    for path, node in nodes(plain):
        _check_node(path, node)


_POSITIVE = "positive", lambda value: value > 0
_AT_LEAST_1 = "at least 1", lambda value: value >= 1
ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": (f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32),
    "lr": _POSITIVE,
    "clip_grad_norm": _POSITIVE,
    "accumulate_grad_batches": _AT_LEAST_1,
    "max_skipped_steps": _AT_LEAST_1,
    "max_skipped_share": ("between 0 and 1 or null", lambda value: 0 <= value <= 1),
    "detect_divergence": ("a factor above 1 or null", lambda value: value > 1),
    "distributed.tangents": ("'shared' or 'per_rank'", lambda value: value in TANGENTS_OVER),
    "distributed.gradients": (f"one of {', '.join(GRADIENTS)}", lambda value: value in GRADIENTS),
    "distributed.local_steps": _AT_LEAST_1,
    "distributed.check_every_n_steps": ("at least 0", lambda value: value >= 0),
    "distributed.timeout_seconds": _POSITIVE,
}
"""{key: (what it must be, for the message; whether a value is that)}."""


def _check_node(path: str, node: dict[str, Any]) -> None:
    try:
        parameters = signature_of(node["_target_"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    hints = _type_hints(get_object(node["_target_"]))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.items():
        if key in ("_target_", "_partial_", "_convert_", "_recursive_", "_args_"):
            continue
        if key not in parameters and not takes_any:
            close = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(parameters) or 'none'}"
            raise ConfigError(f"{path}.{key}: {node['_target_']} takes no argument {key!r}; {hint}")
        if key in hints and not _fits(value, hints[key]):
            raise ConfigError(f"{path}.{key} must be {_describe(hints[key])}, got {value!r}")


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # the annotations cannot be resolved
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a config may be an argument annotated `hint`; if in doubt, True."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint in (None, type(None)):
        return value is None
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(v, args[0]) for v in value if args)
    if inspect.isclass(hint) and hint.__module__.startswith("fgtrain"):
        return isinstance(value, dict)
    return True


def _describe(hint: Any) -> str:
    """An annotation in the words of a config file."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if hint in (None, type(None)):
        return "null"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if hint in names:
        return names[hint]
    if origin in (list, tuple, Sequence) and args:
        return f"a list, each {_describe(args[0])}"
    return f"a node with a _target_ ({getattr(hint, '__name__', hint)})"
