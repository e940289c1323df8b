"""The rows of a schedule, the timesteps that find them, and programs that read them."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import agd_fast as agd
from agd_fast.attaching import scoped
from agd_fast.attaching.scope import scope_of
from agd_fast.attaching.timesteps import position_of, ways_to_pass
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.program import Program, at_all_steps
from agd_fast.engine.tables import RowLayout, Rows, Table, fill_rows, find, index_of
from agd_fast.graph.capture import capture
from agd_fast.graph.levels import Level
from agd_fast.spec import DenoiserSpec
from helpers_engine import SCALE, assert_same, call, programs, small_pipeline, small_unet, tables, unet_inputs
from helpers_pipelines import attach, noise

STATIC, STEP, MOVING = Level.STATIC, Level.STEP, Level.MOVING
CPU = torch.device("cpu")


def captured(function, *inputs):
    return capture(lambda *given: [function(*given)], inputs)


def rows_at(times):
    return Rows(times, torch.zeros(len(times), dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("bound", [0, 2**20])
def test_a_program_gives_every_step_from_its_table_or_without_one(bound):
    def function(c, t, x):
        return (c * t.sin()) @ x + (c.exp() + t) @ x

    times = torch.tensor([0.9, 0.5, 0.1])
    inputs = [torch.randn(3, 3), times[0], torch.randn(3, 3)]
    program = Program(captured(function, *inputs), [STATIC, STEP, MOVING], 1, EngineConfig(max_table_bytes=bound))
    prepared = program.prepare(inputs, rows_at(times), {1: times})
    assert (prepared.table is not None) == (bound > 0)
    for t in (*times, *times.flip(0)):
        x = torch.randn(3, 3)
        assert torch.allclose(program.run([inputs[0], t, x], prepared)[0], function(inputs[0], t, x), atol=1e-6)


@torch.no_grad()
def test_an_input_that_is_let_move_is_read_at_every_step():
    program = Program(captured(lambda c, x: c.exp() @ x, torch.ones(3, 3), torch.ones(3, 3)), [STEP, MOVING], 0, EngineConfig())
    program = program.moving([0])
    c, x = torch.randn(3, 3), torch.randn(3, 3)
    prepared = program.prepare([torch.ones(3, 3), x])
    assert torch.allclose(program.run([c, x], prepared)[0], c.exp() @ x)


@torch.no_grad()
def test_what_does_not_move_may_be_written_to_where_it_is_given():
    def function(c, t, x):
        h, row = c.exp(), t.sin() * c
        return [h, row, h @ x + row]

    inputs = [torch.randn(3, 3), torch.tensor(0.4), torch.randn(3, 3)]
    program = Program(capture(function, inputs), [STATIC, STEP, MOVING], 1, EngineConfig())
    prepared = program.prepare(inputs)
    for _ in range(2):
        for found, expected in zip(program.run(inputs, prepared), function(*inputs), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
            found.add_(5)


def test_all_steps_at_once_are_the_steps_one_by_one():
    def batched(t, c):
        return [t.sin() * c, c + t]

    def not_batched(t, c):
        return [torch.full_like(c, float(c.shape[0])).index_fill_(0, torch.tensor([0]), 1.0) * t]

    times, c = torch.tensor([0.1, 0.4, 0.7]), torch.randn(2, 3)
    for function in (batched, not_batched):
        found = at_all_steps(function, [times, c], (0, None))
        for column, expected in zip(found, zip(*[function(t, c) for t in times], strict=True), strict=True):
            assert torch.allclose(column, torch.stack(list(expected)))


def test_tensors_of_a_row_are_aligned_and_come_back():
    layout = RowLayout(((3,), (2, 5), ()), (torch.float32, torch.float32, torch.bfloat16))
    columns = [torch.randn(4, 3), torch.randn(4, 2, 5), torch.randn(4).bfloat16()]
    times = torch.tensor([900, 600, 300, 20])
    table = Table(fill_rows(layout, columns), index_of(rows_at(times), CPU))
    assert table.bytes == 5 * layout.row_bytes
    rows = layout.empty_rows(torch.device("cpu"))
    views = layout.views(rows)
    assert all(view.data_ptr() % 64 == rows[view.dtype].data_ptr() % 64 for view in views)
    for step, time in enumerate(times):
        table.copy_row(time, None, rows)
        assert all(torch.equal(view, column[step]) for view, column in zip(views, columns, strict=True))
    table.copy_row(torch.tensor(450), None, rows)
    assert all(view.isnan().all() for view in views)


def test_steps_at_one_timestep_are_told_apart_by_their_number():
    times, numbers = torch.tensor([900.0, 600.0, 600.0, 300.0]), torch.arange(4)
    index = index_of(Rows(times, numbers, numbered=True), CPU)
    for row, (time, number) in enumerate(zip(times, numbers, strict=True)):
        assert int(find(index, time, number[None].float())) == row
    for time, number in ((900.0, 1.0), (600.0, 3.0), (450.0, 2.0)):
        assert int(find(index, torch.tensor(time), torch.tensor([number]))) == len(times)


SCHEDULES = {
    "int64": torch.tensor([999, 749, 499, 249, 0]),
    "float32": torch.linspace(1000, 1, 28),
    "bfloat16": torch.linspace(1, 0.02, 28).bfloat16(),
    "twice": torch.tensor([900, 600, 600, 300, 300]),
    "one": torch.tensor([500.0]),
    "ascending": torch.linspace(0, 0.97, 20),
    "close": torch.tensor([999, 998, 997, 1]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_timestep_is_found_whatever_its_dtype_and_shape(name):
    times = SCHEDULES[name]
    index, listed = index_of(rows_at(times), CPU), times.tolist()
    for time in times:
        for given in (time, time[None], time.expand(3)):
            assert int(find(index, given)) == listed.index(time.item())


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_timestep_that_is_not_in_the_schedule_finds_the_last_row(name):
    times = SCHEDULES[name]
    index, listed = index_of(rows_at(times), CPU), set(times.double().tolist())
    gap = 1 if not times.is_floating_point() else float(times.double().unique().diff().min()) / 8 if len(times) > 1 else 1.0
    strangers = {time + sign * gap for time in listed for sign in (-1, 1)} - listed | {-1e4, 1e4, float("inf")}
    for stranger in strangers:
        assert int(find(index, torch.tensor(stranger, dtype=torch.float32))) == len(times), stranger


# timesteps

SPEC = DenoiserSpec()
FLOW = DenoiserSpec(timestep_scale=1000.0)
ASCENDING = DenoiserSpec(timestep_scale=1000.0, timestep_ascends=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_timesteps_as_they_are(dtype):
    times = torch.tensor([999, 749, 499, 249])
    given = times.to(dtype)
    for position in range(4):
        seen = given[position].expand(3)
        assert any(torch.equal(way, given) for way in ways_to_pass(times, SPEC, seen))
        assert position_of(times, SPEC, seen) == position


ROUNDINGS = {
    "before": lambda times: times.bfloat16() / 1000,
    "after": lambda times: (times / 1000).bfloat16(),
    "before and after": lambda times: (times.bfloat16().float() / 1000).bfloat16(),
}


@pytest.mark.parametrize("steps", [4, 28, 50, 100])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_timesteps_that_are_rounded_before_or_after_they_are_scaled(rounding, steps):
    """One that was seen does not tell which; all that it may be are taken, but no more than these."""
    sigmas = torch.linspace(1, 1 / steps, steps)
    times = 1000 * 3 * sigmas / (1 + 2 * sigmas)
    given = ROUNDINGS[rounding](times)
    for seen in given:
        found = ways_to_pass(times, FLOW, seen[None])
        assert any(torch.equal(way, given) for way in found)
        assert all((way == seen).any() for way in found)


@pytest.mark.parametrize("turned", [lambda times: (1000 - times) / 1000, lambda times: 1 - times / 1000], ids=["first", "last"])
def test_timesteps_that_ascend_turned_round_before_or_after_they_are_scaled(turned):
    sigmas = torch.linspace(1, 1 / 30, 30)
    times = 1000 * 3 * sigmas / (1 + 2 * sigmas)
    given = turned(times)
    for position, seen in enumerate(given):
        assert any(torch.equal(way, given) for way in ways_to_pass(times, ASCENDING, seen[None]))
        assert position_of(times, ASCENDING, seen) == position


def test_timesteps_that_a_pipeline_does_not_scale():
    times = torch.linspace(0.9, 0.1, 9)
    assert any(torch.equal(way, times) for way in ways_to_pass(times, FLOW, times[:1]))


@pytest.mark.parametrize("seen", [torch.tensor([999.0, 749.0]), torch.tensor([400.0]), torch.tensor(float("nan"))])
def test_timesteps_that_are_not_those_of_the_schedule(seen):
    times = torch.tensor([999, 749, 499, 249])
    assert ways_to_pass(times, SPEC, seen) == []
    assert position_of(times, SPEC, seen) is None


def forward(denoiser, t, **changes):
    prompt = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    return denoiser(sample=noise(2), timestep=t, encoder_hidden_states=changes.get("prompt", prompt)).sample


@pytest.fixture
def both():
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    return plain, agd.optimize(fast)


def one_after_another(both, times, given):
    plain, fast = both
    prompt = torch.randn(2, 5, 16)
    with torch.no_grad(), scoped(fast, times), agd.guided(plain, SCALE), agd.guided(fast, SCALE):
        for t in given:
            yield forward(fast, t, prompt=prompt), forward(plain, t, prompt=prompt)
        assert bool(tables(fast)) == (torch.as_tensor(given[1]).numel() == 1 or given[1].unique().numel() == 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_a_table_serves_timesteps_of_any_dtype(both, dtype):
    times = torch.tensor([900, 600, 300, 20])
    for found, expected in one_after_another(both, times, [t.to(dtype) for t in times]):
        assert_same(found, expected)


@pytest.mark.parametrize("stranger", [450, 301, 299, 0, 999])
def test_a_timestep_out_of_the_schedule_is_no_other_steps(both, stranger):
    times = torch.tensor([900, 600, 300, 20])
    *_, (found, _) = one_after_another(both, times, torch.tensor([900, 600, 300, stranger]))
    assert found.isnan().all()


def test_timesteps_that_differ_within_a_batch_take_no_table(both):
    times = torch.tensor([900, 600, 300, 20])
    given = [torch.tensor([900, 600]), torch.tensor([600, 20]), torch.tensor([300, 900])]
    for found, expected in one_after_another(both, times, given):
        assert_same(found, expected)


def test_timesteps_that_come_to_differ_within_a_batch(both):
    times = torch.tensor([900, 600, 300, 20])
    given = [torch.tensor([900, 900]), torch.tensor([600, 600]), torch.tensor([300, 300]), torch.tensor([300, 20])]
    for found, expected in one_after_another(both, times, given):
        assert_same(found, expected)


class Timed(nn.Module):
    """t is [B], or [B, N] of N tokens."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.linear(sample) * (timestep / 1000).cos().view(*timestep.shape, *[1] * (sample.ndim - timestep.ndim))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"watched": False, "own_times": False}], ids=["own loop", "as in a pipeline's call"])
