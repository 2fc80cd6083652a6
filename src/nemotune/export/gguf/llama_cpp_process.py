"""The process in which llama.cpp runs a GGUF file: `python -m nemotune.export.gguf.llama_cpp_process FILE ANSWER`, the question as JSON on stdin.

The one module that imports xllamacpp (extra `llama-cpp`), for the C functions of llama.h that its library exports. Numbers are computed as
near to ours as llama.cpp can: attention without flash and with an fp32 cache, weights as they lie in the file. Who asks is `llama_cpp.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Collection, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

INSTALL = "pip install 'nemotune[llama-cpp]'"
UNUSABLE = 77  # the status of a process that has no llama.cpp to ask
F32 = 0  # ggml_type
# llama_context_params as words of four bytes, with what llama_context_default_params gives: another version's layout is found out by it.
CONTEXT = (512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1)
N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_THREADS_BATCH, FLASH_ATTN, TYPE_K, TYPE_V = 0, 1, 2, 7, 8, 13, 26, 27
MODEL = (-1, 1, -1, 1, 0)  # llama_model_params from word 4: n_gpu_layers, split_mode, load_mode, lazy_mode, main_gpu
BYTES_PER_THREAD = 2**28  # threads wait for one another by spinning: for a small file on a busy machine one is faster
N_GPU_LAYERS, USE_EXTRA_BUFTS = 4, 18 * 4 + 2  # the latter a byte: repacked weights, whose products round in another order


class _Params(ctypes.Structure):
    """A struct of parameters as words; longer than any version's, since it comes by value."""

    _fields_ = (("words", c_int32 * 128),)


class _Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


def _library() -> Any:
    """llama.cpp's functions with the types that they return (C's int where nothing is said)."""
    try:
        import xllamacpp
    except ImportError as error:
        _give_up(f"xllamacpp does not work here ({error}); {INSTALL}")
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.llama_model_default_params.restype = library.llama_context_default_params.restype = _Params
    library.llama_batch_init.restype = _Batch
    library.llama_get_logits_ith.restype = POINTER(c_float)
    for name in (
        "llama_model_load_from_file",
        "llama_init_from_model",
        "llama_model_get_vocab",
        "llama_get_memory",
        "llama_adapter_lora_init",
    ):
        getattr(library, name).restype = c_void_p
    library.llama_vocab_is_eog.restype = c_bool
    return library


class _Model:
    """A loaded file."""

    def __init__(self, path: str, *, vocabulary_only: bool) -> None:
        self.library = library = _library()
        self.threads = max(1, min(os.cpu_count() or 1, Path(path).stat().st_size // BYTES_PER_THREAD))
        library.llama_backend_init()
        params = library.llama_model_default_params()
        _require_layout("llama_model_params", tuple(params.words[4:9]), MODEL)
        params.words[N_GPU_LAYERS] = 0
        flags = (c_bool * ctypes.sizeof(params)).from_buffer(params)
        flags[USE_EXTRA_BUFTS] = False
        flags[18 * 4] = vocabulary_only
        self.model = c_void_p(library.llama_model_load_from_file(path.encode(), params))
        if not self.model:
            sys.exit("llama.cpp could not load the file")
        self.vocab = c_void_p(library.llama_model_get_vocab(self.model))
        self.num_tokens = library.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        tokens = (c_int32 * room)()
        count = self.library.llama_tokenize(self.vocab, c_char_p(data), len(data), tokens, room, c_bool(False), c_bool(True))
        return list(tokens[:count])

    def ends(self) -> list[int]:
        return [token for token in range(self.num_tokens) if self.library.llama_vocab_is_eog(self.vocab, token)]

    def open(self, num_positions: int) -> None:
        """Room for so many tokens."""
        params = self.library.llama_context_default_params()
        _require_layout("llama_context_params", tuple(params.words[: len(CONTEXT)]), CONTEXT)
        _require_layout("llama_context_params", (params.words[TYPE_K], params.words[TYPE_V]), (1, 1))
        for word, value in (
            *((word, num_positions) for word in (N_CTX, N_BATCH, N_UBATCH)),
            *((word, self.threads) for word in (N_THREADS, N_THREADS_BATCH)),
            *((word, F32) for word in (TYPE_K, TYPE_V)),
            (FLASH_ATTN, 0),
        ):
            params.words[word] = value
        self.context = c_void_p(self.library.llama_init_from_model(self.model, params))
        if not self.context:
            sys.exit("llama.cpp could not make a context for the file")
        self.batch = self.library.llama_batch_init(num_positions, 0, 1)

    def adapt(self, path: str) -> None:
        """Compute with the adapter at `path`, whole, in what was opened."""
        adapter = c_void_p(self.library.llama_adapter_lora_init(self.model, path.encode()))
        if not adapter:
            sys.exit("llama.cpp could not load the adapter")
        if self.library.llama_set_adapters_lora(self.context, (c_void_p * 1)(adapter), c_size_t(1), (c_float * 1)(1.0)):
            sys.exit("llama.cpp could not apply the adapter")

    def forget(self) -> None:
        self.library.llama_memory_clear(c_void_p(self.library.llama_get_memory(self.context)), c_bool(True))

    def logits(self, tokens: Sequence[int], *, start: int = 0) -> np.ndarray:
        """[T, V] of tokens that stand at `start` and after."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, start + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        if status := self.library.llama_decode(self.context, batch):
            sys.exit(f"llama_decode failed with {status}")
        rows = [self.library.llama_get_logits_ith(self.context, index) for index in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self.num_tokens,)).copy() for row in rows])

    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int]) -> list[int]:
        self.forget()
        last, answer = self.logits(prompt)[-1], []
        while len(answer) < max_new_tokens:
            answer.append(int(last.argmax()))
            if answer[-1] in stop_ids:
                break
            last = self.logits(answer[-1:], start=len(prompt) + len(answer) - 1)[-1]
        return answer


def _require_layout(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        _give_up(f"this version of xllamacpp has another {name} ({got}, expected {expected}); {INSTALL}")


def _give_up(why: str) -> NoReturn:
    print(why, file=sys.stderr)
    sys.exit(UNUSABLE)


def _answer(path: str, question: dict[str, Any]) -> dict[str, Any]:
    if "chat" in question:
        return {"chat": _serve(path, question["chat"])}
    model = _Model(path, vocabulary_only="texts" in question)
    if "texts" in question:
        return {"tokens": [model.tokenize(text) for text in question["texts"]], "ends": model.ends()}
    prompts, new = question.get("prompts") or question["continue"], question.get("max_new_tokens", 0)
    model.open(max(map(len, prompts)) + new)
    if question.get("adapter"):
        model.adapt(question["adapter"])
    if "continue" in question:
        return {"answers": [model.answer(prompt, max_new_tokens=new, stop_ids=question["stop_ids"]) for prompt in prompts]}
    found = []
    for prompt in prompts:
        model.forget()
        found.append(model.logits(prompt))
    np.savez(question["out"], *found)
    return {}


def _serve(path: str, conversations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.use_jinja = path, 4096, 1, True
    params.n_gpu_layers, params.no_extra_bufts, params.warmup = 0, True, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    return [server.handle_chat_completions({"temperature": 0.0, **conversation}) for conversation in conversations]


if __name__ == "__main__":
    result = _answer(sys.argv[1], json.load(sys.stdin))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # the native library's own clean-up has nothing left to say
