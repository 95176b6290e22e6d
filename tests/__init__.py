"""Tests, in tiers: unit mirrors the code, integration runs many nodes in one process, e2e real processes, gpu CUDA."""
