"""agd_fast.hub, and loading by repo id, against a Hub on 127.0.0.1."""

import json
import re
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.files import read_json, write_json
from agd_fast.hub import find_picture, push_to_hub
from agd_fast.reporting.card import model_card
from agd_fast.sources import CONFIG_NAME, WEIGHTS_NAME, adapter_folders, resolve
from fake_hub import TOKEN, FakeHub
from helpers_distillation import NET_SPEC, contents, custom_teacher, small, tiny_teacher
from tiny import FAMILIES

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.fixture
def server(tmp_path, monkeypatch):
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)  # where no folder is called as a repo
        yield fake


def random_adapter(directory, teacher=None, config=None, about=None):
    teacher = teacher or tiny_teacher()
    adapter = agd.attach(teacher, config or small())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    agd.save(teacher, directory, about=about)
    return teacher


def predict(teacher, omega=3.0):
    """Under the adapter, which at ω = 1 is the base."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, *teacher.sample_shape, generator=generator), torch.tensor([10, 400, 999])
    with agd.guided(teacher, omega), torch.no_grad():
        return teacher.predict(x, t, teacher.conditions([0, 1, 2]))


@pytest.fixture
def adapter(tmp_path):
    random_adapter(tmp_path / "mine", about={"note": "for the tests"})
    return tmp_path / "mine"


@pytest.fixture
def run(adapter):
    """The folder of a whole run: an adapter among all that `distill` leaves there."""
    write_json(adapter / "distill.json", {"parameters": 1, "fraction": 0.04, "loss": 0.25, "seconds": {"train": 9.04}})
    (adapter / "log.jsonl").write_text("{}\n")
    (adapter / "checkpoint.safetensors").write_bytes(b"large")
    for name in ("trajectories/shard-00000.safetensors", "validation/step-1.png", "validation/step-2.png", "notes/a.txt"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_bytes(PNG + name.encode())
    return adapter


def push(directory, repo_id="me/tiny-agd", **options):
    return push_to_hub(directory, repo_id, token=TOKEN, **options)


def test_what_was_pushed_loads_by_its_repo_id(server, tmp_path):
    expected = predict(random_adapter(tmp_path / "mine"))
    assert push(tmp_path / "mine") == f"{server.url}/me/tiny-agd"
    assert server.files("me/tiny-agd")[WEIGHTS_NAME] == (tmp_path / "mine" / WEIGHTS_NAME).read_bytes()
    fresh = tiny_teacher()
    assert agd.load(fresh, "me/tiny-agd") is fresh
    assert torch.equal(predict(fresh), expected)
    assert not torch.equal(expected, predict(fresh, omega=1.0))


def test_an_adapter_and_nothing_else_is_pushed(server, run):
    before = contents(run)
    random_adapter(run / "transformer_2")
    push(run)
    files = server.files("me/tiny-agd")
    pair = {CONFIG_NAME, WEIGHTS_NAME}
    assert set(files) == {*pair, *(f"transformer_2/{name}" for name in pair), "samples.png", "README.md", ".gitattributes"}
    assert files["samples.png"] == PNG + b"validation/step-2.png"
    shutil.rmtree(run / "transformer_2")
    assert contents(run) == before
    assert any("agd-fast/" in agent for agent in server.agents)
    assert server.messages == [f"Upload an adapter of agd-fast {agd.__version__}"]


def test_a_push_without_a_further_denoiser_takes_it_out_of_the_repo(server, adapter):
    random_adapter(adapter / "transformer_2")
    push(adapter)
    shutil.rmtree(adapter / "transformer_2")
    server.files("me/tiny-agd")["notes/adapter.txt"] = b"by hand"
    push(adapter)
    assert set(server.files("me/tiny-agd")) == {CONFIG_NAME, WEIGHTS_NAME, "README.md", ".gitattributes", "notes/adapter.txt"}


def test_a_picture_of_its_own_comes_first(run):
    assert find_picture(run).name == "step-2.png"
    (run / "grid.png").write_bytes(PNG)
    assert find_picture(run) == run / "grid.png"
    (run / "samples.png").write_bytes(PNG)
    assert find_picture(run) == run / "samples.png"
    assert find_picture(run / "notes") is None


def test_a_readme_in_the_folder_is_pushed_as_it_is(server, adapter):
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    push(adapter)
    assert server.files("me/tiny-agd")["README.md"] == (adapter / "README.md").read_bytes()
    (adapter / "README.md").write_text("---\nbroken\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push(adapter)


def test_private_branch_and_message(server, adapter):
    url = push(adapter, private=True, revision="v2", commit_message="Second round")
    assert url == f"{server.url}/me/tiny-agd/tree/v2"
    assert server.visibility == {"me/tiny-agd": "private"} and server.messages == ["Second round"]
    assert CONFIG_NAME not in server.files("me/tiny-agd") and CONFIG_NAME in server.files("me/tiny-agd", "v2")
    with pytest.raises(FileNotFoundError, match="no such repo that this token may read"):
        resolve("me/tiny-agd", revision="v2")
    found = resolve("me/tiny-agd", revision="v2", token=TOKEN)
    assert (found / WEIGHTS_NAME).read_bytes() == (adapter / WEIGHTS_NAME).read_bytes()
    assert attachment_of(agd.load(tiny_teacher(), "me/tiny-agd", revision="v2", token=TOKEN)) is not None
    with pytest.raises(FileNotFoundError, match=r"expected the revision 'v3' in the Hub repo me/tiny-agd, found none"):
        resolve("me/tiny-agd", revision="v3", token=TOKEN)


def test_create_false_needs_the_repo(server, adapter):
    with pytest.raises(OSError, match="Repository Not Found"):
        push(adapter, create=False)
    assert server.repos == {}
    push(adapter)
    push(adapter, create=False)
    with pytest.raises(OSError, match="Revision Not Found"):
        push(adapter, create=False, revision="v2")


def test_a_refused_token_is_an_oserror(server, adapter):
    with pytest.raises(OSError, match="Invalid credentials"):
        push_to_hub(adapter, "me/tiny-agd", token="hf_wrong")
    assert server.repos == {}


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / CONFIG_NAME).unlink(), FileNotFoundError, "expected adapter_config.json and adapter.safetensors in"),
        (lambda d: (d / WEIGHTS_NAME).unlink(), FileNotFoundError, "expected a safetensors file at"),
        (shutil.rmtree, FileNotFoundError, "no such directory"),
        (
            lambda d: write_json(d / CONFIG_NAME, {**read_json(d / CONFIG_NAME), "about": {}}),
            ValueError,
            "do not belong together",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_pushed(server, adapter, damage, error, message):
    (adapter / "README.md").write_text("The card does not read the adapter.")
    damage(adapter)
    with pytest.raises(error, match=message):
        push(adapter)
    assert server.requests == []


@pytest.mark.parametrize("repo_id", ["tiny-agd", "a/b/c", "me/", "me/a--b", "me/ä"])
def test_push_refuses_what_is_no_repo_id(server, adapter, repo_id):
    with pytest.raises(ValueError, match="expected the id of a Hub repo, 'name/repo', found"):
        push(adapter, repo_id)
    assert server.requests == []


def test_resolve_takes_a_folder_as_it_is(server, adapter, tmp_path):
    assert resolve(adapter) == adapter and resolve(str(adapter)) == adapter
    shutil.copytree(adapter, tmp_path / "me" / "tiny-agd")
    assert resolve("me/tiny-agd").resolve() == (tmp_path / "me" / "tiny-agd").resolve()
    with pytest.raises(ValueError, match="revision='v2' and the folder me/tiny-agd"):
        resolve("me/tiny-agd", revision="v2")
    assert server.requests == []


def test_resolve_fetches_the_adapters_files_alone(server, adapter):
    random_adapter(adapter / "transformer_2")
    push(adapter)
    server.put("me/tiny-agd", {**server.files("me/tiny-agd"), "checkpoint.safetensors": b"large", "a.pt": b"pickle"})
    server.requests.clear()
    found = resolve("me/tiny-agd")
    pair = [CONFIG_NAME, WEIGHTS_NAME]
    assert set(contents(found)) == {*pair, *(f"transformer_2/{name}" for name in pair)}
    fetched = {request.rsplit("/resolve/", 1)[1].split("/", 1)[1] for request in server.requests if request.startswith("GET /me")}
    assert fetched == set(contents(found))
    server.requests.clear()
    assert resolve("me/tiny-agd") == found
    assert not any("/resolve/" in request for request in server.requests)


def test_a_repo_without_an_adapter(server):
    server.put("me/other", {"model.safetensors": b"weights", "config.json": b"{}"})
    with pytest.raises(
        FileNotFoundError, match=re.escape("in the Hub repo me/other, found ['config.json', 'model.safetensors']")
    ):
        resolve("me/other")
    server.put("me/half", {CONFIG_NAME: b"{}"})
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config.json and adapter.safetensors .* found \['adapter_con"):
        agd.load(tiny_teacher(), "me/half")
    server.put("me/empty", {})
    with pytest.raises(FileNotFoundError, match="found an empty repo"):
        resolve("me/empty")


def test_a_missing_repo(server):
    with pytest.raises(FileNotFoundError, match=r"in me/nothing, found no such folder here, and on http.* no such repo"):
        resolve("me/nothing")


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "/a/b", "./a", "../a", "~/a", "runs/", ""])
def test_what_is_neither_folder_nor_repo_id(server, source):
    """An empty text is the working directory, which holds no adapter."""
    error = "expected adapter_config.json and adapter.safetensors in .*found " + ("no such directory" if source else r"\[")
    with pytest.raises(FileNotFoundError, match=error):
        agd.load(tiny_teacher(), source)
    assert server.requests == []


@pytest.mark.parametrize("source", ["me/a--b", "me/a..b", "mé/a"])
def test_what_no_repo_may_be_called(server, source):
    with pytest.raises(ValueError, match=f"expected the id of a Hub repo, 'name/repo', found '{source}'"):
        resolve(source)
    assert server.requests == []


def test_a_path_is_never_a_repo(server, adapter, tmp_path):
    push(adapter)
    server.requests.clear()
    with pytest.raises(FileNotFoundError, match=r"in me/tiny-agd, or the id of a Hub repo as text .*found no such directory"):
        resolve((tmp_path / "me" / "tiny-agd").relative_to(tmp_path))
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "tiny-agd").write_text("")
    with pytest.raises(FileNotFoundError, match="found a file"):
        resolve("me/tiny-agd")
    assert server.requests == []


def test_a_repo_of_a_newer_format(server, adapter):
    push(adapter)
    files = server.files("me/tiny-agd")
    server.put(
        "me/tiny-agd", {**files, CONFIG_NAME: json.dumps({**json.loads(files[CONFIG_NAME]), "format_version": 99}).encode()}
    )
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match=r"models--me--tiny-agd.* has format_version 99, this agd_fast .* reads up to 1"):
        agd.load(teacher, "me/tiny-agd")
    assert attachment_of(teacher) is None


def test_offline_the_cache_is_used(server, adapter, monkeypatch):
    push(adapter)
    found = resolve("me/tiny-agd")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("me/tiny-agd") == found
    with pytest.raises(FileNotFoundError, match=r"in me/other, found no such folder here, nothing whole in the .*not reached"):
        resolve("me/other")
    with pytest.raises(ConnectionError):
        push(adapter)


def test_a_hub_that_is_down(server, adapter, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(FileNotFoundError, match=r"the Hub was not reached: .*Connect"):
        resolve("me/tiny-agd")
    with pytest.raises(ConnectionError, match=r"could not push to me/tiny-agd: http://127.* was not reached"):
        push(adapter)


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_run_recorded(tmp_path):
    labels = {"class_labels": range(3), "trajectories": 6, "validation": 2, "progress": False}
    train = agd.TrainConfig(steps=2)
    agd.distill(tiny_teacher(), output_dir=tmp_path, adapter=small(), train_config=train, **labels)
    result = read_json(tmp_path / "distill.json")
    card = model_card([tmp_path], "me/tiny-agd", picture="samples.png", license="mit")
    assert header(card)["library_name"] == "agd-fast" and header(card)["license"] == "mit"
    assert {"diffusers", "adapter-guidance-distillation"} <= set(header(card)["tags"])
    assert not {"base_model", "pipeline_tag"} & set(header(card))  # `tiny` is no repo, and of labels no task is known
    for expected in (
        "# tiny-agd",
        "![Samples](samples.png)",
        "Base model: `tiny` (a local folder, or a name that its maker gave: no repo of the Hub), class `DiTTransformer2DModel`",
        "Kind: `modulation`, width `4`",
        f"Size: {result['parameters']:,} parameters; share of the base's: {result['fraction']:.1%}",
        "ω from 1 to 6, which is `guidance_scale` from 1 to 6",
        "omega = 1 is no guidance",
        "ε(∅) + ω·(ε(c) − ε(∅))",
        f"{result['guidance_explained']['mean']:.3g} on average",
        "| ω | 1.5 | 2 | 3 | 4 | 6 |",
        f"Last training loss: {result['loss']:.3g}",
        "- steps: `2`",
        "- ema: `none`",
        "- scheduler: `DDIMScheduler`",
        'pipe = agd.load(pipe, "me/tiny-agd")',
        "pipe(class_labels=[1], guidance_scale=3.5)",
    ):
        assert expected in card, expected
    assert "not recorded" not in card and "None" not in card
    for title, name in (("explained", "by_scale"), ("strength", "strength_by_scale")):
        row = next(line for line in card.splitlines() if line.startswith(f"| {title}"))
        assert row == f"| {title} | " + " | ".join(f"{v:.3g}" for v in result["guidance_explained"][name].values()) + " |"


@pytest.mark.parametrize("name", ["zimage", "audioldm"])  # whose condition is not called encoder_hidden_states
def test_the_card_of_a_pipeline_that_takes_text_shows_a_prompt(name, tmp_path):
    pipe = FAMILIES[name].pipeline()
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    agd.save(pipe, tmp_path)
    assert 'pipe("a fox", guidance_scale=' in model_card([tmp_path], "me/tiny-agd")


def test_the_card_invents_nothing(tmp_path):
    teacher = tiny_teacher()
    teacher.name = ""
    random_adapter(tmp_path, teacher)
    card = model_card([tmp_path], "me/tiny-agd")
    assert card.count("not recorded") >= 7
    for line in ("share of the base's: not recorded", "rule of guidance: not recorded", "(which one is not recorded)"):
        assert line in card
    for line in ("training loss", "started from", "settings", "states"):
        assert re.search(f"{line}: not recorded", card), line
    assert "license" not in header(card) and "samples.png" not in card and "None" not in card


@pytest.mark.parametrize(
    ("base_model", "shown", "is_repo"),
    [("me/sdxl", "me/sdxl", True), ("/somewhere/sdxl", "sdxl", False), ("runs/sdxl", "sdxl", False)],
)
def test_the_base_model_is_linked_where_it_is_a_repo(tmp_path, monkeypatch, base_model, shown, is_repo):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sdxl").mkdir(parents=True)
    teacher = tiny_teacher()
    teacher.name = base_model
    random_adapter(tmp_path, teacher, about={"pipeline_tag": "text-to-image"})
    monkeypatch.chdir(tmp_path.parent)  # it is pushed from elsewhere
    card = model_card([tmp_path], "me/tiny-agd")
    remark = "" if is_repo else " (a local folder, or a name that its maker gave: no repo of the Hub)"
    assert f"Base model: `{shown}`{remark}, class" in card and "somewhere/" not in card
    assert header(card).get("base_model") == (base_model if is_repo else None)
    assert header(card).get("base_model_relation") == ("adapter" if is_repo else None)
    assert (f'DiffusionPipeline.from_pretrained("{base_model}")' in card) == is_repo
    assert header(card)["pipeline_tag"] == "text-to-image"


def test_the_card_of_a_module_that_is_not_from_diffusers(tmp_path):
    teacher = custom_teacher()
    teacher.spec = NET_SPEC
    random_adapter(tmp_path, teacher, config=small(guidance_range=(1, 12)), about={"teacher": "mine|`a  rule`\n"})
    card = model_card([tmp_path], "me/net-agd")
    assert 'agd.load(denoiser, "me/net-agd", spec=spec)' in card and "guided(denoiser, 7.5)" in card
    assert "rule of guidance: `mine|'a rule'`\n" in card


def test_the_cards_code_is_python_and_its_lines_are_whole(tmp_path):
    for index, teacher in enumerate((tiny_teacher(), custom_teacher())):
        random_adapter(tmp_path / str(index), teacher)
        card = model_card([tmp_path / str(index)], "me/tiny-agd")
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        compile(code, "card", "exec")
        assert "\n\n\n" not in card and "{{" not in card and "{%" not in card
        assert all(line == line.rstrip() for line in card.splitlines())
        assert card.endswith("\n")


def test_the_card_of_several_denoisers(tmp_path):
    random_adapter(tmp_path)
    random_adapter(tmp_path / "transformer_2", config=small(kind="offset"))
    card = model_card(adapter_folders(tmp_path), "me/wan-agd")
    assert card.index("## Adapter\n") < card.index("Kind: `modulation`") < card.index("denoiser `transformer_2`")
    assert card.index("denoiser `transformer_2`") < card.index("Kind: `offset`")


def test_the_card_is_one_that_the_hubs_library_reads(tmp_path):
    random_adapter(tmp_path)
    card = huggingface_hub.ModelCard(model_card([tmp_path], "me/tiny-agd"))
    assert card.data.library_name == "agd-fast" and "## Use" in card.text
