"""Forwards that ask for values of tensors: recorded under these values, run under no others."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.attaching import guided, scoped
from agd_fast.engine import engine
from helpers_engine import assert_same, differs, own_forwards, programs, reasons
from helpers_families import attach_trained, run
from test_engine_families import record, stacked
from tiny import FAMILIES

NAMES = ("lumina2", "hunyuanvideo15")
MASKS = {"lumina2": ("encoder_attention_mask",), "hunyuanvideo15": ("encoder_attention_mask", "encoder_attention_mask_2")}
SHORT, LONG, OTHER = (0, 2), (1, 3), (1, 2)  # prompts of other lengths, padded to the same


def twins(name: str, adapted: bool = True) -> tuple[Any, Any, Any]:
    family = FAMILIES[name]
    plain, fast = family.pipeline(), family.pipeline()
    for pipe in (plain, fast):
        if adapted:
            attach_trained(pipe)
    return family, plain, agd.optimize(fast)


@pytest.mark.parametrize(("name", "adapted"), [("lumina2", True), ("lumina2", False), ("hunyuanvideo15", True)])
def test_prompts_of_other_lengths_one_after_another(name, adapted):
    family, plain, fast = twins(name, adapted)
    found = {rows: run(plain, family, rows, **family.guided) for rows in (SHORT, LONG, OTHER)}
    assert differs(found[SHORT], found[LONG]) and differs(found[LONG], found[OTHER])
    for rows in (SHORT, LONG, OTHER, LONG, SHORT, OTHER):
        assert_same(run(fast, family, rows, **family.guided), found[rows])
    with own_forwards(fast.transformer) as seen:
        for rows in (LONG, OTHER, SHORT):
            assert_same(run(fast, family, rows, **family.guided), found[rows])
    assert not seen and not reasons(fast)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_come_once_are_not_recorded_anew(name):
    family, _, fast = twins(name)
    counts = []
    for rows in (SHORT, LONG, OTHER, LONG, LONG):
        with own_forwards(fast.transformer) as seen:
            run(fast, family, rows, **family.guided)
        counts.append((len(seen), len(programs(fast.transformer))))
    steps = family.call["num_inference_steps"]
    assert counts == [(2, 1), (steps, 1), (steps, 1), (2, 2), (0, 2)]


@pytest.fixture(params=NAMES)
def own_loop(request):
    """The forwards of an optimized denoiser and of a plain one, of the same arguments; and those that are masks."""
    family, plain, fast = twins(request.param)
    _, calls = record(plain, family, rows=SHORT, **family.guided)
    (steps,) = calls.values()
    arguments = steps[0].kwargs

    def forward(pipe: Any) -> Tensor:
        return stacked(pipe.transformer(*steps[0].args, **arguments))

    return plain, fast, arguments, MASKS[request.param], forward


@torch.no_grad()
def test_masks_that_are_written_to_or_replaced_in_the_middle(own_loop):
    plain, fast, arguments, names, forward = own_loop
    masks = [arguments[name] for name in names]

    def write(mask: Tensor, row: int) -> None:
        mask[row, 0] = 1 - mask[row, 0]

    def replace(name: str) -> None:
        arguments[name] = arguments[name].flip(0)

    changes: list[Callable[[], Any]] = [lambda: None]
    changes += [lambda mask=mask, row=row: write(mask, row) for mask in masks for row in (0, 1, 0)]
    changes += [lambda name=name: replace(name) for name in (*names, *names)]
    for _ in range(3):
        seen = []
        with guided(plain.transformer, 3.0), guided(fast.transformer, 3.0), scoped(fast.transformer):
            for change in changes:
                change()
                seen.append(forward(plain))
                for _ in range(2):
                    assert_same(forward(fast), seen[-1])
        assert any(differs(one, other) for one, other in pairwise(seen))
    assert len(programs(fast.transformer)) > 1 and not reasons(fast)


@torch.no_grad()
def test_videos_from_a_picture_and_from_none():
    """HunyuanVideo 1.5 asks whether all of its picture is 0."""
    family, plain, fast = twins("hunyuanvideo15")
    _, calls = record(plain, family, **family.guided)
    (call, *_) = calls["transformer"]
    none, found = call.kwargs["image_embeds"], []
    one = torch.randn_like(none)
    for _ in range(3):
        for picture in (none, one):
            with guided(plain.transformer, 3.0), guided(fast.transformer, 3.0):
                found.append(stacked(plain.transformer(**{**call.kwargs, "image_embeds": picture})))
                for _ in range(2):
                    assert_same(stacked(fast.transformer(**{**call.kwargs, "image_embeds": picture})), found[-1])
    assert differs(found[0], found[1]) and len(programs(fast.transformer)) == 2


def test_calls_in_inference_mode_where_no_write_is_counted():
    family, plain, fast = twins("lumina2")
    with torch.inference_mode():
        for rows in (SHORT, LONG, SHORT, LONG):
            assert_same(run(fast, family, rows, **family.guided), run(plain, family, rows, **family.guided))
    assert not reasons(fast)


# a denoiser that asks for this and that


class Curious(nn.Module):
    def __init__(self, ask: Callable[..., Tensor]) -> None:
        super().__init__()
        self.ask = ask
        self.weight = nn.Parameter(torch.arange(1.0, 5.0))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        return self.ask(self, sample * self.weight, timestep, mask)


def curious(ask: Callable[..., Tensor]) -> tuple[nn.Module, nn.Module]:
    return Curious(ask).eval(), agd.optimize(Curious(ask).eval(), spec=agd.DenoiserSpec())


X = torch.arange(12.0).view(3, 4) + 1
T = torch.tensor(500)


def assert_follows(plain: nn.Module, fast: nn.Module, masks: list[Tensor], rounds: int = 3) -> None:
    """In blocks of their own, mask after mask."""
    with torch.no_grad():
        for mask in masks * rounds:
            with scoped(fast, torch.tensor([500, 20])):
                for x, t in ((X, T), (X * 2, T), (X - 5, torch.tensor(20))):
                    assert_same(fast(x, t, mask), plain(x, t, mask))


def later(model: nn.Module, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Each question takes the one before it for granted."""
    count = int(mask.sum())
    if not count:
        return x
    first = int(torch.arange(4)[mask.bool()][count - 1])
    return x[:, first:] if mask[first:].sum().item() == 1 else x * t


