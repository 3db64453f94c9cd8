"""What has to be known of a chat template and its model to say by hand what is trained."""

from __future__ import annotations

from dataclasses import dataclass


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
        keeps: the template has a variable that keeps thoughts in history.
        tag: for templates with ``{% generation %}`` tags, the header before the opening one.
        tag_end: what they enclose after the stop token.
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
    keeps: bool = False
    tag: str | None = None
    tag_end: str = ""

    @property
    def variables(self) -> dict[str, str]:
        tokens = {"bos_token": self.bos, "eos_token": self.eos}
        return {name: token for name, token in tokens.items() if token}
