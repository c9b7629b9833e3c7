"""What the site's build (mkdocs.yml) does beside mkdocs: notebooks as pages, links out of docs/, fields' comments."""

import itertools
import json
import pathlib
import re

import griffe
from mkdocs.structure.files import File


def on_config(config):
    """Pages that the menu of mkdocs.yml does not name stand at its end."""
    pages = sorted(pathlib.Path(config.docs_dir).glob("*.md"))
    named = {path for section in config.nav for _, path in _pages(section)}
    if rest := [{page.read_text().split("\n")[0].strip("# "): page.name} for page in pages if page.name not in named]:
        config.nav.append({"More": rest})


def on_files(files, config):
    """Each notebook gets a page with its text and code, beside the file itself."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        cells = json.loads(pathlib.Path(file.abs_src_path).read_text(encoding="utf-8"))["cells"]
        page = [f"*This page is a notebook: [the file]({pathlib.PurePath(file.src_uri).name}?file), to be run.*"]
        for cell in cells:
            text = "".join(cell["source"])
            page.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        page[:2] = page[1::-1]  # the title first
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content="\n\n".join(page)))
    return files


def on_page_markdown(markdown, config, **_):
    """Links whose text is a page's file name get its title. The repository has no address, so one to a file outside of
    docs/ becomes its path."""
    titles = {path: title for section in config.nav for title, path in _pages(section)}
    markdown = re.sub(r"\[(?:docs/)?([\w-]+\.md)\]\(", lambda link: f"[{titles.get(link[1], link[1])}](", markdown)
    markdown = re.sub(r"\[[^\]]*\]\((?:\.\./)+((?:rsagent_jax|sam_bridge|deploy)[^)]*)\)", r"`\1`", markdown)
    return markdown.replace(".ipynb)", ".md)").replace(".ipynb?file)", ".ipynb)")


def on_page_content(html, page, **_):
    """Blocks of the page of errors are messages, which are broken into lines."""
    return html.replace('class="highlight"', 'class="highlight message"') if page.file.src_uri == "faq.md" else html


def _pages(section):
    for title, entry in section.items():
        yield from [(title, entry)] if isinstance(entry, str) else itertools.chain(*map(_pages, entry))


def on_post_page(output, page, **_):
    return _mended(output, "../" * page.url.count("/"))


def on_post_template(output_content, **_):
    """404.html, which has to work at any depth."""
    return _mended(output_content, "/")


def _mended(html, root):
    """Material's plugin `offline` names a script on another host: ours is beside the pages. Its search has no name."""
    html = html.replace("https://unpkg.com/iframe-worker/shim", f"{root}theme/iframe-worker.js")
    return html.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)


class FieldComments(griffe.Extension):
    """The comment beside a field or above it is its documentation, as in `--help`."""

    def on_attribute_instance(self, *, attr, **_):
        if attr.docstring is None and attr.lineno and attr.parent.is_class:
            lines = attr.parent.source.splitlines()
            first, last = attr.lineno - attr.parent.lineno, attr.endlineno - attr.parent.lineno
            above = itertools.takewhile(lambda line: line.lstrip().startswith("# "), reversed(lines[:first]))
            found = [*reversed([line.strip(" #") for line in above]), *re.findall(r"  # (.+)$", lines[last])]
            if found:
                attr.docstring = griffe.Docstring(" ".join(found), parent=attr)
