"""Looks for the best candidate within the contract in as few evaluations as possible.

First every uniform candidate is timed and weighed, which is cheap. Then they are scored, the most promising first, until
none that is left could win. Where bytes count, which codes tell without a model, families are built and scored one after
the other, the smallest first, and what cannot be smaller than the best so far is not built. A family that gains more than
the best so far but breaks the contract is repaired: its most sensitive sites are spared, as few as the contract allows, by
bisection along the order of their predicted damage. What is best then loses as many units as the contract allows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flyweight.evaluation.bench import Survey, exact
from flyweight.planning import choose
from flyweight.planning.candidates import sensitivity
from flyweight.planning.family import Candidate, Family
from flyweight.records import Goal, Measured, Site, Trial

LOOKING = 0.5
"""Share of the time after which no further uniform candidate is timed: there must be some left to score them."""
MUCH_SLOWER = 0.7
"""Speed, the original's being 1, below which a way to run weights is given up, however the weights are stored."""
REPAIRS = 5
"""Evaluations spent on repairing one family."""
FITS = 5
"""Evaluations spent on fitting the loss of one family to the bound."""
FAR, NEAR = 8.0, 1.15
"""How many times larger or smaller the next loss may be, and how far apart losses are that are told apart."""
THINNING = 0.6
"""Share of the time after which it is not asked any more which units could go."""
STRAY = 0.1
"""How far outputs may be from the original's, as a share of their squares, where units were taken out: what is further away
is another model, and the score of one task need not tell what it lost."""
SPENT = 0.25
"""Share of the drop that the goal allows up to which the best is good enough that equally fast ones are not scored too."""
ALTERNATIVES = 2
"""Further families scored when there is time, so that the trade-off has more points than the winner."""


@dataclass(frozen=True)
class Tools:
    """What the search may do; each is remembered by the study, so that a resumed search repeats nothing."""

    survey: Callable[[Candidate], Survey]
    measure: Callable[[Candidate], Trial]
    skip: Callable[[Candidate, str], Trial]
    damages: Callable[[Family], Mapping[str, float]]
    thinned: Callable[[Family], Family | None]
    """The family with fewer units, at a first loss; None where none can go."""
    time_used: Callable[[], float]
    """Share of the time for the run that is used up; from 1 on nothing new is begun."""


