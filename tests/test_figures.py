"""Figures on the pages are those of bench/results/ that they are said to come from, to the digits that are shown."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from quality.results import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README, MEASURED, ENGINE = ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "engine.md"


def results(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def tables(page):
    """Header → rows, each a list of cells, of the tables of a page."""
    found, rows = {}, None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if rows is None:
            rows = found.setdefault(tuple(cells), [])
        elif not set("".join(cells)) <= set("- "):
            rows.append(cells)
    return found


def table(page, word):
    """Header and rows of the one table that has a column named so."""
    ((header, rows),) = [(header, rows) for header, rows in tables(page).items() if word in header]
    return header, rows


def assert_shows(cell, *values):
    """A cell has these numbers, each rounded as it is shown."""
    shown = re.findall(r"-?\d[\d,]*\.\d+|-?\d[\d,]*|-?\.\d+", cell.replace("−", "-").replace("**", ""))
    expected = [f"{value:.{len(number.partition('.')[2])}f}" for number, value in zip(shown, values, strict=True)]
    assert [float(number.replace(",", "")) for number in shown] == [float(one) for one in expected], (cell, values)


# milliseconds

GPU = [f"gpu/before_epilogue/nfe_speed/dit-xl2-256_{batch}.json" for batch in (1, 4, 16)]
GPU.append("gpu/before_channels_last/nfe_speed/sdxl-1024_1.json")
ARMS = {
    "unguided": "unguided",
    "CFG": "cfg",
    "AGD": "agd",
    "the paper's adapters, our port": "agd_naive",
    "CFG, compiled, one CUDA graph": "cfg_compiled",
    "unguided, optimized": "unguided_engine",
    "unguided, `agd.optimize`": "unguided_engine",
    "AGD, optimized": "agd_engine",
    "AGD, `agd.optimize`": "agd_engine",
}
QUOTIENTS = {
    "compiled CFG / AGD": ("cfg_compiled", "agd_engine"),
    "CFG / AGD": ("cfg", "agd_engine"),
    "AGD / unguided, both optimized": ("agd_engine", "unguided_engine"),
}


@pytest.mark.parametrize(
    ("page", "column"),
    [(README, "CFG, compiled, one CUDA graph"), (MEASURED, "CFG, compiled, one CUDA graph")]
    + [(ENGINE, column) for column in ("CFG, compiled, one CUDA graph", "CFG / AGD")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_milliseconds_on_a_gpu(page, column):
    header, rows = table(page, column)
    assert len(rows) == len(GPU) and [int(re.search(r"batch (\d+)", cells[0])[1]) for cells in rows] == [1, 4, 16, 1]
    for cells, file in zip(rows, GPU, strict=True):
        arms = {row["arm"]: row for row in results(file)["rows"]}
        for name, cell in zip(header[1:], cells[1:], strict=True):
            if name in QUOTIENTS:
                over, under = QUOTIENTS[name]
                assert_shows(cell, arms[over]["ms_per_step"] / arms[under]["ms_per_step"])
            elif ARMS[name] not in arms:
                assert cell == "–"
            else:
                row = arms[ARMS[name]]
                spread = (row["ms_per_step_p20"], row["ms_per_step_p80"]) if "(" in cell else ()
                assert_shows(cell, row["ms_per_step"], *spread)


def test_milliseconds_on_a_cpu():
    _, rows = next(
        (header, rows) for header, rows in tables(MEASURED).items() if "nfe_speed.py" in header[0] and len(header) == 4
    )
    arms = ("unguided", "cfg", "agd_naive", "agd", "agd_engine", "unguided_engine", "cfg_engine")
    measured = {(row["arm"], row["batch"]): row for row in results("nfe_speed_cpu.json")["rows"]}
    for arm, cells in zip(arms, rows, strict=True):
        for batch, cell in zip((1, 16, 64), cells[1:], strict=True):
            assert_shows(cell, *(measured[arm, batch][f"ms_per_step{part}"] for part in ("", "_p20", "_p80")))


MODELS = ("sdxl-1024", "sd21-768", "dit-xl2-256", "sd3-medium-1024", "pixart-sigma-1024", "wan-1.3b")


def counted(arm, model, batch=1):
    rows = results("nfe_speed_meta.json" if batch == 1 else f"nfe_speed_meta_batch{batch}.json")["rows"]
    (row,) = [row for row in rows if (row["arm"], row["model"], row["batch"]) == (arm, model, batch)]
    return row


def test_what_is_counted():
    _, rows = table(MEASURED, "Wan 1.3B")
    kinds = [*[("launches_per_step", 1)] * 4, *[("flops_per_step", 1e12)] * 3]
    arms = ("unguided", "agd_naive", "agd_engine", "agd_kernels", "unguided", "agd_naive", "agd_engine")
    for (key, unit), arm, cells in zip(kinds, arms, rows, strict=True):
        for model, cell in zip(MODELS, cells[1:], strict=True):
            own, plain = counted(arm, model)[key], counted("unguided", model)[key]
            assert_shows(cell, own / unit if arm == "unguided" else own / plain)


def test_launches_with_kernels():
    _, rows = table(ROOT / "docs" / "kernels.md", "AGD, engine with every kernel")
    batches = [(model, batch) for model in MODELS[:3] for batch in (1, 4)] + [(model, 1) for model in MODELS[3:]]
    for where, (label, *cells) in zip(batches, rows, strict=True):
        assert label.endswith(f"batch {where[1]}")
        plain, own, every = (counted(arm, *where)["launches_per_step"] for arm in ("unguided", "agd_engine", "agd_kernels"))
        assert_shows(cells[0], plain)
        assert_shows(cells[1], own, own / plain)
        assert_shows(cells[2], every, every / plain)


def test_what_each_idea_gave():
    every = next(rows for header, rows in tables(ENGINE).items() if "digits ms, batch 1" in header)
    second = [cells[0] for cells in every].index("unguided", 1)
    for file, rows in (("engine_ideas", every[:second]), ("engine_ideas_cross_attention", every[second:])):
        found = {(row["idea"], row["model"], row["batch"]): row for row in results(f"{file}.json")["rows"]}
        for cells in rows:
            idea = cells[0].removeprefix("+ ")
            if idea.startswith("low-rank terms"):  # counted later, of all arms
                for model, cell in zip(MODELS[:2], cells[1:], strict=False):
                    row = counted("agd_engine", model)
                    assert_shows(cell, row["launches_per_step"], row["flops_per_step"] / 1e12)
                continue
            for model, cell in zip(MODELS, cells[1:4], strict=False):
                row = found.get((idea, model, 1))
                assert (
                    cell == "–" if row is None else not assert_shows(cell, row["launches_per_step"], row["flops_per_step"] / 1e12)
                )
            for batch, cell in zip((1, 64), cells[4:], strict=True):
                assert_shows(cell, found[idea, "agd_fast.datasets.digits_teacher", batch]["ms_per_step"])


def test_how_long_compiling_takes():
    _, rows = table(ENGINE, "CPU seconds")
    plain, *others = results("compile_time.json")["rows"]
    assert_shows(rows[0][-1], plain["ms_per_step"])
    for row, cells in zip(others, rows[1:], strict=True):
        assert_shows(cells[3], row["cpu_seconds"] - plain["cpu_seconds"])
        assert_shows(cells[4], row["ms_per_step"])


def test_what_is_kept_for_backward():
    rows = {
        (row["adapter"], row["mode"]): row["saved_bytes"]
        for row in results("distill_memory_meta.json")["rows"]
        if (row["model"], row["batch"]) == ("sdxl-1024", 1)
    }
    header, cells = next((header, rows) for header, rows in tables(README).items() if header[0].startswith("kept for backward"))
    for adapter, line in zip(("default", "cross_attention"), cells, strict=True):
        for mode, cell in zip(header[1:], line[1:], strict=True):
            assert_shows(cell, rows[adapter, "eager" if mode == "plain" else mode] / 2**30)


# the digits


def test_the_digits():
    runs = results("digits_bars.json")["runs"]
    keys = {
        "NFE": "nfe",
        "Fréchet": "frechet_distance",
        "class accuracy": "class_accuracy",
        "precision": "precision",
        "recall": "recall",
    }
    for page, time in ((README, "ms / image at batch 64"), (MEASURED, "ms / image")):
        header, rows = table(page, time)
        for arm, cells in zip(("unguided", "cfg", "agd"), rows, strict=True):
            for name, cell in zip(header[1:], cells[1:], strict=True):
                scale = 1e3 if name == time else 1
                values = [run["arms"][arm][keys.get(name, "seconds_per_image")] * scale for run in runs]
                assert_shows(cell, statistics.mean(values))


def test_the_bars_of_the_digits():
    header, rows = table(MEASURED, "one-sided 95 % bound")
    bars = [
        bar
        for bar in results("digits_bars.json")["bars"]
        if not bar["name"].startswith(("adapter", "Fréchet unguided", "seconds in"))
    ]
    assert header[0] == "five seeds" and len(bars[0]["values"]) == 5
    for bar, (_, mean, bound, limit) in zip(bars, rows, strict=True):
        assert_shows(mean, bar["mean"])
        assert_shows(bound, bar["bound_95"])
        assert_shows(limit, bar.get("max", bar.get("min")))
        assert bar["cleared"]


def test_the_pipeline_of_the_digits():
    _, rows = table(MEASURED, "RMSE to CFG's images / unguided's")
    runs = results("pipeline_digits.json")["runs"]
    assert len(runs) == 3
    for arm, cells in zip(("unguided", "cfg", "agd"), rows, strict=True):
        for key, cell in zip(("nfe", "frechet_distance", "class_accuracy", "rmse_to_cfg"), cells[1:], strict=True):
            assert_shows(cell, statistics.mean(run["arms"][arm][key] for run in runs))
    explained = [run["explained"]["mean"] for run in runs]
    (said,) = re.findall(r"It explains (\S+ ± \S+) of the guidance", MEASURED.read_text(encoding="utf-8"))
    assert_shows(said, statistics.mean(explained), statistics.stdev(explained))


def explained_by(result, kind, form="ours"):
    """Mean, and deviation over seeds where there are several, as docs/fidelity.md has them."""
    fraction = None if kind in ("full", "text_embedding") else 0.05
    (group,) = [one for one in result.chosen if one.recipe == (kind, form, fraction, "trajectories", 800)]
    values = group.explained()
    return (statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else (values[0],)


KINDS = ("full", "modulation", "modulation+gated_lora", "gated_lora", "cross_attention", "offset", "text_embedding")


def test_which_adapter():
    dit, unet = (Result(RESULTS / "fidelity" / f"digits-{name}.json") for name in ("dit", "unet"))
    _, rows = table(MEASURED, "in the paper's form: DiT")
    for kind, cells in zip(KINDS, rows, strict=True):
        for (result, form), cell in zip(((dit, "ours"), (unet, "ours"), (dit, "paper"), (unet, "paper")), cells[1:], strict=True):
            if cell:
                assert_shows(cell, *explained_by(result, kind, form))
    _, rows = table(README, "guidance explained at ≤ 5 % parameters")
    shown = [
        ("full",) * 2,
        ("modulation", "modulation+gated_lora"),
        ("cross_attention",) * 2,
        ("cross_attention",) * 2,
        ("", "text_embedding"),
    ]
    for kinds, cells in zip(shown, rows, strict=True):
        form = "paper" if "paper's form" in cells[0] else "ours"
        for result, kind, cell in zip((dit, unet), kinds, cells[1:], strict=True):
            assert cell == "" if not kind else not assert_shows(cell, explained_by(result, kind, form)[0])


def test_the_bars_of_the_default_adapters():
    _, rows = table(MEASURED, "default adapter, three seeds: mean (one-sided 95 % bound)")
    for column, (name, kind) in enumerate((("dit", "modulation"), ("unet", "modulation+gated_lora")), start=1):
        result = Result(RESULTS / "fidelity" / f"digits-{name}.json")
        group = next(one for one in result.chosen if one.recipe == (kind, "ours", 0.05, "trajectories", 800))
        for bar, cells in zip(result.bars(group), rows, strict=True):
            assert_shows(cells[column], statistics.mean(bar.values), bar.bound)
            assert bar.verdict == "cleared"


def test_the_photographs():
    result = Result(RESULTS / "fidelity" / "cifar10-16-unet.json")
    omega, references = result.omega, list(result.references.values())
    group, longer = (
        next(one for one in result.groups if one.arm["kind"] == "modulation+gated_lora" and one.arm["steps"] == steps)
        for steps in (800, 2400)
    )
    (trained, calibrated), full = group.where_calibrated(omega), result.full(800)
    assert len(calibrated.rows) == len(group.rows) == 3
    arms = {
        "unguided": ([one["unguided"] for one in references], [1]),
        "cfg": ([one["cfg"][omega] for one in references], [0]),
        "agd": ([row["images"][omega] for row in group.rows], result.beside_cfg(group, "rmse")),
        "calibrated": ([row["images"][omega] for row in calibrated.rows], result.beside_cfg(calibrated, "rmse")),
    }
    means = {
        arm: [statistics.mean(one[key] for one in rows) for key in ("frechet", "accuracy")] for arm, (rows, _) in arms.items()
    }
    _, rows = table(MEASURED, "RMSE to CFG's / unguided's")
    for (arm, (_, rmse)), cells in zip(arms.items(), rows, strict=True):
        for value, cell in zip([*means[arm], statistics.mean(rmse)], cells[2:], strict=True):
            assert_shows(cell, value)
    _, rows = table(MEASURED, "photographs, three seeds: mean (95 % bound)")
    for bars, column in ((result.bars(group), 1), (result.bars(calibrated), 2)):
        for bar, cells in zip(bars, rows, strict=True):
            assert_shows(cells[column], statistics.mean(bar.values), bar.bound)
            assert_shows(cells[3], bar.limit)
            assert ("missed" in cells[column]) == (bar.verdict == "MISSED")
    explained = statistics.mean(group.explained())
    said = re.sub(r"\s+", " ", README.read_text(encoding="utf-8"))
    (of_photographs,) = re.findall(r"the Fréchet distance is (.*?) of the guidance\. With", said)
    drawn = ("unguided", "cfg", "agd")
    assert_shows(of_photographs, *(means[arm][0] for arm in drawn), *(means[arm][1] for arm in drawn), explained)
    (of_calibrated,) = re.findall(r"AGD's Fréchet distance is (.*?), CFG's own", said)
    assert_shows(of_calibrated, *means["calibrated"])
    said = re.sub(r"\s+", " ", MEASURED.read_text(encoding="utf-8"))
    (of_text,) = re.findall(r"The adapter explains (.*?)\. As trained.*?which loses (\S+) of .*? which explains (\.\d+)", said)
    assert_shows(of_text[0], explained, statistics.stdev(group.explained()), *full.explained())
    assert_shows(of_text[1], *(-value for value in result.beside_cfg(full, "accuracy")))
    assert_shows(of_text[2], *full.where_calibrated(omega)[1].explained())
    (of_longer,) = re.findall(
        r"the adapter explains (\S+) of the guidance as trained, (.*?) lower.*? explains (.*?) higher", said
    )
    assert_shows(of_longer[0], *longer.explained())
    for one, text, sign in ((longer, of_longer[1], -1), (longer.where_calibrated(omega)[1], of_longer[2], 1)):
        values = [*result.beside_cfg(one, "frechet"), sign * result.beside_cfg(one, "accuracy")[0]]
        assert_shows(text, *([] if one is longer else one.explained()), *values)
    assert trained.rows == group.rows


def test_what_a_calibration_gives_and_costs():
    _, rows = table(MEASURED, "as trained → calibrated, three seeds; images at ω = 2")
    for column, (name, kind) in enumerate((("cifar10-16-unet", "modulation+gated_lora"), ("digits-dit", "modulation")), start=1):
        result = Result(RESULTS / "fidelity" / f"{name}.json")
        groups = [one for one in result.groups if one.recipe == (kind, "ours", 0.05, "trajectories", 800)]
        ((before, after),) = [pair for one in groups if len((pair := one.where_calibrated(result.omega))[0].rows) == 3]
        for measured, cells in zip(
            (
                lambda group, _: [row["explained"]["guided"]["strength"] for row in group.rows],
                lambda group, _: group.explained(),
                lambda group, found: found.beside_cfg(group, "frechet"),
                lambda group, found: found.beside_cfg(group, "accuracy"),
                lambda group, found: found.beside_cfg(group, "rmse"),
            ),
            rows,
            strict=True,
        ):
            assert_shows(cells[column], *(statistics.mean(measured(group, result)) for group in (before, after)))
