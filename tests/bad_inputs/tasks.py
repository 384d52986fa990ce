"""Tasks for the bad inputs, read by the command line as a user's own file: one sound one, the others each with one fault."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flyweight import Task

SIZE, CLASSES, SAMPLES = 32, 5, 60
CALLS = "FLYWEIGHT_TEST_CALLS"
"""Names a file that gets one line for each call of `slow`'s score."""


def sound() -> Task:
    """A small classifier that every runtime takes."""
    return _task()


def nan_weight() -> Task:
    """One weight is NaN."""
    return _spoilt(float("nan"))


def inf_weight() -> Task:
    """One weight is infinite."""
    return _spoilt(float("inf"))


def huge_weight() -> Task:
    """One weight is 1e38."""
    return _spoilt(1e38)


def state_dict() -> Task:
    """A state in place of the model."""
    return _task(model=_model().state_dict())  # type: ignore[arg-type]


def no_parameters() -> Task:
    """Nothing to optimize."""
    return _task(model=nn.Sequential(nn.ReLU(), nn.Flatten()))


def no_layer() -> Task:
    """Parameters, but no layer that a method can change."""
    return _task(model=nn.LayerNorm(SIZE), score=lambda predict: predict(_data()).std(1).tolist())


def tied() -> Task:
    """Two layers hold one weight."""
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, CLASSES))
    model[2].weight = model[0].weight
    return _task(model=model)


def called_twice() -> Task:
    """One layer is called twice."""
    layer = nn.Linear(SIZE, SIZE)
    return _task(model=nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(SIZE, CLASSES)))


def branching() -> Task:
    """The values of the input decide what runs."""
    return _task(model=_Branching())


def training() -> Task:
    """Left in training mode, with a dropout."""
    return _task(
        model=nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.5), nn.Linear(SIZE, CLASSES)).train()
    )


def meta() -> Task:
    """Parameters without values."""
    return _task(model=nn.Linear(SIZE, CLASSES, device="meta"))


def lazy() -> Task:
    """Parameters without a shape."""
    return _task(model=nn.LazyLinear(CLASSES))


def quantized() -> Task:
    """A model that flyweight quantized before."""
    from flyweight import Plan, Step
    from flyweight.analysis.sites import plain_site
    from flyweight.transforms import Context, apply

    model = _model()
    names = ("0", "2")
    plan = Plan(tuple(Step("weight_only", name) for name in names))
    return _task(model=apply(model, plan, [plain_site(model, name) for name in names], Context()))


def dict_output() -> Task:
    """The output is a dict."""
    return _task(model=_Named(), score=lambda predict: _accuracy(predict(_data())["logits"]))


def odd_output() -> Task:
    """The output is no tensor."""
    return _task(model=_Odd(), score=lambda predict: 1.0)


