"""Every command of README and docs is run by a test or in CI, or it stands here with the reason.

`tests/test_docs.py` has the parsers check all arguments. Here each command has its runners: the
files that run it, in which the command and all options that the pages show must stand.
"""

import ast
import re
import shlex
from functools import cache

import pytest
from test_docs import CHECKOUT, CURRENT_PAGES, page_id, read_code_blocks

DEMO = "launch/demo.py"
"""Lists the commands that `make demo` runs, each as a process, and `.ci/run` runs `make demo`."""
TUTORIAL = "docs/tutorial/own-data.md"
"""`tests/test_own_data_tutorial.py` runs the commands of this page."""
RUNNERS = {
    "accelerate launch launch/phase1.py": ("tests/train/test_training.py", DEMO),
    "accelerate launch launch/phase2.py": ("tests/train/test_training.py", DEMO),
    "accelerate launch launch/phase3.py": (
        *("tests/train/test_training.py", "tests/train/test_validation.py"),
        *("tests/train/recovery/test_recovery.py", "tests/train/test_scale_out.py", DEMO),
    ),
    "make demo": (".ci/run",),
    "make preprocess": (TUTORIAL, "tests/launch/test_demo.py"),
    "make setup": (".github/workflows/ci.yml", "tests/launch/test_constraints.py"),
    "make test": (".ci/run",),
    "make test-slow": (".ci/run",),
    "make verify": (TUTORIAL, "tests/test_makefile.py"),
    "python data_pipeline.sample_cts": (DEMO,),
    "python data_pipeline.verify": ("tests/data_pipeline/verify/test_verify.py",),
    "python launch.demo": ("tests/launch/test_learn.py",),
    "rectvlm challenge": ("tests/predict/test_challenge.py",),
    "rectvlm completion": ("tests/test_shell_completion.py",),
    "rectvlm doctor": ("tests/doctor/test_checks.py",),
    "rectvlm embed": ("tests/embed/test_embed.py",),
    "rectvlm evaluate": (
        *("tests/test_cli.py", "tests/data_pipeline/test_rad_chestct.py"),
        *("tests/evaluate/test_evaluate_ranks.py", "tests/evaluate/test_report_server.py"),
    ),
    "rectvlm export": ("tests/checkpoint/test_export.py",),
    "rectvlm init": ("tests/test_commented_config.py",),
    "rectvlm plan": ("tests/plan/test_planner.py",),
    "rectvlm predict": (
        *("tests/predict/test_predict_folders.py", "tests/predict/test_predict_dicom.py"),
        *("tests/predict/test_dicomweb.py", DEMO),
    ),
    "rectvlm preprocess": (
        *("tests/data_pipeline/own_data/test_own_data.py", DEMO),
        "tests/data_pipeline/test_rad_chestct.py",
    ),
    "rectvlm probe": ("tests/embed/test_probe.py",),
    "rectvlm runs compare": ("tests/runs/test_runs.py",),
    "rectvlm runs list": ("tests/runs/test_runs.py",),
    "rectvlm runs plot": ("tests/runs/test_runs.py",),
    "rectvlm runs test": ("tests/evaluate/test_comparison.py",),
    "rectvlm serve": ("tests/serve/test_server.py",),
    "rectvlm train": ("tests/train/test_launch.py",),
    "rectvlm version": (".github/workflows/ci.yml",),
    "rectvlm weights convert-labeler": ("tests/pretrained/test_text_classifier.py",),
    "rectvlm weights list": ("tests/pretrained/test_verify.py",),
    "rectvlm weights pull": ("tests/test_cli.py", "tests/pretrained/test_pull.py"),
    "rectvlm weights push": ("tests/pretrained/test_push.py",),
    "rectvlm weights verify": ("tests/pretrained/test_verify.py",),
    "torchrun rectvlm evaluate": (DEMO,),
    # The test runs the command that the module writes.
    "vllm serve": ("tests/evaluate/test_report_server.py", "rectvlm/evaluate/report_server.py"),
}
"""Files that run each command, one call or several."""
NOT_RUN = {
    "accelerate launch rectvlm evaluate": "torchrun sets the same variables, and make demo "
    "evaluates under it",
    "git clone": "the repository has no public address yet; .ci/run starts from a clone",
    "make bench": "ten minutes; tests/benchmarks/test_run.py runs its program at --scale smallest",
    "make learn": "twenty minutes; tests/launch/test_learn.py runs its program on fewer cases",
    "pip install": "the wheel job of CI installs the package itself; extras come with make setup",
    "sbatch launch/slurm/train.sbatch": "needs Slurm; tests/train/test_scale_out.py runs the "
    "script's parts with a stand-in for srun",
    "sky jobs launch": "needs an account with a cloud; tests/train/test_scale_out.py runs the "
    "scripts of its file",
}
"""Commands that nothing runs, with the reason."""
OPTIONS_NOT_RUN = {
    ("accelerate launch launch/phase3.py", "--num_machines"): "the test of two machines takes the "
    "number of launch/accelerate/nodes.yaml",
    ("make preprocess", "CONFIG"): "the tutorial's test adds it to the commands of its page",
    ("make verify", "CONFIG"): "the tutorial's test adds it to the commands of its page",
    ("python launch.demo", "--phases"): "tests run all three; fewer are the same commands",
    ("make verify", "STATS"): "tests/data_pipeline/verify/test_statistics.py gives --stats to the "
    "program behind it",
}
"""Options of a command that nothing runs, with the reason."""
SHELL_WORDS = {".", "cd"}


