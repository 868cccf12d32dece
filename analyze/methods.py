"""The methods paragraph of a paper, generated from what runs and tables hold and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import capture
from analyze.groups import CUSTOM
from analyze.marked import code, markdown, math, tex
from analyze.provenance import Provenance, read_provenance
from analyze.quantities import QUANTITIES
from analyze.recording_facts import describe_recording
from analyze.training_facts import describe_training
from analyze.verdict import END_SHARE
from capture.store.errors import UsageError
from capture.store.files import write_durably
from capture.store.target import check_target

CITATION = (
    "C. Guille-Escuret, H. Naganuma, K. Fatras and I. Mitliagkas. No Wrong Turns: The Simple "
    "Geometry Of Neural Networks Optimization Paths. ICML 2024. arXiv 2306.11922."
)
_FORMULAS = {quantity.name: quantity.formula for quantity in QUANTITIES}
_REPORTED = {
    "rsi": ("RSI", "the lower restricted secant inequality"),
    "eb": ("EB", "the upper error bound"),
    "cosine": ("γ", "their ratio, the cosine"),
    "lolr": ("η*", "the locally optimal learning rate"),
}
# How sums were made where the name of the grouping does not say it.
_GROUPS = {"model": "over the whole model", CUSTOM: "by groups of tensors chosen by name"}

Paragraphs = Sequence[tuple[str, str]]


def describe_methods(inputs: Sequence[str], kind: str = ".md") -> str:
    """Write the methods paragraph of runs and tables, as ``.md`` or ``.tex``.

    A run counts as measured against final; its weights are not read. What a run does not hold is
    said to be unknown. `InputError` for an input that is neither run nor table, `UsageError` for
    another kind.
    """
    return _writer(kind)(_paragraphs(read_provenance(inputs)))


def write_methods(inputs: Sequence[str], out: str | os.PathLike[str]) -> str:
    """Write the methods paragraph to a file ending in ``.md`` or ``.tex``; return its text.

    `UsageError` for another suffix, and for a place that may not be written or is an input.
    """
    write = _writer(Path(out).suffix.lower(), where=str(out))
    target = check_target(out, inputs)
    text = write(_paragraphs(read_provenance(inputs)))
    write_durably(target, text.encode(), target.parent)
    return text


def _markdown(paragraphs: Paragraphs) -> str:
    return (
        "\n\n".join(f"**{markdown(title)}.** {markdown(body)}" for title, body in paragraphs) + "\n"
    )


def _tex(paragraphs: Paragraphs) -> str:
    head = f"% Made by straightway {capture.__version__}; needs no package."
    parts = [rf"\paragraph{{{tex(title)}.}} {tex(body)}" for title, body in paragraphs]
    return "\n\n".join([head, *parts]) + "\n"


_WRITERS: Mapping[str, Callable[[Paragraphs], str]] = {".md": _markdown, ".tex": _tex}


def _writer(kind: str, where: str | None = None) -> Callable[[Paragraphs], str]:
    if kind not in _WRITERS:
        known = " or ".join(_WRITERS)
        what = f"the suffix {kind!r} names no kind of text" if kind else "a name without a suffix"
        raise UsageError(what, where=where, fix=f"end it in {known}")
    return _WRITERS[kind]


def _paragraphs(runs: Sequence[Provenance]) -> Paragraphs:
    return [
        ("Quantities", " ".join(_definitions(runs))),
        *(
            (f"Run {code(run.name)}", " ".join([*describe_training(run), *describe_recording(run)]))
            for run in runs
        ),
        ("Reference", CITATION),
    ]


def _definitions(runs: Sequence[Provenance]) -> Iterator[str]:
    yield (
        "Paths of training were measured as by Guille-Escuret et al. (2024). "
        f"Let {math('w_t')} be all trainable parameters as one vector after {math('t')} updates, "
        f"{math('w*')} a reference point, {math('e = w_t − w*')}, and {math('g')} a gradient at "
        f"{math('w_t')} of the mean loss of a batch."
    )
    listed = [
        f"{words} {math(f'{symbol} = ' + _FORMULAS[name].partition(';')[0])}"
        for name, (symbol, words) in _REPORTED.items()
    ]
    yield (
        f"Reported are {', '.join(listed[:-1])}, and {listed[-1]}; {math('γ > 0')} means that a "
        f"step along {math('−g')} starts out towards {math('w*')}."
    )
    if any(stream.name == "updates" for run in runs for stream in run.streams):
        yield (
            f"Of the updates {math('u = w_{t+1} − w_t')}, {math('−⟨u, e⟩ / (‖u‖ ‖e‖)')} stands in "
            f"the place of {math('γ')}."
        )
    groups = dict.fromkeys(kind for run in runs for kind in run.grouping)
    made = " and ".join(_GROUPS.get(kind, f"by {kind}") for kind in groups)
    yield (
        f"Sums over coordinates were made{made and f' {made}'} in float64 from the stored values; "
        "a ratio whose denominator is 0 is undefined and was left out."
    )
    if any(not text.startswith("no null") for run in runs for text in run.nulls.values()):
        yield (
            f"The null, {math('γ⁰')} for {math('γ')} and {math('a_t')} for {math('η*')}, is what "
            "the same run would show if its gradients were orthogonal to each other; it follows "
            "from the settings and the gradient norms of every update, and applies to the "
            "minibatch gradients, which made the path."
        )
    yield (
        f"Summaries leave out the last {100 * END_SHARE:g} % of the updates before a {math('w*')} "
        f"on the run's own path, where {math('γ')} tends to its null whatever the landscape."
    )
    yield f"Measured with straightway {capture.__version__}."
