"""The peers' own int8, made by their own tools from the same model and the same calibration examples.

Each is a function (model, examples, folder) -> predictor, with an attribute `bytes`. Needs the environment of `make peers`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flyweight.analysis.machine import cores
from flyweight.inputs.check import run
from flyweight.runtimes import _structure
from flyweight.runtimes._export import _example, _Flat, names, tensors


@dataclass(frozen=True)
class Peer:
    """A peer's model, ready to run."""

    call: Callable[[Any], Any]
    bytes: int

    def __call__(self, batch: Any) -> Any:
        """The output on a batch."""
        return self.call(batch)


def ort_dynamic(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """ONNX Runtime's quantize_dynamic with its defaults."""
    return _ort_dynamic(model, examples, folder, {})


def ort_dynamic_reduced(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """ONNX Runtime's quantize_dynamic, per channel and with reduced range."""
    return _ort_dynamic(model, examples, folder, {"per_channel": True, "reduce_range": True})


def ort_static(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """ONNX Runtime's quantize_static: QDQ, unsigned activations, signed weights per channel."""
    return _ort_static(model, examples, folder, reduced=False)


def ort_static_reduced(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """The same with reduced range."""
    return _ort_static(model, examples, folder, reduced=True)


def openvino_nncf(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """OpenVINO with NNCF's post-training int8."""
    import nncf
    import numpy as np
    import openvino

    found = openvino.Core().read_model(export(model, examples, folder))
    data = nncf.Dataset([_arrays(batch) for batch in examples])
    kind = nncf.ModelType.TRANSFORMER if _has_attention(model) else None
    quantized = nncf.quantize(found, data, model_type=kind, subset_size=len(examples))
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": cores(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(folder / "nncf.xml", "CPU", settings)
    request, template = compiled.create_infer_request(), run(model, examples[0])

    def call(batch: Any) -> Any:
        got = request.infer(_arrays(batch))
        return _structure.rebuild(
            template, (torch.from_numpy(np.array(got[port])) for port in compiled.outputs)
        )

    return Peer(call, sum((folder / f"nncf.{end}").stat().st_size for end in ("xml", "bin")))


def torchao_int8(model: nn.Module, examples: Sequence[Any], folder: Path) -> Peer:
    """torchao's dynamic int8, eager."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    changed = copy.deepcopy(model)
    quantize_(changed, Int8DynamicActivationInt8WeightConfig())
    torch.save(changed.state_dict(), folder / "torchao.pt")
    return Peer(lambda batch: run(changed, batch), (folder / "torchao.pt").stat().st_size)


PEERS = (ort_dynamic, ort_dynamic_reduced, ort_static, ort_static_reduced, openvino_nncf, torchao_int8)


def export(model: nn.Module, examples: Sequence[Any], folder: Path) -> Path:
    """The original as ONNX, by PyTorch's own exporter."""
    path = folder / "float.onnx"
    if not path.exists():
        batch, free = _example(examples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Flat(copy.deepcopy(model), batch).eval(),
                tuple(tensors(batch)),
                dynamo=True,
                input_names=list(names(batch)),
                dynamic_shapes=(tuple(free),),
                opset_version=21,
                verbose=False,
            )
        program.save(path)
    return path


def _ort_dynamic(model: nn.Module, examples: Sequence[Any], folder: Path, options: dict[str, bool]) -> Peer:
    from onnxruntime.quantization import quantize_dynamic

    out = folder / f"dynamic{len(options)}.onnx"
    quantize_dynamic(_shaped(model, examples, folder), out, **options)
    return _ort(out, model, examples)


def _ort_static(model: nn.Module, examples: Sequence[Any], folder: Path, *, reduced: bool) -> Peer:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Any] = iter([_arrays(batch) for batch in examples])

        def get_next(self) -> Any:
            return next(self._batches, None)

    out = folder / f"static{reduced}.onnx"
    quantize_static(
        _shaped(model, examples, folder),
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduced,
    )
    return _ort(out, model, examples)


def _shaped(model: nn.Module, examples: Sequence[Any], folder: Path) -> Path:
    """ONNX Runtime's own preparation for its quantizer: shapes inferred, graph optimized."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    if not path.exists():
        try:
            quant_pre_process(export(model, examples, folder), path, skip_symbolic_shape=True)
        except Exception:  # its preparation fails on some graphs; its quantizer then takes the graph as it is
            return export(model, examples, folder)
    return path


def _ort(path: Path, model: nn.Module, examples: Sequence[Any]) -> Peer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    template = run(model, examples[0])

    def call(batch: Any) -> Any:
        return _structure.rebuild(template, map(torch.from_numpy, session.run(None, _arrays(batch))))

    return Peer(call, path.stat().st_size)


def _arrays(batch: Any) -> dict[str, Any]:
    return {name: t.numpy() for name, t in zip(names(batch), tensors(batch), strict=True)}


def _has_attention(model: nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in model.modules())