def split_command(line: str) -> tuple[str, set[str]] | None:
    """A command without its arguments, and the options that it is given; None for the shell's own.

    The words of a command are the program and the subcommands or the script behind it.
    """
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words or words[0] in SHELL_WORDS:
        return None
    program = words[0]
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)} - {"-m"}
    if program == "make":
        options = {word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)}
        return f"make {words[1]}", options
    names = [word for word in words[1:] if re.fullmatch(r"[a-z][\w./-]*", word)]
    if program in ("accelerate", "torchrun"):
        start = next(
            place
            for place, name in enumerate(names)
            if name.startswith(("launch/phase", "rectvlm"))
        )
        count = 2 if names[start] == "rectvlm" else 1
        launcher = ["accelerate", "launch"] if program == "accelerate" else ["torchrun"]
        return " ".join([*launcher, *names[start : start + count]]), options
    count = {"sky": 2, "rectvlm": 2 if names[0] in ("runs", "weights") else 1}.get(program, 1)
    return " ".join([program, *names[:count]]), options


def documented_commands() -> dict[str, dict[str, str]]:
    """Options of each command of the pages, each option with one page that shows it."""
    commands: dict[str, dict[str, str]] = {}
    for page in CURRENT_PAGES:
        texts = [text for language, text in read_code_blocks(page) if language == "bash"]
        for line in "\n".join(texts).replace(" && ", "\n").splitlines():
            command = split_command(line)
            if command is not None:
                options = commands.setdefault(command[0], {})
                options.update(dict.fromkeys(command[1], page_id(page)))
    return commands


COMMANDS = documented_commands()


@cache
def read_words(name: str) -> frozenset[str]:
    """Words of a file; of a program, of its strings, its imports and the tests' helpers."""
    path = CHECKOUT / name
    if path.suffix != ".py":
        return frozenset(word.partition("=")[0] for word in path.read_text().split())
    words: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = node.value.split()
            words |= {*texts, *(text.partition("=")[0] for text in texts)}
        for module in _list_imports(node):
            words.add(module)
            helper = f"tests/{module.removeprefix('tests.').replace('.', '/')}.py"
            if (CHECKOUT / helper).is_file():
                words |= read_words(helper)
    return frozenset(words)


def _list_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def test_every_documented_command_is_run_or_stands_here_with_a_reason() -> None:
    assert len(COMMANDS) > 40
    missing = COMMANDS.keys() - RUNNERS.keys() - NOT_RUN.keys()
    assert not missing, f"no test runs {sorted(missing)}: name one, or the reason"
    stale = (RUNNERS.keys() | NOT_RUN.keys()) - COMMANDS.keys()
    assert not stale, f"no page shows {sorted(stale)}"
    assert not RUNNERS.keys() & NOT_RUN.keys()


@pytest.mark.parametrize("command", RUNNERS)
def test_the_runners_of_a_command_give_it_every_option_that_the_pages_show(command: str) -> None:
    words = frozenset().union(*map(read_words, RUNNERS[command]))
    for name in command.split()[1:]:
        numbered = re.sub(r"phase\d", "phase{phase}", name)
        assert {name, numbered} & words or name == "rectvlm", f"no {name} in {RUNNERS[command]}"
    for option, page in COMMANDS.get(command, {}).items():
        is_excused = (command, option) in OPTIONS_NOT_RUN
        assert (option in words) != is_excused, f"{option} of {command} ({page})"
    excused = {option for name, option in OPTIONS_NOT_RUN if name == command}
    assert excused <= COMMANDS.get(command, {}).keys()
