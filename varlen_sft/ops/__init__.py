"""The ops. Letters used everywhere in this package:

T total tokens of a pack, B sequences in it, H query heads, K kv heads, D head_dim, R rotary dims,
C hidden size, V vocabulary, S supervised rows, P positions of a RoPE table. Packed tensors are
(T, H, D); there is no batch axis. Each op validates, picks an implementation (``backends.py``) and
calls it; what it means is defined by the function of the same name in ``varlen_sft.reference``.
"""
