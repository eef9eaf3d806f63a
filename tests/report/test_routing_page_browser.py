"""The page of `inspect` in a real browser: colours, keys, what a screen reader gets, no request."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.pages import accessibility_checker, headless_browser, made_page, written
from upit_merge.report.palette import DARK, LIGHT, Look, Theme, css, degrees
from upit_merge.report.routing_page import step

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
HOSTILE = ["</script>", "<b>bold</b>", "\u202eevil", " שלום", "中", "\n", "\x00", "ok "]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with headless_browser() as found:
        yield found


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a page; sees to it that nothing is asked of the network and nothing goes wrong."""
    asked: list[str] = []
    wrong: list[str] = []
    contexts = []

    def open_page(page: str, scheme: str = "light", size: dict | None = None, **options: Any):
        address = written(tmp_path, page)
        context = browser.new_context(viewport=size or WIDE, color_scheme=scheme, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(address)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert asked
    assert set(asked) == {(tmp_path / "page.html").as_uri()}


def classes(tab: Any, index: int) -> str:
    return tab.locator(".t").nth(index).get_attribute("class")


def focused(tab: Any) -> int:
    """Number of the token that has the focus; -1 for none."""
    return tab.evaluate("[...document.querySelectorAll('.t')].indexOf(document.activeElement)")


def picture(tab: Any, path: Path) -> Image.Image:
    data = tab.screenshot(path=path)
    return Image.open(io.BytesIO(data)).convert("RGB")


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize(
    ("scheme", "theme"), [("light", LIGHT), ("dark", DARK)], ids=["light", "dark"]
)
def test_colours_are_those_that_were_checked(
    opened: Any, tmp_path: Path, scheme: str, theme: Theme
) -> None:
    """What is on the screen, point by point: paper, a token's tint, the line below it."""
    page, views = made_page(words=["    "], experts=8)
    tab = opened(page, scheme)
    seen = picture(tab, tmp_path / f"{scheme}.png")
    assert seen.getpixel((3, 3)) == rgb(theme.paper)
    for index in (0, 5, 11):
        box = tab.locator(".t").nth(index).bounding_box()
        expert = int(views.experts[0, index, 0])
        number = step(float(views.certainty[0, index]), 8)
        angle = degrees(Look.of(expert, 8).hue, 8)
        middle = (int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2))
        tint = rgb(css(*theme.tints[number], angle))
        assert all(abs(a - b) <= 1 for a, b in zip(seen.getpixel(middle), tint, strict=True))
        below = {seen.getpixel((middle[0], int(box["y"] + box["height"]) - n)) for n in range(4)}
        assert rgb(css(*theme.line, angle)) in below


def test_light_dark_and_the_switch(opened: Any, tmp_path: Path) -> None:
    page, _ = made_page()
    light = picture(opened(page, "light"), tmp_path / "light.png")
    tab = opened(page, "dark")
    dark = picture(tab, tmp_path / "dark.png")
    assert light.getpixel((3, 3)) == rgb(LIGHT.paper)
    assert dark.getpixel((3, 3)) == rgb(DARK.paper)
    tab.get_by_label("Colours").select_option("light")
    tab.mouse.move(0, 0)
    switched = picture(tab, tmp_path / "switched.png")
    assert switched.getpixel((3, 3)) == rgb(LIGHT.paper)
    tab.get_by_label("Colours").select_option("")
    assert picture(tab, tmp_path / "back.png").getpixel((3, 3)) == rgb(DARK.paper)


def test_everything_by_keyboard(opened: Any) -> None:
    page, views = made_page()
    tab = opened(page)
    reached = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        # Wherever the focus is, it can be seen.
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(
            tab.evaluate("document.activeElement.id || document.activeElement.className")
        )
        if focused(tab) >= 0:
            break
    assert {"skip", "theme", "layer", "before", "after", "group", "numbers"} <= {*reached}
    assert sum("chip" in name for name in reached) == 8
    assert focused(tab) == 0
    # One stop for the whole text.
    assert tab.locator(".t[tabindex='0']").count() == 1
    for key, expected in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 29),
        ("PageDown", 30),
        ("ArrowLeft", 29),
        ("PageUp", 29),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        tab.keyboard.press(key)
        assert focused(tab) == expected, key
    # A line has the five words and the end of a sentence: below is the same word.
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    assert focused(tab) == 7
    tab.keyboard.press("ArrowUp")
    assert focused(tab) == 1
    tab.keyboard.press(".")
    tab.keyboard.press(".")
    assert tab.locator("#layer-name").text_content() == "layer 1"
    assert tab.locator("#layer").get_attribute("aria-valuetext") == "layer 1"
    for index in range(60):
        look = Look.of(int(views.experts[2, index, 0]), 8).classes
        assert classes(tab, index).startswith(f"t {look} c"), index
    tab.keyboard.press(",")
    tab.keyboard.press(",")
    tab.keyboard.press(",")
    assert tab.locator("#layer-name").text_content() == "all layers"
    # The rest of the page comes after the text.
    tab.keyboard.press("Tab")
    assert "scroll" in tab.evaluate("document.activeElement.className")


