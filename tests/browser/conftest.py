"""Chromium for tests of pages: one browser for all tests of this folder, a page of its own for each.

Where there is no Chromium these tests are skipped; .ci/run installs one.
"""

import shutil

import pytest

NAMES = ("chromium", "google-chrome")
MISSING = f"no browser ({', '.join(NAMES)}) is on the PATH: apt-get install chromium"
LOOKS = [(1400, "light"), (400, "dark")]  # what axe-core looks at hangs on one of the two at a time


def pytest_generate_tests(metafunc):
    """A test that takes `look` is run for each of them: width in pixels, colour scheme."""
    if "look" in metafunc.fixturenames:
        metafunc.parametrize("look", LOOKS, ids=[f"{width}-{scheme}" for width, scheme in LOOKS])


# Of the folder, not of the session: Playwright keeps an event loop in this thread, where others' tests may want theirs.
@pytest.fixture(scope="package")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(address, width=1400, scheme="light", **of new_context): a page. An error in its console fails the
    test."""
    contexts, errors = [], []

    def open_page(address, width=1400, scheme="light", **more):
        viewport = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce", **more))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture
def serious_findings():
    """serious_findings(page): what axe-core calls serious or critical, each with the first elements that have it."""
    from axe_playwright_python.sync_playwright import Axe

    def serious_findings(page):
        found = Axe().run(page).response["violations"]
        return [
            f"{v['id']}: {v['help']}; {[node['target'] for node in v['nodes'][:3]]} {v['nodes'][0]['failureSummary']}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]

    return serious_findings
