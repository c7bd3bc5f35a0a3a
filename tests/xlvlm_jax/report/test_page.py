"""The page of a run directory: its content, in which order, and without outside resources."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from xlvlm_jax.causal import CausalRecord, CausalScores
from xlvlm_jax.causal.record import save
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.report import page as page_module
from xlvlm_jax.report import write_report

VOID = {"meta", "img", "link", "input", "br", "hr"}


class Page(HTMLParser):
    """The elements of a page as (tag, attributes), its text, and the words of each card."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.stack, self.cards = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "article":
            self.cards.append((int(attributes["data-number"]), []))
        if tag not in VOID:
            self.stack.append((tag, attributes))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1][0] not in ("style", "script"):
            self.text.append(data)
        if self.stack and self.stack[-1][0] == "li" and "style" in self.stack[-1][1]:
            self.cards[-1][1].append(data)

    def all(self, tag, **attributes):
        return [
            found
            for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]


def page_of(run):
    return Page(write_report(run).read_text("utf-8"))


def test_a_card_per_concept_in_order_of_share(write_run, activations):
    page = page_of(write_run(activations))
    assert page.cards == [(k, [f"word{k}", f"other{k}"]) for k in (1, 0, 2)]
    shares = [float(card["data-share"]) for card in page.all("article")]
    assert shares == pytest.approx([14 / 24, 6 / 24, 3 / 24])
    text = " ".join(" ".join(page.text).split())
    for shown in ("The concepts behind “dog”", "14 samples", "objective 123", "1 sample without"):
        assert shown in text
    assert "71 % of the variance explained" in text  # split() takes the narrow space for a space


def test_causal_scores_stand_on_the_cards(write_run, activations):
    run = write_run(activations)
    scores = CausalScores(
        **{name: np.array([0.9, 0.5, np.nan]) for name in ("score", "high")},
        low=np.array([0.8, 0.1, np.nan]),
        **dict.fromkeys(("null", "null_high", "own", "others"), np.full(3, 0.25)),
    )
    rest = np.zeros(3)
    save(CausalRecord(scores, rest, rest, [[]] * 3, 0.5, 0.6, {}, {}), run / "concepts")
    page = page_of(run)
    found = [card.get("data-causal") for card in page.all("article")]
    assert found == ["0.5", "0.9", None]  # cards are in the order 1, 0, 2
    text = " ".join(" ".join(page.text).split())
    assert "causal 0.90 [0.80, 0.90]" in text
    assert "causal 0.50 [0.10, 0.50], like shuffled words" in text
    assert page.all("option", value="causal")
    (run / "concepts" / "causal.json").unlink()
    assert not page_of(run).all("option", value="causal")


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_permuting_concepts_permutes_the_cards(write_run, activations, order):
    words = [["a"], ["b"], ["c"]]
    first = page_of(write_run(activations, words=words))
    run = write_run(activations[:, order], words=[words[k] for k in order])
    assert [words for _, words in page_of(run).cards] == [words for _, words in first.cards]


