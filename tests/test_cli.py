"""The command line: its parser and one-line errors, what it shows while it works, the doctor, and generate against the reference."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkernels import cli, doctor
from gkernels.graph import Loop
from gkernels.model.config import LlamaConfig
from gkernels.model.load import random_weights, save_checkpoint
from gkernels.model.tokenizer import Tokenizer
from tests.counts import counts, merge
from tests.strategies_model import tiny_config

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One layer of random weights behind the packaged tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, bos_token_id=0, eos_token_id=0)
    save_checkpoint(folder, config, random_weights(LlamaConfig.from_dict(config), "cpu"))
    for name in TOKENIZER:
        (folder / name).write_bytes((cli.CHECKPOINT / name).read_bytes())
    return folder


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def generate(capsys, checkpoint, device, *arguments):
    return run(capsys, "generate", "--model", checkpoint, "--device", device.type, *arguments)


@pytest.mark.parametrize("arguments", [(), ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 7)])
def test_generate_equals_reference(capsys, checkpoint, device, arguments):
    code, out, err = generate(capsys, checkpoint, device, "--verify", "--dtype", "float32", "--max-tokens", 4, *arguments,
                              "--prompt", "To be,", "Or not\nto")
    assert code == 0, err
    assert {"1: To be,", "2: Or not"} <= {line[:len("1: To be,")] for line in out.splitlines()}
    assert re.search(r"^prompt 1: (\d+) of \1 tokens equal\nprompt 2: (\d+) of \2 tokens equal$", out, re.M)
    figures = re.search(r"(\d+) tokens in [\d.]+ s: [\d.]+ tokens/s; (\d+) steps \((.*)\): (\d+) replays, (\d+) eager; 0 preemptions; (.*)",
                        out)
    assert int(figures[1]) <= 8 and int(figures[2]) == sum(map(int, re.findall(r"\d+", figures[3]))) <= 4
    assert re.fullmatch(r"1 single, (\d) loop", figures[3]) and int(figures[4]) + int(figures[5]) == 2      # launches: prompts, the rest
    assert figures[6] == "eager on the CPU interpreter" if device.type == "cpu" else figures[6].startswith("captured graphs")


@pytest.mark.parametrize("arguments, why, modes", [(("--loop", 3), "", "1 single, 9 loop"), (("--loop", 1), "", "2 single, 8 burst"),
                                                   ((), "planted", "2 single, 8 burst")])
def test_generate_says_how_steps_ran(capsys, checkpoint, device, monkeypatch, arguments, why, modes):
    monkeypatch.setattr(Loop, "why", why)
    code, out, _ = generate(capsys, checkpoint, device, "--max-tokens", 10, "--prompt", "To be,", *arguments)
    steps = sum(map(int, re.findall(r"\d+", modes)))
    assert code == 0 and re.search(rf"\b{steps} steps \({modes}\): ", out) and ("no loop: planted\n" in out) == bool(why)


def test_verify_sees_a_wrong_token(capsys, checkpoint, device, monkeypatch):
    read = cli.watch

    def wrong(engine, *others):
        seconds = read(engine, *others)
        engine.requests[0].output[-1] = (engine.requests[0].output[-1] + 1) % 1024
        return seconds
    monkeypatch.setattr(cli, "watch", wrong)
    code, out, _ = generate(capsys, checkpoint, device, "--verify", "--dtype", "float32", "--max-tokens", 2, "--prompt", "To be,")
    assert code == 1
    assert re.search(r"prompt 1: 1 of 2 tokens equal\nprompt 1: new token 2, position \d+: got .*, the reference draws .*; "
                     r"its two greatest logits are .* apart", out)


@pytest.mark.parametrize("arguments, words", [
    (("--model", "/nowhere"), "--model: got /nowhere, expected the folder of a Hugging Face checkpoint"),
    (("--model", str(Path(__file__).parent)), "config.json: no such file"),
    (("--max-tokens", 0), "argument --max-tokens: got 0, expected at least 1"),
    (("--max-tokens", "few"), "invalid integer value: 'few'"),
    (("--dtype", "int8"), "invalid choice: 'int8'"),
    (("--fast",), "unrecognized arguments: --fast"),
    (("--top-k", -1), "top_k: got -1, expected an integer from 0 to the vocabulary's 1024"),
    (("--temperature", "nan"), "temperature: got nan"),
    (("--prompt", "word " * 600), "--prompt: got .* tokens, expected at most 511: shorten it, the model serves no longer ones"),
    (("--prompt", "word " * 60, "--max-len", 20), "--prompt: got .* tokens, expected at most 19: shorten it, or raise --max-len"),
    (("--chat",), "got no chat template"),
])
def test_mistakes_are_told_in_one_line(capsys, device, arguments, words):
    code, out, err = run(capsys, "generate", "--device", device.type, *arguments)
    assert (code, out) == (2, "") and err.startswith("gkernels: ") and err.count("\n") == 1
    assert re.search(words, err), err


@pytest.mark.parametrize("arguments, words", [
    ((), "required: COMMAND"), (("fly",), "invalid choice: 'fly'"), (("doctor", "x"), "unrecognized arguments: x")])
def test_unknown_commands_are_told_in_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("gkernels: ") and err.count("\n") == 1 and words in err


def test_a_missing_package_or_device_is_told(capsys, checkpoint, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = generate(capsys, checkpoint, device)
    assert code == 2 and err == "gkernels: model needs the package tokenizers: pip install 'gkernels[model]'\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(capsys, "generate", "--device", "cuda")
    assert code == 2 and "torch sees no CUDA device" in err
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = run(capsys, "generate")
    assert code == 2 and err.startswith("gkernels: the package torch is missing; `python -m gkernels doctor`")


def test_a_bug_keeps_its_traceback(capsys, checkpoint, device, monkeypatch):
    def broken(path):
        raise ValueError("not for users")
    monkeypatch.setattr(Tokenizer, "from_dir", broken)
    with pytest.raises(ValueError, match="not for users"):
        generate(capsys, checkpoint, device)


def test_interrupt(capsys, monkeypatch):
    def interrupted(device):
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "ready", interrupted)
    assert run(capsys, "generate") == (130, "", "\ngkernels: interrupted\n")


def test_a_reader_that_leaves_is_no_error():
    code = ("import sys\nfrom gkernels import cli\ndef doctor(options):\n    while True: print('x' * 9999)\n"
            "cli.doctor = doctor\nsys.exit(cli.main(['doctor']))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        writer.stdout.read(1)
        writer.stdout.close()
        assert writer.stderr.read() == "" and writer.wait() == 1


def test_help_needs_no_torch():
    code = "import sys; sys.modules |= {'torch': None, 'triton': None}; from gkernels.cli import main; main(['generate', '--help'])"
    assert "--max-tokens N" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_bench_belongs_to_the_checkout(capsys, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: called.append((command[1:], cwd)) or 3)
    assert cli.main(["bench", "rmsnorm"]) == 3
    assert cli.main(["bench", "--only=-x.*", "--providers", "a,b", "--trace"]) == 3
    assert called == [(["-m", "bench", *arguments], Path(cli.__file__).parent.parent)
                      for arguments in (["rmsnorm", "--only=", "--providers="], ["--only=-x.*", "--providers=a,b", "--trace"])]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "gkernels" / "cli.py"))
    assert run(capsys, "bench")[0] == 2


def screen(written):
    """What a terminal shows of text and the view's two commands: n lines up, and clear from there on."""
    shown = ""
    for up, text in re.findall(r"\x1b\[(\d+)F\x1b\[J|(\x1b\[\dm|[^\x1b]+)", written):
        if up:
            lines = shown.split("\n")[:-1]
            assert int(up) <= len(lines), "the cursor cannot leave the screen"
            shown = "".join(line + "\n" for line in lines[:len(lines) - int(up)])
        elif text[0] != "\x1b":
            shown += text
    return shown


