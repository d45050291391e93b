"""fgtrain compare, from a checkout: python scripts/compare.py methods=[backprop,fwdgrad] seeds=5 budget=60s."""

from fgtrain.commands.compare import main

if __name__ == "__main__":
    main()
