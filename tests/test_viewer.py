"The attention viewer: what is in the file, and what a browser makes of it."

import base64, hashlib, io, json, re, shutil, subprocess, tempfile, time, urllib.request, warnings
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from her2_mil.attention import relative_attention, write_viewer
from her2_mil.slide import WholeSlide
from her2_mil.tiling import TileSpec, tile_slide
from her2_mil.zoom import INSIDE, write_zoom

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
SIZE, PATCH = (4000, 3000), 500


@pytest.fixture(scope="module")
def slide():
    "A grid of patches that leaves a border free, with weights that rise to the right."
    x, y = np.meshgrid(np.arange(500, 3500, PATCH), np.arange(500, 2500, PATCH))
    coords = np.stack([x.ravel(), y.ravel()], 1)
    weights = np.exp(coords[:, 0] / 1000 + coords[:, 1] / 7000)
    thumbnail = np.full((300, 400, 3), 240, dtype=np.uint8)
    thumbnail[50:250, 50:350] = (220, 170, 205)
    return thumbnail, coords, weights / weights.sum()


@pytest.fixture(scope="module")
def viewer(slide, tmp_path_factory):
    thumbnail, coords, weights = slide
    return write_viewer(
        tmp_path_factory.mktemp("viewer") / "viewer.html",
        thumbnail,
        coords,
        weights,
        PATCH,
        SIZE,
        0.25,
        title=HOSTILE,
        probabilities=[0.1, 0.2, 0.3, 0.4],
        model={"embedder": HOSTILE, HOSTILE: "a" * 200},
    )


def test_one_script_that_the_policy_names(viewer):
    page = viewer.read_text()
    scripts = re.findall(r'<script(?: type="application/json" id="data")?>(.*?)</script>', page, re.S)
    assert len(scripts) == page.count("<script") == 2
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")


def test_asks_no_other_host_and_escapes(viewer):
    page = viewer.read_text()
    assert not re.search(r'https?://|(?:src|href)\s*=\s*["\']?//|@import|url\(', page)
    assert "<img" not in page and "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_numbers_survive(viewer, slide):
    _, coords, weights = slide
    data = json.loads(re.search(r'id="data">(.*?)</script>', viewer.read_text(), re.S)[1])
    array = lambda name, kind: np.frombuffer(base64.b64decode(data[name]), kind)
    np.testing.assert_array_equal(array("xy", "<i4").reshape(-1, 2), coords)
    np.testing.assert_allclose(array("multiples", "<f4"), relative_attention(weights), rtol=1e-6)
    np.testing.assert_allclose(array("percentile", "<f4"), relative_attention(weights, "percentile"), rtol=1e-6)


def test_same_input_same_bytes(viewer, slide, tmp_path):
    thumbnail, coords, weights = slide
    again = write_viewer(
        tmp_path / "v.html",
        thumbnail,
        coords,
        weights,
        PATCH,
        SIZE,
        0.25,
        title=HOSTILE,
        probabilities=[0.1, 0.2, 0.3, 0.4],
        model={"embedder": HOSTILE, HOSTILE: "a" * 200},
    )
    assert again.read_bytes() == viewer.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["v.html"]


@pytest.fixture(scope="module")
def oblong(tmp_path_factory):
    "Two patches of 400 x 200 level-0 px with a gap, on a slide whose pixels are twice as high as wide."
    grey = np.full((200, 200, 3), 220, dtype=np.uint8)
    return write_viewer(
        tmp_path_factory.mktemp("oblong") / "v.html",
        grey,
        [[0, 0], [400, 600]],
        [0.3, 0.7],
        (400, 200),
        (800, 800),
        (0.25, 0.5),
    )


def test_sides_of_patches_and_pixels_stay_two_numbers(oblong):
    page = oblong.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert (data["patch"], data["mpp"], data["size"]) == ([400, 200], [0.25, 0.5], [800, 800])
    assert "--ratio:800/1600" in page, "a slide of 200 x 400 um"


