"""The client's network side: an event loop in a thread, channels, streams to hops, unary calls."""
