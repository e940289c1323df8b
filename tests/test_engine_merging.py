"""Low-rank terms beside convolutions as parts of the convolutions' weights."""

import pytest
import torch
from torch.nn import functional as F

import agd_fast as agd
from agd_fast import ops
from agd_fast.engine import engine_of
from agd_fast.graph.merging import CENTRED
from agd_fast.ops.centred import centred_ref
from conftest import assert_as_exact
from helpers_engine import assert_same, attach, call, differs, small_pipeline
from helpers_fusing import parameter, rewritten

K, C, R, SIDE = 4, 6, 2, 5
image = torch.randn(2, K, SIDE, SIDE)


def weights(kernel=(3, 3), groups=1):
    """Of a convolution and its bias, down and up."""
    return parameter(C, K // groups, *kernel), parameter(C), parameter(R, K), parameter(C, R)


def beside(*convolution, term=lambda x, y, down, up: ops.gated_lora(x, y, down, up, None, True)):
    return lambda x, weight, bias, down, up: term(x, F.conv2d(x, weight, bias, *convolution), down, up)


def merged(function, *inputs):
    found, done = rewritten(function, *inputs, policy="never", merge=True)
    return done.merged, found


@torch.no_grad()
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(
    ("kernel", "convolution"),
    [((3, 3), (1, 1)), ((1, 1), ()), ((5, 3), (1, (2, 1))), ((3, 3), (1, 2, 2)), ((3, 3), (1, "same")), ((1, 3), ([1], [0, 1]))],
)
def test_one_convolution_gives_both(kernel, convolution, order):
    x = image.contiguous(memory_format=order)
    weight, *others = weights(kernel)
    given = x, torch.nn.Parameter(weight.contiguous(memory_format=order), requires_grad=False), *others
    function = beside(*convolution)
    count, (found,) = merged(function, *given)
    plain, exact = function(*given), function(*(one.double() for one in given))
    assert count == (convolution != (1, "same")) and found.stride() == plain.stride()  # that one is another operator
    assert_as_exact(found, plain, exact)


@torch.no_grad()
def test_a_weight_with_a_term_at_its_centre():
    weight, _, down, up = weights()
    found = centred_ref(weight, up, down) - weight
    torch.testing.assert_close(ops.centre(found), up @ down)
    ops.centre(found).zero_()
    assert not found.any()


@pytest.mark.parametrize(
    "function",
    [
        beside(2, 1, term=lambda x, y, *own: ops.gated_lora(x[..., ::2, ::2], y, *own, None, True)),
        beside(1, 1, term=lambda x, y, *own: ops.gated_lora(x * 2, y, *own, None, True)),
        beside(1, 1, term=lambda x, y, *own: ops.gated_lora(x, y, *own, None, True) + y),
        beside(1, 1, term=lambda x, y, *own: ops.gated_lora(x, y + 1, *own, None, True)),
        beside(1, 1, term=lambda x, y, *own: ops.gated_lora(x, y, *own, torch.ones(2, R), True)),
        beside(1, 1, term=lambda x, y, down, up: ops.gated_lora(x, y, down, up * x.mean(), None, True)),
        beside(1, (0, 1), term=lambda x, y, *own: ops.gated_lora(x[:, :, :-2], y, *own, None, True)),
        lambda x, weight, bias, *own: ops.gated_lora(x, F.conv2d(x, weight * 2, bias, 1, 1), *own, None, True),
    ],
    ids=["strides", "another input", "taken by others", "not beside", "gates", "moving", "shifted", "computed weight"],
)
def test_others_stay_by_themselves(function):
    assert merged(function, image, *weights())[0] == 0


@torch.no_grad()
def test_of_convolutions_that_share_a_weight_one_takes_its_term():
    def function(x, weight, bias, down, up, other):
        term = beside(1, 1)
        return term(x, weight, bias, down, up) - term(x.flip(2), weight, bias, down, other)

    given = *(image, *weights()), parameter(C, R)
    count, (found,) = merged(function, *given)
    assert count == 1
    assert_as_exact(found, function(*given), function(*(one.double() for one in given)))


def test_grouped_convolutions_stay_by_themselves():
    assert merged(beside(1, 1, 1, 2), image, *weights(groups=2))[0] == 0


def test_terms_that_are_cheaper_by_themselves_stay():
    few = torch.randn(1, K, 1, 2)  # 2 (K + C) products at these places, of each rank, and K C in the weight
    assert merged(beside(1, 1), few, *weights())[0] == 0
    assert merged(beside(1, 1), torch.randn(1, K, 1, 3), *weights())[0] == 1


@torch.no_grad()
def test_what_is_written_in_place_is_read_when_it_was():
    def function(x, weight, bias, down, up):
        up = up + 0.5
        y = ops.gated_lora(x, F.conv2d(x, weight, bias, 1, 1), down, up, None, True)
        up.mul_(2)
        return y + up.sum()

    given = image, *weights()
    count, (found,) = merged(function, *given)
    assert count == 0
    torch.testing.assert_close(found, function(*given))


@torch.no_grad()
def test_parts_that_are_made_behind_the_convolution_are_brought_before_it():
    def function(x, weight, bias, down, up, weight_2, down_2, up_2):
        x = ops.gated_lora(x, F.conv2d(x, weight, bias, 1, 1), down * 2, up, None, True)
        return ops.gated_lora(x, F.conv2d(x, weight_2, bias, 1, 1), down_2, up_2 * 2, None, True)

    given = image, *weights(), parameter(C, C, 3, 3), parameter(R, C), parameter(C, R)
    count, (found,) = merged(function, *given)
    assert count == 2
    assert_as_exact(found, function(*given), function(*(one.double() for one in given)))


# on the engine


@pytest.fixture
def pair():
    plain, fast = small_pipeline(), small_pipeline()
    for pipe in (plain, fast):
        attach(pipe, kind="gated_lora")
    return plain, agd.optimize(fast)


def engine(pipe):
    return agd.info(pipe)["engine"]


def test_terms_are_parts_of_weights_in_a_batch_of_one(pair):
    plain, fast = pair
    before = {name: one.clone() for name, one in fast.unet.named_parameters()}
    for scale in (4.0, 4.0, 2.0, lambda done: 5.0 - 3 * done):
        expected = call(plain, guidance_scale=scale)
        assert_same(call(fast, guidance_scale=scale), expected)
    count = sum(type(module).__name__ == "ResnetBlock2D" for module in fast.unet.modules()) * 2
    assert engine(fast)["merged"] == count > 0 and engine(fast)["copied_bytes"] > 0 and not engine(fast)["plain_because"]
    assert all(torch.equal(one, before[name]) for name, one in fast.unet.named_parameters())
    assert "gated_lora" not in str(engine(fast)["not_on_kernels"])
    program = engine_of(fast.unet)._programs[-1]
    assert len(program.twins) == count  # in none of the three parts
    parts = program.parts.once, program.parts.step, program.parts.body
    assert not any(part.module.graph.find_nodes(op="call_function", target=CENTRED) for part in parts)
    assert program.layout.row_bytes < min(one.nbytes for one in program.twins.values()) * count  # nor in the table


def test_in_larger_batches_each_sample_has_its_own_term(pair):
    plain, fast = pair
    for _ in range(2):
        assert_same(call(fast, num_images_per_prompt=2), call(plain, num_images_per_prompt=2))
    assert engine(fast)["merged"] == 0


def test_the_base_by_itself_has_no_term(pair):
    plain, fast = pair
    armed = call(fast)
    for pipe in (fast, plain):
        with agd.disabled(pipe):
            call(pipe, guidance_scale=1.0)
    for _ in range(2):
        assert_same(call(fast), armed)
        with agd.disabled(plain), agd.disabled(fast):
            found = call(fast)
            assert_same(found, call(plain))
        assert differs(found, armed)


@pytest.mark.parametrize("write", [lambda one: one.mul_(1.5), lambda one: one.data.mul_(1.5)], ids=["in place", "data"])
def test_weights_that_change_are_followed(pair, write):
    plain, fast = pair
    before = call(fast)
    with torch.no_grad():
        for pipe in pair:
            for module in pipe.unet.modules():
                if type(module).__name__ == "ResnetBlock2D":
                    write(module.conv1.weight)
    found = call(fast)
    assert_same(found, call(plain))
    assert differs(found, before)


def test_without_merging_it_gives_the_same(pair):
    plain, fast = pair
    agd.optimize(fast, agd.EngineConfig(merge=False))
    for _ in range(2):
        assert_same(call(fast), call(plain))
    assert engine(fast)["merged"] == engine(fast)["copied_bytes"] == 0


def test_with_channels_side_by_side(pair):
    plain, fast = pair
    agd.optimize(fast, agd.EngineConfig(channels_last=True))
    for _ in range(3):
        assert_same(call(fast), call(plain))
    assert engine(fast)["merged"] > 0
    twins = engine_of(fast.unet)._programs[-1].twins.values()
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in twins)
    own = sum(one.nbytes for one in fast.unet.parameters() if one.ndim == 4 and one.shape[-1] == 3)  # in one form or the other
    assert engine(fast)["copied_bytes"] == own + sum(one.nbytes // 9 for one in twins)
    size = engine(fast)["copied_bytes"]
    call(fast, height=32)
    assert engine(fast)["captured"] == 2 and engine(fast)["copied_bytes"] == size  # they are shared


@torch.no_grad()
def test_prompts_that_change_at_every_step(pair):
    plain, fast = (pipe.unet for pipe in pair)
    x, width = torch.randn(1, 4, 8, 8), fast.config.cross_attention_dim
    times, prompts = torch.tensor([900, 500, 100, 20]), torch.randn(4, 1, 3, width)
    for _ in range(2):
        outputs = []
        for unet in (plain, fast):
            with agd.attaching.scoped(unet, times), agd.guided(unet, 3.0):
                outputs.append([unet(x, t, prompt.clone()).sample for t, prompt in zip(times, prompts, strict=True)])
        for found, expected in zip(*outputs, strict=True):
            assert_same(found, expected)
    assert engine(pair[1])["merged"] > 0 and not engine_of(fast)._programs[-1].twins  # the term moves now


@torch.no_grad()
def test_weights_whose_terms_move_are_read_with_channels_side_by_side_again(pair):
    plain, fast = (pipe.unet for pipe in pair)
    agd.optimize(fast, agd.EngineConfig(channels_last=True), spec=None)
    x, width = torch.randn(1, 4, 8, 8), fast.config.cross_attention_dim
    times, prompts = torch.tensor([900, 500, 100, 20]), torch.randn(4, 1, 3, width)
    with agd.attaching.scoped(fast, times), agd.guided(fast, 3.0):
        for t, prompt in zip(times, prompts, strict=True):
            found = fast(x, t, prompt.clone()).sample
    with agd.guided(plain, 3.0):
        assert_same(found, plain(x, times[-1], prompts[-1]).sample)
    (program,) = engine_of(fast)._programs
    weights = [one for one in program.constants.values() if one.ndim == 4 and one.shape[-1] == 3]
    assert weights and all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
