"""How messages and tensors look on the wire, and the limits checked before anything is allocated."""
