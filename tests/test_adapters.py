"""Every kind of adapter against a plain reading of its formula (method.md, "Adapters")."""

import copy
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.adapters import Adapter, build_adapter, count_parameters
from agd_fast.adapters.adapter import PARTS
from agd_fast.attaching import layout_for
from agd_fast.sites import Layout, ResolvedSite
from conftest import assert_as_exact, double, make_backbone, trained

SITES = (
    ResolvedSite("a", 6, 6, "add", -1, 0, "hidden_states"),
    ResolvedSite("b", 5, 7, "add", -1, 0, "hidden_states"),
)
FORMS = [("smooth", True), ("smooth", False), ("fourier", True), ("fourier", False)]


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def plain_omega(adapter, omega):
    """E_ω(ω) [B, d]; the smooth features are the module's own."""
    w = dict(adapter.conditioning.omega.state_dict())
    if adapter.config.omega_features == "smooth":
        return adapter.conditioning.omega(omega)
    features = torch.cos(2 * math.pi * (omega[:, None] * w["features.frequencies"] + w["features.phases"]))
    inner = (features @ w["net.0.weight"].T + w["net.0.bias"]).clamp(min=0)
    return layer_norm(inner @ w["net.2.weight"].T + w["net.2.bias"], w["net.3.weight"], w["net.3.bias"])


def plain_tokens(adapter, omega, time, conditions):
    """[E_ω, P_t·e_t, P_c·e_c…], [B, S, d]"""
    w = adapter.conditioning.state_dict()
    tokens = [plain_omega(adapter, omega)[:, None], (time @ w["time.weight"].T + w["time.bias"])[:, None]]
    for index, value in enumerate(conditions.values()):
        token = value @ w[f"conditions.{index}.weight"].T + w[f"conditions.{index}.bias"]
        tokens.append(token if token.ndim == 3 else token[:, None])
    return tokens


def plain_embedding(*context):
    return sum(token.mean(1) for token in plain_tokens(*context))


def plain_offset(adapter, index, hidden, output, context):
    w = adapter.parts["offset"].sites[index].net.state_dict()
    inner = (plain_embedding(adapter, *context) @ w["0.weight"].T + w["0.bias"]).clamp(min=0)
    return (layer_norm(inner, w["2.weight"], w["2.bias"]) @ w["3.weight"].T + w["3.bias"])[:, None]


def plain_modulation(adapter, index, hidden, output, context):
    embedding, up = plain_embedding(adapter, *context), adapter.parts["modulation"].up
    delta = (embedding * embedding.sigmoid()) @ up.weight.T + up.bias
    start = sum(site.width for site in SITES[:index])
    return delta[:, None, start : start + SITES[index].width]


def plain_gated_lora(adapter, index, hidden, output, context):
    embedding, part, rank = plain_embedding(adapter, *context), adapter.parts["gated_lora"], adapter.config.rank
    gates = 1 + (embedding * embedding.sigmoid()) @ part.gates.weight.T + part.gates.bias
    delta = torch.zeros_like(output)
    for direction in range(rank):
        seen = hidden @ part.sites[index].down.weight[direction]  # [B, T]
        scaled = seen * gates[:, index * rank + direction, None]
        delta = delta + scaled[..., None] * part.sites[index].up.weight[:, direction]
    return delta


