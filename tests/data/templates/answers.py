"""What each kind of template writes of an answer, from its header through its stop token."""

from __future__ import annotations

from collections.abc import Callable

from tests.data.templates.calls import WRITERS, CannotWrite, atem, dumps
from tests.data.templates.facts import Facts
from tests.data.templates.turns import NO_STOP, ORDER, UNPLACED, Answer, Turn
from varlen_sft.data.conversation import Message


def _content(facts: Facts, message: Message) -> str:
    return message.content.strip() if facts.content == "trimmed" else message.content


def _loses_thought(turn: Turn) -> bool:
    """In history a template may leave thoughts out; in the last answer it may not."""
    return turn.last and bool(turn.thought.strip())


def _plain(facts: Facts, turn: Turn) -> Answer:
    content = _content(facts, turn.message)
    own = facts.prompt if facts.header is None else facts.header
    if not turn.calls or not facts.calls:
        answer = Answer(own, content + facts.end).refuse_if(turn.calls)
    elif facts.calls == "llama":
        answer = Answer(own, WRITERS["llama"](turn.calls) + facts.end).refuse_if(content)
    else:
        between = "\n" if content and facts.calls.startswith("hermes") else ""
        answer = Answer(own, content + between + WRITERS[facts.calls](turn.calls) + facts.end)
    return answer.refuse_if(_loses_thought(turn))


def _thought_and_content(facts: Facts, turn: Turn) -> tuple[str, str]:
    """Qwen and GLM also read a thought out of the content."""
    content = _content(facts, turn.message)
    if turn.message.reasoning_content is None and facts.splits and "</think>" in content:
        before, after = content.split("</think>")[0], content.split("</think>")[-1]
        return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), after.lstrip("\n")
    return turn.thought, content


def _qwen3(facts: Facts, turn: Turn) -> Answer:
    header = "<|im_start|>assistant\n"
    thought, content = _thought_and_content(facts, turn)
    trimmed = facts.content == "trimmed"
    wanted = {
        "last": turn.shown and (turn.last or thought),
        "recent": turn.shown,
        "always": True,
    }[facts.think]
    calls = ""
    if turn.calls:
        says = content.strip() if trimmed else content
        between = ("\n\n" if trimmed else "\n") if says else ""
        calls = between + WRITERS[facts.calls](turn.calls)
    if not wanted:
        return Answer(header, content + calls + facts.end)
    thought = thought.strip() if trimmed else thought.strip("\n")
    content = content if trimmed else content.lstrip("\n")
    closing = "\n</think>\n\n"
    if not thought:
        return Answer(header + "<think>\n" + closing, content + calls + facts.end)
    return Answer(header + "<think>\n", thought + closing + content + calls + facts.end)


def _nemotron(facts: Facts, turn: Turn) -> Answer:
    header, empty = "<|im_start|>assistant\n", "<think></think>"
    tight = facts.style == "nemotron_ultra"
    content, thought = turn.message.content, turn.thought
    if thought.strip():
        closing = "</think>" if tight else "\n</think>\n"
        whole = f"<think>\n{thought}{closing}{content}"
    elif "<think>" in content or "</think>" in content:
        whole = content
    else:
        whole = empty + content
    if turn.shown:
        whole = whole.strip()
    elif turn.calls:
        whole = whole.split("</think>")[-1]
        whole = empty + (whole if tight else whole.strip())
    elif "<think>" in whole and "</think>" in whole:
        whole = (empty + whole.split("</think>")[-1]).strip()
    else:
        whole = whole.strip()
    own = header
    for opening in (empty, "<think>\n"):
        if thought.strip() and turn.shown and opening == empty:
            continue
        if whole.startswith(opening) and not content.startswith(opening):
            own = header + opening
            break
    calls = "\n" + WRITERS[facts.calls](turn.calls) if turn.calls else ""
    return Answer(own, (header + whole)[len(own) :] + calls + facts.end)


def _lfm2_5(facts: Facts, turn: Turn) -> Answer:
    content, own = turn.message.content, facts.prompt
    if not turn.shown and "</think>" in content:
        content = content.split("</think>")[-1].strip()
    given = turn.message.reasoning_content is not None
    if turn.shown and (turn.thought if facts.think == "recent" else given):
        own += "<think>" if turn.thought else "<think></think>"
        content = f"{turn.thought}</think>{content}" if turn.thought else content
    calls = WRITERS[facts.calls](turn.calls) if turn.calls else ""
    return Answer(own, content + calls + facts.end)


def _deepseek(facts: Facts, turn: Turn) -> Answer:
    content, lost = turn.message.content, _loses_thought(turn)
    if turn.calls and facts.calls:
        calls = WRITERS[facts.calls](turn.calls) + "<｜tool▁calls▁end｜>" + facts.end
        if turn.first_call:
            begin = "<｜tool▁calls▁begin｜>"
            return Answer("<｜Assistant｜>", content + begin + calls).refuse_if(lost)
        # Neither the answer nor the calls are opened again.
        return Answer("\n", calls).refuse_if(lost or content.strip())
    own = "<｜tool▁outputs▁end｜>" if turn.after == "tool" else "<｜Assistant｜>"
    if facts.splits and turn.after != "tool":
        content = content.split("</think>")[-1]
    return Answer(own, content + facts.end).refuse_if(lost or turn.calls)


