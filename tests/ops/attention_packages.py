"""Stand-ins for the packages whose kernels ``attention_flash`` calls.

Each has its package's recorded signature, takes keywords alone, and computes by the reference what
the package documents for its arguments; what the package leaves to chance it fills with NaN.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch

from varlen_sft import reference
from varlen_sft.ops.attention_flash import flash_attention
from varlen_sft.types import Sequences

RECORD = json.loads(Path(__file__).with_name("attention_signatures.json").read_text())


def documented(entry, a):
    """What the package computes of arguments ``a``, by its own words for them."""
    if entry["impl"] == "torch_varlen":
        q, k, v = a["query"], a["key"], a["value"]
        cu_q, cu_k, longest, k_longest = a["cu_seq_q"], a["cu_seq_k"], a["max_q"], a["max_k"]
        scale, softcap, causal = a["scale"], 0.0, True  # a right window of 0 is its causal
        # torch 2.11 has no such word, and groups of heads nevertheless: tests on a GPU show it.
        assert a.get("enable_gqa", True) or q.shape[1] == k.shape[1]
    else:
        q, k, v, cu_q, cu_k = (a[x] for x in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
        longest, k_longest = a["max_seqlen_q"], a["max_seqlen_k"]
        scale, softcap, causal = a["softmax_scale"], a["softcap"], a["causal"]
    left, right = a["window_size"]
    unlimited = None if entry["impl"] == "flash_attn_4" else -1
    assert causal and right in ((0,) if entry["impl"] == "torch_varlen" else (0, unlimited))
    assert type(longest) is int and longest >= cu_q.diff().max()
    assert type(k_longest) is int and k_longest >= cu_k.diff().max()
    if entry["impl"] == "flash_attn_2" and longest == 1 and q.shape[1] > k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        q.reshape(len(cu_q) - 1, k.shape[1], groups, q.shape[2])  # its path for single queries
    end, k_end = int(cu_q[-1]), int(cu_k[-1])
    assert cu_q[0] == cu_k[0] == 0 and end <= len(q) and k_end <= len(k)
    out = reference.varlen_attention(
        q[:end], k[:k_end], v[:k_end], Sequences(cu_q, longest, None),
        k_sequences=Sequences(cu_k, k_longest, None), softmax_scale=scale,
        window_size=None if left == unlimited else left + 1, softcap=softcap,
    )  # fmt: skip
    return torch.cat((out, torch.full_like(q[end:], float("nan"))))


class Package:
    """Puts a function of the recorded signature where the adapter imports it from."""

    def __init__(self, monkeypatch, entry):
        self.entry, self.impl, self.calls = entry, entry["impl"], []
        parameters = "(*, " + entry["signature"][1:].replace("*, ", "")
        name, scope = entry["function"], {"compute": self.compute}
        exec(f"def {name}{parameters}: return compute(locals())", scope)
        if self.impl == "torch_varlen":
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", scope[name])
            return
        path = {"flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
        module = types.ModuleType(path.get(self.impl, "flash_attn"))
        setattr(module, name, scope[name])
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def compute(self, arguments):
        self.calls.append(arguments)
        out = documented(self.entry, arguments)
        return (out, None) if self.impl == "flash_attn_4" else out

    def __call__(self, *args, **kwargs):
        return flash_attention(self.impl, *args, softmax_scale=0.3, **kwargs)
