"""What every test with a browser stands on: it draws WebGL, and complaints and network requests are seen."""

from conftest import watch


def test_the_browser_draws_webgl(browser_page):
    browser_page.set_content("<canvas width=4 height=4></canvas>")
    pixel = browser_page.evaluate(
        """() => {
          const gl = document.querySelector("canvas").getContext("webgl2", {preserveDrawingBuffer: true});
          gl.clearColor(1, 0.5, 0, 1);
          gl.clear(gl.COLOR_BUFFER_BIT);
          const out = new Uint8Array(4);
          gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, out);
          return [...out];
        }"""
    )
    assert pixel[0] == 255 and pixel[1] in (127, 128) and pixel[2:] == [0, 255]


def test_errors_and_requests_are_seen(browser):
    page = browser.new_page()
    found = watch(page)
    page.set_content("<script>console.error('first'); console.log('fine')</script><img src='http://192.0.2.1/x.png'>")
    page.evaluate("setTimeout(() => { throw new Error('second') })")
    page.wait_for_timeout(100)
    page.close()
    assert {"first", "second", "http://192.0.2.1/x.png"} <= set(found) and "fine" not in found