def grouped() -> Task:
    """A convolution with groups, whose inputs divide by nothing."""
    model = nn.Sequential(
        nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    return _task(model=model)


def uncopyable() -> Task:
    """A model that holds what cannot be copied."""
    model = _model()
    model.lock = threading.Lock()
    return _task(model=model)


def no_examples() -> Task:
    """No calibration data."""
    return _task(examples=[])


def generator() -> Task:
    """Examples that are used up after one pass."""
    return _task(examples=(part for part in _data().split(20)))  # type: ignore[arg-type]


def nan_example() -> Task:
    """A NaN in the second batch."""
    first, second = _data().split(30)
    second[3, 1] = float("nan")
    return _task(examples=[first, second])


def wrong_shape() -> Task:
    """Examples one feature short."""
    return _task(examples=[_data()[:, 1:]])


def wrong_dtype() -> Task:
    """Bytes where the model takes floats."""
    return _task(examples=[_data().to(torch.uint8)])


def wrong_type() -> Task:
    """A list of numbers in place of a tensor."""
    return _task(examples=[[1.0, 2.0]])  # type: ignore[list-item]


def empty_dict() -> Task:
    """A batch without a tensor."""
    return _task(examples=[{}])


def bad_label() -> Task:
    """The user's own score meets a class that is not there."""
    labels = torch.full((SAMPLES,), CLASSES)
    return _task(score=lambda predict: -float(nn.functional.cross_entropy(predict(_data()), labels)))


def constant() -> Task:
    """All inputs are 0: the range of every activation in front is 0."""
    return _task(examples=[torch.zeros(20, SIZE)])


def outlier() -> Task:
    """One input of 1e30."""
    data = _data()
    data[0, 0] = 1e30
    return _task(examples=[data])


def breaking_examples() -> Task:
    """A sequence that fails when it is read."""
    return _task(examples=_Breaking())


def score_none() -> Task:
    """The score gives None."""
    return _task(score=lambda predict: None)  # type: ignore[arg-type, return-value]


def score_text() -> Task:
    """The score gives a word."""
    return _task(score=lambda predict: "good")  # type: ignore[arg-type, return-value]


def score_nan() -> Task:
    """The score of the third sample is NaN."""
    return _task(score=lambda predict: [1.0, 0.5, float("nan")])


def score_table() -> Task:
    """The score gives two dimensions."""
    return _task(score=lambda predict: predict(_data()))


def score_empty() -> Task:
    """The score gives no value."""
    return _task(score=lambda predict: [])


def score_zero() -> Task:
    """The original scores 0, so that no drop is relative to it."""
    return _task(score=lambda predict: [0.0, 0.0, 0.0])


def score_crash() -> Task:
    """The score fails."""
    return _task(score=_crash)


def score_exit() -> Task:
    """The score ends the program."""
    return _task(score=lambda predict: sys.exit(3))


def score_fewer() -> Task:
    """The score reads a generator: the second call finds nothing left but one value."""
    rows = iter([[1.0, 0.5, 0.75], [1.0]])
    return _task(score=lambda predict: next(rows, [1.0]))


def score_crash_later() -> Task:
    """The score works for the original alone."""
    calls = iter(range(10**6))
    return _task(score=lambda predict: [1.0, 0.5] if next(calls) == 0 else _crash(predict))


def no_score() -> Task:
    """The score is no function."""
    return _task(score=0.9)  # type: ignore[arg-type]


def noisy() -> Task:
    """Every change costs some of the score: a bound of 0 cannot be met."""
    data = _data()
    with torch.no_grad():
        wanted = _model()(data)

    def score(predict: Callable[[Any], Any]) -> Sequence[float]:
        distance = (predict(data) - wanted).abs().mean(1)
        return (1.0 - distance - torch.rand(len(distance)) * 1e-3 * (distance > 0)).tolist()

    return _task(score=score)


def slow() -> Task:
    """A score that takes a moment and notes each of its calls in the file that CALLS names."""
    return _task(score=_noted)


def other_weights() -> Task:
    """The same structure as `sound`, other weights."""
    return _task(model=_model(seed=1))


def other_shape() -> Task:
    """The same layers as `sound`, of other widths."""
    model = nn.Sequential(nn.Linear(SIZE, 48), nn.ReLU(), nn.Linear(48, CLASSES))
    return _task(model=model)


def non_ascii() -> Task:
    """Names of layers that not every terminal can show."""
    model = nn.Sequential()
    model.add_module("größe", nn.Linear(SIZE, CLASSES))
    return _task(model=model, name="Prüfung ✓")


def no_task() -> str:
    """A word in place of a task."""
    return "a task"


def fails() -> Task:
    """Fails while it builds the task."""
    raise RuntimeError("the weights are gone\nand more")


def needs_argument(path: str) -> Task:
    """Cannot be called without an argument."""
    return _task()


def _task(**changes: Any) -> Task:
    given: dict[str, Any] = {
        "name": "small",
        "model": _model(),
        "examples": _data().split(20),
        "score": _accurate,
    }
    return Task(**{**given, **changes})


def _model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(SIZE, 64), nn.ReLU(), nn.Linear(64, CLASSES)).eval()


def _spoilt(value: float) -> Task:
    model = _model()
    with torch.no_grad():
        model[2].weight[1, 7] = value
    return _task(model=model)


def _data() -> torch.Tensor:
    return torch.randn(SAMPLES, SIZE, generator=torch.Generator().manual_seed(2))


def _accurate(predict: Callable[[Any], Any]) -> Sequence[float]:
    return _accuracy(predict(_data()))


def _accuracy(logits: torch.Tensor) -> Sequence[float]:
    with torch.no_grad():
        labels = _model()(_data()).argmax(1)
    return (logits.argmax(1) == labels).float().tolist()


def _crash(predict: Callable[[Any], Any]) -> float:
    raise RuntimeError("the labels are gone")


def _noted(predict: Callable[[Any], Any]) -> Sequence[float]:
    handle = os.open(os.environ[CALLS], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, b"call\n")
    os.close(handle)
    time.sleep(0.3)
    return _accurate(predict)


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE, CLASSES), nn.Linear(SIZE, CLASSES)
        self.norm = nn.BatchNorm1d(SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.one(self.norm(x)) if x.sum() > 0 else self.two(x)
        return found


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x), "input": x}


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _model()

    def forward(self, x: torch.Tensor) -> object:
        return {1, 2, self.body(x).shape}


class _Breaking(Sequence[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        if index == 0:
            return _data()
        if index == 1:
            raise OSError("the disk of the examples is gone")
        raise IndexError(index)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(2))
