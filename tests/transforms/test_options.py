"""Options from plain values and back."""

from __future__ import annotations

import pytest

from flyweight.errors import UsageError
from flyweight.transforms import _options, fold_batch_norm, static_int8, weight_only


def test_only_what_differs_from_the_defaults_is_written() -> None:
    for method, given in ((static_int8, {"reduced": False}), (weight_only, {"bits": 4, "group": 32})):
        found = _options.read(method, given, "")
        assert found != method.Options()
        assert _options.plain(found) == given
        assert _options.plain(method.Options()) == {}


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (
            weight_only,
            {"group": 17},
            ["group must be 16, 32, 64, 128, 256", "17", "steps[3].options.group"],
        ),
        (weight_only, {"group": 32.0}, ["group must be", "float 32.0"]),
        (weight_only, {"symmetric": 1}, ["symmetric must be bool", "int 1"]),
        (static_int8, {"range": "max"}, ["range must be one of minmax, percentile, mse", "'max'"]),
        (static_int8, {"reduced": None}, ["reduced must be bool", "NoneType None"]),
        (fold_batch_norm, {"norm": ""}, ["norm must be the path of a batch norm"]),
        (fold_batch_norm, {"colour": 1}, ["unknown option", "it has norm"]),
    ],
)
def test_wrong_options_are_refused_by_name(
    method: object, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        _options.read(method, options, "steps[3].options")  # type: ignore[arg-type]
    for word in words:
        assert word in str(error.value)