class Browser:
    "Headless Chromium through its debugging protocol."

    def __init__(self, binary):
        self.socket = pytest.importorskip("websocket", reason="websocket-client is not installed")
        self.home = Path(tempfile.mkdtemp())
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
        self.process = subprocess.Popen(
            [
                binary,
                *flags.split(),
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={self.home}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port = self._port()
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=20))
        self.ws = self.socket.create_connection(
            next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"], timeout=30
        )
        self.count, self.events = 0, []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _port(self):
        for _ in range(300):
            file = self.home / "DevToolsActivePort"
            if file.exists() and (lines := file.read_text().split()):
                return lines[0]
            time.sleep(0.1)
        self.close()
        pytest.skip("Chromium did not start")

    def call(self, method, **params):
        self.count += 1
        self.ws.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            message = json.loads(self.ws.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, width=1280, height=900, dark=False):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")],
        )
        self.call("Page.navigate", url=Path(path).as_uri())
        for _ in range(100):
            if self.value('document.readyState === "complete" && typeof img === "object" && img.complete'):
                break
            time.sleep(0.05)
        self.settle()

    def settle(self):
        self.value("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(() => f(1))))")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 and kind == "keyDown" else ""
            )

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine")
    b = Browser(binary)
    yield b
    b.close()


READ = 'document.getElementById("read").textContent'
PIXELS = '(c => Array.from(c.getContext("2d").getImageData(c.width/2|0, c.height/2|0, 1, 1).data))(document.getElementById("view"))'


def test_loads_alone_and_quietly(browser, viewer):
    browser.open(viewer)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(u.startswith(("file:", "data:")) for u in asked)
    loud = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening", "Log.entryAdded")
    ]
    assert not loud, loud
    assert browser.value('document.querySelector("h1").textContent') == HOSTILE
    assert browser.value('document.querySelectorAll("img, h1 script").length') == 0


def test_policy_is_enforced(browser, viewer):
    browser.open(viewer)
    browser.value(
        'void(document.body.append(Object.assign(document.createElement("script"), {textContent: "window.broken = 1"})))'
    )
    assert browser.value("window.broken === undefined")
    assert browser.value('fetch("http://127.0.0.1:9/").then(() => "sent", () => "refused")') == "refused"
    assert any(
        "Content Security Policy" in e["params"]["entry"]["text"]
        for e in browser.events
        if e["method"] == "Log.entryAdded"
    )


def test_keyboard_reaches_every_patch(browser, viewer, slide):
    _, coords, weights = slide
    browser.open(viewer)
    browser.value("view.focus()")
    seen = set()
    for key in ["n"] * len(coords):
        browser.key(key)
        seen.add(int(re.match(r"Patch (\d+) of", browser.value(READ))[1]) - 1)
    assert seen == set(range(len(coords)))
    browser.open(viewer)
    browser.value("view.focus()")
    browser.key("n")
    top = int(np.argmax(weights))
    assert f"Patch {top + 1} of {len(coords)}" in browser.value(READ) and "rank 1;" in browser.value(READ)
    browser.key("ArrowLeft")
    assert f"x {coords[top, 0] - PATCH}, y {coords[top, 1]} " in browser.value(READ)
    browser.key("ArrowUp")
    assert f"x {coords[top, 0] - PATCH}, y {coords[top, 1] - PATCH} " in browser.value(READ)


