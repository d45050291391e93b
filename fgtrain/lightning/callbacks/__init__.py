"""Callbacks of a training run; none of them changes the trained weights."""

from fgtrain.lightning.callbacks.dashboard import Dashboard
from fgtrain.lightning.callbacks.first_batch import FirstBatch
from fgtrain.lightning.callbacks.monitor import Monitor
from fgtrain.lightning.callbacks.progress import StepProgress
from fgtrain.lightning.callbacks.quality import GradientQuality
from fgtrain.lightning.callbacks.random_state import RandomState
from fgtrain.lightning.callbacks.ranks import RankCheck
from fgtrain.lightning.callbacks.recovery import Recovery
from fgtrain.lightning.callbacks.replay_log import ReplayLog
from fgtrain.lightning.callbacks.self_check import SelfCheck
from fgtrain.lightning.callbacks.summary import Summary
from fgtrain.lightning.callbacks.trajectory import Trajectory

__all__ = [
    "Dashboard",
    "FirstBatch",
    "GradientQuality",
    "Monitor",
    "RandomState",
    "RankCheck",
    "Recovery",
    "ReplayLog",
    "SelfCheck",
    "StepProgress",
    "Summary",
    "Trajectory",
]
