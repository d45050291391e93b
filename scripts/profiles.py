"""fgtrain profiles, from a checkout: python scripts/profiles.py --methods backprop fwdgrad."""

from fgtrain.commands.profiles import main

if __name__ == "__main__":
    main()
