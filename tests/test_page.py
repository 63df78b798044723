"""The page of `mmtx demo` in headless Chromium: MMTX_CHROMIUM names it, or a `chromium` on the path."""

import io
import json
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_serving import ROOT, Process, item, marked

import mmtx

pytest.importorskip("fastapi")
CHROMIUM = os.environ.get("MMTX_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def media():
    """Two pictures and a note that the model never saw."""
    found = []
    for tar, names in (("images-test-unseen-style", ("twemoji-1f408.webp", "twemoji-1f436.webp")),
                       ("sounds-test-unseen-notes", ("fluid-056-069.ogg",))):
        with tarfile.open(ROOT / "demos" / "data" / "starter" / f"{tar}.tar.gz") as archive:
            found += [archive.extractfile(name).read() for name in names]
    return found


@pytest.fixture(scope="module")
def model():
    return mmtx.load(device="cpu")


@pytest.fixture(scope="module")
def demo():
    process = Process(ROOT / "demos" / "starter", command="demo", name="starter")
    yield process
    process.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    sound = tmp_path_factory.mktemp("microphone") / "tone.wav"
    soundfile.write(sound, 0.5 * np.sin(np.arange(48_000) * 0.1), 48_000)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--headless=shell", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
            f"--use-file-for-fake-audio-capture={sound}"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, demo):
    """A new visitor, who sees no error of the page and asks nobody else."""
    context = browser.new_context(permissions=["camera", "microphone"])
    page, errors, asked = context.new_page(), [], []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(demo.address + "/")
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((demo.address, "blob:", "data:")) for url in asked)


def upload(page, data: bytes, name: str) -> None:
    kind = "audio/ogg" if name.endswith("ogg") else "image/webp"
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def words_of(page) -> str:
    """The whole answer, when it is there."""
    page.wait_for_selector("#hint:not([hidden])")
    return "".join(page.eval_on_selector_all(".word", "words => words.map(word => word.dataset.text)"))


def pixels(page, selector: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"))


def test_the_page_is_served_with_its_rules(demo):
    with urllib.request.urlopen(demo.address + "/", timeout=20) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "<h1>starter</h1>" in text and "image audio" in text and "{{" not in text
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"(?:src|href)=.https?:", text)


def test_attention_of_the_page_is_that_of_the_model(demo, model, media):
    for data in media[1:3]:
        body = {"model": "starter", "messages": [{"role": "user", "content": [item(data)]}], "answer": "a cat", "rollout": True}
        request = urllib.request.Request(demo.address + "/demo/attention", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        told = json.load(urllib.request.urlopen(request, timeout=30))
        found = model.attention([marked(data)], "a cat")
        assert told["words"] == [word.text for word in found.words] and told["layers"] == [0, 1, 2, 3]
        (medium,) = found.media
        for word, heat in zip(found.words, told["media"][0]["heat"], strict=True):
            expected = found.heat(word, medium, rollout=True)
            np.testing.assert_allclose(heat, expected.T[::-1] if medium.kind == "audio" else expected, atol=1e-6)


def test_the_weights_of_long_texts_are_not_computed(demo):
    body = {"model": "starter", "messages": [{"role": "user", "content": "a b " * 1000}], "answer": "a"}
    request = urllib.request.Request(demo.address + "/demo/attention", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 400 and "expected up to 1024" in json.load(error.value)["error"]["message"]


def test_an_upload_is_captioned_with_probabilities_and_a_heat_map(page, model, media):
    upload(page, media[0], "a.webp")
    assert words_of(page) == model.caption(mmtx.Image(media[0]))
    page.wait_for_selector("#heat:not([hidden])")
    first = pixels(page, "#heat")
    assert first.std() > 5
    page.select_option("#layer", "0")
    page.wait_for_timeout(300)
    assert not np.array_equal(pixels(page, "#heat"), first)


def test_a_sound_is_captioned_with_the_probability_of_each_word(page, demo, model, media):
    upload(page, media[2], "a.ogg")
    caption = words_of(page)
    assert caption == model.caption(mmtx.Audio(media[2])) and page.locator("#shown audio").count() == 1
    words = page.eval_on_selector_all(".word", "words => words.map(word => [word.dataset.text, Number(word.dataset.sure)])")
    assert [word.strip() for word, _ in words] == caption.split() and len(words) > 2
    pieces = demo.chat([item(media[2])], logprobs=True).choices[0].logprobs.content
    for word, share in words:
        taken, text = 0.0, ""
        while text != word:
            text, taken, pieces = text + pieces[0].token, taken + pieces[0].logprob, pieces[1:]
        assert share == pytest.approx(np.exp(taken), rel=1e-3)
    page.wait_for_selector("#heat:not([hidden])")
    first = pixels(page, "#heat")
    page.locator(".word").last.click()
    page.wait_for_function("document.querySelector('.word:last-child').getAttribute('aria-pressed') === 'true'")
    page.wait_for_timeout(200)
    assert not np.array_equal(pixels(page, "#heat"), first)


@pytest.mark.parametrize("device", ["camera", "microphone"])
def test_camera_and_microphone(page, device):
    page.click(f"#{device}")
    page.wait_for_selector(f"#{device}.live")
    page.wait_for_timeout(1000)
    page.click(f"#{device}")
    assert words_of(page)
    assert page.locator("#message").inner_text() == ""


def test_a_hostile_file_gets_a_message_and_the_next_is_unharmed(page, model, media):
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    for data, told in ((file.getvalue(), "9000 x 9000 pixels"), (media[0][:80], "not a whole picture")):
        upload(page, data, "a.webp")
        page.wait_for_function("text => document.querySelector('#message').textContent.includes(text)", arg=told)
    upload(page, media[1], "<img src=x onerror=alert(1)>.webp")
    assert words_of(page) == model.caption(mmtx.Image(media[1]))
    assert page.locator("#message").inner_text() == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_the_light_and_in_the_dark(browser, demo, media, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.goto(demo.address + "/")
    upload(page, media[0], "a.webp")
    words_of(page)
    page.wait_for_selector("#heat:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [box.bounding_box() for box in page.locator("section").all()]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one below the other
    assert (np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))[5, 5] < 60) == (scheme == "dark")
    small = page.eval_on_selector_all("#drop button, #drop label", "all => all.map(one => one.getBoundingClientRect().height)")
    assert min(small) >= 44  # as wide as a thumb
    if folder := os.environ.get("MMTX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/demo-{scheme}.png", full_page=True)
    context.close()
