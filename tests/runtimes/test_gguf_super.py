"""K-quants and uneven blocks: the format's own package decodes them to our values, bit for bit, and they come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtimes.talkers import Wrapped, talker, tokens
from torch import nn

from flyweight import discover, transforms
from flyweight.codes import iq4_nl, super_block
from flyweight.errors import ModelError
from flyweight.inputs.check import run
from flyweight.records import Plan, Step
from flyweight.runtimes import _gguf_super, llamacpp
from flyweight.runtimes._gguf_load import state
from flyweight.runtimes._gguf_model import save
from flyweight.runtimes._gguf_super import LAYOUTS, layout_of, pack, unpack
from flyweight.runtimes._layout import load_state
from flyweight.transforms import Context, _options, plain_site

KINDS: dict[str, tuple[str, Any]] = {
    "Q2_K": ("super_block", super_block.Options(bits=2)),
    "Q3_K": ("super_block", super_block.Options(bits=3)),
    "Q4_K": ("super_block", super_block.Options(bits=4)),
    "Q5_K": ("super_block", super_block.Options(bits=5)),
    "Q6_K": ("super_block", super_block.Options(bits=6)),
    "IQ4_XS": ("super_block", super_block.Options(bits=4, uneven=True)),
    "IQ4_NL": ("iq4_nl", iq4_nl.Options()),
}
EACH = pytest.mark.parametrize("name", KINDS)


def any_stored(name: str, seed: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """What a file may hold: any bytes, and finite half floats."""
    like = fitted(name, torch.zeros(rows, columns))[1]
    source = torch.Generator().manual_seed(seed)
    found = {}
    for key, tensor in like.items():
        if tensor.dtype == torch.float16:
            found[key] = torch.randn(tensor.shape, generator=source).half() * 0.01
        else:
            found[key] = torch.randint(0, 256, tensor.shape, generator=source, dtype=torch.uint8)
    return found


def fitted(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The values of a weight rounded to nearest, and what is stored."""
    code_name, options = KINDS[name]
    code = discover.method("codes", code_name)
    grid = code.fit(weight, options)
    integers = grid.nearest(weight)
    return grid.values(integers), code.store(integers, grid, options)


def layout(name: str) -> _gguf_super.Layout:
    found = layout_of(*KINDS[name])
    assert found is not None
    return found


@EACH
def test_layouts_have_the_numbers_and_sizes_of_the_format(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    theirs = gguf.GGMLQuantizationType[name]
    kind = layout(name).type
    assert (kind.name, kind.number, (kind.length, kind.bytes)) == (
        name,
        theirs,
        gguf.GGML_QUANT_SIZES[theirs],
    )
    assert sum(layout(name).size(part) for part in layout(name).order) == kind.bytes
    assert layout_of("integer", None) is None


@EACH
def test_bytes_are_those_that_the_code_counts(name: str) -> None:
    code, options = KINDS[name]
    _, stored = fitted(name, torch.randn(3, 512))
    assert pack(layout(name), stored, 512).nbytes == discover.method("codes", code).nbytes(3, 512, options)


@EACH
def test_a_fitted_weight_decodes_to_our_values(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(5, 768, generator=torch.Generator().manual_seed(1)) / 9
    values, stored = fitted(name, weight)
    found = gguf.quants.dequantize(pack(layout(name), stored, 768), gguf.GGMLQuantizationType[name])
    assert found.dtype == np.float32
    assert np.array_equal(found, values.numpy())


@EACH
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), blocks=st.integers(1, 3))
def test_whatever_is_stored_decodes_to_its_values_and_comes_back(
    name: str, seed: int, rows: int, blocks: int
) -> None:
    gguf = pytest.importorskip("gguf")
    code, options = KINDS[name]
    columns = 256 * blocks
    stored = any_stored(name, seed, rows, columns)
    packed = pack(layout(name), stored, columns)
    integers, grid = discover.method("codes", code).restore(stored, columns, options)
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    assert np.array_equal(found, grid.values(integers).numpy())
    back = unpack(layout(name), packed, columns)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in stored.items())


def test_rows_of_another_length_are_refused() -> None:
    for columns, width in ((256, 143), (512, 144), (100, 144)):
        with pytest.raises(ModelError, match="values of Q4_K take"):
            unpack(LAYOUTS["Q4_K"], np.zeros((2, width), np.uint8), columns)


def speaker(rebuilding: bool = False) -> tuple[nn.Module, nn.Module]:
    """A model whose seven layers of a block have a type each, and the one that it was made of."""
    model = Wrapped(talker(hidden_size=256, intermediate_size=256))
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in p]
    plans = [{"code": KINDS[kind][0], **_options.plain(KINDS[kind][1])} for kind in KINDS]
    steps = [Step("weight_only", path, plans[at % len(plans)]) for at, path in enumerate(paths)]
    sites = [plain_site(model, path) for path in paths]
    return transforms.apply(model, Plan(tuple(steps)), sites, Context(rebuilding=rebuilding)), model


def test_a_model_of_every_type_is_read_to_the_bit_and_comes_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    model, _ = speaker()
    save(model.language, tmp_path / "m")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m").tensors}
    kinds = {t.tensor_type.name for t in tensors.values()}
    assert kinds == {*KINDS, "F32"}
    for name, path in (
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_down", "mlp.down_proj"),
        ("attn_v", "self_attn.v_proj"),
    ):
        tensor = tensors[f"blk.1.{name}.weight"]
        wanted = model.get_submodule(f"language.model.layers.1.{path}").weight.numpy()
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), wanted)
    other, _ = speaker(rebuilding=True)
    read = {
        name: torch.from_numpy(np.array(t.data).reshape(*(int(n) for n in t.shape[:0:-1]), -1))
        for name, t in tensors.items()
    }
    load_state(other, state(other, read), {})
    assert torch.equal(run(other, tokens()), run(model, tokens()))


def test_llama_cpp_computes_with_every_type(tmp_path: Path) -> None:
    if llamacpp.available() is not None:
        pytest.skip("needs llama.cpp")
    model, original = speaker()
    found = llamacpp.prepare(model, [tokens()], tmp_path)(tokens())
    wanted = run(model, tokens())
    # llama.cpp rounds activations to 8 bits, in blocks of 256 for these types.
    assert (wanted - found).norm() < 3e-2 * wanted.norm()
    assert (wanted - found).norm() < (run(original, tokens()) - found).norm() / 4