def test_timesteps_that_come_to_differ_within_a_sample(options):
    model = agd.optimize(Timed().eval(), spec=agd.DenoiserSpec())
    times, x = torch.tensor([900, 600, 300]), torch.randn(2, 3, 4)
    with scoped(model, times, **options):
        for given in ([900, 900, 900], [600, 600, 600], [600, 600, 900], [300, 300, 300]):
            t = torch.tensor(given).repeat(2, 1)
            assert_same(model(x, t), model._call_impl(x, t))
        assert len(tables(model)) == 1


class Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("passed", "options", "waits"),
    [
        (lambda t: t.repeat(2), {}, 1),
        (lambda t: t.repeat(2), {"watched": False}, 1),
        (lambda t: t.repeat(2), {"own_times": False}, 0),
        (lambda t: t.expand(2), {}, 0),
        (lambda t: t.repeat(2, 3), {"own_times": False}, 1),
        (lambda t: t.expand(2, 3), {"own_times": False}, 0),
    ],
    ids=["samples", "samples, not watched", "samples that share it", "expanded", "tokens", "tokens, expanded"],
)
def test_a_step_waits_only_where_timesteps_may_come_to_differ(passed, options, waits):
    model = agd.optimize(Timed().eval(), spec=agd.DenoiserSpec())
    times, x = torch.tensor([900, 600, 300]), torch.randn(2, 3, 4)
    with scoped(model, times, **options):
        for t in times[:2]:
            model(x, passed(t))
        with Waits() as seen:
            model(x, passed(times[2]))
        assert len(tables(model)) == 1
    assert seen.count == waits


