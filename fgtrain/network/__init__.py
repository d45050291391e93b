"""The network that a user brings: its parameters, chains of modules, shards, compiled form."""
