"""The commands as people type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support import INDUCTION, MODELS, ROOT, make_recipe, run


def actpipe(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "actpipe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=200)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The demo on a tenth of its tokens, started from another folder."""
    folder = tmp_path_factory.mktemp("demo")
    result = actpipe(
        "run", ROOT / "workflows/quickstart.yaml", "--set", "tokenize_text@main.max_tokens=10000", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return folder / "runs/quickstart", result


class TestQuickstart:
    def test_it_prints_what_it_found(self, quickstart):
        output = quickstart[1].stdout

        assert re.search(r"tokens\s+10,000", output)
        assert re.search(r"speed\s+[\d,]+\s+tokens/s", output)
        assert re.search(r"written\s+[\d.]+ MB", output)
        assert re.search(r"loss\s+[23]\.\d+\s+nats per token", output)
        assert re.search(r"Induction heads: repeated\n.*\n.*\n\s*L1H0\s+0\.[78]", output)
        assert re.search(r"Previous token heads: repeated\n.*\n.*\n\s*L0H0\s+0\.99", output)
        assert "report.html" in output

    def test_progress_is_plain_where_there_is_no_terminal(self, quickstart):
        errors = quickstart[1].stderr

        assert re.search(r"extract main: 100% 10,000/10,000 tokens, [\d,]+ tokens/s, [\d.]+ MB", errors)
        assert "\x1b[" not in errors
        assert "it/s" not in errors

    def test_the_report_stands_alone(self, quickstart):
        page = (quickstart[0] / "report.html").read_text()

        assert not re.search(r'<(script|link|img)[^>]+(src|href)="', page)
        for title in ("Loss by position", "Logit of the correct next token, by component", "Induction heads"):
            assert f"<h3>{title}</h3>" in page
        assert page.count('class="figure"') >= 8

    def test_it_is_whole(self, quickstart):
        result = actpipe("verify", quickstart[0])

        assert result.returncode == 0
        assert "all is well" in result.stdout

    def test_info_says_what_is_there(self, quickstart):
        result = actpipe("info", quickstart[0])

        assert result.returncode == 0
        assert re.search(r"activations/blocks\.1\.hook_resid_post\s+float32\s+\(10000, 128\)\s+5\.12 MB", result.stdout)
        assert "attribute_logits" in result.stdout
        assert "Store of repeated" in result.stdout

    def test_a_flipped_bit_makes_verify_fail(self, quickstart, tmp_path):
        import shutil

        copy = shutil.copytree(quickstart[0], tmp_path / "run")
        path = copy / "store.zarr/metrics/loss/c/0"
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)

        result = actpipe("verify", copy)
        assert result.returncode == 1
        assert "metrics/loss/c/0: checksum" in result.stdout


def test_help_teaches():
    overview, of_run = actpipe("--help"), actpipe("run", "--help")

    assert {"run", "plan", "hooks", "check", "info", "verify"} <= set(re.findall(r"\w+", overview.stdout))
    assert "Interrupted, the same command continues" in of_run.stdout
    assert "Example" in of_run.stdout


def test_hooks_lists_names_shapes_and_bytes():
    result = actpipe("hooks", MODELS / "llama", "blocks.1.*", "--dtype", "float16", "--context", "64")

    assert result.returncode == 0
    assert re.search(r"blocks\.1\.attn\.hook_k\s+32\s+kv_head 2 x d_head 8", result.stdout)
    assert re.search(r"blocks\.1\.attn\.hook_pattern\s+512\s+head 4 x key_position 64", result.stdout)
    assert "blocks.0" not in result.stdout


def test_check_proves_the_hooks_of_a_model():
    result = actpipe("check", INDUCTION)

    assert result.returncode == 0
    assert "all 29 identities hold; 28 of 28 kinds of hook points proven" in result.stdout


def test_check_exits_with_1_where_an_identity_fails(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from actpipe.models import taps\n"
        "right = taps._read_z\n"
        "taps._read_z = lambda tensor, n_heads: right(tensor, n_heads) * 1.5\n"
        f"sys.argv = ['actpipe', 'check', {str(INDUCTION)!r}]\n"
        "from actpipe.cli import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)

    assert result.returncode == 1
    assert re.search(r"FAILS.*z = pattern @ v", result.stdout)


def test_plan_says_what_a_run_will_cost(corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    with recipe.open("w") as file:
        YAML().dump(make_recipe(corpus), file)
    result = actpipe("plan", recipe, cwd=tmp_path)

    assert result.returncode == 0
    for word in ("tokens", "written", "parts", "memory", "time"):
        assert re.search(rf"^{word}\s+\S+", result.stdout, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.yaml"], "there is no recipe nothing.yaml"),
        (["hooks", str(INDUCTION), "blocks.0.hook_resid_pots"], "did you mean 'blocks.0.hook_resid_post'"),
        (["hooks", str(INDUCTION), "--dtype", "float17"], "did you mean 'float16'"),
        (["check", "./gpt2"], "model folder './gpt2' does not exist"),
        (["info", "."], "is no run folder"),
        (["verify", "nothing"], "there is no run folder nothing"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(tmp_path, arguments, message):
    result = actpipe(*arguments, cwd=tmp_path)

    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


def test_documents_of_markup_do_not_disturb_the_tables(write_jsonl, tmp_path):
    path = write_jsonl(
        [{"id": "[bold]x[/]", "text": None}, {"id": "<script>", "text": ""}, {"id": "c", "text": "To be"}]
    )
    run(make_recipe(path), tmp_path / "run")

    assert actpipe("info", tmp_path / "run").returncode == 0
