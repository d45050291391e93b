"""Rebuild a run's final weights without its data: fgtrain replay runs/.../... weights.pt

The run must have been trained with callbacks=replay_log. Needs its config.yaml and replay.pt, nothing else.
"""

import argparse
from pathlib import Path

from fgtrain.lightning.atomic_files import refuse_unwritable, save_atomically
from fgtrain.runs.messages import OneLineParser, errors_as_lines, silence_libraries
from fgtrain.runs.replay import replay


def main() -> None:
    """Replay, and write the weights."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("weights", type=Path, help="file for the model's state_dict")
    arguments = parser.parse_args()
    silence_libraries()
    with errors_as_lines():
        refuse_unwritable(arguments.weights)
        module, steps = replay(arguments.run)
        save_atomically(module.model.state_dict(), arguments.weights)
    print(f"{steps} steps replayed: bit for bit the weights of the run, written to {arguments.weights}")
