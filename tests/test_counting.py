"""bench/speed: what is counted on the meta device, and what the rows of a benchmark say."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from agd_fast.engine import engine_of
from agd_fast.ops import OPS
from speed.architectures import ARCHITECTURES, build
from speed.arms import ARMS, Workbench
from speed.counting import Counts, counting
from speed.hardware import roofline_ms
from speed.kernel_checks import Meta
from speed.kernels import real_cases
from speed.models import Settings, measure_model
from speed.reference import ReferenceAdapters

META = torch.device("meta")
TINY = replace(
    ARCHITECTURES["sdxl-1024"],
    config={
        **ARCHITECTURES["sdxl-1024"].config,
        "sample_size": 8,
        "attention_head_dim": 2,
        "block_out_channels": [32, 64],
        "cross_attention_dim": 12,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 6 + 6 * 256,
        "transformer_layers_per_block": [1, 2],
    },
    sample=(4, 8, 8),
    conditions={
        "encoder_hidden_states": (5, 12),
        "added_cond_kwargs.text_embeds": (6,),
        "added_cond_kwargs.time_ids": (6,),
    },
    reference_hidden=8,
)


def counted(function, grad_mode=torch.no_grad):
    with counting() as counts, grad_mode():
        function()
    return counts


def empty(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def test_views_and_allocations_are_no_launches():
    x = empty(4, 6)
    counts = counted(lambda: torch.empty_like(x).view(2, 12).t().chunk(2)[0].unsqueeze(0).expand(3, -1, -1).detach())
    assert counts == Counts()


def test_products_and_additions():
    x, w, b = empty(2, 5, 4), empty(3, 4), empty(3)
    counts = counted(lambda: F.linear(x, w, b) + 1)
    assert counts.flops == 2 * 2 * 5 * 4 * 3 and dict(counts.launches) == {"aten::addmm": 1, "aten::add": 1}


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_composite_operations_are_what_they_are_made_of(grad_mode):
    x = empty(2, 3, 4, 4)
    counts = counted(lambda: F.interpolate(x, scale_factor=2.0).transpose(1, 2).reshape(2, -1), grad_mode)
    assert dict(counts.launches) == {"aten::upsample_nearest2d": 1, "aten::clone": 1}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend", [F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default])
def test_attention_is_one_kernel(attend, masked):
    q, k, v = empty(2, 3, 7, 8), empty(2, 3, 5, 8), empty(2, 3, 5, 8)
    mask = empty(2, 1, 1, 5) if masked else None
    counts = counted(lambda: attend(q, k, v, mask))
    assert counts.flops == 4 * 2 * 3 * 7 * 5 * 8 and counts.launches.total() == 1


def test_attention_has_the_shape_it_has_elsewhere():
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 1, 1, 5) > 0.5
    expected = F.scaled_dot_product_attention(q, k, k, mask)
    with counting():
        found = F.scaled_dot_product_attention(q.to(META), k.to(META), k.to(META), mask.to(META))
        here = F.scaled_dot_product_attention(q, k, k, mask)
    assert found.shape == expected.shape and torch.equal(here, expected)


def test_launches_of_other_devices_are_left_out():
    with counting("meta") as counts:
        torch.ones(3) + torch.ones(3)
    assert not counts.launches


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_the_parameters_of_their_models(name):
    denoiser = build(ARCHITECTURES[name], META, torch.bfloat16)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == ARCHITECTURES[name].parameters


# of one step in bf16 at batch 1: unguided, and CFG with its doubled batch
BASELINES = {
    "sdxl-1024": (6_761_236_398_080, 1854, 1869),
    "sd21-768": (2_149_105_745_920, 744, 764),
    "dit-xl2-256": (237_333_676_032, 1148, 1152),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name):
    bench = Workbench(ARCHITECTURES[name], 1, 4, META, torch.bfloat16, counted=True)
    flops, launches, doubled = BASELINES[name]
    unguided, cfg = (bench.count(bench.arm(arm)) for arm in ("unguided", "cfg"))
    assert (unguided.flops, unguided.launches.total()) == (4 * flops, 4 * launches)
    assert (cfg.flops, cfg.launches.total()) == (8 * flops, 4 * doubled)


@pytest.mark.parametrize(("name", "batch"), [("sdxl-1024", 1), ("dit-xl2-256", 1), ("sd21-768", 4)])
def test_with_all_kernels_a_step_starts_no_more_than_the_bare_model(name, batch):
    bench = Workbench(ARCHITECTURES[name], batch, 30, META, torch.bfloat16, counted=True)
    unguided, kernels = (bench.count(bench.arm(arm)).launches for arm in ("unguided", "agd_kernels"))
    assert kernels.total() <= 1.00 * unguided.total()
    assert any(one.startswith("agd_fast_kernels::") for one in kernels)


@pytest.mark.parametrize("name", OPS)
def test_kernels_are_counted(name):
    """By the formula that is registered for an op, and as what it launches."""
    op = OPS[name]
    case = next(case for case in real_cases() if case.op is op)
    args = case.arguments(Meta(torch.bfloat16), 2)
    counts = counted(lambda: op.overload(*args))
    assert op.launches >= 1 and dict(counts.launches) == {f"agd_fast_kernels::{name}": op.launches}
    plain = counted(lambda: op.reference(*args))
    assert counts.flops == plain.flops and counts.launches.total() <= plain.launches.total()


def test_sdxl_attends_at_all_its_blocks():
    bench = Workbench(ARCHITECTURES["sdxl-1024"], 1, 1, META, torch.bfloat16, counted=True)
    launches = bench.count(bench.arm("unguided")).launches
    assert launches["aten::_scaled_dot_product_flash_attention"] == 2 * 70  # attn1 and attn2


@pytest.mark.parametrize("arm", ["unguided", "agd_naive", "unguided_engine", "agd_hoisted"])
def test_a_schedule_is_counted_from_its_first_steps(arm):
    bench = Workbench(TINY, 2, 6, META, torch.float32, counted=True)
    made = bench.arm(arm)
    found = bench.count(made)
    with counting() as whole:
        bench.run(made)
    assert found == whole


def test_what_is_computed_ahead_is_part_of_a_schedule():
    short, long = (Workbench(TINY, 1, steps, META, torch.float32, counted=True) for steps in (3, 30))
    launches = [bench.count(bench.arm("agd_hoisted")).launches.total() / len(bench.times) for bench in (short, long)]
    assert launches[0] > 1.1 * launches[1]


def settings(**changed):
    arms = [name for name in ARMS if name not in ("cfg_compiled", "agd_kernels")]
    basic = Settings(arms, steps=3, rounds=2, dtype=torch.float32, device=torch.device("cpu"), guidance_scale=4.0)
    return replace(basic, **changed)


def test_rows_of_a_model():
    rows = {row["arm"]: row for row in measure_model("tiny", [2], settings(), TINY)}
    assert list(rows) == settings().arms and not any(row["note"] for row in rows.values())
    assert {arm: row["nfe"] for arm, row in rows.items()} == {arm: 6 if arm.startswith("cfg") else 3 for arm in rows}
    for row in rows.values():
        assert 0 < row["ms_per_step_p20"] <= row["ms_per_step"] <= row["ms_per_step_p80"]
        assert row["ms_per_image"] == pytest.approx(row["ms_per_step"] * 3 / 2)
        assert row["peak_memory_bytes"] is None and row["roofline_ms"] is None
    assert rows["cfg"]["flops_per_step"] == 2 * rows["unguided"]["flops_per_step"]
    assert rows["agd_hoisted"]["launches_per_step"] < rows["agd"]["launches_per_step"] < rows["agd_naive"]["launches_per_step"]
    assert all(rows[arm]["relative_error"] < 1e-4 for arm in ("unguided_engine", "cfg_engine", "agd_hoisted", "agd_engine"))
    own, base = (rows[arm]["seconds"]["seconds"] for arm in ("agd", "unguided_engine"))
    low, high = sorted(mine / theirs for mine, theirs in zip(own, base, strict=True))  # a quotient a round
    assert rows["agd"]["ratio_to_unguided_engine"] == pytest.approx((low + high) / 2)
    assert low <= rows["agd"]["ratio_to_unguided_engine_p20"] <= rows["agd"]["ratio_to_unguided_engine_p80"] <= high
    assert rows["cfg"]["speedup_over_cfg"] == rows["unguided"]["ratio_to_unguided"] == 1
    assert rows["agd_naive"]["adapter"]["kind"] == "reference_cross_attention" and rows["cfg"]["adapter"] is None


def test_rows_on_meta_have_counts_and_no_times():
    rows = measure_model("tiny", [1], settings(arms=["cfg", "cfg_compiled"], device=META), TINY)
    assert all(row["ms_per_step"] is None and row["speedup_over_cfg"] is None for row in rows)
    assert rows[0]["launches_per_step"] > 100 and rows[1]["launches_per_step"] is None  # nobody knows what is fused there
    assert rows[0]["flops_per_step"] == rows[1]["flops_per_step"] > 0


def test_kernels_are_counted_and_not_timed_without_a_gpu():
    hoisted, kernels = measure_model("tiny", [1], settings(arms=["agd_hoisted", "agd_kernels"]), TINY)
    assert kernels["launches_per_step"] < hoisted["launches_per_step"] and kernels["adapter"] == hoisted["adapter"]
    assert kernels["ms_per_step"] is None and "not timed: its kernels do not run" in kernels["note"]


def test_an_arm_that_fails_leaves_the_others_their_times():
    unguided, agd = measure_model("tiny", [1], settings(arms=["unguided", "agd"], kind="nothing"), TINY)
    assert unguided["ms_per_step"] > 0 and agd["ms_per_step"] is None
    assert "ValueError: kind must be one of" in agd["note"] and unguided["note"] is None


def test_what_disagrees_is_not_timed(monkeypatch):
    run = Workbench.run
    doubled = lambda bench, arm, steps=None: run(bench, arm, steps) * (2 if engine_of(arm.denoiser) else 1)  # noqa: E731
    monkeypatch.setattr(Workbench, "run", doubled)
    rows = {row["arm"]: row for row in measure_model("tiny", [1], settings(arms=["cfg", "cfg_engine"]), TINY)}
    assert rows["cfg"]["ms_per_step"] > 0 and rows["cfg_engine"]["ms_per_step"] is None
    assert "it differs from cfg by" in rows["cfg_engine"]["note"]


def test_arms_that_compute_nothing_ahead_are_timed_on_the_last_steps(monkeypatch):
    runs, run = [], Workbench.run

    def counted(bench, arm, steps=None):
        runs.append((engine_of(arm.denoiser) is not None, steps))
        return run(bench, arm, steps)

    monkeypatch.setattr(Workbench, "run", counted)
    own = settings(arms=["unguided", "unguided_engine"], steps=4, eager_steps=2)
    rows = {row["arm"]: row for row in measure_model("tiny", [1], own, TINY)}
    assert set(runs) == {(False, 2), (True, None)}
    assert {arm: row["timed_steps"] for arm, row in rows.items()} == {"unguided": 2, "unguided_engine": 4}
    for row in rows.values():
        assert row["ms_per_step"] == pytest.approx(row["seconds"]["median"] / row["timed_steps"] * 1e3)
        assert row["ms_per_image"] == pytest.approx(4 * row["ms_per_step"])
    own, base = (rows[arm]["seconds"]["seconds"] for arm in ("unguided_engine", "unguided"))
    ratio = sum(mine / theirs for mine, theirs in zip(own, base, strict=True)) / 2 * 2 / 4  # of two rounds; 4 steps to 2
    assert rows["unguided_engine"]["ratio_to_unguided"] == pytest.approx(ratio)
    assert rows["unguided_engine"]["relative_error"] < 1e-4  # their last steps are the same


def test_the_roofline_is_the_higher_of_two():
    flops, weights = 790e12 / 1000, 4.3e12 / 1000  # a millisecond each
    assert roofline_ms("NVIDIA H200", torch.bfloat16, 3 * flops, int(weights)) == pytest.approx(3)
    assert roofline_ms("NVIDIA H200", torch.bfloat16, flops, int(2 * weights)) == pytest.approx(2)
    assert roofline_ms("some other card", torch.bfloat16, flops, 1) is None
    assert roofline_ms("NVIDIA H200", torch.float32, flops, 1) is None


def test_the_reference_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a clone"):
        ReferenceAdapters(tmp_path)


@pytest.mark.parametrize("kind", [None, "cross_attention", "offset"])
def test_every_adapter_runs_in_16_bit(kind):
    bench = Workbench(TINY, 1, 1, torch.device("cpu"), torch.bfloat16, kind=kind)
    assert {bench.run(bench.arm(arm)).dtype for arm in ("unguided", "agd", "agd_naive")} == {torch.bfloat16}


def test_counts_of_an_earlier_run_are_taken():
    made = settings(arms=["unguided", "cfg"], device=META)
    rows = measure_model("tiny", [1], made, TINY)
    again = measure_model("tiny", [1, 2], replace(made, counts=rows), TINY)
    assert [row["flops_per_step"] for row in again] == [rows[0]["flops_per_step"], rows[1]["flops_per_step"], None, None]
