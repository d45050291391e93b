"""The user's network: its parameters and other state, its blocks, its shards, its compiled form."""
