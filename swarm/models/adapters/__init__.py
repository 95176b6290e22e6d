"""LoRA adapters: read from PEFT's folders, applied to a loaded span for the sessions that choose them.

`source` finds and checks an adapter's files, `settings` reads its config, `bank` puts its tensors beside the
linear layers of a span with the help of `layer` and `probing`, and `rows` says which rows of a batch each adapter
is for. `rows` and `settings` are light to import; the others load torch.
"""
