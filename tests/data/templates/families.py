"""What is known of each family of chat templates and its models, written by hand.

Everything here was read off the templates and the models' own files, nothing is computed by the
code under test.
"""

from __future__ import annotations

from dataclasses import replace

from tests.data.templates.facts import Facts

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
GEMMA4_V5 = replace(GEMMA4, think="recent", loud="<|turn>model\n", calls="gemma4_null", keeps=True)
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
    LFM2,
    style="lfm2_5",
    markers=(*LFM2.markers, *_THINK),
    think="defined",
    calls="python",
    keeps=True,
    tag=_IM,
    tag_end="\n",
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
    keeps=True,
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
QWEN3_6 = replace(QWEN3_5, calls="function_json", keeps=True)
QWEN3_8 = replace(QWEN3_6, think="always", splits=False)