@pytest.mark.parametrize("keys", [[], ["+", "+"]])
def test_pointer_reads_the_patch_below_it(browser, viewer, slide, keys):
    _, coords, weights = slide
    browser.open(viewer)
    browser.value("view.focus()")
    for k in keys:
        browser.key(k)
    i = 9
    x, y = browser.value(
        f"(r => [r.left + sx({coords[i, 0]} + {PATCH}/2)*r.width/view.width, r.top + sy({coords[i, 1]} + {PATCH}/2)*r.height/view.height])(view.getBoundingClientRect())"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    read = browser.value(READ)
    assert read.startswith(f"Patch {i + 1} of") and f"{relative_attention(weights)[i]:.3g}" in read


def test_an_oblong_patch_is_hit_where_it_was_read(browser, oblong):
    browser.open(oblong)
    hit = lambda x, y: browser.value(f"at(sx({x}), sy({y}))")
    assert [hit(200, 100), hit(390, 190), hit(200, 300), hit(600, 700), hit(600, 500)] == [0, 0, -1, 1, -1]
    high = browser.value("(sy(200) - sy(0))/(sx(400) - sx(0))")
    assert abs(high - 1) < 1e-6, "400 x 200 px of 0.25 x 0.5 um are square tissue"


def test_opacity_and_share_change_the_picture(browser, viewer):
    browser.open(viewer)
    set_to = lambda name, v: (browser.value(f"{name}.value = {v}; {name}.oninput()"), browser.value(PIXELS))[1]
    browser.value('var alphaIn = document.getElementById("alpha"), leastIn = document.getElementById("least")')
    bare, full = set_to("alphaIn", 0), set_to("alphaIn", 100)
    assert bare != full
    assert set_to("leastIn", 1) == bare
    assert set_to("leastIn", 100) == full


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_sideways_scroll(browser, viewer, width):
    browser.open(viewer, width=width, height=800)
    assert browser.value("document.documentElement.scrollWidth") <= width


def test_dark_mode_keeps_contrast(browser, viewer):
    for dark in (False, True):
        browser.open(viewer, dark=dark)
        pairs = browser.value("""["h1", ".note", "#read", "#keys", "button"].map(s => { let e = document.querySelector(s), ink = getComputedStyle(e).color;
            while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement; return [ink, getComputedStyle(e).backgroundColor]; })""")
        for ink, ground in pairs:
            assert contrast(ink, ground) >= 4.5, (dark, ink, ground)


def contrast(*colours):
    "WCAG 2 contrast ratio of two CSS rgb() colours."
    linear = lambda v: v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
    light = sorted(
        sum(k * linear(int(v) / 255) for k, v in zip((0.2126, 0.7152, 0.0722), re.findall(r"\d+", c)[:3]))
        for c in colours
    )
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_fifty_thousand_patches_stay_quick(browser, tmp_path):
    x, y = np.meshgrid(np.arange(250) * 400, np.arange(200) * 400)
    coords = np.stack([x.ravel(), y.ravel()], 1)
    weights = np.random.default_rng(0).exponential(size=len(coords))
    page = write_viewer(
        tmp_path / "large.html",
        np.full((800, 1000, 3), 230, dtype=np.uint8),
        coords,
        weights,
        400,
        (100_000, 80_000),
        0.25,
    )
    assert page.stat().st_size < 2_000_000
    browser.open(page)
    assert (
        browser.value(
            "(() => { const t = performance.now(); for (let i = 0; i < 20; i++) at(400, 400); draw(); return performance.now() - t; })()"
        )
        < 2000
    )


RED, BLUE, GREY = (200, 30, 30), (30, 30, 200), (220, 220, 220)


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    "Two patches of one colour each, with their pixels and with evidence, on grey"
    flat = lambda colour: np.full((32, 32, 3), colour, dtype=np.uint8)
    return write_viewer(
        tmp_path_factory.mktemp("rich") / "v.html",
        np.full((100, 100, 3), GREY[0], dtype=np.uint8),
        [[100, 200], [500, 601]],
        [0.3, 0.7],
        96,
        (1000, 1000),
        0.5,
        layers={"evidence for <b>3+</b>": [-1.0, 0.25]},
        pixels={0: flat(RED), 1: flat(BLUE)},
    )


def seen(browser, x, y):
    "Colour of the view at a place in level-0 px"
    where = f"Math.floor(sx({x})), Math.floor(sy({y}))"
    return browser.value(f'Array.from(view.getContext("2d").getImageData({where}, 1, 1).data).slice(0, 3)')


def near(colour, other):
    return max(abs(a - b) for a, b in zip(colour, other)) < 12


def test_the_gallery_flies_to_a_patch_and_its_pixels_appear(browser, rich):
    browser.open(rich)
    browser.value('document.getElementById("alpha").value = 0; document.getElementById("alpha").oninput()')
    assert browser.value('Array.from(document.querySelectorAll("#gallery button"), b => b.ariaLabel)') == [
        "Go to patch 2, rank 1",
        "Go to patch 1, rank 2",
    ]
    for label, place, colour in ((0, (548, 649), BLUE), (1, (148, 248), RED)):
        browser.value(f'document.querySelectorAll("#gallery button")[{label}].click()')
        browser.settle()
        time.sleep(0.2)
        browser.settle()
        assert near(seen(browser, *place), colour)
        assert browser.value("Math.abs(CX - %d) < 1 && Math.abs(CY - %d) < 1" % place)


@pytest.mark.parametrize("opacity", [0, 100])
def test_pixels_and_squares_lie_where_the_patch_does_to_half_a_pixel(browser, rich, opacity):
    browser.open(rich)
    alpha = 'document.getElementById("alpha")'
    browser.value(f"{alpha}.value = {opacity}; {alpha}.oninput()")
    browser.value('document.querySelectorAll("#gallery button")[0].click(); Z = 40; draw()')
    time.sleep(0.2)
    for x, y in ((500, 601), (596, 601), (500, 697), (596, 697)):
        browser.value(f"cur = -1; CX = {x} + 3.3; CY = {y} - 2.7; draw()")  # panned: the corner is off the middle
        browser.settle()
        assert browser.value("S()") > 4, "half a pixel of the slide is more than one of the screen"
        inside = seen(browser, x + (0.5 if x == 500 else -0.5), y + (0.5 if y == 601 else -0.5))
        beside = seen(browser, x + (-0.5 if x == 500 else 0.5), y + (0.5 if y == 601 else -0.5))
        above = seen(browser, x + (0.5 if x == 500 else -0.5), y + (-0.5 if y == 601 else 0.5))
        assert not near(inside, GREY) and near(beside, GREY) and near(above, GREY)
        assert opacity or near(inside, BLUE)


def test_evidence_is_a_scale_of_its_own_and_its_name_stays_text(browser, rich):
    browser.open(rich)
    assert browser.value("show.options[2].textContent") == "evidence for <b>3+</b>"
    browser.value('show.value = "2"; show.onchange()')
    assert [browser.value(f"T(V[2][{i}], 2)") for i in (0, 1)] == [0, 0.625]
    browser.value("pick(0)")
    assert "evidence for <b>3+</b> -1.00;" in browser.value(READ)


BLOCK = 40  # level-0 px of a block of one colour
ODD = "a#b%20c '<b>.tif"  # a name of which every character means something to a browser


@pytest.fixture(scope="module")
def chequered(tmp_path_factory):
    "A slide of 2 x 3 thousand px of 0.25 um/px in blocks of stains, and the shade of each block"
    import tifffile

    dark = np.random.default_rng(0).integers(0, 2, (50, 75))
    stains = np.array([(240, 200, 225), (90, 40, 130)], np.uint8)
    pixels = np.kron(stains[dark], np.ones((BLOCK, BLOCK, 1), np.uint8))
    path = tmp_path_factory.mktemp("chequered") / ODD
    per_cm = (40_000, 40_000)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", resolution=per_cm, resolutionunit="CENTIMETER")
    with WholeSlide(path) as slide, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that uncompressed tiles are read more slowly
        yield slide, tile_slide(slide, TileSpec(96)), dark


def screen(browser):
    "What the window shows (a canvas with pictures from disk cannot be read), and where the view begins in it"
    data = base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"])
    where = "(b => [b.left + view.clientLeft, b.top + view.clientTop])(view.getBoundingClientRect())"
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int), *browser.value(where)


