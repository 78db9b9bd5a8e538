"""The page of a run and the gallery, opened from disk in a browser: turned, sorted, and fed with hostile text."""

import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import CHROMIUM, chromium_program
from PIL import Image

from sds3d.evaluate import comparison as comparing
from sds3d.media import chart
from sds3d.pages import comparison, gallery
from sds3d.pages import run as run_page
from sds3d.runs import kinds, report
from sds3d.runs.folder import Run
from sds3d.runs.scene import Asset

EVIL = """ball </script><script>console.error("in")</script><img src=x onerror=console.error("on")> "'&amp;<b>"""
RED, BLUE, GREEN = (200, 30, 30), (40, 60, 190), (20, 140, 60)


@pytest.fixture
def page_run(made) -> Path:
    """The folder of a finished run, absolute."""
    return Path(made).resolve()


def write_box(path: Path) -> None:
    """An unlit box with a texture: red in front (+z), blue on its left (+x), green elsewhere; 1 high, on the floor."""
    import trimesh

    box = trimesh.creation.box((1, 1, 1))
    box.unmerge_vertices()
    box.apply_translation((0, 0.5, 0))
    column = np.select([box.face_normals[:, 2] > 0.9, box.face_normals[:, 0] > 0.9], [0, 1], 2)
    texture = np.repeat(np.array([RED, BLUE, GREEN, GREEN], np.uint8)[None], 4, 0)  # (4, 4, 3): a colour a column
    uv = np.stack([(np.repeat(column, 3) + 0.5) / 4, np.full(len(box.vertices), 0.5)], -1)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(texture), metallicFactor=0.0)
    box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)

    def unlit(tree: dict) -> None:
        tree["materials"][0]["extensions"] = {"KHR_materials_unlit": {}}
        tree["extensionsUsed"] = ["KHR_materials_unlit"]

    path.write_bytes(box.export(file_type="glb", tree_postprocessor=unlit))


def pixels(element) -> np.ndarray:
    """What the screen shows of an element, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB")).astype(int)


def place_of(colour: tuple[int, int, int], view: np.ndarray) -> np.ndarray:
    """The middle (row, column) of all pixels of a colour; there are many of them."""
    places = np.argwhere(abs(view - colour).max(-1) <= 2)
    assert len(places) > 1000, colour
    return places.mean(0)


def opened(page, path: Path):
    """Open a run's page from disk and wait for its model; gives the canvas."""
    page.goto(path.as_uri())
    page.wait_for_selector("[data-state]")
    assert page.locator("[data-glb]").first.get_attribute("data-state") == "ready"
    return page.locator("canvas").first