def test_samples_of_a_pipelines_call_share_their_timesteps():
    pipe, seen = agd.optimize(small_pipeline()), []

    def note(pipe, step, t, kwargs):
        scope = scope_of(pipe.unet)
        seen.append((scope.watched, scope.own_times))
        return kwargs

    call(pipe, callback_on_step_end=note)
    assert set(seen) == {(True, False)}


# how large a table may be


@torch.no_grad()
@pytest.mark.parametrize("bound", [0, 2**30])
def test_a_table_above_the_bound_is_left_out(bound):
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    agd.optimize(fast, agd.EngineConfig(max_table_bytes=bound))
    given, times = unet_inputs(), torch.tensor([900, 500, 100])
    with scoped(fast, times), agd.guided(plain, SCALE), agd.guided(fast, SCALE):
        for t in times:
            assert_same(fast(**{**given, "timestep": t}).sample, plain(**{**given, "timestep": t}).sample)
        assert len(tables(fast)) == (bound > 0)
    static = agd.info(fast)["engine"]["ahead_bytes"] - (tables_bytes(fast, times) if bound else 0)
    assert static > 0


def tables_bytes(denoiser, times):
    (program,) = programs(denoiser)
    return (len(times) + 1) * program.layout.row_bytes


def test_a_row_more_than_the_bound_is_too_much():
    denoiser = small_unet()
    attach(denoiser)
    agd.optimize(denoiser)
    times, given = torch.tensor([900, 500, 100]), unet_inputs()

    def count():
        with torch.no_grad(), scoped(denoiser, times), agd.guided(denoiser, SCALE):
            for t in times:
                denoiser(**{**given, "timestep": t})
            return len(tables(denoiser))

    assert count() == 1
    needed = tables_bytes(denoiser, times)
    for bound, expected in ((needed, 1), (needed - 1, 0)):
        agd.optimize(denoiser, agd.EngineConfig(max_table_bytes=bound))
        assert count() == expected
