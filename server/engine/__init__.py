"""The engine: one thread that owns the blocks and the KV caches and runs what the network layer submits."""
