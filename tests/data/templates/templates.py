"""The chat templates in the `trl` wheel (Apache-2.0), each with its facts.

The texts are read from the wheel; `trl` itself is never imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.data.templates import families as of
from tests.data.templates.facts import Facts

_STOCK = {
    "cohere": of.COHERE,
    "cohere2": of.COHERE2,
    "deepseek_r1_distill": of.R1_DISTILL,
    "deepseekv3": of.DEEPSEEK_V3,
    "diffusion_gemma": of.DIFFUSION_GEMMA,
    "gemma": of.GEMMA,
    "gemma3": of.GEMMA3,
    "gemma4": of.GEMMA4,
    "gemma4_v2": of.GEMMA4_V2,
    "gemma4_v3": of.GEMMA4,
    "gemma4_v4": of.GEMMA4,
    "gemma4_v5": of.GEMMA4_V5,
    "glm4moe": of.GLM,
    "gptoss": of.GPTOSS,
    "idefics3": of.IDEFICS3,
    "lfm2": of.LFM2,
    "lfm2_2_5": of.LFM2_5,
    "lfm2_2_5_v2": of.LFM2_5_V2,
    "lfm2_2_5_vl": of.LFM2_5_VL,
    "lfm2_v2": of.LFM2_V2,
    "llama3": of.LLAMA3,
    "llama3_1": of.LLAMA3_1,
    "llama3_2": of.LLAMA3_1,
    "llava_next": of.LLAVA_NEXT,
    "muse_glimmer": of.MUSE,
    "nemotron_3_5_lightning": of.NEMOTRON_ULTRA,
    "nemotron_3_nano": of.NEMOTRON,
    "nemotron_3_super": of.NEMOTRON,
    "nemotron_3_ultra": of.NEMOTRON_ULTRA,
    "phi3": of.PHI3,
    "phi3_5": of.PHI3,
    "qwen2_5": of.QWEN2_5,
    "qwen2_5_vl": of.QWEN2_5_VL,
    "qwen3": of.QWEN3,
    "qwen3_5_nothink": of.QWEN3_5_NOTHINK,
    "qwen3_5_think": of.QWEN3_5,
    "qwen3_6": of.QWEN3_6,
    "qwen3_8": of.QWEN3_8,
    "qwen3_instruct_2507": of.QWEN3_INSTRUCT,
    "qwen3_vl": of.QWEN3_INSTRUCT,
    "smolvlm": of.SMOLVLM,
}

_IM = "<|im_start|>assistant\n"
_LINE = {"tag_end": "\n"}
_ALWAYS_THINKS: dict[str, Any] = {"think": "always", "tag": _IM, "keeps": False, **_LINE}
_TRAINING: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {},
    "deepseek_r1_distill": {"splits": False, "tag": ""},
    "deepseekv3": {"calls": "deepseek_json", "tag": ""},
    "diffusion_gemma": _LINE,
    "gemma": _LINE,
    "gemma3": _LINE,
    "glm4moe": {"style": "glm_training"},
    "gptoss": {"tag": ""},
    "idefics3": _LINE,
    "lfm2": _LINE,
    "lfm2_v2": _LINE,
    "llama3": {},
    "llava_next": {},
    "muse_glimmer": {"tag": ""},
    "nemotron_3_5_lightning": {"tag": _IM, **_LINE},
    "nemotron_3_nano": {"tag": _IM, **_LINE},
    "nemotron_3_super": {"tag": _IM, **_LINE},
    "nemotron_3_ultra": {"tag": _IM, **_LINE},
    "phi3": _LINE,
    "phi3_5": _LINE,
    "qwen2_5": {"tag": _IM[:-1], **_LINE},
    "qwen2_5_vl": _LINE,
    "qwen3": {"think": "always", **_LINE},
    "qwen3_5_nothink": _ALWAYS_THINKS,
    "qwen3_5_think": _ALWAYS_THINKS,
    "qwen3_6": _ALWAYS_THINKS,
    "qwen3_8": _ALWAYS_THINKS,
    "qwen3_instruct_2507": _LINE,
    "qwen3_vl": _LINE,
    "smolvlm": _LINE,
}
"""How TRL's own version of a template, for training, differs from the stock one: most of them tag
what comes after the generation prompt."""

FACTS: dict[str, Facts] = _STOCK | {
    f"{name}_training": replace(_STOCK[name], **{"tag": _STOCK[name].prompt, **changes})
    for name, changes in _TRAINING.items()
}


def settings_of(name: str) -> list[bool | None]:
    """Every value of ``enable_thinking`` that a template knows; None leaves it to the template."""
    facts = FACTS[name]
    return [None, *([False] if facts.quiet else []), *([True] if facts.loud else [])]


@cache
def sources() -> dict[str, str]:
    """Jinja text by the name of its file; empty where `trl` is not installed."""
    wheel = importlib.util.find_spec("trl")  # found, not imported: it would bring torch along
    if wheel is None or not wheel.submodule_search_locations:
        return {}
    folder = Path(wheel.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