def test_markup_in_words_captions_and_paths_stays_text(write_run, samples, activations):
    evil = "<script>alert(1)</script>\"'&"
    samples = [sample | {"prediction": evil, "prompt": evil, "id": evil} for sample in samples]
    samples[0]["image"] = f"/nowhere/{evil}"
    samples[0]["attributes"] = {evil: evil}
    run = write_run(activations, samples=samples, words=[[evil]] * 3)
    (run / "run.json").write_text(json.dumps({"model": evil, evil: {evil: evil}}))
    (run / "scores.json").write_text(json.dumps({evil: {evil: 1.5}}))
    text = write_report(run).read_text("utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1 and "alert" not in text.split("<script>")[1]
    assert "<script>alert" not in text.replace("<script>\n", "")
    assert [words for _, words in page.cards] == [[evil]] * 3
    assert {image["alt"] for image in page.all("img", width="112")} == {evil}


def test_everything_is_in_the_page_and_nothing_outside_it(write_run, activations):
    text = write_report(write_run(activations)).read_text("utf-8")
    page = Page(text)
    shown = page.all("img", width="112")
    assert len(shown) == 15
    for image in shown:
        assert text.count(f".{image['class']}{{background-image:url(data:image/jpeg;base64,") == 1
        assert re.fullmatch(r"caption \d+: a \w+ \w+", image["alt"])
        assert f"{image['alt']}\nactivation " in image["title"]
    for _, attributes in page.elements:
        assert not {"onclick", "srcset", "action"} & attributes.keys()
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#"))
    rest = re.sub(r"data:image/\w+;base64,[\w+/=]+", "DATA", text)
    assert not re.search(r"https?:|//\w|@import|url\((?!DATA)", rest)
    assert not page.all("link") and not page.all("iframe")
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert {link["href"][1:] for link in page.all("a")} <= targets
    assert len(text) < 2_000_000


def test_one_thumbnail_for_a_picture_that_two_directories_show(write_run, activations):
    once = write_report(write_run(activations)).read_text("utf-8")
    run = write_run(activations, name="concepts-again")
    twice = write_report(run).read_text("utf-8")
    assert twice.count("data:image/jpeg") == once.count("data:image/jpeg")
    assert [number for number, _ in Page(twice).cards] == [1, 0, 2] * 2


def test_a_missing_picture_leaves_its_name(write_run, samples, activations):
    samples[6]["image"] = "/nowhere/gone.jpg"
    activations[6, 1] = 5
    page = page_of(write_run(activations, samples=samples))
    (missing,) = page.all("span", **{"class": "shot missing"})
    assert missing["title"].startswith("caption 6")
    assert "gone.jpg" in " ".join(page.text)
    assert len(page.all("img", width="112")) == 14


def test_a_relative_path_may_be_in_the_run(write_run, samples, activations):
    run = write_run(activations, samples=[sample | {"image": "one.jpg"} for sample in samples])
    os.link(samples[0]["image"], run / "one.jpg")
    shown = page_of(run).all("img", width="112")
    assert [image["class"] for image in shown] == ["p0"] * 3  # each image once a card


def test_scores_and_settings(write_run, activations):
    site = "language_model.model.norm"
    run = write_run(activations)
    score = {"colour": {"concepts": 0.625, "random": 0.03125}, "place": "unknown"}
    scores = {"attributes": {site: {"test": score, "train": score}}, "clip score": {"mean": 21.53}}
    (run / "scores.json").write_text(json.dumps(scores))
    settings = {"data": "24 scenes", "versions": {"jax": "0.9"}, "seconds": {"draw": 1.234}}
    (run / "run.json").write_text(json.dumps(settings))
    page = page_of(run)
    text = " ".join(" ".join(page.text).split())
    assert text.count("0.62 random 0.03") == 2
    assert text.index("train") < text.index("test")
    for shown in ("24 scenes", "Versions jax 0.9", "Seconds draw 1.23", "Clip score mean 21.5"):
        assert shown in text
    assert len(page.all("i", style="width:62.5%")) == 2
    assert len(page.all("b", style="left:3.1%")) == 2


def test_concepts_before_grounding_and_samples_without_pictures(write_run, samples, activations):
    bare = [{"id": str(i)} for i in range(len(samples))]
    run = write_run(activations, samples=bare, source={})
    Concepts(np.zeros((3, 4)), activations).save(run / "concepts")
    page = page_of(run)
    text = " ".join(page.text)
    assert text.count("not grounded in words") == 3
    # 5 of each concept, and behind a click what else is its own: rows 6, 14 and 3 of them.
    assert len(page.all("span", **{"class": "shot missing"})) == 5 * 3 + 1 + 9
    assert "attribute" not in text


def test_a_directory_without_concepts_in_it_has_no_cards(write_run, activations):
    run = write_run(activations)
    Concepts(np.zeros((0, 4)), activations[:, :0]).save(run / "concepts-none")
    page = write_report(run).read_text()
    assert page.count('<article class="card"') == 3
    assert "0 concepts by snmf from 24 samples" in " ".join(page.split())


def test_it_is_written_completely_to_the_given_path(write_run, activations, tmp_path):
    run = write_run(activations)
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert not [path for path in [*run.iterdir(), *tmp_path.iterdir()] if "partial" in path.name]
    assert write_report(run, tmp_path / "new" / "page.html").exists()
    with pytest.raises(OSError, match=r"cannot write the page to .*page.html/page.html: "):
        write_report(run, tmp_path / "page.html" / "page.html")  # a file is in the way


def test_a_directory_that_is_not_a_run(tmp_path, write_run, activations):
    with pytest.raises(FileNotFoundError, match="nowhere: no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no features/; run `xlvlm extract` first"):
        write_report(tmp_path)
    run = write_run(activations)
    (run / "concepts").rename(run / "other")
    with pytest.raises(FileNotFoundError, match=r"has no concepts\*/; run `xlvlm decompose`"):
        write_report(run)
    (run / "concepts").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no concepts in .*concepts.safetensors is"):
        write_report(run)


def test_concepts_of_other_features(write_run, activations):
    run = write_run(activations)
    write_run(activations[:-1])
    with pytest.raises(ValueError, match=r"activations have 23 rows, but .*features has 24;"):
        write_report(run)
    write_run(activations, source={"site": "layers.9"})
    with pytest.raises(ValueError, match=r"concepts are of site 'layers.9', but .* holds langu"):
        write_report(run)
    write_run(activations * np.nan)
    with pytest.raises(ValueError, match="activations hold NaN or Inf"):
        write_report(run)
    write_run(activations, words=[["one"]])
    with pytest.raises(ValueError, match="words for 1 concepts, expected 3"):
        write_report(run)


def test_half_of_a_surrogate_pair_is_replaced(write_run, activations):
    run = write_run(activations, words=[["caf\ud800", "dog"]] * 3)
    assert b"caf?" in write_report(run).read_bytes()


def test_damaged_json(write_run, activations):
    run = write_run(activations)
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: not JSON \(Expecting"):
        write_report(run)
    (run / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run.json: expected a JSON object, got a list"):
        write_report(run)


def test_all_pictures_of_a_concept_open_on_a_click(write_run, activations):
    run = write_run(activations)
    page = page_of(run)
    summaries = re.findall("<summary>(.*?)</summary>", (run / "report.html").read_text())
    assert summaries == ["All 14 pictures", "All 6 pictures"]  # the third has no more than 5
    assert len(page.all("details")) == 2 and not page.all("details", open=None)
    assert len(page.all("img", width="72", height="72")) == 10
    text = write_report(run, picture_bytes=70_000).read_text()
    assert "All 14 pictures" not in text and "xlvlm report --picture-mb lets more in" in text


def test_space_is_reserved_for_every_picture(write_run, activations):
    for image in page_of(write_run(activations)).all("img"):
        assert int(image["width"]) > 0 and int(image["height"]) > 0


def test_search_and_order_find_their_elements(write_run, samples, activations):
    """page.js reads these; they stay hidden if it does not run."""
    samples = [s | {"question": "Is it <b>?", "answer": "yes"} for s in samples]
    page = page_of(write_run(activations, samples=samples))
    (tools,) = page.all("p", **{"class": "tools"})
    assert "hidden" in tools
    options = [option["value"] for option in page.all("option")]
    assert options == ["share", "mean", "active", "number", "words"]
    for card in page.all("article"):
        assert {f"data-{option}" for option in options} <= card.keys()
    first = page.all("article")[0]
    assert (first["data-words"], first["data-active"]) == ("word1 other1", "23")
    assert {shot["data-asked"] for shot in page.all("button", **{"class": "shot"})} == {
        "Is it <b>? – yes"
    }
    assert page.all("input", type="search")


def test_many_concepts_are_shown_in_short(write_run, activations, tmp_path):
    run = write_run(activations)
    whole = write_report(run, tmp_path / "whole.html").read_text()
    path = write_report(run, tmp_path / "short.html", num_concepts=2)
    text = path.read_text()
    page = Page(text)
    assert page.cards == [(k, [f"word{k}", f"other{k}"]) for k in (1, 0)]
    assert "3 concepts by snmf" in text and "numbers of the other concepts (1)" in text
    row = text[text.index("<tr><td>2</td><td>3</td>") :].split("</tr>")[0]
    assert row.endswith("<td>23</td><td>word2, other2</td>")
    assert "1 more concept is not shown in full" in text
    assert "not shown in full" not in whole
    with pytest.raises(ValueError, match="num_concepts must be at least 1, got 0"):
        write_report(run, tmp_path / "none.html", num_concepts=0)


def test_settings_name_vectors_without_their_folders():
    """A page that is shared told where the files were."""
    steering = {"vectors": ["/home/me/run/v.safetensors"], "alpha": 2.0}
    shown = page_module._without_folders({"model": "m", "steering": steering})
    assert shown == {"model": "m", "steering": {"vectors": ["v.safetensors"], "alpha": 2.0}}
    assert page_module._without_folders({"model": "m"}) == {"model": "m"}
