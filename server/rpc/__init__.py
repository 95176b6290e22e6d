"""The server's network side: gRPC handlers, sessions, pushes to the next hop."""
