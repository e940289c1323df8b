"""The captions that ship."""

import re
from collections import Counter

from agd_fast.datasets.captions import CAPTIONS_FILE, captions

BRANDS = (
    "coca-cola",
    "disney",
    "lego",
    "pokemon",
    "polaroid",
    "porsche",
    "ferrari",
    "iphone",
    "starbucks",
    "vespa",
    "artstation",
)
SUBJECTS = {
    "people": r"\b(woman|man|men|women|boy|girl|child|children|toddler|portrait)\b",
    "animals": r"\b(cat|dog|fox|bear|whale|horse|owl|frog|goat|rabbit)s?\b",
    "landscape": r"\b(mountain|desert|forest|sea|river|lake|beach|field|glacier|canyon)s?\b",
    "city": r"\b(street|city|bus|tram|alley|rooftops?|subway|market|skyscraper)\b",
    "food": r"\b(soup|ramen|cake|bread|coffee|sandwich|lemons?|pie|pancakes|dumplings|eggs?)\b",
    "interiors": r"\b(kitchen|bedroom|living room|attic|corridor|library|ballroom|interior)\b",
    "fantasy": r"\b(dragon|wizard|unicorn|mermaid|ghost|princess|knight|phoenix|ogre)\b",
    "science": r"\b(galaxy|microscope|micrograph|telescope|astronauts?|electron|chemist|crystals?)\b",
    "vehicles": r"\b(train|boat|ship|motorcycle|tractor|bicycle|airship|car|submarine|biplane)\b",
    "weather": r"\b(rain|snow|fog|foggy|storm|stormy|lightning|mist|snowstorm|hailstorm)\b",
    "text": r"[\"“]",
    "abstract": r"\b(abstract|geometric|kaleidoscope)\b",
}
STYLES = ("photo", "painting", "watercolor", "sketch", "drawing", "illustration", "3D", "film still", "poster", "macro", "pixel")


def test_there_are_enough_and_each_is_its_own():
    found = captions()
    assert len(found) >= 500
    assert len({" ".join(re.findall(r"\w+", caption.casefold())) for caption in found}) == len(found)
    openings = Counter(tuple(caption.casefold().split()[:5]) for caption in found)
    assert max(openings.values()) <= 4
    assert max(Counter(caption.split()[0] for caption in found).values()) <= 0.6 * len(found)


def test_they_are_clean_lines_of_utf8():
    text = CAPTIONS_FILE.read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text and "\t" not in text and "  " not in text
    assert text.split("\n")[:-1] == captions()  # no other line breaks
    for caption in captions():
        assert caption and caption == caption.strip() and caption.isprintable()
        assert not any(brand in caption.casefold() for brand in BRANDS), caption


def test_their_lengths_are_spread():
    words = sorted(len(caption.split()) for caption in captions())
    assert words[0] >= 3 and words[-1] <= 45
    spread = Counter("short" if count <= 6 else "middle" if count <= 12 else "long" for count in words)
    assert all(spread[name] >= 0.12 * len(words) for name in ("short", "middle", "long")), spread
    assert words[-1] >= 35 and words[-10] >= 25


def test_subjects_and_styles_vary():
    found = captions()
    for subject, pattern in SUBJECTS.items():
        matches = [caption for caption in found if re.search(pattern, caption, flags=re.IGNORECASE)]
        assert len(matches) >= (4 if subject == "abstract" else 9), (subject, matches)
        assert len(matches) <= 0.35 * len(found), subject
    for style in STYLES:
        assert any(style.casefold() in caption.casefold() for caption in found), style
