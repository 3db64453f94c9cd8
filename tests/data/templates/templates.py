"""The chat templates in the `trl` wheel (Apache-2.0) and what is known of each, written by hand.

Everything here was read off the templates and the models' own files, nothing is computed by the
code under test. The texts are read from the wheel; `trl` itself is never imported.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Facts:
    """One template and its model.

    Attributes:
        style: which hand rule of the oracle says what an answer looks like.
        control: tokens that its tokenizer holds as special: headers, ends of turns, begin of text.
        markers: tokens that it holds as added but not special: thinking and tool calls.
        stops: the tokens at which the model stops generating.
        prompt: the generation prompt after a user message.
        quiet, loud: the same with ``enable_thinking=False`` and ``True``, where that matters.
        end: what closes an answer; its last token is the stop token.
        header: what stands before an answer, where that is not the prompt.
        content: what becomes of an answer: "as is" or "trimmed".
        think: which reasoning is written where (see the oracle); "" if none ever is.
        splits: an answer that holds ``</think>`` is taken apart there.
        calls: the format of tool calls; "" where none is ever written.
        system, tools: "written", or "raises" where the template refuses them.
        tag: for templates with ``{% generation %}`` tags, the header before the opening one.
    """

    style: str
    bos: str
    eos: str
    control: tuple[str, ...]
    stops: tuple[str, ...]
    prompt: str
    end: str
    markers: tuple[str, ...] = ()
    quiet: str | None = None
    loud: str | None = None
    header: str | None = None
    content: str = "as is"
    think: str = ""
    splits: bool = False
    calls: str = ""
    system: str = "written"
    tools: str = "written"
    tag: str | None = None

    @property
    def variables(self) -> dict[str, str]:
        tokens = {"bos_token": self.bos, "eos_token": self.eos}
        return {name: token for name, token in tokens.items() if token}


_IM = "<|im_start|>assistant\n"
_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_TURN = "<|START_OF_TURN_TOKEN|>"

COHERE = Facts(
    style="plain",
    bos="<BOS_TOKEN>",
    eos="<|END_OF_TURN_TOKEN|>",
    control=(
        "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", _TURN, "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
    ),
    stops=("<|END_OF_TURN_TOKEN|>",),
    prompt=_TURN + "<|CHATBOT_TOKEN|>",
    end="<|END_OF_TURN_TOKEN|>",
    content="trimmed",
    tools="raises",
)  # fmt: skip
COHERE2 = replace(
    COHERE,
    control=(*COHERE.control, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    prompt=_TURN + "<|CHATBOT_TOKEN|><|START_RESPONSE|>",
    end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    content="as is",
)
DEEPSEEK_V3 = Facts(
    style="deepseek",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    control=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    markers=(
        *_THINK,
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
    ),
    stops=("<｜end▁of▁sentence｜>",),
    prompt="<｜Assistant｜><think>\n",
    end="<｜end▁of▁sentence｜>",
    splits=True,
    calls="deepseek",
)  # fmt: skip
R1_DISTILL = replace(DEEPSEEK_V3, calls="")  # it writes calls only where content is null
GEMMA = Facts(
    style="plain",
    bos="<bos>",
    eos="<eos>",  # which the template never writes: <end_of_turn> is where the model stops
    control=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    stops=("<eos>", "<end_of_turn>"),
    prompt="<start_of_turn>model\n",
    end="<end_of_turn>",
    content="trimmed",
    system="raises",
    tools="raises",
)
GEMMA3 = replace(GEMMA, control=(*GEMMA.control, "<start_of_image>"), system="written")
GEMMA4 = Facts(
    style="gemma4",
    bos="<bos>",
    eos="<turn|>",
    control=("<bos>", "<|turn>", "<turn|>", "<|think|>", "<|image|>", "<|audio|>", "<|video|>"),
    markers=(
        "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
        "<|tool_response>", "<tool_response|>", '<|"|>',
    ),
    stops=("<turn|>", "<|tool_response>"),
    prompt="<|turn>model\n",
    end="<turn|>",
    content="trimmed",
    think="calls",
    calls="gemma4",
)  # fmt: skip
GEMMA4_V2 = replace(GEMMA4, style="gemma4_v2", think="")
GEMMA4_V5 = replace(GEMMA4, think="recent", loud="<|turn>model\n", calls="gemma4_null")
DIFFUSION_GEMMA = replace(GEMMA4_V5, style="diffusion_gemma")
GLM = Facts(
    style="glm",
    bos="",
    eos="<|endoftext|>",
    control=(
        "[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>",
    ),
    markers=(*_THINK, *_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    prompt="<|assistant|>",
    quiet="<|assistant|>\n<think></think>",
    end="",  # the next header: the last answer of a conversation has none
    content="trimmed",
    think="recent",
    splits=True,
    calls="glm",
)  # fmt: skip
GPTOSS = Facts(
    style="gptoss",
    bos="<|startoftext|>",
    eos="<|return|>",
    control=(
        "<|startoftext|>", "<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>",
        "<|message|>",
    ),
    stops=("<|return|>", "<|call|>"),
    prompt="<|start|>assistant",
    end="<|return|>",
    think="last",
    calls="gptoss",
)  # fmt: skip
IDEFICS3 = Facts(
    style="plain",
    bos="<|begin_of_text|>",
    eos="<end_of_utterance>",
    control=("<|begin_of_text|>", "<end_of_utterance>", "<image>"),
    stops=("<end_of_utterance>",),
    prompt="Assistant:",
    header="Assistant: ",
    end="<end_of_utterance>",
)
SMOLVLM = replace(
    IDEFICS3, bos="<|im_start|>", control=("<|im_start|>", "<end_of_utterance>", "<image>")
)
LFM2 = Facts(
    style="plain",
    bos="<|startoftext|>",
    eos="<|im_end|>",
    control=("<|startoftext|>", "<|im_start|>", "<|im_end|>"),
    markers=(
        "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
        "<|tool_response_start|>", "<|tool_response_end|>",
    ),
    stops=("<|im_end|>",),
    prompt=_IM,
    end="<|im_end|>",
)  # fmt: skip
LFM2_V2 = replace(LFM2, calls="python_escaped")
LFM2_5 = replace(
    LFM2, style="lfm2_5", markers=(*LFM2.markers, *_THINK), think="defined", calls="python", tag=_IM
)
LFM2_5_V2 = replace(LFM2_5, think="recent")
LFM2_5_VL = replace(LFM2_5_V2, calls="python_escaped", control=(*LFM2.control, "<image>"))
LLAMA3 = Facts(
    style="plain",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    control=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>",
    ),
    stops=("<|eot_id|>", "<|end_of_text|>"),
    prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    content="trimmed",
)  # fmt: skip
LLAMA3_1 = replace(
    LLAMA3,
    control=(*LLAMA3.control, "<|eom_id|>", "<|python_tag|>"),
    stops=(*LLAMA3.stops, "<|eom_id|>"),
    calls="llama",
)
LLAVA_NEXT = Facts(
    style="plain",
    bos="<s>",
    eos="</s>",
    control=("<s>", "</s>", "<image>"),
    stops=("</s>",),
    prompt="",
    header=" ",
    end="</s>",
    tools="raises",
)
MUSE = Facts(
    style="muse",
    bos="<|begin_of_text|>",
    eos="<|eot|>",
    control=("<|begin_of_text|>", "<|start|>", "<|message|>", "<|eom|>", "<|eot|>", "<|patch|>"),
    stops=("<|eot|>",),
    prompt="<|start|>assistant",
    end="<|eot|>",
    think="always",
    calls="atem",
)
NEMOTRON = Facts(
    style="nemotron",
    bos="<s>",
    eos="<|im_end|>",
    control=("<s>", "<|im_start|>", "<|im_end|>"),
    markers=(*_THINK, *_CALL),
    stops=("<|im_end|>",),
    prompt=_IM + "<think>\n",
    quiet=_IM + "<think></think>",
    end="<|im_end|>",
    think="recent",
    splits=True,
    calls="nemotron",
)
NEMOTRON_ULTRA = replace(NEMOTRON, style="nemotron_ultra")
PHI3 = Facts(
    style="plain",
    bos="<s>",
    eos="<|endoftext|>",
    control=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    stops=("<|endoftext|>", "<|end|>"),
    prompt="<|assistant|>\n",
    end="<|end|>",
)
QWEN2_5_VL = Facts(
    style="plain",
    bos="",
    eos="<|im_end|>",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    markers=_CALL[:2],
    stops=("<|im_end|>", "<|endoftext|>"),
    prompt=_IM,
    end="<|im_end|>",
)
QWEN2_5 = replace(QWEN2_5_VL, calls="hermes")
QWEN3_INSTRUCT = replace(QWEN2_5, markers=(*_THINK, *_CALL), calls="hermes_raw")
QWEN3 = replace(
    QWEN3_INSTRUCT,
    style="qwen3",
    quiet=_IM + "<think>\n\n</think>\n\n",
    think="last",
    splits=True,
)
QWEN3_5 = replace(
    QWEN3,
    style="qwen3_5",
    prompt=_IM + "<think>\n",
    content="trimmed",
    think="recent",
    calls="function_python",
)
QWEN3_5_NOTHINK = replace(QWEN3_5, prompt=QWEN3_5.quiet, quiet=None, loud=_IM + "<think>\n")
QWEN3_6 = replace(QWEN3_5, calls="function_json")
QWEN3_8 = replace(QWEN3_6, think="always", splits=False)


def _with_training(facts: dict[str, Facts], changes: dict[str, dict]) -> dict[str, Facts]:
    """Every template of TRL's own trains as its stock one does, but for the changes."""
    stock = dict(facts)
    for name, change in changes.items():
        change = {"tag": facts[name].prompt, **change}  # most tag what comes after the prompt
        stock[f"{name}_training"] = replace(facts[name], **change)
    return dict(sorted(stock.items()))


