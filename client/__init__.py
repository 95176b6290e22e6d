"""A client: embeddings, head and sampling at home, the blocks in the swarm."""
