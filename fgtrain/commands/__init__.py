"""The programs of the command line: `fgtrain train`, `fgtrain compare` and so on, one module each."""
