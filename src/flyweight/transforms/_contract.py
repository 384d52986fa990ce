"""What a method gets besides the model, the site and its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flyweight.analysis.sites import SiteStatistics


@dataclass(frozen=True)
class Context:
    """What is known of the model's sites; empty when a stored artifact is rebuilt."""

    statistics: Mapping[str, SiteStatistics] = field(default_factory=dict)
    """Per site, from the one streamed pass over the examples."""
