"""Pages as HTML: what comes from a model stays text, what is missing gives a page, the same facts the same bytes."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import made
import numpy as np
import pytest

from bilinear_jax.pages import render
from bilinear_jax.pages.facts import Context, HeatMap
from bilinear_jax.pages.site import write_site
from bilinear_jax.show import html as shared
from bilinear_jax.show import text as rendering


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def every_page() -> dict[str, str]:
    site = made.site()
    pages = {"index": render.index_page(site), "inputs": render.inputs_page(site)}
    pages |= {f"output {place}": render.output_page(site, place) for place in range(3)}
    pages |= {f"input {place}": render.input_page(site, place) for place in range(4)}
    fragments = (site, *site.outputs, *site.inputs)
    return pages | {f"fragment {place}": render.notebook(one)._repr_html_() for place, one in enumerate(fragments)}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return every_page()


def test_no_token_is_obeyed(pages):
    for name, html in pages.items():
        page = Page(html)
        scripts = page.all("script")
        if name.startswith("fragment"):
            assert not scripts, name
        else:
            assert [attributes["src"] for attributes in scripts] == [
                "static/script.js" if name in ("index", "inputs") else "../static/script.js"
            ]
        assert not page.all("img"), name
        assert "onclick" not in html
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2028\ud800-\udfff]", html), name
    shown = Page(pages["output 0"]).text
    for text in (made.TOKENS[0], made.TOKENS[1], "<U+202E>", "␛[31m", "↵", "␣␣␣", " &amp;", "<img src=x>", "<b>"):
        assert text in shown
    assert (
        "bilinear-jax pages --out '<here>'" in shown
        and "rows<U+202E>.npy" in shown
        and "made & <b>by</b> hand, layer 2" in shown
    )


def test_nothing_is_asked_of_a_network(pages):
    for name, html in pages.items():
        assert not re.search(r"(?:https?:)?//\w", html.replace("</", "")), name
        assert "@import" not in html and "url(" not in html
    sheets = shared.style(shared.static("parts.css"), shared.static("style.css", render.ROOM))
    sheets += shared.static("script.js", render.ROOM)
    assert not re.search(r"url\(|@import|https?:|fetch|import ", sheets)


def test_a_character_split_over_tokens_is_one_piece_with_the_strongest_value():
    found = shared.glyphs(made.context(), 4.0)
    whole = next(one for one in found if one.text == "é")
    assert (whole.value, whole.shade, whole.joined) == ("3.00", "p8", 1)
    assert sum(1 + one.joined for one in found) == len(made.TOKENS)
    assert [one.text for one in found if one.focus] == [" dog"]


def test_shades_of_a_pair_tell_which_feature_fires():
    found = shared.glyphs(made.context(second=True), 4.0, 2.0)
    assert [one.shade for one in found] == ["u3", "p3", "p5 u3", "", "p2", "", "p8", "n5 u2", "p10 u2"]
    assert [one.second for one in found][:3] == ["2.00", "0", "2.00"]


def test_a_context_is_cut_around_its_focus():
    short = render.cut(Context(0, 10, 1, ["a", "b", "c", "d"], [0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]), 1)
    assert short == Context(0, 10, 1, ["a", "b", "c"], [0.0, 1.0, 2.0], [4.0, 5.0, 6.0])
    short = render.cut(Context(0, 10, 3, ["a", "b", "c", "d"], [0.0, 1.0, 2.0, 3.0]), 1)
    assert short == Context(0, 12, 1, ["c", "d"], [2.0, 3.0])


def test_every_link_and_every_label_leads_somewhere(tmp_path):
    folder = write_site(made.site(), tmp_path / "site").parent
    for path in folder.rglob("*.html"):
        page = Page(path.read_text())
        ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
        assert len(ids) == len(set(ids)), path
        for tag, attributes in page.elements:
            for name in ("aria-controls", "aria-labelledby", "for"):
                assert attributes.get(name) is None or attributes[name] in ids, (path, attributes)
            address = attributes.get("href") or attributes.get("src")
            if tag in ("a", "link", "script") and address and not address.startswith(("#", "data:")):
                assert (path.parent / address).is_file(), (path, address)
    page = (folder / "output" / "10.html").read_text()
    assert f"input/{made.CONSTANT}.html" not in page and ">constant</i>" in page


def test_dead_features_and_what_is_missing_give_a_page(pages):
    assert "On this dataset it is dead" in Page(pages["output 1"]).text
    assert "On this dataset it is dead" in Page(pages["input 0"]).text
    assert "dead" in Page(pages["index"]).text
    assert f"R² {shared.DASH}" in Page(pages["output 1"]).text


def test_an_output_feature_says_what_is_not_shown(pages):
    text = " ".join(" ".join(Page(pages["output 0"]).pieces).split())
    assert (
        "The 4 pairs of largest weight make up 3.21% of the account" in text and "and 5.00% of all its pairs." in text
    )
    assert "predicts the pre-activation there with R² 0.400" in text
    assert "interference" in text and "mean pre-activation 0.375" in text  # 0.5 - 0.25 + 0.125
    assert "coordinates that the input SAE passes through" not in text  # there are none


def test_the_first_screen_answers_in_words(pages):
    text = " ".join(" ".join(Page(pages["output 0"]).pieces).split())
    when, what, much = (
        text.index(one) for one in ("When does it fire?", "What makes it fire?", "How much of it is that?")
    )
    assert when < what < much < text.index("Largest activations")
    assert "At 10.0% of the tokens" in text[when:what]
    assert "number 1 is 60.0% of the sum, and the 2 listed are 40.0%." in text[what:much]
    said = "2 eigenpairs say where it fires with an average precision of 0.55 (1 is perfect); the best control, random"
    assert (
        said in text[much:]
        and "says nothing of this feature." not in text[much : text.index("What makes it fire", much)]
    )
    assert "Eigenpair 2: suppresses 0.250 where it fires" in text and f"+1.25 +1.50 {shared.MINUS}0.50 +0.25" in text


def test_what_a_control_matches_is_reported_as_that():
    made_of = made.MAKING
    for best, matched in ((0.55, False), (0.125, True), (0.1, True)):
        scores = [
            dataclasses.replace(one, average_precision=best) if one.name == "2 eigenpairs" else one
            for one in made_of.scores
        ]
        said = render.sentence_of_scores(dataclasses.replace(made_of, scores=scores))
        assert said.endswith("says nothing of this feature.") == matched and "random directions, 2, has 0.12" in said
    seldom = [dataclasses.replace(one, average_precision=None) for one in made_of.scores]
    assert "too seldom" in render.sentence_of_scores(dataclasses.replace(made_of, scores=seldom))


def test_what_is_not_scored_says_so():
    site = made.site()
    for making, said in (
        (None, "it takes at least two rows"),
        (dataclasses.replace(made.MAKING, firings=0), "1275 tokens"),
    ):
        page = dataclasses.replace(site.outputs[0], making=making)
        text = Page(render.output_page(dataclasses.replace(site, outputs=[page]), 0)).text
        assert said in text and "How much of it is that?" not in text


def test_a_visualizer_s_contexts_in_a_notebook():
    place = rendering.Context(4.0, 7, 31, 30, ("<i>", " dog"), np.array([0.0, 4.0]))
    html = shared.contexts_fragment({3: [place], 5: []}, {3: (["␣up"], ["<b>"])}, "2-mlp-out")
    text = Page(html._repr_html_()).text
    assert "Feature 3 of SAE 2-mlp-out" in text and "<i> dog" in text and "lowers <b>" in text
    assert "dead: no token activates it" in text and not Page(html).all("i")
    assert ("b", {"class": "p10", "data-v": "4.00"}) in Page(html).elements


def test_neighbours(pages):
    def steps(name):
        return {one["rel"]: one["href"] for one in Page(pages[name]).all("a") if "rel" in one}

    assert steps("output 1") == {"prev": "../output/10.html", "next": "../output/3.html"}
    assert steps("input 0") == {"next": "../input/1.html"}


def test_the_same_facts_give_the_same_bytes_and_the_json_holds_them(tmp_path):
    def written(name):
        folder = write_site(made.site(), tmp_path / name).parent
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    first = written("first")
    shared.environment.cache_clear()
    assert first == written("second")
    facts = json.loads(first["data/output-10.json"])
    assert facts["output"] == json.loads(json.dumps(dataclasses.asdict(made.site().outputs[0])))
    assert facts["provenance"]["tokens"] == 2040
    assert json.loads(first["site.json"])["outputs"] == [10, 11, 3]


def test_a_site_replaces_a_site_and_nothing_else(tmp_path):
    site, other = tmp_path / "site", tmp_path / "other"
    write_site(made.site(), site)
    (site / "output" / "999.html").write_text("of another run")
    with pytest.raises(FileExistsError, match="replace it with force"):
        write_site(made.site(), site)
    write_site(made.site(), site, force=True)
    assert not (site / "output" / "999.html").exists()
    other.mkdir()
    (other / "config.json").write_text('{"format": "a model"}')
    with pytest.raises(FileExistsError, match="not what force may replace here"):
        write_site(made.site(), other, force=True)
    (other / "site.json").write_text('{"format": "bilinear_jax neuronpedia/1"}')
    with pytest.raises(FileExistsError, match=r"site\.json of format .*pages/1'\. It has format .*neuronpedia/1'"):
        write_site(made.site(), other, force=True)
    assert len(list(other.iterdir())) == 2


def test_a_site_that_fails_leaves_nothing(tmp_path):
    site = made.site()
    broken = dataclasses.replace(site.outputs[2], norm=float("nan"))  # no JSON
    with pytest.raises(ValueError):
        write_site(dataclasses.replace(site, outputs=[broken]), tmp_path / "site")
    assert not list(tmp_path.iterdir())


def test_a_page_with_all_that_is_asked_for_by_default_is_under_300_kb():
    words = [f" word{n}" for n in range(21)]
    full = Context(511, 200, 10, words, [1.234] * 21)
    both = dataclasses.replace(full, second=[2.345] * 21)
    site = made.site()
    page = site.outputs[0]
    group = dataclasses.replace(page.activity.top, contexts=[full] * 10)
    one = dataclasses.replace(page.activity, top=group, lower=[dataclasses.replace(group, contexts=[full] * 3)] * 3)
    pairs = [dataclasses.replace(made.PAIRS[0], contexts=[both, both])] * 20
    lists = {name: dataclasses.replace(getattr(page, name), pairs=pairs) for name in ("by_weight", "by_data")}
    heat_map = HeatMap(list(range(1, 25)), [[-0.01234] * 24] * 24, 0.1)
    page = dataclasses.replace(page, activity=one, heat_map=heat_map, **lists)
    inputs = [dataclasses.replace(site.inputs[1], activity=dataclasses.replace(one, feature=n)) for n in range(1, 25)]
    html = render.output_page(dataclasses.replace(site, outputs=[page], inputs=inputs), 0)
    assert len(html.encode()) < 300_000


def test_every_rule_for_notebooks_stays_inside_its_fragment():
    sheet = re.sub(r"/\*.*?\*/", "", shared.style(shared.static("parts.css")), flags=re.DOTALL)
    selectors = re.findall(r"(?:^|[{}])\s*([^{}@]+)\{", sheet)
    assert len(selectors) > 100
    for selector in selectors:
        assert all(".bj" in one for one in selector.split(",")), selector


def contrast(first: rendering.RGB, second: rendering.RGB) -> float:
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour) / 255]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def test_text_is_legible_in_light_and_dark():
    sheet = shared.static("parts.css")
    colours = {
        name: [tuple(bytes.fromhex(one)) for one in pair]
        for name, *pair in re.findall(r"--(\w+): light-dark\(#(\w+), #(\w+)\)", sheet)
    }
    for side in (0, 1):
        for text in ("ink", "muted", "link"):
            for ground in ("paper", "panel", "chip"):
                assert contrast(colours[text][side], colours[ground][side]) >= 4.5, (text, ground, side)
        for mark in ("positive", "negative", "second"):
            assert contrast(colours[mark][side], colours["paper"][side]) >= 3, (mark, side)
    rules = re.findall(r"background:light-dark\(#(\w+),#(\w+)\);color:light-dark\(#(\w+),#(\w+)\)", shared.shades())
    assert len(rules) == 20
    for *grounds, light, dark in rules:
        for ground, text in zip(grounds, (light, dark), strict=True):
            assert contrast(tuple(bytes.fromhex(ground)), tuple(bytes.fromhex(text))) >= 4.5
    assert [colours["paper"][0], colours["paper"][1]] == [rendering.LIGHT.zero, rendering.DARK.zero]
