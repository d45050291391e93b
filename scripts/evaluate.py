"""fgtrain evaluate, from a checkout: python scripts/evaluate.py runs/mine --split test."""

from fgtrain.commands.evaluate import main

if __name__ == "__main__":
    main()