def test_a_token_is_told_in_words(opened: Any) -> None:
    page, views = made_page()
    tab = opened(page)
    live = tab.locator("[aria-live=polite]")
    tab.locator(".t").nth(3).click()
    first, second = views.experts[0, 3].tolist()
    told = live.text_content()
    assert re.fullmatch(
        rf" sends: expert {first}, \d+%; expert {second}, [\d.]+%; all layers", told
    )
    panel = tab.locator("#token")
    assert "id 3" in panel.text_content()
    assert tab.locator("#token-text").text_content() == "“ sends”"
    trace = tab.locator("#token-trace li").all_text_contents()
    assert trace == [f"L{layer}{int(views.experts[layer + 1, 3, 0])}" for layer in range(4)]
    tab.keyboard.press(".")
    assert live.text_content() != told
    assert live.text_content().endswith("layer 0")
    shares = views.shares[1, 3].tolist()
    bars = tab.locator("#token-bars .value").all_text_contents()
    assert [float(bar.rstrip("%")) for bar in bars] == pytest.approx(
        [100 * share for share in shares], abs=0.8
    )
    assert tab.locator(".t[aria-selected=true]").count() == 1


def test_controls(opened: Any) -> None:
    page, views = made_page()
    tab = opened(page)
    tab.locator("#layer").fill("3")
    assert tab.locator("#layer-name").text_content() == "layer 2"
    assert "layer 2" in tab.locator("#kinds-view").text_content()
    tab.locator("#after").click()
    assert tab.locator("#layer").input_value() == "4"
    # One expert alone: pressed, and said.
    expert = int(views.experts[4, 0, 0])
    count = int((views.experts[4, :, 0] == expert).sum())
    chip = tab.locator(".legend .chip").nth(expert)
    chip.click()
    assert chip.get_attribute("aria-pressed") == "true"
    assert tab.locator(".t.on").count() == count
    assert f"{count} of 60 tokens" in tab.locator("#live").text_content()
    chip.click()
    assert tab.locator(".t.on").count() == 0
    tab.get_by_label("numbers").check()
    content = "getComputedStyle(document.querySelector('.t'), '::after').content"
    assert tab.evaluate(content) == f'"{expert}"'
    tab.locator("#group").select_option(label="prose")
    assert tab.locator(".sample:visible").count() == 1
    assert "prose" in tab.locator(".sample:visible h3").text_content()


def test_the_table_follows_the_layer(opened: Any) -> None:
    """The second expert is dead in the first layer."""
    page, _ = made_page()
    tab = opened(page)
    cell = tab.locator("#kinds tbody tr").nth(1).locator("td").last
    before = cell.text_content()
    tab.locator("#after").click()
    assert cell.text_content() == "0.0%"
    tab.locator("#before").click()
    assert cell.text_content() == before


def test_hostile_text_is_text(opened: Any) -> None:
    page, _ = made_page(words=HOSTILE, tokens=16, groups=("</script><i>", "\u202e&amp;"))
    tab = opened(page)
    assert tab.locator(".sample b").count() == 0
    texts = tab.locator(".t").all_text_contents()
    shown = ["</script>", "<b>bold</b>", "⟨U+202E⟩evil", " שלום", "中", "\n", "\u2400", "ok "]
    assert texts == shown * 2
    tab.locator(".t").first.click()
    assert tab.locator("#token-text").text_content() == "“</script>”"
    assert "</script><i>" in tab.locator("#token-place").text_content()
    assert tab.locator("#group option").all_text_contents()[1:] == [
        "</script><i>",
        "⟨U+202E⟩&amp;",
    ]


def test_text_from_right_to_left(opened: Any) -> None:
    """The next token is where it is read next, whatever a sample begins with."""
    page, _ = made_page(words=["<s>", "שלום", " עולם", " טוב", " מאוד"], tokens=20)
    tab = opened(page)
    boxes = [tab.locator(".t").nth(index).bounding_box() for index in (1, 2)]
    assert boxes[1]["x"] < boxes[0]["x"]
    tab.locator(".t").nth(1).click()
    tab.keyboard.press("ArrowLeft")
    assert focused(tab) == 2
    tab.keyboard.press("ArrowRight")
    assert focused(tab) == 1


@pytest.mark.parametrize(("experts", "scheme"), [(8, "light"), (64, "dark")])
def test_axe_finds_nothing(opened: Any, experts: int, scheme: str) -> None:
    """WCAG 2.2 A and AA, and best practice, by axe-core."""
    page, _ = made_page(experts=experts, words=["one", " two", "\n", "   ", "中"])
    tab = opened(page, scheme, reduced_motion="reduce")
    tab.locator(".t").nth(3).click()
    found = accessibility_checker().run(tab)
    problems = [
        (v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found.response["violations"]
    ]
    assert problems == []


def test_a_narrow_screen(opened: Any, tmp_path: Path) -> None:
    page, _ = made_page(experts=64)
    tab = opened(page, size=NARROW)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    tab.locator(".t").nth(40).click()
    tab.keyboard.press("ArrowRight")
    token, panel = tab.locator(".t").nth(41).bounding_box(), tab.locator(".detail").bounding_box()
    assert token["y"] + token["height"] <= panel["y"]  # the panel hides no token that has the focus
    picture(tab, tmp_path / "narrow.png")


def test_without_javascript(opened: Any) -> None:
    page, _ = made_page()
    tab = opened(page, java_script_enabled=False)
    assert tab.locator("table:visible").count() == 4
    assert tab.locator(".controls:visible").count() == 0
    assert "Without JavaScript" in tab.locator("body").inner_text()
    assert tab.locator(".t").nth(1).text_content() == " the"


def test_motion_only_for_who_likes_it(opened: Any) -> None:
    page, _ = made_page()
    duration = "getComputedStyle(document.querySelector('.t')).transitionDuration"
    assert opened(page, reduced_motion="reduce").evaluate(duration) == "0s"
    assert opened(page, reduced_motion="no-preference").evaluate(duration) != "0s"
