"""Pure tensor mathematics of the models: no modules, no state, no `torch.distributed`. Each fast path stands beside a reference.

Legend of the suffixes: T tokens of a packed row, D hidden, N heads, K key-value heads, H head dim, G groups, S state,
C channels, E experts, F expert width, V vocabulary. `Documents` says where the documents of a packed row begin and end.
"""