def _glm(facts: Facts, turn: Turn) -> Answer:
    thought, content = _thought_and_content(facts, turn)
    calls = WRITERS[facts.calls](turn.calls) if turn.calls else ""
    if facts.style == "glm_training":
        stop = "<|observation|>" if turn.calls else "<|user|>"
    else:  # the header of the next message
        stop = {"user": "<|user|>", "tool": "<|observation|>", "": ""}[turn.before]
    content = "\n" + content.strip() if content.strip() else ""
    rest = content + calls + stop
    if turn.recent and thought.strip():
        answer = Answer("<|assistant|>\n<think>", f"{thought.strip()}</think>{rest}")
    else:
        answer = Answer("<|assistant|>\n<think></think>", rest)
        answer.refuse_if(thought.strip() and not content + calls, UNPLACED)  # not a word is left
    return answer.refuse_if(not stop, NO_STOP)


def _gptoss(facts: Facts, turn: Turn) -> Answer:
    header, content = "<|start|>assistant", turn.message.content
    analysis, then = header + "<|channel|>analysis<|message|>", "<|end|>" + header
    if not turn.calls:
        final = "<|channel|>final<|message|>"
        said = content + ("<|return|>" if turn.last else "<|end|>")
        if turn.last and turn.message.reasoning_content is not None:
            answer = Answer(analysis, turn.thought + then + final + said)
            return answer.refuse_if(not turn.thought.strip(), UNPLACED)  # a second header
        # In history another token stands where the model stops.
        return Answer(header + final, said).refuse_if(not turn.last, NO_STOP)
    name, arguments = turn.calls[0]["name"], dumps(turn.calls[0]["arguments"])
    to, call = " to=functions.", f"{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
    thought = content or turn.thought
    lost = len(turn.calls) > 1 or (turn.final_later and content.strip())
    if content and turn.thought:
        raise CannotWrite
    if not thought or turn.final_later:
        return Answer(header + to, call).refuse_if(lost)
    answer = Answer(analysis, thought + then + to + call).refuse_if(lost)
    return answer.refuse_if(not thought.strip(), UNPLACED)  # a second header


def _gemma4(facts: Facts, turn: Turn) -> Answer:
    content, thought = turn.message.content.strip(), turn.thought
    calls = WRITERS[facts.calls](turn.calls) if turn.calls else ""
    own = "" if turn.after == "tool" and facts.style == "gemma4" else "<|turn>model\n"
    if facts.style == "gemma4_v2":
        return Answer(own, calls + content + facts.end).refuse_if(_loses_thought(turn))
    shown = thought and turn.recent and (facts.think == "recent" or turn.calls)
    shown = shown or (thought and turn.kept and turn.calls)
    lost = not shown and _loses_thought(turn)
    if shown:
        own, calls = own + "<|channel>thought\n", f"{thought}\n<channel|>{calls}"
    if not turn.calls:
        return Answer(own, calls + content + facts.end).refuse_if(lost)
    if turn.before != "tool":
        return Answer(own, calls + content + "<|tool_response>").refuse_if(lost)
    # Here the model stops and waits; the template writes its content after the tool's output.
    return Answer(own, calls + "<|tool_response>").refuse_if(lost).refuse_if(content, ORDER)


def _muse(facts: Facts, turn: Turn) -> Answer:
    header, said = "<|start|>assistant", [("user", turn.message.content)]
    if turn.calls:
        names = [call["name"] for call in turn.calls]
        said = list(zip(names, atem(turn.calls), strict=True))
    if turn.thought:
        said.insert(0, ("self", turn.thought))
    parts = [f" to={to}<|message|>{text}" for to, text in said]
    text = f"<|eom|>{header}".join(parts) + facts.end
    blank = turn.thought and not turn.thought.strip()
    answer = Answer(header, text).refuse_if(blank, UNPLACED)  # a header after it, with no words
    return answer.refuse_if(turn.calls and turn.message.content.strip())


SHAPES: dict[str, Callable[[Facts, Turn], Answer]] = {
    "plain": _plain,
    "qwen3": _qwen3,
    "qwen3_5": _qwen3,
    "nemotron": _nemotron,
    "nemotron_ultra": _nemotron,
    "lfm2_5": _lfm2_5,
    "deepseek": _deepseek,
    "glm": _glm,
    "glm_training": _glm,
    "gptoss": _gptoss,
    "gemma4": _gemma4,
    "gemma4_v2": _gemma4,
    "diffusion_gemma": _gemma4,
    "muse": _muse,
}
