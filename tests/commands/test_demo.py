import contextlib
import io
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddim_fast import Sampler, UNet, demo
from ddim_fast.demo import DemoModel

SCALE = 16  # of one image on the page


def small(picture: np.ndarray, scale: int = SCALE) -> np.ndarray:
    """A picture of the page in the model's own pixels, which are squares there."""
    pixels = picture[::scale, ::scale]
    assert np.array_equal(pixels.repeat(scale, 0).repeat(scale, 1), picture)
    return pixels


@pytest.fixture(scope="module")
def studio() -> DemoModel:
    return DemoModel(Sampler(UNet.from_pretrained("fashion-mnist")))


def painted(background: np.ndarray, *boxes: tuple[int, int, int, int]) -> dict:
    """What Gradio's editor gives: boxes (left, top, right, bottom) painted over."""
    layer = np.zeros((*background.shape[:2], 4), np.uint8)
    for left, top, right, bottom in boxes:
        layer[top:bottom, left:right] = (255, 64, 0, 255)
    return {"background": Image.fromarray(background), "layers": [Image.fromarray(layer, "RGBA")]}


def test_each_image_is_that_of_its_seed(studio):
    pictures = studio.sample(5, 7, 2, 9, 2.0)
    assert [name for _, name in pictures] == ["seed 7", "seed 8"]
    expected = Sampler(UNet.from_pretrained("fashion-mnist"), steps=5).sample(seeds=[7, 8], labels=9, guidance=2.0)
    pixels = ((expected[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    assert np.array_equal([picture for picture, _ in pictures], pixels)


def test_classes_and_guidance_are_those_of_the_model(studio, fake_network):
    assert studio.classes[0] == ("none", -1) and studio.classes[-1] == ("ankle boot", 9) and studio.guidance == 2.0
    named = fake_network(num_classes=2, class_names=("cat", "dog"), guidance=7.5)
    others = [DemoModel(Sampler(network)) for network in (named, fake_network(num_classes=2), fake_network())]
    assert [studio.classes[1:] for studio in others] == [[("cat", 0), ("dog", 1)], [("0", 0), ("1", 1)], []]
    assert [studio.guidance for studio in others] == [7.5, 1.0, 1.0]
    pytest.importorskip("gradio")
    sliders = [demo.make_page(studio, "x").config["components"] for studio in others]
    shown = [next(c["props"] for c in components if c["props"].get("label") == "Guidance") for components in sliders]
    assert [(slider["value"], slider["maximum"], slider["visible"]) for slider in shown] == [
        (7.5, 7.5, True),
        (1.0, 5, True),
        (1.0, 5, False),
    ]


def test_the_ends_of_an_interpolation_are_the_seeds_images(studio):
    frames = studio.interpolate(3, 4, 8, 5, -1, 2.0)
    assert frames.shape == (8 * 36, 8 * (2 + 5 * 34), 3)  # five images in a row, between gaps of two pixels
    first, last = (studio.sample(3, seed, 1, -1, 2.0)[0][0] for seed in (4, 8))
    tiles = small(frames, 8)[2:-2, :, 0]
    assert np.array_equal(tiles[:, 2:34], first) and np.array_equal(tiles[:, -34:-2], last)


def test_inpainting_keeps_what_is_not_painted_over(studio):
    image = studio.example(0, 9)
    # Half a pixel of the model's counts as painted.
    result = studio.inpaint(painted(image, (10 * SCALE - 8, 12 * SCALE, 20 * SCALE, 18 * SCALE)), 5, 1, 9)
    before, after = small(image), small(result)
    changed = (before != after).any(axis=2)
    assert changed[12:18, 9:20].mean() > 0.5
    changed[12:18, 9:20] = False
    assert not changed.any()


def test_what_cannot_be_inpainted(studio):
    with pytest.raises(ValueError, match="there is no image"):
        studio.inpaint({"background": None, "layers": []}, 5, 1, 9)
    with pytest.raises(ValueError, match="nothing is painted: paint over the part"):
        studio.inpaint(painted(studio.example(0, 9)), 5, 1, 9)


def test_an_address_that_is_not_ours_is_one_line(run_here):
    code, out, error = run_here(demo, "--host", "192.0.2.1", "--port", "7861")  # an address for documentation (RFC 5737)
    assert (code, out) == (2, "") and "--host 192.0.2.1 --port 7861: " in error and error.count("\n") == 1


def test_wrong_options(run_here):
    code, out, error = run_here(demo, "--port", "70000")
    assert (code, out) == (2, "") and "--port must be in 0..65535; got 70000" in error and error.count("\n") == 1
    pytest.importorskip("gradio")
    code, out, error = run_here(demo, "--model", "nowhere")
    assert (code, out) == (2, "") and "unknown model 'nowhere'" in error and error.count("\n") == 1


@contextlib.contextmanager
def served():
    """The page's address, while it is served by the command."""
    command = [sys.executable, "-m", "ddim_fast.demo", "--model", "fashion-mnist", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            yield re.search(r"http://\S+", server.stdout.readline())[0]
        finally:
            server.terminate()


def picture(page, result: str, timeout: float = 60_000) -> np.ndarray:
    """The result that a tab shows, once there is one; ``timeout`` in milliseconds."""
    image = page.locator(f"#{result} img")
    image.wait_for(timeout=timeout)
    return np.asarray(Image.open(io.BytesIO(page.request.get(image.get_attribute("src")).body())).convert("RGB"))


def inpainted(page, panel, timeout: type[Exception]) -> np.ndarray:
    """The result of a stroke across the middle of the editor. No element of the page tells when its picture is there to be
    painted on, so until there is a result, the stroke is made again."""
    for _ in range(10):
        box = panel.locator("canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 40, y)
        page.mouse.down()
        page.mouse.move(x + 40, y, steps=10)
        page.mouse.up()
        time.sleep(1)
        panel.get_by_role("button", name="Inpaint", exact=True).click()
        try:
            return picture(page, "inpainted", 10_000)
        except timeout:
            continue
    raise AssertionError("nothing was inpainted")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_the_page_in_a_browser(studio):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    # Only this machine is asked for anything: Chromium's own connections are off, and the page has none.
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    with served() as address, playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--enable-unsafe-swiftshader", *quiet]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1200})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Sample", exact=True))
        panel.get_by_role("spinbutton", name="Steps").fill("4")
        panel.get_by_role("spinbutton", name="Images").fill("2")
        panel.get_by_label("Class").click()
        page.get_by_role("option", name="sneaker").click()
        panel.get_by_role("button", name="Sample", exact=True).click()
        page.locator("#sampled img").first.wait_for(timeout=60_000)
        with page.expect_download() as zipped:
            panel.get_by_role("button", name="Download All").click()
        with zipfile.ZipFile(zipped.value.path()) as archive:
            saved = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()]
        assert np.array_equal(saved, [image for image, _ in studio.sample(4, 0, 2, 7, 2.0)])
        page.get_by_text("seed 1").wait_for()
        page.locator("#sampled img").last.click()
        with page.expect_download() as one:
            panel.get_by_role("button", name="Download", exact=True).click()
        assert one.value.suggested_filename.endswith(".png") and np.array_equal(Image.open(one.value.path()), saved[1])

        page.get_by_role("tab", name="Interpolate").click()
        panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Interpolate", exact=True))
        panel.get_by_role("spinbutton", name="Steps").fill("3")
        panel.get_by_role("spinbutton", name="Frames").fill("5")
        panel.get_by_role("button", name="Interpolate", exact=True).click()
        assert np.array_equal(picture(page, "interpolated"), studio.interpolate(3, 3, 13, 5, 9, 2.0))

        page.get_by_role("tab", name="Inpaint").click()
        panel = page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Inpaint", exact=True))
        panel.get_by_role("button", name="Inpaint", exact=True).click()
        page.get_by_text("there is no image").wait_for(timeout=30_000)
        panel.get_by_role("button", name="Take an image of the model's").click()
        panel.get_by_role("spinbutton", name="Steps").fill("5")
        before, after = small(studio.example(0, 9)), small(inpainted(page, panel, playwright.TimeoutError))
        browser.close()
    rows, columns = np.nonzero((before != after).any(axis=2))
    # A stroke across the middle is made anew, what is above and below it is as it was.
    assert len(rows) > 20 and rows.min() >= 8 and rows.max() <= 23 and columns.max() - columns.min() >= 8
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
