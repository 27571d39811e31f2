"""Every page of docs/ is a program: its python blocks, one after the other, run in a process of their own and print what its text blocks show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.S | re.M)


def check_page(text, folder):
    program = folder / "page.py"
    program.write_text("\n".join(blocks(text, "python")))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, program], env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "".join(blocks(text, "text")), f"the program prints\n{run.stdout}"


def check_links(text, commands):
    missing = [link for link in re.findall(r"\]\(([\w./-]+)\)", text) if not (ROOT / "docs" / link).exists()]
    unknown = sorted(set(re.findall(r"python -m gkernels (\w+)", text)) - commands)
    assert not missing and not unknown, f"neither pages {missing} nor commands {unknown} exist"


@pytest.fixture(scope="module")
def commands():
    usage = subprocess.run([sys.executable, "-m", "gkernels", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^ {4}([a-z]+)\b", usage, re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path, commands):
    text = page.read_text()
    assert blocks(text, "python"), "a page without a program"
    check_links(text, commands)
    check_page(text, tmp_path)


def test_there_are_pages():
    assert {page.stem for page in PAGES} >= {"capture-your-step", "prove-a-kernel", "replace-attention"}


@pytest.mark.parametrize("text, words", [
    ("```python\nraise KeyError('planted')\n```\n", "KeyError: 'planted'"),
    ("```python\nx = 1\n```\n```python\nprint(x)\n```\n```text\n2\n```\n", r"the program prints\s+1"),
])
def test_control_a_page_that_is_wrong_is_seen(tmp_path, text, words):
    with pytest.raises(AssertionError, match=words):
        check_page(text, tmp_path)


@pytest.mark.parametrize("text", ["see [this](nowhere.md)", "`python -m gkernels precompiles x`"])
def test_control_a_link_that_leads_nowhere_is_seen(text, commands):
    with pytest.raises(AssertionError, match=r"neither pages .* nor commands"):
        check_links(text, commands)
