"""From (ω, t, c) to tokens: the base's own embeddings, shared by all sites."""

import pytest
import torch

import agd_fast as agd
from agd_fast.attaching.attachment import _token_mask
from agd_fast.conditioning import condition_width, embed_conditions, embed_time
from agd_fast.spec import DenoiserSpec
from conftest import trained


@pytest.mark.parametrize("tokens", [(12, 12), (12, 3)])
def test_a_mask_is_of_the_dimension_that_it_is_said_to_be(tokens):
    mask = torch.ones(2, 14)
    mask[1, 2:] = 0
    for dim in (0, 1):
        found = _token_mask(mask, tokens, dim).view(2, *tokens).movedim(1 + dim, 1)
        assert found[0].all() and found[1, :2].all() and not found[1, 2:].any()


def test_embed_time_is_the_denoisers_own(dit, unet):
    t = torch.tensor([0.0, 17.0, 999.0])
    embedder = dit.denoiser.transformer_blocks[0].norm1.emb
    own = embedder.timestep_embedder(embedder.time_proj(t))
    assert torch.equal(embed_time(dit.denoiser, dit.spec, t), own)
    own = unet.denoiser.time_embedding(unet.denoiser.get_time_embed(torch.zeros(3, 1), t))
    assert torch.equal(embed_time(unet.denoiser, unet.spec, t), own)


def test_embed_time_without_one_in_the_base_tells_timesteps_apart(tiny):
    found = embed_time(tiny.denoiser, tiny.spec, torch.tensor([0.0, 1.0, 999.0]))
    assert found.shape == (3, 64)
    assert torch.pdist(found).min() > 0.1


def test_embed_conditions_is_the_denoisers_own(dit, unet):
    labels, prompt = torch.tensor([0, 5]), torch.randn(2, 5, 6)
    own = dit.denoiser.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight[labels]
    assert torch.equal(embed_conditions(dit.denoiser, dit.spec, {"class_labels": labels})["class_labels"], own)
    found = embed_conditions(unet.denoiser, unet.spec, {"encoder_hidden_states": prompt})
    assert list(found) == ["encoder_hidden_states"]
    assert torch.equal(found["encoder_hidden_states"], prompt)


def test_adapter_of_a_half_precision_base_prepares_in_its_own_dtype(dit):
    adapter = agd.attach(dit.denoiser.bfloat16(), agd.AdapterConfig(hidden=2))
    time = embed_time(dit.denoiser, dit.spec, torch.tensor([3.0]))
    conditions = embed_conditions(dit.denoiser, dit.spec, {"class_labels": torch.tensor([3])})
    assert time.dtype == conditions["class_labels"].dtype == torch.bfloat16
    assert {entry.dtype for entry in adapter.prepare(torch.tensor([2.0]), time, conditions)} == {torch.float32}


def test_condition_width_is_read_or_found_out(dit, unet):
    assert condition_width(dit.denoiser, dit.spec.conditions[0]) == 16
    assert condition_width(unet.denoiser, unet.spec.conditions[0]) == 6


def test_condition_width_says_what_is_missing(dit, unet):
    with pytest.raises(ValueError, match=r"width of 'prompt' is unknown; expected Condition\(\.\.\., width=\.\.\.\)"):
        condition_width(dit.denoiser, agd.Condition("prompt"))
    with pytest.raises(ValueError, match=r"config.text_width, but DiTTransformer2DModel has no such entry"):
        condition_width(dit.denoiser, agd.Condition("prompt", width="config.text_width"))
    unet.denoiser.register_to_config(cross_attention_dim=[6, 8])
    with pytest.raises(ValueError, match=r"one width for 'encoder_hidden_states', found \[6, 8\]"):
        condition_width(unet.denoiser, unet.spec.conditions[0])


@pytest.mark.parametrize("change", ["omega", "time", "condition"])
def test_adapter_sees_omega_time_and_condition(backbone, change):
    adapter = agd.attach(backbone.denoiser, agd.AdapterConfig(hidden=4), spec=backbone.spec)
    trained(adapter)
    seen = []
    adapter.conditioning.register_forward_hook(lambda module, args, tokens: seen.append(tokens))
    inputs = backbone.inputs()
    other = backbone.inputs(seed=1)
    name = backbone.spec.timestep if change == "time" else backbone.spec.conditions[0].argument
    changed = inputs if change == "omega" else {**inputs, name: other[name]}
    with torch.no_grad():
        for scale, arguments in ((2.0, inputs), (3.0 if change == "omega" else 2.0, changed)):
            with agd.guided(backbone.denoiser, scale):
                backbone(**arguments)
    same = [torch.equal(first, second) for first, second in zip(*seen, strict=True)]
    assert same == [change != "omega", change != "time", change != "condition"]


def test_embedders_are_shared_by_all_sites(dit):
    few = agd.attach(dit.denoiser, agd.AdapterConfig("offset", 4))
    agd.unload(dit.denoiser)
    many = agd.attach(dit.denoiser, agd.AdapterConfig("offset", 4, blocks=("attention", "feed_forward")))
    assert len(list(many.sites)) == 2 * len(list(few.sites))
    shapes = [[p.shape for p in adapter.conditioning.parameters()] for adapter in (few, many)]
    assert shapes[0] == shapes[1]


def test_prompt_tokens_reach_the_adapter_one_by_one(unet):
    adapter = agd.attach(unet.denoiser, agd.AdapterConfig("cross_attention", 4))
    lengths = []
    adapter.conditioning.register_forward_hook(lambda module, args, tokens: lengths.extend(t.shape[1] for t in tokens))
    with agd.guided(unet.denoiser, 2.0):
        unet(**unet.inputs())
    assert lengths == [1, 1, 5]


def test_embedding_paths_that_do_not_exist_are_named(tiny):
    for spec in (
        DenoiserSpec("x", "t", tiny.spec.conditions, ("time_mlp",), modulation=tiny.spec.modulation),
        DenoiserSpec("x", "t", (agd.Condition("label", ("label_embeding",)),), modulation=tiny.spec.modulation),
    ):
        with pytest.raises(ValueError, match=r"no module of TinyDenoiser matches the path '(time_mlp|label_embeding)'"):
            agd.attach(tiny.denoiser, spec=spec)
