"""Result files of bench/fidelity.py → docs/fidelity.md and its pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from agd_fast.files import read_tensors, write_text
from agd_fast.reporting.pictures import NAMES, save_grid
from quality.arms import FULL, TEXT
from quality.plots import ARMS, Panels, save_panels
from quality.results import (
    FINALIST_SEEDS,
    MISSING,
    MODEL_NAMES,
    Bar,
    Group,
    Result,
    mean_curve,
    minus_full,
    nfe_curves,
    zero_adapter,
)

STATES = {"guided": "guided states", "data": "noised data", "student": "the student's own"}
SOURCES = {
    "trajectories": "guided trajectories",
    "data": "noised data",
    "student": "guided, then its own (half of the steps each)",
}
HOISTABLE = {"modulation", "offset", FULL, TEXT}  # the adapter's own computations do not depend on x_t
GRID_COLUMNS = 10
INTRODUCTION = """# How faithfully one pass reproduces classifier-free guidance

This page is written by `python bench/fidelity.py report` from `bench/results/fidelity/`; edits to it are lost.

- **Guidance explained** is 1 − Σ‖ε̂ − ε_cfg‖² / Σ‖ε(c) − ε_cfg‖² over held-out states, averaged over ω = 1.5, 2, 3, 4 and 6:
  1 is CFG, 0 is the unguided base. Only the noise is held out: the states come from new trajectories of the classes or captions
  that were distilled. They are the same for every arm and seed, and learning rates were chosen by them too. Captions that were
  not distilled are measured among the claims.
- **Fréchet distance, accuracy and RMSE** compare images that CFG and AGD draw from the same noise, at the ω where CFG's own
  Fréchet distance is lowest. RMSE is the distance to CFG's image, divided by that of the unguided image.
- **±** is the standard deviation over seeds.

