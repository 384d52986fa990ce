"""Language models larger than memory: from the shards of one Hugging Face folder to those of another, block after block."""

from __future__ import annotations

from flyweight.streaming.stream import Options as Options
from flyweight.streaming.stream import Streamed as Streamed
from flyweight.streaming.stream import stream as stream
