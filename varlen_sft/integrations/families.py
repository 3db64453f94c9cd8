"""What is known of each Hugging Face family: the table that patch, loss and pruning read.

Only what the code has to decide is here. Scales, windows and softcaps of attention come with every
call of HF's attention interface; multipliers of embeddings and residuals stay in HF's own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

NormLayout = Literal["before", "after", "around"]
"""Where a block normalises: before attention and MLP (Llama), after (OLMo 2), both (Gemma)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type`` of transformers.

    The names of config attributes are HF's; None means that the family has no such thing.
    """

    model_type: str
    title: str
    norms: NormLayout = "before"
    qk_norm: Literal["head", "all"] | None = None
    """RMSNorm of q and k: of each head alone, or of all heads together."""
    rope: Literal["one table", "table or none", "table by layer type"] = "one table"
    fp32_rope: bool = False
    """cos and sin stay fp32 in HF's own forward: numerics "hf" is then "fp32"."""
    keeps_fp64: bool = True
    """Modules leave fp64 alone, but for the RMSNorm that casts to fp32 in every family."""
    window: Literal["config", "layer"] | None = None
    """Who has ``sliding_window``, if anybody: the config for all layers, or each layer its own."""
    attention_softcap: bool = False
    logits_divisor: str | None = None
    """Config attribute that divides the logits (Granite)."""
    logits_softcap: str | None = None
    """Config attribute of the softcap of the logits (Gemma)."""
    residual_multiplier: str | None = None
    """Config attribute that multiplies what attention and MLP add (Granite)."""

    def window_size(self, layer: Any) -> int | None:
        """Keys that a query of this attention layer sees at most, its own counted."""
        if self.window is None:
            return None
        return getattr(layer.config if self.window == "config" else layer, "sliding_window", None)

    def logit_scale(self, config: Any) -> float:
        """What multiplies the logits before the softcap; 1.0 where there is nothing."""
        return 1.0 / getattr(config, self.logits_divisor) if self.logits_divisor else 1.0

    def logit_softcap(self, config: Any) -> float:
        """``softcap * tanh(logits / softcap)``; 0.0 where there is none."""
        value = getattr(config, self.logits_softcap) if self.logits_softcap else None
        return float(value or 0.0)


_ALL = (
    Family(model_type="llama", title="Llama 1 to 3.x, SmolLM2"),
    Family(model_type="mistral", title="Mistral", window="config"),
    Family(model_type="qwen2", title="Qwen 2 and 2.5", window="layer"),
    Family(model_type="qwen3", title="Qwen 3", qk_norm="head", window="layer"),
    Family(
        model_type="granite", title="Granite 3", logits_divisor="logits_scaling",
        residual_multiplier="residual_multiplier",
    ),
    Family(model_type="smollm3", title="SmolLM3", rope="table or none", window="layer"),
    Family(
        model_type="gemma2", title="Gemma 2", norms="around", window="layer", keeps_fp64=False,
        attention_softcap=True, logits_softcap="final_logit_softcapping",
    ),
    Family(
        model_type="gemma3_text", title="Gemma 3 (text)", norms="around", qk_norm="head",
        rope="table by layer type", window="layer", keeps_fp64=False,
        logits_softcap="final_logit_softcapping",
    ),
    Family(
        model_type="olmo2", title="OLMo 2", norms="after", qk_norm="all", fp32_rope=True
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""By ``config.model_type``."""

_OTHERS = {
    "interleaved RoPE": ("cohere", "cohere2", "glm", "glm4", "gptj", "codegen", "llama4_text",
                         "deepseek_v2", "deepseek_v3", "ernie4_5"),
    "multimodal RoPE (three position ids per token)": (
        "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text",
        "qwen2_5_omni", "glm4v",
    ),
    "images beside text": ("gemma3", "llava", "mllama", "mistral3", "idefics3", "smolvlm"),
    "state-space or linear-attention layers": (
        "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "granitemoehybrid",
        "qwen3_next", "lfm2",
    ),
}  # fmt: skip


def family_of(config: Any) -> Family:
    """The family of a HF config.

    Raises:
        ValueError: a family that is not in the table; the message says why and what is.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reasons = [f": it has {what}" for what, types in _OTHERS.items() if model_type in types]
    raise ValueError(
        f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}{''.join(reasons)}"
    )
