"""Copies the figures of benchmarks/results into README.md and docs, between their markers: `python -m benchmarks.readme`.

With --check it changes nothing and fails when a text is not what the results say.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "flyweight"
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = "![The contract job: flyweight and its peers, side by side](benchmarks/results/contract.svg)"
PAGES = ("README.md", "docs/optimize.md", "docs/quantization.md", "docs/structure.md")
_LABELS = {
    "minilm": "all-MiniLM-L6-v2, sentence retrieval",
    "efficientnet_lite0": "EfficientNet-lite0, photos",
    "fashion_cnn": "small CNN, Fashion-MNIST",
}
_PEERS = {
    "ort_dynamic": "ONNX Runtime dynamic int8, defaults",
    "ort_dynamic_reduced": "ONNX Runtime dynamic int8, per channel, reduced range",
    "ort_static": "ONNX Runtime static int8 (QDQ, U8S8)",
    "ort_static_reduced": "ONNX Runtime static int8, reduced range",
    "openvino_nncf": "OpenVINO + NNCF int8",
    "torchao_int8": "torchao dynamic int8",
}


def main() -> int:
    """Write or check every page; returns the exit code."""
    found = _load("contract")
    blocks = {"tree": tree()} | ({"contract": contract(found), "peers": peers(found)} if found else {})
    blocks |= _weight_codes() | _choices() | _llamacpp() | _depth()
    stale = []
    for name in PAGES:
        path = ROOT / name
        old = path.read_text()
        new = old
        for key, text in blocks.items():
            new = re.sub(
                rf"(<!-- {key} -->\n).*?(<!-- /{key} -->)",
                lambda m, t=text: m[1] + t + m[2],
                new,
                flags=re.DOTALL,
            )
        if new != old:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(new)
    print(f"changed: {', '.join(stale)}" if stale else "all pages say what the results say")
    return 1 if stale and "--check" in sys.argv else 0


def _weight_codes() -> dict[str, str]:
    """The tables of benchmarks/weight_codes.py, if anything was measured."""
    from benchmarks import _weight_report, _weight_runs  # they read the functions of this module

    records = _weight_runs.read(quick=False)
    if not records:
        return {}
    return {"weight_codes": _weight_report.table(records), "language": _weight_report.summary(records)}


def _choices() -> dict[str, str]:
    """The tables of benchmarks/choices.py that were measured."""
    from benchmarks import choices  # it reads the functions of this module

    return {f"choices {name}": choices.markdown(table) for name, table in _load("choices").items()}


def _llamacpp() -> dict[str, str]:
    """The table of benchmarks/llamacpp.py, if anything was measured."""
    from benchmarks import _llamacpp_report  # it reads the functions of this module

    found = _load("llamacpp")
    return {"llamacpp": _llamacpp_report.table(found["records"])} if found else {}


def _depth() -> dict[str, str]:
    """The table of benchmarks/depth.py, if anything was measured."""
    from benchmarks import depth  # it reads the functions of this module

    found = _load("depth")
    return {"depth": depth.table(found)} if found else {}


def _between(page: str, key: str, text: str) -> str:
    """The page with other text between the markers of a key."""
    pattern = re.compile(rf"(<!-- {key} -->\n).*?(<!-- /{key} -->)", re.DOTALL)
    return pattern.sub(lambda found: found[1] + text + found[2], page)


def contract(document: dict[str, Any]) -> str:
    """The README's table: what came out of the three examples."""
    lines = [
        "| model | verdict | faster than eager PyTorch | file | drop | aim | fastest peer within 1 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document["details"]:
        ours = document["details"][case]["flyweight"]
        rows = {row["metric"]: row for row in document["rows"] if row["case"] == case}
        speed, size = rows["speed-up, eager PyTorch = 1"], rows["file / fp32 file"]
        against = rows["speed-up at <= 1 % drop"]
        known = {name: value for name, value in against["peers"].items() if value is not None}
        best = max(known, key=lambda name: known[name]) if known else ""
        peer = f"{known[best]:.2f} × ({_PEERS[best]})" if best else "none"
        met = "met" if rows["contract met (1 = yes)"]["ours"] == 1 else "infeasible"
        low, high = speed["ours_interval"]
        lines.append(
            f"| {_LABELS[case]} | {met} | **{speed['ours']:.2f} ×** ({low:.2f} to {high:.2f}) | {size['ours']:.3f} of fp32 "
            f"| {ours['drop']:.2%} | {speed['aim']:.1f} × | {peer} |"
        )
    return "\n".join([PICTURE, "", *lines]) + "\n\n" + _where(document)


def peers(document: dict[str, Any]) -> str:
    """Every peer's speed, drop and size, case by case."""
    parts = []
    for case, found in document["details"].items():
        lines = [
            f"**{_LABELS[case]}**",
            "",
            "| what | speed-up (95 %) | drop ± | file, MB |",
            "|---|---|---|---|",
        ]
        for name, seen in found.items():
            label = "**flyweight**" if name == "flyweight" else _PEERS[name]
            if "failed" in seen:
                lines.append(f"| {label} | failed: {seen['failed'][:90]} | | |")
                continue
            low, high = seen["interval"]
            half = f" ± {seen['half']:.2%}" if "half" in seen else ""
            drop = f"{seen['drop']:.2%}{half}" if "drop" in seen else "not scored"
            cells = (label, f"{seen['speedup']:.2f} × ({low:.2f} to {high:.2f})", drop)
            lines.append(f"| {' | '.join(cells)} | {seen['bytes'] / 1e6:.2f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n\n" + _where(document)


def tree() -> str:
    """The package's folders and files, each with the first clause of its docstring."""
    lines = ["```", "src/flyweight/"]
    for path in _ordered(SOURCE):
        depth = len(path.relative_to(SOURCE).parts)
        name = "  " * depth + path.name + ("/" if path.is_dir() else "")
        lines.append(f"{name:<28}{_purpose(path / '__init__.py' if path.is_dir() else path)}")
    return "\n".join([*lines, "```", ""])


def _ordered(folder: Path) -> list[Path]:
    """Every public file below a folder, files before folders."""
    found = sorted(
        (p for p in folder.iterdir() if not p.name.startswith("_")), key=lambda p: (p.is_dir(), p.name)
    )
    kept = [p for p in found if p.suffix == ".py" or (p / "__init__.py").exists()]
    return [q for p in kept for q in (p, *(_ordered(p) if p.is_dir() else ()))]


def _purpose(path: Path) -> str:
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"(?<=[a-z)])[.;] ", text)[0].rstrip(".")
    return sentence if len(sentence) <= 104 else re.split(r"[:,] ", sentence[:104])[0]


def _where(document: dict[str, Any]) -> str:
    machine = document["machine"]
    return (
        f"Measured on {machine['cores']} cores of an {machine['processor']} ({', '.join(machine['instructions'])}), "
        f"{document['date']}, commit {document['commit']}, in one run of `python -m benchmarks.contract`.\n"
    )


def _load(name: str) -> dict[str, Any]:
    """A benchmark's results; empty before it was run."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
