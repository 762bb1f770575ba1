"""The page of `eagle chat --web` in headless Chromium: uploads, streamed answers, what the model sees, and nothing but loopback."""

import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
# ruff: noqa: E402  (the imports below need what is skipped above)

from eagle_sampling import MediaError
from eagle_train.runs.chat import Chat
from eagle_train.runs.web import pictures, run_page, sort_uploads
from tests.support.media import random_image, random_pixels, write_video
from tests.support.models import save_tiny_model

CHROMIUM = shutil.which("chromium")
SECONDS = 20_000  # of a step in the browser, in milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    random_image(1, (120, 40)).save(path / "wide.png")
    (path / "broken.png").write_bytes(b"nothing")
    random_image(2, (60, 80)).save(path / "paper.pdf")
    write_video(path / "clip.mp4", [random_pixels(seed, (64, 48)) for seed in range(30)], fps=10)
    return path


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = run_page(folder, port=port, device="cpu", block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def browser_page(address):
    if CHROMIUM is None:
        pytest.skip("no chromium")
    hosts = set()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(address)
        page.wait_for_selector("#question textarea")
        yield page
        browser.close()
    assert hosts - {None} == {"127.0.0.1"}


def ask(page, question, *paths):
    """Attach files, ask, and wait until the answer is complete: the page shows the prompt's tokens and no progress."""
    before = page.locator("#history .message.user").count()
    if paths:
        page.set_input_files("#question input[type=file]", [str(path) for path in paths])
        page.wait_for_function(
            "n => document.querySelectorAll('#question .thumbnail-item, #question .thumbnails button').length >= n", arg=len(paths)
        )
    page.fill("#question textarea", question)
    page.keyboard.press("Enter")
    page.wait_for_function("n => document.querySelectorAll('#history .message.user').length > n", arg=before)
    page.wait_for_selector("#question textarea:not([disabled])")


def budget(page):
    page.wait_for_function("() => document.querySelector('#budget').innerText.includes('tokens')")
    return page.inner_text("#budget")


def test_a_conversation(browser_page, files, folder):
    """An image, then a video, then a new conversation: the numbers on the page are those of the processor."""
    chat = Chat.open(folder, device="cpu")
    page = browser_page
    ask(page, "What is it?", files / "wide.png")
    image = [str(files / "wide.png")]
    request = chat.plan("What is it?", image)
    expected = len(request.encode(chat.processor.costs.encoder).input_ids)
    page.wait_for_function("n => document.querySelector('#budget').innerText.startsWith(`${n} tokens`)", arg=expected)
    page.wait_for_function("() => document.querySelectorAll('#seen img').length == 1")
    columns, rows = request.plan.grids[0]
    assert f"image 1: {columns} x {rows}" in page.inner_text("#seen")
    answer = chat.answer("What is it?", image)
    letters = re.sub("[^A-Za-z]", "", answer)  # the model is random: its answers hold half characters, which browsers show in their own way
    assert len(letters) > 20
    try:
        page.wait_for_function("text => document.querySelector('#history').innerText.replace(/[^A-Za-z]/g, '').includes(text)", arg=letters)
    except Exception:
        print(repr(answer), repr(page.inner_text("#history")))
        raise
    if screenshot := os.environ.get("EAGLE_SCREENSHOT"):
        page.screenshot(path=screenshot)

    ask(page, "And this?", files / "clip.mp4")
    page.wait_for_function("() => document.querySelectorAll('#seen img').length > 3")
    assert "0.00 s, frame 1" in page.inner_text("#seen")

    page.click("text=New conversation")
    page.wait_for_function("() => document.querySelectorAll('#history .message').length == 0")


def test_what_cannot_be_answered_is_said(browser_page, files):
    """A broken file gives a message and leaves the conversation usable; a PDF is a document."""
    page = browser_page
    page.set_input_files("#question input[type=file]", [str(files / "broken.png")])
    page.fill("#question textarea", "What?")
    page.wait_for_timeout(500)
    page.keyboard.press("Enter")
    page.wait_for_selector("text=/broken.png/")
    page.reload()
    page.wait_for_selector("#question textarea")
    ask(page, "What does it say?", files / "paper.pdf")
    assert "1 frames or pages" in budget(page)


@pytest.mark.parametrize("path", ["/etc/passwd", __file__])
def test_only_uploads_are_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    assert error.value.code in (403, 404)


def test_the_page_is_on_loopback_only(address):
    port = int(address.rpartition(":")[2])
    outside = socket.gethostbyname(socket.gethostname())
    if outside.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError), socket.create_connection((outside, port), timeout=5):
        pass


def test_uploads_are_sorted_and_checked(tmp_path):
    names = [tmp_path / name for name in ("a.PNG", "b.mp4", "c.pdf")]
    assert sort_uploads(list(map(str, names)), tmp_path) == ([str(names[0])], [str(names[1]), str(names[2])])
    for wrong, words in (
        ("/etc/passwd", "not an upload"),
        (str(tmp_path / ".." / "x.png"), "not an upload"),
        (str(tmp_path / "a.exe"), "a.exe"),
    ):
        with pytest.raises(MediaError, match=words):
            sort_uploads([wrong], tmp_path)
    with pytest.raises(MediaError, match="at most"):
        sort_uploads([str(names[0])] * 40, tmp_path)


def test_frames_are_those_of_the_plan(folder, files):
    """Pictures of a video are its tiles."""
    chat = Chat.open(folder, device="cpu", videos=[files / "clip.mp4"])
    request = chat.plan("?")
    tiles = chat.processor.process(request.messages, (), chat.videos, add_generation_prompt=True).tiles
    shown = pictures(request)
    assert len(shown) == len(tiles)
    assert all((frame == tile).all() for (frame, _), tile in zip(shown, tiles))