@pytest.mark.slow
def test_the_model_is_seen_from_its_front_in_its_colours_and_turns(browser_page, page_run):
    write_box(page_run / "mesh.glb")
    canvas = opened(browser_page, kinds.write_page(Run.open(page_run)))
    view = pixels(canvas)
    height, width, _ = view.shape
    assert height > 300 and abs(height - width) <= 1
    assert abs(view[height // 2, width // 3] - RED).max() <= 2  # as they are in the file: no light, no tone mapping
    assert abs(view[height // 2, width * 4 // 5 - 20] - BLUE).max() <= 2  # its left is at our right
    assert place_of(GREEN, view)[0] < place_of(RED, view)[0] - 100  # its top, seen from above
    box = canvas.bounding_box()
    x, y = box["x"] + width / 2, box["y"] + height / 2
    browser_page.mouse.move(x, y)
    browser_page.mouse.down()
    browser_page.mouse.move(x - height / 8, y, steps=4)
    browser_page.mouse.move(x - height / 4, y, steps=4)  # a height is a whole turn, so this is a quarter of one
    browser_page.mouse.up()
    turned = pixels(canvas)
    assert abs(turned[height // 2, width // 3] - BLUE).max() <= 2  # what was at the right is in front
    assert abs(turned[height // 2, width * 4 // 5 - 20] - GREEN).max() <= 2
    browser_page.mouse.dblclick(x, y)
    assert abs(pixels(canvas) - view).max() <= 1  # the browser dithers the background
    browser_page.mouse.wheel(0, -600)
    browser_page.wait_for_timeout(100)
    red = (abs(pixels(canvas) - RED).max(-1) <= 2).sum()
    assert red > 1.2 * (abs(view - RED).max(-1) <= 2).sum()  # nearer


def wait_for_film(video):
    # The page's policy forbids eval, which page.wait_for_function needs when it asks a second time. A busy machine may
    # drop the decoder, and then the film never comes: ask again, and fail rather than wait for ever.
    loaded = """v => v.readyState >= 2 || new Promise(done => {
        v.addEventListener('loadeddata', () => done(true), {once: true})
        setTimeout(() => done(false), 20000)
    })"""
    if not video.evaluate(loaded):
        video.evaluate("v => v.load()")
        assert video.evaluate(loaded), "the film was not loaded in 40 s"


@pytest.mark.slow
def test_the_page_of_a_run_shows_all_there_is_of_it(browser_page, page_run):
    (page_run / "mesh.json").write_text(json.dumps({"vertices": 1234, "watertight": True, "check": {"iou": 0.98765}}))
    assert (page_run / "index.html").is_file()  # the run wrote one
    canvas = opened(browser_page, kinds.write_page(Run.open(page_run)))
    assert pixels(canvas).std() > 5
    assert browser_page.title() == browser_page.inner_text("h1") == "a red ball"
    text = browser_page.inner_text("body")
    line = "scene by sds from teacher BallTeacher, seed 0, 6 steps in"
    curves = ("opacity: mean", "throughput", "peak memory")
    for said in (line, "step 3", "step 6", *curves, "sds3d resume", "vertices", "1,234", "check iou", "0.9877", "yes"):
        assert said in text, said
    video = browser_page.locator("video").first
    wait_for_film(video)
    assert video.evaluate("v => [v.videoWidth, v.duration]") == [32, pytest.approx(4 / 24, abs=0.01)]
    sizes = browser_page.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes == [[64, 16], [64, 16]]  # four views of 16 pixels
    assert browser_page.locator(".plots svg").count() == 4
    browser_page.click("summary")
    assert "log2_table: 10" in browser_page.inner_text("details")
    scripts = browser_page.locator("script:not([type])")
    assert scripts.count() == 1 and not re.findall(r'(?:src|href)="(?!data:|#)', (page_run / "index.html").read_text())


def test_the_film_is_shown_at_most_twice_as_large_as_it_is(browser_page, page_run):
    opened(browser_page, kinds.write_page(Run.open(page_run)))
    wait_for_film(browser_page.locator("video"))
    film = "v => [v.clientWidth, v.clientHeight, v.videoWidth]"
    assert browser_page.locator("video").evaluate(film) == [64, 64, 32]
    browser_page.set_viewport_size({"width": 80, "height": 600})  # no room for that
    assert browser_page.locator("video").evaluate(film)[0] < 64


@pytest.mark.slow
def test_a_mesh_is_told_once_and_in_words_and_a_scene_can_be_judged(browser_page, page_run):
    found = {"iou": 0.91, "psnr": 24.6, "psnr_covered": 20.6}
    found |= {"depth": 0.01, "dent": 0.05, "normals": 0.9, "behind": 0.0}
    other = found | {"iou": 0.87, "scale": 79.0, "origin": [0, 0, 0], "up": "z", "unit": "mm"}
    mesh = {"faces": 500, "watertight": True, "components": 2, "level": 5.5, "level_iou": 0.93, "scale": 0.79, **found}
    mesh |= {"up": "y", "unit": "m"}
    told = {"prompt": "p", "version": "9.9", "light_baked": True, "mesh": mesh}
    told["files"] = {"mesh.glb": found, "my mesh.obj": other, "mesh.ply": found}
    (page_run / "mesh.json").write_text(json.dumps(told))
    browser_page.goto(kinds.write_page(Run.open(page_run)).as_uri())
    cells = browser_page.locator(".facts th, .facts td").all_inner_texts()
    assert dict(zip(cells[::2], cells[1::2], strict=True)) == {
        "made by sds3d": "9.9",
        "its colours hold light and shade": "yes",
        "triangles": "500",
        "watertight": "yes",
        "separate pieces": "2",
        "silhouettes beside the scene's, IoU": "0.91",
        "pictures beside the scene's, PSNR in dB": "24.6",
        "the same without the background, dB": "20.6",
        "depths beside the scene's, mean difference in scene units": "0.01",
        "the same, mean over the worst patch": "0.05",
        "normals beside the scene's, mean cosine": "0.9",
        "fraction of the pictures that shows faces from behind": "0",
        "my mesh.obj: silhouettes beside the scene's, IoU": "0.87",
    }
    assert f"sds3d eval {page_run} " in browser_page.inner_text("body")


@pytest.mark.slow
def test_hostile_text_is_shown_and_does_nothing(browser_page, call, tiny):
    code, out, err = call("generate", EVIL, "--quiet", "--json", *tiny)
    assert code == 0, err
    made = Path(json.loads(out)["run"]).resolve()
    (made / "mesh.json").write_text(json.dumps({EVIL: EVIL, "list": [1], "none": None}))
    Run.open(made).append({"step": 7, "g_norm/t0.0-0.2</script>": 1.0, EVIL: EVIL, "opacity": 0.5})
    opened(browser_page, kinds.write_page(Run.open(made), note=EVIL))  # browser_page fails on a message of EVIL's
    assert browser_page.title() == " ".join(EVIL.split()) and browser_page.text_content("h1") == EVIL
    assert browser_page.text_content("p.bad") == EVIL
    assert browser_page.text_content(".facts th") == EVIL and browser_page.text_content(".facts td") == EVIL
    assert EVIL.partition(" ")[0] in browser_page.text_content("details pre")
    assert browser_page.locator("img[src=x], b").count() == 0
    path, _ = report.write_gallery(made.parent)
    browser_page.goto(path.as_uri())
    assert browser_page.text_content("td.name a") == EVIL and browser_page.locator("img[src=x], b").count() == 0
    browser_page.click("text=prompt")


def test_a_script_that_was_not_written_by_us_is_not_run(browser, tmp_path):
    """The policy of the page, should text slip through one day."""
    from sds3d.pages import html as web

    path = web.write(tmp_path / "p.html", "t", "<p>x</p><script>document.title = 'bad'</script>", "", "document.x = 1")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title() == "t" and page.evaluate("document.x") == 1
    page.close()


def test_a_run_that_ends_without_a_surface_has_a_page_that_says_so(browser_page, page_run, monkeypatch):
    (page_run / "mesh.glb").unlink()
    export = Asset.export

    def fails(asset, path):
        if Path(path).suffix == ".glb":
            raise ValueError("nothing is <dense>")
        return export(asset, path)

    monkeypatch.setattr(Asset, "export", fails)
    with pytest.raises(ValueError, match="nothing is <dense>"):
        list(Asset.open(page_run).finish())
    browser_page.goto((page_run / "index.html").as_uri())
    assert "The run ended with an error: nothing is <dense>" in browser_page.inner_text("body")
    assert browser_page.locator("[data-glb]").count() == 0 and browser_page.locator("video").count() == 1


def test_a_damaged_model_is_said_and_not_an_error(browser_page, page_run):
    (page_run / "mesh.glb").write_bytes(b"no model")
    browser_page.goto(kinds.write_page(Run.open(page_run)).as_uri())
    browser_page.wait_for_selector("[data-state=failed]")
    assert "cannot show the model in 3D" in browser_page.inner_text("[data-state]")


@pytest.mark.slow
def test_particles_stand_side_by_side_and_images_have_a_page(browser_page, page_run, call):
    for name in ("mesh.glb", "turntable.mp4"):
        stem, suffix = name.split(".")
        shutil.copy(page_run / name, page_run / f"{stem}-2.{suffix}")
        shutil.copy(page_run / name, page_run / f"{stem}-old.{suffix}")  # somebody's own copy
    opened(browser_page, kinds.write_page(Run.open(page_run)))
    assert browser_page.locator("canvas").count() == 2 and browser_page.locator("video").count() == 2
    code, out, err = call("paint", "a ball, side view", "-n", "3", "--method", "csd", "steps=2", "image.size=8", "-q")
    assert code == 0, err
    browser_page.goto(Path(out.splitlines()[-1]).resolve().as_uri())
    assert browser_page.inner_text("h1") == "a ball, side view" and "images by csd" in browser_page.inner_text("body")
    assert browser_page.eval_on_selector("img", "i => i.naturalWidth") == 3 * 8 + 2 * 2


def test_curves_average_what_was_measured():
    rows = [{"step": i + 1, "seconds": 5 + 0.5 * i, "opacity": i % 2, "g_norm/t0.2-0.4": 2.0} for i in range(240)]
    rows[10]["opacity"] = float("nan")
    del rows[11]["opacity"]
    x, y = chart.averaged(rows, "opacity")
    assert len(x) == 119 and set(y) == {0.5} and x[0] == 1.5 and x[-1] == 239.5
    assert chart.averaged(rows, "memory") == ([], [])
    x, y = chart.rate(rows)
    assert y == pytest.approx([2.0] * len(y)) and len(y) == 119 and x[0] == 2
    drawn = chart.curves(rows)
    assert [name.split(":")[0].split(",")[0] for name in drawn] == [
        "opacity", "size of the gradient on the images", "throughput",
    ]  # fmt: skip
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "currentColor" in svg and "#010203" not in svg
    assert not chart.curves([]) and not chart.curves([{"step": 1}])


@pytest.fixture
def many(page_run) -> Path:
    """A folder of runs: three finished and judged in part, one unfinished, two broken."""
    folder = page_run.parent
    (page_run / "mesh.json").unlink()
    scores = {"00002-b": ("a blue ball", 0.9), "00003-a": ("Zebra ball", 0.95), "deep/00004-x": ("a green ball", None)}
    for name, (prompt, iou) in scores.items():
        shutil.copytree(page_run, folder / name)
        config = (folder / name / "config.yaml").read_text()
        (folder / name / "config.yaml").write_text(config.replace("prompt: a red ball", f"prompt: {prompt}"))
        if iou is not None:
            (folder / name / "eval.json").write_text(json.dumps({"iou": iou, "psnr": 20 * iou, "view_iou": [1]}))
    (folder / "00002-b" / "mesh.json").write_text(json.dumps({"mesh": {"faces": 900, "watertight": True, "iou": 0.5}}))
    rows = (folder / "00003-a" / "metrics.jsonl").read_text().splitlines()
    (folder / "00003-a" / "metrics.jsonl").write_text("\n".join(rows[:2]))
    (folder / "00005-<b>none").mkdir()
    shutil.copytree(page_run, folder / "00006-odd")
    (folder / "00006-odd" / "config.yaml").write_text("prompt: [")
    (folder / "00006-odd" / "eval.json").write_text("{")
    (folder / "00006-odd" / "metrics.jsonl").write_bytes(b"\xff\xfe")
    (folder / "00006-odd" / "preview.png").write_bytes(b"no picture")
    return folder


def test_the_gallery_sorts_and_leads_to_each_run(browser_page, many, call):
    code, out, err = call("gallery", str(many), "--json")
    assert code == 0, err
    assert json.loads(out) == {"files": [str(many / "index.html")], "runs": 6, "unfinished": 3}
    browser_page.goto((many / "index.html").as_uri())
    assert "6 runs, 3 of them not finished" in browser_page.inner_text("body")
    names = browser_page.locator("td.name > a")

    def order(heading: str) -> list[str]:
        browser_page.get_by_role("button", name=heading, exact=True).click()
        return [name.split("-")[0] if name.startswith("0") else name for name in names.all_inner_texts()]

    by_name = ["00005", "00006", "a blue ball", "a green ball", "a red ball", "Zebra ball"]
    assert order("prompt") == by_name and order("prompt") == by_name[::-1]
    assert order("IoU")[:2] == ["Zebra ball", "a blue ball"]  # the best first; who has none is last
    assert order("IoU")[:2] == ["a blue ball", "Zebra ball"]
    assert browser_page.get_attribute("th[aria-sort]", "aria-sort") == "ascending"
    assert order("mesh IoU")[0] == order("faces")[0] == "a blue ball"
    statuses = browser_page.locator(".status").all_inner_texts()
    assert sum("unfinished: 2 of 6 steps" in text for text in statuses) == 1
    assert sum("broken: " in text for text in statuses) == 2
    sizes = browser_page.eval_on_selector_all("td img", "all => all.map(i => i.naturalWidth)")
    assert len(sizes) == 5 and set(sizes) == {report.THUMBNAIL}
    names.get_by_text("a green ball").click()
    browser_page.wait_for_selector("[data-state=ready]")
    assert browser_page.url.endswith("deep/00004-x/index.html")


def test_a_wide_gallery_scrolls_sideways_and_shows_that_it_does(browser, tmp_path):
    words = {"method": "sds", "made": "scene", "date": "2026-11-23 20:22"}
    columns = {str(i): gallery.Column(f"figure {i}", 3) for i in range(12)}
    entries = [gallery.Entry(f"run {i}", "", "folder", words, dict.fromkeys(columns, 0.5)) for i in range(30)]
    path = gallery.write(tmp_path / "g.html", "T", entries, columns)
    shows = {"executable_path": chromium_program(), "args": CHROMIUM}
    shows |= {"ignore_default_args": ["--hide-scrollbars"]}  # as users have it
    with browser.browser_type.launch(**shows) as shown:
        page = shown.new_page(viewport={"width": 1300, "height": 900})
        page.goto(path.as_uri())
        card, last = page.locator(".card"), page.get_by_role("button", name="figure 11")
        bar, below = card.evaluate("c => [c.offsetHeight - c.clientHeight, c.getBoundingClientRect().bottom]")
        assert bar > 8 and below <= 900  # the bar takes room, in the window
        assert last.bounding_box()["x"] > 1300
        card.evaluate("c => c.scrollTo(c.scrollWidth, 1500)")
        box = last.bounding_box()
        assert 0 < box["x"] < 1300 and 0 < box["y"] < 300  # with its heading


FIGURES = {"iou": 0.955, "psnr": 20.0, "chamfer": 0.02, "fscore": 0.92, "fscore_fine": 0.71, "normals": 0.86}
FIGURES |= {"depth_error": 0.145, "topology": False}


def phone_pages(tmp_path) -> dict[str, tuple[Path, list[str]]]:
    """A gallery and a comparison with all figures, and their headings in order."""
    words = {"method": "diffinstruct", "made": "scene", "date": "2026-11-23 20:22"}
    known = FIGURES | {"step": 12000, "seconds": 1234.0, "memory": 950.0, "mesh faces": 41262, "mesh watertight": True}
    titles = ["a small purple boat with a white sail on a yellow background", "a red mug"]
    entries = [gallery.Entry(title, "", f"outputs/0000{i}-a", words, known) for i, title in enumerate(titles)]
    shown = [*words, *(column.heading for key, column in report.COLUMNS.items() if key in known)]
    judged = FIGURES | {"topology": 0.5, "colour": 0.1, "asked": 10400.0, "memory": 950.0}
    rows = [comparison.Row(name, judged, torch.full((12, 3, 64, 64), 0.5)) for name in ("sds", "diffinstruct")]
    sections = [comparison.Section("a red mug", rows)]
    return {
        "gallery": (gallery.write(tmp_path / "g.html", "Runs", entries, report.COLUMNS), shown),
        "comparison": (
            comparison.write(tmp_path / "c.html", "Methods", "note", comparing.COLUMNS, sections),
            [column.heading for key, column in comparing.COLUMNS.items() if key in judged],
        ),
    }


@pytest.mark.parametrize("width", [390, 1280])
def test_all_figures_are_seen_on_a_phone_without_scrolling_sideways(browser_page, tmp_path, width):
    browser_page.set_viewport_size({"width": width, "height": 844})
    for name, (path, headings) in phone_pages(tmp_path).items():
        browser_page.goto(path.as_uri())
        cells = browser_page.locator("tbody tr").first.locator("td[data-label]")
        assert [cell.get_attribute("data-label") for cell in cells.all()] == headings
        assert {"F at 0.02", "normals", "depth error", "topology"} < set(headings), name
        assert "0.71" in browser_page.inner_text("tbody") and "0.145" in browser_page.inner_text("tbody")
        content = "e => getComputedStyle(e, '::before').content"
        if width > 390:
            assert {cell.evaluate(content) for cell in cells.all()} == {"none"}, name  # the head says it
            continue
        assert cells.last.evaluate(content) == f'"{headings[-1]}"', name
        for box in (cell.bounding_box() for cell in cells.all()):
            assert 0 <= box["x"] and box["x"] + box["width"] <= width and box["height"] < 50, (name, box)
        for part in ("document.documentElement", "document.querySelector('.card')"):
            assert browser_page.evaluate(f"{part}.scrollWidth - {part}.clientWidth") == 0, (name, part)


def test_a_figure_of_a_run_stays_in_one_line_on_a_phone(browser_page, tmp_path):
    """Beside a long name, too; a long path is broken, and nothing leaves the page."""
    browser_page.set_viewport_size({"width": 390, "height": 844})
    long = "depths beside the scene's, largest mean difference over a patch in scene units"
    figures = {long: "0.01044", "the same without the background, dB": "-22.51"}
    tables = {"Mesh": figures, "Scores": {"teacher": "/home/someone/" + "x" * 90}}
    page = run_page.write(tmp_path / "r.html", run_page.RunPage("a red mug", "", tables=tables))
    browser_page.goto(page.as_uri())
    boxes = [cell.bounding_box() for cell in browser_page.locator(".facts td").all()]
    lines = "e => { const r = document.createRange(); r.selectNodeContents(e); return r.getClientRects().length }"
    counts = [cell.evaluate(lines) for cell in browser_page.locator(".facts td").all()]
    assert counts[:2] == [1, 1] and counts[2] > 1, counts
    assert all(0 <= box["x"] and box["x"] + box["width"] <= 390 for box in boxes), boxes
    assert browser_page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_gallery_is_sorted_on_a_phone(browser_page, tmp_path):
    browser_page.set_viewport_size({"width": 390, "height": 844})
    columns = {"depth_error": report.COLUMNS["depth_error"]}
    entries = [gallery.Entry(f"run {v}", "", "f", {}, {"depth_error": v}) for v in (0.1, 0.3, 0.2)]
    browser_page.goto(gallery.write(tmp_path / "g.html", "T", entries, columns).as_uri())
    browser_page.get_by_role("button", name="depth error").click()
    assert [text.split("\n")[0] for text in browser_page.locator("td.name").all_inner_texts()] == [
        "run 0.3", "run 0.2", "run 0.1",
    ]  # fmt: skip


def test_a_comparison_in_a_terminal_has_every_figure_and_80_columns():
    names = ["sds", "nfsd", "csd", "vsd", "sdi", "ism", "bridge", "dds", "diffinstruct", "dmd", "dmd2"]
    rows = [comparison.Row(name, FIGURES | {"normals": i / 20, "asked": 1e6}) for i, name in enumerate(names)]
    rows.append(comparison.Row("diverged", {"normals": 1.0}, reference=True))
    text = comparison.in_text(comparing.COLUMNS, rows)
    assert max(map(len, text.splitlines())) <= 80
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [name for block in blocks for name in block[0].split()] == [*names, "diverged"]
    for block in blocks:
        assert [line.split("  ")[0] for line in block[1:]] == [
            *("IoU", "PSNR, dB", "Chamfer", "F at 0.05", "F at 0.02", "normals", "depth error", "topology"),
            "teacher evaluations",
        ]
    normals = [word for block in blocks for line in block if line.startswith("normals") for word in line.split()[1:]]
    expected = [f"{i / 20:.3f}" for i in range(11)] + ["1.000"]
    assert normals == [*expected[:10], "0.500*", "1.000"]  # the best of those that did not diverge


def test_mistakes_about_galleries_are_named(call, page_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("nowhere", "there is no folder nowhere; give one that holds runs"),
        ("empty", "empty holds no runs"),
        (str(page_run), "is a run; its page is its index.html"),
    ):
        code, out, err = call("gallery", folder)
        assert code == 2 and not out and message in err, err


def test_a_gallery_without_figures_has_no_empty_columns(tmp_path):
    entries = [gallery.Entry("a", "", "f", {"method": "sds"}, {"step": 1200})]
    columns = {"step": gallery.Column("steps"), "iou": gallery.Column("IoU", 3)}
    text = gallery.write(tmp_path / "g.html", "T", entries, columns).read_text()
    assert "1,200" in text and ">steps<" in text and "IoU" not in text and "1 run;" in text
