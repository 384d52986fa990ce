"""NNCF's compress_weights on the OpenVINO model: scale estimation, and error feedback (GPTQ) with it.

Four bits have a zero point; of 3 and 2 bits NNCF has symmetric ones alone, and 8 bits are per channel and know no
data. AWQ is left out: it changes neighbouring layers too, and weights are what is compared here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.weight_peers._job import Done, Job, examples, layers, load, timed

ENVIRONMENT = ".venv-peers"
PACKAGES = ("nncf", "openvino", "torch", "transformers")
VARIANTS: Mapping[str, Mapping[str, Any]] = {"nncf": {"gptq": False}, "nncf_gptq": {"gptq": True}}
_MODES = {8: "int8_asym", 4: "int4_asym", 3: "int3_sym", 2: "int2_sym"}
_FROM = "self.model."
"""What OpenVINO puts before a parameter's name."""


def settings(name: str, bits: int, kind: str) -> dict[str, Any] | str:
    """All that is told to compress_weights besides the data."""
    if bits == 8:
        learned = "NNCF's 8 bits learn nothing from data; see the peer nncf"
        return learned if VARIANTS[name]["gptq"] else {"mode": _MODES[bits]}
    all_alike = {"ratio": 1.0, "all_layers": True}  # else the last layer has 8 bits
    return {"mode": _MODES[bits], "group_size": 32, **all_alike, "scale_estimation": True, **VARIANTS[name]}


def run(job: Job) -> Done:
    """Convert the model to OpenVINO, compress it, and decode its weights by OpenVINO."""
    import nncf
    import openvino

    batches = examples(job)
    float_model = load(job)
    names = list(layers(float_model))
    model = openvino.convert_model(_Flat(float_model, job.kind), example_input=batches[0])
    told = dict(job.settings)
    told["mode"] = nncf.CompressWeightsMode(told["mode"])
    if "group_size" in told:
        arrays = [{key: tensor.numpy() for key, tensor in batch.items()} for batch in batches]
        told |= {"dataset": nncf.Dataset(arrays), "subset_size": len(arrays)}
    scope = nncf.IgnoredScope(patterns=[".*embed.*", ".*lm_head.*"], validate=False)
    compressed, seconds = timed(lambda: nncf.compress_weights(model, ignored_scope=scope, **told))
    constants = {
        node.get_friendly_name().removeprefix(_FROM): node
        for node in compressed.get_ops()
        if node.get_type_name() == "Constant"
    }
    parts = [f"{name}.weight{end}" for name in names for end in ("", "/scale", "/zero_point")]
    stored = sum(_bytes(constants[part]) for part in parts if part in constants)
    weights = {name: _decoded(constants[f"{name}.weight"]) for name in names}
    return Done(weights, stored, seconds)


class _Flat(nn.Module):
    """The model as a function of its tensors alone."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.causal = model, kind == "causal"

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, or the last hidden state."""
        if self.causal:
            mask = torch.ones_like(input_ids)  # without it transformers asks for what OpenVINO cannot convert
            logits: torch.Tensor = self.model(
                input_ids=input_ids, attention_mask=mask, use_cache=False
            ).logits
            return logits
        state: torch.Tensor = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state
        return state


def _bytes(constant: Any) -> int:
    """Bytes of a constant, whose elements may be parts of a byte."""
    bits: int = math.prod(constant.get_output_shape(0)) * int(constant.get_element_type().bitwidth)
    return math.ceil(bits / 8)


def _decoded(constant: Any) -> torch.Tensor:
    """The float32 weight that a constant of small integers becomes before its product, computed by OpenVINO."""
    import openvino

    node = constant
    while True:
        (target,) = node.output(0).get_target_inputs()
        if target.get_node().get_type_name() == "MatMul":
            break
        node = target.get_node()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    small = openvino.compile_model(openvino.Model([node.output(0)], []), "CPU", settings)
    return torch.from_numpy(small([])[0].astype("float32").copy())