def plain_cross_attention(adapter, index, hidden, output, context):
    w = adapter.parts["cross_attention"].sites[index].state_dict()
    tokens = torch.cat(plain_tokens(adapter, *context), dim=1)
    width, heads = tokens.shape[2], adapter.config.heads
    for position in range(tokens.shape[1]):
        for channel in range(width // 2):
            angle = position * 10000 ** (-2 * channel / width)
            tokens[:, position, channel] += math.sin(angle)
            tokens[:, position, width // 2 + channel] += math.cos(angle)
    q, k, v = hidden @ w["query.weight"].T, tokens @ w["key.weight"].T, tokens @ w["value.weight"].T
    attended = torch.empty_like(q)
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(width // heads)
        attended[..., part] = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[..., part]
    return attended @ w["out.weight"].T + w["out.bias"]


PLAIN = {
    "offset": plain_offset,
    "modulation": plain_modulation,
    "gated_lora": plain_gated_lora,
    "cross_attention": plain_cross_attention,
}
KINDS = [*PLAIN, "modulation+gated_lora", "gated_lora+cross_attention"]


def plain(adapter, kind, index, hidden, output, context):
    delta = PLAIN[kind](adapter, index, hidden, output, context)
    gain = context[0][:, None, None] - 1 if adapter.config.identity_at_one else 1
    return output + delta * gain


def make_context(batch, prompt_tokens):
    text = torch.randn(batch, prompt_tokens, 4) if prompt_tokens else torch.randn(batch, 4)
    return 1 + 5 * torch.rand(batch), torch.randn(batch, 3), {"text": text, "label": torch.randn(batch, 2)}


def make_adapter(kind, features="smooth", identity=True, hidden=6, heads=1):
    rank = 2 if "gated_lora" in kind else None
    config = agd.AdapterConfig(kind, hidden, rank=rank, heads=heads, omega_features=features, identity_at_one=identity)
    return trained(Adapter(config, Layout(dict.fromkeys(config.kinds, SITES), 3, {"text": 4, "label": 2})))


def assert_reads_as_formula(adapter, batch, tokens, prompt_tokens):
    context = make_context(batch, prompt_tokens)
    exact_context = (context[0].double(), context[1].double(), {k: v.double() for k, v in context[2].items()})
    entries = zip(adapter.sites, adapter.prepare(*context), strict=True)
    for (kind, (index, site)), (part, prepared) in zip(product(adapter.config.kinds, enumerate(SITES)), entries, strict=True):
        hidden, output = torch.randn(batch, tokens, site.input_width), torch.randn(batch, tokens, site.width)
        found = part(hidden, output, prepared)
        reference = plain(double(adapter), kind, index, hidden.double(), output.double(), exact_context)
        assert_as_exact(found, plain(adapter, kind, index, hidden, output, context), reference)


@pytest.mark.parametrize(("features", "identity"), FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_its_formula(kind, features, identity):
    with torch.no_grad():
        assert_reads_as_formula(make_adapter(kind, features, identity), batch=3, tokens=5, prompt_tokens=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    heads=st.sampled_from([1, 3]),
    batch=st.integers(1, 5),
    tokens=st.integers(1, 33),
    prompt_tokens=st.sampled_from([0, 1, 77]),
)
def test_adapter_is_its_formula_at_any_shape(kind, heads, batch, tokens, prompt_tokens):
    with torch.no_grad():
        assert_reads_as_formula(make_adapter(kind, heads=heads), batch, tokens, prompt_tokens)


def test_cross_attention_takes_prompts_longer_than_250_tokens():
    with torch.no_grad():
        assert_reads_as_formula(make_adapter("cross_attention"), batch=1, tokens=2, prompt_tokens=300)


def padded(context, lengths, total, side, filling=1e3):
    """The prompts of a context cut to their lengths and padded to one length, and the mask of what counts."""
    omega, time, conditions = context
    text, mask = torch.full((len(lengths), total, 4), filling), torch.zeros(len(lengths), total, dtype=torch.bool)
    for sample, length in enumerate(lengths):
        kept = slice(0, length) if side == "right" else slice(total - length, total)
        text[sample, kept], mask[sample, kept] = conditions["text"][sample, :length], True
    return (omega, time, {**conditions, "text": text}), {"text": mask}


def one_sample(context, sample, length):
    omega, time, conditions = (
        context[0][sample : sample + 1],
        context[1][sample : sample + 1],
        {name: value[sample : sample + 1] for name, value in context[2].items()},
    )
    return omega, time, {**conditions, "text": conditions["text"][:, :length]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_under_a_mask_changes_nothing(kind, side):
    adapter, context, lengths = make_adapter(kind), make_context(4, 6), (6, 1, 4, 5)
    with torch.no_grad():
        prompts, masks = padded(context, lengths, 9, side)
        entries = adapter.prepare(*prompts, masks)
        unmasked = adapter.prepare(*prompts)
        for index, (part, prepared) in enumerate(zip(adapter.sites, entries, strict=True)):
            site = part.site
            hidden, output = torch.randn(4, 5, site.input_width), torch.randn(4, 5, site.width)
            found = part(hidden, output, prepared)
            assert not torch.allclose(found, part(hidden, output, unmasked[index]), atol=1e-2)
            for sample, length in enumerate(lengths):
                alone = one_sample(context, sample, length)
                own = slice(sample, sample + 1)
                plain = part(hidden[own], output[own], adapter.prepare(*alone)[index])
                exact = double(adapter).prepare(
                    alone[0].double(), alone[1].double(), {name: value.double() for name, value in alone[2].items()}
                )[index]
                assert_as_exact(
                    found[own], plain, list(double(adapter).sites)[index](hidden[own].double(), output[own].double(), exact)
                )


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_the_padding_is_never_read(kind):
    adapter, context = make_adapter(kind), make_context(2, 6)
    found = []
    for filling in (0.0, 1e3):
        prompts, masks = padded(context, (2, 6), 7, "right", filling)
        entries = adapter.prepare(*prompts, masks)
        generator = torch.Generator().manual_seed(1)
        for part, prepared in zip(adapter.sites, entries, strict=True):
            hidden = torch.randn(2, 5, part.site.input_width, generator=generator)
            found.append(part(hidden, torch.zeros(2, 5, part.site.width), prepared))
    half = len(found) // 2
    assert all(torch.equal(first, second) for first, second in zip(found[:half], found[half:], strict=True))


def test_a_prompt_of_which_nothing_counts_is_finite():
    for kind in KINDS:
        adapter, (omega, time, conditions) = make_adapter(kind), make_context(2, 3)
        entries = adapter.prepare(omega, time, conditions, {"text": torch.zeros(2, 3, dtype=torch.bool)})
        for part, prepared in zip(adapter.sites, entries, strict=True):
            assert part(torch.randn(2, 5, part.site.input_width), torch.zeros(2, 5, part.site.width), prepared).isfinite().all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"txt": torch.ones(2, 3, dtype=torch.bool)}, "expected masks of 'text', 'label'; found one of 'txt'"),
        (
            {"text": torch.ones(2, 4, dtype=torch.bool)},
            r"'text' is \[2, 3, 4\]: expected as its mask \[2, 3\] of torch.bool.*found \[2, 4\]",
        ),
        ({"text": torch.ones(2, 3)}, r"\[2, 3\] of torch.bool, True at valid tokens; found \[2, 3\] of torch.float32"),
        ({"label": torch.ones(2, 1, dtype=torch.bool)}, r"'label' is \[2, 2\]: expected as its mask none; found \[2, 1\]"),
    ],
)
def test_a_mask_that_does_not_belong_to_its_condition(masks, message):
    with pytest.raises(ValueError, match=message):
        make_adapter("offset").prepare(*make_context(2, 3), masks)


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize(("form", "width"), [("scale", 4), ("affine", 8)])
def test_sites_at_norms_scale_and_shift_their_channels(form, width, channel_dim):
    site = ResolvedSite("norm", 4, 4, form, channel_dim, 0, "hidden_states")
    part = PARTS["modulation"](agd.AdapterConfig(hidden=2), (site,), Layout({"modulation": (site,)}, 3))
    output, delta = torch.randn(2, 4, 3, 4), torch.randn(2, width)
    gamma, beta = delta[:, :4], delta[:, 4:] if form == "affine" else torch.zeros(2, 4)
    shape = (2, 4, 1, 1) if channel_dim == 1 else (2, 1, 1, 4)

    def formula(dtype):
        return output.to(dtype) * (1 + gamma.to(dtype).view(shape)) + beta.to(dtype).view(shape)

    assert_as_exact(part.sites[0](output, output, delta), formula(torch.float32), formula(torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_at_omega_one_is_no_change(kind):
    adapter = make_adapter(kind)
    _, time, conditions = make_context(3, 4)
    for part, prepared in zip(adapter.sites, adapter.prepare(torch.ones(3), time, conditions), strict=True):
        hidden, output = torch.randn(3, 5, part.site.input_width), torch.randn(3, 5, part.site.width)
        assert torch.equal(part(hidden, output, prepared), output)


@pytest.mark.parametrize("kind", PLAIN)
def test_adapter_keeps_the_dtype_of_the_base(kind):
    adapter = make_adapter(kind)
    context = make_context(2, 4)
    exact_context = (context[0].double(), context[1].double(), {k: v.double() for k, v in context[2].items()})
    hidden, output = torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 5, 6).bfloat16()
    low_context = (context[0].bfloat16(), context[1].bfloat16(), {k: v.bfloat16() for k, v in context[2].items()})
    with torch.no_grad():
        found = next(adapter.sites)(hidden, output, adapter.prepare(*context)[0])
        low = plain(copy.deepcopy(adapter).bfloat16(), kind, 0, hidden, output, low_context)
        assert_as_exact(found, low, plain(double(adapter), kind, 0, hidden.double(), output.double(), exact_context))
    assert found.dtype == torch.bfloat16


def rewritten(backbone, sites, paths, deltas):
    """The base with δ of one sample written into its own weights and biases: the same function without a hook."""
    for site, path, delta in zip(sites, paths, deltas, strict=True):
        module = backbone.denoiser.get_submodule(path)
        if site.form == "add":
            module.bias += delta
        else:
            gamma, beta = delta.chunk(2) if site.form == "affine" else (delta, torch.zeros_like(delta))
            module.bias.copy_(module.bias * (1 + gamma) + beta)
            module.weight.copy_(module.weight * (1 + gamma.view(-1, *[1] * (module.weight.ndim - 1))))
    return backbone


INNER = {"attn1": "attn1.to_out.0", "ff": "ff.net.2", "attention": "attention.out", "mlp": "mlp.2"}
CASES = [("dit", "modulation", "attention"), ("unet", "modulation", "attention"), ("tiny", "modulation", "attention")]
CASES += [(name, "offset", block) for name in ("dit", "tiny") for block in ("attention", "feed_forward")]


@pytest.mark.parametrize(("name", "kind", "block"), CASES)
def test_adapter_equals_the_base_with_its_delta_written_into_biases(name, kind, block):
    outputs = [with_delta_and_rewritten(name, kind, block, seed) for seed in range(4)]  # of one alone, the error is mostly chance
    found, plain, reference, base = (torch.cat(each) for each in zip(*outputs, strict=True))
    assert_as_exact(found, plain, reference)
    assert (found - base).abs().max() > 100 * (found - reference).abs().max()


def with_delta_and_rewritten(name, kind, block, seed):
    """Outputs of one sample: with the adapter, of the base with its δ written into it, of that in float64, of the base."""
    backbone = make_backbone(name)
    adapter = trained(agd.attach(backbone.denoiser, agd.AdapterConfig(kind, 4, blocks=(block,)), spec=backbone.spec))
    sites, inputs, seen = adapter.layout.sites[kind], backbone.inputs(batch=1, seed=seed), []
    adapter.conditioning.register_forward_hook(lambda module, args, output: seen.append(args))
    with torch.no_grad(), agd.guided(backbone.denoiser, 3.0):
        found = backbone(**inputs)
    agd.unload(backbone.denoiser)
    exact = make_backbone(name)
    exact.denoiser.load_state_dict(backbone.denoiser.state_dict())
    exact.denoiser.double()
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    paths = [site.path for site in sites]
    if kind == "offset":
        paths = [path.rpartition(".")[0] + "." + INNER[path.rpartition(".")[2]] for path in paths]
    with torch.no_grad():
        base = backbone(**inputs)
        deltas = [delta[0] for delta in adapter.prepare(*seen[0])]
        reference = rewritten(exact, sites, paths, [delta.double() for delta in deltas])(**exact_inputs)
        return found, rewritten(backbone, sites, paths, deltas)(**inputs), reference, base


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.05, 0.3])
def test_build_adapter_takes_the_largest_within_max_fraction(backbone, kind, share):
    denoiser, base = backbone.denoiser, count_parameters(backbone.denoiser)
    step = 2 if "cross_attention" in kind else 1
    config = agd.AdapterConfig(kind, max_fraction=share)
    layout = layout_for(denoiser, config, backbone.spec)

    def cost(hidden):
        return count_parameters(build_adapter(agd.AdapterConfig(kind, hidden), layout, base))

    if cost(step) > share * base:
        with pytest.raises(ValueError, match=rf"has {cost(step):,} parameters.*max_fraction={share}.*{base:,}"):
            build_adapter(config, layout, base)
        return
    adapter = build_adapter(config, layout, base)
    assert count_parameters(adapter) <= share * base < cost(adapter.config.hidden + step)


def test_cross_attention_needs_tokens(unet):
    with pytest.raises(ValueError, match=r"expected blocks whose channels come last, found 'down_blocks.0.resnets.0.conv1'"):
        agd.attach(unet.denoiser, agd.AdapterConfig("cross_attention", 4, blocks=("convolution",)))


def test_cross_attention_needs_an_even_width():
    with pytest.raises(ValueError, match=r"even `hidden`, found 5"):
        make_adapter("cross_attention", hidden=5)
