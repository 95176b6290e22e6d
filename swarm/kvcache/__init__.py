"""Decisions about KV memory: which pages belong to whom. Pure; the tensors live beside the engine."""
