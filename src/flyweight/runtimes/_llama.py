"""The few C functions of llama.cpp that read tokens, called in the library that the package xllamacpp brings.

This file needs no other of flyweight, so that _memory_probe.py can load it by itself. llama.cpp takes its settings by value
in structures that grow from version to version. A larger block of memory does as well for a caller, so what is passed
here is a block with room to spare, filled by the library itself; fields are set at places that must hold the known defaults
before. A version that has moved them is refused when it is loaded, rather than fed with what it would misread.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGE = "xllamacpp"
_WORDS = 128
"""32-bit words in a block of settings: three times as many as the largest structure has."""
_CONTEXT, _BATCH, _FLASH, _CACHED_KEYS, _CACHED_VALUES = 0, 1, 13, 26, 27
"""Words of the context's settings: tokens it holds, tokens it takes at once, a fused attention that rounds to half
precision (-1: where it is faster), and the types of the two halves of its cache."""
_CONTEXT_DEFAULTS = (
    {_CONTEXT: 512, _BATCH: 2048, _CACHED_KEYS: 1, _CACHED_VALUES: 1}
    | dict.fromkeys(range(10, _FLASH + 1), -1)
    | dict.fromkeys((14, 15, 22, 23, 24, 25), 0)
)
"""What these and their neighbours hold before they are set."""
_GPU_LAYERS, _MODEL_DEFAULTS = 4, {0: 0, 1: 0, 2: 0, 3: 0, 4: -1}
"""The word of the model's settings that says how many layers go to a GPU, -1 for all; two null pointers before it."""
_FLOAT32, _OFF = 0, 0
_ERROR, _NO_VOCABULARY = 4, 0
_PIECE = 512
"""Tokens that are read at once, so that memory for logits stays bounded."""


class _Settings(ctypes.Structure):
    """A structure of settings, by value, and room to spare."""

    _fields_ = [("words", ctypes.c_int32 * _WORDS)]


