"""Sessions in the client: what was sent, where it stands, and how to carry on when a server is lost."""
