"""The user's network: its parameters, chains of modules, shards, compiled form."""
