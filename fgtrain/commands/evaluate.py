"""Evaluate a checkpoint: fgtrain evaluate runs/DATE/TIME_fwdgrad/checkpoints/best.ckpt --split test

The run's config.yaml says which model and data to use. The results are written in the format of results.json.
"""

from pathlib import Path

from fgtrain.runs.evaluate import SPLITS, evaluate
from fgtrain.runs.messages import OneLineParser, errors_as_lines, plain_console, silence_libraries


def main() -> None:
    """Evaluate a checkpoint, write the results and print them."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file in its run's folder, or that folder")
    parser.add_argument("--split", default="test", help=", ".join(SPLITS))
    parser.add_argument("--out", type=Path, help="file for the results")
    args = parser.parse_args()
    silence_libraries()
    with errors_as_lines():
        results = evaluate(args.checkpoint, args.split, args.out)
    console = plain_console()
    for name, value in results["metrics"].items():
        console.print(f"{name} {value:.6g}", highlight=False)
    console.print(f"results in {results['written']}", soft_wrap=True, highlight=False)
