"""The pages of docs/: their Python runs and prints what they show, on tiny pipelines; what a script writes is up to date."""

import contextlib
import doctest
import importlib.util
import inspect
import io
import re
import shutil
from pathlib import Path

import pytest
from diffusers import ControlNetModel, DiffusionPipeline, ModelMixin, WanImageToVideoPipeline, WanPipeline
from huggingface_hub import constants

import agd_fast as agd
from agd_fast.families import SPECS
from fake_hub import TOKEN, FakeHub
from helpers_reference import ASSETS, make_base
from tiny import FAMILIES
from tiny._parts import lively, quiet
from tiny.images import SIBLINGS
from tiny.text import prompts

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n^```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def set_defaults(monkeypatch, function, **values):
    """Of a pipeline's call: sizes that a tiny model runs in no time."""
    function = inspect.unwrap(function)
    names = inspect.getfullargspec(function).args[-len(function.__defaults__) :]
    defaults = dict(zip(names, function.__defaults__, strict=True))
    assert values.keys() <= defaults.keys()
    monkeypatch.setattr(function, "__defaults__", tuple({**defaults, **values}.values()))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Runs a page in a folder of its own, with tiny models for published ones, a Hub on 127.0.0.1 and short training."""
    pipelines = {"StableDiffusionXLPipeline": "sdxl", "WanPipeline": "wan22", "WanImageToVideoPipeline": "wan_ti2v"}
    models = {"UNet2DConditionModel": lambda: make_base("unet"), "ControlNetModel": lambda: lively(controlnet(), seed=1)}
    from_pretrained = classmethod(lambda cls, *_, **__: (FAMILIES | SIBLINGS)[pipelines[cls.__name__]].pipeline())
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(lambda cls, *_, **__: models[cls.__name__]()))
    from_pipe = DiffusionPipeline.from_pipe.__func__
    monkeypatch.setattr(DiffusionPipeline, "from_pipe", classmethod(lambda *args, **options: quiet(from_pipe(*args, **options))))
    small = FAMILIES["wan22"].call
    for cls in (WanPipeline, WanImageToVideoPipeline):
        set_defaults(monkeypatch, cls.__call__, **{name: small[name] for name in ("height", "width", "num_frames")})
    for name, value in {"train_config": agd.TrainConfig(steps=2), "trajectories": 4, "sampling_steps": 4}.items():
        monkeypatch.setitem(agd.distill.__kwdefaults__, name, value)
    for name, value in {"validation": 1, "progress": False}.items():
        monkeypatch.setitem(agd.distill.__kwdefaults__, name, value)
    for name, value in {"explained_prompts": 1, "timing_rounds": 0, "progress": False}.items():
        monkeypatch.setitem(agd.evaluate_pipeline.__kwdefaults__, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(prompts(4)))
    shutil.copytree(ASSETS / "unet-attention", "agd")
    specs = dict(SPECS)
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield run_blocks
    SPECS.clear()
    SPECS.update(specs)


def controlnet():
    return ControlNetModel.from_unet(FAMILIES["sdxl"].pipeline().unet, conditioning_embedding_out_channels=(4, 8))


def run_blocks(name):
    """Every python block of a page in turn; a text block after it is what it prints, "..." standing for anything."""
    text = (DOCS / name).read_text(encoding="utf-8")
    namespace = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    shown = 0
    for block in blocks:
        code, expected = block.groups()
        line = text[: block.start(1)].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, name, "exec"), namespace)
        if expected is not None:
            shown += 1
            found = printed.getvalue()
            assert doctest.OutputChecker().check_output(expected, found, doctest.ELLIPSIS), f"{name}:{line}\n{found}"
    assert text.count("```text") == shown
    return namespace


def test_pipelines(page):
    found = page("pipelines.md")
    assert found["url"].endswith("/me/sdxl-agd")
    assert agd.info(found["other"])["adapter"]["sites"]


def anchors(page):
    """Of the headings of a page, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_families_page_is_what_its_script_writes():
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/make_families.py"
    remarks = re.findall(r"^- `(\w+)`: ", script.TEMPLATE.read_text(encoding="utf-8"), re.MULTILINE)
    assert remarks == sorted(set(remarks) & SPECS.keys())


def test_engine(page):
    page("engine.md")


def test_kernels(page):
    page("kernels.md")


def test_memory(page):
    page("memory.md")


def test_adding_a_family(page):
    found = page("adding-a-family.md")
    assert found["result"].adapter.config.kind == "modulation"