ASKS: dict[str, Callable[..., Tensor]] = {
    "item": lambda model, x, t, mask: x * mask.sum().item(),
    "tolist": lambda model, x, t, mask: x * sum(i * one for i, one in enumerate(mask.tolist())),
    "numpy": lambda model, x, t, mask: x * float(mask.numpy()[1:].sum()),
    "float": lambda model, x, t, mask: x + float(mask[0]) * t,
    "branch": lambda model, x, t, mask: x * 2 if mask[1] == 1 else x - t,
    "equal": lambda model, x, t, mask: x * t if torch.equal(mask[:2], mask[2:]) else x,
    "slice": lambda model, x, t, mask: x[:, : int(mask.sum())],
    "of weights too": lambda model, x, t, mask: x * (mask * model.weight).sum().item(),
    "mask": lambda model, x, t, mask: x[:, mask.bool()] * t,
    "mask of the step": lambda model, x, t, mask: x.sum() + (t * torch.arange(4.0))[~mask.bool()],
    "nonzero": lambda model, x, t, mask: x[:, torch.nonzero(mask).flatten()] * t,
    "mask and more": lambda model, x, t, mask: x[None, 1:, mask.bool(), None],
    "mask of two dimensions": lambda model, x, t, mask: x[mask.bool()[None] & (torch.arange(3) != 1)[:, None]],
    "one after another": later,
    "a constant": lambda model, x, t, mask: x * torch.tensor(3.0).item() * mask,
    "of x, undecided": lambda model, x, t, mask: x * x.sum().item() + mask.sum().item(),
}