def zoomed(chequered, folder, **how):
    "Page and tiles of the chequered slide"
    slide, grid, _ = chequered
    tiles = write_zoom(slide, grid, folder / f"{slide.path.stem}-tiles", coarsest=8, **how)
    weights = np.linspace(1, 2, len(grid))
    size = grid.patch_size_level0, slide.size, slide.mpp
    return write_viewer(folder / "v.html", slide.thumbnail(8), grid.coords, weights, *size, zoom=tiles), tiles


@pytest.mark.parametrize("tile", [512, 64])  # few tiles, which the page holds, and many, which lie beside it
@pytest.mark.parametrize("finest", [0.25, 0.5])
def test_deep_zoom_shows_the_slide_where_it_lies(browser, chequered, tmp_path, tile, finest):
    dark = chequered[2]
    page, tiles = zoomed(chequered, tmp_path, tile=tile, finest=finest)
    assert (tiles.folder is None) == (len(tiles.names) <= INSIDE) == (tile == 512)
    browser.open(page)
    browser.value('document.getElementById("alpha").value = 0; document.getElementById("alpha").oninput()')
    for row, column in ((3, 4), (24, 37), (46, 70)):
        browser.value(f"Z = 4/fit(); CX = {BLOCK * (column + 1.5)}; CY = {BLOCK * (row + 1.5)}; draw()")
        for _ in range(40):
            if browser.value("[...SHEETS.values()].every(t => t.complete)"):
                break
            time.sleep(0.05)
        browser.settle()
        picture, left, top = screen(browser)
        for i, j in np.ndindex(3, 3):  # both sides of every edge of a block, 2 px from it
            for a, b in ((2, 2), (BLOCK - 2, BLOCK - 2)):
                x, y = BLOCK * (column + j) + a, BLOCK * (row + i) + b
                x, y = browser.value(f"[Math.floor(sx({x})), Math.floor(sy({y}))]")
                shade = picture[round(top) + y, round(left) + x].sum()
                assert (shade < 460) == dark[row + i, column + j], (row + i, column + j, shade)
    levels = [e["params"]["entry"]["level"] for e in browser.events if e["method"] == "Log.entryAdded"]
    loud = [e for e in browser.events if e["method"] == "Runtime.exceptionThrown"] + [v for v in levels if v == "error"]
    assert not loud, loud
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(u.startswith(("file:", "data:")) for u in asked)


