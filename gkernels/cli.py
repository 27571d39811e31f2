"""The command line:  python -m gkernels generate | check | doctor | bench.

A subcommand is one function of its parsed options that returns the exit code: 0 done, 1 a result to look at, 2 a mistake of the caller's,
told in one line on stderr. torch and triton are imported by the commands that need them, so that `--help` and `doctor` need neither.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from importlib import import_module
from pathlib import Path

from .progress import progress

CHECKPOINT = Path(__file__).parent / "model" / "assets" / "shakespeare"
PROMPTS = ("ROMEO:\nO,", "KING HENRY:\nNow", "JULIET:\nWhat")
NEW_TOKENS = {"cpu": 24, "cuda": 200}        # an interpreted step of the packaged checkpoint takes 2 s
STEP_TOKENS = {"cpu": 32, "cuda": 512}
LOOP = {"cpu": 4, "cuda": 64}                # steps a launch, whose tokens are shown together
MOST_REQUESTS = 32                           # at once, where --max-requests does not say


class UserError(Exception):
    """A mistake that the caller can mend; its text is the line that they see."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"gkernels: {message}; see {self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code; argparse's own exits (--help, a bad option) raise SystemExit."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:
        print("\ngkernels: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "gkernels").partition(".")[0] == "gkernels":
            raise
        return complain(f"the package {error.name} is missing; `python -m gkernels doctor` names the command that mends it")
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            return complain("out of GPU memory; try a smaller --max-len or --max-requests")
        if not str(error).startswith("gkernels."):
            raise
        return complain(str(error).removeprefix("gkernels."))


def complain(message: object) -> int:
    print(f"gkernels: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="gkernels", description="Graph-safe Triton kernels for LLM inference.")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(run, words):
        added = commands.add_parser(run.__name__, help=words, description=words[0].upper() + words[1:] + ".")
        added.set_defaults(run=run)
        return added.add_argument

    add = command(generate, "continue several prompts at once, every step one graph replay on a GPU")
    add("--model", type=Path, default=CHECKPOINT, metavar="DIR", help="folder of a Hugging Face checkpoint (default: the packaged one)")
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more texts to continue")
    add("--chat", action="store_true", help="wrap each prompt in the checkpoint's chat template")
    add("--max-tokens", type=at_least(1), metavar="N",
        help=f"new tokens a prompt (default: {NEW_TOKENS['cuda']}, {NEW_TOKENS['cpu']} on a CPU)")
    add("--temperature", type=float, default=0.0, metavar="F", help="0, the default, takes the likeliest token")
    add("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="F", help="draw from the likeliest tokens that together reach probability F")
    add("--min-p", type=float, default=0.0, metavar="F", help="draw from tokens at least F times as likely as the likeliest")
    add("--seed", type=int, default=0, metavar="N", help="the first prompt's seed; each further prompt's is one more")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the checkpoint's, float32 on a CPU")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees it")
    add("--max-requests", type=at_least(1), metavar="N", help=f"prompts computed at once (default: all, up to {MOST_REQUESTS})")
    add("--max-len", type=at_least(2), metavar="N", help="longest sequence (default: what the prompts and --max-tokens need)")
    add("--invariant", action="store_true", help="the same bits whatever else is computed and however a prompt is cut; slower prefill")
    add("--loop", type=at_least(1), metavar="N", help="most steps of one launch, once every prompt decodes (default: "
        f"{LOOP['cuda']}, {LOOP['cpu']} on a CPU)")
    add("--verify", action="store_true", help="compare every token with the plain PyTorch reference; exit code 1 on a difference")

    add = command(check, "prove a callable safe in a CUDA graph; exit code 1 where something speaks against it")
    add("target", metavar="MODULE:FUNCTION", help="a function without arguments that returns a gkernels.graph.check.Subject")
    add("--json", action="store_true", help="print the report as JSON")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees it; on a CPU kernels are interpreted")

    add = command(precompile, "compile a model's kernels for a GPU, on a machine without one, into Triton's cache")
    add("--config", type=Path, required=True, metavar="FILE", help="config.json of a Hugging Face checkpoint, or its folder")
    add("--arch", required=True, metavar="N", help="compute capability without its dot, such as 90 for an H100, or gfx942")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the checkpoint's")
    add("--max-tokens", type=at_least(1), default=STEP_TOKENS["cuda"], metavar="N", help="most tokens of a step (default: %(default)s)")
    add("--max-requests", type=at_least(1), default=MOST_REQUESTS, metavar="N", help="most requests of a step (default: %(default)s)")
    add("--invariant", action="store_true", help="for an engine that is")
    add("--multiprocessors", type=at_least(1), metavar="N", help="of the GPU (default: of the architecture's data-center GPU)")
    add("--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="compilers at once (default: %(default)s)")

    command(doctor, "say what this machine has and what it lacks, with the commands that mend it")

    add = command(bench, "time the kernels on this GPU (from a source checkout)")
    add("room", nargs="*", help="which benches (default: all)")
    add("--only", default="", metavar="REGEX", help="only the cases that it is found in")
    add("--providers", default="", metavar="NAME,NAME", help="only these providers")
    add("--trace", action="store_true", help="of decode_step: print what each kernel adds, and draw the nodes")
    return top


def at_least(least: int):
    def integer(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return int(text)
    return integer


def check(options: argparse.Namespace) -> int:
    ready(options.device)
    from .graph.check import examine, load
    report = examine(load(options.target))
    print(report.json() if options.json else report.text(), flush=True)
    return 0 if report.clean else 1


def precompile(options: argparse.Namespace) -> int:
    from .model.config import DTYPES, LlamaConfig, read_json
    from .precompile import precompile as fill
    config = LlamaConfig.from_dir(options.config) if options.config.is_dir() else LlamaConfig.from_dict(read_json(options.config))
    print(fill(config, options.arch, DTYPES.get(options.dtype), options.max_tokens, options.max_requests, options.multiprocessors,
               workers=options.workers, progress=True, invariant=options.invariant))
    return 0


def doctor(options: argparse.Namespace) -> int:
    from .doctor import main as examine
    return examine()


def bench(options: argparse.Namespace) -> int:
    root = Path(__file__).parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise UserError(f"bench: no benches beside {Path(__file__).parent}: they come with the source checkout, not with the package")
    filters = [f"--only={options.only}", f"--providers={options.providers}", *["--trace"] * options.trace]
    return subprocess.call([sys.executable, "-m", "bench", *options.room, *filters], cwd=root)


def generate(options: argparse.Namespace) -> int:
    device = ready(options.device)
    from . import ops
    from .model.config import DTYPES, LlamaConfig
    from .model.engine import Engine, Sampling
    from .model.tokenizer import Tokenizer

    if not options.model.is_dir():
        raise UserError(f"--model: got {options.model}, expected the folder of a Hugging Face checkpoint")
    config, tokenizer = LlamaConfig.from_dir(options.model), Tokenizer.from_dir(options.model)
    texts = options.prompt or PROMPTS
    encode = (lambda text: tokenizer.apply_chat_template([{"role": "user", "content": text}])) if options.chat else tokenizer.encode
    prompts = [encode(text) for text in texts]
    new_tokens = options.max_tokens or NEW_TOKENS[device]
    longest = max(map(len, prompts))
    most = min(options.max_len or config.max_position_embeddings, config.max_position_embeddings)
    if longest >= most:                      # known before the weights are loaded and the graphs captured
        raise UserError(f"--prompt: got {longest} tokens, expected at most {most - 1}: shorten it"
                        f"{', or raise --max-len' if most < config.max_position_embeddings else ', the model serves no longer ones'}")
    ops.check_options(options.temperature, options.top_k, options.top_p, options.min_p, config.vocab_size)
    requests = options.max_requests or min(len(prompts), MOST_REQUESTS)
    dtype = DTYPES[options.dtype] if options.dtype else config.dtype if device == "cuda" else DTYPES["float32"]
    engine = Engine.from_dir(options.model, device, dtype, options.max_len or longest + new_tokens, max_requests=requests,
                             max_tokens=max(STEP_TOKENS[device], requests), progress=True, loop=options.loop or LOOP[device],
                             invariant=options.invariant)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, Sampling(new_tokens, options.temperature, options.top_k, options.top_p, options.min_p, options.seed + i))

    on_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    seconds = watch(engine, tokenizer, (Live if on_terminal else Lines)(texts, new_tokens * len(texts)))
    done, runners = list(engine.requests.values()), engine.runners
    tokens, modes = sum(len(request.output) for request in done), ", ".join(f"{n} {mode}" for mode, n in engine.modes.items())
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s; {engine.steps} steps ({modes}): "
          f"{sum(r.replays for r in runners)} replays, {sum(r.eager_steps for r in runners)} eager; {engine.preemptions} preemptions; "
          f"{engine.runner.path}", *[f"no loop: {engine.why}"] * bool(engine.why), sep="\n", flush=True)
    failed = [f"prompt {request.id + 1}: {request.finish_reason}" for request in done if (request.finish_reason or "").startswith("error")]
    print(*failed, sep="\n", end="\n" * bool(failed))
    differ = options.verify and [verify(engine, request, tokenizer) for request in done].count(False)
    return 1 if failed or differ else 0


def ready(wanted: str | None) -> str:
    """"cuda" or "cpu". Switches the interpreter on for a CPU, before any kernel is imported."""
    import torch
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        from . import interpret
        interpret.enable()
    elif not torch.cuda.is_available():
        raise UserError("--device: got cuda, but torch sees no CUDA device; use --device cpu, or see `python -m gkernels doctor`")
    elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set, so kernels would not be compiled; unset it, or use --device cpu")
    return device


def watch(engine, tokenizer, view: Lines | Live) -> float:
    """Runs the engine until every request has ended, showing the text as it comes; returns the seconds it took."""
    streams = {i: tokenizer.stream() for i in engine.requests}
    for i, request in engine.requests.items():
        for token in request.prompt:         # so that the first new token is decoded in the prompt's context
            streams[i].push(token)
    start = time.perf_counter()
    try:
        view.step(0)
        while engine.busy:
            events = engine.step()
            for event in events:
                piece = "" if event.token is None else streams[event.request_id].push(event.token)
                view.push(event.request_id, piece + (streams[event.request_id].flush() if event.finish_reason else ""), event.finish_reason)
            view.step(sum(event.token is not None for event in events))
    finally:
        view.close()
    return time.perf_counter() - start


class Lines:
    """Off a terminal: each line of text once it is whole, after its prompt's number, and a progress bar where stderr is a terminal."""

    def __init__(self, texts, total):
        self.texts = list(texts)
        self.bar = progress(total=total, desc="generate", unit="token", file=sys.stderr)

    def push(self, i, piece, ended):
        *whole, self.texts[i] = (self.texts[i] + piece).split("\n")
        for line in whole + [self.texts[i]] * bool(ended and self.texts[i]):
            print(f"{i + 1}: {line}", flush=True)

    def step(self, tokens):
        self.bar.update(tokens)

    def close(self):
        self.bar.close()


class Live:
    """On a terminal: one block a prompt, all drawn again as text comes. While it runs, a block shows as many of its last lines as fit."""

    PERIOD = 0.05                            # seconds between two drawings, for a step may take a thousandth of one

    def __init__(self, texts, total):
        self.texts, self.states, self.total = list(texts), ["running"] * len(texts), total
        self.tokens = self.drawn = 0
        self.start, self.due = time.perf_counter(), 0.0

    def push(self, i, piece, ended):
        self.texts[i] += piece
        self.states[i] = f"ended ({ended})" if ended else self.states[i]

    def step(self, tokens):
        self.tokens += tokens
        if (now := time.perf_counter()) < self.due:
            return
        self.due = now + self.PERIOD
        width, height = shutil.get_terminal_size()
        room = max((height - 2) // len(self.texts) - 1, 1)
        lines = [line for block in self.blocks(width) for line in block[:1] + block[1:][-room:]]
        status = f"{self.tokens} of at most {self.total} tokens, {now - self.start:.0f} s"
        self.draw([*lines[:height - 2], status[:width - 1]])

    def close(self):
        self.draw([line for block in self.blocks(shutil.get_terminal_size().columns) for line in block])

    def blocks(self, width):
        for i, (text, state) in enumerate(zip(self.texts, self.states, strict=True), 1):
            yield [f"\x1b[1m{i}\x1b[0m {state}"[:width + 7], *wrapped(text, width - 1)]

    def draw(self, lines):
        back = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        sys.stdout.write(back + "\n".join(lines) + "\n")
        sys.stdout.flush()
        self.drawn = len(lines)


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` terminal cells. What a terminal could take for a command is shown as a replacement character."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        lines.append("")
        used = 0
        for char in line:
            cells = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if used + cells > width:
                lines.append("")
                used = 0
            lines[-1] += char if char.isprintable() else "\ufffd"
            used += cells
    return lines


def verify(engine, request, tokenizer) -> bool:
    """Prints how many of a request's tokens the plain PyTorch model draws from the same prefixes; True if it draws them all."""
    import torch
    if not request.output:
        return True
    weights, config, s, n = engine.model.weights, engine.model.config, request.sampling, len(request.prompt)
    ids = torch.tensor((request.prompt + request.output)[:-1], device=weights.embed.device)
    hidden = reference("llama").hidden_states(weights, config, ids, engine.model.cos_sin)[n - 1:]
    logits = hidden.float() @ weights.lm_head.float().T              # not rounded to the weights' dtype, as the engine's are not
    per_row = lambda value, dtype: torch.full((len(logits),), value, dtype=dtype, device=ids.device)
    position = torch.arange(n, n + len(logits), device=ids.device)
    drawn = reference("sampling").sample(
        logits, per_row(s.temperature, torch.float32), per_row(s.top_k, torch.int32), per_row(s.top_p, torch.float32),
        per_row(s.min_p, torch.float32), per_row(s.seed, torch.int64), position, position, per_row(0, torch.int32)).tolist()
    different = [i for i, (got, want) in enumerate(zip(request.output, drawn, strict=True)) if got != want]
    print(f"prompt {request.id + 1}: {len(drawn) - len(different)} of {len(drawn)} tokens equal", flush=True)
    if different:
        i = different[0]
        top = logits[i].topk(2).values
        got, want = (f"{tokenizer.decode([token])!r} ({token})" for token in (request.output[i], drawn[i]))
        print(f"prompt {request.id + 1}: new token {i + 1}, position {n + i}: got {got}, the reference draws {want}; its two greatest "
              f"logits are {top[0] - top[1]:.2g} apart", flush=True)
    return not different


def reference(room: str):
    """A module of the plain PyTorch twins: gkernels.reference where the package is installed, reference in a checkout."""
    for package in ("gkernels.reference", "reference"):
        try:
            return import_module(f"{package}.{room}")
        except ModuleNotFoundError as error:
            if error.name not in ("gkernels.reference", "reference"):
                raise
    raise UserError("--verify: the package gkernels.reference is missing; install gkernels, or run from its checkout")
