"""`flyweight stream` on the command line: its arguments, and what they call."""

from __future__ import annotations

import argparse
import re

from flyweight import discover
from flyweight.errors import UsageError
from flyweight.streaming.stream import Options, stream


def arguments(command: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    known = Options()
    command.add_argument("folder", metavar="FOLDER", help="a causal language model, as a Hugging Face folder")
    command.add_argument("--text", required=True, metavar="FILE", help="a text that calibrates it")
    command.add_argument("--bits", default=str(known.bits), help="8, 6, 5, 4, 3 or 2 (%(default)s)")
    command.add_argument(
        "--group",
        default=str(known.group),
        help="inputs that share a scale, or channel for all (%(default)s)",
    )
    command.add_argument(
        "--zeros", action="store_true", help="zero points: closer, and decoded by transformers"
    )
    roundings = tuple(discover.methods("roundings"))
    command.add_argument(
        "--rounding", default=known.rounding, choices=roundings, help="how integers are picked (%(default)s)"
    )
    command.add_argument(
        "--windows", default=str(known.windows), help="windows of the text, 256 tokens each (%(default)s)"
    )
    command.add_argument("--resume", action="store_true", help="go on with the run that OUT holds")
    command.add_argument("-o", "--out", required=True, metavar="OUT", help="folder for the new model")


def run(given: argparse.Namespace) -> str:
    """Stream as the arguments say; what to say of it. Raises what `stream` raises."""
    options = Options(
        bits=_number(given.bits, "--bits"),
        group=None if given.group == "channel" else _number(given.group, "--group"),
        symmetric=not given.zeros,
        rounding=given.rounding,
        windows=_number(given.windows, "--windows"),
    )
    return stream(given.folder, given.text, given.out, options, resume=given.resume, progress=True).summary()


def _number(text: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise UsageError("this must be a whole number", got=repr(text), where=where)
    return int(text)
