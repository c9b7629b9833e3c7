"""The docs as a site: it builds without a warning and loads nothing from elsewhere; its FAQ quotes what is printed."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FAQ = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^```text\n(.*?)\n```", FAQ, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built with every warning an error: links, anchors, pages outside of the menu, names that mkdocstrings lacks."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={out}"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}  # nothing is fetched
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    tag = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
    assert not [(page.name, found) for page in pages for found in tag.findall(page.read_text(encoding="utf-8"))]
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert styles and not re.findall(r"(?:@import|url\()\s*[\"']?(https?:\S+)", styles)
    assert (site / "theme/iframe-worker.js").exists() and (site / "search/search_index.js").exists()  # search from disk


@pytest.mark.slow
def test_the_reference_is_made_of_docstrings_and_of_the_comments_beside_fields(site):
    agent, config = ((site / "api" / f"{name}.html").read_text(encoding="utf-8") for name in ("agent", "config"))
    assert 'id="rsagent_jax.api.Agent.segment"' in agent and "Plays one trajectory to its end." in agent
    assert 'id="rsagent_jax.config.schema.GrpoConfig.tis_clip"' in config
    assert "truncated importance sampling between engine and trainer; 0 = off" in config
    assert "Divides by the standard deviation of all the step's rewards" in config.replace("&#39;", "'")  # from above
    notebook = (site / "notebooks" / "try_it.html").read_text(encoding="utf-8")
    assert "rsagent_jax" in notebook and (site / "notebooks" / "try_it.ipynb").exists()
    assert "../rsagent_jax" not in (site / "architecture.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def templates():
    """Every text of the source, whatever is formatted into it as …."""
    found = set()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("rsagent_jax/**/*.py"), *ROOT.glob("sam_bridge/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add(re.sub("…+", "…", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=[message[:40] for message in MESSAGES])
def test_a_message_of_the_faq_is_one_of_the_source(message, templates):
    assert len(message.replace("…", "").split()) >= 3
    assert any(message in template for template in templates)


def test_the_faq_has_what_users_meet_most():
    assert 12 <= len(MESSAGES) == len(set(MESSAGES)) <= 20
