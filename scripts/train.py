"""fgtrain train, from a checkout: python scripts/train.py method=fwdgrad."""

from fgtrain.commands.train import main

if __name__ == "__main__":
    main()
