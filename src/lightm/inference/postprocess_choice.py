"""Which post-processing steps are taken; see `lightm.inference.postprocess` for the steps.

No step is the normal answer. One is taken when all of this holds:

- It leaves the label map of every training and validation case as it is, and its classes occur in at least 30 of them:
  with none of 30 changed, less than a tenth of new cases would be, at 95% confidence (the rule of three, 3/n).
  Components are dropped below half the size of the smallest in these labels, as small structures are predicted smaller.
- At least 10 validation cases were predicted. The mean DSC of its classes rises by 0.005 or more, and in so many cases
  that a one-sided sign test gives p <= 0.05 divided by the number of steps that are tried (Bonferroni).
- It harms no validation case: no class loses more than 0.01 DSC in any, and no component of a label that the prediction
  hits is missed afterwards.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from lightm.inference.postprocess import (
    DropSmall,
    FillHoles,
    KeepLargest,
    Postprocess,
    Step,
    Trial,
    apply_rules,
    component_sizes,
    counted,
    describe,
    unit_of,
    voxel_size,
)
from lightm.labels import Values, bounding_box, mask_of, overlap_counts

FEWEST_CASES = 10
FEWEST_LABELS = 30
LEAST_GAIN = 0.005
MOST_LOSS = 0.01
CHANCE = 0.05

Classes = tuple[int, ...]
"""Label values of foreground classes."""


class CaseLabels:
    """Prediction and label of one case, cropped to where either is not background, and deflated.

    predicted, truth: integers of one shape, (Z, Y, X) or (Y, X). Memory: label maps deflate to a few percent. The crop
    changes no result: beyond it there is background alone.
    """

    def __init__(self, predicted: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> None:
        found = (predicted != 0) | (truth != 0)
        box = bounding_box(found) if found.any() else (slice(0, 1),) * found.ndim
        self.spacing_mm = tuple(spacing_mm)
        self._predicted, self._truth = _deflated(predicted[box]), _deflated(truth[box])

    @property
    def predicted(self) -> np.ndarray:
        """The prediction as the steps taken so far leave it; read-only."""
        return _inflated(*self._predicted)

    @predicted.setter
    def predicted(self, labels: np.ndarray) -> None:
        self._predicted = _deflated(labels)

    @property
    def truth(self) -> np.ndarray:
        """The label; read-only."""
        return _inflated(*self._truth)


def _deflated(array: np.ndarray) -> tuple[bytes, tuple[int, ...], np.dtype]:
    return zlib.compress(np.ascontiguousarray(array).data, 1), array.shape, array.dtype


def _inflated(content: bytes, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(zlib.decompress(content), dtype).reshape(shape)


@dataclass
class LabelFacts:
    """What the label maps of training and validation cases say of the components of some values, taken together.

    cases: labels that hold them; several, holes: of these, how many in more than one component and with enclosed
    background; smallest: size of the smallest component, in ml or mm2.
    """

    cases: int = 0
    several: int = 0
    holes: int = 0
    smallest: float = math.inf


Labels = Iterable[tuple[np.ndarray, Sequence[float]]]
"""Label maps (Z, Y, X) or (Y, X) of integers, each with its spacing in mm."""


class TimeIsUp(Exception):
    """The time budget is used."""


def label_facts(labels: Labels, values: Sequence[int], check_time: Callable[[], None]) -> dict[Classes, LabelFacts]:
    """Return the facts for each value and for all together; each label map is read once. check_time may raise."""
    facts = {key: LabelFacts() for key in [*((value,) for value in values), tuple(values)]}
    for label, spacing_mm in labels:
        check_time()
        box = bounding_box(label != 0)
        inside = label[box]
        for key, found in facts.items():
            sizes = component_sizes(np.isin(inside, key))
            if sizes.size:
                found.cases += 1
                found.several += sizes.size > 1
                found.smallest = min(found.smallest, float(sizes.min()) * voxel_size(spacing_mm))
                if len(key) == 1:
                    found.holes += apply_rules(inside, [FillHoles(value=key[0])]) is not inside
    return facts


def choose_rules(
    cases: Sequence[CaseLabels],
    values: Sequence[int],
    labels: Callable[[], Labels],
    *,
    names: Mapping[int, str] | None = None,
    ignore_label: int | None = None,
    check_time: Callable[[], None] = lambda: None,
) -> Postprocess:
    """Return the steps that are safe and help, by the rules above; `cases` hold the processed predictions then.

    cases: of validation. values: the label values of the foreground classes. labels(): the label maps of all training
    and validation cases; they are read once, and only where a step would help. names: of the values. check_time: is
    called between cases and raises TimeIsUp to end the choice with the steps taken so far.

    Tried in this order, each upon the steps taken before: the largest component of all classes together; then for each
    class its largest component, its components above a smallest size, and its holes. A class that is absent in label
    and prediction counts as DSC 1, so that removing what is spurious counts as a gain. Deterministic.

    Time: four passes over the cases per class, and for what would help two over the labels. Memory: one case unpacked,
    its trial and that of `apply_rules`.
    """
    scores = np.array([case_dice(case.predicted, case.truth, values, ignore_label) for case in cases])
    before = _by_value(values, scores.mean(0)) if cases else {}
    if len(cases) < FEWEST_CASES:
        why = f"{counted(len(cases), 'validation case')} predicted, fewer than {FEWEST_CASES}"
        return Postprocess(cases=len(cases), dsc_before=before, dsc_after=before, why=why)
    choice = _Choice(cases, values, labels, names or {}, ignore_label, check_time, scores)
    why = ""
    try:
        choice.run()
    except TimeIsUp:
        why = "the time budget is used, so that not every step was tried"
    return Postprocess(
        steps=tuple(trial.step.model_copy(update={"gain": trial.gain}) for trial in choice.tried if trial.taken),
        cases=len(cases),
        dsc_before=before,
        dsc_after=_by_value(values, choice.scores.mean(0)),
        tried=tuple(choice.tried),
        why=why,
    )


class _Choice:
    """A choice at work: the predictions and their scores as the steps taken so far leave them."""

    def __init__(
        self,
        cases: Sequence[CaseLabels],
        values: Sequence[int],
        labels: Callable[[], Labels],
        names: Mapping[int, str],
        ignore_label: int | None,
        check_time: Callable[[], None],
        scores: np.ndarray,
    ) -> None:
        self.cases, self.values, self.names, self.ignore_label = cases, tuple(values), names, ignore_label
        self.labels, self.check_time, self.scores = labels, check_time, scores
        self.tried: list[Trial] = []
        self._facts: dict[Classes, LabelFacts] | None = None
        self._steps = 3 * len(values) + (len(values) > 1)

    def run(self) -> None:
        if len(self.values) > 1:
            self._try(KeepLargest(values=self.values))
        seen = label_facts(((case.truth, case.spacing_mm) for case in self.cases), self.values, self.check_time)
        for value in self.values:
            self._try(KeepLargest(values=(value,)))
            if (step := self._drop_below_half(value, seen[(value,)].smallest)) is not None:
                self._try(step)
            self._try(FillHoles(value=value))

    def _drop_below_half(self, value: int, size: float) -> DropSmall | None:
        """The step that drops what is smaller than half a size; None where no whole voxel is."""
        spacing_mm = self.cases[0].spacing_mm
        below = float(f"{size / 2:.2g}")
        if not math.isfinite(size) or below <= min(voxel_size(case.spacing_mm) for case in self.cases):
            return None
        return DropSmall(value=value, below=below, unit=unit_of(len(spacing_mm)))

    def _try(self, step: Step) -> None:
        trial, scores, cleaned = self._measure(step)
        if trial.taken and (unsafe := self._unsafe(step)):
            trial = trial.model_copy(update={"taken": False, "why": unsafe})
            facts, smaller = self._facts_of(step), None
            if isinstance(step, DropSmall) and facts.cases >= FEWEST_LABELS:
                smaller = self._drop_below_half(step.value, facts.smallest)
            if smaller is not None:
                self.tried.append(trial)
                return self._try(smaller)
        self.tried.append(trial)
        if trial.taken:
            self.scores = scores
            for index, labels in cleaned.items():
                self.cases[index].predicted = labels
        return None

    def _measure(self, step: Step) -> tuple[Trial, np.ndarray, dict[int, np.ndarray]]:
        """Try a step on the validation cases: what came of it, the scores then, and the predictions that it changes."""
        scores, changed, missed = self.scores.copy(), {}, 0
        for index, case in enumerate(self.cases):
            self.check_time()
            predicted, truth = case.predicted, case.truth
            cleaned = apply_rules(predicted, [step], case.spacing_mm)
            if cleaned is not predicted:
                changed[index] = cleaned
                scores[index] = case_dice(cleaned, truth, self.values, self.ignore_label)
                missed += _misses(predicted, cleaned, truth, values_of(step))
        rises = scores - self.scores
        columns = [self.values.index(value) for value in values_of(step)]
        own = rises[:, columns].mean(1)
        better, worse = int((own > 0).sum()), int((own < 0).sum())
        p = sum(math.comb(better + worse, k) for k in range(better, better + worse + 1)) / 2 ** (better + worse)
        level = CHANCE / self._steps
        evidence = f"better in {better}, worse in {worse} cases, p = {p:.2g}"
        against = ""
        if not changed:
            against = "changes nothing"
        elif missed:
            against = f"removes a true component that was found, in {counted(missed, 'case')}"
        elif rises.min() < -MOST_LOSS:
            against = f"costs a case {-rises.min():.3f} DSC"
        elif own.mean() < LEAST_GAIN:
            against = f"raises the mean DSC by {own.mean():.4f}, less than {LEAST_GAIN}"
        elif p > level:
            against = f"may be chance: {evidence}, more than {level:.2g}"
        why = against or f"raises the mean DSC by {own.mean():.4f}, {evidence}"
        gain = _by_value(self.values, rises.mean(0))
        said = {"what": describe(step, self.names), "why": why}
        trial = Trial(step=step, taken=not against, gain=gain, better=better, worse=worse, p=p, **said)
        return trial, scores, changed

    def _facts_of(self, step: Step) -> LabelFacts:
        """What the labels say of a step's classes; `cases`: that hold the rarest of them."""
        if self._facts is None:
            self._facts = label_facts(self.labels(), self.values, self.check_time)
        of_each = [self._facts[(value,)].cases for value in values_of(step)]
        return replace(self._facts[values_of(step)], cases=min(of_each))

    def _unsafe(self, step: Step) -> str:
        """Why the labels of training and validation cases speak against a step; empty where they do not."""
        facts = self._facts_of(step)
        if facts.cases < FEWEST_LABELS:
            return (
                f"{counted(facts.cases, 'label')} of training and validation with the class, fewer than {FEWEST_LABELS}"
            )
        if isinstance(step, KeepLargest) and facts.several:
            return f"{facts.several} of {facts.cases} labels have several components"
        if isinstance(step, FillHoles) and facts.holes:
            return f"{facts.holes} of {facts.cases} labels have true holes"
        if isinstance(step, DropSmall) and (limit := self._drop_below_half(step.value, facts.smallest)) != step:
            most = "a voxel" if limit is None else f"{limit.below:g} {step.unit}"
            return f"the smallest true component has {facts.smallest:.2g} {step.unit}, so that {most} is the limit"
        return ""


