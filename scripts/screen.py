"""What people see of a run: the rows as they are made, and the report at its end."""

from __future__ import annotations

import os
import sys
from typing import Any

from processes import say


class Screen:
    """Shows rows one after the other: the first that is not done as it is made, the others when their turn comes."""

    def __init__(self, shown: list[str], stream: Any):
        self.shown, self.stream = shown, stream
        self.row, self.written = 0, 0
        self.head()

    def head(self) -> None:
        """A row begins with its prompt."""
        if self.row < len(self.shown):
            write(dim(f"--- {self.row + 1} of {len(self.shown)} ---\n" if len(self.shown) > 1 else ""))
            write(dim(self.shown[self.row]))

    def show(self, everything: bool = False) -> None:
        """What is new of the row that is shown, and of the rows behind it that may be."""
        while self.row < len(self.shown):
            text = self.stream.text[self.row]
            write(text[self.written :])
            self.written = len(text)
            if self.stream.finish[self.row] == "running" and not everything:
                return
            write("\n")
            self.row, self.written = self.row + 1, 0
            self.head()


def write(text: str) -> None:
    """Text on stdout, at once."""
    if text:
        print(text, end="", flush=True)


def dim(text: str) -> str:
    """Text in a paler colour, where there are colours."""
    return f"\x1b[2m{text}\x1b[0m" if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def size(number: float) -> str:
    """Bytes for people."""
    if number < 1e5:
        return f"{number / 1e3:.1f} kB"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def report(told: dict[str, Any]) -> None:
    """The same for people, on stderr."""
    seconds, cache = told["seconds"], told["cache"]
    rate = {phase: f" ({value:.1f} tokens/s)" if value else "" for phase, value in told["tokens_per_second"].items()}
    rows = list(zip(told["prompt_tokens"], told["new_tokens"], told["finish"], strict=True))
    tokens = ", ".join(f"{prompt} + {new} ({why})" for prompt, new, why in rows[:4])
    tokens += f" and {len(rows) - 4} more rows" if len(rows) > 4 else ""
    speed = share = ""
    if told["gb_per_second"]:
        speed = f"; {size(told['bytes_per_token'])} a token, {told['gb_per_second']:.2f} GB/s"
    if told["share_of_bandwidth"]:
        share = f" ({told['share_of_bandwidth']:.0%} of the chip's)"
    say(
        f"\n{told['model']} in {told['weights'] or told['dtype']} on {told['devices']} x {told['device']}: "
        f"tokens {tokens}; the first after {seconds['first_token'] or 0:.2f} s\n"
        f"load {seconds['load']:.2f} s, compile {seconds['compile']:.2f} s (programs: {told['compiled_programs']}), "
        f"prefill {seconds['prefill']:.2f} s{rate['prefill']}, decode {seconds['decode']:.2f} s{rate['decode']}\n"
        f"weights {size(told['weight_bytes'])}, {cache['kind']} cache {shrunk(cache)} ({cache['rows']} x "
        f"{cache['size']} tokens, {cache['dtype']}){speed}{share}"
    )
    if told["speculation"]:
        say(fared(told["speculation"], told["dtype"]))
    if told["mesh"]:
        held, axes = told["per_device"], " ".join(f"{axis}={n}" for axis, n in told["mesh"].items())
        sent = [(row["count"], row["kind"], size(row["bytes"])) for row in told["collectives"]]
        step = ", ".join(f"{count} {kind}{'s' * (count > 1)} ({bytes})" for count, kind, bytes in sent)
        say(
            f"mesh {axes}: {size(held['weight_bytes'])} of weights and {size(held['cache_bytes'])} of cache a device; "
            f"a step: {step or 'no collectives'}"
        )


def shrunk(cache: dict[str, Any]) -> str:
    """The bytes of a cache, at first and, where it became smaller, at the end."""
    first, last = cache["bytes"], cache["bytes_at_the_end"]
    return size(first) if first == last else f"{size(first)}, then {size(last)}"


def fared(told: dict[str, Any], dtype: str) -> str:
    """How a draft fared, in a line or two."""
    size = f"tree {told['tree']}" if "tree" in told else f"{told['num_draft_tokens']} tokens a round"
    size += " at most" * told["adaptive"]
    head = f"draft {told['draft']}, {size}, rule {told['rule']}: "
    if told["acceptance_rate"] is None:
        line = f"{head}nothing was drafted in {told['rounds']} rounds"
    else:
        places = ", ".join("-" if share is None else f"{share:.0%}" for share in told["accepted_per_position"])
        line = (
            f"{head}{told['acceptance_rate']:.0%} of what was tried accepted, of what was drafted by place {places}; "
            f"{told['tokens_per_round']:.2f} tokens a round"
        )
    gains = []
    if told["predicted_speedup"]:
        gains.append(
            f"{told['predicted_speedup']:.2f} predicted, a draft's pass being {told['cost']:.2f} of the model's"
        )
    if told.get("measured_speedup"):
        gains.append(f"{told['measured_speedup']:.2f} measured")
    line += f"\nspeed-up over plain decoding: {'; '.join(gains)}" if gains else ""
    if told.get("same_ids"):
        line += ", with the same ids"
    elif at := told.get("differs_at"):
        line += (
            f"; plain decoding differs from token {at['token']} of row {at['row']} on, where {dtype} rounds a close "
            "choice otherwise (see --dtype float32)"
        )
    return line