@pytest.mark.parametrize("name", ASKS)
def test_whatever_is_asked_of_what_does_not_move(name):
    masks = [torch.tensor(one) for one in ([1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1])]
    plain, fast = curious(ASKS[name])
    assert_follows(plain, fast, masks)
    assert not fast._compiled_call_impl.info()["plain_because"]
    with torch.no_grad(), own_forwards(fast) as seen:
        for mask in masks:
            with scoped(fast, torch.tensor([500, 20])):
                fast(X, T, mask)
    assert not seen


def written(model: nn.Module, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    own = mask * 1
    own[0] = 7
    return x * own.sum().item()


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "x": (lambda model, x, t, mask: x if x.sum() > 0 else -x, "depends on x_t"),
    "experts": (lambda model, x, t, mask: x * x.argmax(1).bincount().numpy().max(), "depends on x_t"),
    "mask of x": (lambda model, x, t, mask: x[x > 3].sum() + x, "depends on x_t"),
    "nonzero of x": (lambda model, x, t, mask: (x > 3).nonzero().sum() + x, "depends on x_t"),
    "t": (lambda model, x, t, mask: x * 2 if t > 100 else x, "depends on the step"),
    "random": (lambda model, x, t, mask: x if torch.rand(()) < 2 else -x, "random or written in place"),
    "written in place": (written, "random or written in place"),
    "in C++": (lambda model, x, t, mask: x[:, : mask.sum()], "cannot be recorded"),
    "not recorded": (lambda model, x, t, mask: x if torch.equal(mask, model.weight) else -x, "not recorded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_change_within_a_call_is_not_taken_for_granted(name):
    ask, reason = REFUSED[name]
    plain, fast = curious(ask)
    with pytest.warns(UserWarning, match=reason):
        assert_follows(plain, fast, [torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 0])])
    (found,) = fast._compiled_call_impl.info()["plain_because"]
    assert reason in found


@torch.no_grad()
def test_values_that_cannot_be_captured_leave_others_on_the_engine():
    plain, fast = curious(lambda model, x, t, mask: x * mask.sum().item() if mask[0] == 1 else x.abs() if x.sum() > 0 else -x)
    good, bad = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 0, 0])
    assert_follows(plain, fast, [good])
    with pytest.warns(UserWarning, match="depends on x_t") as warned:
        assert_follows(plain, fast, [bad, good])
    assert len(warned) == 1 and len(fast._compiled_call_impl.refused) == 1
    with own_forwards(fast) as seen, scoped(fast, torch.tensor([500, 20])):
        fast(X, T, good)
    assert not seen


def test_data_of_the_model_that_is_written_between_calls():
    plain, fast = curious(ASKS["of weights too"])
    mask = torch.tensor([1, 1, 0, 0])
    for value in (2.0, 3.0, 3.0, 2.0):
        for one in (plain, fast):
            one.weight.data[0] = value
        assert_follows(plain, fast, [mask], rounds=2)


@torch.no_grad()
def test_values_that_change_at_every_step_are_recorded_few_times():
    plain, fast = curious(ASKS["item"])
    for _ in range(3):
        before = len(programs(fast))
        with scoped(fast, torch.tensor([500])):
            for count in range(12):
                mask = torch.full((4,), count)
                assert_same(fast(X, T, mask), plain(X, T, mask))
        assert len(programs(fast)) <= before + engine.ANSWERS
    assert len(programs(fast)) == 1 + 2 * engine.ANSWERS


def test_no_more_is_kept_than_may_be(monkeypatch):
    monkeypatch.setattr(engine, "PROGRAMS", 3)
    monkeypatch.setattr(engine, "MET", 5)
    plain, fast = curious(ASKS["item"])
    assert_follows(plain, fast, [torch.full((4,), count) for count in range(5)])
    assert len(programs(fast)) == 3 and len(fast._compiled_call_impl.met) == 5
    assert_follows(plain, fast, [torch.ones(size) for size in (2, 3, 5, 6)], rounds=1)
    assert len(fast._compiled_call_impl.recorded) == 3