@dataclass
class Hunt:
    """The state of one search."""

    goal: Goal
    original: Measured
    sites: Sequence[Site]
    tools: Tools
    trials: dict[Candidate, Trial] = field(default_factory=dict)
    surveys: dict[Candidate, Survey] = field(default_factory=dict)
    building: float = 0.0
    """Share of the time that the longest survey took, with what it built."""

    def run(self, candidates: Sequence[Candidate]) -> None:
        """Search; what was found is in `trials`."""
        larger: Sequence[Candidate] = ()
        if self.goal.minimize == "size":
            larger = self._smallest_first(candidates)
        else:
            self._look(candidates)
            self._score(candidates)
        order = self._by_gain(candidates)
        for candidate in order:
            if candidate.family.at is None and self._worth_repair(candidate):
                self._mend(candidate)
        self._thin()
        self._alternatives([*order, *larger])

    def _smallest_first(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Build, time and score family after family; first those of which only the file tells how small they are.

        Returns those that were not built, since they are larger than the best.
        """
        larger: list[Candidate] = []
        families = dict.fromkeys(candidate.family for candidate in candidates)
        for family in sorted(families, key=self._least_bytes):
            some = [candidate for candidate in candidates if candidate.family is family]
            reason = self._too_large(family)
            if reason:
                self.trials |= {candidate: self.tools.skip(candidate, reason) for candidate in some}
                larger += some
            else:
                self._look(some, share=1.0)
                self._score(some)
        return larger

    def _least_bytes(self, family: Family) -> int:
        """Bytes of a family's file, as far as they are known before it is built."""
        return 0 if family.saves is None else self.original.bytes - family.saves

    def _too_large(self, family: Family) -> str:
        """Why a family's files cannot be the smallest; empty when they can."""
        least, best = self._least_bytes(family), self.best
        if best is None or least <= best.bytes * choose.TIE:
            return ""
        return f"{least / 1e6:.1f} MB by its codes, and {best.name} takes {best.bytes / 1e6:.1f} MB within the contract"

    def _score(self, candidates: Sequence[Candidate]) -> None:
        """Score what was surveyed, the most promising first, and fit the loss of the first that has one."""
        order = self._by_gain(candidates)
        safe = next((c for c in order if exact(c.family.plan(())) and not self.surveys[c].failure), None)
        for candidate in ([safe] if safe else []) + order:
            if candidate not in self.trials:
                self._try(candidate, forced=candidate is safe)
        fitting = [c for c in order if c.family.at is not None and self.trials[c].measured is not None]
        for candidate in fitting[:1]:
            self._fit(candidate)

    def _by_gain(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that were surveyed, the largest gain first."""
        return sorted((c for c in candidates if c in self.surveys), key=self._gain, reverse=True)

    def _look(self, candidates: Sequence[Candidate], share: float = LOOKING) -> None:
        """Survey candidates, as many as a share of the time allows; what its likes were much too slow for is left out."""
        slow: set[tuple[str, frozenset[str]]] = set()
        for candidate in candidates:
            kind = (candidate.runtime, candidate.family.methods)
            if kind in slow:
                self.trials[candidate] = self.tools.skip(
                    candidate, f"weights stored otherwise were much slower on {candidate.runtime} already"
                )
            elif not self._may_go_on() or (self.surveys and self.tools.time_used() > share):
                self.trials[candidate] = self.tools.skip(
                    candidate, "the time was used up before it could be timed"
                )
            else:
                survey = self._survey(candidate)
                too_slow = survey.speedup_high < MUCH_SLOWER and choose.speed_counts(self.goal)
                if too_slow and not survey.failure:
                    slow.add(kind)

    @property
    def best(self) -> Measured | None:
        """The best so far."""
        return choose.best(self.measured(), self.goal, self.original)

    def _survey(self, candidate: Candidate) -> Survey:
        """Build, time and weigh a candidate."""
        begin = self.tools.time_used()
        survey = self.surveys[candidate] = self.tools.survey(candidate)
        self.building = max(self.building, self.tools.time_used() - begin)
        return survey

    def _may_go_on(self, *, built: bool = False) -> bool:
        """Whether there is time for as much as the longest trial took, and, unless it is built, the longest survey."""
        longest = max((trial.seconds for trial in self.trials.values()), default=0.0) / self.goal.within
        return self.tools.time_used() + longest + (0.0 if built else self.building) < 1

    def _alternatives(self, candidates: Sequence[Candidate]) -> None:
        """Score the best candidate of families that were skipped, while half of the time is left."""
        known = {c.family.name for c, trial in self.trials.items() if trial.measured is not None}
        tried = 0
        for candidate in candidates:
            if tried == ALTERNATIVES or self.tools.time_used() + self.building >= 0.5:
                return
            if candidate.family.name in known:
                continue
            survey = self.surveys.get(candidate) or self._survey(candidate)
            if not survey.failure and self._gain(candidate) > 1:
                self._try(candidate, forced=True)
                known.add(candidate.family.name)
                tried += 1

    def measured(self) -> list[Measured]:
        """All that was measured."""
        return [trial.measured for trial in self.trials.values() if trial.measured is not None]

    def _gain(self, candidate: Candidate) -> float:
        """The surveyed gain."""
        survey = self.surveys[candidate]
        return self._gain_at(survey, survey.speedup)

    def _gain_at(self, survey: Survey, speedup: float) -> float:
        if survey.failure:
            return 0.0
        return choose.gain(self.goal.minimize, self.original, speedup, survey.bytes, survey.memory)

    def _try(self, candidate: Candidate, forced: bool = False) -> Trial:
        """Score a candidate, or say why not."""
        survey = self.surveys[candidate]
        reason = survey.failure or ("" if forced else self._hopeless(candidate))
        if not reason and not self._may_go_on(built=True):
            reason = "the time was used up before it could be scored"
        trial = self.tools.skip(candidate, reason) if reason else self.tools.measure(candidate)
        self.trials[candidate] = trial
        return trial

    def _hopeless(self, candidate: Candidate) -> str:
        """Why a candidate cannot win whatever its score; empty when it can. Times count by their intervals' upper end."""
        survey, best = self.surveys[candidate], self.best
        gain, hope = self._gain(candidate), self._gain_at(survey, survey.speedup_high)
        what = {"latency": "faster", "size": "smaller", "memory": "lighter"}[self.goal.minimize]
        if hope <= 1:
            return f"not {what} than the original: {gain:.2f} x"
        if survey.speedup_high < 1 and choose.speed_counts(self.goal):
            return f"slower than the original: {survey.speedup:.2f} x as fast"
        if self._strays(candidate) > 1:
            return f"its outputs are {survey.strays:.0%} away from the original's: more than the score may not notice"
        if best is None:
            return ""
        # timed again, the best may have been lucky: what is surveyed must not lose to more than its survey told
        surveyed = (self._gain(c) for c, t in self.trials.items() if t.measured is best and c in self.surveys)
        bar = min([choose.gain_of(best, self.goal, self.original), *surveyed])
        if hope < bar:
            return f"{gain:.2f} x, and {best.name} on {best.runtime} reaches {bar:.2f} x within the contract"
        merit = survey.speedup_high / survey.bytes
        sparing = best.drop <= SPENT * self.goal.max_drop  # else a tie may win by a smaller drop
        if sparing and hope <= bar * choose.TIE and merit <= best.speedup / best.bytes * choose.TIE:
            return f"no better than {best.name} on {best.runtime}, which meets the contract"
        return ""

    def _strays(self, candidate: Candidate) -> float:
        """How far the outputs of a model without some units are from the original's, as a share of what they may be."""
        return self.surveys[candidate].strays / STRAY if candidate.family.cuts else 0.0

    def _worth_repair(self, candidate: Candidate) -> bool:
        trial = self.trials.get(candidate)
        failed = trial is not None and trial.measured is not None and trial.measured.verdict != "met"
        return failed and bool(candidate.family.steps) and not self._hopeless(candidate)

    def _mend(self, candidate: Candidate) -> None:
        """Try the family's variants; where all break the contract too, repair the one with the least drop."""
        tried = [candidate]
        for family in candidate.family.variants():
            if not self._may_go_on():
                break
            tried.append(dataclasses.replace(candidate, family=family))
            found = self._surveyed(tried[-1])
            if found is not None and found.verdict == "met":
                return
        self._repair(min(tried, key=self._drop))

    def _drop(self, candidate: Candidate) -> float:
        """What was measured; infinite where nothing was."""
        measured = self.trials[candidate].measured
        return math.inf if measured is None else measured.drop

    def _surveyed(self, candidate: Candidate) -> Measured | None:
        """Survey and score a candidate that the search thought of; None where it cannot win."""
        self._survey(candidate)
        return self._try(candidate).measured

    def _fit(self, candidate: Candidate) -> None:
        """Fit a family's loss to the bound: the largest within it, since the less a model must keep, the smaller it is."""
        met: dict[float, bool] = {}
        for _ in range(FITS):
            family, measured = candidate.family, self.trials[candidate].measured
            strays = self._strays(candidate)
            if family.at is None or (measured is None and strays <= 1):
                return
            met[family.loss] = measured is not None and measured.verdict == "met"
            worst = choose.worst_drop(measured) / max(self.goal.max_drop, 1e-9) if measured else 0.0
            loss = next_loss(met, family.loss, max(worst, strays))
            other = None if loss is None else family.at(loss)
            if other is None or not self._may_go_on():
                return
            candidate = dataclasses.replace(candidate, family=other)
            if candidate.family.loss in met:
                return
            self._surveyed(candidate)

    def _thin(self) -> None:
        """Take units out of the best; a family whose loss is chosen already has no room for more."""
        origin = next(
            (c for c, trial in self.trials.items() if trial.measured and trial.measured is self.best), None
        )
        if origin is None or origin.family.at is not None or self.tools.time_used() >= THINNING:
            return
        family = self.tools.thinned(origin.family)
        if family is not None and self._may_go_on():
            candidate = dataclasses.replace(origin, family=family)
            self._surveyed(candidate)
            self._fit(candidate)

    def _repair(self, candidate: Candidate) -> None:
        """Spare sites, most sensitive first: as few as the contract allows."""
        measured = self.trials[candidate].measured
        if measured is None or not self._may_go_on():
            return
        damages = self.tools.damages(candidate.family)
        order = sensitivity(candidate.family, self.sites, damages)
        low, high = 0, len(order) + 1
        count = first_guess([damages[name] for name in order], measured, self.goal)
        for _ in range(REPAIRS):
            if not low < count < high or not self._may_go_on():
                break
            spared = candidate.sparing(order[:count])
            self._surveyed(spared)
            trial = self.trials[spared]
            met = trial.measured is not None and trial.measured.verdict == "met"
            if met or trial.state == "skipped":  # skipped: with so many spared there is nothing to gain
                high = count
            else:
                low = count
            count = (low + min(high, len(order))) // 2 if high <= len(order) else min(2 * count, len(order))


def next_loss(met: Mapping[float, bool], loss: float, spent: float) -> float | None:
    """The loss to try after one that was measured, were what is spent proportional to it; None where that is close to all.

    met: of the losses tried so far, whether they kept the bound. It is between the largest that did and the smallest that
    did not. spent: the drop at the loss, as a share of the bound.
    """
    low = max((one for one, kept in met.items() if kept), default=0.0)
    high = min((one for one, kept in met.items() if not kept), default=math.inf)
    if high <= low * NEAR:
        return None
    factor = min(max(1 / spent, 1 / FAR), FAR) if spent > 0 else FAR
    wish = loss * factor
    if met[loss] and wish <= low * NEAR:
        return None
    if low == 0:
        wish = min(wish, high / 2)
    elif not low < wish < high:
        wish = math.sqrt(low * high)
    return float(f"{wish:.2g}")


def first_guess(damages: Sequence[float], measured: Measured, goal: Goal) -> int:
    """How many sites to spare, were the drop proportional to the sum of the damages that remain; at least 1."""
    worst = choose.worst_drop(measured)
    target = sum(damages) * max(0.0, min(1.0, goal.max_drop / worst)) if worst > 0 else 0.0
    remaining, count = sum(damages), 0
    while count < len(damages) and remaining > target:
        remaining -= damages[count]
        count += 1
    return max(1, min(count, max(1, len(damages) // 2)))
