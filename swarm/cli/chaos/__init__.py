"""A swarm of real processes that is harmed on purpose, while sessions check every token."""