def test_a_page_without_its_tiles_says_so_and_still_shows_the_slide(browser, chequered, tmp_path):
    page, tiles = zoomed(chequered, tmp_path, tile=64)
    shutil.rmtree(tiles.folder)
    browser.open(page)
    browser.value("Z = 4/fit(); CX = 1500; CY = 1000; draw()")
    time.sleep(0.3)
    said = browser.value(READ)
    assert said.startswith("A tile of the deep zoom is missing") and tiles.folder.name in said


def test_pictures_from_disk_are_allowed_only_where_tiles_lie_there(chequered, tmp_path):
    policy = lambda page: re.search(r"img-src ([^;]*);", page.read_text())[1]
    assert policy(zoomed(chequered, tmp_path, tile=512)[0]) == "data:"
    assert policy(zoomed(chequered, tmp_path, tile=64)[0]) == "data: file: 'self'"


def test_an_interrupted_pyramid_goes_on_and_leaves_no_half_tile(chequered, tmp_path, monkeypatch):
    import her2_mil.zoom

    plain, count = her2_mil.zoom._jpeg, iter(range(20))
    monkeypatch.setattr(her2_mil.zoom, "_jpeg", lambda p: plain(p) if next(count, None) is not None else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zoomed(chequered, tmp_path, tile=64)
    left = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert len(left) == 20 and all(p.suffix == ".jpg" for p in left)
    monkeypatch.setattr(her2_mil.zoom, "_jpeg", plain)
    before = left[0].stat().st_mtime_ns
    _, tiles = zoomed(chequered, tmp_path, tile=64)
    assert left[0].stat().st_mtime_ns == before and len(list(tiles.folder.rglob("*.jpg"))) == len(tiles.names)
