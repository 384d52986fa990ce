"""What is known of a model's sites after scales moved between its layers, from what was known before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from flyweight.analysis.sites import SiteStatistics, analyse
from flyweight.transforms._contract import Context
from flyweight.transforms._neighbours import Link


class Statistics(Mapping[str, SiteStatistics]):
    """Statistics of sites, some of which are seen anew in a changed model when one of them is asked for."""

    def __init__(
        self,
        before: Mapping[str, SiteStatistics],
        changed: Collection[str],
        again: Callable[[], Mapping[str, SiteStatistics]],
    ) -> None:
        """changed: sites of which `before` is wrong; again: what is seen of them now."""
        self._before, self._changed, self._again = before, frozenset(changed), functools.cache(again)

    def __getitem__(self, site: str) -> SiteStatistics:
        """What was seen of a site."""
        known = self._before[site]
        return self._again()[site] if site in self._changed else known

    def __iter__(self) -> Iterator[str]:
        """The sites, in the order in which they run."""
        return iter(self._before)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._before)


def scaled(context: Context, factors: Sequence[tuple[Link, torch.Tensor]], model: nn.Module) -> Context:
    """The context of a model in which the channels of links were divided by factors (C,).

    Matrices and importances follow exactly; ranges and samples are seen anew in the changed model, when they are asked for.
    """
    outputs = {link.giver: factor for link, factor in factors}
    inputs = {path: factor[own] for link, factor in factors for path, own in link.readers.items()}

    def rows(site: str) -> torch.Tensor | None:
        found = context.rows(site)
        return found if found is None or site not in outputs else found * outputs[site].square().to(found)

    return dataclasses.replace(
        context,
        statistics=seen_again(context, {*inputs, *outputs}, model),
        gram=_divided(context.gram, inputs),
        cross=_divided(context.cross, inputs),
        rows=rows,
    )


def seen_again(context: Context, changed: Collection[str], model: nn.Module) -> Mapping[str, SiteStatistics]:
    """The context's statistics, those of changed sites from a pass of the changed model over the context's examples."""
    return Statistics(context.statistics, changed, lambda: analyse(model.eval(), context.examples).statistics)


def _divided(
    matrices: Callable[[str], torch.Tensor | None], inputs: Mapping[str, torch.Tensor]
) -> Callable[[str], torch.Tensor | None]:
    """Mean outer products of inputs that are divided by factors (I,)."""

    def matrix(site: str) -> torch.Tensor | None:
        found = matrices(site)
        if found is None or site not in inputs:
            return found
        inverse = (1 / inputs[site]).to(found)
        return found * inverse[:, None] * inverse

    return matrix
