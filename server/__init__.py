"""A server: one machine that holds a span of blocks and runs it for the sessions of many clients."""