Do not read a Fréchet distance alone: an adapter that guides too weakly can have a lower one than CFG.
"""


def write_report(files: list[Path], output: Path) -> None:
    """Write fidelity.md and, for each merged file, fidelity_NAME.png and fidelity_NAME_grid.png into `output`.

    NAME: the file's name; the images of the grid are in NAME_grid.safetensors beside it, if there are any.
    """
    sections = [section(Result(file), output) for file in sorted(files)]
    write_text(output / "fidelity.md", "\n".join([INTRODUCTION, *(sections or [f"{MISSING}\n"])]))
    print(f"wrote {output / 'fidelity.md'} of {len(files)} result files")


def section(result: Result, output: Path) -> str:
    """All that is said of one teacher; saves its pictures."""
    if result.groups:
        save_panels(output / f"fidelity_{result.name}.png", panels_of(result), result.title, "full fine-tune")
    parts = [
        f"## {result.title}",
        caption(result),
        f"![curves](fidelity_{result.name}.png)" if result.groups else f"Curves: {MISSING}.",
        f"![samples](fidelity_{result.name}_grid.png)" if save_samples(result, output) else f"Samples: {MISSING}.",
    ]
    for title, text, table in (
        ("The teacher under CFG", REFERENCE_TEXT, reference_table(result)),
        ("Arms", f"{SCREENING_TEXT} {states_text(result)}".strip(), screening_table(result)),
        ("Calibrated", CALIBRATED_TEXT, calibrated_table(result)),
        ("States to train on", SOURCES_TEXT, sources_table(result)),
        ("Learning rates tried", RATES_TEXT, rates_table(result)),
        ("Bars", BARS_TEXT, bars_table(result)),
        ("Claims of the paper", CLAIMS_TEXT, claims_text(result)),
    ):
        parts += [f"### {title}", *([text] if text else []), table or f"{MISSING}."]
    return "\n\n".join(parts) + "\n"


def caption(result: Result) -> str:
    teacher, sizes, where = (result.merged[name] for name in ("teacher", "sizes", "environment"))
    runs = [*result.merged["rows"], *result.merged.get("claims", [])]
    commits = sorted({result.merged["commit"], *(run["commit"] for run in runs if "commit" in run)})
    words = f", {len(teacher['templates'])} caption templates" if teacher["templates"] else ""
    classifier = teacher["classifier"]
    return (
        f"Teacher: {MODEL_NAMES[teacher['model']]} of {teacher['parameters']:,} parameters on {teacher['data']}, "
        f"{len(teacher['classes'])} classes{words}. Measured with {sizes['samples']:,} images an arm and ω, "
        f"{sizes['trajectories']:,} held-out trajectories, {sizes['steps']} sampling steps; features and accuracy of "
        f"`{classifier['name']}` (accuracy {classifier['accuracy']:.3f}). Commit {', '.join(commits)}; device {where['device']}, "
        f"threads {where['threads']}, torch {where['torch']}, diffusers {where['diffusers']}, Python {where['python']}, "
        f"agd_fast {where['agd_fast']}."
    )


REFERENCE_TEXT = (
    "Means over the seeds of the noise. The floor is the distance between two disjoint sets of real images (for the digits, two "
    "halves with equally many of each class). Where these are smaller than an arm's set of images, the floor is biased upwards."
)
SCREENING_TEXT = (
    "All were trained on guided trajectories. Where several learning rates were tried, the table shows the one that explains "
    "most of the guided states with the first seed (0); that seed is part of the mean. Each arm is compared with the full "
    "fine-tune of the same number of steps. *Before the first step* tells whether everything the arm adds can be computed "
    "there, so that a step costs no more than an unguided one."
)
CLAIMS_TEXT = (
    "Measured with adapters of the default kind at its default learning rate, one seed, trained on all states of their "
    "trajectories. The number of trajectories, an option of `python bench/fidelity.py claims`, is given in brackets."
)
CALIBRATED_TEXT = (
    "*Strength* is Σ⟨ĝ, g⟩ / Σ‖g‖² over the guided states, where g = ε_cfg − ε(c) is CFG's guidance and ĝ = ε̂ − ε(c) the arm's. "
    "Least squares make it smaller than 1 wherever guidance is not explained wholly: at the same scale, the arm guides more "
    "weakly than CFG. `agd.distill(..., calibrate=True)` makes up for that. Each column shows the same adapters without it and, "
    "after the arrow, with it."
)
SOURCES_TEXT = (
    "Guidance explained on three kinds of states, by the kind of states that the arm was trained on, with the same number of "
    "training steps. *Noised data* uses images that training noised too, with new noise."
)
RATES_TEXT = (
    "Guidance explained on guided states with the first seed, for arms trained on guided trajectories. The chosen rate is bold."
)
BARS_TEXT = (
    f"For arms with {FINALIST_SEEDS} seeds or more: the mean and the one-sided 95 % bound (Student's t) towards the limit. The "
    "bound decides. Accuracy is bounded in both directions. The zero adapter, which leaves the base unchanged, must miss a bar; "
    "otherwise the bars would say nothing."
)


def reference_table(result: Result) -> str:
    references = list(result.references.values())
    if not references:
        return ""
    measured = {"frechet": "Fréchet", **({"fid": "FID"} if result.has_fid else {}), "accuracy": "accuracy"}
    floors = {"frechet": result.merged["floor"], "fid": result.merged.get("inception_floor"), "accuracy": None}
    rows = [
        ("real images (floor)", *("" if floors[name] is None else f"{floors[name]:.3f}" for name in measured), ""),
        ("unguided", *(spread(_of([reference["unguided"] for reference in references], name)) for name in measured), ""),
    ]
    for omega in sorted({omega for reference in references for omega in reference["cfg"]}, key=float):
        there = [reference for reference in references if omega in reference["cfg"]]
        found = [spread(_of([reference["cfg"][omega] for reference in there], name)) for name in measured]
        best = ", CFG's best" if omega == result.omega else ""
        rows.append((f"CFG, ω = {omega}{best}", *found, spread([reference["unguided_rmse"][omega] for reference in there])))
    return markdown(("", *measured.values(), "RMSE of unguided to CFG"), rows)


def _of(found: Iterable[Mapping[str, float]], name: str) -> list[float]:
    return [values[name] for values in found if name in values]


def states_text(result: Result) -> str:
    """What the arms were trained on, if all have the same number of trajectories."""
    trajectories, kept = ({group.arm[name] for group in result.groups} for name in ("trajectories", "keep"))
    if len(trajectories) != 1:
        return ""
    if len(kept) > 1:
        return f"Of each of {trajectories.pop():,} trajectories, arms learn as many states as their names say."
    keep = kept.pop()
    return f"All arms learn {'all' if keep is None else keep} states of each of {trajectories.pop():,} trajectories."


def screening_table(result: Result) -> str:
    header = [
        "arm",
        "lr",
        "seeds",
        "steps",
        "parameters",
        "before the first step",
        *(f"explained: {name}" for name in STATES.values()),
        "− full fine-tune",
    ]
    at = f"ω = {result.omega}"
    header += [f"FID AGD / CFG, {at}"] if result.has_fid else []
    header += [f"Fréchet AGD / CFG, {at}", f"accuracy AGD − CFG, {at}", f"RMSE AGD / unguided, {at}"]
    rows = [
        (
            result.label(group),
            f"{group.arm['learning_rate']:g}",
            str(len(group.rows)),
            f"{group.arm['steps']:,}",
            f"{group.rows[0]['parameters']:,} ({group.rows[0]['fraction']:.1%})",
            "yes" if set(group.arm["kind"].split("+")) <= HOISTABLE else "in part",
            *(spread(group.explained(states)) for states in STATES),
            "" if group.arm["kind"] == FULL else spread(minus_full(group, result.full(group.arm["steps"])), "+.3f"),
            *([spread(result.beside_cfg(group, "fid"))] if result.has_fid else []),
            spread(result.beside_cfg(group, "frechet")),
            spread(result.beside_cfg(group, "accuracy"), "+.3f"),
            spread(result.beside_cfg(group, "rmse")),
        )
        for group in result.chosen
        if group.arm["source"] == "trajectories"
    ]
    return markdown(header, rows) if rows else ""


def calibrated_table(result: Result) -> str:
    """Arms that were scored again after a calibration."""
    rows = []
    for group in result.chosen:
        both = group.where_calibrated(result.omega)
        if not both[0].rows:
            continue
        cells = [
            [spread([row["explained"]["guided"]["strength"] for row in one.rows]) for one in both],
            [spread(one.explained()) for one in both],
            [spread(result.beside_cfg(one, "frechet")) for one in both],
            [spread(result.beside_cfg(one, "accuracy"), "+.3f") for one in both],
            [spread(result.beside_cfg(one, "rmse")) for one in both],
        ]
        rows.append((result.label(group), str(len(both[0].rows)), *map(" → ".join, cells)))
    at = f"ω = {result.omega}"
    images = (f"Fréchet AGD / CFG, {at}", f"accuracy AGD − CFG, {at}", f"RMSE AGD / unguided, {at}")
    return markdown(("arm", "seeds", "strength", "explained", *images), rows) if rows else ""


def sources_table(result: Result) -> str:
    """Arms that were trained on several kinds of states."""
    arms: dict[tuple, list[Group]] = {}
    for group in result.chosen:
        arms.setdefault(tuple(group.arm[name] for name in ("kind", "form", "fraction", "steps")), []).append(group)
    rows = [
        (
            result.label(group).replace(f", on {group.arm['source']}", ""),
            SOURCES[group.arm["source"]],
            f"{group.arm['learning_rate']:g}",
            str(len(group.rows)),
            *(spread(group.explained(states)) for states in STATES),
            spread(result.beside_cfg(group, "frechet")),
        )
        for same in arms.values()
        if len(same) > 1
        for group in sorted(same, key=lambda group: list(SOURCES).index(group.arm["source"]))
    ]
    header = ("arm", "trained on", "lr", "seeds", *STATES.values(), f"Fréchet AGD / CFG, ω = {result.omega}")
    return markdown(header, rows) if rows else ""


def rates_table(result: Result) -> str:
    rows = []
    for best in result.chosen:
        if best.arm["source"] == "trajectories":
            tried = sorted(
                (group for group in result.groups if group.recipe == best.recipe), key=lambda group: group.arm["learning_rate"]
            )
            values = {
                group.arm["learning_rate"]: f"{group.arm['learning_rate']:g}: {group.first_explained:.3f}" for group in tried
            }
            values[best.arm["learning_rate"]] = f"**{values[best.arm['learning_rate']]}**"
            rows.append((result.label(best), str(best.arm["seed"]), " · ".join(values.values())))
    return markdown(("arm", "seed", "learning rate: explained"), rows) if rows else ""


def bars_table(result: Result) -> str:
    both = [(group, group.where_calibrated(result.omega)[1]) for group in result.finalists]
    groups = [group for pair in both for group in pair if len(group.rows) >= FINALIST_SEEDS]
    if not groups:
        return ""
    if result.omega is not None:
        groups.append(zero_adapter(list(result.references.values()), result.omega, groups[0].arm["steps"]))
    rows = []
    for group in groups:
        bars = result.bars(group)
        missed = sum(bar.verdict == "MISSED" for bar in bars)
        name = f"{result.label(group)}, lr {group.arm['learning_rate']:g}" if group.arm["learning_rate"] else result.label(group)
        rows += [bar_row(f"{name}: {len(group.rows)} seeds" if index == 0 else "", bar) for index, bar in enumerate(bars)]
        rows.append(("", "**all**", "", "", "", f"**MISSED {missed} of {len(bars)}**" if missed else all_verdict(bars)))
    return markdown(("arm", "bar", "mean", "95 % bound", "limit", ""), rows)


def all_verdict(bars: Iterable[Bar]) -> str:
    return MISSING if any(bar.verdict == MISSING for bar in bars) else "**cleared**"


def bar_row(name: str, bar: Bar) -> tuple[str, ...]:
    mean = f"{statistics.mean(bar.values):.3f}" if bar.values else MISSING
    limit = {"min": "≥ {:g}", "max": "≤ {:g}", "abs": "within ±{:g}"}[bar.side].format(bar.limit)
    return name, bar.name, mean, MISSING if bar.bound is None else f"{bar.bound:.3f}", limit, bar.verdict


def claims_text(result: Result) -> str:
    parts = []
    for claim in result.merged.get("claims", []):
        note = [claim["note"]] if claim.get("note") else []
        setting = f"{claim['setting']} (`--trajectories {claim['trajectories']}`)"
        parts += [f"#### {claim['claim'].replace('_', ' ')}", setting, claim_table(claim["values"]), *note]
    return "\n\n".join(parts)


def claim_table(values: Mapping[str, float]) -> str:
    """A value named "row, column" in that row and column, one without a comma in a column of its own."""
    places = {name: name.rpartition(", ") if ", " in name else (name, "", "") for name in values}
    rows, columns = ({place[index]: None for place in places.values()} for index in (0, 2))
    cells = {
        (row, column): f"{values[name]:{',.0f' if abs(values[name]) >= 1000 else '.4g'}}"
        for name, (row, _, column) in places.items()
    }
    return markdown(("", *columns), [(row, *(cells.get((row, column), "") for column in columns)) for row in rows])


def panels_of(result: Result) -> Panels:
    """The curves of the finalists, or of the best arms of the screening if no arm has enough seeds, and of the full fine-tune."""
    screened = [group for group in result.chosen if group.arm["source"] == "trajectories" and group.arm["kind"] != FULL]
    # the best of the finalists that share a label: an arm with several learning rates
    finalists = {result.label(group): group for group in reversed(result.finalists)}
    pictured = (list(reversed(finalists.values())) or screened)[:ARMS]
    explaining = {result.label(group): group for group in pictured}
    full = result.full(pictured[0].arm["steps"]) if pictured else None
    explaining |= {} if full is None else {"full fine-tune": full}
    references = list(result.references.values())
    panels = Panels(
        by_scale={name: group.curve(lambda row: row["explained"]["guided"]["by_scale"]) for name, group in explaining.items()},
        by_time={name: group.curve(lambda row: row["explained"]["guided"]["by_time"]) for name, group in explaining.items()},
        frechet={NAMES["cfg"]: mean_curve([frechet_by_scale(reference["cfg"]) for reference in references])}
        if references
        else {},
    )
    drawn = {result.label(group): group.curve(lambda row: frechet_by_scale(row["images"])) for group in pictured}
    panels.frechet |= {name: curve for name, curve in drawn.items() if curve}
    if references:
        panels.levels["unguided, mean over seeds"] = statistics.mean(reference["unguided"]["frechet"] for reference in references)
    if result.merged["floor"] is not None:
        panels.levels["two sets of real images (floor)"] = result.merged["floor"]
    default = {"AGD": "AGD, default adapter, one pass"}
    panels.by_nfe = {default.get(name, name): curve for name, curve in nfe_curves(result.merged.get("claims", [])).items()}
    return panels


def frechet_by_scale(images: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {omega: found["frechet"] for omega, found in images.items()}


def save_samples(result: Result, output: Path) -> bool:
    """The grid of unguided, CFG and the best arm; False when no images were kept."""
    file = result.file.with_name(f"{result.name}_grid.safetensors")
    if not file.is_file():
        return False
    tensors, about = read_tensors(file)
    classes = result.merged["teacher"]["classes"]
    columns = [classes[index % len(classes)] for index in range(min(GRID_COLUMNS, len(tensors["cfg"])))]
    labels = {"unguided": "unguided", "cfg": f"CFG, ω = {about['omega']}", "agd": f"AGD, ω = {about['omega']}"}
    rows = {label: tensors[key][:GRID_COLUMNS] for key, label in labels.items()}
    save_grid(output / f"fidelity_{result.name}_grid.png", rows, columns, f"{result.title}: {about['name']}")
    return True


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean, and ± standard deviation over seeds if there are several."""
    if not values:
        return MISSING
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
