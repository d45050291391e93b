"""fgtrain bench, from a checkout: python scripts/bench.py --models mlp cnn."""

from fgtrain.commands.bench import main

if __name__ == "__main__":
    main()
