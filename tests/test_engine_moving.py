"""Arguments that turn out to move within a call are read at each step from then on, until a call in which they do not move."""

import gc
import weakref

import pytest
import torch

import agd_fast as agd
from agd_fast.attaching import attachment_of, scoped
from agd_fast.engine.program import Program
from agd_fast.engine.recording import VALUES
from agd_fast.graph.levels import Level
from helpers_engine import SCALE, Holder, assert_same, programs, reasons, unet_inputs

TIMES = torch.arange(900, 0, -100)


@torch.no_grad()
def test_a_prompt_that_is_written_to_at_every_step_moves(monkeypatch):
    prepare, prepared = Program.prepare, []
    monkeypatch.setattr(Program, "prepare", lambda self, *args: prepared.append(1) or prepare(self, *args))
    plain, fast = Holder(), Holder()
    agd.optimize(fast.unet)
    times, given = torch.arange(900, 0, -100), unet_inputs()
    with scoped(fast.unet, times), agd.guided(plain.unet, SCALE), agd.guided(fast.unet, SCALE):
        for t in times:
            given["encoder_hidden_states"].mul_(0.9)
            assert_same(fast.unet(**{**given, "timestep": t}).sample, plain.unet(**{**given, "timestep": t}).sample)
    assert len(prepared) <= 1 + VALUES + 1  # for the recording, for each value, and of what moves then


@torch.no_grad()
def test_what_was_prepared_goes_before_what_moves_is_prepared(monkeypatch):
    prepare, prepared, alive = Program.prepare, [], []

    def noted(self, *args):
        gc.collect()
        alive.append(sum(one() is not None for one in prepared))
        found = prepare(self, *args)
        prepared.extend([weakref.ref(self), weakref.ref(found)])
        return found

    monkeypatch.setattr(Program, "prepare", noted)
    fast = Holder()
    agd.optimize(fast.unet)
    times, given = torch.arange(900, 0, -100), unet_inputs()
    with scoped(fast.unet, times), agd.guided(fast.unet, SCALE):
        for t in times:
            given["encoder_hidden_states"].mul_(0.9)
            fast.unet(**{**given, "timestep": t})
    assert max(alive) > 0 == alive[-1]


@torch.no_grad()
def test_a_graph_that_was_interrupted_while_it_was_cut_anew(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    plain, fast = Holder(), Holder()
    agd.optimize(fast.unet)
    times, given = torch.tensor([900, 700, 500, 300, 20]), unet_inputs()

    def follow():
        with scoped(fast.unet, times), agd.guided(plain.unet, SCALE), agd.guided(fast.unet, SCALE):
            for t in times:
                other = {**given, "timestep": t, "encoder_hidden_states": torch.randn(2, 5, 16)}
                assert_same(fast.unet(**other).sample, plain.unet(**other).sample)

    with agd.guided(fast.unet, SCALE):
        fast.unet(**given)  # which records it
    with monkeypatch.context() as patch:
        patch.setattr("agd_fast.engine.program.partition", interrupted)
        with pytest.raises(KeyboardInterrupt):
            follow()
    follow()
    assert not reasons(fast.unet)


class Loops:
    """Of the same denoiser on the engine and without it, compared at every step."""

    def __init__(self):
        self.plain, self.fast, self.given = Holder(), Holder(), unet_inputs()
        agd.optimize(self.fast.unet)

    @torch.no_grad()
    def run(self, prompt=lambda given: given, scale=lambda omega: omega):
        """prompt, scale: of each step, of the one that is given. Returns how many inputs of the program that made the last step
        move."""
        ran, run = [], Program.run

        def noted(program, *args):
            ran.append(program)
            return run(program, *args)

        with pytest.MonkeyPatch.context() as patch, scoped(self.fast.unet, TIMES):
            patch.setattr(Program, "run", noted)
            with agd.guided(self.plain.unet, SCALE), agd.guided(self.fast.unet, SCALE):
                for t in TIMES:
                    given = {**self.given, "timestep": t, "encoder_hidden_states": prompt(self.given["encoder_hidden_states"])}
                    for denoiser in (self.plain.unet, self.fast.unet):
                        scale(attachment_of(denoiser).omega)
                    assert_same(self.fast.unet(**given).sample, self.plain.unet(**given).sample)
        assert not reasons(self.fast.unet)
        return ran[-1].levels.count(Level.MOVING)


def weaker(omega):
    return omega.mul_(0.95)


def test_a_call_in_which_a_prompt_moves_leaves_later_calls_as_they_were():
    loops = Loops()
    usual = loops.run()
    (before,) = programs(loops.fast.unet)
    assert loops.run(torch.clone) == usual + 1
    assert len(programs(loops.fast.unet)) == 2
    loops.run()  # which begins as the last one ended, and sees that nothing moves
    assert loops.run() == usual and programs(loops.fast.unet)[0] is before
    assert agd.info(loops.fast.unet)["engine"]["captured"] == 1


def test_calls_in_which_a_prompt_moves_go_on_as_they_ended(monkeypatch):
    loops = Loops()
    loops.run()
    loops.run(torch.clone)
    cut, prepared, prepare = programs(loops.fast.unet), [], Program.prepare
    monkeypatch.setattr(Program, "prepare", lambda self, *args: prepared.append(self) or prepare(self, *args))
    for _ in range(3):
        loops.run(torch.clone)
    assert prepared == [cut[1]] * 3 and programs(loops.fast.unet) == cut
    loops.run()
    loops.run()
    loops.run(torch.clone)  # which begins with the other one again
    assert programs(loops.fast.unet) == cut


def test_what_moves_in_the_first_calls_is_cut_in_place():
    loops = Loops()
    moving = loops.run(torch.clone)
    assert loops.run(scale=weaker) == moving + 1
    assert len(programs(loops.fast.unet)) == 1


def test_further_inputs_that_move():
    loops = Loops()
    usual = loops.run()
    assert loops.run(scale=weaker) == usual + 1
    assert loops.run(torch.clone) == usual + 2
    assert loops.run(scale=weaker) == usual + 2
    loops.run()
    assert loops.run() == usual and len(programs(loops.fast.unet)) == 2
