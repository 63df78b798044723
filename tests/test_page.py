"""The page of `mmtx demo` in headless Chromium: MMTX_CHROMIUM names it, or a `chromium` on the path (Debian: apt install chromium)."""

import base64
import io
import json
import math
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_serving import ROOT, Process, item, marked

import mmtx
from mmtx.cli import main
from mmtx.run_page import run_page

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
def maker():
    return mmtx.load(ROOT / "demos" / "generate", "cpu")


@pytest.fixture(scope="module")
def transcriber():
    return mmtx.load(ROOT / "demos" / "speech", "cpu")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Ten pictures and two notes of the training data, with their captions."""
    folder = tmp_path_factory.mktemp("training")
    for name, count in (("images-train-000", 10), ("sounds-train-000", 2)):
        with tarfile.open(ROOT / "demos" / "data" / "starter" / f"{name}.tar.gz") as archive:
            for member in archive.getmembers()[:2 * count]:
                (folder / member.name).write_bytes(archive.extractfile(member).read())
    return folder


@pytest.fixture(scope="module")
def demo(training):
    process = Process(ROOT / "demos" / "starter", "--generate_model", str(ROOT / "demos" / "generate"), "--transcribe_model",
                      str(ROOT / "demos" / "speech"), "--train", str(training), command="demo", name="starter")
    yield process
    process.close()


def asked(demo, route: str, **body):
    """What a route of the page answers, or the status and the message of its refusal."""
    request = urllib.request.Request(demo.address + route, json.dumps({"model": "starter", **body}).encode(),
                                     {"Content-Type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request, timeout=60))
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def opened(url: str):
    """What a data URL holds: pixels, or samples."""
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data))) if url.startswith("data:image") else soundfile.read(io.BytesIO(data))[0]


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
    head = urllib.request.Request(demo.address + "/", method="HEAD")
    assert urllib.request.urlopen(head, timeout=20).status == 200
    with urllib.request.urlopen(demo.address + "/", timeout=20) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "<h1>starter</h1>" in text and "{{" not in text
    settings = json.loads(re.search(r'id="settings">(.*?)</script>', text)[1])
    assert (settings["kinds"], settings["makes"], settings["nearest"]) == (["image", "audio"], ["image", "audio"], True)
    files = {path.stem: path.read_bytes() for path in (ROOT / "demos" / "examples").iterdir() if path.suffix in (".webp", ".ogg")}
    assert {one["name"]: base64.b64decode(one["data"]) for one in settings["examples"]} == files and len(files) == 6
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"(?:src|href)=.https?:", text)


def test_attention_of_the_page_is_that_of_the_model(demo, model, media):
    for data in media[1:3]:
        told = asked(demo, "/demo/attention", messages=[{"role": "user", "content": [item(data)]}], answer="a cat", rollout=True)
        found = model.attention([marked(data)], "a cat")
        assert told["words"] == [word.text for word in found.words] and told["layers"] == [0, 1, 2, 3]
        (medium,) = found.media
        shown = opened(told["media"][0]["shown"])
        if medium.kind == "image":
            assert np.array_equal(shown, model.detokenize(model.tokenize([marked(data)]))[0])
        else:
            low, high = medium.shown.min(), medium.shown.max()
            np.testing.assert_allclose(shown[::-1], 255 * (medium.shown - low) / (high - low), atol=1.01)
        for word, heat in zip(found.words, told["media"][0]["heat"], strict=True):
            expected = found.heat(word, medium, rollout=True)
            np.testing.assert_allclose(heat, expected.T[::-1] if medium.kind == "audio" else expected, atol=1e-6)


def test_the_weights_of_long_texts_are_not_computed(demo):
    status, told = asked(demo, "/demo/attention", messages=[{"role": "user", "content": "a b " * 1000}], answer="a")
    assert status == 400 and "expected up to 1024" in told


def test_what_is_made_is_what_the_model_makes(demo, maker, media):
    options = {"temperature": 0.5, "seed": 3}
    drawn = asked(demo, "/demo/make", out="image", content="red apple", **options)
    assert np.array_equal(opened(drawn["shown"]), np.asarray(maker.generate("red apple", "image", **options)))
    played = asked(demo, "/demo/make", out="audio", content="trumpet, C 5", seconds=0.5, **options)
    expected = maker.generate("trumpet, C 5", "audio", max_new_tokens=40, **options)
    np.testing.assert_allclose(opened(played["shown"]), expected.samples, atol=1e-4)
    assert 0.3 < len(expected.samples) / expected.rate <= 0.5

    completed = asked(demo, "/demo/make", out="image", begin=item(media[0]), kept=0.25, content="cat", **options)
    assert np.array_equal(opened(completed["shown"]), np.asarray(maker.outpaint(mmtx.Image(media[0]), 16, ["cat"], **options)))
    longer = asked(demo, "/demo/make", out="audio", begin=item(media[2]), seconds=0.5, **options)
    expected = maker.continue_audio(mmtx.Audio(media[2]), 0.5, **options)
    np.testing.assert_allclose(opened(longer["shown"]), expected.samples, atol=1e-4)


def test_what_is_said_is_what_the_transcriber_hears(demo, transcriber, media):
    speech = ROOT / "demos" / "examples" / "speech.ogg"
    answer = asked(demo, "/demo/transcribe", sound=item(speech.read_bytes()))
    assert answer == {"text": transcriber.transcribe(speech)}
    assert answer["text"] == "it is high time you went to work"
    cut = asked(demo, "/demo/transcribe", sound=item(media[2][:300]))
    assert cut[0] == 400 and cut[1].startswith("sound: ")


@pytest.mark.parametrize(("given", "transcribes"), [([], False), (["--transcribe_model", str(ROOT / "demos" / "speech")], True)])
def test_a_model_that_does_not_transcribe_needs_one_that_does(given, transcribes, media):
    process = Process(ROOT / "demos" / "starter", *given, command="demo", name="starter")
    try:
        page = urllib.request.urlopen(process.address + "/", timeout=60).read().decode()
        assert f'"transcribes": {json.dumps(transcribes)}' in page
        if not transcribes:
            assert asked(process, "/demo/transcribe", sound=item(media[2])) == (
                404, "this server was started without a model that transcribes (--transcribe_model)")
    finally:
        process.close()


def test_mistakes_in_what_is_made_are_told(demo, media):
    for body, told in (({"out": "image"}, "content: found nothing"), ({"out": "video"}, "out: found 'video', expected 'image' or 'audio'"),
                       ({"out": "audio", "begin": item(media[0])}, "begin: found image, expected audio"),
                       ({"out": "image", "begin": item(media[0][:80])}, "begin.image_url.url: not a whole picture"),
                       ({"out": "image", "begin": {"type": "input_audio", "input_audio": {}}}, "begin.input_audio.data: found none, expected one"),
                       ({"out": "image", "content": "a", "kept": "0.5"}, "kept: found '0.5', expected a valid number"),
                       ({"out": "audio", "content": "a", "seconds": math.nan}, "seconds: found nan, expected a finite number"),
                       ({"out": "audio", "content": "a", "seconds": 11}, "seconds: found 11, expected less than or equal to 10"),
                       ({"out": "audio", "content": "1 2 3 4 5 " * 1000}, "tokens, expected up to 4096 in all")):
        status, message = asked(demo, "/demo/make", **body)
        assert status == 400 and told in message


@pytest.mark.parametrize(("route", "body"), [
    ("attention", {"messages": [{"role": "user", "content": "a"}], "answer": "a"}), ("nearest", {"content": "a"}),
    ("transcribe", {"sound": {"type": "input_audio", "input_audio": {"data": ""}}}), ("make", {"out": "image", "content": "a"})])
def test_another_model_is_not_here(demo, route, body):
    assert asked(demo, f"/demo/{route}", **body, model="other") == (404, "model: found 'other', expected 'starter'")


def test_nearest_training_samples_are_those_of_the_models_vectors(demo, model, training, media):
    captions = {path: json.loads(path.with_suffix(".json").read_text())["caption"] for path in sorted(training.iterdir())
                if path.suffix != ".json"}
    for _ in range(300):
        found = asked(demo, "/demo/nearest", content=[item(media[0])])
        if found["read"] == found["of"] == 12:
            break
        time.sleep(0.1)
    for data in (media[0], media[2]):
        asked_for = model.embed([marked(data)])
        alike = {path: float(model.embed([marked(path.read_bytes())]) @ asked_for) for path in captions}
        expected = sorted(captions, key=alike.get, reverse=True)[:4]
        found = asked(demo, "/demo/nearest", content=[item(data)])["samples"]
        assert [one["caption"] for one in found] == [captions[path] for path in expected]
        np.testing.assert_allclose([one["alike"] for one in found], [alike[path] for path in expected], atol=1e-5)
    itself = next(path for path in captions if path.suffix == ".webp")
    first = asked(demo, "/demo/nearest", content=[item(itself.read_bytes())])["samples"][0]
    assert first["alike"] == pytest.approx(1, abs=1e-5) and first["kind"] == "image"
    assert np.array_equal(opened(first["shown"]), np.asarray(Image.open(itself).convert("RGB")))
    assert asked(demo, "/demo/nearest", content="words alone")["samples"] == []


@pytest.mark.parametrize(("options", "told"), [
    (["--examples", "nothing.png"], "nothing.png: no such file or folder"),
    (["--train", "nothing.jsonl"], "nothing.jsonl"),
    (["--generate_model", "nothing"], "nothing: no such folder or file"),
    (["--transcribe_model", "nothing"], "nothing: no such folder or file"),
    (["--transcribe_model", str(ROOT / "demos" / "starter")], "starter, which does not transcribe, expected a model that was")])
def test_mistakes_of_who_starts_it_are_one_line(options, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--port", "0", *options])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and told in err and err.count("\n") == 1


def test_an_upload_is_captioned_with_probabilities_and_a_heat_map(page, model, media):
    upload(page, media[0], "a.webp")
    assert words_of(page) == model.caption(mmtx.Image(media[0]))
    found = model.attention([mmtx.Image(media[0])])
    hottest = set()
    for layer in (None, 0):
        if layer is not None:
            with page.expect_response("**/demo/attention"):
                page.select_option("#layer", str(layer))
        heat = found.heat(found.words[0], found.media[0], layer, rollout=layer is None)
        hottest.add(place := np.unravel_index(heat.argmax(), heat.shape))
        page.wait_for_timeout(200)
        shown = pixels(page, "#heat")
        row, column = ((place[axis] + 0.5) / heat.shape[axis] * shown.shape[axis] for axis in (0, 1))
        red, green, blue = shown[int(row), int(column)]
        assert min(red, green) > 170 and blue < 100  # yellow, through which a little of the picture shines
    assert len(hottest) == 2


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
    assert first.std() > 5
    page.locator(".word").last.click()
    page.wait_for_selector(".word:last-child[aria-pressed=true]")
    page.wait_for_timeout(200)
    assert not np.array_equal(pixels(page, "#heat"), first)


def test_an_example_is_captioned_beside_its_neighbours(page, model):
    example = ROOT / "demos" / "examples" / "trumpet.ogg"
    page.click("[aria-label='example: trumpet']")
    assert words_of(page) == model.caption(example)
    page.wait_for_selector("#alike:not([hidden])")
    assert page.locator("#near figure").count() == 4 and page.locator("#near audio").count() >= 1


def test_the_tab_that_transcribes_takes_sounds_alone(page, transcriber, media):
    page.click("[data-tab=hear]")
    assert not page.locator("#words").is_visible() and not page.locator("#camera").is_visible()
    upload(page, media[0], "a.webp")
    page.wait_for_selector("#message:not(:empty)")
    assert page.locator("#message").inner_text() == "Give a sound."
    page.click("[aria-label='example: speech']")
    page.wait_for_selector("#said:not(:empty)")
    assert page.locator("#said").inner_text() == transcriber.transcribe(ROOT / "demos" / "examples" / "speech.ogg")
    assert page.locator("#message").inner_text() == ""


def test_a_chat_remembers_what_was_said_and_shown(page, model, media):
    asked = []
    page.on("request", lambda request: request.url.endswith("/chat/completions") and asked.append(json.loads(request.post_data)))
    page.click("[data-tab=chat]")
    upload(page, media[0], "a.webp")
    page.fill("#words", "What is it?")
    page.click("#ask")
    page.wait_for_selector("body[aria-busy=false] .turn >> nth=1")
    first = page.locator(".turn").last.inner_text()
    assert first == model.generate(["What is it?", mmtx.Image(media[0])])
    page.fill("#words", "And now?")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[aria-busy=false] .turn >> nth=3")
    picture = {"type": "image_url", "image_url": {"url": "data:image/webp;base64," + base64.b64encode(media[0]).decode()}}
    assert asked[1]["messages"] == [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]},
                                    {"role": "assistant", "content": first},
                                    {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    page.click("#anew")
    assert page.locator(".turn").count() == 0


def test_a_chat_keeps_what_was_not_answered(page, model, media):
    page.click("[data-tab=chat]")
    upload(page, media[0][:80], "a.webp")
    page.fill("#words", "What is it?")
    page.click("#ask")
    page.wait_for_selector("#message:not(:empty)")
    assert page.locator("#message").inner_text().startswith("not a whole picture")
    assert page.locator(".turn").count() == 0 and page.input_value("#words") == "What is it?"
    upload(page, media[0], "a.webp")
    page.click("#ask")
    page.wait_for_selector("body[aria-busy=false] .turn >> nth=1")
    assert page.locator(".turn").last.inner_text() == model.generate(["What is it?", mmtx.Image(media[0])])
    assert page.input_value("#words") == "" and page.locator("#shown img").count() == 0


def test_a_file_is_sent_once_and_can_be_chosen_again(page, media):
    asked = []
    page.on("request", lambda request: request.url.endswith("/chat/completions") and asked.append(json.loads(request.post_data)))
    page.click("[data-tab=chat]")
    for count in (1, 3):  # the browser tells of a file that is chosen again only where the field is empty
        upload(page, media[0], "a.webp")
        page.wait_for_selector("#shown img")
        page.click("#ask")
        page.wait_for_selector(f"body[aria-busy=false] .turn >> nth={count}")
        assert page.eval_on_selector("#file", "field => field.files.length") == 0
        assert asked[-1]["messages"][-1]["content"] == [{"type": "image_url", "image_url": {
            "url": "data:image/webp;base64," + base64.b64encode(media[0]).decode()}}]


def test_another_layer_can_be_chosen_after_another_tab(page, media):
    upload(page, media[0], "a.webp")
    words_of(page)
    page.wait_for_selector("#read:not([hidden])")
    page.click("[data-tab=chat]")
    page.fill("#words", "And now?")
    page.click("#ask")
    page.wait_for_selector("body[aria-busy=false] .turn >> nth=1")
    page.click("#anew")
    page.click("[data-tab=say]")
    with page.expect_response("**/demo/attention", timeout=5000) as told:
        page.select_option("#layer", "0")
    assert told.value.ok and json.loads(told.value.request.post_data)["messages"][0]["content"] == [{"type": "image_url", "image_url": {
        "url": "data:image/webp;base64," + base64.b64encode(media[0]).decode()}}]


def test_a_tab_that_is_left_at_work_is_idle_and_works_again(page, model, media):
    page.route("**/v1/chat/completions", lambda route: None)  # no answer ever comes
    upload(page, media[0], "a.webp")
    page.wait_for_selector("body[aria-busy=true]")
    page.click("[data-tab=chat]")
    page.wait_for_selector("body[aria-busy=false]")
    page.click("[data-tab=say]")
    page.unroute("**/v1/chat/completions")
    page.click("#ask")
    assert words_of(page) == model.caption(mmtx.Image(media[0]))


def test_a_key_is_asked_for_until_it_is_right(page, model, media):
    given = iter(["\u043a\u043b\u044e\u0447 a", "right"])  # a header cannot hold the first
    page.on("dialog", lambda dialog: dialog.accept(next(given)))
    refused = {"status": 401, "json": {"error": {"message": "a key"}}}
    page.route("**/v1/chat/completions", lambda route: route.continue_() if route.request.headers.get(
        "authorization") == "Bearer right" else route.fulfill(**refused))
    upload(page, media[0], "a.webp")
    assert words_of(page) == model.caption(mmtx.Image(media[0])) and next(given, None) is None


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_files_can_be_dropped_and_pasted(page, model, media, way):
    page.evaluate("""([data, way]) => {
        const given = new DataTransfer();
        given.items.add(new File([Uint8Array.from(data)], "a.webp", {type: "image/webp"}));
        document.dispatchEvent(way === "drop" ? new DragEvent("drop", {dataTransfer: given})
                                              : new ClipboardEvent("paste", {clipboardData: given}));
    }""", [list(media[1]), way])
    assert words_of(page) == model.caption(mmtx.Image(media[1]))


def test_tabs_draw_play_and_go_on(page, maker, media):
    def made(selector: str):
        page.wait_for_selector(selector)
        return opened(page.get_attribute(selector, "src"))

    page.click("[data-tab=make]")
    page.fill("#words", "red apple")
    page.fill("#temperature", "0")
    page.fill("#seed", "3")
    page.click("#ask")
    assert np.array_equal(made("#make .made img"), np.asarray(maker.generate("red apple", "image")))
    page.select_option("#out", "audio")
    page.fill("#words", "trumpet, C 5")
    page.fill("#seconds", "0.5")
    page.click("#ask")
    np.testing.assert_allclose(made("#make .made audio"), maker.generate("trumpet, C 5", "audio", max_new_tokens=40).samples, atol=1e-4)
    page.locator("[data-tab=make]").press("ArrowRight")
    page.fill("#words", "")
    upload(page, media[0], "a.webp")
    assert np.array_equal(made("#go_on .made img"), np.asarray(maker.outpaint(mmtx.Image(media[0]))))
    upload(page, media[2], "a.ogg")
    np.testing.assert_allclose(made("#go_on .made audio"), maker.continue_audio(mmtx.Audio(media[2]), 0.5).samples, atol=1e-4)


def test_a_field_that_is_hidden_and_empty_is_not_sent(page):
    page.click("[data-tab=make]")
    page.select_option("#out", "audio")
    page.fill("#seconds", "")
    page.select_option("#out", "image")
    page.fill("#words", "red apple")
    with page.expect_request("**/demo/make") as asked:
        page.click("#ask")
    page.wait_for_selector("#make .made img")
    assert json.loads(asked.value.post_data).keys() == {"model", "out", "seed", "content", "temperature", "kept"}


@pytest.mark.parametrize("device", ["camera", "microphone"])
def test_camera_and_microphone(page, device):
    page.click(f"#{device}")
    page.wait_for_selector(f"#{device}.on")
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
    assert len({tab.bounding_box()["y"] for tab in page.locator("#tabs label").all()}) == 1  # all side by side
    assert page.eval_on_selector_all("#tabs label", "all => all.every(one => one.scrollWidth <= one.clientWidth)")  # whole words
    small = page.eval_on_selector_all("#tabs label, #drop button, #drop input, #examples button", "all => all.map(one => one.getBoundingClientRect().height)")
    assert min(small) >= 44  # as wide as a thumb
    for tab in ("hear", "chat", "make", "go_on"):
        page.click(f"[data-tab={tab}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("[data-tab=say]")
    if folder := os.environ.get("MMTX_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/demo-{scheme}.png", full_page=True)
    context.close()


def test_the_report_of_a_run_fits_a_phone(browser, tmp_path):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics" / "metrics.csv").write_text("epoch,step,train/loss,val/loss_of_something_with_a_long_name\n0,1,2.5,3.5\n")
    (tmp_path / "metrics" / "environment.json").write_text(json.dumps({"commit": 40 * "d"}))
    Image.new("RGB", (900, 90)).save(tmp_path / "samples" / "step-000001.png")
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.set_content(run_page(tmp_path))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("img").bounding_box()["width"] == 900  # which its card scrolls: captions stay legible
    page.close()