class _Batch(ctypes.Structure):
    """llama_batch; with null pointers tokens follow those before, as one text."""

    _fields_ = [
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("text_counts", ctypes.c_void_p),
        ("texts", ctypes.c_void_p),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_model_default_params": (_Settings, []),
    "llama_context_default_params": (_Settings, []),
    "llama_model_load_from_file": (_POINTER, [ctypes.c_char_p, _Settings]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_type": (ctypes.c_int, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, _Settings]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _INT, _INT]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, ctypes.c_bool]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_tokenize": (
        _INT,
        [_POINTER, ctypes.c_char_p, _INT, ctypes.POINTER(_INT), _INT, ctypes.c_bool, ctypes.c_bool],
    ),
}
"""Result and arguments of what is called."""
_said: list[str] = []
"""The errors that llama.cpp reported last: its functions tell no reason themselves."""


def _listen(level: int, text: bytes | None, _: Any) -> None:
    """Keep errors, and print nothing."""
    if level == _ERROR and text:
        _said[:] = [*_said[-3:], text.decode(errors="replace").strip()]


_listener = _LOG(_listen)


def find() -> Path | None:
    """The library's file in the installed package, without loading it; None where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = (file for folder in folders for file in sorted(Path(folder).glob(f"{PACKAGE}*.so")))
    return next(files, None)


def load() -> ctypes.CDLL:
    """The library, ready; loaded once.

    Raises OSError where it is absent or cannot be loaded, and where it is a version whose settings lie elsewhere.
    """
    file = find()
    if file is None:
        raise OSError(f"{PACKAGE} not installed, or without a library that other programs can call")
    return _load(file)


@functools.cache
def _load(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    for name, (result, arguments) in _FUNCTIONS.items():
        if not hasattr(library, name):
            raise OSError(f"{file.name} has no function {name}")
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    _check(library.llama_context_default_params(), _CONTEXT_DEFAULTS, file)
    _check(library.llama_model_default_params(), _MODEL_DEFAULTS, file)
    library.llama_log_set(_listener, None)
    library.llama_backend_init()
    return library


def _check(settings: _Settings, known: dict[int, int], file: Path) -> None:
    """Raise OSError where the defaults are not in the places where they are known to be."""
    found = {word: settings.words[word] for word in known}
    if found != known:
        raise OSError(f"{file.name} is a llama.cpp whose settings lie elsewhere: {found}, not {known}")


class Model:
    """A loaded GGUF with a cache of the tokens read, in 32-bit floats; its memory is freed with it."""

    def __init__(self, file: Path, length: int, threads: int) -> None:
        """Load a file, with a cache for at least `length` tokens; ValueError when llama.cpp does not take it."""
        self._model = self._context = None
        self.library = library = load()
        _said.clear()
        settings = library.llama_model_default_params()
        settings.words[_GPU_LAYERS] = 0
        self._model = library.llama_model_load_from_file(str(file).encode(), settings)
        self._context = self._model and library.llama_init_from_model(self._model, _context(library, length))
        if not self._context:
            raise ValueError(" ".join(_said) or "no reason was given")
        library.llama_set_n_threads(self._context, threads, threads)
        self.vocabulary = library.llama_model_get_vocab(self._model)
        self.words = int(library.llama_vocab_n_tokens(self.vocabulary))
        """Tokens that the model knows."""
        self.length = int(library.llama_n_ctx(self._context))
        """Tokens that the cache holds."""
        self._used = 0

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._context), True)
        self._used = 0

    def read(self, tokens: Sequence[int], every: bool = False) -> NDArray[np.float32]:
        """Read tokens after those before: the logits (1, V) that follow the last, or (L, V) that follow each.

        Raises ValueError for no token, one out of range, or more than the cache holds: llama.cpp would stop the process.
        """
        if not len(tokens) or min(tokens) < 0 or max(tokens) >= self.words:
            raise ValueError(f"tokens must be in [0, {self.words}), and at least one")
        given = np.ascontiguousarray(tokens, np.int32)
        if self._used + len(given) > self.length:
            raise ValueError(f"the cache holds {self.length} tokens, got {self._used} and {len(given)} more")
        found = np.empty((len(given) if every else 1, self.words), np.float32)
        for start in range(0, len(given), _PIECE):
            piece = given[start : start + _PIECE]
            rows = found[start : start + _PIECE] if every else found
            rows[:] = self._decode(piece, np.ones(len(piece), np.int8) if every else _last(len(piece)))
        return found

    def _decode(self, tokens: NDArray[np.int32], wanted: NDArray[np.int8]) -> NDArray[np.float32]:
        """The logits of the wanted tokens, in llama.cpp's own memory, which the next call overwrites."""
        batch = _Batch(len(tokens))
        batch.tokens = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.wanted = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        failed = self.library.llama_decode(self._context, batch)
        if failed:
            raise ValueError(f"llama.cpp could not read the tokens: {failed} {' '.join(_said)}")
        self._used += len(tokens)
        logits = self.library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(int(wanted.sum()), self.words))

    def tokenize(self, text: str) -> list[int]:
        """A text as tokens, special ones too, none added; ValueError where the file has no vocabulary."""
        if self.library.llama_vocab_type(self.vocabulary) == _NO_VOCABULARY:
            raise ValueError("the file must have a vocabulary")
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 1))()  # a byte makes no more than a token
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), False, True)
        if count < 0:
            raise ValueError("llama.cpp could not split the text")
        return list(room[:count])

    def __del__(self) -> None:
        if self._context:
            self.library.llama_free(self._context)
        if self._model:
            self.library.llama_model_free(self._model)


def _context(library: ctypes.CDLL, length: int) -> _Settings:
    settings: _Settings = library.llama_context_default_params()
    settings.words[_CONTEXT], settings.words[_BATCH] = length, _PIECE
    settings.words[_FLASH] = _OFF
    settings.words[_CACHED_KEYS] = settings.words[_CACHED_VALUES] = _FLOAT32
    return settings


def _last(count: int) -> NDArray[np.int8]:
    wanted = np.zeros(count, np.int8)
    wanted[-1] = 1
    return wanted
