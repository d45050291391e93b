"""fgtrain replay, from a checkout: python scripts/replay.py runs/mine weights.pt."""

from fgtrain.commands.replay import main

if __name__ == "__main__":
    main()