def values_of(step: Step) -> Classes:
    """The label values that a step is about."""
    return step.values if isinstance(step, KeepLargest) else (step.value,)


def _misses(predicted: np.ndarray, cleaned: np.ndarray, truth: np.ndarray, values: Sequence[int]) -> bool:
    """Whether a component of the label that the prediction hits is no longer hit."""
    for value in values:
        components, _ = ndimage.label(truth == value)
        hit = components[predicted == value]
        if np.setdiff1d(hit, components[cleaned == value]).any():  # 0 is beyond the components
            return True
    return False


def _by_value(values: Sequence[int], numbers: np.ndarray) -> dict[int, float]:
    return {int(value): round(float(number), 6) for value, number in zip(values, numbers, strict=True)}


def case_dice(
    predicted: np.ndarray, truth: np.ndarray, values: Sequence[Values], ignore_label: int | None
) -> np.ndarray:
    """DSC of one case, one for each value or region; 1 for what is absent in both."""
    scores = np.ones(len(values))
    kept = None if ignore_label is None else truth != ignore_label
    for column, value in enumerate(values):
        common, in_pred, in_label = overlap_counts(mask_of(predicted, value), mask_of(truth, value), kept)
        if in_pred or in_label:
            scores[column] = 2 * common / (in_pred + in_label)
    return scores