def drive(view_class, pieces, size, monkeypatch):
    """Feeds (prompt, piece) pairs to a view on a terminal of that size; yields what it shows after each step, and at the end."""
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(cli.shutil, "get_terminal_size", lambda: os.terminal_size(size))
    monkeypatch.setattr(cli.Live, "PERIOD", 0.0)
    view = view_class(["first", "second"], 99)
    view.step(0)
    for prompt, piece in pieces:
        view.push(prompt, piece, None)
        view.step(1)
        yield screen(terminal.getvalue())
    view.close()
    yield screen(terminal.getvalue())


def test_fast_steps_are_not_all_drawn(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(cli.Live, "PERIOD", 3600.0)
    view = cli.Live(["first"], 9)
    for _ in range(9):
        view.push(0, " word", None)
        view.step(1)
    assert sys.stdout.getvalue().count("first") == 1
    view.close()
    assert "first" + 9 * " word" in screen(sys.stdout.getvalue())


texts = st.text("ab \n\t\x1b\u00e9\u4e2d", max_size=12)


def check_live(view_class, pieces, width, height):
    with pytest.MonkeyPatch.context() as monkeypatch:
        *running, last = drive(view_class, pieces, (width, height), monkeypatch)
    for shown in running:
        lines = shown.split("\n")
        assert len(lines) <= height and all(len(line) < width for line in lines)
        assert "99 tokens, 0 s".startswith(lines[-2].partition("most ")[2])
    full = ["first", "second"]
    for prompt, piece in pieces:
        full[prompt] += piece
    want = [line for i, text in enumerate(full, 1) for line in [f"{i} running", *cli.wrapped(text, width - 1)]]
    assert last == "\n".join(want) + "\n"


@given(st.lists(st.tuples(st.integers(0, 1), texts), max_size=6), st.integers(14, 40), st.integers(6, 30))
def test_live_view_shows_every_text_once(pieces, width, height):
    check_live(cli.Live, pieces, width, height)


def test_a_view_that_forgets_to_clear_is_caught():
    class Broken(cli.Live):
        def draw(self, lines):
            super().draw(lines)
            self.drawn -= 1
    with pytest.raises(AssertionError):
        check_live(Broken, [(0, "a"), (1, "b")], 30, 20)


@given(texts, st.integers(2, 9))
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    lines = cli.wrapped(text, width)
    assert all(sum(2 if c == "\u4e2d" else 1 for c in line) <= width for line in lines)
    assert "".join(lines) == text.expandtabs(4).replace("\n", "").replace("\x1b", "\ufffd")


@given(st.lists(st.tuples(st.integers(0, 1), texts.map(lambda t: t.replace("\x1b", ""))), max_size=6))
def test_lines_are_printed_whole(pieces):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        view = cli.Lines(["first", "second"], 99)
        for prompt, piece in pieces:
            view.push(prompt, piece, None)
        for prompt in (0, 1):
            view.push(prompt, "", "length")
        view.close()
        printed = sys.stdout.getvalue().split("\n")
    for prompt, text in ((0, "first"), (1, "second")):
        text += "".join(piece for i, piece in pieces if i == prompt)
        assert "\n".join(line[3:] for line in printed if line.startswith(f"{prompt + 1}: ")) == text.removesuffix("\n")


def test_doctor_of_this_machine(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    good = {line[9:31].strip() for line in out.splitlines() if line.startswith("ok ")}
    assert good >= set(doctor.CHECKS) - {"einops", "CUDA device", "C compiler", "extra: loop"}
    assert "generate runs on: " in out


def test_doctor_says_what_loops_lack(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert doctor.loop() == (False, "WHILE nodes are made through cuda.bindings, which is not installed", "pip install 'gkernels[loop]'")


@pytest.mark.parametrize("lacking, mends", [
    (["torch"], ["torch==2.11.0"]), (["torch", "triton"], ["torch==2.11.0", "triton==3.6.0"]),
    (["safetensors"], ["pip install safetensors"])])
def test_doctor_reports_missing_packages(lacking, mends, tmp_path):
    for name in lacking:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')\n")
    run = subprocess.run([sys.executable, "-m", "gkernels", "doctor"], env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
                         text=True)
    assert run.returncode == 1 and not run.stderr and "generate cannot run here" in run.stdout
    missing = [line for line in run.stdout.splitlines() if line.startswith("missing ")]
    assert all(any(mend in line for line in missing) for mend in mends), run.stdout


def test_doctor_sees_a_wrong_kernel(monkeypatch):
    from gkernels import interpret
    from gkernels.kernels import rmsnorm
    monkeypatch.setattr(interpret, "enable", lambda: None)
    monkeypatch.setattr(rmsnorm, "rmsnorm", lambda x, weight, eps: x)
    with pytest.raises(RuntimeError, match="rmsnorm gave"):
        doctor.interpret_kernel()
    good, found, mend = doctor.trial("no_such_trial", "the mend")()
    assert not good and "no_such_trial" in found and mend == "the mend"


def test_counts_of_a_junit_report(tmp_path, monkeypatch):
    xml = '<testsuites><testsuite tests="10" failures="1" errors="2" skipped="3"/></testsuites>'
    assert counts(xml) == {"passed": 4, "failed": 3, "skipped": 3}
    monkeypatch.setenv("OUT", str(tmp_path))
    assert '"passed": 4' in merge(xml, "none").read_text()
