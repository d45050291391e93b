"""One run from the command line: its configuration, processes, folder and results."""