FACTS: dict[str, Facts] = _with_training(
    {
        "cohere": COHERE,
        "cohere2": COHERE2,
        "deepseek_r1_distill": R1_DISTILL,
        "deepseekv3": DEEPSEEK_V3,
        "diffusion_gemma": DIFFUSION_GEMMA,
        "gemma": GEMMA,
        "gemma3": GEMMA3,
        "gemma4": GEMMA4,
        "gemma4_v2": GEMMA4_V2,
        "gemma4_v3": GEMMA4,
        "gemma4_v4": GEMMA4,
        "gemma4_v5": GEMMA4_V5,
        "glm4moe": GLM,
        "gptoss": GPTOSS,
        "idefics3": IDEFICS3,
        "lfm2": LFM2,
        "lfm2_2_5": LFM2_5,
        "lfm2_2_5_v2": LFM2_5_V2,
        "lfm2_2_5_vl": LFM2_5_VL,
        "lfm2_v2": LFM2_V2,
        "llama3": LLAMA3,
        "llama3_1": LLAMA3_1,
        "llama3_2": LLAMA3_1,
        "llava_next": LLAVA_NEXT,
        "muse_glimmer": MUSE,
        "nemotron_3_5_lightning": NEMOTRON_ULTRA,
        "nemotron_3_nano": NEMOTRON,
        "nemotron_3_super": NEMOTRON,
        "nemotron_3_ultra": NEMOTRON_ULTRA,
        "phi3": PHI3,
        "phi3_5": PHI3,
        "qwen2_5": QWEN2_5,
        "qwen2_5_vl": QWEN2_5_VL,
        "qwen3": QWEN3,
        "qwen3_5_nothink": QWEN3_5_NOTHINK,
        "qwen3_5_think": QWEN3_5,
        "qwen3_6": QWEN3_6,
        "qwen3_8": QWEN3_8,
        "qwen3_instruct_2507": QWEN3_INSTRUCT,
        "qwen3_vl": QWEN3_INSTRUCT,
        "smolvlm": SMOLVLM,
    },
    {
        "cohere": {},
        "cohere2": {},
        "deepseek_r1_distill": {"splits": False, "tag": ""},
        "deepseekv3": {"calls": "deepseek_json", "tag": ""},
        "diffusion_gemma": {},
        "gemma": {},
        "gemma3": {},
        "glm4moe": {"style": "glm_training"},
        "gptoss": {"tag": ""},
        "idefics3": {},
        "lfm2": {},
        "lfm2_v2": {},
        "llama3": {},
        "llava_next": {},
        "muse_glimmer": {"tag": ""},
        "nemotron_3_5_lightning": {"tag": _IM},
        "nemotron_3_nano": {"tag": _IM},
        "nemotron_3_super": {"tag": _IM},
        "nemotron_3_ultra": {"tag": _IM},
        "phi3": {},
        "phi3_5": {},
        "qwen2_5": {"tag": _IM[:-1]},
        "qwen2_5_vl": {},
        "qwen3": {"think": "always"},
        "qwen3_5_nothink": {"think": "always", "tag": _IM},
        "qwen3_5_think": {"think": "always", "tag": _IM},
        "qwen3_6": {"think": "always", "tag": _IM},
        "qwen3_8": {"tag": _IM},
        "qwen3_instruct_2507": {},
        "qwen3_vl": {},
        "smolvlm": {},
    },
)


@cache
def sources() -> dict[str, str]:
    """Jinja text by the name of its file; empty where `trl` is not installed."""
    wheel = importlib.util.find_spec("trl")  # found, not imported: it would bring torch along
    if wheel is None or not wheel.submodule_search_locations:
        return {}
    folder = Path(wheel.submodule_search_locations[0]) / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
